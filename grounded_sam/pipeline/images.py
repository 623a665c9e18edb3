"""Detect, select and segment: what happens to every image, and to the keyframes of a video."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Protocol

import supervision as sv

from grounded_sam.errors import (
    GroundedSamError,
    ImageError,
    OutOfMemoryError,
    StageError,
    describe_error,
    print_traceback,
)
from grounded_sam.media.prefetch import Prefetch
from grounded_sam.pipeline.batches import Batch, BatchedStage, collect_batches, in_order
from grounded_sam.pipeline.refine import Refine
from grounded_sam.pipeline.select import Select, select_detections
from grounded_sam.pipeline.tiles import Tiles
from grounded_sam.structures.detections import validate_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import (
    BatchDetector,
    BatchSegmenter,
    Detector,
    GroupsBySize,
    RunsModel,
    Segmenter,
    Verifier,
)
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

        kind = StageError
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # so that a smaller batch may fit
            kind = OutOfMemoryError
        print_traceback()
        reason = f"{type(stage).__name__} failed ({describe_error(error)}); GROUNDED_SAM_DEBUG=1 shows the traceback"
        raise kind(reason) from error


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
    """Detect and segment frames; see `DetectThenSegment`."""

    @property
    def segmenter(self) -> Segmenter | None:
        """The segmenter, if any."""

    @property
    def verifier(self) -> Verifier | None:
        """The verifier, if any."""

    @property
    def batch_size(self) -> int:
        """Number of frames per detector call."""

    def can_overlap(self, stage: object) -> bool:
        """Return whether the detector may run on a thread of its own beside another stage."""

    def batch_key(self, frame: Frame) -> Hashable:
        """Return what is equal for frames that the detector should get together."""

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the boxes of each frame, before selection."""

    def segment(
        self,
        frames: Sequence[Frame],
        boxes: Sequence[sv.Detections],
        vocabulary: Vocabulary,
        segmenter: Segmenter | None,
    ) -> list[sv.Detections]:
        """Select boxes, add masks, and select again."""

    def with_select(self, select: Select) -> ImageStages:
        """Return the same stages with another selection."""


