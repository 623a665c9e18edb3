"""Images from a file, a folder, a glob or a list of paths."""

from __future__ import annotations

import copy
import hashlib
import os
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grounded_sam.checks import check_int
from grounded_sam.errors import ConfigError, ImageError, RemoteError
from grounded_sam.files import require_regular
from grounded_sam.media.files import InputFiles, find_files, relative_name
from grounded_sam.media.images import MAX_PIXELS, decode_image, read_image
from grounded_sam.media.listing import RemoteImages, names_addresses, with_state
from grounded_sam.media.prefetch import FETCHERS, WORKERS, Prefetch, map_ahead
from grounded_sam.remote import Location
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.items import FileContent, SourceItem
from grounded_sam.structures.protocols import Lookup
from grounded_sam.structures.results import FrameResult, Skipped

#: Images that are decoded ahead.
AHEAD = max(2, WORKERS)
#: Bytes of the largest file that is read in whole before it is decoded; a larger one is decoded from the disk.
MAX_BYTES = 256 << 20
#: Bytes of the largest object that is read.
MAX_OBJECT_BYTES = 2 << 30


@dataclass(frozen=True, eq=False)
class _Read:
    """An image that was read, or could not be.

    Attributes:
        item: The image.
        data: Its file; None if it could not be read, or is decoded from the disk.
        content: What is known of the file; None if it could not be read.
        error: Why it could not be read.
    """

    item: SourceItem
    data: bytes | None = None
    content: FileContent | None = None
    error: ImageError | None = None


@dataclass(frozen=True, eq=False)
class _Decoded:
    """An image that was decoded, or could not be.

    Attributes:
        item: The image.
        content: What is known of its file.
        pixels: RGB, `(H, W, 3) uint8`; None if it cannot be read.
        problems: Why it cannot be read, or not in whole.
    """

    item: SourceItem
    content: FileContent | None
    pixels: NDArray[np.uint8] | None
    problems: list[Skipped]


