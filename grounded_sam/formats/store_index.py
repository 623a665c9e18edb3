"""Where in the part files of a store the images, videos, skipped files and decisions are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from grounded_sam.media.files import is_video_file, natural_key
from grounded_sam.structures.results import Skipped

#: Columns that `StoreIndex.add` needs.
INDEX_COLUMNS = (
    *("kind", "file", "path", "digest", "video", "take", "frame", "reason", "fingerprint", "object_id", "class"),
    *("bytes", "mtime_ns", "etag"),
)


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Part and row of an image, or of a decision."""

    part: int
    row: int


@dataclass(frozen=True)
class StoredImage:
    """An image: where its row is, digest of its file, name, fingerprint of its run, and state of its file."""

    index: RowIndex
    digest: str | None
    name: str
    fingerprint: str
    state: int | None = None


@dataclass
class VideoPass:
    """One pass through a video, a `take` in the part files; complete once it has a `video` row."""

    digest: str | None = None
    fingerprint: str = ""
    state: int | None = None
    complete: bool = False
    frames: dict[int, RowIndex] = field(default_factory=dict)


def file_state(size: int | None, modified_ns: int | None, etag: str | None) -> int | None:
    """Return a number that changes with a file, without reading it: from its size, and its tag or time of change.

    It is the same within one process. None is returned where too little is known.
    """
    if size is None or (etag is None and modified_ns is None):
        return None
    return hash((size, modified_ns if etag is None else etag))


