"""What masks do to their detections: boxes around them, confidence that knows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.structures.masks import masks_to_xyxy


@dataclass(frozen=True)
class Refine:
    """How detections change once a segmenter has given them masks, as it stands under `refine.` in the config.

    If anything changes, duplicates and numbers are settled after that, on the new boxes and scores; only thresholds are
    applied before too, so that few boxes need a mask. Masks of detectors and of stores are left as they are.

    Attributes:
        boxes: replace the detector's boxes with those around the masks, where these are not empty.
        score: the confidence: `text`, the detector's; `mask`, the segmenter's own estimate of the mask's IoU; `product`
            of both (mask scoring, Huang et al. 2019). Estimates are cut to 0 to 1.

    Raises:
        ConfigError: for another value.
    """

    boxes: bool = False
    score: Literal["text", "mask", "product"] = "text"

    def __post_init__(self) -> None:
        if not isinstance(self.boxes, bool):
            raise ConfigError(f"refine.boxes must be true or false, got {self.boxes!r}")
        if self.score not in ("text", "mask", "product"):
            raise ConfigError(f"refine.score must be text, mask or product, got {self.score!r}")

    @property
    def changes(self) -> bool:
        """Whether anything would change."""
        return self.boxes or self.score != "text"

    def __call__(self, found: sv.Detections) -> sv.Detections:
        """Refine detections with masks, in place."""
        if self.boxes and found.mask is not None and len(found):
            around = masks_to_xyxy(np.asarray(found.mask, bool))
            empty = (around[:, 2] == 0)[:, None]
            found.xyxy = np.where(empty, found.xyxy, around)
        if self.score != "text" and "mask_score" in found.data:
            assert found.confidence is not None
            estimate = np.asarray(found.data["mask_score"], np.float32).clip(0, 1)
            found.confidence = estimate if self.score == "mask" else found.confidence * estimate
        return found
