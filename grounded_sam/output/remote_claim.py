"""Claim an output at an address, such as `s3://bucket/labels`: the rules are those of `output.claim`.

The lock is an object that is created only if there is none, with the process that holds it. The list of files is
written anew with each file that may be replaced later. Parts of a store are not listed: their names are unique, and
nothing replaces or removes them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from grounded_sam.errors import ConfigError
from grounded_sam.output.paths import STATE, RemotePath


class RemoteLock:
    """A lock at an address, held from its making to `release`.

    A lock of a process of this machine that has ended is taken over.

    Args:
        path: Address of the lock.
        purpose: What the holder does, for the message, such as `another run is writing to s3://bucket/labels`.
        timeout_s: Seconds to wait while another process holds it.

    Raises:
        ConfigError: If another process holds it.
        RemoteError: If the server cannot be reached, or refuses.
    """

    def __init__(self, path: RemotePath, purpose: str, timeout_s: float = 0.0) -> None:
        self.path, self._id = path, uuid.uuid4().hex
        content = {"id": self._id, "host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        self._content = json.dumps(content).encode()
        deadline = time.monotonic() + timeout_s
        while not (self._create(path) or self._take_over()):
            if time.monotonic() >= deadline:
                raise self._refusal(purpose)
            time.sleep(0.2)

    def __enter__(self) -> RemoteLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _refusal(self, purpose: str) -> ConfigError:
        """Return the error that names the holder."""
        holder = _read_holder(self.path)
        known = {key: str(holder.get(key, "unknown"))[:200] for key in ("pid", "host", "since")}
        return ConfigError(
            f"{purpose} (process {known['pid']} on {known['host']}, since {known['since']}); wait for its end, or, if "
            f"it no longer runs, delete {self.path}"
        )

    def _create(self, path: RemotePath) -> bool:
        """Write the lock, unless there is one; return whether this process did."""
        try:
            path.write_bytes(self._content, create=True)
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> bool:
        """Replace the lock of a process that has ended; return whether this process did.

        Of several processes, one may replace a certain lock: the one that creates the object with its id.
        """
        holder = _read_holder(self.path)
        if not _has_ended(holder):
            return False
        right = self.path.with_name(f"{self.path.name}-ended-{holder['id']}")
        if not self._create(right):
            return False
        try:
            if _read_holder(self.path).get("id") == holder["id"]:
                self.path.unlink(missing_ok=True)
            return self._create(self.path)
        finally:
            right.unlink(missing_ok=True)

    def release(self) -> None:
        """Delete the lock, if it is still the one of this process."""
        with suppress(OSError):
            if _read_holder(self.path).get("id") == self._id:
                self.path.unlink(missing_ok=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read_holder(path: RemotePath) -> dict[str, Any]:
    """Read who holds a lock; empty if nobody does, or it is damaged."""
    with suppress(OSError, ValueError):
        holder = json.loads(path.read_bytes())
        return holder if isinstance(holder, dict) else {}
    return {}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Return whether the process that holds a lock is one of this machine that no longer runs."""
    host, pid, lock_id = holder.get("host"), holder.get("pid"), holder.get("id")
    if host != socket.gethostname() or not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return False
    if not isinstance(lock_id, str) or not lock_id.isalnum() or os.name == "nt":  # where a signal would end the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


class RemoteClaim:
    """An output at an address while a run writes into it; made by `output.claim.claim`.

    Args:
        folder: Its address.

    Attributes:
        folder: As above.

    Raises:
        ConfigError: If another run is writing into it, or it cannot be written to.
    """

    def __init__(self, folder: RemotePath) -> None:
        self.folder, self.thread, self.depth = folder, threading.get_ident(), 0
        self._listing = folder / STATE / "files.jsonl"
        try:
            self._lock = RemoteLock(folder / STATE / "lock", f"another run is writing to {folder}")
            self._earlier = self._read_listing()
        except OSError as error:
            raise ConfigError(f"cannot write into {folder}: {error}; choose another output") from error
        self._written: dict[str, str] = {}
        self._record_lock = threading.Lock()

    def _read_listing(self) -> dict[str, set[str]]:
        """Read the digests of the files that runs wrote, by their path in the folder; empty if there is no list."""
        listed: dict[str, set[str]] = {}
        try:
            lines = self._listing.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return listed
        for line in lines:
            with suppress(ValueError, TypeError):
                name, digest = json.loads(line)
                if isinstance(name, str) and isinstance(digest, str) and ".." not in PurePosixPath(name).parts:
                    listed.setdefault(name, set()).add(digest)
        return listed

    def check(self, path: RemotePath) -> None:
        """Check that a file may be written.

        Args:
            path: Address in the folder.

        Raises:
            ConfigError: If it exists and was not written by a run, or was changed since.
        """
        name = self._name(path)
        if name in self._written or not path.is_file():
            return
        way_out = "so it is not overwritten; move it away, or choose another output"
        if name not in self._earlier:
            raise ConfigError(f"{path} exists and was not written by an earlier run, {way_out}")
        if not self._is_unchanged(path, name):
            raise ConfigError(f"{path} was changed after the run that wrote it, {way_out}")

    def record(self, path: RemotePath, digest: str) -> None:
        """List a file that is about to be written.

        Args:
            path: Address in the folder.
            digest: SHA-256 of its content.
        """
        with self._record_lock:
            self._written[self._name(path)] = digest
            self._write_listing({name: digests | {self._written.get(name, "")} for name, digests in self._listed()})

    def _listed(self) -> list[tuple[str, set[str]]]:
        names = dict.fromkeys([*self._earlier, *self._written])
        return [(name, self._earlier.get(name, set())) for name in names]

    def _write_listing(self, listed: dict[str, set[str]]) -> None:
        lines = [json.dumps([name, digest]) for name, digests in listed.items() for digest in sorted(digests) if digest]
        self._listing.write_bytes("".join(f"{line}\n" for line in lines).encode("ascii"))

    def remove_stale(self, folder: RemotePath) -> tuple[list[RemotePath], list[RemotePath]]:
        """Remove the files below a folder that earlier runs wrote and this run did not write again.

        Args:
            folder: Address in the claimed folder.

        Returns:
            The files that were removed, and those that were kept, since they were changed.
        """
        removed, kept = [], []
        for name in [name for name in self._earlier if name not in self._written]:
            path = self.folder / name
            if not path.is_relative_to(folder):
                continue
            with suppress(OSError):
                if not self._is_unchanged(path, name):
                    kept.append(path)
                    continue
                path.unlink()
                removed.append(path)
                del self._earlier[name]
        return removed, kept

    def release(self) -> None:
        """Shorten the list to what is there now, and release the lock."""
        try:
            with suppress(OSError):
                if self._written:
                    self._write_listing(
                        {name: {self._written[name]} if name in self._written else old for name, old in self._listed()}
                    )
        finally:
            self._lock.release()

    def check_folder(self, folder: RemotePath) -> None:
        """Do nothing: there are no links at an address."""

    def _name(self, path: RemotePath) -> str:
        return path.relative_to(self.folder).as_posix()

    def _is_unchanged(self, path: RemotePath, name: str) -> bool:
        return hashlib.sha256(path.read_bytes()).hexdigest() in self._earlier[name]
