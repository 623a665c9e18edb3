"""Images in Lance tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from grounded_sam.errors import ConfigError, RemoteError
from grounded_sam.files import home_path
from grounded_sam.media.files import common_folder, natural_key, relative_name
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.remote import Location, is_address, lance_reason, open_lance, redact_address
from grounded_sam.sources.containers import reason_of
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.items import ReadItem
from grounded_sam.sources.shards import check_shard, in_shard
from grounded_sam.sources.tables import BATCH_ROWS, TableSource, image_column, read_cell


class LanceSource(TableSource):
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
        check_shard(shard, num_shards)
        found = _find_tables(check_input(input, "Lance tables, e.g. input=photos.lance"))
        tables = [(name, place) for name, place in found if in_shard(name, shard, num_shards)]
        super().__init__(tables, column, max_pixels, num_shards)
        for _, place in tables[:1]:
            open_lance(place.address)

    def _cells(self, name: str, place: Path | Location) -> Iterator[ReadItem]:
        assert isinstance(place, Location)
        table = open_lance(place.address)
        column = image_column(table.schema, self.column)
        # Versions of a table that was made anew have the same numbers, but another time.
        made = next(entry["timestamp"] for entry in table.versions() if entry["version"] == table.version)
        known = Location(place.address, etag=f"{table.version}-{made.isoformat()}")
        row = 0
        for batch in table.to_batches(columns=[column], batch_size=BATCH_ROWS):
            for cell in batch.column(0).to_pylist():
                yield read_cell(name, known, f"lance://{column}/{table.version}/{row}", row, cell)
                row += 1

    def _reason(self, error: Exception, place: Path | Location) -> str:
        return reason_of(error, place) if isinstance(error, RemoteError) else lance_reason(error)


def _find_tables(given: str) -> list[tuple[str, Location]]:
    """Return names and places of the tables that an input names.

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
        return [(name, Location(address))]
    path = Path(os.path.abspath(home_path(given)))
    if not path.is_dir():
        raise ConfigError(f"no such folder: {given}; source=lance needs a folder that ends with .lance, or one of such")
    folders = [path] if path.suffix == ".lance" else path.iterdir()
    found = [folder for folder in folders if folder.suffix == ".lance" and folder.is_dir()]
    if not found:
        raise ConfigError(f"no Lance table (a folder that ends with .lance) in {given}")
    root = common_folder(found)
    return [
        (relative_name(table, root), Location(str(table)))
        for table in sorted(found, key=lambda one: natural_key(str(one)))
    ]
