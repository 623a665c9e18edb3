"""Several detectors, their boxes merged by weighted boxes fusion (Solovyev et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_choice, check_number
from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import make_detections, select_rows, validate_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import BatchDetector, Detector, RefusesAnswers
from grounded_sam.structures.results import Skipped
from grounded_sam.structures.vocabulary import Vocabulary


class EnsembleDetector:
    """Merge the boxes of several detectors: boxes of one object become their mean, weighted by confidence.

    The fusion is `weighted_boxes_fusion` of the package `ensemble-boxes` (extra `ensemble`). Duplicates of a single
    detector are suppressed first (NMS at `iou`), since their lower confidence would enter the mean. Masks of detectors
    are not used. What each detector says is in `data["detector_scores"]`, a dict of scores by name for each box.

    Args:
        detectors: Detectors by name.
        weights: Weight of each detector's confidence by name; 1 for those not named.
        iou: IoU from which boxes of one class are the same object.
        min_score: Boxes below this confidence are dropped before the fusion, since most models return a box per query.
        score: Confidence of a merged box: `mean`, which is lower if not all detectors found the object, or `max`.

    Raises:
        ConfigError: If there are no detectors, a value is out of range, or the package is not installed.
    """

    def __init__(
        self,
        detectors: Mapping[str, Detector],
        weights: Mapping[str, float] | None = None,
        iou: float = 0.55,
        min_score: float = 0.05,
        score: Literal["mean", "max"] = "mean",
    ) -> None:
        try:
            from ensemble_boxes import weighted_boxes_fusion
        except ImportError as error:
            raise ConfigError("detector=ensemble needs ensemble-boxes: pip install 'grounded_sam[ensemble]'") from error
        if not detectors or not all(isinstance(detector, Detector) for detector in detectors.values()):
            raise ConfigError("detector.detectors must have one or more detectors by name")
        weights = weights or {}
        unknown = sorted(set(weights) - set(detectors))
        if unknown:
            raise ConfigError(f"detector.weights names {', '.join(unknown)}; the detectors are {', '.join(detectors)}")
        check_number("detector.iou", iou, 0, 1)
        check_number("detector.min_score", min_score, 0, 1)
        for name, weight in weights.items():
            check_number(f"detector.weights.{name}", weight, 0)
        check_choice("detector.score", score, ("mean", "max"))
        self.detectors, self.iou, self.min_score = dict(detectors), iou, min_score
        self.weights = [float(weights.get(name, 1.0)) for name in detectors]
        if not sum(self.weights):
            raise ConfigError("detector.weights must not all be 0")
        self.score = {"mean": "avg", "max": "max"}[score]
        self.batch_size = max(_batch_size(detector) for detector in detectors.values())
        self._fuse: Any = weighted_boxes_fusion

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the merged boxes of each frame."""
        by_detector = [self._detect(name, frames, vocabulary) for name in self.detectors]
        return [
            self._merge(frame, [detections[i] for detections in by_detector], vocabulary)
            for i, frame in enumerate(frames)
        ]

    def take_refused(self) -> list[Skipped]:
        """Return what the detectors refused of the answers of their models."""
        detectors = (detector for detector in self.detectors.values() if isinstance(detector, RefusesAnswers))
        return [skipped for detector in detectors for skipped in detector.take_refused()]

    def _detect(self, name: str, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Run one detector in batches of its own size; apply `min_score` and NMS."""
        detector, results = self.detectors[name], []
        size = _batch_size(detector)
        for start in range(0, len(frames), size):
            batch = frames[start : start + size]
            for frame, boxes in zip(batch, detector.detect(batch, vocabulary), strict=True):
                detections = validate_detections(boxes, vocabulary, frame.size_hw, f"detector {name}")
                assert detections.confidence is not None
                detections.mask = None
                rows = detections.confidence >= self.min_score
                results.append(select_rows(detections, rows).with_nms(self.iou))
        return results

    def _merge(self, frame: Frame, parts: Sequence[sv.Detections], vocabulary: Vocabulary) -> sv.Detections:
        """Merge the boxes of all detectors in one frame."""
        height, width = frame.size_hw
        scale = np.array([width, height, width, height], np.float64)
        boxes, scores, labels = self._fuse(
            [part.xyxy / scale for part in parts],
            [part.confidence for part in parts],
            [part.class_id for part in parts],
            weights=self.weights,
            iou_thr=self.iou,
            skip_box_thr=0.0,
            conf_type=self.score,
        )
        xyxy = np.asarray(boxes, np.float32).reshape(-1, 4) * scale.astype(np.float32)
        return make_detections(
            xyxy,
            scores.clip(0, 1),
            labels,
            vocabulary,
            frame.size_hw,
            detector_scores=self._scores_by_detector(xyxy, np.asarray(labels, np.int64), parts),
        )

    def _scores_by_detector(
        self, xyxy: NDArray[np.float32], class_ids: NDArray[np.int64], parts: Sequence[sv.Detections]
    ) -> NDArray[np.object_]:
        """Return for each merged box the highest score that each detector, by name, gives to an object there."""
        by_name = {}
        for name, part in zip(self.detectors, parts, strict=True):
            assert part.class_id is not None and part.confidence is not None
            overlap = sv.box_iou_batch(xyxy, part.xyxy) if len(xyxy) and len(part) else np.zeros((len(xyxy), len(part)))
            fits = (overlap >= self.iou) & (class_ids[:, None] == part.class_id[None])
            by_name[name] = np.where(fits, part.confidence[None], 0.0).max(1, initial=0.0)
        column = np.empty(len(xyxy), object)
        column[:] = [{name: round(float(values[i]), 4) for name, values in by_name.items()} for i in range(len(xyxy))]
        return column


def _batch_size(detector: Detector) -> int:
    return detector.batch_size if isinstance(detector, BatchDetector) else 1
