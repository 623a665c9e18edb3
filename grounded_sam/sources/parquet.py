"""Images in Parquet tables, as Hugging Face's `datasets` has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.remote import Location
from grounded_sam.sources.containers import find_containers, known_place, open_container, reason_of
from grounded_sam.sources.items import ReadItem
from grounded_sam.sources.tables import BATCH_ROWS, TableSource, image_column, read_cell


class ParquetSource(TableSource):
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
        super().__init__(find_containers(input, ".parquet", shard, num_shards), column, max_pixels, num_shards)

    def _cells(self, name: str, place: Path | Location) -> Iterator[ReadItem]:
        known = known_place(place)
        row = 0
        with open_container(place) as file, pq.ParquetFile(file) as table:
            column = image_column(table.schema_arrow, self.column)
            for group in range(table.num_row_groups):
                first = row
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                    for cell in batch.column(0).to_pylist():
                        yield read_cell(name, known, f"parquet://{column}/{group}/{row - first}", row, cell)
                        row += 1

    def _reason(self, error: Exception, place: Path | Location) -> str:
        return reason_of(error, place)
