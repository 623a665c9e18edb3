"""Atomic writes, output names that are unique, safe and inside their folder, and a check of files that are read."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO

from grounded_sam.output.claim import ClaimedFolder, absolute, check_output, claim_of
from grounded_sam.output.paths import OutputPath, RemotePath, output_path
from grounded_sam.output.remote_claim import RemoteClaim

#: Bytes of a file that is uploaded, above which it waits on disk.
MAX_SPOOLED = 64 * 2**20


def home_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder for `~` and `~user` at its beginning; other names stay as they are.

    Args:
        path: The path, as a user may write it.

    >>> home_path("~nobody by this name/a.png").as_posix()
    '~nobody by this name/a.png'
    """
    try:
        return Path(os.path.expanduser(path))
    except ValueError:  # a user's name with a NUL character
        return Path(path)


def require_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Check that a path is a file that ends: reading a pipe or a device may never return.

    Args:
        path: What will be opened.

    Returns:
        Its status.

    Raises:
        OSError: If there is nothing, or something else than a file; `strerror` says what.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(
            errno.EINVAL, "not a file, but a pipe, socket or device; copy its content to a file", os.fspath(path)
        )
    return status


def store_path(path: str | OutputPath) -> OutputPath:
    """Return the path of an output or a store as a user may write it: an address, or a path with `~` for the home.

    >>> store_path("memory://labels")
    RemotePath('memory://labels')
    """
    place = output_path(path)
    return place if isinstance(place, RemotePath) else home_path(place)


def read_regular(path: OutputPath) -> bytes:
    """Read a whole file, on this machine or at an address.

    Raises:
        OSError: If it cannot be read, or is no file; see `require_regular`.
    """
    if not isinstance(path, RemotePath):
        require_regular(path)
    return path.read_bytes()


class PendingFile:
    """A file written under a temporary name during a run, and renamed when it is complete.

    In a claimed output folder, a file that no run wrote is not replaced, and nothing is written through links; see
    `output.claim`.

    Args:
        path: File to write. Its folder is created.
        shared: Whether other processes may write the same file at the same time; the last one wins.
        is_copy: Whether it is a copy of an input, which later runs into the same output do not remove.

    Attributes:
        path: The file.
        part: Temporary path beside it, to write to.

    Raises:
        ConfigError: If the file must not be replaced.
    """

    def __init__(self, path: Path, *, shared: bool = False, is_copy: bool = False) -> None:
        check_output(path)
        self._is_copy = is_copy
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part" if shared else f".{path.name}.part")
        self._text: TextIOWrapper | None = None
        self.discard()  # left by a process that was killed; it may be a link

    @property
    def text(self) -> TextIOWrapper:
        """The temporary file as a UTF-8 text stream, opened when first read; `commit` closes it."""
        if self._text is None:
            self._text = self.part.open("w", encoding="utf-8", newline="")  # line ends as written, on every system
        return self._text

    def commit(self) -> None:
        """Rename the temporary file to `path`, which is replaced."""
        if self._text is not None:
            self._text.close()
        _record(self.path, self.part, self._is_copy)
        os.replace(self.part, self.path)

    def discard(self) -> None:
        """Remove the temporary file, if there is one."""
        if self._text is not None:
            self._text.close()
        self.part.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path, *, shared: bool = False, is_copy: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; rename it at the end, or remove it on an error.

    Args:
        path: File to write. Its folder is created.
        shared: Whether other processes may write the same file at the same time; the last one wins.
        is_copy: Whether it is a copy of an input, which later runs into the same output do not remove.
    """
    pending = PendingFile(path, shared=shared, is_copy=is_copy)
    try:
        yield pending.part
        pending.commit()
    finally:
        pending.discard()


def atomic_write_text(path: OutputPath, text: str, *, shared: bool = False) -> None:
    """Write a UTF-8 text file atomically: readers see the old content or the new.

    Args:
        path: File to write. Its folder is created.
        text: Its content.
        shared: Whether other processes may write the same file at the same time; the last one wins.
    """
    if isinstance(path, RemotePath):
        upload = PendingUpload(path)
        upload.text.write(text)
        upload.commit()
        return
    with atomic_write(path, shared=shared) as part:
        part.write_text(text, encoding="utf-8")


def atomic_write_bytes(path: OutputPath, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new.

    Args:
        path: File to write. Its folder is created.
        content: Its content.
    """
    if isinstance(path, RemotePath):
        check_output(path)
        if isinstance(claimed := claim_of(path), RemoteClaim):
            claimed.record(path, hashlib.sha256(content).hexdigest())
        path.write_bytes(content)
        return
    with atomic_write(path) as part:
        part.write_bytes(content)


