"""The stores of a server, and the pixels of their images."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

from grounded_sam.errors import ConfigError
from grounded_sam.files import home_path
from grounded_sam.formats.store import find_store
from grounded_sam.remote import Location
from grounded_sam.serve.memory import ByteLimited
from grounded_sam.serve.objects import jpeg
from grounded_sam.serve.open_store import OpenStore
from grounded_sam.serve.problems import RequestError, public_message
from grounded_sam.serve.roots import Roots
from grounded_sam.serve.uploads import Upload, Uploads
from grounded_sam.structures.frame import Frame

#: Memory of thumbnails, in bytes.
THUMBNAIL_BYTES = 64 << 20


class Stores:
    """The stores of a server by name; each is opened when it is first asked for.

    Args:
        folders: Their folders by name.
        roots: What the server may read; images elsewhere are not shown.
        max_pixels: Larger images are not read.

    Raises:
        ConfigError: If a folder is not in one of the roots.
    """

    def __init__(self, folders: Mapping[str, str], roots: Roots, max_pixels: int) -> None:
        self.folders = named_folders("stores", folders, roots)
        self._roots, self._max_pixels = roots, max_pixels
        self._open: dict[str, OpenStore] = {}
        self._lock = threading.Lock()
        self._thumbnails: ByteLimited[bytes] = ByteLimited(THUMBNAIL_BYTES, len)

    def get(self, name: str) -> OpenStore:
        """Return a store as it is now.

        Raises:
            RequestError: If the server has no such store (404).
            ConfigError: If it is damaged.
        """
        if name not in self.folders:
            known = ", ".join(self.folders) or "none; see serve.stores"
            raise RequestError(404, f"no store {name[:80]!r}; the stores are {known}")
        with self._lock:  # one request opens it, the others wait
            folder = find_store(self.folders[name])
            store = self._open.get(name)
            if store is None or store.folder != folder:
                store = self._open[name] = OpenStore(folder, self._max_pixels, self._roots.addresses)
        store.refresh()
        return store

    def picture(self, name: str, picture_id: str, max_side: int | None) -> bytes:
        """Return an image as JPEG.

        Args:
            name: Name of the store.
            picture_id: Id of the image.
            max_side: Longest side in pixels; None for no limit.

        Raises:
            RequestError: If there is no such image (404), its file is outside of the roots (403), or is not the one
                that was processed (409).
            ImageError: If the file cannot be read.
        """
        key = f"{name} {picture_id} {max_side}"
        if (known := self._thumbnails.get(key)) is not None:
            return known
        encoded = jpeg(self._readable(name, picture_id).image, max_side)
        if max_side is not None:
            self._thumbnails.put(key, encoded)
        return encoded

    def upload(self, name: str, picture_id: str, uploads: Uploads, check: Callable[[Upload], None]) -> Upload:
        """Add an image to those that clients have sent.

        Args:
            name: Name of the store.
            picture_id: Id of the image.
            uploads: What clients have sent.
            check: See `Uploads.add`.

        Raises:
            RequestError: As for `picture`.
            ImageError: If the file cannot be read.
        """
        frame = self._readable(name, picture_id)
        if frame.video is None and frame.file is not None:
            try:
                if isinstance(frame.file, Location):
                    return uploads.add(io.BytesIO(frame.file.read_bytes()), frame.name, "image", check)
                with frame.file.open("rb") as file:
                    return uploads.add(file, frame.name, "image", check)
            except OSError as error:
                raise RequestError(409, f"{frame.name}: {error.strerror or 'it cannot be read'}") from error
        content = io.BytesIO()  # a frame, of the size that it was stored with
        Image.fromarray(frame.image).save(content, format="PNG", compress_level=1)
        content.seek(0)
        return uploads.add(content, f"{frame.name.replace('/', '-')}.png", "image", check)

    def _readable(self, name: str, picture_id: str) -> Frame:
        """Return the frame of an image whose file may be read, and is the one that was processed."""
        store = self.get(name)
        frame = store.result(picture_id).frame
        if frame.file is not None and not self._roots.contains(frame.file):
            raise RequestError(403, f"{frame.name} is outside of the folders that this server may read (serve.roots)")
        if (problem := store.file_problem(picture_id)) is not None:
            raise RequestError(409, f"{frame.name}: {public_message(ConfigError(problem.partition(';')[0]))}")
        return frame


def named_folders(key: str, folders: Mapping[str, str], roots: Roots) -> dict[str, Path]:
    """Return the folders of a setting, resolved.

    Args:
        key: Name of the setting, for messages.
        folders: Folders by name.
        roots: The roots that they must be in.

    Raises:
        ConfigError: If one does not exist, or is not in a root.
    """
    found = {}
    for name, folder in folders.items():
        path = home_path(folder)
        if not path.is_dir():
            raise ConfigError(f"serve.{key}.{name}: folder {folder} does not exist")
        if not roots.contains(path):
            raise ConfigError(f"serve.{key}.{name}: {folder} is in none of serve.roots; add it or a folder above it")
        found[name] = path.resolve()
    return found
