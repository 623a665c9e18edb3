"""Several detectors at once, their boxes merged by weighted box fusion (Solovyev et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import make_detections, select_rows, validate_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import Detector
from grounded_sam.structures.vocabulary import Vocabulary


class EnsembleDetector:
    """What several detectors find, boxes of one thing as one box: their mean, weighted by confidence.

    The fusion is `weighted_boxes_fusion` of the package `ensemble-boxes` (extra `ensemble`). A detector's own
    duplicates are dropped first (NMS at `iou`), since the mean would count their lower confidence. Masks that a
    detector gives are not used.

    Args:
        detectors: by name.
        weights: of each detector's confidence, by name; 1 for who is not named.
        iou: of boxes of one class from which they are one thing.
        floor: boxes below this confidence are left out before they are merged; most models give one for each query.
        score: confidence of a merged box: `mean`, which is lower if not all detectors found it, or `max`.

    Raises:
        ConfigError: without detectors, for a value out of its range, or without the package.
    """

    def __init__(
        self,
        detectors: Mapping[str, Detector],
        weights: Mapping[str, float] | None = None,
        iou: float = 0.55,
        floor: float = 0.05,
        score: Literal["mean", "max"] = "mean",
    ) -> None:
        try:
            from ensemble_boxes import weighted_boxes_fusion
        except ImportError as error:
            raise ConfigError("detector=ensemble needs ensemble-boxes: pip install 'grounded_sam[ensemble]'") from error
        if not detectors or not all(hasattr(detector, "detect") for detector in detectors.values()):
            raise ConfigError("detector.detectors must have one or more detectors by name")
        unknown = sorted(set(weights or {}) - set(detectors))
        if unknown:
            raise ConfigError(f"detector.weights names {', '.join(unknown)}; the detectors are {', '.join(detectors)}")
        for key, value in (("iou", iou), ("floor", floor)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"detector.{key} must be a number from 0 to 1, got {value!r}")
        for name, value in (weights or {}).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"detector.weights.{name} must be a number from 0, got {value!r}")
        if score not in ("mean", "max"):
            raise ConfigError(f"detector.score must be mean or max, got {score!r}")
        self.detectors, self.iou, self.floor = dict(detectors), iou, floor
        self.weights = [float((weights or {}).get(name, 1.0)) for name in detectors]
        if not sum(self.weights):
            raise ConfigError("detector.weights are all 0")
        self.score: Any = {"mean": "avg", "max": "max"}[score]
        self.batch_size = max(getattr(detector, "batch_size", 1) for detector in detectors.values())
        self._merge: Any = weighted_boxes_fusion

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """The merged boxes of each frame."""
        found = [self._look(name, detector, frames, vocabulary) for name, detector in self.detectors.items()]
        return [self._one(frame, [boxes[i] for boxes in found], vocabulary) for i, frame in enumerate(frames)]

    def _look(
        self, name: str, detector: Detector, frames: Sequence[Frame], vocabulary: Vocabulary
    ) -> list[sv.Detections]:
        """What one detector finds from `floor` on, in batches of its own size."""
        size, out = getattr(detector, "batch_size", 1), []
        for start in range(0, len(frames), size):
            group = frames[start : start + size]
            for frame, boxes in zip(group, detector.detect(group, vocabulary), strict=True):
                found = validate_detections(boxes, vocabulary, frame.size_hw, f"detector {name}")
                assert found.confidence is not None
                found.mask = None
                out.append(select_rows(found, found.confidence >= self.floor).with_nms(self.iou))
        return out

    def _one(self, frame: Frame, found: Sequence[sv.Detections], vocabulary: Vocabulary) -> sv.Detections:
        height, width = frame.size_hw
        scale = np.array([width, height, width, height], np.float64)
        boxes, scores, labels = self._merge(
            [one.xyxy / scale for one in found],
            [one.confidence for one in found],
            [one.class_id for one in found],
            weights=self.weights,
            iou_thr=self.iou,
            skip_box_thr=0.0,
            conf_type=self.score,
        )
        return make_detections(boxes * scale, scores.clip(0, 1), labels, vocabulary, frame.size_hw)
