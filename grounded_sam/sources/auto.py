"""Images and videos, whichever the input has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from grounded_sam.errors import ConfigError
from grounded_sam.media.files import find_files, relative_name
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.media.listing import names_addresses
from grounded_sam.media.video import is_stream
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.sources.video import VideoList, VideoSource
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import Lookup
from grounded_sam.structures.results import FrameResult, Skipped


class AutoSource:
    """Images as `ImageSource` reads them, followed by each video as `VideoSource` does.

    Images of a folder are independent photos; `source=video` reads them as frames of one video. Files that cannot be
    read are added to `skipped`.

    Args:
        input: An image, a video, a folder, glob or list of paths with both, a camera index, the URL of a video, or an
            address as of `ImageSource`, which has images alone.
        start: Index of the first frame of each video.
        stop: Index of the frame to stop before; None for the end.
        stride: Keep every `stride`-th frame.
        max_side: Scale frames down to this longer side, in pixels; None for no limit.
        max_pixels: Larger images and frames are refused before they are decoded.
        shard: Which part of the images, and of the videos, to take, from 0.
        num_shards: Number of parts.

    Attributes:
        sources: Source of the images, if there are any, and that of the videos.

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
        self.sources: list[ImageSource | VideoSource | VideoList] = []
        open_video = partial(
            VideoSource, start=start, stop=stop, stride=stride, max_side=max_side, max_pixels=max_pixels
        )
        if names_addresses(path_or_url):
            self.sources = [ImageSource(path_or_url, max_pixels, shard, num_shards)]
            return
        if is_stream(path_or_url):
            self.sources = [open_video(path_or_url)]
            return
        files = find_files(path_or_url)
        if not files.images and not files.videos:
            raise ConfigError(files.nothing_found(path_or_url, "image and no video"))
        if not files.images and not files.unread and len(files.videos) == num_shards == 1:
            self.sources = [open_video(files.videos[0], name=relative_name(files.videos[0], files.root))]
            return
        if files.images:
            self.sources.append(ImageSource(replace(files, videos=[], unread={}), max_pixels, shard, num_shards))
        unread = shard_of(list(files.unread.items()), shard, num_shards)
        failed = [Skipped(relative_name(path, files.root), reason) for path, reason in unread]
        videos: list[VideoSource] = []
        for path in shard_of(files.videos, shard, num_shards):
            name = relative_name(path, files.root)
            try:
                videos.append(open_video(path, name=name))
            except ConfigError as error:
                if path.is_file():  # a wrong setting, which affects all videos
                    raise
                failed.append(Skipped(name, str(error)))  # a broken link, or a path in a list
        self.sources.append(VideoList(videos, failed))

    @property
    def skipped(self) -> list[Skipped]:
        """Files that could not be read, or not to the end."""
        return [skipped for source in self.sources for skipped in source.skipped]

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        for source in self.sources:
            yield from source

    def resume(self, lookup: Lookup) -> Iterator[Frame | FrameResult]:
        """Yield the stored results of each image and video that has some, else its frames."""
        for source in self.sources:
            yield from source.resume(lookup)

    def __len__(self) -> int:
        return sum(map(len, self.sources))
