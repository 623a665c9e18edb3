"""Stages without weights, and builders of detections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import supervision as sv

from grounded_sam.detections import make_detections, with_masks
from grounded_sam.frames import Frame
from grounded_sam.vocabulary import Vocabulary

CLASSES = Vocabulary.parse(["a", "b", "c"])


class Halves:
    """A detector that finds the left half of every picture as class 0, the right half as the last."""

    def __init__(self, score: float = 0.9, batch_size: int = 1) -> None:
        self.score, self.batch_size = score, batch_size
        self.calls: list[int] = []

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        self.calls.append(len(frames))
        found = []
        for frame in frames:
            height, width = frame.size_hw
            boxes = [[0, 0, width / 2, height], [width / 2, 0, width, height]]
            found.append(
                make_detections(
                    boxes, [self.score, self.score / 2], [0, len(vocabulary) - 1], vocabulary, frame.size_hw
                )
            )
        return found


class Fill:
    """A segmenter whose masks are the boxes, filled."""

    def segment(self, image: np.ndarray, detections: sv.Detections) -> sv.Detections:
        masks = np.zeros((len(detections), *image.shape[:2]), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, detections.xyxy.round().astype(int), strict=True):
            mask[y1:y2, x1:x2] = True
        return with_masks(detections, masks, np.ones(len(detections), np.float32))


def boxes(*rows: tuple[float, float, float, float, float, int], size_hw: tuple[int, int] = (100, 100)) -> sv.Detections:
    """Detections from rows of x1, y1, x2, y2, score, class."""
    table = np.array(rows, float).reshape(-1, 6)
    return make_detections(table[:, :4], table[:, 4], table[:, 5], CLASSES, size_hw)
