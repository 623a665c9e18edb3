"""A store that is browsed and reviewed: what is in its images, and what people decide about it."""

from __future__ import annotations

import csv
import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grounded_sam.evaluation.verdicts import (
    Candidate,
    Verdicts,
    chances,
    image_verdicts,
    join_verdicts,
    last_vocabulary,
    next_candidates,
)
from grounded_sam.formats.store import StoreReader
from grounded_sam.formats.store_edits import AppliedEdits, Edit, StoreEditor
from grounded_sam.formats.store_index import RowIndex, StoreIndex
from grounded_sam.serve.objects import MaskForm
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.store_pictures import (
    PAGE,
    PictureFilter,
    StoredPicture,
    count_reviewed,
    describe_picture,
    row_entries,
)
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: Where the rows of an image are: that of the image, and those of the decisions.
Version = tuple[RowIndex, tuple[RowIndex, ...]]


class OpenStore:
    """A store, read once and kept up to date; thread-safe.

    Args:
        folder: Folder of the store.
        max_pixels: A store with larger images is refused.
        roots: Addresses below which addresses in the store may be opened.

    Raises:
        ConfigError: If it is damaged.

    Attributes:
        folder: Folder of the store.
    """

    def __init__(self, folder: Path, max_pixels: int, roots: Sequence[str] = ()) -> None:
        self.folder, self._max_pixels, self._roots = folder, max_pixels, roots
        self._lock = threading.RLock()
        self._open()

    def _open(self) -> None:
        """Open the store, and forget what was read before."""
        self._reader = StoreReader(self.folder, self._max_pixels, roots=self._roots)
        self._editor = StoreEditor(self.folder, self._max_pixels, self._reader.rows)
        self._state: dict[str, tuple[int, int]] = {}
        self._versions: dict[str, Version] = {}
        self._pictures: dict[str, StoredPicture] = {}
        self._verdicts: dict[str, tuple[Any, Verdicts]] = {}
        self._alike: set[str] = set()

    def refresh(self) -> None:
        """Read what was written since the last time, also by other processes.

        Raises:
            ConfigError: If a part is damaged.
        """
        with self._lock:
            review = self.folder.parent / "review.csv"
            status = {str(p): p.stat() for p in (*self.folder.glob("*.*"), review) if p.is_file()}
            state = {path: (found.st_size, found.st_mtime_ns) for path, found in status.items()}
            if state == self._state:
                return
            parts = [str(part) for part in self._reader.parts if str(part) in self._state]
            if any(state.get(part) != self._state[part] for part in parts):  # parts are written once: another store
                self._open()
            self._reader.refresh()
            self._describe()
            self._alike = _listed_as_alike(review)
            self._state = state

    def _describe(self) -> None:
        """Describe the images, reading anew those whose rows are other ones."""
        known, versions = self._pictures, self._versions
        self._pictures, self._versions = {}, {}
        for key, number, index in _picture_rows(self._reader.rows.index):
            picture_id = hashlib.sha256(f"{key}\n{number}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
            decided = self._reader.rows.index.decisions.get((key, number), {})
            version = index, tuple(decided.values())
            is_known = versions.get(picture_id) == version
            self._pictures[picture_id] = known[picture_id] if is_known else self._read(picture_id, key, number, index)
            self._versions[picture_id] = version

    def _read(self, picture_id: str, key: str, number: int | None, index: RowIndex) -> StoredPicture:
        """Read what an image has."""
        return describe_picture(self._reader.rows, picture_id, key, number, index)

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes, also those that only people gave to objects."""
        return self._reader.vocabulary.classes

    @property
    def pictures(self) -> list[StoredPicture]:
        """All images in order of their names, then the frames of videos."""
        with self._lock:
            return list(self._pictures.values())

    def page(self, wanted: PictureFilter, cursor: int) -> dict[str, Any]:
        """Return a page of the images that pass a filter.

        Args:
            wanted: The filter.
            cursor: Number of images to pass over.

        Returns:
            `total`, `pictures`, `skipped` (with that reason alone), `next` (the cursor of the next page, or None),
            `classes` and `counts`.

        Raises:
            RequestError: If the store has no such class or video (404).
        """
        pictures = self.pictures
        with self._lock:
            skipped = [{"name": item.file, "reason": item.reason} for item in self._reader.skipped.values()]
        if wanted.class_name is not None and wanted.class_name not in self.classes:
            names = ", ".join(self.classes[:50])
            raise RequestError(404, f"the store has no class {wanted.class_name[:80]!r}; the classes are {names}")
        videos = dict.fromkeys(picture.video for picture in pictures if picture.video is not None)
        if wanted.video is not None and wanted.video not in videos:
            names = ", ".join([*videos][:20]) or "none"
            raise RequestError(404, f"the store has no video {wanted.video[:80]!r}; its videos are {names}")
        is_skipped = wanted.reason == "skipped"
        chosen: Sequence[Any] = skipped if is_skipped else wanted.apply(pictures, self._alike)
        page = chosen[cursor : cursor + PAGE]
        return {
            "total": len(chosen),
            "pictures": [] if is_skipped else [picture.entry() for picture in page],
            "skipped": list(page) if is_skipped else [],
            "next": None if cursor + PAGE >= len(chosen) else cursor + PAGE,
            "classes": list(self.classes),
            "counts": count_reviewed(pictures),
        }

    def find(self, picture_id: str) -> StoredPicture:
        """Return an image.

        Raises:
            RequestError: If there is no such image (404).
        """
        picture = self._pictures.get(picture_id)
        if picture is None:
            raise RequestError(404, f"the store has no image {picture_id[:40]!r}")
        return picture

    def result(self, picture_id: str) -> FrameResult:
        """Read the result of an image; its pixels are read when they are needed.

        Raises:
            RequestError: If there is no such image (404).
        """
        picture, words = self.find(picture_id), self._reader.vocabulary
        with self._lock:
            if picture.frame is None:
                return next(iter(self._reader.read(picture.key, words)))
            return self._reader.read_frame(picture.key, picture.frame, words)

    def file_problem(self, picture_id: str) -> str | None:
        """Return why the file of an image is not the one that was processed; None if it is."""
        picture = self.find(picture_id)
        with self._lock:
            return self._reader.file_problem(picture.key)

    def objects(self, picture_id: str, masks: MaskForm) -> dict[str, Any]:
        """Return an image with its objects: `detections`, and apart from them those that somebody `rejected`.

        Args:
            picture_id: Id of the image.
            masks: Form of the masks.

        Raises:
            RequestError: If there is no such image (404).
        """
        picture = self.find(picture_id)
        with self._lock:
            index = self._versions[picture_id][0]
            _, rows = self._reader.rows.rows_at(picture.key, index)
            words = self._reader.vocabulary
        kept = [row for row in rows if row["status"] != "rejected"]
        rejected = [row for row in rows if row["status"] == "rejected"]
        return {
            **picture.entry(),
            "detections": row_entries(kept, picture, words, masks),
            "rejected": row_entries(rejected, picture, words, masks),
        }

    def edit(self, edits: Sequence[Edit], author: str, skip_invalid: bool) -> dict[str, Any]:
        """Apply edits.

        Args:
            edits: The edits.
            author: Who decided.
            skip_invalid: Leave out edits that cannot be applied, instead of applying none.

        Returns:
            `batch` (for `undo`; None if nothing was applied), `applied`, `refused`, `pictures` and `counts`.

        Raises:
            EditError: If an edit cannot be applied, unless `skip_invalid` is set.
            ConfigError: If the store cannot be written.
        """
        with self._lock:
            before = dict(self._pictures)
            applied = self._editor.apply(edits, author, skip_invalid=skip_invalid)
            return self._answer(applied, before, [edit.action for edit in edits])

    def undo(self, batch: str, author: str) -> dict[str, Any]:
        """Take edits back; what was decided before counts again.

        Args:
            batch: What `edit` or `undo` answered.
            author: Who takes them back.

        Returns:
            As `edit`.

        Raises:
            EditError: If somebody decided about one of the objects since.
            ConfigError: If there is no such batch, or the store cannot be written.
        """
        with self._lock:
            before = dict(self._pictures)
            return self._answer(self._editor.undo(batch, author), before, ["undo"])

    def _answer(
        self, applied: AppliedEdits, before: dict[str, StoredPicture], actions: Sequence[str]
    ) -> dict[str, Any]:
        """Return what a batch of edits changed."""
        self.refresh()
        changed = [picture for picture in self._pictures.values() if before.get(picture.id) is not picture]
        return {
            "batch": applied.batch,
            "applied": [
                {"edit": i, "action": action, "objects": ids}
                for i, (action, ids) in enumerate(zip(actions, applied.object_ids, strict=True))
                if ids
            ],
            "refused": [{"edit": problem.index, "reason": problem.reason} for problem in applied.problems],
            "pictures": [picture.entry() for picture in changed],
            "counts": count_reviewed(list(self._pictures.values())),
        }

    def next_objects(self, count: int) -> dict[str, Any]:
        """Return the objects whose review changes most, as `grounded-sam-review next` lists them.

        Args:
            count: Largest number of objects.

        Returns:
            `objects`, the most valuable first, and `unreviewed`, how many there are.
        """
        with self._lock:
            words = last_vocabulary(self._reader.rows)
            pictures = list(self._pictures.values())
            judged = [self._judged(picture, number, words) for number, picture in enumerate(pictures)]
        verdicts = join_verdicts(judged, words)
        chance = chances(verdicts)
        chosen = [
            _next_entry(verdicts.candidates[i], pictures, float(chance[i])) for i in next_candidates(verdicts, count)
        ]
        return {"objects": chosen, "unreviewed": sum(candidate.is_right is None for candidate in verdicts.candidates)}

    def _judged(self, picture: StoredPicture, number: int, words: Vocabulary) -> Verdicts:
        """Return the candidates of an image, read anew if its rows are other ones."""
        version = self._versions[picture.id]
        state = version, number, words
        if picture.id not in self._verdicts or self._verdicts[picture.id][0] != state:
            _, rows = self._reader.rows.rows_at(picture.key, version[0])
            self._verdicts[picture.id] = state, image_verdicts(rows, picture.name, number, words, picture.size_hw)
        return self._verdicts[picture.id][1]


def _picture_rows(index: StoreIndex) -> Iterator[tuple[str, int | None, RowIndex]]:
    """Yield key, number of the frame and row of each image."""
    for key in index.sorted_keys():
        if key in index.images:
            yield key, None, index.images[key].index
        else:
            frames = index.videos[key].frames
            yield from ((key, number, frames[number]) for number in sorted(frames))


def _next_entry(candidate: Candidate, pictures: Sequence[StoredPicture], chance: float) -> dict[str, Any]:
    """Return a candidate as an entry of an answer."""
    return {
        "object_id": candidate.object_id,
        "picture": pictures[candidate.image].id,
        "name": candidate.file,
        "class": candidate.class_name,
        "score": round(candidate.score, 6),
        "box": [round(float(value), 3) for value in candidate.box],
        "chance": round(chance, 4),
    }


def _listed_as_alike(path: Path) -> set[str]:
    """Return the names of near-duplicates in a `review.csv`; none if there is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["file"] for row in csv.DictReader(file) if row.get("reason") == "alike" and row.get("file")}
    except (OSError, ValueError, csv.Error):
        return set()
