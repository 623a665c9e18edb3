"""Images from a file, a folder, a glob or a list of paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Self

from grounded_sam.errors import ConfigError
from grounded_sam.media.files import InputFiles, find_files, relative_name
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.media.listing import RemoteImages, names_addresses
from grounded_sam.media.prefetch import FETCHERS, WORKERS, map_ahead
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.items import ItemSource, item_of, item_with_state
from grounded_sam.sources.shards import check_shard, in_shard, shard_of
from grounded_sam.structures.items import SourceItem
from grounded_sam.structures.results import Skipped


class ImageSource(ItemSource):
    """Images, decoded one at a time in natural order of their paths.

    A folder is searched recursively, also through links, for files with an image suffix and for images without a
    suffix; hidden files and the outputs of earlier runs are left out. Videos are listed in `skipped`, as are files that
    cannot be read or of which only a part is, and images of formats that are not read.

    Under an address, images come in the order of their keys, while the listing goes on: their number is not known
    before its end, and objects without a suffix are taken for images. Which shard an image belongs to depends on its
    name alone.

    Args:
        input: An image, a folder, a glob (`photos/**/*.jpg`), a `.txt` file with one path per line (relative ones are
            relative to it), an address of any of these (`s3://bucket/photos/**`; see `remote`), or `builtin:demo`; in
            Python also files that `media.files.find_files` returned.
        max_pixels: Larger images are refused before they are decoded.
        shard: Which part of the images to take, from 0.
        num_shards: Number of parts.

    Attributes:
        skipped: Files that could not be used, or not in whole.

    Raises:
        ConfigError: If the input is missing, or has no image.
        RemoteError: If an address cannot be listed.
        ImageError: While iterating, if the input is a single file and cannot be read.

    >>> [frame.image.shape for frame in ImageSource("builtin:demo", num_shards=4)]
    [(640, 960, 3)]
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | InputFiles | None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        path = check_input(input, "an image, a folder, a glob, a .txt file of paths or an address, e.g. input=photos/")
        super().__init__(max_pixels)
        check_shard(shard, num_shards)
        self.shard, self.num_shards = shard, num_shards
        self.files: list[Path] = []
        self._remote: RemoteImages | None = None
        if not isinstance(input, InputFiles) and names_addresses(path):
            self._remote = remote = RemoteImages.open(path)
            self.is_single = remote.is_file
            if not remote.is_file and next(remote.images(lambda name, reason: None), None) is None:
                raise ConfigError(remote.nothing_found())
            return
        self.fetchers = WORKERS
        files = input if isinstance(input, InputFiles) else find_files(path)
        if not files.images:
            hint = ", only videos; use source=auto or source=video" if files.videos else ""
            raise ConfigError(files.nothing_found(path, "image") + hint)
        self.root, self.is_single = files.root, files.is_file
        reasons = dict.fromkeys(files.videos, "a video; source=auto reads both") | dict(files.unread)
        self.skipped += [
            Skipped(self.name(path), reason) for path, reason in shard_of(list(reasons.items()), shard, num_shards)
        ]
        self.files = shard_of(files.images, shard, num_shards)

    def __len__(self) -> int:
        """Return the number of images.

        Raises:
            TypeError: If it is unknown, as under an address.
        """
        if self._remote is not None:
            raise TypeError("the number of images under an address is known when all are listed")
        return len(self.files)

    def _items(self, with_states: bool) -> Iterator[SourceItem]:
        """Yield the images; those of a list of addresses with size and tag if these are asked for."""
        if self._remote is None:
            yield from map(self._local_item, self.files)
            return
        items = self._remote_items(self._remote)
        if not with_states or self._remote.listing is None:
            yield from items
            return
        with closing(map_ahead(item_with_state, items, FETCHERS)) as known:
            yield from known

    def _local_item(self, path: Path) -> SourceItem:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # `fetch` says why
            return SourceItem(self.name(path), path)
        return SourceItem(self.name(path), path, size=status.st_size, modified_ns=status.st_mtime_ns)

    def _remote_items(self, remote: RemoteImages) -> Iterator[SourceItem]:
        """Yield the images under addresses that are of this shard, which is decided by their names alone."""

        def is_own(name: str) -> bool:
            return in_shard(name, self.shard, self.num_shards)

        def note(name: str, reason: str) -> None:
            if is_own(name):
                self.skipped.append(Skipped(name, reason))

        for name, place in remote.images(note):
            if is_own(name):
                yield item_of(name, place)

    def without_listing(self) -> Self:
        """Return a source that lists nothing; see `structures.protocols.ListsItems`."""
        source = super().without_listing()
        source.files, source._remote = [], None
        return source

    def name(self, path: Path) -> str:
        """Return the name of an image in the output: its path relative to the input, with `/`."""
        return relative_name(path, self.root)
