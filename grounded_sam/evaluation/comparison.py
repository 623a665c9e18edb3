"""Compare two sets of detections of the same images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import supervision as sv

from grounded_sam.evaluation.image_matching import label_overlaps


@dataclass(frozen=True)
class DetectionPairs:
    """Which detections of two sets are the same objects.

    Attributes:
        matched: Index in the first set, index in the second, and IoU, 0 to 1.
        only_a: Indices that only the first set has.
        only_b: Indices that only the second set has.
    """

    matched: list[tuple[int, int, float]]
    only_a: list[int]
    only_b: list[int]

    @property
    def num_different(self) -> int:
        """Number of detections without a partner."""
        return len(self.only_a) + len(self.only_b)


def pair_detections(a: sv.Detections, b: sv.Detections, min_iou: float = 0.5) -> DetectionPairs:
    """Pair detections of the same class, those of the highest IoU first.

    Args:
        a: Detections with `data["class_name"]`, masks as RLE or none.
        b: Detections of the same image.
        min_iou: Lowest IoU of a pair, above 0; of masks if both sets have them, else of boxes.

    >>> box = sv.Detections(np.array([[0, 0, 9, 9]]), data={"class_name": np.array(["car"])})
    >>> pair_detections(box, box).matched
    [(0, 0, 1.0)]
    """
    iou = label_overlaps(a, b)
    if iou.size:
        names = [np.asarray(side.data["class_name"], str) for side in (a, b)]
        iou = np.where(names[0][:, None] == names[1][None], iou, 0.0)
    matched: list[tuple[int, int, float]] = []
    left_a, left_b = set(range(len(a))), set(range(len(b)))
    for position in np.argsort(-iou, axis=None, kind="stable").tolist():
        i, j = divmod(position, iou.shape[1])
        if iou[i, j] < min_iou:
            break
        if i in left_a and j in left_b:
            matched.append((i, j, float(iou[i, j])))
            left_a.remove(i)
            left_b.remove(j)
    return DetectionPairs(matched, sorted(left_a), sorted(left_b))
