"""Images in Parquet tables, as Hugging Face's `datasets` has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grounded_sam.errors import RemoteError
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.remote import Location
from grounded_sam.sources.containers import find_containers, known_place, open_container, reason_of
from grounded_sam.sources.items import ItemSource, ReadItem
from grounded_sam.sources.tables import BATCH_ROWS, NO_BYTES, image_column, read_cell
from grounded_sam.structures.items import SourceItem
from grounded_sam.structures.results import Skipped


class ParquetSource(ItemSource):
    """The images in a column of Parquet files, in the order of their rows.

    The column has the encoded images, as bytes or as structs with `bytes` and `path`. The name of an image is that of
    its file and the number of its row, from 0, with the last part of its path if there is one
    (`train-0.parquet/000012-car.jpg`). Rows without bytes are listed in `skipped`.

    Args:
        input: A Parquet file, a folder, a glob, a `.txt` list, or any of these under an address.
        column: Name of the column; None for the only one of such a type, or else the one named `image`.
        max_pixels: Larger images are refused before they are decoded.
        shard: Which part of the files to take, from 0.
        num_shards: Number of parts.

    Attributes:
        skipped: What could not be used.

    Raises:
        ConfigError: If there is no Parquet file.
        RemoteError: If an address cannot be listed.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        column: str | None = None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        super().__init__(max_pixels)
        self.column, self.num_shards = column, num_shards
        self.tables = find_containers(input, ".parquet", shard, num_shards)

    def __len__(self) -> int:
        """Raise a TypeError: the number of images is known when all tables are read."""
        raise TypeError("the number of images in tables is known when all are read")

    def _items(self, with_states: bool) -> Iterator[SourceItem]:
        return (read.item for read in self._read_items(with_states))

    def _read_items(self, with_states: bool) -> Iterator[ReadItem]:
        return (read for name, place in self.tables for read in self._rows(name, place))

    def _rows(self, name: str, place: Path | Location) -> Iterator[ReadItem]:
        """Yield the images of a table, with their content."""
        count = 0
        try:
            known = known_place(place)
            with open_container(place) as file, pq.ParquetFile(file) as table:
                column = image_column(table.schema_arrow, self.column)
                for group in range(table.num_row_groups):
                    first = count
                    for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                        for cell in batch.column(0).to_pylist():
                            read = read_cell(name, known, f"parquet://{column}/{group}/{count - first}", count, cell)
                            count += 1
                            if read.data is None:
                                self.skipped.append(Skipped(read.item.name, NO_BYTES))
                            else:
                                yield read
        except (OSError, RemoteError, pa.ArrowException, ValueError) as error:
            self.skipped.append(Skipped(name, f"{reason_of(error, place)}; its first {count:,} rows were read"))