class DetectThenSegment:
    """Run the detector, the segmenter and the verifier, with selection before masks and at the end.

    Args:
        detector: Detector; None for video-only runs whose tracker needs no detector.
        segmenter: Segmenter; None for boxes alone.
        select: Which detections to keep.
        tiles: How large images are tiled for the detector.
        refine: How masks and the verifier change boxes and scores.
        timer: Where to count the time of `detect`, `segment` and `verify`.
        verifier: Judges detections once they have masks; None without one.
    """

    def __init__(
        self,
        detector: Detector | None,
        segmenter: Segmenter | None,
        select: Select,
        tiles: Tiles,
        refine: Refine,
        timer: StageTimer,
        verifier: Verifier | None = None,
    ) -> None:
        self.detector, self.segmenter, self.verifier = detector, segmenter, verifier
        self.select, self.tiles, self.refine, self.timer = select, tiles, refine, timer

    @property
    def batch_size(self) -> int:
        """Number of frames per detector call."""
        return self.detector.batch_size if isinstance(self.detector, BatchDetector) else 1

    def can_overlap(self, stage: object) -> bool:
        """Return whether the detector may run beside another stage: not if both need all cores of the CPU."""
        return stage is not None and not (_runs_on_cpu(self.detector) and _runs_on_cpu(stage))

    def batch_key(self, frame: Frame) -> Hashable:
        """Return what is equal for frames that the detector should get together."""
        is_whole = self.tiles.size is None
        return self.detector.batch_key(frame.size_hw) if is_whole and isinstance(self.detector, GroupsBySize) else None

    def with_select(self, select: Select) -> DetectThenSegment:
        """Return the same stages with another selection."""
        return DetectThenSegment(
            self.detector, self.segmenter, select, self.tiles, self.refine, self.timer, self.verifier
        )

    def before_masks(self) -> Select:
        """Return which boxes get masks: those that may be selected, or all that the verifier is to judge."""
        if self.verifier is not None:
            return self.select.candidates(self.verifier.min_score)
        before = self.select.before_masks()
        # NMS and top_k have to wait for new boxes and scores.
        return replace(before, nms=None, max_ios=None, top_k=None) if self.refine.changes else before

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
            return [
                select_detections(self._validate(d, vocabulary, crop), before, vocabulary.overlapping)
                for crop, d in found
            ]

        with self.timer("detect"):
            if self.tiles.size is None:
                with convert_errors(detector):
                    return detector.detect(frames, vocabulary)
            before = self.select.before_masks() if self.verifier is None else self.before_masks()
            return [self.tiles.detect(frame, detect_and_threshold, vocabulary) for frame in frames]

    def _validate(self, detections: sv.Detections, vocabulary: Vocabulary, frame: Frame) -> sv.Detections:
        return validate_detections(detections, vocabulary, frame.size_hw, type(self.detector).__name__)

    def segment(
        self,
        frames: Sequence[Frame],
        boxes: Sequence[sv.Detections],
        vocabulary: Vocabulary,
        segmenter: Segmenter | None,
    ) -> list[sv.Detections]:
        """Select boxes, add masks, verify them, and select again.

        Args:
            frames: The frames.
            boxes: Detections of each frame, as the detector returned them.
            vocabulary: Classes that `class_id` refers to.
            segmenter: Segmenter to use; None for boxes alone.

        Raises:
            ImageError: If the pixels of a frame cannot be read.
        """
        detections = [self._validate(part, vocabulary, frame) for part, frame in zip(boxes, frames, strict=True)]
        if segmenter is not None or self.verifier is not None:
            chosen = [self.choose(part, vocabulary) for part in detections]
            detections = self.verify(frames, self.add_masks(frames, chosen, vocabulary, segmenter), vocabulary)
        return [select_detections(part, self.select, vocabulary) for part in detections]

    def choose(self, detections: sv.Detections, vocabulary: Vocabulary) -> sv.Detections:
        """Return the detections that are segmented and verified; what is stored with these is not selected here."""
        is_done = detections.mask is not None if self.verifier is None else "verify_score" in detections.data
        return detections if is_done else select_detections(detections, self.before_masks(), vocabulary.overlapping)

    def verify(
        self, frames: Sequence[Frame], detections: Sequence[sv.Detections], vocabulary: Vocabulary
    ) -> list[sv.Detections]:
        """Judge detections, and set their confidence if that comes from the verifier.

        Those that have a verify score, such as those of a store, are left as they are.

        Raises:
            ImageError: If the pixels of a frame cannot be read.
        """
        results, verifier = list(detections), self.verifier
        if verifier is None:
            return results
        for part in results:
            if not len(part):
                part.metadata.setdefault("presence", {})
        rows = [i for i, part in enumerate(results) if len(part) and "verify_score" not in part.data]
        if not rows:
            return results
        with self.timer("verify"), convert_errors(verifier):
            judged = verifier.verify([frames[i].image for i in rows], [results[i] for i in rows], vocabulary)
        name = type(verifier).__name__
        for i, part in zip(rows, judged, strict=True):
            results[i] = validate_detections(self.refine.rescore(part), vocabulary, frames[i].size_hw, name)
        return results

    def add_masks(
        self,
        frames: Sequence[Frame],
        boxes: Sequence[sv.Detections],
        vocabulary: Vocabulary,
        segmenter: Segmenter | None,
    ) -> list[sv.Detections]:
        """Segment detections that have no masks yet and refine them, without selecting.

        This is where a box becomes a mask, in images and at the keyframes of videos; a tracker that is prompted with
        boxes makes masks of its own in `TrackSession.prompt`.
        """
        detections = list(boxes)
        rows = [i for i, part in enumerate(boxes) if part.mask is None]
        if segmenter is None or not rows:
            return detections
        images = [frames[i].image for i in rows]
        with self.timer("segment"), convert_errors(segmenter):
            if isinstance(segmenter, BatchSegmenter):
                segmented = segmenter.segment_batch(images, [boxes[i] for i in rows])
            else:
                segmented = [segmenter.segment(image, boxes[i]) for image, i in zip(images, rows, strict=True)]
        name = type(segmenter).__name__
        for i, part in zip(rows, segmented, strict=True):
            detections[i] = validate_detections(self.refine(part), vocabulary, frames[i].size_hw, name)
        return detections


