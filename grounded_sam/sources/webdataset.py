"""Images in tar shards, as WebDataset has them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from grounded_sam.errors import RemoteError
from grounded_sam.media.files import image_suffixes
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.remote import Location
from grounded_sam.sources.containers import find_containers, known_place, open_container, reason_of
from grounded_sam.sources.items import MAX_OBJECT_BYTES, ItemSource, ReadItem
from grounded_sam.structures.items import SourceItem
from grounded_sam.structures.results import Skipped


class WebDatasetSource(ItemSource):
    """The images in tar files, in their order there, each tar read once from its beginning to its end.

    The name of an image is that of its tar and its key with suffix (`train-000.tar/0001.jpg`). Other members, such as
    captions, and hidden ones are passed over. Links, members with a name that leads out of the archive, and second
    members of one name are listed in `skipped`, as is a tar that ends in the middle, whose images up to there are read.
    Compressed tars are not read.

    Args:
        input: A tar file, a folder, a glob, a `.txt` list, or any of these under an address (`s3://bucket/train-*.tar`).
        max_pixels: Larger images are refused before they are decoded.
        shard: Which part of the tar files to take, from 0.
        num_shards: Number of parts.

    Attributes:
        skipped: What could not be used.

    Raises:
        ConfigError: If there is no tar file.
        RemoteError: If an address cannot be listed.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        super().__init__(max_pixels)
        self.num_shards = num_shards
        self.shards = find_containers(input, ".tar", shard, num_shards)

    def __len__(self) -> int:
        """Raise a TypeError: the number of images is known when all tars are read."""
        raise TypeError("the number of images in tar files is known when all are read")

    def _items(self, with_states: bool) -> Iterator[SourceItem]:
        return (read.item for name, place in self.shards for read in self._members(name, place, with_data=False))

    def _read_items(self, with_states: bool) -> Iterator[SourceItem | ReadItem]:
        return (read for name, place in self.shards for read in self._members(name, place, with_data=True))

    def _members(self, name: str, place: Path | Location, with_data: bool) -> Iterator[ReadItem]:
        """Yield the images of a tar, with their content if that is asked for."""
        count = 0
        try:
            known = known_place(place)
            # A stream is read once, in order; without the content, a local file is searched from header to header.
            mode = "r|" if with_data or isinstance(place, Location) else "r:"
            with open_container(place) as file, tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
                seen: set[str] = set()
                for member in archive:
                    if not self._is_wanted(f"{name}/{member.name}", member, seen):
                        continue
                    item = _item(name, known, member)
                    data = archive.extractfile(member).read() if with_data else None
                    if data is not None and len(data) != member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    if not with_data and member.offset_data + member.size > (known.size or 0):
                        raise tarfile.ReadError("unexpected end of data")
                    count += 1
                    yield ReadItem(item, data)
        except (OSError, EOFError, RemoteError, tarfile.TarError, ValueError) as error:
            self.skipped.append(Skipped(name, f"{reason_of(error, place)}; its first {count:,} images were read"))

    def _is_wanted(self, name: str, member: tarfile.TarInfo, seen: set[str]) -> bool:
        """Return whether a member is an image that may be read; list those that may not."""
        path = PurePosixPath(member.name)
        if path.name.startswith(".") or path.suffix.lower() not in image_suffixes():
            return False
        reason = None
        if not member.isreg() or member.issparse():
            reason = "a link or a special file, which is not read from an archive"
        elif path.is_absolute() or ".." in path.parts or "\\" in member.name:
            reason = "a name that leads out of the archive; pack it anew"
        elif member.size > MAX_OBJECT_BYTES:
            reason = f"{member.size:,} bytes are more than the {MAX_OBJECT_BYTES:,} allowed"
        elif member.name in seen:
            reason = "the second member of this name; only the first is read"
        seen.add(member.name)
        if reason is not None:
            self.skipped.append(Skipped(name, reason))
        return reason is None


def _item(shard: str, place: Location, member: tarfile.TarInfo) -> SourceItem:
    """Return the item of a member."""
    span = (member.offset_data, member.offset_data + member.size)
    etag = None if place.etag is None else f"{place.etag}@{span[0]}"
    address = f"tar://{member.name}::{place.address}"
    location = Location(address, member.size, etag, place.modified_ns, span)
    return SourceItem(f"{shard}/{member.name}", location, member.name, member.size, etag, place.modified_ns, span)
