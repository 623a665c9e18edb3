"""What a source lists: images that are not read yet, and what is known of a file once it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from grounded_sam.remote import Location


@dataclass(frozen=True)
class SourceItem:
    """An image of a source, not read yet. It can be pickled.

    Attributes:
        name: Name of the image in the output, relative to the input, with `/`; unique within a source.
        place: Its file, or the object under an address; of a member of an archive or table, that as a whole.
        member: Name of the member of an archive or table; None for a file of its own.
        size: Bytes; None if unknown.
        etag: What changes with the content of an object, see `remote.Location`; None for local files.
        modified_ns: When it was changed last, nanoseconds since 1970; None if unknown.
        span: Of a member: first byte in the archive, and the one to stop before; of a table, group and row.
    """

    name: str
    place: Path | Location
    member: str | None = None
    size: int | None = None
    etag: str | None = None
    modified_ns: int | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class FileContent:
    """What is known of the file of an image that was read.

    Attributes:
        digest: SHA-256 of the file; None if it was not computed.
        size: Bytes.
        etag: As of `SourceItem`.
        modified_ns: As of `SourceItem`.
        data: The file itself, where reading it again would take a request; else None.
    """

    digest: str | None
    size: int
    etag: str | None = None
    modified_ns: int | None = None
    data: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, item: SourceItem, data: bytes) -> FileContent:
        """Return the content of an item.

        >>> FileContent.of(SourceItem("a.png", Path("a.png")), b"").digest[:8]
        'e3b0c442'
        """
        is_local = isinstance(item.place, Path) and item.member is None
        digest = hashlib.sha256(data).hexdigest()
        return cls(digest, len(data), item.etag, item.modified_ns, None if is_local else data)
