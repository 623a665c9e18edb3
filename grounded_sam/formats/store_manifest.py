"""Which parts a store has, with their checksums, and the order in which they were written.

Every process that writes into a store adds a line per part to a file of its own, `_parts-*.jsonl`: name, size in bytes
and SHA-256. A part that is in no list (of an earlier version, or of a process that was killed before it could add the
line) is read without these checks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

from grounded_sam.errors import ConfigError, RemoteError
from grounded_sam.files import read_regular
from grounded_sam.output.paths import OutputPath, RemotePath

#: Lines of a list at an address, where each new line writes the list anew; then another one begins.
MAX_REMOTE_LINES = 200
#: Number of files at an address that are read at a time.
READ_AHEAD = 8
_NAME = re.compile(r"part-(\d{8})-.*\.parquet")


@dataclass(frozen=True)
class _Record:
    """A line of a list: what a part should be, or that its loss is known."""

    name: str
    bytes: int
    sha256: str
    lost: bool = False


def part_name(sequence: int, stamp: str) -> str:
    """Return the name of a part.

    Args:
        sequence: Its position in the store, counted and not read from a clock; shards may use the same one.
        stamp: Anything that makes the name unique.

    >>> part_name(7, "a")
    'part-00000007-a.parquet'
    """
    return f"part-{sequence:08d}-{stamp}.parquet"


def sequence_of(part: OutputPath) -> int:
    """Return the position of a part in its store; 0 for those of earlier versions, whose names begin with a time.

    >>> from pathlib import Path
    >>> sequence_of(Path("part-00000007-a.parquet")), sequence_of(Path("part-20261127T021344.083252-93c3.parquet"))
    (7, 0)
    """
    match = _NAME.fullmatch(part.name)
    return int(match[1]) if match else 0


def read_ahead(read: Callable[[OutputPath], bytes], paths: Sequence[OutputPath]) -> Iterator[Callable[[], bytes]]:
    """Yield for each file a function that returns its content; at an address, several files are read ahead."""
    if not paths or not isinstance(paths[0], RemotePath):
        yield from (partial(read, path) for path in paths)
        return
    with ThreadPoolExecutor(READ_AHEAD, "parts") as pool:
        ahead: deque[Future[bytes]] = deque()
        for path in paths:
            ahead.append(pool.submit(read, path))
            if len(ahead) >= READ_AHEAD:
                yield ahead.popleft().result
        yield from (future.result for future in ahead)


class PartList:
    """The list of the parts that one process writes.

    Args:
        folder: Folder of the store.
    """

    def __init__(self, folder: OutputPath) -> None:
        self._folder, self._lines = folder, list[str]()
        self._path = self._new_path()

    @property
    def is_begun(self) -> bool:
        """Whether a part was added to a list at an address."""
        return bool(self._lines)

    def _new_path(self) -> OutputPath:
        return self._folder / f"_parts-{uuid.uuid4().hex[:16]}.jsonl"

    def add(self, part: OutputPath, content: bytes) -> None:
        """Add a part that is complete.

        Args:
            part: The part.
            content: What was written into it.

        Raises:
            OSError: If it cannot be written.
        """
        self._write(_Record(part.name, len(content), hashlib.sha256(content).hexdigest()))

    def add_lost(self, name: str) -> None:
        """Note that a part is gone and that its images were processed again."""
        self._write(_Record(name, 0, "", lost=True))

    def _write(self, record: _Record) -> None:
        line = json.dumps(asdict(record)) + "\n"
        if isinstance(self._path, RemotePath):
            if len(self._lines) >= MAX_REMOTE_LINES:
                self._path, self._lines = self._new_path(), []
            self._lines.append(line)
            self._path.write_bytes("".join(self._lines).encode())
            return
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(line)
            lines.flush()
            os.fsync(lines.fileno())


class Manifest:
    """The lists of all processes that wrote into a store.

    Args:
        folder: Folder of the store; None to read nothing.
        parts: Names of its parts, listed before.

    Attributes:
        missing: Names of parts that are listed and gone.
        lost: Names of parts whose images were processed again, because they were gone or damaged.

    Raises:
        ConfigError: If a list is damaged.
    """

    def __init__(self, folder: OutputPath | None, parts: Collection[str]) -> None:
        self._records: dict[str, _Record] = {}
        self.lost: set[str] = set()
        lists: list[OutputPath] = [] if folder is None else list(folder.glob("_parts-*.jsonl"))
        lists.sort(key=str)
        for path, content in zip(lists, read_ahead(read_regular, lists), strict=True):
            for record in _read_list(path, content):
                if record.lost:
                    self.lost.add(record.name)
                else:
                    self._records[record.name] = record
        unknown = [name for name in self._records if name not in self.lost and name not in parts]
        # A part that was written after `parts` were listed is not missing.
        self.missing = [name for name in unknown if folder is not None and not (folder / name).exists()]

    def read(self, part: OutputPath) -> bytes:
        """Read a part.

        Raises:
            ValueError: If it is not as it was written.
            OSError: If it cannot be read.
        """
        content, record = read_regular(part), self._records.get(part.name)
        if record is not None and len(content) != record.bytes:
            raise ValueError(f"it has {len(content)} bytes, but was written with {record.bytes}")
        if record is not None and hashlib.sha256(content).hexdigest() != record.sha256:
            raise ValueError("its checksum is not the one that it was written with")
        return content


def _read_list(path: OutputPath, content: Callable[[], bytes]) -> list[_Record]:
    """Read a list; a last line that is incomplete, of a process that was killed, is left out."""
    try:
        lines = content().decode().split("\n")[:-1]
        return [_Record(**json.loads(line)) for line in lines]
    except RemoteError:  # of the server, not of the list
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} cannot be read ({reason}); delete it, and its parts are read without it") from error
