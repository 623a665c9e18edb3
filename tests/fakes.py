"""Stages without weights, and builders of detections."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import supervision as sv

from grounded_sam.structures.detections import make_detections, tracked_detections, with_masks
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.vocabulary import Vocabulary

CLASSES = Vocabulary.parse(["a", "b", "c"])


class Halves:
    """A detector that finds the left half of every picture as class 0, the right half as the last.

    Args:
        delay: seconds that a picture takes.
    """

    def __init__(self, score: float = 0.9, batch_size: int = 1, delay: float = 0.0) -> None:
        self.score, self.batch_size, self.delay = score, batch_size, delay
        self.calls: list[int] = []

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        self.calls.append(len(frames))
        found = []
        for frame in frames:
            time.sleep(self.delay)
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


class Dies(Halves):
    """`Halves` in a process that is killed at its `after`-th picture, the first time; `flag` is then a folder."""

    def __init__(self, flag: str, after: int, delay: float = 0.0) -> None:
        super().__init__(delay=delay)
        self.flag, self.after = Path(flag), after

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        found = super().detect(frames, vocabulary)
        if len(self.calls) == self.after and not self.flag.exists():
            self.flag.mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def boxes(*rows: tuple[float, float, float, float, float, int], size_hw: tuple[int, int] = (100, 100)) -> sv.Detections:
    """Detections from rows of x1, y1, x2, y2, score, class."""
    table = np.array(rows, float).reshape(-1, 6)
    return make_detections(table[:, :4], table[:, 4], table[:, 5], CLASSES, size_hw)


class Levels:
    """A detector that finds every gray level above 0 as an object; class `level // 100`, unless hidden.

    Args:
        hidden: frames (by index) in which nothing is found.
    """

    def __init__(self, hidden: Sequence[int] = ()) -> None:
        self.hidden, self.looked = set(hidden), []

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        found = []
        for frame in frames:
            self.looked.append(frame.index)
            levels = [] if frame.index in self.hidden else [v for v in np.unique(frame.image[..., 0]) if v]
            masks = np.array([frame.image[..., 0] == v for v in levels], bool).reshape(-1, *frame.size_hw)
            ids = [int(v) // 100 for v in levels]
            boxes_ = masks_to_xyxy(masks)
            found.append(make_detections(boxes_, [0.9] * len(ids), ids, vocabulary, frame.size_hw, masks))
        return found


class ByLevel:
    """A tracker that remembers the gray level under a prompt and finds it again; no memory leaks into it."""

    def __init__(self) -> None:
        self.sessions: list[ByLevel.Session] = []

    def open(self, size_hw: tuple[int, int]) -> ByLevel.Session:
        self.sessions.append(self.Session(size_hw))
        return self.sessions[-1]

    class Session:
        def __init__(self, size_hw: tuple[int, int]) -> None:
            self.size_hw, self.levels, self.closed, self.steps = size_hw, {}, False, 0

        def _find(self, ids: Sequence[int]) -> sv.Detections:
            masks = np.array([self.image[..., 0] == self.levels[i] for i in ids], bool).reshape(-1, *self.size_hw)
            return tracked_detections(np.array(ids, np.int64), masks, np.ones(len(ids)), np.ones(len(ids)))

        def step(self, image: np.ndarray) -> sv.Detections:
            self.image, self.steps = image, self.steps + 1
            return self._find(list(self.levels))

        def prompt(self, found: sv.Detections) -> sv.Detections:
            for i, tracker_id in enumerate(found.tracker_id.tolist()):
                if "points" in found.data and found.data["points"][i] is not None:
                    x, y = found.data["points"][i][0].astype(int)
                    self.levels[tracker_id] = self.image[y, x, 0]
                else:
                    mask = found.data["prompt_mask"][i] if "points" in found.data else found.mask[i]
                    self.levels[tracker_id] = np.bincount(self.image[mask][:, 0]).argmax()
            return self._find(found.tracker_id.tolist())

        def remove(self, tracker_id: int) -> None:
            del self.levels[tracker_id]

        def close(self) -> None:
            self.closed = True
