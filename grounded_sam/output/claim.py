"""Claim an output folder for a run: one run at a time, and no file is lost that an earlier run did not write.

A claimed folder has a folder `.grounded_sam` with a lock and with `files.jsonl`, a line for each file that runs wrote
into it. What is not listed there, or was changed since, is neither overwritten nor removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from grounded_sam.errors import ConfigError
from grounded_sam.output.paths import STATE, OutputPath, RemotePath
from grounded_sam.output.remote_claim import RemoteClaim

#: Digest of a file that is still being written.
GROWING = "*"
#: What the digest of a file begins with that later runs do not remove: a copy of an image may be the only one left.
COPY = "copy "
#: What runs of this process have claimed.
_claimed: dict[OutputPath, Claim] = {}


class ClaimedFolder:
    """An output folder while a run writes into it; made by `claim`.

    Args:
        folder: The folder, which is created.

    Attributes:
        folder: Its absolute path.

    Raises:
        ConfigError: If it cannot be created, another run is writing into it, it holds the results of another program,
            or `.grounded_sam` is a link.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.thread, self.depth = folder, threading.get_ident(), 0
        state = folder / STATE
        _check_state(folder)
        try:
            state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write into {folder}: {error.strerror}; choose another output") from error
        self._file_lock = FileLock(state / "lock", timeout=0)
        try:
            self._file_lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"another run is writing to {folder}; wait for its end, or choose another output"
            ) from error
        self._listing = state / "files.jsonl"
        self._earlier = read_listing(folder)
        self._written: dict[str, str] = {}
        self._real_folders: set[Path] = {folder}  # that are known to be no links
        self._record_lock = threading.Lock()

    def check(self, path: Path) -> None:
        """Check that a file may be written.

        Args:
            path: Absolute path in the folder.

        Raises:
            ConfigError: If a folder on the way is a link, or the file exists and was not written by a run, or was
                changed since.
        """
        self.check_folder(path.parent)
        if not os.path.lexists(path):
            return
        name = self._name(path)
        if name in self._written:
            return
        way_out = "so it is not overwritten; move it away, or choose another output"
        if name not in self._earlier:
            raise ConfigError(f"{path} exists and was not written by an earlier run, {way_out}")
        if not self._is_unchanged(path, name):
            raise ConfigError(f"{path} was changed after the run that wrote it, {way_out}")

    def record(self, path: Path, content: Path | None, is_copy: bool = False) -> None:
        """List a file that is about to be put into place.

        Args:
            path: Absolute path in the folder.
            content: File with its content; None for a file that grows in place.
            is_copy: Whether it is the copy of an input, which later runs may replace, but do not remove.
        """
        name = self._name(path)
        digest = GROWING if content is None else content_state(content)
        if is_copy and content is not None and not content.is_symlink():
            digest = COPY + digest
        with self._record_lock, self._listing.open("a", encoding="ascii") as file:
            file.write(json.dumps([name, digest]) + "\n")
            self._written[name] = digest

    def keep(self, path: Path) -> None:
        """Count a file of an earlier run as written by this run too, since its content is the same.

        Args:
            path: Absolute path in the folder; nothing happens if no run wrote the file.
        """
        name = self._name(path)
        if name in self._earlier and self._is_unchanged(path, name):
            state = content_state(path)
            self._written[name] = COPY + state if COPY + state in self._earlier[name] else state

    def remove_stale(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Remove the files below a folder that earlier runs wrote and this run did not write again.

        Args:
            folder: Absolute path in the claimed folder.

        Returns:
            The files that were removed, and those that were kept: those that were changed since, and copies of inputs.
        """
        removed, kept = [], []
        for name in [name for name in self._earlier if name not in self._written]:
            path = self.folder / name
            if not path.is_relative_to(folder):
                continue
            with suppress(ConfigError, OSError):
                self.check_folder(path.parent)
                if not self._is_unchanged(path, name) or any(state.startswith(COPY) for state in self._earlier[name]):
                    kept.append(path)
                    continue
                path.unlink()
                removed.append(path)
                del self._earlier[name]
                _remove_empty(path.parent, folder)
        return removed, kept

    def release(self) -> None:
        """Shorten the list to one line per file, and release the lock."""
        listed = {**self._earlier, **{name: {digest} for name, digest in self._written.items()}}
        lines = [json.dumps([name, digest]) for name, digests in listed.items() for digest in sorted(digests)]
        with suppress(OSError):  # such as a full disk; the longer list says the same
            part = self._listing.with_suffix(".part")
            part.unlink(missing_ok=True)
            part.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
            os.replace(part, self._listing)
        self._file_lock.release()

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _is_unchanged(self, path: Path, name: str) -> bool:
        states = {state.removeprefix(COPY) for state in self._earlier[name]}
        return content_state(path) in states or (GROWING in states and not path.is_symlink())

    def check_folder(self, folder: Path) -> None:
        """Check that no folder from the claimed one down to a folder is a link.

        Args:
            folder: Absolute path; one outside of the claimed folder is not checked.

        Raises:
            ConfigError: If one is.
        """
        if folder in self._real_folders or not folder.is_relative_to(self.folder):
            return
        self.check_folder(folder.parent)
        if folder.is_symlink():
            raise ConfigError(
                f"{folder} is a link to {os.readlink(folder)}, and nothing is written through links inside an output; "
                "remove the link, or choose another output"
            )
        self._real_folders.add(folder)


#: A claim on a folder of this machine, or on an address.
Claim = ClaimedFolder | RemoteClaim


def absolute(path: OutputPath) -> OutputPath:
    """Return the absolute path of a file or folder; addresses are absolute."""
    return path if isinstance(path, RemotePath) else Path(os.path.abspath(path))


@contextmanager
def claim(folder: OutputPath) -> Iterator[Claim]:
    """Claim an output folder for this thread; within it, claiming the same folder again gives the same claim.

    Args:
        folder: The folder, which is created.

    Raises:
        ConfigError: As `ClaimedFolder` and `RemoteClaim`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, claim(Path(folder)) as claimed:
    ...     claimed.check(claimed.folder / "new.json")
    """
    claimed = acquire(folder)
    try:
        yield claimed
    finally:
        release(claimed)


def acquire(folder: OutputPath) -> Claim:
    """Claim an output folder until `release`; see `claim`."""
    path = absolute(folder)
    claimed = _claimed.get(path)
    if claimed is None:
        claimed = RemoteClaim(path) if isinstance(path, RemotePath) else ClaimedFolder(path)
        _claimed[path] = claimed
    elif claimed.thread != threading.get_ident():
        raise ConfigError(f"another run is writing to {path}; wait for its end, or choose another output")
    claimed.depth += 1
    return claimed


def acquired(folder: OutputPath) -> Claim:
    """Return the claim on a folder that was claimed.

    Raises:
        KeyError: If it was not.
    """
    return _claimed[absolute(folder)]


def release(claimed: Claim) -> None:
    """Give up a claim, when as many releases as claims were made."""
    claimed.depth -= 1
    if not claimed.depth:
        try:
            claimed.release()
        finally:
            del _claimed[claimed.folder]


def claim_of(path: OutputPath) -> Claim | None:
    """Return the claim on the innermost folder above an absolute path; None for a file that no claim guards."""
    if not _claimed:
        return None
    for folder in path.parents:
        if folder.name == STATE:
            return None
        if folder in _claimed:
            return _claimed[folder]
    return None


def check_output(path: OutputPath) -> None:
    """Check early that a file may be written, which a run writes at its end.

    Raises:
        ConfigError: If it is in a claimed folder and was not written by an earlier run.
    """
    path = absolute(path)
    if (claimed := claim_of(path)) is not None:
        claimed.check(path)  # type: ignore[arg-type]  # the path in a claim is of its kind


def content_state(path: Path) -> str:
    """Return the SHA-256 of a file, or the target of a link."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_listing(folder: Path) -> dict[str, set[str]]:
    """Read the states of the files that runs wrote into a folder, by path in it; empty if there is no list."""
    with suppress(OSError), (folder / STATE / "files.jsonl").open(encoding="ascii", errors="replace") as lines:
        return parse_listing(lines)
    return {}


def parse_listing(lines: Iterable[str]) -> dict[str, set[str]]:
    """Return the states of files by path, from the lines of `files.jsonl`."""
    listed: dict[str, set[str]] = {}
    for line in lines:
        with suppress(ValueError, TypeError):  # the last line of a run that was killed may be cut
            name, state = json.loads(line)
            if isinstance(name, str) and isinstance(state, str) and _is_inside(name):
                listed.setdefault(name, set()).add(state)
    return listed


def _is_inside(name: str) -> bool:
    """Return whether a path stays in the folder that it is relative to."""
    return not os.path.isabs(name) and ".." not in PurePosixPath(name.replace("\\", "/")).parts


def _check_state(folder: Path) -> None:
    """Check that the state of a folder is its own, and that no other program keeps its results there.

    Raises:
        ConfigError: If not.
    """
    for path in (folder / STATE, folder / STATE / "lock", folder / STATE / "files.jsonl"):
        if path.is_symlink():
            raise ConfigError(f"{path} is a link to {os.readlink(path)}; remove it, or choose another output")
    if (folder / ".hydra").is_symlink() or ((folder / ".hydra").exists() and not (folder / STATE).is_dir()):
        raise ConfigError(
            f"{folder} has a folder .hydra that this program did not write, or an earlier version of it; choose "
            "another output (to resume from a store, move the folder store/ there)"
        )


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove a folder and those above it up to `top`, as far as they are empty."""
    with suppress(OSError):
        while folder != top:
            folder.rmdir()
            folder = folder.parent
