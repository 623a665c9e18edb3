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
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from grounded_sam.errors import ConfigError
from grounded_sam.output.paths import STATE, RemotePath

#: Seconds from one sign of life of a lock to the next, and without one until it is taken for that of an ended process.
BEAT_S, STALE_S = 10.0, 60.0


class RemoteLock:
    """A lock at an address, held from its making to `release`.

    While it is held, a thread writes it anew every `BEAT_S` seconds. A lock of a process of this machine that has ended
    is taken over, and so is any that stays the same for `STALE_S` seconds, such as that of a machine that is gone.

    Args:
        path: Address of the lock.
        purpose: What the holder does, for the message, such as `another run is writing to s3://bucket/labels`.
        timeout_s: Seconds to wait while another process holds it.

    Raises:
        ConfigError: If another process holds it.
        RemoteError: If the server cannot be reached, or refuses.

    Attributes:
        is_lost: Whether another process has taken the lock over, since this one was stopped for too long.
    """

    def __init__(self, path: RemotePath, purpose: str, timeout_s: float = 0.0) -> None:
        self.path, self.is_lost = path, False
        self._holder = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        self._beats, self._released = 0, threading.Event()
        self._acquire(purpose, time.monotonic() + timeout_s)
        self._thread = threading.Thread(target=self._beat, name="remote lock", daemon=True)
        self._thread.start()

    def _content(self) -> bytes:
        return json.dumps({**self._holder, "beats": self._beats}).encode()

    def _acquire(self, purpose: str, deadline: float) -> None:
        """Create the lock, or take it over.

        Args:
            purpose: As of the class.
            deadline: When to give up, as long as the holder lives.
        """
        seen, since, is_alive = b"", time.monotonic(), False
        while not self._create(self.path):
            content, now = _read(self.path), time.monotonic()
            if content is None:  # released just now
                continue
            holder = _parse(content)
            is_alive = _is_running(holder) or (
                _parse(seen).get("id") == holder.get("id") and (is_alive or content != seen)
            )
            if content != seen:
                if not seen and not is_alive and not _has_ended(holder):
                    print(f"Waiting up to {STALE_S:.0f} s: {purpose}, or was stopped", file=sys.stderr)
                seen, since = content, now
            if (_has_ended(holder) or now - since >= STALE_S) and self._take_over(content):
                return
            if is_alive and now >= deadline:
                raise self._refusal(purpose, holder)
            time.sleep(0.2)

    def _create(self, path: RemotePath) -> bool:
        """Write the lock, unless there is one; return whether this process did."""
        try:
            path.write_bytes(self._content(), create=True)
        except FileExistsError:
            return False
        return True

    def _take_over(self, content: bytes) -> bool:
        """Replace the lock of a process that has ended; return whether this process did.

        Of several processes, one may replace a lock with a certain content: the one that creates the object with its
        digest.
        """
        right = self.path.with_name(f"{self.path.name}-ended-{hashlib.sha256(content).hexdigest()[:16]}")
        if not self._create(right):
            return False
        try:
            if _read(self.path) == content:
                self.path.unlink(missing_ok=True)
            return self._create(self.path)
        finally:
            right.unlink(missing_ok=True)

    def _refusal(self, purpose: str, holder: dict[str, Any]) -> ConfigError:
        """Return the error that names the holder."""
        known = {key: str(holder.get(key, "unknown"))[:200] for key in ("pid", "host", "since")}
        return ConfigError(
            f"{purpose} (process {known['pid']} on {known['host']}, since {known['since']}); wait for its end, or, if "
            f"it no longer runs, delete {self.path}"
        )

    def _is_held(self) -> bool:
        content = _read(self.path)
        return content is not None and _parse(content).get("id") == self._holder["id"]

    def _beat(self) -> None:
        """Write the lock anew until it is released."""
        while not self._released.wait(BEAT_S):
            with suppress(OSError):  # the next attempt may work
                self.is_lost = not self._is_held()
                if self.is_lost:
                    return
                self._beats += 1
                self.path.write_bytes(self._content())

    def __enter__(self) -> RemoteLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Delete the lock, if it is still the one of this process."""
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_held():
                self.path.unlink(missing_ok=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read(path: RemotePath) -> bytes | None:
    """Read a lock; None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> dict[str, Any]:
    """Return who holds a lock; empty if it is damaged."""
    with suppress(ValueError, RecursionError):
        holder = json.loads(content)
        return holder if isinstance(holder, dict) else {}
    return {}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Return whether the process that holds a lock is one of this machine that no longer runs."""
    return _is_of_this_machine(holder) and not _runs(holder["pid"])


def _is_running(holder: dict[str, Any]) -> bool:
    """Return whether the process that holds a lock is another one of this machine that runs."""
    return _is_of_this_machine(holder) and holder["pid"] != os.getpid() and _runs(holder["pid"])


def _is_of_this_machine(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    is_id = isinstance(pid, int) and not isinstance(pid, bool) and 0 < pid < 2**31
    return is_id and os.name != "nt" and holder.get("host") == socket.gethostname()  # there, a signal ends the process


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


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
            lines = self._listing.read_text(encoding="utf-8", errors="replace").splitlines()
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

        Raises:
            ConfigError: If another run has taken the output over.
        """
        if self._lock.is_lost:
            raise ConfigError(
                f"another run has taken over {self.folder}, since this one was stopped for more than {STALE_S:.0f} s; "
                "what was stored is intact, and running the same command again continues from there"
            )
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
