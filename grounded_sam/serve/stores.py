"""Browse stores: their pictures by class, score and reason to look at them, and thumbnails."""

from __future__ import annotations

import csv
import hashlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grounded_sam.errors import ConfigError
from grounded_sam.files import home_path
from grounded_sam.formats.store import StoreReader, find_store
from grounded_sam.serve.memory import ByteLimited
from grounded_sam.serve.objects import MaskForm, jpeg, object_entries
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.roots import Roots
from grounded_sam.structures.results import FrameResult

#: Pictures of a page, and memory of thumbnails, in bytes.
PAGE, THUMBNAIL_BYTES = 50, 64 << 20
#: Why a picture is worth a look: no object, many objects, an uncertain object, similar to another one, unusable.
Reason = Literal["empty", "crowded", "uncertain", "alike", "skipped"]


@dataclass(frozen=True, eq=False)
class StoredPicture:
    """What is known of a picture without reading it.

    Attributes:
        id: Id in the server: digits of the SHA-256 of its key and frame.
        key: Key in the store.
        name: Its name.
        frame: Number of the frame in a video; None for an image.
        size_hw: Height and width in pixels.
        scores: Class and score of each object.
    """

    id: str
    key: str
    name: str
    frame: int | None
    size_hw: tuple[int, int]
    scores: tuple[tuple[str, float], ...]

    def entry(self) -> dict[str, Any]:
        """Return what a client may know."""
        return {
            "id": self.id,
            "name": self.name,
            "frame": self.frame,
            "width": self.size_hw[1],
            "height": self.size_hw[0],
            "objects": len(self.scores),
            "classes": dict(Counter(name for name, _ in self.scores)),
            "min_score": min((round(score, 6) for _, score in self.scores), default=None),
        }


class StoreIndex:
    """The pictures of a store as it is now.

    Args:
        folder: Folder of the store, or the output that contains it.
        max_pixels: Larger pictures are not read.

    Raises:
        ConfigError: If there is no store, or it is damaged.
    """

    def __init__(self, folder: Path, max_pixels: int) -> None:
        self.folder = find_store(folder)
        self.reader = StoreReader(self.folder, max_pixels)
        self.vocabulary = self.reader.vocabulary
        self.pictures: list[StoredPicture] = []
        self._lock = threading.Lock()  # of the reader
        keys = self.reader.keys()
        for key in keys:
            self.pictures += [_describe(key, result) for result in self.reader.read(key, self.vocabulary)]
        self.by_id = {picture.id: picture for picture in self.pictures}
        self.skipped = [{"name": skipped.file, "reason": skipped.reason} for skipped in self.reader.skipped.values()]
        self._alike = _listed_as_alike(self.folder.parent / "review.csv")

    def page(
        self, class_name: str | None, max_score: float | None, reason: Reason | None, cursor: int
    ) -> dict[str, Any]:
        """Return a page of the pictures that pass some filters.

        Args:
            class_name: Only pictures with an object of this class.
            max_score: Only pictures with an object of at most this score, of that class if one is given.
            reason: Only pictures that are worth a look for this reason, and those first that are it most.
            cursor: Number of pictures to pass over.

        Returns:
            `total`, `pictures`, `skipped` (with that reason alone), `next` (the cursor of the next page, or None) and
            `classes`.

        Raises:
            RequestError: If the store has no such class (404).
        """
        if class_name is not None and class_name not in self.vocabulary.classes:
            names = ", ".join(self.vocabulary.classes[:50])
            raise RequestError(404, f"the store has no class {class_name[:80]!r}; the classes are {names}")
        if reason == "skipped":
            chosen: Sequence[Any] = self.skipped
        else:
            chosen = [p for p in self.pictures if _passes(p, class_name, max_score)]
            chosen = self._with_reason(chosen, reason)
        page = chosen[cursor : cursor + PAGE]
        is_last = cursor + PAGE >= len(chosen)
        return {
            "total": len(chosen),
            "pictures": [] if reason == "skipped" else [picture.entry() for picture in page],
            "skipped": list(page) if reason == "skipped" else [],
            "next": None if is_last else cursor + PAGE,
            "classes": list(self.vocabulary.classes),
        }

    def _with_reason(self, pictures: list[StoredPicture], reason: Reason | None) -> list[StoredPicture]:
        """Return the pictures with a reason, in order of it."""
        if reason == "empty":
            return [picture for picture in pictures if not picture.scores]
        if reason == "alike":
            return [picture for picture in pictures if picture.name in self._alike]
        filled = [picture for picture in pictures if picture.scores]
        if reason == "crowded":
            return sorted(filled, key=lambda picture: -len(picture.scores))
        if reason == "uncertain":
            return sorted(filled, key=lambda picture: min(score for _, score in picture.scores))
        return pictures

    def result(self, picture_id: str) -> FrameResult:
        """Read the result of a picture.

        Raises:
            RequestError: If there is no such picture (404).
        """
        picture = self.by_id.get(picture_id)
        if picture is None:
            raise RequestError(404, f"the store has no picture {picture_id[:40]!r}")
        with self._lock:
            for result in self.reader.read(picture.key, self.vocabulary):
                if picture.frame is None or result.frame.index == picture.frame:
                    return result
        raise RequestError(404, f"{picture.name} is no longer in the store")


