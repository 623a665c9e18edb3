"""Stages without weights, and a helper that makes detections."""

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
    """A detector whose boxes are the left half of each image (first class) and the right half (last class).

    Args:
        score: Confidence of the left half; the right half has half of it.
        batch_size: Frames per call.
        delay: Seconds to sleep per frame.

    Attributes:
        calls: Number of frames in each call so far.
    """

    def __init__(self, score: float = 0.9, batch_size: int = 1, delay: float = 0.0) -> None:
        self.score, self.batch_size, self.delay = score, batch_size, delay
        self.calls: list[int] = []

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        self.calls.append(len(frames))
        scores, class_ids = [self.score, self.score / 2], [0, len(vocabulary) - 1]
        results = []
        for frame in frames:
            time.sleep(self.delay)
            height, width = frame.size_hw
            xyxy = [[0, 0, width / 2, height], [width / 2, 0, width, height]]
            results.append(make_detections(xyxy, scores, class_ids, vocabulary, frame.size_hw))
        return results


class Fill:
    """A segmenter whose masks are the filled boxes."""

    def segment(self, image: np.ndarray, detections: sv.Detections) -> sv.Detections:
        masks = np.zeros((len(detections), *image.shape[:2]), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, detections.xyxy.round().astype(int), strict=True):
            mask[y1:y2, x1:x2] = True
        return with_masks(detections, masks, np.ones(len(detections), np.float32))


class Dies(Halves):
    """`Halves` that kills its process at its `after`-th call, once.

    Args:
        flag: Path of a folder that is created before the process is killed; if it exists, nothing is killed.
        after: Number of the call, from 1.
        delay: Seconds to sleep per frame.
    """

    def __init__(self, flag: str, after: int, delay: float = 0.0) -> None:
        super().__init__(delay=delay)
        self.flag, self.after = Path(flag), after

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        detections = super().detect(frames, vocabulary)
        if len(self.calls) == self.after and not self.flag.exists():
            self.flag.mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
        return detections


def boxes(*rows: tuple[float, float, float, float, float, int], size_hw: tuple[int, int] = (100, 100)) -> sv.Detections:
    """Make detections from rows of x1, y1, x2, y2, score and class id."""
    table = np.array(rows, float).reshape(-1, 6)
    return make_detections(table[:, :4], table[:, 4], table[:, 5], CLASSES, size_hw)


class Levels:
    """A detector to which every gray level above 0 is an object of class `level // 100`.

    Args:
        hidden: Numbers of the frames in which it detects nothing.

    Attributes:
        detected_frames: Numbers of the frames that were passed to it, in order.
    """

    def __init__(self, hidden: Sequence[int] = ()) -> None:
        self.hidden = set(hidden)
        self.detected_frames: list[int] = []

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        results = []
        for frame in frames:
            self.detected_frames.append(frame.index)
            levels = [] if frame.index in self.hidden else [v for v in np.unique(frame.image[..., 0]) if v]
            masks = np.array([frame.image[..., 0] == v for v in levels], bool).reshape(-1, *frame.size_hw)
            class_ids = [int(v) // 100 for v in levels]
            scores = [0.9] * len(levels)
            xyxy = masks_to_xyxy(masks)
            results.append(make_detections(xyxy, scores, class_ids, vocabulary, frame.size_hw, masks))
        return results


class ByLevel:
    """A tracker that stores the gray level under a prompt and returns the pixels of that level in later frames.

    Attributes:
        sessions: All sessions so far.
    """

    def __init__(self) -> None:
        self.sessions: list[ByLevel.Session] = []

    def open(self, size_hw: tuple[int, int]) -> ByLevel.Session:
        self.sessions.append(self.Session(size_hw))
        return self.sessions[-1]

    class Session:
        """A session of `ByLevel`.

        Attributes:
            levels: Gray level of each object, by tracker id.
            closed: Whether `close` was called.
            steps: Number of frames so far.
        """

        def __init__(self, size_hw: tuple[int, int]) -> None:
            self.size_hw, self.levels, self.closed, self.steps = size_hw, {}, False, 0

        def _segment(self, ids: Sequence[int]) -> sv.Detections:
            masks = np.array([self.image[..., 0] == self.levels[i] for i in ids], bool).reshape(-1, *self.size_hw)
            return tracked_detections(np.array(ids, np.int64), masks, np.ones(len(ids)), np.ones(len(ids)))

        def step(self, image: np.ndarray) -> sv.Detections:
            self.image, self.steps = image, self.steps + 1
            return self._segment(list(self.levels))

        def prompt(self, detections: sv.Detections) -> sv.Detections:
            data = detections.data
            for i, tracker_id in enumerate(detections.tracker_id.tolist()):
                if "points" in data and data["points"][i] is not None:
                    x, y = data["points"][i][0].astype(int)
                    self.levels[tracker_id] = self.image[y, x, 0]
                else:
                    mask = data["prompt_mask"][i] if "points" in data else detections.mask[i]
                    self.levels[tracker_id] = np.bincount(self.image[mask][:, 0]).argmax()
            return self._segment(detections.tracker_id.tolist())

        def remove(self, tracker_id: int) -> None:
            del self.levels[tracker_id]

        def close(self) -> None:
            self.closed = True


class Poison(Halves):
    """`Halves` that kills its process with a segmentation fault at every image of one gray level.

    Args:
        level: The gray level.
        log: Name of a file in the folder of `POISON_LOGS`, to which each image adds its name.
    """

    def __init__(self, level: int, log: str) -> None:
        super().__init__()
        self.level, self.log = level, Path(os.environ["POISON_LOGS"]) / log

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        for frame in frames:
            with self.log.open("a") as log:
                log.write(f"{frame.name}\n")
            if frame.image[0, 0, 0] == self.level:
                os.kill(os.getpid(), signal.SIGSEGV)
                time.sleep(60)
        return super().detect(frames, vocabulary)


class ConfiguredByLevel(ByLevel):
    """`ByLevel` as a config builds it, with the segmenter of the pipeline."""

    def __init__(self, segmenter: object = None) -> None:
        super().__init__()