def _runs_on_cpu(stage: object) -> bool:
    """Return whether a stage runs a network on the CPU."""
    if not isinstance(stage, RunsModel):
        return False
    weight = next(stage.model.parameters(), None)
    return weight is not None and weight.device.type == "cpu"


def process_images(
    frames: Iterator[Frame],
    vocabulary: Vocabulary,
    stages: ImageStages,
    masks: bool = True,
    on_skipped: Callable[[Skipped], None] | None = None,
) -> Generator[FrameResult]:
    """Process images in batches, lazily and in order.

    Where the stages can overlap, batches are collected on one thread, the detector runs on another and the segmenter on
    the caller's, so that the slowest of them sets the pace.

    Args:
        frames: The images.
        vocabulary: Classes to look for.
        stages: Detector and segmenter.
        masks: Whether to segment.
        on_skipped: Called, on any of these threads, with every image that is refused with an `ImageError`; None to
            raise it.
    """
    segmenter = stages.segmenter if masks else None
    overlap = stages.can_overlap(segmenter)
    batches: Iterator[Batch] = collect_batches(frames, stages.batch_size, stages.batch_key)
    if overlap:
        batches = Prefetch(batches, 1, "collect")
    detected: Iterator[tuple[Batch, list[sv.Detections | None]]] = _detect(batches, vocabulary, stages, on_skipped)
    if overlap:
        detected = Prefetch(detected, 1, "detect")
    with closing(_segment(detected, vocabulary, stages, segmenter, on_skipped)) as segmented:
        yield from in_order(segmented)


def _detect(
    batches: Iterator[Batch],
    vocabulary: Vocabulary,
    stages: ImageStages,
    on_skipped: Callable[[Skipped], None] | None,
) -> Generator[tuple[Batch, list[sv.Detections | None]]]:
    """Yield each batch with its boxes; None for images that are skipped."""
    detect = BatchedStage(lambda frames: stages.detect(frames, vocabulary), "the detector", on_skipped)
    with closing(batches):  # type: ignore[type-var]
        for batch in batches:
            yield batch, detect([frame for _, frame in batch])


def _segment(
    detected: Iterator[tuple[Batch, list[sv.Detections | None]]],
    vocabulary: Vocabulary,
    stages: ImageStages,
    segmenter: Segmenter | None,
    on_skipped: Callable[[Skipped], None] | None,
) -> Generator[tuple[int, FrameResult | None]]:
    """Yield positions and results of images; None for images that are skipped."""
    segment = BatchedStage(
        lambda frames, boxes: stages.segment(frames, boxes, vocabulary, segmenter), "the segmenter", on_skipped
    )
    size = segmenter.batch_size if isinstance(segmenter, BatchSegmenter) else 1
    with closing(detected):  # type: ignore[type-var]
        for batch, boxes in detected:
            items = [(position, frame, part) for (position, frame), part in zip(batch, boxes, strict=True)]
            yield from ((position, None) for position, _, part in items if part is None)
            items = [item for item in items if item[2] is not None]
            for start in range(0, len(items), size):
                positions, images, parts = zip(*items[start : start + size], strict=True)
                for position, frame, detections in zip(positions, images, segment(images, parts), strict=True):
                    yield position, None if detections is None else FrameResult(frame=frame, detections=detections)
