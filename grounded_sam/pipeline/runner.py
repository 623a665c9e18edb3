"""The stages in a row: frames to detector to select to segmenter to select again, and on to the sinks.

In a video this happens at keyframes; from one to the next a tracker carries the masks on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import Source
from grounded_sam.structures.results import FrameResult, Skipped

#: Results that may wait for the sinks.
WRITES_AHEAD = 4


@dataclass
class Summary:
    """What a run did."""

    images: int = 0
    frames: int = 0  # of the images, those of videos
    stored: int = 0  # of the images, those that an earlier run had done
    empty: int = 0
    objects: Counter[str] = field(default_factory=Counter)  # in a video, tracks
    tracks: dict[tuple[str | None, int], str] = field(default_factory=dict)  # video and id to class name
    skipped: list[Skipped] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    interrupted: bool = False


def _kind(item: Frame | FrameResult) -> tuple[bool, str | None]:
    """Whether it is done already, and the video that it belongs to."""
    return (True, item.frame.video) if isinstance(item, FrameResult) else (False, item.video)


def _note(source: Source, skipped: Skipped) -> None:
    """Tell a source of a frame that could not be used."""
    note = getattr(source, "skip", source.skipped.append)
    note(skipped)


def _length(source: Source) -> int | None:
    try:
        return len(source)
    except TypeError:  # a camera does not know
        return None
