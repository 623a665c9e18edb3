"""No words at all: a mask for everything, by a grid of points (automatic mask generation of SAM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary


class EverythingDetector:
    """Masks of everything in a picture, over the authors' generators for SAM and SAM 2.

    Confidence is the predicted IoU. All detections are of one class: `object`, or the one that `text`
    names.

    Args:
        segmenter: whose model and generator to use: `segmenter=sam` or `segmenter=sam2`.
        points_per_side: points of the grid along a side.
        points_per_batch: points decoded at once.
        pred_iou_thresh: least predicted IoU of a mask, 0 to 1.
        stability_score_thresh: least IoU of the mask between a looser and a tighter cut, 0 to 1.
        box_nms_thresh: box IoU above which the worse of two masks is dropped.
        min_mask_region_area: pixels of the smallest hole or separate piece that a mask may have.
        crop_n_layers: also run on 4 to the power of each layer overlapping crops; for small things.
    """

    def __init__(
        self,
        segmenter: Any,
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.8,
        stability_score_thresh: float = 0.92,
        box_nms_thresh: float = 0.7,
        min_mask_region_area: int = 0,
        crop_n_layers: int = 0,
    ) -> None:
        if not hasattr(segmenter, "mask_generator"):
            raise ConfigError("detector=everything needs segmenter=sam or segmenter=sam2, whose model makes the masks")
        self.generator = segmenter.mask_generator(
            points_per_side=points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            box_nms_thresh=box_nms_thresh,
            min_mask_region_area=min_mask_region_area,
            crop_n_layers=crop_n_layers,
        )
        self.vocabulary = Vocabulary.parse(["object"])

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Masks and boxes of each frame."""
        if len(vocabulary) != 1:
            raise ConfigError(
                f"detector=everything gives one class; text names {len(vocabulary)}: {', '.join(vocabulary.classes)}"
            )
        return [self._in(frame, vocabulary) for frame in frames]

    def _in(self, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        import torch

        with torch.inference_mode():
            found = self.generator.generate(frame.image)
        if not found:
            return empty_detections(vocabulary)
        xywh = np.array([f["bbox"] for f in found], np.float32)
        # Upstream's boxes end on the last pixel; here the right and bottom edges are exclusive.
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:] + 1], 1)
        score = np.array([f["predicted_iou"] for f in found], np.float32)
        return make_detections(
            xyxy,
            score.clip(0, 1),
            np.zeros(len(found)),
            vocabulary,
            frame.size_hw,
            np.stack([f["segmentation"] for f in found]).astype(bool),
            mask_score=score,
            stability_score=np.array([f["stability_score"] for f in found], np.float32),
        )
