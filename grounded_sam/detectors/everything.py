"""Masks of everything in an image, without text: the automatic mask generators of SAM and SAM 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.checks import check_number
from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import DetectorTraits, GeneratesMasks
from grounded_sam.structures.vocabulary import Vocabulary

#: Settings for the published weights.
DEFAULTS: dict[str, Any] = {
    "points_per_side": 32,
    "pred_iou_thresh": 0.8,
    "stability_score_thresh": 0.92,
    "box_nms_thresh": 0.7,
    "mask_nms_thresh": None,
    "min_mask_region_area": 0,
}


class EverythingDetector:
    """Segment everything in an image from a grid of points, with the authors' mask generators.

    Confidence is the predicted IoU. All detections have one class: `object`, or the one that `text` names. Settings
    that are None are those of the embedded weights (`GeneratesMasks.mask_generator_settings`), or `DEFAULTS`.

    Args:
        segmenter: Segmenter whose model generates the masks: `segmenter=sam` or `segmenter=sam2`.
        points_per_side: Points of the grid along each side.
        points_per_batch: Points decoded at once.
        pred_iou_thresh: Lowest predicted IoU of a mask, 0 to 1.
        stability_score_thresh: Lowest IoU between the masks at a lower and a higher cutoff, 0 to 1.
        box_nms_thresh: Box IoU above which the worse of two masks is suppressed, 0 to 1.
        mask_nms_thresh: Mask IoU above which the worse of two masks is suppressed as well, 0 to 1.
        min_mask_region_area: Area in pixels below which holes are filled and separate regions are removed, before
            boxes are made of the masks.
        crop_n_layers: Number of crop layers; layer i runs on 4^i overlapping crops, for small objects.

    Raises:
        ConfigError: If the segmenter has no mask generator, or a setting is out of range.
    """

    def __init__(
        self,
        segmenter: Any,
        points_per_side: int | None = None,
        points_per_batch: int = 64,
        pred_iou_thresh: float | None = None,
        stability_score_thresh: float | None = None,
        box_nms_thresh: float | None = None,
        mask_nms_thresh: float | None = None,
        min_mask_region_area: int | None = None,
        crop_n_layers: int = 0,
    ) -> None:
        if not isinstance(segmenter, GeneratesMasks):
            raise ConfigError("detector=everything needs segmenter=sam or segmenter=sam2, whose model makes the masks")
        check_number("detector.mask_nms_thresh", mask_nms_thresh, 0, 1, optional=True)
        given = {
            "points_per_side": points_per_side,
            "pred_iou_thresh": pred_iou_thresh,
            "stability_score_thresh": stability_score_thresh,
            "box_nms_thresh": box_nms_thresh,
            "mask_nms_thresh": mask_nms_thresh,
            "min_mask_region_area": min_mask_region_area,
        }
        settings = {**DEFAULTS, **segmenter.mask_generator_settings}
        settings |= {key: value for key, value in given.items() if value is not None}
        self.mask_nms_thresh = settings.pop("mask_nms_thresh")
        self.generator = segmenter.mask_generator(
            **settings, points_per_batch=points_per_batch, crop_n_layers=crop_n_layers
        )
        self.vocabulary = Vocabulary.parse(["object"])

    @classmethod
    def traits(cls, settings: Mapping[str, Any]) -> DetectorTraits:
        """Declare that detections have masks, made with the segmenter's model."""
        return DetectorTraits(masks=True, replaces_segmenter=True)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the masks and boxes of each frame.

        Raises:
            ConfigError: If text names more than one class.
        """
        if len(vocabulary) != 1:
            names = ", ".join(vocabulary.classes)
            raise ConfigError(f"detector=everything has one class, but text names {len(vocabulary)}: {names}")
        return [self._generate(frame, vocabulary) for frame in frames]

    def _generate(self, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        import torch

        with torch.inference_mode():
            records = self.generator.generate(frame.image)
        if not records:
            return empty_detections(vocabulary)
        xywh = np.array([record["bbox"] for record in records], np.float32)
        # Upstream boxes include the last row and column; `xyxy` excludes them.
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:] + 1], 1)
        score = np.array([record["predicted_iou"] for record in records], np.float32)
        detections = make_detections(
            xyxy,
            score.clip(0, 1),
            np.zeros(len(records)),
            vocabulary,
            frame.size_hw,
            np.stack([record["segmentation"] for record in records]).astype(bool),
            mask_score=score,
            stability_score=np.array([record["stability_score"] for record in records], np.float32),
        )
        if self.mask_nms_thresh is None:
            return detections
        return detections.with_nms(self.mask_nms_thresh, class_agnostic=True)
