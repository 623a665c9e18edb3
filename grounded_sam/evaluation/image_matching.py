"""Match the detections of images with their labels, and count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.evaluation.calibration import Reliability, measure_reliability
from grounded_sam.evaluation.thresholds import BestThreshold, best_threshold
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class _ScoredDetection:
    """Image number, confidence and probability of a detection, and whether it matches a label."""

    image: int
    score: float
    probability: float
    is_match: bool


class ImageMatcher:
    """Match detections with labels image by image, and count matches and mistakes.

    Detections are matched with labels of their class, the most confident first, at an IoU of at least `iou`, of masks
    if both have them, else of boxes. A detection inside a crowd counts neither as a match nor as a mistake.

    Args:
        vocabulary: Classes of the run.
        iou: Lowest IoU of a match, above 0.

    Attributes:
        counts: `(c, 3) int64`, matched, missed and false by class.
        confusion: `(c + 1, c + 1) int64`, labels by class in rows, detections by class in columns, the last for none.
            Here matches ignore classes, and those of the highest IoU come first.
        mistakes: File, kind (`missed` or `false`), class, box and score of each mistake, as in `metrics.json`.

    >>> words = Vocabulary.parse(["car"])
    >>> matcher = ImageMatcher(words, 0.5)
    >>> car = sv.Detections(
    ...     np.array([[0, 0, 9, 9]]), confidence=np.ones(1), class_id=np.zeros(1, int), data={"class_name": ["car"]}
    ... )
    >>> missed, false = matcher.add("a.jpg", car, car)
    >>> matcher.counts.tolist()
    [[1, 0, 0]]
    """

    def __init__(self, vocabulary: Vocabulary, iou: float) -> None:
        self.vocabulary, self.iou = vocabulary, iou
        n = len(vocabulary)
        self.counts = np.zeros((n, 3), np.int64)
        self.confusion = np.zeros((n + 1, n + 1), np.int64)
        self.mistakes: list[dict[str, Any]] = []
        self._class_ids = {name: i for i, name in enumerate(vocabulary.classes)}
        # By class, for the best thresholds.
        self._scored: list[list[_ScoredDetection]] = [[] for _ in vocabulary.classes]
        self._label_counts: list[list[int]] = [[] for _ in vocabulary.classes]  # by image

    def add(self, name: str, detections: sv.Detections, labels: sv.Detections) -> tuple[sv.Detections, sv.Detections]:
        """Match the detections of an image with its labels.

        Args:
            name: Name of the image.
            detections: Detections of the run, masks as RLE (see `structures.masks.pack_masks`).
            labels: Its labels, also of other classes, masks as RLE. Those with `data["ignore"]` are crowds.

        Returns:
            Missed labels and false detections.
        """
        requested = [str(class_name) in self._class_ids for class_name in labels.data.get("class_name", [])]
        labels = select_rows(labels, np.array(requested, bool)) if not all(requested) else labels
        label_ids = np.array([self._class_ids[str(c)] for c in labels.data.get("class_name", [])], np.int64)
        is_crowd = np.asarray(labels.data.get("ignore", np.zeros(len(labels), bool)), bool)
        class_ids = np.asarray(detections.class_id if detections.class_id is not None else np.empty(0), np.int64)
        assert detections.confidence is not None
        iou = label_overlaps(detections, labels)
        same_class = class_ids[:, None] == label_ids[None]
        matches = self._match(np.where(same_class & ~is_crowd, iou, 0.0), detections.confidence)
        in_crowd = label_overlaps(detections, labels, is_crowd) * (is_crowd & same_class)
        ignored = in_crowd.max(1, initial=0.0) >= self.iou
        missed = np.flatnonzero(~is_crowd & ~np.isin(np.arange(len(labels)), matches))
        false = np.flatnonzero((matches < 0) & ~ignored)
        self._count_scored(class_ids, detections, matches, ignored)
        for class_id, counts in enumerate(self._label_counts):
            counts.append(int(((label_ids == class_id) & ~is_crowd).sum()))
        for column, ids in enumerate((class_ids[matches >= 0], label_ids[missed], class_ids[false])):
            self.counts[:, column] += np.bincount(ids, minlength=len(self.counts))
        self._count_confusion(iou[:, ~is_crowd], label_ids[~is_crowd], class_ids, ignored)
        missed_labels, false_detections = select_rows(labels, missed), select_rows(detections, false)
        self._list_mistakes(name, "missed", missed_labels)
        self._list_mistakes(name, "false", false_detections)
        return missed_labels, false_detections

    def _match(self, iou: NDArray[np.float64], confidence: NDArray[Any]) -> NDArray[np.int64]:
        """Assign a label to each detection greedily, most confident first; -1 for none. `iou` is changed."""
        matches = np.full(len(iou), -1)
        for i in np.argsort(-confidence, kind="stable"):
            if iou.shape[1] and iou[i].max() >= self.iou:
                matches[i] = iou[i].argmax()
                iou[:, matches[i]] = 0.0
        return matches

    def _count_scored(
        self,
        class_ids: NDArray[np.int64],
        detections: sv.Detections,
        matches: NDArray[np.int64],
        ignored: NDArray[np.bool_],
    ) -> None:
        """Remember the scores of detections that count, for the best thresholds and the calibration error."""
        image, confidence, probability = len(self._label_counts[0]), detections.confidence, probabilities(detections)
        assert confidence is not None
        for i in np.flatnonzero(~ignored | (matches >= 0)).tolist():
            scored = _ScoredDetection(image, float(confidence[i]), float(probability[i]), bool(matches[i] >= 0))
            self._scored[class_ids[i]].append(scored)

    def _count_confusion(
        self,
        iou: NDArray[np.float64],
        label_ids: NDArray[np.int64],
        class_ids: NDArray[np.int64],
        ignored: NDArray[np.bool_],
    ) -> None:
        """Match without regard to classes, the highest IoU first, and count pairs of classes."""
        pairs = np.argwhere(iou >= self.iou)
        free_detections, free_labels = ~ignored, np.ones(len(label_ids), bool)
        for i, j in pairs[np.argsort(-iou[pairs[:, 0], pairs[:, 1]], kind="stable")]:
            if free_detections[i] and free_labels[j]:
                free_detections[i] = free_labels[j] = False
                self.confusion[label_ids[j], class_ids[i]] += 1
        n = len(self.counts)
        self.confusion[:n, n] += np.bincount(label_ids[free_labels], minlength=n)
        self.confusion[n, :n] += np.bincount(class_ids[free_detections], minlength=n)

    def _list_mistakes(self, name: str, kind: str, detections: sv.Detections) -> None:
        """Add the entries of `mistakes` for missed labels or false detections."""
        for i in range(len(detections)):
            box = [round(float(v), 2) for v in detections.xyxy[i]]
            entry: dict[str, Any] = {
                "file": name,
                "kind": kind,
                "class": str(detections.data["class_name"][i]),
                "xyxy": box,
            }
            if kind == "false" and detections.confidence is not None:
                entry["score"] = float(detections.confidence[i])
            self.mistakes.append(entry)

    def calibration(self) -> Reliability:
        """Compare the scores of all detections with the rate at which they match a label."""
        scored = [detection for detections in self._scored for detection in detections]
        return measure_reliability(
            [detection.probability for detection in scored], [detection.is_match for detection in scored]
        )

    def best_thresholds(self, precision: float | None) -> list[BestThreshold | None]:
        """Find the best threshold of each class.

        Args:
            precision: Precision to reach, with the highest recall; None for the highest F1.
        """
        best = []
        for scored, label_counts in zip(self._scored, self._label_counts, strict=True):
            image = np.array([detection.image for detection in scored], np.int64)
            score = np.array([detection.score for detection in scored], np.float64)
            is_match = np.array([detection.is_match for detection in scored], bool)
            best.append(best_threshold(image, score, is_match, np.array(label_counts, np.int64), precision))
        return best


def probabilities(detections: sv.Detections) -> NDArray[Any]:
    """Return the probability `(n,)` that each detection is right: the calibrated one, or else its confidence."""
    scores = detections.data.get("calibrated_score", detections.confidence)
    return np.asarray(np.zeros(len(detections)) if scores is None else scores)


def label_overlaps(
    detections: sv.Detections, labels: sv.Detections, is_crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Compute the IoU of each detection with each label, of masks if both have them, else of boxes.

    Args:
        detections: `n` detections, masks as RLE.
        labels: `m` labels, masks as RLE.
        is_crowd: `(m,)`; for crowds the intersection over the area of the detection is computed, as in COCO.

    Returns:
        `(n, m)`, 0 to 1.
    """
    if not len(detections) or not len(labels):
        return np.zeros((len(detections), len(labels)))
    from pycocotools import mask as coco_mask

    crowds = [0] * len(labels) if is_crowd is None else is_crowd.astype(int).tolist()
    if "rle" in detections.data and "rle" in labels.data:
        rles = [list(side.data["rle"]) for side in (detections, labels)]
        return np.asarray(coco_mask.iou(*rles, crowds), np.float64)
    if is_crowd is None:
        return np.asarray(sv.box_iou_batch(detections.xyxy, labels.xyxy), np.float64)
    xywh = [np.column_stack([b[:, :2], b[:, 2:] - b[:, :2]]).astype(float) for b in (detections.xyxy, labels.xyxy)]
    return np.asarray(coco_mask.iou(*xywh, crowds), np.float64)
