"""Images and videos that clients have sent, in a temporary folder of limited size."""

from __future__ import annotations

import hashlib
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from grounded_sam.files import safe_filename
from grounded_sam.serve.problems import RequestError

#: Bytes that are copied at a time.
CHUNK = 1 << 20
#: Longest name of a file, in characters.
MAX_NAME = 200
#: What an upload is.
UploadKind = Literal["image", "video"]


@dataclass(eq=False)
class Upload:
    """A file that a client has sent or named.

    Attributes:
        id: The first 32 digits of the SHA-256 of its content and kind.
        kind: `image` or `video`.
        name: Its name, without folders.
        path: Where it is.
        num_bytes: Its size in the temporary folder.
        width: Pixels.
        height: Pixels.
        notes: Sentences about what it holds and is not read.
        num_frames: Largest number of frames of a video; None if unknown, and for an image.
        users: How many requests and tracks are using it.
    """

    id: str
    kind: UploadKind
    name: str
    path: Path
    num_bytes: int
    width: int = 0
    height: int = 0
    notes: list[str] = field(default_factory=list)
    num_frames: int | None = None
    users: int = 0


class Uploads:
    """The uploads, each by its id; those used least recently are deleted when there are too many.

    The same content has the same id and is kept once. An upload that is in use is not deleted.

    Args:
        folder: Folder to keep them in, which nobody else writes to.
        max_bytes: Largest size of all of them.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def num_bytes(self) -> int:
        """Size of all uploads."""
        with self._lock:
            return sum(upload.num_bytes for upload in self._uploads.values())

    def __len__(self) -> int:
        return len(self._uploads)

    def add(self, content: IO[bytes], name: str, kind: UploadKind, check: Callable[[Upload], None]) -> Upload:
        """Copy a file into the folder.

        Args:
            content: Its bytes.
            name: Its name; folders in it are ignored.
            kind: `image` or `video`.
            check: Fills in the size of the upload, or raises if it cannot be used; then nothing is kept.

        Raises:
            RequestError: If it is larger than the folder may be.
        """
        name = clean_name(name, kind)
        part = self.folder / f"part-{uuid.uuid4().hex}"
        part.mkdir()
        try:
            path = part / safe_filename(name)
            digest, size = self._copy(content, path, kind)
            if (known := self._known(digest)) is not None:
                return known
            upload = Upload(digest, kind, name, path, size)
            check(upload)
            return self._keep(upload, part)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _copy(self, content: IO[bytes], path: Path, kind: UploadKind) -> tuple[str, int]:
        """Copy bytes to a file, and return their id and number."""
        digest, size = hashlib.sha256(kind.encode()), 0
        with path.open("xb") as file:
            while chunk := content.read(CHUNK):
                size += len(chunk)
                if size > self.max_bytes:
                    raise RequestError(413, f"the file has more than the {self.max_bytes:,} bytes of serve.upload_gb")
                digest.update(chunk)
                file.write(chunk)
        return digest.hexdigest()[:32], size

    def _known(self, upload_id: str) -> Upload | None:
        with self._lock:
            if upload_id in self._uploads:
                self._uploads.move_to_end(upload_id)
            return self._uploads.get(upload_id)

    def _keep(self, upload: Upload, part: Path) -> Upload:
        """Move a checked file to its place, and delete others until all fit."""
        with self._lock:
            if upload.id in self._uploads:  # sent twice at the same time
                return self._uploads[upload.id]
            self._make_room(upload.num_bytes)
            place = self.folder / upload.id
            part.rename(place)
            upload.path = place / upload.path.name
            self._uploads[upload.id] = upload
            return upload

    def _make_room(self, num_bytes: int) -> None:
        """Delete uploads that nobody uses, oldest first, until so many bytes fit."""
        total = num_bytes + sum(upload.num_bytes for upload in self._uploads.values())
        for upload in [upload for upload in self._uploads.values() if not upload.users]:
            if total <= self.max_bytes:
                return
            del self._uploads[upload.id]
            shutil.rmtree(upload.path.parent, ignore_errors=True)
            total -= upload.num_bytes
        if total > self.max_bytes:
            raise RequestError(
                503, "no room for the file: all others are in use; try again later", {"Retry-After": "5"}
            )

    def get(self, upload_id: str, kind: UploadKind) -> Upload:
        """Return an upload.

        Args:
            upload_id: Its id.
            kind: `image` or `video`.

        Raises:
            RequestError: If there is none (404).
        """
        upload = self._known(upload_id)
        if upload is None or upload.kind != kind:
            raise RequestError(
                404, f"no {kind} {upload_id[:40]!r}: it was never sent, or made room for newer ones; send it again"
            )
        return upload

    @contextmanager
    def use(self, upload_id: str, kind: UploadKind) -> Iterator[Upload]:
        """Keep an upload while a block of code uses it.

        Raises:
            RequestError: If there is none (404).
        """
        upload = self.hold(upload_id, kind)
        try:
            yield upload
        finally:
            self.release(upload)

    def hold(self, upload_id: str, kind: UploadKind) -> Upload:
        """Keep an upload until `release` is called.

        Raises:
            RequestError: If there is none (404).
        """
        with self._lock:
            upload = self._uploads.get(upload_id)
            if upload is not None and upload.kind == kind:
                upload.users += 1
                self._uploads.move_to_end(upload_id)
                return upload
        return self.get(upload_id, kind)  # raises

    def release(self, upload: Upload) -> None:
        """Give up an upload that was held."""
        with self._lock:
            upload.users -= 1


def clean_name(name: str, kind: UploadKind) -> str:
    """Return the name of a file without folders and control characters.

    Args:
        name: The name that a client gives.
        kind: Name where there is none.

    >>> clean_name("../C:\\\\a\\n.png", "image"), clean_name("..", "image")
    ('a.png', 'image')
    """
    last = "".join(c for c in name.replace("\\", "/").rsplit("/", 1)[-1] if c.isprintable()).strip()
    return kind if last in ("", ".", "..") else last[-MAX_NAME:]
