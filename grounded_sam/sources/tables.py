"""What the sources of tables share: the column with the images, and the items of its cells."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from grounded_sam.remote import Location
from grounded_sam.sources.items import ReadItem
from grounded_sam.structures.items import SourceItem

#: Rows that are held at a time.
BATCH_ROWS = 16
#: Reason of a row that has no image.
NO_BYTES = "no bytes in this row, perhaps a path alone"


def image_column(schema: pa.Schema, wanted: str | None) -> str:
    """Return the column with encoded images.

    Raises:
        ValueError: If there is none, or more than one could be meant.
    """
    found = [field.name for field in schema if _holds_bytes(field.type)]
    if wanted is not None:
        if wanted not in found:
            raise ValueError(f"no column {wanted!r} of bytes (source.column); those of bytes are {found}")
        return wanted
    if "image" in found or len(found) == 1:
        return "image" if "image" in found else found[0]
    raise ValueError(f"set source.column to the column of the images, one of {found or list(schema.names)}")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def read_cell(table: str, place: Location, cell_address: str, row: int, cell: Any) -> ReadItem:
    """Return the image of a cell, with its content; without it if the cell has no bytes.

    Args:
        table: Name of the table.
        place: The table.
        cell_address: Address of the cell in the table.
        row: Number of the row, from 0.
        cell: The encoded image, or a dict with `bytes` and `path`.
    """
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    name = PurePosixPath(path.replace("\\", "/")).name if isinstance(path, str) else ""
    size = None if data is None else len(data)
    etag = None if place.etag is None else f"{place.etag}@{row}"
    location = Location(f"{cell_address}::{place.address}", size, etag, place.modified_ns)
    full = f"{table}/{row:06d}{'-' + name if name else ''}"
    return ReadItem(SourceItem(full, location, str(row), size, etag, place.modified_ns), data)
