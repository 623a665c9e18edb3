"""Frames of one or several videos, decoded ahead on a thread."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial

from grounded_sam.checks import check_int, check_number
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.media.prefetch import Prefetch
from grounded_sam.media.video import DEFAULT_FPS, VideoDecoder, find_clips
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
        with closing(Prefetch(iter(self.decoder), self.ahead)) as frames:
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


class VideoList:
    """Several videos, one after the other. One that cannot be read does not end the others.

    Args:
        videos: The videos.
        failed: Videos that could not be opened.

    Attributes:
        videos: As above.
        skipped: Videos that could not be read, or not to the end, and frames that could not be used.
    """

    def __init__(self, videos: Sequence[VideoSource], failed: Sequence[Skipped] = ()) -> None:
        self.videos, self._failed = videos, list(failed)

    @property
    def skipped(self) -> list[Skipped]:
        """What could not be read so far."""
        return [*(skipped for video in self.videos for skipped in video.skipped), *self._failed]

    def __len__(self) -> int:
        return sum(len(video) for video in self.videos)

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        return self.resume(_nothing_stored)

    def resume(self, lookup: Lookup) -> Iterator[Frame | FrameResult]:
        """Yield the stored results of each video that has some, else its frames."""
        for video in self.videos:
            try:
                yield from video.resume(lookup)
            except ImageError as error:
                if not video.skipped:  # otherwise it already gives this reason
                    self._failed.append(Skipped(video.name, str(error).removeprefix(f"{video.decoder.input}: ")))


def _nothing_stored(*question: object, **options: object) -> None:
    """Answer a lookup where nothing is stored."""


def open_videos(
    input: str | int | os.PathLike[str] | None,
    start: int = 0,
    stop: int | None = None,
    stride: int = 1,
    max_side: int | None = None,
    fps: float = DEFAULT_FPS,
    ahead: int = 4,
    max_pixels: int = MAX_PIXELS,
) -> VideoSource | VideoList:
    """Open an input as one video, or as several: video files, and folders with the frames of a video each.

    Args:
        input: What `VideoSource` takes, a folder without frames of its own, or a glob whose files are in several
            folders or that matches folders. In these, each folder with images is a video, and each video file.
        start: Index of the first frame of each video.
        stop: Index of the frame to stop before; None for the end.
        stride: Keep every `stride`-th frame.
        max_side: Scale frames down to this longer side, in pixels; None for no limit.
        fps: Frame rate of folders of frames.
        ahead: Number of frames to decode ahead.
        max_pixels: Larger frames are refused before they are decoded.

    Raises:
        ConfigError: As `VideoSource`.

    >>> from grounded_sam.media.files import find_files
    >>> open_videos(find_files("builtin:demo").videos[0], stop=5).name
    'clip.mp4'
    """
    open_video = partial(
        VideoSource,
        start=start,
        stop=stop,
        stride=stride,
        max_side=max_side,
        fps=fps,
        ahead=ahead,
        max_pixels=max_pixels,
    )
    clips = {} if input is None else find_clips(str(input))
    if not clips:
        return open_video(input)
    videos = [open_video(clip, name=name) for name, clip in clips.items()]
    return videos[0] if len(videos) == 1 else VideoList(videos)
