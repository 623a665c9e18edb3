"""Write the parts of a store."""

from __future__ import annotations

import datetime
import io
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write
from grounded_sam.formats.store_manifest import PartList, part_name
from grounded_sam.formats.store_objects import Row
from grounded_sam.formats.store_runs import StoreRun, read_runs
from grounded_sam.formats.store_schema import SCHEMA
from grounded_sam.output.paths import OutputPath, RemotePath


class PartBuffer:
    """Rows that are kept in memory until there are enough images for a part, or they are old enough.

    Args:
        folder: Folder of the store; created with the first part.
        run: Settings and classes of the run.
        sequence: Position of the last part before those of this process.
        max_images: Number of images per part.
        max_seconds: Age at which a part is written even if it has fewer.

    Attributes:
        has_failed: Whether a part could not be written.
    """

    def __init__(self, folder: OutputPath, run: StoreRun, sequence: int, max_images: int, max_seconds: float) -> None:
        self.folder, self.has_failed = folder, False
        self._run, self._sequence, self._list = run, sequence, PartList(folder)
        self._max_images, self._max_seconds = max_images, max_seconds
        self._rows: list[Row] = []
        self._images, self._start = 0, time.monotonic()

    def add(self, rows: Iterable[Row], images: int = 0) -> None:
        """Add rows, of a number of images, and write a part if it is time to.

        Raises:
            ConfigError: As `flush`.
        """
        self._rows += rows
        self._images += images
        if images and (self._images >= self._max_images or time.monotonic() - self._start >= self._max_seconds):
            self.flush()

    def flush(self) -> None:
        """Write the rows as a part, and the run file if there is none yet.

        Raises:
            ConfigError: If they cannot be written, such as on a full disk.
        """
        if not self._rows:
            return
        self._sequence += 1
        try:
            if not self._list.is_begun or isinstance(self.folder, Path):  # looking is a request at an address
                self._write_run()
            write_part(self.folder, self._sequence, self._rows, self._list)
        except OSError as error:
            self.has_failed = True
            reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
            raise ConfigError(
                f"cannot write into {self.folder}: {reason}; what was stored before is intact, and running the same "
                "command again continues from there"
            ) from error
        self._rows, self._images, self._start = [], 0, time.monotonic()

    def _write_run(self) -> None:
        self._run.write(self.folder, datetime.datetime.now(datetime.UTC).isoformat())

    def finish(self, lost: Iterable[str]) -> None:
        """Note that a run is complete.

        Args:
            lost: Names of parts that were missing or damaged, whose images were processed again.
        """
        if self.folder.is_dir():
            for name in lost:
                self._list.add_lost(name)
            if all(run.fingerprint != self._run.fingerprint for run in read_runs(self.folder)):  # it was deleted
                self._write_run()


def write_part(folder: OutputPath, sequence: int, rows: list[Row], parts: PartList) -> OutputPath:
    """Write rows as a part, and list it with its checksum.

    It appears in the store when it is complete: on this machine it is renamed into place, and at an address it is made
    in memory and written with one request.

    Args:
        folder: Folder of the store.
        sequence: Position of the part in the store.
        rows: The rows.
        parts: List of the parts of this process.

    Returns:
        The part.

    Raises:
        OSError: If it cannot be written.
    """
    stamp = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}"
    path, table = folder / part_name(sequence, stamp), pa.Table.from_pylist(rows, SCHEMA)
    if isinstance(path, RemotePath):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        content = buffer.getvalue()
        path.write_bytes(content, create=True)
    else:
        with atomic_write(path) as part:
            pq.write_table(table, part, compression="zstd", write_page_checksum=True)
            with part.open("rb") as written:
                os.fsync(written.fileno())
        content = path.read_bytes()
    parts.add(path, content)
    return path