def _describe(key: str, result: FrameResult) -> StoredPicture:
    """Describe a picture of a store."""
    detections, frame = result.raw, result.frame
    number = None if frame.video is None else frame.index
    names = detections.data.get("class_name", ())
    confidence = () if detections.confidence is None else detections.confidence
    return StoredPicture(
        id=hashlib.sha256(f"{key}\n{number}".encode("utf-8", "surrogatepass")).hexdigest()[:24],
        key=key,
        name=frame.name,
        frame=number,
        size_hw=frame.size_hw,
        scores=tuple((str(name), float(score)) for name, score in zip(names, confidence, strict=True)),
    )


def _passes(picture: StoredPicture, class_name: str | None, max_score: float | None) -> bool:
    """Return whether a picture has an object of a class and score; any picture passes without either."""
    if class_name is None and max_score is None:
        return True
    return any(
        class_name in (None, name) and (max_score is None or score <= max_score) for name, score in picture.scores
    )


def _listed_as_alike(path: Path) -> set[str]:
    """Return the names of near-duplicates in a `review.csv`; none if there is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["file"] for row in csv.DictReader(file) if row.get("reason") == "alike" and row.get("file")}
    except (OSError, ValueError, csv.Error):
        return set()


class Stores:
    """The stores of a server by name; each is indexed when it is first asked for, and again when it has changed.

    Args:
        folders: Their folders by name.
        roots: What the server may read; pictures elsewhere are not shown.
        max_pixels: Larger pictures are not read.

    Raises:
        ConfigError: If a folder is not in one of the roots.
    """

    def __init__(self, folders: Mapping[str, str], roots: Roots, max_pixels: int) -> None:
        self.folders = named_folders("stores", folders, roots)
        self._roots, self._max_pixels = roots, max_pixels
        self._indices: dict[str, tuple[Any, StoreIndex]] = {}
        self._lock = threading.Lock()
        self._thumbnails: ByteLimited[bytes] = ByteLimited(THUMBNAIL_BYTES, len)

    def index(self, name: str) -> StoreIndex:
        """Return the index of a store.

        Raises:
            RequestError: If the server has no such store (404).
            ConfigError: If it is damaged.
        """
        if name not in self.folders:
            known = ", ".join(self.folders) or "none; see serve.stores"
            raise RequestError(404, f"no store {name[:80]!r}; the stores are {known}")
        with self._lock:  # one request indexes, the others wait for it
            folder = find_store(self.folders[name])
            state = sorted((path.name, path.stat().st_size) for path in folder.glob("*.*") if path.is_file())
            if name not in self._indices or self._indices[name][0] != state:
                self._indices[name] = state, StoreIndex(folder, self._max_pixels)
            return self._indices[name][1]

    def picture(self, name: str, picture_id: str, masks: MaskForm) -> dict[str, Any]:
        """Return a picture with its objects.

        Args:
            name: Name of the store.
            picture_id: Id of the picture.
            masks: Form of the masks.

        Raises:
            RequestError: If there is no such store or picture (404).
        """
        index = self.index(name)
        packed = index.result(picture_id).packed
        return {**index.by_id[picture_id].entry(), "detections": object_entries(packed, range(len(packed)), masks)}

    def thumbnail(self, name: str, picture_id: str, max_side: int) -> bytes:
        """Return a picture as JPEG, scaled down.

        Args:
            name: Name of the store.
            picture_id: Id of the picture.
            max_side: Longest side in pixels.

        Raises:
            RequestError: If there is no such picture (404), or its file is outside of the roots (403).
            ImageError: If the file is gone, or has changed.
        """
        key = f"{name} {picture_id} {max_side}"
        if (known := self._thumbnails.get(key)) is not None:
            return known
        frame = self.index(name).result(picture_id).frame
        if frame.file is not None and not self._roots.contains(frame.file):
            raise RequestError(403, f"{frame.name} is outside of the folders that this server may read (serve.roots)")
        encoded = jpeg(frame.image, max_side)
        self._thumbnails.put(key, encoded)
        return encoded


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
