"""Atomic writes, output names that are unique, safe and inside their folder, and a check of files that are read."""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path


def home_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder for `~` and `~user` at its beginning; other names stay as they are.

    Args:
        path: The path, as a user may write it.

    >>> home_path("~nobody by this name/a.png").as_posix()
    '~nobody by this name/a.png'
    """
    return Path(os.path.expanduser(path))


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


class PendingFile:
    """A file written under a temporary name during a run, and renamed when it is complete.

    Args:
        path: File to write. Its folder is created.
        shared: Whether other processes may write the same file at the same time; the last one wins.

    Attributes:
        path: The file.
        part: Temporary path beside it, to write to.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part" if shared else f".{path.name}.part")
        self.discard()  # left by a process that was killed; it may be a link
        self._text: TextIOWrapper | None = None

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
        os.replace(self.part, self.path)

    def discard(self) -> None:
        """Remove the temporary file, if there is one."""
        self.part.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; rename it at the end, or remove it on an error.

    Args:
        path: File to write. Its folder is created.
        shared: Whether other processes may write the same file at the same time; the last one wins.
    """
    pending = PendingFile(path, shared=shared)
    try:
        yield pending.part
        pending.commit()
    finally:
        pending.discard()


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically: readers see the old content or the new.

    Args:
        path: File to write. Its folder is created.
        text: Its content.
    """
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


class UniqueNames:
    """Make relative output paths from names, safe on every file system and never the same twice.

    >>> names = UniqueNames()
    >>> [str(names(name, ".png")) for name in ("a/b.png", "a/b.png", "../c.jpg")]
    ['a/b.png', 'a/b-2.png', 'c.jpg.png']
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __call__(self, name: str, suffix: str) -> Path:
        """Return the path for a name.

        Args:
            name: Name with `/` between folders; it cannot lead out of the output folder.
            suffix: Suffix of the path, such as `.png`, appended unless the name ends with it; empty for none.
        """
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        safe = "/".join(safe_filename(part) for part in parts) or "image"
        path = safe if suffix and safe.lower().endswith(suffix) else safe + suffix
        stem, ending = (path[: -len(suffix)], suffix) if suffix else (path, "")
        count = 1
        while path.casefold() in self._taken:  # some file systems ignore case
            count += 1
            path = f"{stem}-{count}{ending}"
        self._taken.add(path.casefold())
        return Path(path)


def safe_filename(name: str) -> str:
    """Return a file name that is valid on every file system: forbidden characters become `_`, all scripts are kept.

    >>> safe_filename("who?.png")
    'who_.png'
    """
    safe = re.sub(r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]', "_", name).rstrip(". ")
    return safe.encode()[:200].decode("utf-8", "ignore") or "_"  # file systems count bytes