class PendingUpload:
    """A text file at an address, written to a temporary file without a name and uploaded when it is complete.

    It appears at its address as a whole, or not at all. In a claimed output, a file that no run wrote is not replaced;
    see `output.remote_claim`.

    Args:
        path: File to write.

    Attributes:
        path: As above.
        text: The temporary file as a UTF-8 text stream, which is closed at the end.

    Raises:
        ConfigError: If the file must not be replaced.
    """

    def __init__(self, path: RemotePath) -> None:
        check_output(path)
        self.path = path
        # Without a name, so that nothing is left when the process is killed.
        self._content = tempfile.SpooledTemporaryFile(MAX_SPOOLED)  # noqa: SIM115
        self.text = TextIOWrapper(self._content, encoding="utf-8", newline="")  # type: ignore[type-var]

    def commit(self) -> None:
        """Upload the file, which replaces an earlier one.

        Raises:
            OSError: If that fails; an earlier file stays as it is.
        """
        self.text.flush()
        claimed = claim_of(self.path)
        if isinstance(claimed, RemoteClaim):
            self._content.seek(0)
            claimed.record(self.path, hashlib.file_digest(self._content, "sha256").hexdigest())  # type: ignore[arg-type]
        self._content.seek(0)
        self.path.write_file(self._content)  # type: ignore[arg-type]
        self.discard()

    def discard(self) -> None:
        """Remove the temporary file."""
        self.text.close()


def pending_text(path: OutputPath) -> PendingFile | PendingUpload:
    """Return a file whose `text` is a UTF-8 text stream, and which `commit` puts into place as a whole.

    Args:
        path: File to write, on this machine or at an address.

    Raises:
        ConfigError: If it must not be replaced.
    """
    return PendingUpload(path) if isinstance(path, RemotePath) else PendingFile(path)


@contextmanager
def atomic_text(path: OutputPath) -> Iterator[IO[str]]:
    """Yield a UTF-8 text stream; put the file into place at the end, or drop it on an error.

    Args:
        path: File to write, on this machine or at an address.

    Raises:
        ConfigError: If it must not be replaced.
    """
    pending = pending_text(path)
    try:
        yield pending.text
        pending.commit()
    finally:
        pending.discard()


@contextmanager
def growing_text(path: OutputPath) -> Iterator[IO[str]]:
    """Open a UTF-8 text file that other programs read while it is written; an earlier file is replaced.

    A file at an address does not grow: it appears at the end, also after an error.

    Args:
        path: File to write. Its folder is created.

    Raises:
        ConfigError: If it is in a claimed output folder and must not be replaced.
    """
    if isinstance(path, RemotePath):
        upload = PendingUpload(path)
        try:
            yield upload.text
        finally:
            upload.commit()
        return
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _record(path, None)
    path.unlink(missing_ok=True)  # it may be a link
    try:
        with path.open("x", encoding="utf-8") as file:
            yield file
    finally:
        _record(path, path)


def is_claimed(path: OutputPath) -> bool:
    """Return whether a path is in the output of a run that is going on, which lists what it writes."""
    return claim_of(absolute(path)) is not None


def keep_output(path: Path) -> None:
    """Keep a file of an earlier run that this run would write with the same content.

    Args:
        path: The file; nothing happens if no run wrote it.
    """
    place = Path(os.path.abspath(path))
    if isinstance(claimed := claim_of(place), ClaimedFolder):
        claimed.keep(place)


def _record(path: Path, content: Path | None, is_copy: bool = False) -> None:
    """List a file in the claimed folder that it is in, if any."""
    place = Path(os.path.abspath(path))
    if isinstance(claimed := claim_of(place), ClaimedFolder):
        claimed.record(place, content, is_copy)


#: Suffixes of the files that are written for an image whose path has none.
_WRITTEN = (".png", ".jpg", ".bmp", ".txt", ".json", ".xml")
#: Control characters, line ends, and code points that no text file can have.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff"
#: What a file name cannot have on some file system.
_FORBIDDEN = r'[<>:"/\\|?*]|[. ]+$|^(?:con|prn|aux|nul|com\d|lpt\d)(?=\.|$)'
#: Longest part of a path, in bytes, with room for a number and a suffix.
_MAX_BYTES = 200


