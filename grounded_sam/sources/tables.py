"""What the sources of tables share: the loop over rows, the column with the images, and the items of its cells."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from grounded_sam.errors import RemoteError
from grounded_sam.remote import Location
from grounded_sam.sources.items import ItemSource, ReadItem
from grounded_sam.structures.items import SourceItem
from grounded_sam.structures.results import Skipped

#: Rows that are held at a time.
BATCH_ROWS = 16


class TableSource(ItemSource):
    """A source of the images in a column of tables, in the order of their rows.

    Args:
        tables: Names and places of the tables.
        column: Name of the column; None for the only one of bytes, or else the one named `image`.
        max_pixels: Larger images are refused before they are decoded.
        num_shards: Number of parts that the tables were divided into.
    """

    def __init__(
        self, tables: Sequence[tuple[str, Path | Location]], column: str | None, max_pixels: int, num_shards: int
    ) -> None:
        super().__init__(max_pixels)
        self.tables, self.column, self.num_shards = tables, column, num_shards

    @abstractmethod
    def _cells(self, name: str, place: Path | Location) -> Iterator[ReadItem]:
        """Yield the images of a table, with their content; those without bytes as well."""

    @abstractmethod
    def _reason(self, error: Exception, place: Path | Location) -> str:
        """Return why a table cannot be read, in one line."""

    def __len__(self) -> int:
        """Raise a TypeError: the number of images is known when all tables are read."""
        raise TypeError("the number of images in tables is known when all are read")

    def _items(self, with_states: bool) -> Iterator[SourceItem]:
        return (read.item for read in self._read_items(with_states))

    def _read_items(self, with_states: bool) -> Iterator[ReadItem]:
        return (read for name, place in self.tables for read in self._rows(name, place))

    def _rows(self, name: str, place: Path | Location) -> Iterator[ReadItem]:
        """Yield the images of a table, and list in `skipped` what has none."""
        count = 0
        try:
            for read in self._cells(name, place):
                count += 1
                if read.data is None:
                    self.skipped.append(Skipped(read.item.name, "no bytes in this row, perhaps a path alone"))
                else:
                    yield read
        except (OSError, RemoteError, pa.ArrowException, ValueError) as error:
            self.skipped.append(Skipped(name, f"{self._reason(error, place)}; its first {count:,} rows were read"))


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
