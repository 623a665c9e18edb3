"""Paths of outputs and stores, on this machine or at an address such as `s3://bucket/labels`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import total_ordering
from pathlib import Path
from typing import IO, Any, TypeVar

from grounded_sam.errors import MissingObjectError
from grounded_sam.remote import (
    convert_remote_errors,
    is_address,
    open_filesystem,
    protocol_of,
    read_bytes,
    redact_address,
    retry,
    write_bytes,
)

T = TypeVar("T")

#: Protocols whose files can be uploaded piece by piece and appear when the upload is completed.
_UPLOADS = {"s3", "s3a", "gs", "gcs"}
#: Bytes up to which a file is written with one request.
_ONE_REQUEST = 64 * 2**20

#: Folder in each output that holds what the program keeps for itself.
STATE = ".grounded_sam"


@total_ordering
class RemotePath:
    """A file or folder at an address, with the methods of `pathlib.Path` that outputs and stores need.

    Nothing is remembered: each method that looks asks the server, so that what other processes wrote is seen. A folder
    exists if a file is in it. Files are written as a whole, with one request or with one upload that is completed at
    its end, so that readers see the old content or the new, and never a part.

    Args:
        address: The address, such as `s3://bucket/labels`.

    Attributes:
        address: The address without a slash at its end; `str` gives it without user names and passwords.

    Raises:
        ConfigError: From all methods, if the package for the protocol is missing.
        RemoteError: From all methods, if the server cannot be reached or refuses; `MissingObjectError` if there is no
            such file.

    >>> folder = RemotePath("memory://results/")
    >>> str(folder / "store" / "part-1.parquet"), (folder / "report.html").suffix, folder.name
    ('memory://results/store/part-1.parquet', '.html', 'results')
    """

    __slots__ = ("address",)

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def __str__(self) -> str:
        return redact_address(self.address)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.address == other.address

    def __lt__(self, other: RemotePath) -> bool:
        return self.address < other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.address}/{name}")

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.address.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """Ending of the name with its dot; empty without one."""
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that this is in; itself where there is none."""
        folder = self.address.rpartition("/")[0]
        return self if not folder or folder.endswith(("/", ":")) else RemotePath(folder)

    @property
    def parents(self) -> Iterator[RemotePath]:
        """The folders that this is in, the innermost first."""
        path = self
        while (folder := path.parent) != path:
            yield folder
            path = folder

    def with_name(self, name: str) -> RemotePath:
        """Return the path of another name in the same folder."""
        return self.parent / name

    def with_stem(self, stem: str) -> RemotePath:
        """Return the path of another name with the same suffix, in the same folder."""
        return self.with_name(stem + self.suffix)

    def as_posix(self) -> str:
        """Return the address without user names and passwords."""
        return str(self)

    def relative_to(self, folder: RemotePath) -> Path:
        """Return the path below a folder.

        Raises:
            ValueError: If this is not below it.
        """
        if not self.is_relative_to(folder):
            raise ValueError(f"{self} is not in {folder}")
        return Path(self.address[len(folder.address) + 1 :])

    def is_relative_to(self, folder: RemotePath) -> bool:
        """Return whether this is a folder, or below it."""
        return self == folder or self.address.startswith(f"{folder.address}/")

    def is_symlink(self) -> bool:
        """Return False: there are no links."""
        return False

    def is_file(self) -> bool:
        """Return whether there is such a file."""
        try:
            info: dict[str, Any] = self._ask(lambda fs, key: fs.info(key))
        except MissingObjectError:
            return False
        return info["type"] == "file"

    def _ask(self, question: Callable[[Any, str], T]) -> T:
        """Ask the file system about the key; transient errors are tried again."""
        fs, key = open_filesystem(self.address)

        def ask() -> T:
            fs.invalidate_cache()
            return question(fs, key)

        with convert_remote_errors(self.address):
            return retry(ask)

    def _names(self) -> list[str]:
        """Return the names of the files and folders in the folder; none if there is no such folder."""
        try:
            keys: list[str] = self._ask(lambda fs, key: fs.ls(key, detail=False))
        except MissingObjectError:
            return []
        return sorted({key.rstrip("/").rpartition("/")[2] for key in keys})

    def exists(self) -> bool:
        """Return whether there is such a file, or a file in such a folder."""
        return self.is_file() or self.is_dir()

    def is_dir(self) -> bool:
        """Return whether a file is in such a folder."""
        return bool(self._names())

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files of a folder whose names match a pattern; none if there is no such folder."""
        yield from (self / name for name in self._names() if fnmatchcase(name, pattern))

    def read_bytes(self) -> bytes:
        """Return the content of the file."""
        return read_bytes(*open_filesystem(self.address))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the content of a text file."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes, *, create: bool = False) -> None:
        """Write the file, with one request.

        Args:
            content: Its content.
            create: Only if there is none; of several processes that do so at the same time, one succeeds.

        Raises:
            FileExistsError: With `create`, if there is one.
        """
        write_bytes(*open_filesystem(self.address), content, create)

    def write_file(self, file: IO[bytes]) -> None:
        """Write the file from an open one, which may be larger than the memory; it appears when all of it is there.

        Args:
            file: File with the content, read from its beginning.
        """
        fs, key = open_filesystem(self.address)
        size = file.seek(0, 2)
        file.seek(0)
        if size <= _ONE_REQUEST or protocol_of(self.address) not in _UPLOADS:
            self.write_bytes(file.read())
            return

        def upload() -> None:
            file.seek(0)
            target = fs.open(key, "wb", autocommit=False)
            try:
                shutil.copyfileobj(file, target, 2**23)
                target.close()  # sends the rest
                target.commit()
            except BaseException:
                target.closed = True  # else it would be completed when it is garbage
                with suppress(Exception):
                    target.discard()
                raise

        with convert_remote_errors(self.address):
            retry(upload)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file.

        Raises:
            FileNotFoundError: If there is none, unless `missing_ok`.
        """
        try:
            self._ask(lambda fs, key: fs.rm_file(key))
        except MissingObjectError:
            if not missing_ok:
                raise


#: A path on this machine or at an address.
OutputPath = Path | RemotePath


def output_path(path: str | OutputPath) -> OutputPath:
    """Return the path of an output or a store.

    Args:
        path: A path or an address; `file://` addresses are paths of this machine.

    >>> output_path("s3://bucket/labels/"), output_path("file:///data/labels").as_posix()
    (RemotePath('s3://bucket/labels'), '/data/labels')
    """
    if not isinstance(path, str):
        return path
    if path.startswith("file://"):
        return Path(path.removeprefix("file://"))
    return RemotePath(path) if is_address(path) else Path(path)
