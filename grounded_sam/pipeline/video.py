"""Track objects through a video: detect at keyframes, propagate masks in between."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.media.prefetch import Prefetch
from grounded_sam.pipeline.backward import track_both_ways
from grounded_sam.pipeline.images import ImageStages, StageTimer, convert_errors
from grounded_sam.pipeline.select import Select, select_detections
from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.pipeline.tracks import TrackManager
from grounded_sam.structures.clicks import Click
from grounded_sam.structures.detections import replace_tracks, select_rows, validate_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import mask_iou
from grounded_sam.structures.protocols import (
    EncodesAhead,
    EndToEndTracker,
    PredictsLost,
    ResetsMemory,
    SharesFeatures,
    TextTracker,
    Tracker,
    TrackSession,
)
from grounded_sam.structures.request import Request
from grounded_sam.structures.results import FrameResult

T = TypeVar("T")


def track_video(
    frames: Iterator[Frame],
    request: Request,
    tracker: Tracker | EndToEndTracker | TextTracker,
    stages: ImageStages,
    settings: TrackSettings,
    select: Select,
    timer: StageTimer,
) -> Generator[FrameResult]:
    """Track objects through a video, lazily and in order.

    Args:
        frames: Frames of one video, all of one size; closed at the end.
        request: Text and clicks to look for, and the classes of the results.
        tracker: Tracker.
        stages: Detector and segmenter for keyframes.
        settings: How to track.
        select: Selection applied to what a `TextTracker` returns.
        timer: Where to count the time of `track`.

    Returns:
        One result per frame, whose detections have `tracker_id`.

    Raises:
        ConfigError: If the tracker does not support what is asked.
    """
    try:
        if isinstance(tracker, Tracker):
            keyframes = KeyframeTracking(tracker, stages, settings, request, timer)
            steps = keyframes.steps(frames)
            results = (result for result, _ in steps)
            if settings.direction == "both":
                results = track_both_ways(steps, tracker, settings, request.classes)
            with closing(steps), closing(results):
                yield from results
        else:
            yield from _track_end_to_end(frames, request, tracker, stages, settings, select)
    finally:
        if isinstance(frames, Generator):
            frames.close()


def _track_end_to_end(
    frames: Iterator[Frame],
    request: Request,
    tracker: EndToEndTracker | TextTracker,
    stages: ImageStages,
    settings: TrackSettings,
    select: Select,
) -> Generator[FrameResult]:
    """Yield the results of a tracker that associates objects itself."""
    name, vocabulary = type(tracker).__name__, request.vocabulary
    if vocabulary is None or request.clicks is not None:
        raise ConfigError(f"{name} does not take clicks; choose another tracker, e.g. tracker=sam2")
    if settings.direction != "forward":
        raise ConfigError(f"track.direction={settings.direction} needs a tracker with memory, and {name} has none")

    def detect(frame: Frame) -> sv.Detections:
        return stages.segment([frame], stages.detect([frame], vocabulary), vocabulary, stages.segmenter)[0]

    if isinstance(tracker, TextTracker):
        tracked = tracker.track_text(frames, vocabulary)
    else:
        tracked = tracker.track(frames, vocabulary, detect)
    manager = TrackManager(settings)
    try:
        for frame, detections in _converting_errors(tracked, tracker):
            selected = detections
            if isinstance(tracker, TextTracker):  # others track what `detect` has selected already
                valid = validate_detections(detections, vocabulary, frame.size_hw, name)
                selected = select_detections(valid, select, vocabulary)
            yield FrameResult(frame=frame, detections=manager.label(manager.adopt(selected), request.classes))
    finally:
        if isinstance(tracked, Generator):
            tracked.close()


def _converting_errors(items: Iterable[T], stage: object) -> Iterator[T]:
    """Yield items, with errors that arise between them converted; see `convert_errors`."""
    iterator = iter(items)
    while True:
        with convert_errors(stage):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


class KeyframeTracking:
    """Track one video with a memory tracker, and detect at keyframes.

    Args:
        tracker: Opens the session.
        stages: Detector and segmenter for keyframes.
        settings: How to track.
        request: Text and clicks to look for, and the classes of the results.
        timer: Where to count the time of `track`.
    """

    def __init__(
        self, tracker: Tracker, stages: ImageStages, settings: TrackSettings, request: Request, timer: StageTimer
    ) -> None:
        self.tracker, self.stages, self.settings = tracker, stages, settings
        self.request, self.timer = request, timer
        asked = () if request.vocabulary is None else request.vocabulary.classes
        self.tracks = TrackManager(
            settings,
            detected={i for i, name in enumerate(request.classes.classes) if name in asked},
        )

    def steps(self, frames: Iterator[Frame]) -> Generator[tuple[FrameResult, sv.Detections]]:
        """Yield a result per frame, and with it the detections of the tracks that start there."""
        session: TrackSession | None = None
        items: Iterator[tuple[Frame, sv.Detections | None]] = self._detect_keyframes(frames)
        if self.stages.can_overlap(self.tracker):
            items = Prefetch(items, 2, "detect")
        try:
            for position, (frame, boxes) in enumerate(items):
                with convert_errors(self.tracker):
                    if session is None:
                        session = self.tracker.open(frame.size_hw)
                    if isinstance(items, Prefetch) and isinstance(session, EncodesAhead):
                        following = items.peek()
                        if following is not None:
                            session.encode_ahead(following[0].image)
                    with self.timer("track"):
                        detections = session.step(frame.image)
                    visible, started = self._step(session, frame, position, boxes, detections)
                self.tracks.remember(visible)
                labeled = self.tracks.label(visible, self.request.classes)
                yield (
                    FrameResult(frame=frame, detections=labeled),
                    self.tracks.label(started, self.request.classes),
                )
        finally:
            if isinstance(items, Prefetch):
                items.close()
            if session is not None:
                session.close()

    def _detect_keyframes(self, frames: Iterator[Frame]) -> Generator[tuple[Frame, sv.Detections | None]]:
        """Yield frames, keyframes with their boxes."""
        vocabulary, every = self.request.vocabulary, self.settings.redetect_every
        for position, frame in enumerate(frames):
            if vocabulary is not None and position % every == 0:
                yield frame, self.stages.detect([frame], vocabulary)[0]
            else:
                yield frame, None

    def _step(
        self,
        session: TrackSession,
        frame: Frame,
        position: int,
        boxes: sv.Detections | None,
        detections: sv.Detections,
    ) -> tuple[sv.Detections, sv.Detections]:
        """Update the tracks with one frame; return the visible tracks and those that start."""
        update = self.tracks.update(detections)
        for tracker_id in update.ended:
            session.remove(tracker_id)
        visible, started, now_hidden = update.visible, select_rows(update.visible, []), update.jumped
        clicks = self.request.clicks
        if boxes is not None:
            visible, started, hidden = self._redetect(session, frame, boxes, visible, started)
            now_hidden = now_hidden + hidden
        for tracker_id in set(now_hidden) - set(update.ended):
            if isinstance(session, ResetsMemory) and self.tracks.live[tracker_id].hidden:
                session.reset_memory(tracker_id)
        if clicks is not None and (clicked := clicks.for_video_frame(frame, position)):
            visible, started = self._apply_clicks(session, frame, clicked, visible, started)
        return visible, started

    def _redetect(
        self,
        session: TrackSession,
        frame: Frame,
        boxes: sv.Detections,
        visible: sv.Detections,
        started: sv.Detections,
    ) -> tuple[sv.Detections, sv.Detections, list[int]]:
        """Match the detections of a keyframe with the tracks, and prompt the session with what is new or corrected."""
        segmenter = self.stages.segmenter
        if isinstance(session, SharesFeatures) and session.segmenter is not None:
            segmenter = session.segmenter
        assert self.request.vocabulary is not None
        detections = self.stages.segment([frame], [boxes], self.request.vocabulary, segmenter)[0]
        visible_ids = [] if visible.tracker_id is None else visible.tracker_id.tolist()
        lost = [i for i in self.tracks.live if i not in visible_ids]
        predicted = session.predict_lost(lost) if lost and isinstance(session, PredictsLost) else None
        match = self.tracks.match(visible, detections, predicted)
        visible = replace_tracks(visible, started, match.hidden)
        if len(match.new):
            started = session.prompt(match.new)
            visible = replace_tracks(visible, started)
        if len(match.corrected):
            visible = replace_tracks(visible, session.prompt(match.corrected))
        return visible, started, match.hidden

    def _apply_clicks(
        self,
        session: TrackSession,
        frame: Frame,
        clicked: Sequence[Click],
        visible: sv.Detections,
        started: sv.Detections,
    ) -> tuple[sv.Detections, sv.Detections]:
        """Start or correct tracks with clicks on this frame."""
        assert self.request.clicks is not None
        prompts = self.request.clicks.to_detections(clicked, frame, self.request.classes)
        assert prompts.class_id is not None
        ids = [self.tracks.new_id() if click.object is None else click.object for click in clicked]
        prompts.tracker_id = np.array(ids, np.int64)
        is_new = np.array([tracker_id not in self.tracks.live for tracker_id in ids])
        for tracker_id, class_id in zip(ids, prompts.class_id.tolist(), strict=True):
            self.tracks.start_or_confirm(tracker_id, class_id, 1.0)
        drawn = session.prompt(prompts)
        assert drawn.tracker_id is not None and drawn.mask is not None
        found = {i for i, mask in zip(drawn.tracker_id.tolist(), drawn.mask, strict=True) if np.any(mask)}
        empty = [click for i, click in zip(ids, clicked, strict=True) if i not in found]
        self.request.clicks.note_empty(empty, frame)
        named = {i for i, click in zip(ids, clicked, strict=True) if click.object is not None}
        doubles = self._find_doubles(drawn, visible)
        # An object goes on under the id that the user chose; where there is none, it keeps the one that it has.
        replaced = [tracker_id for clicked_id, tracker_id in doubles.items() if clicked_id in named]
        for tracker_id in replaced:
            session.remove(tracker_id)
            self.tracks.forget(tracker_id)
        known = {clicked_id: tracker_id for clicked_id, tracker_id in doubles.items() if clicked_id not in named}
        if known:
            drawn = self._correct_instead(session, prompts, drawn, known)
        assert drawn.tracker_id is not None
        new = [i for i, is_first in zip(ids, is_new, strict=True) if is_first and i not in known]
        started_here = select_rows(drawn, np.isin(drawn.tracker_id, new))
        return replace_tracks(visible, drawn, replaced), replace_tracks(started, started_here, replaced)

    def _find_doubles(self, drawn: sv.Detections, visible: sv.Detections) -> dict[int, int]:
        """Map each clicked object that is also visible under another id to that id."""
        assert drawn.tracker_id is not None and drawn.mask is not None
        if visible.tracker_id is None or visible.mask is None:
            return {}
        others = select_rows(visible, ~np.isin(visible.tracker_id, drawn.tracker_id))
        if not len(drawn) or not len(others):
            return {}
        assert others.tracker_id is not None
        iou = mask_iou(np.asarray(drawn.mask, bool), np.asarray(others.mask, bool))
        return {
            tracker_id: int(others.tracker_id[row.argmax()])
            for tracker_id, row in zip(drawn.tracker_id.tolist(), iou, strict=True)
            if row.max() >= self.settings.merge_iou
        }

    def _correct_instead(
        self, session: TrackSession, prompts: sv.Detections, drawn: sv.Detections, known: dict[int, int]
    ) -> sv.Detections:
        """Prompt the tracks that exist with clicks that started a second one, and return all that was prompted."""
        assert prompts.tracker_id is not None and prompts.class_id is not None
        for new, tracker_id in known.items():
            session.remove(new)
            self.tracks.forget(new)
            prompts.tracker_id[prompts.tracker_id == new] = tracker_id
        again = select_rows(prompts, np.isin(prompts.tracker_id, list(known.values())))
        assert again.tracker_id is not None and again.class_id is not None
        for tracker_id, class_id in zip(again.tracker_id.tolist(), again.class_id.tolist(), strict=True):
            self.tracks.start_or_confirm(tracker_id, class_id, 1.0)
        return replace_tracks(drawn, session.prompt(again), without=list(known))
