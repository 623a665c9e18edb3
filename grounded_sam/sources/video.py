"""Frames of a video, decoded ahead on a thread."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import closing

from grounded_sam.checks import check_int, check_number
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.media.prefetch import prefetch
from grounded_sam.media.video import DEFAULT_FPS, VideoDecoder
from grounded_sam.sources.inputs import check_input
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import Lookup
from grounded_sam.structures.results import FrameResult, Skipped


class VideoSource:
    """Frames of a video in order, with their numbers and times; see `media.video.VideoDecoder`.

    Args:
        input: Video file, folder of frames or glob (in natural order), camera index, or URL (http, rtsp, ...).
        start: Index of the first frame, from 0.
        stop: Index of the frame to stop before; None for the end.
        stride: Keep every `stride`-th frame.
        max_side: Scale frames down to this longer side, in pixels; None for no limit.
        fps: Frame rate of a folder or glob, which has no times of its own.
        ahead: Number of frames to decode ahead.
        max_pixels: Larger frames are refused before they are decoded.
        name: Name of the video in the output; None for that of the file or folder.

    Attributes:
        skipped: Frames that could not be used, or the video itself if it is damaged.

    Raises:
        ConfigError: If the input does not exist, or a value is out of range.
        ImageError: While iterating, if not a single frame can be read.
    """

    def __init__(
        self,
        input: str | int | os.PathLike[str] | None,
        start: int = 0,
        stop: int | None = None,
        stride: int = 1,
        max_side: int | None = None,
        fps: float = DEFAULT_FPS,
        ahead: int = 4,
        max_pixels: int = MAX_PIXELS,
        name: str | None = None,
    ) -> None:
        path_or_url = check_input(input, "a video, a folder of frames, a camera index or a URL")
        check_int("source.start", start, 0)
        check_int("source.stop", stop, 1, optional=True)
        check_int("source.stride", stride, 1)
        check_int("source.max_side", max_side, 16, optional=True)
        check_int("source.ahead", ahead, 1)
        check_int("source.max_pixels", max_pixels, 1)
        if stop is not None and stop <= start:
            raise ConfigError(f"source.stop must be more than source.start={start}, got {stop}")
        check_number("source.fps", fps, 0, above=True)
        self.decoder = VideoDecoder(path_or_url, start, stop, stride, max_side, float(fps), max_pixels, name)
        self.ahead = ahead

    @property
    def name(self) -> str:
        """Name of the video in the output."""
        return self.decoder.name

    @property
    def skipped(self) -> list[Skipped]:
        """What could not be decoded so far."""
        return [Skipped(problem.name, problem.reason) for problem in self.decoder.problems]

    def __len__(self) -> int:
        """Return the maximum number of frames.

        Raises:
            TypeError: If that is unknown, as for a camera.
        """
        return len(self.decoder)

    def resume(self, lookup: Lookup) -> Iterator[Frame | FrameResult]:
        """Yield the stored results of the video if there are any, else its frames."""
        files = self.decoder.files
        if files and (results := lookup(self.name, files)) is not None:
            yield from results
        else:
            yield from self

    def __iter__(self) -> Generator[Frame]:
        is_empty = True
        with closing(prefetch(iter(self.decoder), self.ahead)) as frames:
            for frame in frames:
                is_empty = False
                yield Frame(
                    pixels=frame.image,
                    index=frame.index,
                    name=frame.name,
                    time_s=frame.time_s,
                    video=self.name,
                    file=frame.file,
                )
        if is_empty:
            raise ImageError(f"{self.decoder.input}: {self._no_frame()}")

    def _no_frame(self) -> str:
        """Return why not a single frame could be read."""
        if not self.decoder.problems:
            return f"no frame at or after index {self.decoder.start}"
        first = self.decoder.problems[0]
        return first.reason if first.name == self.name else f"{first.name}: {first.reason}"
