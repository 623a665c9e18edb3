"""Images and videos, whichever the input has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.media.files import find_files, relative_name
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.media.video import is_stream
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.sources.video import VideoSource
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import Lookup
from grounded_sam.structures.results import FrameResult, Skipped


class AutoSource:
    """Images as `ImageSource` reads them, followed by each video as `VideoSource` does.

    Images of a folder are independent photos; `source=video` reads them as frames of one video. Files that cannot be
    read are added to `skipped`.

    Args:
        input: An image, a video, a folder, glob or list of paths with both, a camera index, or a URL.
        start: Index of the first frame of each video.
        stop: Index of the frame to stop before; None for the end.
        stride: Keep every `stride`-th frame.
        max_side: Scale frames down to this longer side, in pixels; None for no limit.
        max_pixels: Larger images and frames are refused before they are decoded.
        shard: Which part of the images, and of the videos, to take, from 0.
        num_shards: Number of parts.

    Attributes:
        images: Source of the images; None if there are none.
        videos: One source per video.
        is_single: Whether the input is a single image or video.

    Raises:
        ConfigError: If the input is missing, or has neither images nor videos.
        ImageError: While iterating, if the input is a single file and cannot be read.

    >>> len(AutoSource("builtin:demo", stop=5))  # four images and a video
    9
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
        path_or_url = check_input(
            input, "an image, a video, a folder, a glob or a .txt file of paths, e.g. input=photos/"
        )
        check_shard(shard, num_shards)
        self.num_shards = num_shards
        self.images: ImageSource | None = None
        self.videos: list[VideoSource] = []
        self._failed: list[Skipped] = []  # videos that cannot be opened, and files of formats that are not read
        open_video = partial(
            VideoSource, start=start, stop=stop, stride=stride, max_side=max_side, max_pixels=max_pixels
        )
        if is_stream(path_or_url):
            self.videos, self.is_single = [open_video(path_or_url)], True
            return
        files = find_files(path_or_url)
        if not files.images and not files.videos:
            raise ConfigError(files.nothing_found(path_or_url, "image and no video"))
        self.is_single = len(files.images) + len(files.videos) == 1
        if files.images:
            self.images = ImageSource(replace(files, videos=[], unread={}), max_pixels, shard, num_shards)
        for path, reason in shard_of(list(files.unread.items()), shard, num_shards):
            self._failed.append(Skipped(relative_name(path, files.root), reason))
        for path in shard_of(files.videos, shard, num_shards):
            name = relative_name(path, files.root)
            try:
                self.videos.append(open_video(path, name=name))
            except ConfigError as error:
                if self.is_single or path.is_file():  # a wrong setting, which affects all videos
                    raise
                self._failed.append(Skipped(name, str(error)))  # a broken link, or a path in a list

    @property
    def skipped(self) -> list[Skipped]:
        """Files that could not be read, or not to the end."""
        parts = [
            self.images.skipped if self.images is not None else [],
            *(video.skipped for video in self.videos),
            self._failed,
        ]
        return [skipped for part in parts for skipped in part]

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        return self.resume(lambda name, files: None)

    def resume(self, lookup: Lookup) -> Iterator[Frame | FrameResult]:
        """Yield the stored results of each image and video that has some, else its frames."""
        if self.images is not None:
            yield from self.images.resume(lookup)
        for video in self.videos:
            try:
                yield from video.resume(lookup)
            except ImageError as error:
                if self.is_single:
                    raise
                if not video.skipped:  # otherwise it already gives this reason
                    self._failed.append(Skipped(video.name, str(error).removeprefix(f"{video.decoder.input}: ")))

    def __len__(self) -> int:
        return (len(self.images) if self.images is not None else 0) + sum(len(video) for video in self.videos)