class UniqueNames:
    """Make relative output paths from names, safe on every file system and never the same for two names.

    See `safe_filename` for what a file name may be, and how the rest is encoded. Where two names would get one path, or
    a file that of a folder, the later one gets a number.

    Args:
        reserved: Names that no folder may have, which are encoded too.
        known: Name by path, of an earlier run; a name keeps its path.

    Attributes:
        names: Name by path.

    >>> names = UniqueNames()
    >>> [str(names(name, ".png")) for name in ("a/b.png", "a/b.png", "../c.jpg")]
    ['a/b.png', 'a/b-2.png', '%2E%2E/c.jpg.png']
    """

    def __init__(self, reserved: Collection[str] = (), known: Mapping[str, str] | None = None) -> None:
        self.reserved, self.names = reserved, dict(known or {})
        self._known = {name: path for path, name in self.names.items()}
        self._files = {path.casefold() for path in self.names}
        self._folders = {folder for path in self._files for folder in _folders(path)}

    def __call__(self, name: str, suffix: str, owner: str | None = None) -> Path:
        """Return the path for a name.

        Args:
            name: Name with `/` between folders; it cannot lead out of the output folder.
            suffix: Suffix of the path, such as `.png`, appended unless the name ends with it; empty for none.
            owner: Name that the path is recorded for, if another.
        """
        owner = owner or name
        if (known := self._known.pop(owner, None)) is not None:
            return Path(known)
        *parents, last = [part for part in name.split("/") if part not in ("", ".")] or ["image"]
        folder = ""
        for part in parents:
            safe = percent_encode(part, f"^{part[:1]}") if part in self.reserved else safe_filename(part)
            folder = f"{self._free(folder + safe, '', '', lambda path: self._is_file(path, suffix))}/"
        safe = safe_filename(last)
        stem = safe[: -len(suffix)] if suffix and safe.lower().endswith(suffix) else safe
        ending = safe[len(stem) :] or suffix
        path = self._free(folder + stem, ending, suffix, lambda path: self._is_taken(path, suffix))
        self._files.add(path.casefold())
        self._folders.update(_folders(path.casefold()))
        self.names[path] = owner
        return Path(path)

    def _free(self, stem: str, ending: str, suffix: str, taken: Callable[[str], bool]) -> str:
        """Return a path that is not taken: `stem` and `ending`, or with a number `stem`, the number and `suffix`."""
        path, count = stem + ending, 1
        while taken(path.casefold()):  # some file systems ignore case
            count += 1
            path = f"{stem}-{count}{suffix}"
        return path

    def _is_file(self, folder: str, suffix: str) -> bool:
        """Return whether a file has the path of a folder; files of paths without suffix get one of `_WRITTEN`."""
        if suffix:
            return folder in self._files
        stem, ending = os.path.splitext(folder)
        return ending in _WRITTEN and stem in self._files

    def _is_taken(self, path: str, suffix: str) -> bool:
        """Return whether a file or folder has the path of a file."""
        files = [path] if suffix else [path + ending for ending in _WRITTEN]
        return path in self._files or not self._folders.isdisjoint(files)


def _folders(path: str) -> list[str]:
    """Return the folders that a relative path is in."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def percent_encode(text: str, pattern: str) -> str:
    """Encode the characters that match a pattern as in a URL; `urllib.parse.unquote` decodes them.

    A `%` is encoded where it would be taken for a code. Only lone surrogates, which are no text, cannot be decoded.

    >>> percent_encode("50% of a/b", "/"), percent_encode("a%2Fb", "/")
    ('50% of a%2Fb', 'a%252Fb')
    """

    def encode(match: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))

    return re.sub(f"{pattern}|%(?=[0-9A-Fa-f]{{2}})", encode, text, flags=re.IGNORECASE)


def encode_controls(text: str) -> str:
    r"""Percent-encode control characters and line ends, which XML and lists of lines cannot have.

    >>> encode_controls("a\nb")
    'a%0Ab'
    """
    return percent_encode(text, f"[{_CONTROLS}]")


def encode_lines(texts: Iterable[str]) -> str:
    r"""Return a text with one line per entry, without control characters in the entries.

    >>> encode_lines(["a", "b\nc"])
    'a\nb%0Ac\n'
    """
    return "".join(f"{encode_controls(text)}\n" for text in texts)


def safe_filename(name: str) -> str:
    """Return a file name that is valid on every file system: see `percent_encode`; all scripts are kept.

    Of a name of more than 200 bytes, the middle is replaced by a part of its SHA-256.

    >>> safe_filename("who?.png")
    'who%3F.png'
    """
    safe = percent_encode(name, f"{_FORBIDDEN}|[{_CONTROLS}]") or "_"
    data = safe.encode()
    if len(data) <= _MAX_BYTES:  # file systems count bytes
        return safe
    ending = os.path.splitext(safe)[1]
    ending = ending if len(ending.encode()) <= 16 else ""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{data[: _MAX_BYTES - 40].decode('utf-8', 'ignore')}~{digest}{ending}"
