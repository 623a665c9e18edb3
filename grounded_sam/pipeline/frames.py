"""From frames to results: images one by one, the frames of each video together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import groupby
from typing import Any

from grounded_sam.errors import ImageError, count_of
from grounded_sam.pipeline.images import process_images
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.request import Request
from grounded_sam.structures.results import FrameResult, Skipped


def process_frames(
    frames: Iterator[Frame | FrameResult],
    pipeline: Pipeline,
    request: Request,
    on_skipped: Callable[[Skipped], None],
    on_stopped: Callable[[str], None],
    stored: Callable[[Iterator[Any]], Iterable[FrameResult]] = iter,
) -> Generator[FrameResult]:
    """Yield the results of frames, in their order; stored results are yielded as they are.

    Args:
        frames: Images, frames of videos, one video after the other, and stored results.
        pipeline: Detects, segments and, if it has a tracker, tracks.
        request: What to look for.
        on_skipped: Called with every image or video that cannot be processed, or not in whole.
        on_stopped: Called with the name of a video that stopped before its end.
        stored: Function from stored results to those that are yielded.
    """
    for (is_stored, video), group in groupby(frames, key=_group_key):
        if is_stored:
            yield from stored(group)
        elif video is None or not pipeline.has_tracker:
            yield from process_images(group, request.classes, pipeline.stages, on_skipped=on_skipped)  # type: ignore[arg-type]
        else:
            yield from _track(video, group, pipeline, request, on_skipped, on_stopped)


def _group_key(item: Frame | FrameResult) -> tuple[bool, str | None]:
    """Return whether an item is a stored result, and the video that it belongs to."""
    if isinstance(item, FrameResult):
        return True, item.frame.video
    return False, item.video


def _track(
    video: str,
    frames: Iterator[Any],
    pipeline: Pipeline,
    request: Request,
    on_skipped: Callable[[Skipped], None],
    on_stopped: Callable[[str], None],
) -> Generator[FrameResult]:
    """Yield the results of a video; where a frame cannot be processed, only its video stops."""
    count = 0
    try:
        with closing(pipeline.track_frames(frames, request)) as results:
            for result in results:
                count += 1
                yield result
    except ImageError as error:
        on_skipped(Skipped(video, f"{error}; stopped after {count_of(count, 'frame')}"))
        on_stopped(video)
