"""Images in Lance tables."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from grounded_sam.errors import ConfigError, RemoteError
from grounded_sam.files import home_path
from grounded_sam.media.files import common_folder, natural_key, relative_name
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.remote import Location, is_address, lance_reason, open_lance, redact_address
from grounded_sam.sources.containers import reason_of
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.items import ItemSource, ReadItem
from grounded_sam.sources.shards import check_shard
from grounded_sam.sources.tables import BATCH_ROWS, NO_BYTES, image_column, read_cell
from grounded_sam.structures.items import SourceItem
from grounded_sam.structures.results import Skipped


class LanceSource(ItemSource):
    """The images in a column of Lance tables, in the order of their rows.

    A table is read at its newest version, which is a part of the addresses of the images; a new version is labeled anew
    where the images have changed. Names are as those of `ParquetSource` (`photos.lance/000012`).

    Args:
        input: A table (a folder whose name ends with `.lance`), local or under an address, or a folder of tables.
        column: Name of the column; None for the only one of bytes, or else the one named `image`.
        max_pixels: Larger images are refused before they are decoded.
        shard: Which part of the tables to take, from 0.
        num_shards: Number of parts.

    Attributes:
        skipped: What could not be used.

    Raises:
        ConfigError: If there is no table, or the package is not installed.
        RemoteError: If a table cannot be opened.
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
        check_shard(shard, num_shards)
        self.column, self.num_shards = column, num_shards
        self.tables = [
            (name, address)
            for name, address in _find_tables(check_input(input, "Lance tables, e.g. input=photos.lance"))
            if num_shards == 1 or zlib.crc32(name.encode("utf-8", "surrogatepass")) % num_shards == shard
        ]
        for _, address in self.tables[:1]:
            open_lance(address)

    def __len__(self) -> int:
        """Raise a TypeError: the number of images is known when all tables are read."""
        raise TypeError("the number of images in tables is known when all are read")

    def _items(self, with_states: bool) -> Iterator[SourceItem]:
        return (read.item for read in self._read_items(with_states))

    def _read_items(self, with_states: bool) -> Iterator[ReadItem]:
        return (read for name, address in self.tables for read in self._rows(name, address))

    def _rows(self, name: str, address: str) -> Iterator[ReadItem]:
        """Yield the images of a table, with their content."""
        count = 0
        try:
            table = open_lance(address)
            column = image_column(table.schema, self.column)
            # Versions of a table that was made anew have the same numbers, but another time.
            made = next(entry["timestamp"] for entry in table.versions() if entry["version"] == table.version)
            place = Location(address, etag=f"{table.version}-{made.isoformat()}")
            for batch in table.to_batches(columns=[column], batch_size=BATCH_ROWS):
                for cell in batch.column(0).to_pylist():
                    read = read_cell(name, place, f"lance://{column}/{table.version}/{count}", count, cell)
                    count += 1
                    if read.data is None:
                        self.skipped.append(Skipped(read.item.name, NO_BYTES))
                    else:
                        yield read
        except (OSError, RemoteError, ValueError) as error:
            reason = reason_of(error, Location(address)) if isinstance(error, RemoteError) else lance_reason(error)
            self.skipped.append(Skipped(name, f"{reason}; its first {count:,} rows were read"))


def _find_tables(given: str) -> list[tuple[str, str]]:
    """Return names and addresses of the tables that an input names.

    Raises:
        ConfigError: If there is none.
    """
    if is_address(given):
        address = given.rstrip("/")
        name = redact_address(address).rpartition("/")[2]
        if not name.endswith(".lance"):
            raise ConfigError(
                f"source=lance needs the address of a table, which ends with .lance, got {redact_address(given)}"
            )
        return [(name, address)]
    path = Path(os.path.abspath(home_path(given)))
    if not path.is_dir():
        raise ConfigError(f"no such folder: {given}; source=lance needs a folder that ends with .lance, or one of such")
    folders = [path] if path.suffix == ".lance" else path.iterdir()
    found = [folder for folder in folders if folder.suffix == ".lance" and folder.is_dir()]
    if not found:
        raise ConfigError(f"no Lance table (a folder that ends with .lance) in {given}")
    root = common_folder(found)
    return [(relative_name(table, root), str(table)) for table in sorted(found, key=lambda one: natural_key(str(one)))]
