"""The stages in a row: frames to detector to select to segmenter to select again, and on to the sinks.

In a video this happens at keyframes; from one to the next a tracker carries the masks on.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import supervision as sv

from grounded_sam.detectors.clicks import ClickDetector
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.files import atomic_write
from grounded_sam.pipeline.backward import track_both_ways
from grounded_sam.pipeline.refine import Refine
from grounded_sam.pipeline.runner import WRITES_AHEAD, Summary, _kind, _length, _note
from grounded_sam.pipeline.select import Select, select
from grounded_sam.pipeline.tiles import Tiles
from grounded_sam.pipeline.tracks import TrackManager, TrackSettings
from grounded_sam.segmenters.session import SegmentSession
from grounded_sam.structures.detections import replace_tracks, select_rows, validate_detections
from grounded_sam.structures.frame import Frame, to_frame
from grounded_sam.structures.protocols import Detector, EndToEndTracker, Segmenter, Sink, Source, Tracker, TrackSession
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary

if TYPE_CHECKING:
    from grounded_sam.pipeline.prediction_cache import PredictionCache


class Pipeline:
    """A detector and, if masks are wanted and the detector gives none, a segmenter.

    Args:
        detector: see `stages.Detector`; None for videos alone, with a tracker that finds things by itself.
        segmenter: see `stages.Segmenter`; None for boxes alone.
        settings: which detections stay.
        vocabulary: what to ask for when a call names nothing.
        negatives: phrases that absorb look-alikes, for calls that name their classes.
        tracker: see `stages.Tracker`, or a function that makes one when a video comes; None for no ids.
        tracking: how a video is followed.
        phrasing: how phrases are put, for calls that name their classes; see `Vocabulary.phrased`.
        tiles: how large pictures are cut for the detector.
        refine: what masks do to their detections.
    """

    def __init__(
        self,
        detector: Detector | None,
        segmenter: Segmenter | None = None,
        settings: Select | None = None,
        vocabulary: Vocabulary | None = None,
        negatives: Sequence[str] = (),
        tracker: Tracker | EndToEndTracker | Callable[[], Tracker | EndToEndTracker] | None = None,
        tracking: TrackSettings | None = None,
        phrasing: str = "{}",
        tiles: Tiles | None = None,
        refine: Refine | None = None,
    ) -> None:
        self.detector, self.segmenter = detector, segmenter
        self._tracker, self.tracking = tracker, tracking or TrackSettings()
        self.negatives, self.phrasing = negatives, phrasing
        #: What other jobs of a sweep have found already, and of the detector alone; see `predictions`.
        self.predictions: PredictionCache | None = None
        self.boxes: PredictionCache | None = None
        #: Seconds spent in each stage.
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.settings = settings or Select()
        self.tiles, self.refine = tiles or Tiles(), refine or Refine()
        self.vocabulary = vocabulary

    def ask(self, text: Any = None) -> Vocabulary:
        """The vocabulary of a call: `text`, else the pipeline's, else the detector's own.

        Raises:
            ConfigError: if none of them has one.
        """
        if text is not None:
            given = Vocabulary.parse(text, self.negatives)
            return given if isinstance(text, Vocabulary) else given.phrased(self.phrasing)
        own = self.vocabulary or getattr(self.detector, "vocabulary", None)
        if own is None:
            raise ConfigError("text is missing: name what to look for, e.g. text=[car, wheel]")
        return own

    def stream(
        self,
        frames: Iterator[Frame],
        vocabulary: Vocabulary,
        masks: bool = True,
        skip: Callable[[Skipped], None] | None = None,
    ) -> Iterator[FrameResult]:
        """Results in the order of the frames, decoded and computed as they are asked for.

        Frames that the detector refuses with an `ImageError` are handed to `skip`, if that is given.
        """
        size = getattr(self.detector, "batch_size", 1)
        segmenter = self.segmenter if masks else None
        while group := list(islice(frames, size)):
            for frame, boxes in self._detected(group, vocabulary, skip):
                try:
                    found = self._finish(frame, boxes, vocabulary, segmenter)
                except ImageError as error:  # of pixels that are read only now
                    if skip is None:
                        raise
                    skip(Skipped(frame.name, str(error)))
                    continue
                yield FrameResult(frame, found)

    def _detected(
        self, group: list[Frame], vocabulary: Vocabulary, skip: Callable[[Skipped], None] | None
    ) -> Iterator[tuple[Frame, sv.Detections]]:
        """Frames with their boxes; of a batch that is refused each by itself."""
        known = [None if self.boxes is None else self.boxes.found(frame) for frame in group]
        if any(boxes is not None for boxes in known):
            for frame, boxes in zip(group, known, strict=True):
                yield from [(frame, boxes)] if boxes is not None else self._detected([frame], vocabulary, skip)
            return
        try:
            with self._timed("detect"):
                detected = self.look(group, vocabulary)
        except ImageError as error:
            if skip is None:
                raise
            if len(group) == 1:
                skip(Skipped(group[0].name, str(error)))
                return
            for frame in group:
                yield from self._detected([frame], vocabulary, skip)
            return
        yield from zip(group, detected, strict=True)

    def look(self, group: list[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """What the detector finds, in tiles or at once."""
        detector = self.detector
        if detector is None:
            raise ImageError("there is no detector to look at a picture; choose one, or give videos alone")
        if self.tiles.size is None:
            return detector.detect(group, vocabulary)

        def look(frames: list[Frame]) -> list[sv.Detections]:
            boxes = [
                validate_detections(found, vocabulary, frame.size_hw, type(detector).__name__)
                for frame, found in zip(frames, detector.detect(frames, vocabulary), strict=True)
            ]
            return [select(found, self.settings.before_masks(), vocabulary) for found in boxes]

        return [self.tiles.detect(frame, look, vocabulary) for frame in group]

    def _finish(
        self, frame: Frame, boxes: sv.Detections, vocabulary: Vocabulary, segmenter: Segmenter | None
    ) -> sv.Detections:
        """Select boxes, give them masks, select again."""
        keep, alone = (self.predictions, self.boxes) if frame.video is None else (None, None)
        found = validate_detections(boxes, vocabulary, frame.size_hw, type(self.detector).__name__)
        for kept in (alone, keep):
            found = found if kept is None else kept.keep(found, vocabulary)
        if alone is not None and set(found.data) <= {"class_name"}:  # more would be lost
            alone.write(FrameResult(frame, found))
        if segmenter is not None and found.mask is None:
            first = self.settings.before_masks()
            if self.refine.changes:
                first = replace(first, nms=None, nested=None, top_k=None)
            found = found if keep is not None else select(found, first, vocabulary)
            with self._timed("segment"):
                found = segmenter.segment(frame.image, found)
            found = validate_detections(self.refine(found), vocabulary, frame.size_hw, type(segmenter).__name__)
        if keep is None:
            return select(found, self.settings, vocabulary)
        keep.write(FrameResult(frame, found))
        return self._selected(found, vocabulary)

    def _selected(self, found: sv.Detections, vocabulary: Vocabulary) -> sv.Detections:
        """What a run of its own would have selected, from what a run for all jobs kept."""
        if self.segmenter is not None and self.settings.top_k is not None:  # it counts before masks are looked at
            found = select(found, self.settings.before_masks(), vocabulary)
        return select(found, self.settings, vocabulary)

    def _step(self, session: TrackSession, frame: Frame) -> sv.Detections:
        with self._timed("track"):
            return session.step(frame.image)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    @overload
    def detect(self, images: list[Any], text: Any = None) -> list[sv.Detections]: ...
    @overload
    def detect(self, images: Any, text: Any = None) -> sv.Detections: ...
    def detect(self, images: Any, text: Any = None) -> Any:
        """Boxes with classes, without masks; see `segment`."""
        return self._call(images, text, masks=False)

    @overload
    def segment(self, images: list[Any], text: Any = None) -> list[sv.Detections]: ...
    @overload
    def segment(self, images: Any, text: Any = None) -> sv.Detections: ...
    def segment(self, images: Any, text: Any = None) -> Any:
        """Boxes with classes and masks.

        Args:
            images: a path, a PIL image, an RGB array `(H, W, 3) uint8`, or a list of those.
            text: a list of classes, a string, a mapping from class to phrases, a file of those, or a
                `Vocabulary`; may be left out if the pipeline or the detector has its own.

        Returns:
            `supervision.Detections`, most confident first, see `detections`; a list of them for a list.

        Raises:
            ImageError: if an image cannot be read; VocabularyError: if the text names nothing.
        """
        return self._call(images, text, masks=True)

    def session(self, image: Any) -> SegmentSession:
        """A picture encoded once for any number of prompts by hand; see `embeddings.SegmentSession`.

        Args:
            image: as for `segment`.

        Raises:
            ConfigError: without a segmenter that takes prompts; ImageError: if the image cannot be read.
        """
        if not hasattr(self.segmenter, "encoded"):
            raise ConfigError("a session needs a segmenter that takes prompts, e.g. segmenter=sam2")
        return SegmentSession(self.segmenter, to_frame(image, 0))  # type: ignore[arg-type]

    def _call(self, images: Any, text: Any, masks: bool) -> Any:
        several = isinstance(images, list | tuple)
        frames = (to_frame(image, i) for i, image in enumerate(images if several else [images]))
        found = [result.detections for result in self.stream(frames, self.ask(text), masks)]
        return found if several else found[0]

    @property
    def tracker(self) -> Tracker | EndToEndTracker | None:
        """The tracker, built when it is first asked for."""
        if self._tracker is not None and not isinstance(self._tracker, Tracker | EndToEndTracker):
            self._tracker = self._tracker()
        return self._tracker  # type: ignore[return-value]

    def track(self, video: Any, text: Any = None, clicks: Any = None) -> Generator[FrameResult]:
        """Follow things through a video, one frame at a time.

        >>> for result in model.track("clip.mp4", ["person"]):                # doctest: +SKIP
        ...     print(result.frame.time_s, result.detections.tracker_id)

        Args:
            video: a video file, a folder of frames, a glob, a camera index, a URL, a `sources.video.Video`,
                or any iterable of pictures (paths, PIL images, RGB arrays) of one size.
            text: as for `segment`; may be left out if there are clicks.
            clicks: points, boxes or masks by hand, a JSON file or entries; see `detectors.clicks.Clicks`.

        Returns:
            A generator of results whose detections have `tracker_id`. Nothing of the video but the
            frame at hand is held; closing the generator ends the decoding.

        Raises:
            ConfigError: without a tracker; ImageError: if the video cannot be read.
        """
        from grounded_sam.sources.video import VideoSource

        if isinstance(video, str | int) or hasattr(video, "__fspath__"):
            video = VideoSource(video)
        asked, by_hand, whole = self.ask_video(text, clicks)
        frames = (to_frame(picture, i) for i, picture in enumerate(video))
        return self.follow(frames, asked, by_hand, whole)

    def ask_video(
        self, text: Any = None, clicks: Any = None
    ) -> tuple[Vocabulary | None, ClickDetector | None, Vocabulary]:
        """What the detector is asked for in a video, what is clicked, and the classes of both.

        Raises:
            ConfigError: if there is neither.
        """
        given = clicks if clicks is not None else self.tracking.clicks
        by_hand = None if given is None else ClickDetector(given)
        if by_hand is None and isinstance(self.detector, ClickDetector):
            by_hand = self.detector
        if isinstance(self.detector, ClickDetector) or (
            text is None and self.vocabulary is None and by_hand is not None
        ):
            assert by_hand is not None
            whole = Vocabulary.parse(text) if text is not None else self.vocabulary or by_hand.vocabulary
            return None, by_hand, whole
        asked = self.ask(text)
        whole = asked if by_hand is None else asked.with_classes(by_hand.vocabulary.classes)
        return asked, by_hand, whole

    def follow(
        self, frames: Iterator[Frame], asked: Vocabulary | None, clicks: ClickDetector | None, vocabulary: Vocabulary
    ) -> Generator[FrameResult]:
        """`track` for frames that are open already and a vocabulary that `ask_video` made."""
        tracker = self.tracker
        if tracker is None:
            raise ConfigError("to follow things through a video choose a tracker, e.g. tracker=sam2")
        if isinstance(tracker, EndToEndTracker):
            yield from self._followed(frames, tracker, asked, clicks, vocabulary)
            return
        tracks = TrackManager(self.tracking, clicks.ids if clicks is not None else ())
        steps = self._steps(frames, tracker, tracks, asked, clicks, vocabulary)
        if self.tracking.direction == "both":
            results = track_both_ways(steps, tracker, self.tracking, vocabulary)
        else:
            results = (result for result, _ in steps)
        with closing(steps), closing(results):
            yield from results

    def _followed(
        self,
        frames: Iterator[Frame],
        tracker: EndToEndTracker,
        asked: Vocabulary | None,
        clicks: ClickDetector | None,
        vocabulary: Vocabulary,
    ) -> Generator[FrameResult]:
        """Results of a tracker that tells objects apart by itself."""
        name = type(tracker).__name__
        if asked is None or clicks is not None:
            raise ConfigError(f"{name} cannot be given clicks; choose another tracker, e.g. tracker=sam2")
        if self.tracking.direction != "forward":
            raise ConfigError(f"track.direction={self.tracking.direction} needs a tracker with memory; {name} has none")
        tracks = TrackManager(self.tracking)

        def look(frame: Frame) -> sv.Detections:
            with self._timed("detect"):
                boxes = self.look([frame], asked)[0]
            return self._finish(frame, boxes, asked, self.segmenter)

        found = tracker.follow(frames, asked, look)
        own = not getattr(tracker, "needs_detector", True)  # what is looked up has been selected already
        try:
            for frame, seen in found:
                kept = (
                    select(validate_detections(seen, asked, frame.size_hw, name), self.settings, asked) if own else seen
                )
                yield FrameResult(frame, tracks.label(tracks.adopt(kept), vocabulary))
        finally:
            for opened in (found, frames):
                if hasattr(opened, "close"):
                    opened.close()

    def _steps(
        self,
        frames: Iterator[Frame],
        tracker: Tracker,
        tracks: TrackManager,
        asked: Vocabulary | None,
        clicks: ClickDetector | None,
        vocabulary: Vocabulary,
    ) -> Generator[tuple[FrameResult, sv.Detections]]:
        """Results frame by frame, each with the objects that begin in it."""
        session = None
        try:
            for number, frame in enumerate(frames):
                if session is None:
                    session = tracker.open(frame.size_hw)
                shown, ended, astray = tracks.look(self._step(session, frame))
                begun = select_rows(shown, np.zeros(len(shown), bool))
                for tracker_id in ended:
                    session.remove(tracker_id)
                if asked is not None and number % self.tracking.redetect_every == 0:
                    segmenter = getattr(session, "segmenter", None) or self.segmenter
                    with self._timed("detect"):
                        boxes = self.look([frame], asked)[0]
                    found = self._finish(frame, boxes, asked, segmenter)
                    here = [] if shown.tracker_id is None else shown.tracker_id.tolist()
                    away = [i for i in tracks.live if i not in here]
                    guessed = session.guess(away) if away and hasattr(session, "guess") else None
                    change = tracks.match(shown, found, guessed)
                    astray += change.hidden
                    shown = replace_tracks(shown, begun, change.hidden)
                    if len(change.new):
                        begun = session.prompt(change.new)
                        shown = replace_tracks(shown, begun)
                    if len(change.corrected):
                        shown = replace_tracks(shown, session.prompt(change.corrected))
                for tracker_id in set(astray) - set(ended):
                    if hasattr(session, "forget") and tracks.live[tracker_id].hidden:
                        session.forget(tracker_id)
                if clicks is not None and (clicked := clicks.on(frame, number)):
                    by_hand = clicks.prompts(clicked, frame, vocabulary)
                    ids = [tracks.fresh_id() if click.object is None else click.object for click in clicked]
                    by_hand.tracker_id = np.array(ids, np.int64)
                    new = np.array([tracker_id not in tracks.live for tracker_id in ids])
                    for tracker_id, class_id in zip(ids, by_hand.class_id.tolist(), strict=True):  # type: ignore[union-attr]
                        tracks.begin(tracker_id, class_id, 1.0)
                    drawn = session.prompt(by_hand)
                    shown = replace_tracks(shown, drawn)
                    begun = replace_tracks(begun, select_rows(drawn, np.isin(drawn.tracker_id, np.array(ids)[new])))  # type: ignore[arg-type]
                tracks.note(shown)
                yield FrameResult(frame, tracks.label(shown, vocabulary)), tracks.label(begun, vocabulary)
        finally:
            if session is not None:
                session.close()
            if hasattr(frames, "close"):
                frames.close()

    def _results(
        self,
        frames: Iterator[Frame | FrameResult],
        source: Source,
        vocabulary: Vocabulary,
        asked: Vocabulary | None,
        clicks: ClickDetector | None,
    ) -> Generator[FrameResult]:
        """Pictures one by one, the frames of each video together; what is stored goes through."""
        with closing(frames):  # type: ignore[type-var]
            for (stored, video), group in groupby(frames, key=_kind):
                if stored and self.predictions is not None:
                    for result in group:
                        assert isinstance(result, FrameResult)
                        by_mask = self.settings.nms_by == "mask"
                        kept = result.detections if by_mask else result.found
                        yield FrameResult(result.frame, self._selected(kept, vocabulary), stored=True)
                elif stored:
                    yield from group  # type: ignore[misc]
                elif video is None or self._tracker is None:
                    yield from self.stream(group, vocabulary, skip=partial(_note, source))  # type: ignore[arg-type]
                else:
                    with closing(self.follow(group, asked, clicks, vocabulary)) as results:  # type: ignore[arg-type]
                        yield from results

    def run(
        self,
        source: Source,
        sinks: Sequence[Sink],
        output: Path,
        vocabulary: Vocabulary,
        asked: Vocabulary | None = None,
        clicks: ClickDetector | None = None,
    ) -> Summary:
        """Take every frame of a source to every sink, with a progress bar; write `skipped.json`.

        Args:
            source: pictures and frames of videos; those of one video are followed if there is a tracker.
            sinks: where results go.
            output: folder for `skipped.json`.
            vocabulary: the classes of the sinks.
            asked, clicks: for videos, what `ask_video` says.

        An interruption (Ctrl-C) ends the run early; what was written until then stays usable.

        Raises:
            ImageError: if no frame at all could be read.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        summary = Summary()
        passed_over = len(source.skipped)  # files that the source never counted
        told: set[Skipped] = set()
        store: Any = next((sink for sink in sinks if hasattr(sink, "stored")), None)
        begin = time.perf_counter()
        if self.predictions is not None and store is None and hasattr(source, "stored"):
            source.stored = self.predictions.stored
        elif store is not None and hasattr(source, "stored"):
            store.replay = len(sinks) > 1
            source.stored = store.stored

        def write(result: FrameResult) -> None:
            """To every sink; on a thread of its own, so that models and files do not wait for each other."""
            for sink in sinks:
                try:
                    sink.write(result)
                except ImageError as error:  # pixels of an earlier run's picture that are gone
                    skipped = Skipped(result.frame.name, str(error))
                    if skipped not in source.skipped:
                        _note(source, skipped)
            tell()

        def tell() -> None:
            """Of files that could not be used, to the sinks that want to know."""
            if len(source.skipped) + len(getattr(store, "noted", ())) <= len(told):
                return
            new = [(s, sinks) for s in source.skipped]
            new += [(s, [sink for sink in sinks if sink is not store]) for s in getattr(store, "noted", ())]
            for skipped, listeners in new:
                if skipped not in told:
                    told.add(skipped)
                    for sink in listeners:
                        if hasattr(sink, "skip"):
                            sink.skip(skipped)

        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        try:
            with ExitStack() as stack:
                for sink in sinks:
                    stack.enter_context(sink)
                stack.callback(tell)
                writer = stack.enter_context(ThreadPoolExecutor(1, "write"))
                pending: deque[Future[None]] = deque()
                console = Console(stderr=True)
                bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
                progress = stack.enter_context(bar)
                task = progress.add_task("images", total=_length(source))
                results = self._results(iter(source), source, vocabulary, asked, clicks)
                for result in stack.enter_context(closing(results)):
                    if result.stored and not pending:  # no model to wait for
                        write(result)
                    else:
                        pending.append(writer.submit(write, result))
                    while len(pending) > WRITES_AHEAD:
                        pending.popleft().result()
                    summary.images += 1
                    summary.stored += result.stored
                    summary.frames += result.frame.video is not None
                    names = [str(name) for name in result.found.data.get("class_name", [])]
                    ids = result.found.tracker_id
                    if ids is None:
                        summary.objects.update(names)
                    else:
                        named = zip(ids.tolist(), names, strict=True)
                        summary.tracks |= {(result.frame.video, i): name for i, name in named}
                    summary.empty += not names
                    done = summary.images + len(source.skipped) - passed_over
                    done += 0 if store is None or store.replay else store.before  # those never came by
                    progress.update(task, completed=done)
                for write_ in pending:
                    write_.result()
        except KeyboardInterrupt:
            summary.interrupted = True
        finally:
            for kept in (self.predictions, self.boxes):
                if kept is not None:
                    kept.close()
        self.seconds["all"] = time.perf_counter() - begin
        summary.objects.update(summary.tracks.values())
        summary.skipped = [*source.skipped, *getattr(store, "noted", ())]
        with atomic_write(output / "skipped.json") as part:
            part.write_text(
                json.dumps([asdict(s) for s in summary.skipped], ensure_ascii=False, indent=1), encoding="utf-8"
            )
        # A shard may happen to have nothing but bad files.
        nothing = not summary.images and not getattr(store, "before", 0) and getattr(source, "num_shards", 1) == 1
        if nothing and summary.skipped and not summary.interrupted:
            first = summary.skipped[0]
            raise ImageError(
                f"none of {len(summary.skipped)} pictures could be used; the first: {first.file}: {first.reason} "
                f"(all in {output / 'skipped.json'})"
            )
        summary.places = [sink.summary() for sink in sinks]
        return summary
