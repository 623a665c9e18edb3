"""Read images that a source lists: looked up in the store, fetched and decoded ahead."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grounded_sam.checks import check_int
from grounded_sam.errors import ImageError, RemoteError
from grounded_sam.files import require_regular
from grounded_sam.media.images import decode_image, read_image
from grounded_sam.media.listing import with_state
from grounded_sam.media.prefetch import FETCHERS, WORKERS, Prefetch, map_ahead
from grounded_sam.remote import Location
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
class ReadItem:
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


class ItemSource(ABC):
    """A source of images that are listed first, then looked up, read and decoded ahead on threads.

    Args:
        max_pixels: Larger images are refused before they are decoded.

    Attributes:
        skipped: Files that could not be used, or not in whole.
        is_single: Whether the input is one image; if it cannot be read, that is an error.
        fetchers: Threads that read files.
    """

    def __init__(self, max_pixels: int) -> None:
        check_int("source.max_pixels", max_pixels, 1)
        self.max_pixels = max_pixels
        self.skipped: list[Skipped] = []
        self.is_single = False
        self.fetchers = FETCHERS

    @abstractmethod
    def _items(self, with_states: bool) -> Iterator[SourceItem]:
        """Yield the images, with what tells whether they have changed if that is asked for."""

    def _read_items(self, with_states: bool) -> Iterator[SourceItem | ReadItem]:
        """Yield the images, some of them read already."""
        return self._items(with_states)

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        return self._frames(None)

    def resume(self, lookup: Lookup) -> Iterator[Frame | FrameResult]:
        """Yield the stored result of each image that has one, else the decoded image."""
        return self._frames(lookup)

    def items(self) -> Iterator[SourceItem]:
        """Yield the images without reading them; see `structures.protocols.ListsItems`."""
        return self._items(with_states=True)

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
        read = map_ahead(partial(self._read, hashed=lookup is not None), self._look_up(lookup), self.fetchers)
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

    def _look_up(self, lookup: Lookup | None) -> Iterator[SourceItem | ReadItem | Iterable[FrameResult]]:
        """Yield the stored results of each image whose file has not changed since, else the image."""
        for found in self._read_items(with_states=lookup is not None):
            item = found.item if isinstance(found, ReadItem) else found
            results = None if lookup is None else lookup(item.name, [item.place], may_read=False)
            yield found if results is None else results

    def _read(
        self, item: SourceItem | ReadItem | Iterable[FrameResult], hashed: bool
    ) -> ReadItem | Iterable[FrameResult]:
        """Read the file of an image; stored results are returned as they are."""
        if isinstance(item, ReadItem) and hashed and item.data is not None:
            return ReadItem(item.item, item.data, FileContent.of(item.item, item.data))
        if not isinstance(item, SourceItem):
            return item
        try:
            if isinstance(item.place, Path) and (item.size or 0) > MAX_BYTES:
                return ReadItem(item, content=_content_of_large(item, hashed))
            data = self.fetch(item)
        except ImageError as error:
            return ReadItem(item, error=error)
        content = FileContent.of(item, data) if hashed else None
        return ReadItem(item, data, content)

    def _look_up_read(
        self, lookup: Lookup | None, images: Iterable[ReadItem | Iterable[FrameResult]]
    ) -> Iterator[ReadItem | Iterable[FrameResult]]:
        """Yield the stored results of each image whose content is stored, else the image."""
        for image in images:
            results = None
            if isinstance(image, ReadItem) and image.content is not None and lookup is not None:
                results = lookup(image.item.name, [image.item.place], image.content)
            yield image if results is None else results

    def _decode(self, image: ReadItem | Iterable[FrameResult]) -> _Decoded | Iterable[FrameResult]:
        """Decode an image; stored results are returned as they are."""
        if not isinstance(image, ReadItem):
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


def item_of(name: str, place: Path | Location) -> SourceItem:
    """Return the item of a file or object."""
    if isinstance(place, Path):
        return SourceItem(name, place)
    return SourceItem(name, place, None, place.size, place.etag, place.modified_ns)


def item_with_state(item: SourceItem) -> SourceItem:
    """Return an item with what its server tells about it, if that can be asked."""
    if isinstance(item.place, Path):
        return item
    try:
        return item_of(item.name, with_state(item.place))
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
