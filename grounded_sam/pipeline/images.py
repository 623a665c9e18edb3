"""Detect, select and segment: what happens to every image, and to the keyframes of a video."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Protocol

import supervision as sv

from grounded_sam.errors import GroundedSamError, ImageError, StageError, describe_error, print_traceback
from grounded_sam.pipeline.refine import Refine
from grounded_sam.pipeline.select import Select, select_detections
from grounded_sam.pipeline.tiles import Tiles
from grounded_sam.structures.detections import validate_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import BatchDetector, Detector, Segmenter
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary


@contextmanager
def convert_errors(stage: object, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn an error that a stage raises on an image into a `StageError`.

    Errors of this package pass: an `ImageError` concerns the image as well, the others concern the whole run.

    Args:
        stage: The stage, which the message names.
        passing: Errors that pass too.

    Raises:
        StageError: If the stage raises any other error.

    >>> with convert_errors(Refine()):
    ...     1 / 0
    Traceback (most recent call last):
    grounded_sam.errors.StageError: Refine failed (ZeroDivisionError: division by zero); GROUNDED_SAM_DEBUG=1 ...
    """
    own: tuple[type[Exception], ...] = (GroundedSamError, *passing)
    try:
        yield
    except own:
        raise
    except Exception as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # so that the next, smaller image may fit
        print_traceback()
        reason = f"{type(stage).__name__} failed ({describe_error(error)}); GROUNDED_SAM_DEBUG=1 shows the traceback"
        raise StageError(reason) from error


class StageTimer:
    """Wall-clock seconds by stage.

    >>> timer = StageTimer()
    >>> with timer("detect"):
    ...     pass
    >>> list(timer.seconds)
    ['detect']
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time spent in the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


class ImageStages(Protocol):
    """Detect and segment single frames; see `DetectThenSegment`."""

    @property
    def segmenter(self) -> Segmenter | None:
        """The segmenter, if any."""

    @property
    def batch_size(self) -> int:
        """Number of frames per detector call."""

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the boxes of each frame, before selection."""

    def segment(
        self, frame: Frame, boxes: sv.Detections, vocabulary: Vocabulary, segmenter: Segmenter | None
    ) -> sv.Detections:
        """Select boxes, add masks, and select again."""

    def with_select(self, select: Select) -> ImageStages:
        """Return the same stages with another selection."""


