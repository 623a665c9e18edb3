"""Update boxes and confidence from masks and from a verifier."""

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
            to 0 to 1; `product` of both (mask scoring, Huang et al. 2019); with a verifier also `verify`, its score,
            and `calibrated`, the probability that it computes from all scores. What has a verify score from a store
            keeps its confidence.

    Raises:
        ConfigError: If a value is not allowed.

    >>> Refine(boxes=True).changes
    True
    """

    boxes: bool = False
    score: Literal["text", "mask", "product", "verify", "calibrated"] = "text"

    def __post_init__(self) -> None:
        check_bool("refine.boxes", self.boxes)
        check_choice("refine.score", self.score, ("text", "mask", "product", "verify", "calibrated"))

    @property
    def changes(self) -> bool:
        """Whether masks change detections at all."""
        return self.boxes or self.score in ("mask", "product")

    @property
    def verifies(self) -> bool:
        """Whether the confidence comes from a verifier."""
        return self.score in ("verify", "calibrated")

    def __call__(self, detections: sv.Detections) -> sv.Detections:
        """Refine detections that have masks, in place, and return them."""
        if self.boxes and detections.mask is not None and len(detections):
            boxes = masks_to_xyxy(np.asarray(detections.mask, bool))
            empty = (boxes[:, 2] == 0)[:, None]
            detections.xyxy = np.where(empty, detections.xyxy, boxes)
        if self.score in ("mask", "product") and "mask_score" in detections.data:
            assert detections.confidence is not None
            mask_score = np.asarray(detections.data["mask_score"], np.float32).clip(0, 1)
            detections.confidence = mask_score if self.score == "mask" else detections.confidence * mask_score
        return detections

    def rescore(self, detections: sv.Detections) -> sv.Detections:
        """Set the confidence of detections that a verifier judged, in place, and return them."""
        if self.verifies:
            detections.confidence = np.asarray(detections.data[f"{self.score}_score"], np.float32)
        return detections
