"""Pictures and videos, whatever the input holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.media.files import find_files, relative_name
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.media.video import is_stream
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.sources.video import VideoSource
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult, Skipped


class AutoSource:
    """Pictures as `Images` reads them, then every video, one after the other, as `Video` does.

    The input is a picture, a video, a folder of both, a glob or a list of paths of both, a camera's number
    or a URL. Pictures of a folder are photos, each by itself; `source=video` takes them as frames. A file
    that cannot be read is put into `skipped` and the rest goes on.

    Args:
        input: see `Images` and `Video`.
        start, stop, stride, max_side: of videos; see `Video`.
        max_pixels: larger pictures are refused before they are decoded.
        shard, num_shards: of the pictures, and of the videos, take only the `shard`-th of so many parts.

    Raises:
        ConfigError: if the input is missing or holds neither.
        ImageError: while iterating, if the input is one single file and that cannot be read.
    """

    def __init__(
        self,
        input: str | int | os.PathLike[str] | None,
        start: int = 0,
        stop: int | None = None,
        stride: int = 1,
        max_side: int | None = None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        check_shard(shard, num_shards)
        self.num_shards = num_shards

        def video(path: Any, name: str | None = None) -> VideoSource:
            return VideoSource(path, start, stop, stride, max_side, max_pixels=max_pixels, name=name)

        self.images: ImageSource | None = None
        self.videos: list[VideoSource] = []
        self._passed: list[Skipped] = []
        self._stored: Callable[[str, list[Path]], Iterable[FrameResult] | None] | None = None
        if input is not None and is_stream(input):
            self.videos, self.single = [video(input)], True
            return
        pictures, clips, root = find_files(str(input)) if input is not None and str(input) else ([], [], None)
        self.single = len(pictures) + len(clips) == 1
        if pictures or root is None:
            self.images = ImageSource(None if input is None else str(input), max_pixels, shard, num_shards)
            self.images.skipped.clear()  # the videos
        elif not clips:
            raise ConfigError(f"no picture and no video in {input}")
        assert root is not None
        for clip in shard_of(clips, shard, num_shards):
            try:
                self.videos.append(video(clip, relative_name(clip, root)))
            except ConfigError as error:  # a link to nowhere, a line of a list
                if self.single or clip.is_file():  # or a setting that is wrong for all
                    raise
                self._passed.append(Skipped(relative_name(clip, root), str(error)))

    @property
    def stored(self) -> Callable[[str, list[Path]], Iterable[FrameResult] | None] | None:
        """See `stages.Source`; pictures and videos ask for themselves."""
        return self._stored

    @stored.setter
    def stored(self, ask: Callable[[str, list[Path]], Iterable[FrameResult] | None] | None) -> None:
        self._stored = ask
        if self.images is not None:
            self.images.stored = ask
        for video in self.videos:
            video.stored = ask

    @property
    def skipped(self) -> list[Skipped]:
        """Files that could not be used, or not to their end."""
        parts = [self.images.skipped if self.images else [], *(video.skipped for video in self.videos)]
        return [skipped for part in [*parts, self._passed] for skipped in part]

    def skip(self, skipped: Skipped) -> None:
        """Note a frame that a later stage could not use."""
        self._passed.append(skipped)

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        if self.images is not None:
            yield from self.images
        for video in self.videos:
            try:
                with closing(iter(video)) as frames:  # type: ignore[type-var]
                    yield from frames
            except ImageError as error:
                if self.single:
                    raise
                video.skipped.clear()  # it says the same
                self._passed.append(Skipped(video.name, str(error).removeprefix(f"{video.input}: ")))

    def __len__(self) -> int:
        return (len(self.images) if self.images is not None else 0) + sum(len(video) for video in self.videos)