class DetectThenSegment:
    """Run the detector and the segmenter, with selection before and after masks.

    Args:
        detector: Detector; None for video-only runs whose tracker needs no detector.
        segmenter: Segmenter; None for boxes alone.
        select: Which detections to keep.
        tiles: How large images are tiled for the detector.
        refine: How masks change boxes and scores.
        timer: Where to count the time of `detect` and `segment`.
    """

    def __init__(
        self,
        detector: Detector | None,
        segmenter: Segmenter | None,
        select: Select,
        tiles: Tiles,
        refine: Refine,
        timer: StageTimer,
    ) -> None:
        self.detector, self.segmenter = detector, segmenter
        self.select, self.tiles, self.refine, self.timer = select, tiles, refine, timer

    @property
    def batch_size(self) -> int:
        """Number of frames per detector call."""
        return self.detector.batch_size if isinstance(self.detector, BatchDetector) else 1

    def with_select(self, select: Select) -> DetectThenSegment:
        """Return the same stages with another selection."""
        return DetectThenSegment(self.detector, self.segmenter, select, self.tiles, self.refine, self.timer)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Run the detector on whole frames, or on their tiles.

        Raises:
            ImageError: If there is no detector, or it refuses a frame.
        """
        detector = self.detector
        if detector is None:
            raise ImageError("there is no detector for images; choose one, or give only videos")

        def detect_and_threshold(crops: list[Frame]) -> list[sv.Detections]:
            with convert_errors(detector):
                found = list(zip(crops, detector.detect(crops, vocabulary), strict=True))
            return [select_detections(self._validate(d, vocabulary, crop), before, vocabulary) for crop, d in found]

        with self.timer("detect"):
            if self.tiles.size is None:
                with convert_errors(detector):
                    return detector.detect(frames, vocabulary)
            before = self.select.before_masks()
            return [self.tiles.detect(frame, detect_and_threshold, vocabulary) for frame in frames]

    def _validate(self, detections: sv.Detections, vocabulary: Vocabulary, frame: Frame) -> sv.Detections:
        return validate_detections(detections, vocabulary, frame.size_hw, type(self.detector).__name__)

    def segment(
        self, frame: Frame, boxes: sv.Detections, vocabulary: Vocabulary, segmenter: Segmenter | None
    ) -> sv.Detections:
        """Select boxes, add masks, and select again.

        Args:
            frame: The frame.
            boxes: Detections of the frame, as the detector returned them.
            vocabulary: Classes that `class_id` refers to.
            segmenter: Segmenter to use; None for boxes alone.

        Raises:
            ImageError: If the pixels of the frame cannot be read.
        """
        detections = self._validate(boxes, vocabulary, frame)
        if segmenter is not None and detections.mask is None:
            before = self.select.before_masks()
            if self.refine.changes:  # NMS and top_k have to wait for the new boxes and scores
                before = replace(before, nms=None, max_ios=None, top_k=None)
            detections = self.add_masks(frame, select_detections(detections, before, vocabulary), vocabulary, segmenter)
        return select_detections(detections, self.select, vocabulary)

    def add_masks(
        self, frame: Frame, boxes: sv.Detections, vocabulary: Vocabulary, segmenter: Segmenter | None
    ) -> sv.Detections:
        """Segment detections that have no masks yet and refine them, without selecting.

        This is where a box becomes a mask, in images and at the keyframes of videos; a tracker that is prompted with
        boxes makes masks of its own in `TrackSession.prompt`.
        """
        if segmenter is None or boxes.mask is not None:
            return boxes
        image = frame.image
        with self.timer("segment"), convert_errors(segmenter):
            detections = segmenter.segment(image, boxes)
        return validate_detections(self.refine(detections), vocabulary, frame.size_hw, type(segmenter).__name__)


def process_images(
    frames: Iterator[Frame],
    vocabulary: Vocabulary,
    stages: ImageStages,
    masks: bool = True,
    on_skipped: Callable[[Skipped], None] | None = None,
) -> Iterator[FrameResult]:
    """Process images in batches, lazily and in order.

    Args:
        frames: The images.
        vocabulary: Classes to look for.
        stages: Detector and segmenter.
        masks: Whether to segment.
        on_skipped: Called with every image that is refused with an `ImageError`; None to raise it.
    """
    segmenter = stages.segmenter if masks else None
    while batch := list(islice(frames, stages.batch_size)):
        for frame, boxes in _detect_batch(batch, vocabulary, stages, on_skipped):
            try:
                detections = stages.segment(frame, boxes, vocabulary, segmenter)
            except ImageError as error:  # pixels that are decoded only now
                if on_skipped is None:
                    raise
                on_skipped(Skipped(frame.name, str(error)))
                continue
            yield FrameResult(frame=frame, detections=detections)


def _detect_batch(
    batch: list[Frame],
    vocabulary: Vocabulary,
    stages: ImageStages,
    on_skipped: Callable[[Skipped], None] | None,
) -> Iterator[tuple[Frame, sv.Detections]]:
    """Yield frames with their boxes; a batch that is refused is retried frame by frame, to find the culprit."""
    try:
        detected = stages.detect(batch, vocabulary)
    except ImageError as error:
        if on_skipped is None:
            raise
        if len(batch) == 1:
            on_skipped(Skipped(batch[0].name, str(error)))
            return
        for frame in batch:
            yield from _detect_batch([frame], vocabulary, stages, on_skipped)
        return
    yield from zip(batch, detected, strict=True)
