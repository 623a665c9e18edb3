"""What a stage has to be. An own class needs to import nothing from here: having the methods is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary


@runtime_checkable
class Source(Protocol):
    """Where frames come from: decoded lazily, one at a time.

    Bad files are put into `skipped` and passed over. `len()` is how many frames there are at most;
    it raises a TypeError where that is not known.

    Two more are used if they are there. `stored` is set to a function by a run that goes on after an
    earlier one: given the name and the files of a picture or video it returns the results of that run, which
    the source then gives instead of frames, or None. `vocabulary` are the classes of a source that brings
    its own, so that `text` may be left out.
    """

    skipped: list[Skipped]

    def __iter__(self) -> Iterator[Frame | FrameResult]: ...
    def __len__(self) -> int: ...


@runtime_checkable
class Detector(Protocol):
    """Frames and words to boxes.

    Returns one `Detections` per frame: `xyxy (n, 4)` in pixels of the frame, `confidence (n,)` 0 to 1,
    `class_id (n,)` into `vocabulary.classes`. No threshold is applied here: `select` does that. With
    `mask (n, H, W) bool` filled, no segmenter is needed.

    Two attributes are looked at if they are there: `batch_size`, frames per call (1 if absent), and
    `vocabulary`, the classes of a detector that brings its own, so that `text` may be left out.
    """

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]: ...


@runtime_checkable
class Segmenter(Protocol):
    """Boxes to masks.

    Takes an image `(H, W, 3) uint8` and its detections; returns as many in the same order, with
    `mask (n, H, W) bool` and `data["mask_score"] (n,) float32`.
    """

    def segment(self, image: NDArray[np.uint8], detections: sv.Detections) -> sv.Detections: ...


@runtime_checkable
class TrackSession(Protocol):
    """One video on its way through a tracker. Ids are the caller's.

    `step(image)` goes one frame on and returns the objects seen there: `mask (n, H, W) bool`, `xyxy`,
    `tracker_id`, `confidence` (of presence) and `data["mask_score"]`, no class. `prompt(found)` adds or
    corrects the objects that `found.tracker_id` names on that same frame, from `found.mask` (or boxes or
    clicks), and returns them likewise, without touching the others. What a session holds does not grow
    with the number of frames.

    Three more are used if they are there. `guess(ids)` returns where objects that `step` did not see would
    be if they were there, so that a detection can find them again. `forget(tracker_id)` drops what an object
    left in memory since its prompts, after it was found to lie on something else. An attribute `segmenter`
    that is not None replaces the pipeline's: it works on the features that the tracker has of the frame.
    """

    def step(self, image: NDArray[np.uint8]) -> sv.Detections: ...
    def prompt(self, found: sv.Detections) -> sv.Detections: ...
    def remove(self, tracker_id: int) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Tracker(Protocol):
    """Opens a session per video; built with `segmenter`, the pipeline's, so that both may share a model."""

    def open(self, size_hw: tuple[int, int]) -> TrackSession: ...


@runtime_checkable
class EndToEndTracker(Protocol):
    """A tracker that tells objects apart by itself, instead of carrying masks from keyframe to keyframe.

    `follow` yields every frame with its objects: `class_id`, `confidence` and ids of its own, which are given others.
    `look` is what detector and segmenter find in a frame. One that never asks for it says so with a class attribute
    `needs_detector` that is false: then detector=none will do for videos, and `select` has its say on what it finds.
    """

    def follow(
        self, frames: Iterator[Frame], vocabulary: Vocabulary, look: Callable[[Frame], sv.Detections]
    ) -> Iterator[tuple[Frame, sv.Detections]]: ...


@runtime_checkable
class Sink(AbstractContextManager[Any], Protocol):
    """Where results go. Built with `output` (a folder) and `vocabulary` beside its own settings.

    Opens files at the first `write`, renames them into place when whole, and leaves what was written
    so far usable when the run is interrupted. `summary()` is a line for the end of the run.

    Two more are used if they are there: `skip(skipped)` is told of every file that could not be used, and
    `stored(name, files)`, of a sink that can read what it wrote before, is handed to the source.
    """

    def write(self, result: FrameResult) -> None: ...
    def summary(self) -> str: ...