class StoreIndex:
    """Index of the parts of a store, added in the order in which they were written.

    Attributes:
        images: Images by key: their path, or their name where there is none.
        videos: Newest complete pass of each video by key, see `video_key`.
        video_names: Name of each video by key.
        decisions: By key and, in a video, number of the frame: row of the latest decision by object id.
        replaced: Row of the decision that a later one about the same object replaced, by the row of the later one.
        added_classes: Classes that objects got from people, in the order of their first use.
    """

    def __init__(self) -> None:
        self.images: dict[str, StoredImage] = {}
        self.videos: dict[str, VideoPass] = {}
        self.video_names: dict[str, str] = {}
        self.decisions: dict[tuple[str, int | None], dict[str, RowIndex]] = {}
        self.replaced: dict[RowIndex, RowIndex] = {}
        self.added_classes: dict[str, None] = {}
        self._first_names: dict[str, str] = {}  # by path or video key: the name that it was first stored with
        self._skipped: dict[str, tuple[Skipped, str | None]] = {}  # by name: record and digest
        self._passes: dict[str, dict[str, VideoPass]] = {}  # by video key and id of the pass, the latest last
        self._keys_by_name: dict[str, list[str]] = {}
        self._sorted: list[str] | None = None

    def add(self, number: int, table: pa.Table) -> bool:
        """Add the images, videos, skipped files and decisions of a part.

        Args:
            number: Position of the part.
            table: Its rows, with `INDEX_COLUMNS`.

        Returns:
            Whether it has anything but decisions; `finish` is needed then.
        """
        rows = np.flatnonzero(np.asarray(table["kind"]) != "object")
        values = table.take(rows).to_pydict()
        columns = (values[name] for name in INDEX_COLUMNS)
        for row, kind, file, path, digest, video, take, frame, reason, run, object_id, class_name, *state in zip(
            rows.tolist(), *columns, strict=True
        ):
            if kind == "skipped":
                self._skipped[file] = (Skipped(file, reason), digest)
            elif kind == "edit":
                place = (path or file, None) if video is None else (video_key(path, video), frame)
                latest, index = self.decisions.setdefault(place, {}), RowIndex(number, row)
                if object_id in latest:
                    self.replaced[index] = latest[object_id]
                latest[object_id] = index
                self.added_classes.setdefault(class_name)
            elif kind == "image" and video is None:
                self._skipped.pop(file, None)
                self._first_names.setdefault(path or file, file)
                self.images[path or file] = StoredImage(
                    RowIndex(number, row), digest, file, sys.intern(run or ""), file_state(*state)
                )
            else:
                key = video_key(path, video)
                self.video_names[key] = video
                self._first_names.setdefault(key, video)
                new = VideoPass(digest, run or "", file_state(*state))
                video_pass = self._passes.setdefault(key, {}).setdefault(take, new)
                if kind == "video":
                    video_pass.complete = True
                else:
                    video_pass.frames[frame] = RowIndex(number, row)
        return any(kind != "edit" for kind in values["kind"])

    def finish(self) -> StoredNames:
        """Make the index consistent after the last part, and return the names of its images and videos."""
        for key, by_take in self._passes.items():
            newest = list(by_take.values())[::-1]
            self.videos[key] = next((video for video in newest if video.complete), newest[0])
        self._keys_by_name = {}
        for key, image in self.images.items():
            self._keys_by_name.setdefault(image.name, []).append(key)
        for key, name in self.video_names.items():
            self._keys_by_name.setdefault(name, []).append(key)
        for name, (_, digest) in list(self._skipped.items()):
            self._reconcile_skipped(name, digest)
        self._sorted = None
        return StoredNames(self._first_names)

    def _reconcile_skipped(self, name: str, digest: str | None) -> None:
        """Drop the results of an image that was skipped after its content had changed.

        Or drop the skip record of a video that was since processed with new content.
        """
        for key in self._keys_by_name.get(name, ()):
            if key in self.images and digest is not None and self.images[key].digest != digest:
                del self.images[key]
            elif key in self.videos and self.videos[key].complete and self.videos[key].digest != digest:
                self._skipped.pop(name, None)

    def skipped(self) -> dict[str, Skipped]:
        """Return the files that could not be used, or not completely, when they were last tried; by name."""
        return {name: skipped for name, (skipped, _) in self._skipped.items()}

    def find(self, name: str, digest: str, path: str | None) -> str | None:
        """Return the key of an image or of a complete video; None if it is not stored with this content.

        Args:
            name: Name of the image or video.
            digest: Digest of its files.
            path: Path of the image, as stored.
        """
        for key in (*self._keys_by_name.get(name, ()), path):
            if key in self.images and self.images[key].digest == digest:
                return key
            if key in self.videos and self.videos[key].complete and self.videos[key].digest == digest:
                return key
        return None

    def has_name(self, name: str, path: str) -> bool:
        """Return whether there is an image or video of this name or path, with whatever content."""
        return name in self._keys_by_name or path in self.images

    def find_unchanged(self, name: str, path: str, state: int | None) -> str | None:
        """Return the key of an image or of a complete video whose file is still the same; None if that is not sure.

        Args:
            name: Name of the image or video.
            path: Path of its file, as stored.
            state: State of its file, see `file_state`.
        """
        if state is None:
            return None
        if path in self.images and self.images[path].state == state:
            return path
        key = video_key(path, name)
        if key in self.videos and self.videos[key].complete and self.videos[key].state == state:
            return key
        return None

    def sorted_keys(self) -> Iterator[str]:
        """Yield the keys of images in natural order of their names, then those of videos."""
        if self._sorted is None:
            images = sorted(self.images, key=lambda key: (natural_key(self.images[key].name), key))
            videos = [key for key, video in self.videos.items() if video.frames]
            self._sorted = [*images, *sorted(videos, key=lambda key: (natural_key(self.video_names[key]), key))]
        yield from self._sorted


def video_key(path: str | None, name: str) -> str:
    """Return a key that tells videos of the same name apart: by their file, or the folder of their frames."""
    return f"{path if path is None or is_video_file(path) else Path(path).parent}\n{name}"


class StoredNames:
    """Names of images and videos, no two the same: the first one of a name keeps it, later ones get a number.

    Args:
        named: Name of each image and video by its key, in the order in which they were stored.
    """

    def __init__(self, named: Mapping[str, str]) -> None:
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()
        for key, name in named.items():
            self(key, name)

    def peek(self, key: str, name: str) -> str:
        """Return the name that a key has or, if it is new, would get, as long as no other key takes it."""
        return name if key not in self._names and name not in self._taken else self(key, name)

    def __call__(self, key: str, name: str) -> str:
        """Return the name for a key; `name` itself unless another key has it."""
        if key not in self._names:
            stem, ending = os.path.splitext(name)
            unique, count = name, 1
            while unique in self._taken:
                count += 1
                unique = f"{stem}-{count}{ending}"
            self._names[key] = unique
            self._taken.add(unique)
        return self._names[key]
