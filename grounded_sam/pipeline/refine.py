"""Update boxes and confidence from masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import supervision as sv

from grounded_sam.checks import check_bool, check_choice
from grounded_sam.structures.masks import masks_to_xyxy


@dataclass(frozen=True)
class Refine:
    """How masks change the boxes and scores of their detections; the config section `refine`.

    With any change, NMS and `top_k` run after segmentation, on the new boxes and scores; before it only score
    thresholds apply, so that few boxes need a mask. Masks that come from a detector or a store are not refined.

    Attributes:
        boxes: Replace boxes with the boxes around the masks, except where a mask is empty.
        score: What the confidence becomes: `text`, the detector's score; `mask`, the predicted IoU of the mask, clipped
            to 0 to 1; `product` of both (mask scoring, Huang et al. 2019).

    Raises:
        ConfigError: If a value is not allowed.

    >>> Refine(boxes=True).changes
    True
    """

    boxes: bool = False
    score: Literal["text", "mask", "product"] = "text"

    def __post_init__(self) -> None:
        check_bool("refine.boxes", self.boxes)
        check_choice("refine.score", self.score, ("text", "mask", "product"))

    @property
    def changes(self) -> bool:
        """Whether detections change at all."""
        return self.boxes or self.score != "text"

    def __call__(self, detections: sv.Detections) -> sv.Detections:
        """Refine detections that have masks, in place, and return them."""
        if self.boxes and detections.mask is not None and len(detections):
            boxes = masks_to_xyxy(np.asarray(detections.mask, bool))
            empty = (boxes[:, 2] == 0)[:, None]
            detections.xyxy = np.where(empty, detections.xyxy, boxes)
        if self.score != "text" and "mask_score" in detections.data:
            assert detections.confidence is not None
            mask_score = np.asarray(detections.data["mask_score"], np.float32).clip(0, 1)
            detections.confidence = mask_score if self.score == "mask" else detections.confidence * mask_score
        return detections
