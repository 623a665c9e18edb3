"""Pictures or a video, whichever the input is."""

from __future__ import annotations

import os
from collections.abc import Iterator

from grounded_sam.frames import MAX_PIXELS, Frame
from grounded_sam.sources.images import Images
from grounded_sam.sources.video import Video, is_video
from grounded_sam.stages import Skipped


class Auto:
    """A `Video` if the input is a video file, a camera's number or a URL, else `Images`.

    A folder or glob of pictures is one of photos here; `source=video` takes it as frames of a video.

    Args:
        input: see `Images` and `Video`.
        start, stop, stride, max_side: of a video; see `Video`.
        max_pixels: larger pictures are refused before they are decoded.
    """

    def __init__(
        self,
        input: str | int | os.PathLike[str] | None,
        start: int = 0,
        stop: int | None = None,
        stride: int = 1,
        max_side: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.chosen: Video | Images
        if input is not None and is_video(input):
            self.chosen = Video(input, start, stop, stride, max_side, max_pixels=max_pixels)
        else:
            self.chosen = Images(None if input is None else str(input), max_pixels)
        self.video = isinstance(self.chosen, Video)

    @property
    def skipped(self) -> list[Skipped]:
        return self.chosen.skipped

    def __iter__(self) -> Iterator[Frame]:
        return iter(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)