class ImageSource:
    """Images, decoded one at a time in natural order of their paths.

    A folder is searched recursively, also through links, for files with an image suffix and for images without a
    suffix; hidden files and the outputs of earlier runs are left out. Videos are listed in `skipped`, as are files that
    cannot be read or of which only a part is, and pictures of formats that are not read.

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
        check_int("source.max_pixels", max_pixels, 1)
        check_shard(shard, num_shards)
        self.max_pixels, self.shard, self.num_shards = max_pixels, shard, num_shards
        self.skipped: list[Skipped] = []
        self.files: list[Path] = []
        self._remote: RemoteImages | None = None
        if not isinstance(input, InputFiles) and names_addresses(path):
            self._remote = remote = RemoteImages.open(path)
            self.is_single = remote.is_file
            if not remote.is_file and next(remote.images(lambda name, reason: None), None) is None:
                raise ConfigError(remote.nothing_found())
            return
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

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        return self._frames(None)

    def resume(self, lookup: Lookup) -> Iterator[Frame | FrameResult]:
        """Yield the stored result of each image that has one, else the decoded image."""
        return self._frames(lookup)

    def items(self) -> Iterator[SourceItem]:
        """Yield the images without reading them; see `structures.protocols.ListsItems`."""
        return self._items(with_states=True)

    def _items(self, with_states: bool) -> Iterator[SourceItem]:
        """Yield the images; those of a list of addresses with size and tag if these are asked for."""
        if self._remote is None:
            yield from map(self._local_item, self.files)
            return
        items = self._remote_items(self._remote)
        if not with_states or self._remote.listing is None:
            yield from items
            return
        with closing(map_ahead(_item_with_state, items, FETCHERS)) as known:
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
            return (
                self.num_shards == 1
                or zlib.crc32(name.encode("utf-8", "surrogatepass")) % self.num_shards == self.shard
            )

        def note(name: str, reason: str) -> None:
            if is_own(name):
                self.skipped.append(Skipped(name, reason))

        for name, place in remote.images(note):
            if is_own(name):
                yield _item(name, place)

    def without_listing(self) -> ImageSource:
        """Return a source that lists nothing; see `structures.protocols.ListsItems`."""
        source = copy.copy(self)
        source.files, source.skipped, source._remote = [], [], None
        return source

    def fetch(self, item: SourceItem) -> bytes:
        """Read the encoded bytes of an image; see `structures.protocols.ListsItems`."""
        return read_item(item)

    def decode(self, item: SourceItem, data: bytes) -> Frame:
        """Decode an image; see `structures.protocols.ListsItems`."""
        pixels = decode_image(data, _shown(item), self.max_pixels, partial(self._note, item))
        return Frame(pixels=pixels, name=item.name, file=item.place, content=FileContent.of(item, data))

    def _note(self, item: SourceItem, problem: str) -> None:
        self.skipped.append(Skipped(item.name, problem))

    def _frames(self, lookup: Lookup | None) -> Generator[Frame | FrameResult]:
        with closing(Prefetch(self._decoded(lookup), AHEAD)) as frames:
            yield from frames

    def _decoded(self, lookup: Lookup | None) -> Generator[Frame | FrameResult]:
        index = 0
        fetchers = WORKERS if self._remote is None else FETCHERS
        read = map_ahead(partial(self._read, hashed=lookup is not None), self._look_up(lookup), fetchers)
        with closing(read), closing(map_ahead(self._decode, self._look_up_read(lookup, read), WORKERS)) as images:
            for image in images:
                if isinstance(image, Iterable):
                    yield from image
                    continue
                self.skipped += image.problems
                if image.pixels is not None:
                    item = image.item
                    yield Frame(
                        pixels=image.pixels, index=index, name=item.name, file=item.place, content=image.content
                    )
                    index += 1

    def _look_up(self, lookup: Lookup | None) -> Iterator[SourceItem | Iterable[FrameResult]]:
        """Yield the stored results of each image whose file has not changed since, else the image."""
        for item in self._items(with_states=lookup is not None):
            results = None if lookup is None else lookup(item.name, [item.place], may_read=False)
            yield item if results is None else results

    def _read(self, item: SourceItem | Iterable[FrameResult], hashed: bool) -> _Read | Iterable[FrameResult]:
        """Read the file of an image; stored results are returned as they are."""
        if not isinstance(item, SourceItem):
            return item
        try:
            if isinstance(item.place, Path) and (item.size or 0) > MAX_BYTES:
                return _Read(item, content=_content_of_large(item, hashed))
            data = self.fetch(item)
        except ImageError as error:
            return _Read(item, error=error)
        content = FileContent.of(item, data) if hashed else None
        return _Read(item, data, content)

    def _look_up_read(
        self, lookup: Lookup | None, images: Iterable[_Read | Iterable[FrameResult]]
    ) -> Iterator[_Read | Iterable[FrameResult]]:
        """Yield the stored results of each image whose content is stored, else the image."""
        for image in images:
            results = None
            if isinstance(image, _Read) and image.content is not None and lookup is not None:
                results = lookup(image.item.name, [image.item.place], image.content)
            yield image if results is None else results

    def _decode(self, image: _Read | Iterable[FrameResult]) -> _Decoded | Iterable[FrameResult]:
        """Decode an image; stored results are returned as they are."""
        if not isinstance(image, _Read):
            return image
        problems: list[str] = []
        pixels, shown = None, _shown(image.item)
        try:
            if image.error is not None:
                raise image.error
            if image.data is None:
                pixels = read_image(image.item.place, self.max_pixels, problems.append)  # type: ignore[arg-type]
            else:
                pixels = decode_image(image.data, shown, self.max_pixels, problems.append)
        except ImageError as error:
            if self.is_single:
                raise
            problems.append(str(error).removeprefix(f"{shown}: "))
        return _Decoded(image.item, image.content, pixels, [Skipped(image.item.name, text) for text in problems])

    def name(self, path: Path) -> str:
        """Return the name of an image in the output: its path relative to the input, with `/`."""
        return relative_name(path, self.root)


def _item(name: str, place: Path | Location) -> SourceItem:
    if isinstance(place, Path):
        return SourceItem(name, place)
    return SourceItem(name, place, None, place.size, place.etag, place.modified_ns)


def _item_with_state(item: SourceItem) -> SourceItem:
    """Return an item with what its server tells about it, if that can be asked."""
    if isinstance(item.place, Path):
        return item
    try:
        return _item(item.name, with_state(item.place))
    except RemoteError:  # `fetch` says why
        return item


def read_item(item: SourceItem) -> bytes:
    """Read the encoded bytes of an image.

    Raises:
        ImageError: If it is missing, must not be read, or is larger than an image can be.
    """
    if isinstance(item.place, Path):
        try:
            require_regular(item.place)
            return item.place.read_bytes()
        except (OSError, ValueError) as error:
            raise ImageError(f"{item.place}: {_reason(error)}") from error
    if (item.size or 0) > MAX_OBJECT_BYTES:
        raise ImageError(f"{item.place}: {item.size:,} bytes are more than the {MAX_OBJECT_BYTES:,} allowed")
    try:
        return item.place.read_bytes()
    except RemoteError as error:
        raise ImageError(str(error)) from error


def _shown(item: SourceItem) -> Path | str:
    """Return the file of an image for messages."""
    return item.place if isinstance(item.place, Path) and item.member is None else str(item.place)


def _reason(error: OSError | ValueError) -> str:
    """Return why a file cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a directory; name the files in it"
    return getattr(error, "strerror", None) or str(error)


def _content_of_large(item: SourceItem, hashed: bool) -> FileContent:
    """Return what is known of a file that is too large to hold it."""
    assert isinstance(item.place, Path)
    try:
        require_regular(item.place)
        digest = None
        if hashed:
            with item.place.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ImageError(f"{item.place}: {_reason(error)}") from error
    return FileContent(digest, item.size or 0, item.etag, item.modified_ns)
