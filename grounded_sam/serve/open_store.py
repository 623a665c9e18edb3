"""A store that is browsed and reviewed: what is in its pictures, and what people decide about it."""

from __future__ import annotations

import csv
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grounded_sam.evaluation.verdicts import (
    Verdicts,
    chances,
    image_verdicts,
    join_verdicts,
    last_vocabulary,
    next_candidates,
)
from grounded_sam.formats.store import StoreReader
from grounded_sam.formats.store_edits import AppliedEdits, Edit, StoreEditor
from grounded_sam.formats.store_index import RowIndex
from grounded_sam.formats.store_objects import Row, detections_from_rows
from grounded_sam.formats.store_schema import STATUSES
from grounded_sam.serve.objects import MaskForm, object_entries
from grounded_sam.serve.problems import RequestError
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: Pictures of a page.
PAGE = 50
#: Why a picture is worth a look: no object, many objects, an uncertain object, similar to another one, unusable.
Reason = Literal["empty", "crowded", "uncertain", "alike", "skipped"]
#: What is known of an object, see `store_schema.STATUSES`.
Status = Literal["predicted", "accepted", "rejected", "edited", "added"]
#: By name, or those first whose least certain object has the lowest score.
Order = Literal["name", "uncertain"]
#: Where the rows of a picture are: that of the picture, and those of the decisions.
Version = tuple[RowIndex, tuple[RowIndex, ...]]


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of a store.

    Attributes:
        class_name: Its class.
        score: Confidence, 0 to 1.
        status: One of `STATUSES`.
        track_id: Its track in a video.
    """

    class_name: str
    score: float
    status: str
    track_id: int | None


@dataclass(frozen=True, eq=False)
class StoredPicture:
    """What is known of a picture without reading it.

    Attributes:
        id: Id in the server: digits of the SHA-256 of its key and frame.
        key: Key in the store.
        name: Its name.
        video: Name of its video; None for an image.
        frame: Number of the frame in a video; None for an image.
        size_hw: Height and width in pixels.
        objects: Its objects, also those that were rejected.
    """

    id: str
    key: str
    name: str
    video: str | None
    frame: int | None
    size_hw: tuple[int, int]
    objects: tuple[StoredObject, ...]

    @property
    def shown(self) -> list[StoredObject]:
        """The objects that nobody rejected."""
        return [item for item in self.objects if item.status != "rejected"]

    @property
    def unreviewed(self) -> list[StoredObject]:
        """The objects that nobody decided about."""
        return [item for item in self.objects if item.status == "predicted"]

    def entry(self) -> dict[str, Any]:
        """Return what a client may know."""
        return {
            "id": self.id,
            "name": self.name,
            "video": self.video,
            "frame": self.frame,
            "width": self.size_hw[1],
            "height": self.size_hw[0],
            "objects": len(self.shown),
            "classes": dict(Counter(item.class_name for item in self.shown)),
            "statuses": dict(Counter(item.status for item in self.objects)),
            "min_score": min((round(item.score, 6) for item in self.shown), default=None),
        }


@dataclass(frozen=True, kw_only=True)
class PictureFilter:
    """Which pictures are listed, and in which order.

    Attributes:
        class_name: Only pictures with an object of this class.
        max_score: Only pictures with an object of at most this score.
        status: Only pictures with an object of this status. All three must hold for the same object.
        unreviewed: Only pictures with an object that nobody decided about; it must be the object of the three above.
        video: Only frames of this video.
        reason: Only pictures that are worth a look for this reason, and those first that are it most.
        order: The order where `reason` gives none.
    """

    class_name: str | None = None
    max_score: float | None = None
    status: Status | None = None
    unreviewed: bool = False
    video: str | None = None
    reason: Reason | None = None
    order: Order = "name"

    def fits(self, item: StoredObject) -> bool:
        """Return whether an object is one of those that are asked for."""
        if item.status == "rejected" and self.status != "rejected":
            return False
        return (
            self.class_name in (None, item.class_name)
            and (self.max_score is None or item.score <= self.max_score)
            and self.status in (None, item.status)
            and (not self.unreviewed or item.status == "predicted")
        )

    @property
    def _asks_for_objects(self) -> bool:
        return self.unreviewed or not (self.class_name is self.max_score is self.status is None)

    def apply(self, pictures: Sequence[StoredPicture], alike: set[str]) -> list[StoredPicture]:
        """Return the pictures that pass, in order.

        Args:
            pictures: All pictures, in order of their names.
            alike: Names of near-duplicates.
        """
        chosen = [p for p in pictures if self.video in (None, p.video)]
        if self._asks_for_objects:
            chosen = [p for p in chosen if any(map(self.fits, p.objects))]
        if self.reason == "empty":
            chosen = [p for p in chosen if not p.shown]
        elif self.reason == "alike":
            chosen = [p for p in chosen if p.name in alike]
        elif self.reason is not None:
            chosen = [p for p in chosen if p.shown]
        if self.reason == "crowded":
            return sorted(chosen, key=lambda p: -len(p.shown))
        if self.reason == "uncertain" or self.order == "uncertain":
            return sorted(chosen, key=self._least_score)
        return chosen

    def _least_score(self, picture: StoredPicture) -> float:
        """Return the lowest score of the objects that are asked for; above 1 where there is none."""
        return min((item.score for item in picture.objects if self.fits(item)), default=2.0)


class OpenStore:
    """A store, read once and kept up to date; thread-safe.

    Args:
        folder: Folder of the store.
        max_pixels: A store with larger pictures is refused.

    Raises:
        ConfigError: If it is damaged.

    Attributes:
        folder: Folder of the store.
    """

    def __init__(self, folder: Path, max_pixels: int) -> None:
        self.folder = folder
        self._reader = StoreReader(folder, max_pixels)
        self._editor = StoreEditor(folder, max_pixels, self._reader.rows)
        self._lock = threading.RLock()
        self._state: Any = None
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
            files = [path for path in (*self.folder.glob("*.*"), review) if path.is_file()]
            state = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
            if state == self._state:
                return
            parts = list(self._reader.parts)
            self._reader.refresh()
            if self._reader.parts[: len(parts)] != parts:  # another store
                self._versions.clear()
                self._verdicts.clear()
            self._describe()
            self._alike = _listed_as_alike(review)
            self._state = state

    def _describe(self) -> None:
        """Describe the pictures, reading anew those whose rows are other ones."""
        known, versions = self._pictures, self._versions
        self._pictures, self._versions = {}, {}
        for key, number, index in self._rows():
            picture_id = hashlib.sha256(f"{key}\n{number}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
            decided = self._reader.rows.index.decisions.get((key, number), {})
            version = index, tuple(decided.values())
            is_known = versions.get(picture_id) == version
            self._pictures[picture_id] = known[picture_id] if is_known else self._read(picture_id, key, number, index)
            self._versions[picture_id] = version

    def _rows(self) -> Iterator[tuple[str, int | None, RowIndex]]:
        """Yield key, number of the frame and row of each picture."""
        index = self._reader.rows.index
        for key in index.sorted_keys():
            if key in index.images:
                yield key, None, index.images[key].index
            else:
                frames = index.videos[key].frames
                yield from ((key, number, frames[number]) for number in sorted(frames))

    def _read(self, picture_id: str, key: str, number: int | None, index: RowIndex) -> StoredPicture:
        """Read what a picture has."""
        image, rows = self._reader.rows.rows_at(key, index)
        owner, name = self._reader.rows.owner_and_name(key, image)
        words = self._reader.vocabulary
        return StoredPicture(
            id=picture_id,
            key=key,
            name=name,
            video=None if number is None else owner,
            frame=number,
            size_hw=(image["height"], image["width"]),
            objects=tuple(
                StoredObject(spelled(row["class"], words), float(row["score"]), row["status"], row["tracker_id"])
                for row in rows
            ),
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes, also those that only people gave to objects."""
        return self._reader.vocabulary.classes

    def counts(self) -> dict[str, Any]:
        """Return the numbers of objects by status, and of objects and pictures that are reviewed or not."""
        with self._lock:
            pictures = list(self._pictures.values())
        statuses = Counter(item.status for picture in pictures for item in picture.objects)
        left = sum(bool(picture.unreviewed) for picture in pictures)
        return {
            "statuses": {status: statuses[status] for status in STATUSES},
            "reviewed": statuses.total() - statuses["predicted"],
            "unreviewed": statuses["predicted"],
            "reviewed_pictures": len(pictures) - left,
            "unreviewed_pictures": left,
        }

    def page(self, wanted: PictureFilter, cursor: int) -> dict[str, Any]:
        """Return a page of the pictures that pass a filter.

        Args:
            wanted: The filter.
            cursor: Number of pictures to pass over.

        Returns:
            `total`, `pictures`, `skipped` (with that reason alone), `next` (the cursor of the next page, or None),
            `classes` and `counts`.

        Raises:
            RequestError: If the store has no such class or video (404).
        """
        with self._lock:
            pictures, alike = list(self._pictures.values()), self._alike
            skipped = [{"name": item.file, "reason": item.reason} for item in self._reader.skipped.values()]
        if wanted.class_name is not None and wanted.class_name not in self.classes:
            names = ", ".join(self.classes[:50])
            raise RequestError(404, f"the store has no class {wanted.class_name[:80]!r}; the classes are {names}")
        videos = dict.fromkeys(picture.video for picture in pictures if picture.video is not None)
        if wanted.video is not None and wanted.video not in videos:
            names = ", ".join([*videos][:20]) or "none"
            raise RequestError(404, f"the store has no video {wanted.video[:80]!r}; its videos are {names}")
        is_skipped = wanted.reason == "skipped"
        chosen: Sequence[Any] = skipped if is_skipped else wanted.apply(pictures, alike)
        page = chosen[cursor : cursor + PAGE]
        return {
            "total": len(chosen),
            "pictures": [] if is_skipped else [picture.entry() for picture in page],
            "skipped": list(page) if is_skipped else [],
            "next": None if cursor + PAGE >= len(chosen) else cursor + PAGE,
            "classes": list(self.classes),
            "counts": self.counts(),
        }

    def find(self, picture_id: str) -> StoredPicture:
        """Return a picture.

        Raises:
            RequestError: If there is no such picture (404).
        """
        picture = self._pictures.get(picture_id)
        if picture is None:
            raise RequestError(404, f"the store has no picture {picture_id[:40]!r}")
        return picture

    def result(self, picture_id: str) -> FrameResult:
        """Read the result of a picture; its pixels are read when they are needed.

        Raises:
            RequestError: If there is no such picture (404).
        """
        picture, words = self.find(picture_id), self._reader.vocabulary
        with self._lock:
            if picture.frame is None:
                return next(iter(self._reader.read(picture.key, words)))
            return self._reader.read_frame(picture.key, picture.frame, words)

    def file_problem(self, picture_id: str) -> str | None:
        """Return why the file of a picture is not the one that was processed; None if it is."""
        picture = self.find(picture_id)
        with self._lock:
            return self._reader.file_problem(picture.key)

    def objects(self, picture_id: str, masks: MaskForm) -> dict[str, Any]:
        """Return a picture with its objects: `detections`, and apart from them those that somebody `rejected`.

        Args:
            picture_id: Id of the picture.
            masks: Form of the masks.

        Raises:
            RequestError: If there is no such picture (404).
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
            "detections": _entries(kept, picture, words, masks),
            "rejected": _entries(rejected, picture, words, masks),
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
            "counts": self.counts(),
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
        chosen = []
        for i in next_candidates(verdicts, count):
            candidate = verdicts.candidates[i]
            chosen.append(
                {
                    "object_id": candidate.object_id,
                    "picture": pictures[candidate.image].id,
                    "name": candidate.file,
                    "class": candidate.class_name,
                    "score": round(candidate.score, 6),
                    "box": [round(float(value), 3) for value in candidate.box],
                    "chance": round(float(chance[i]), 4),
                }
            )
        return {"objects": chosen, "unreviewed": sum(candidate.is_right is None for candidate in verdicts.candidates)}

    def _judged(self, picture: StoredPicture, number: int, words: Vocabulary) -> Verdicts:
        """Return the candidates of a picture, read anew if its rows are other ones."""
        version = self._versions[picture.id]
        state = version, number, words
        if picture.id not in self._verdicts or self._verdicts[picture.id][0] != state:
            _, rows = self._reader.rows.rows_at(picture.key, version[0])
            self._verdicts[picture.id] = state, image_verdicts(rows, picture.name, number, words, picture.size_hw)
        return self._verdicts[picture.id][1]

    def videos(self) -> list[dict[str, Any]]:
        """Return the videos with their tracks: name, frames, size, and of each track where it is seen."""
        with self._lock:
            frames: dict[str, list[StoredPicture]] = {}
            for picture in self._pictures.values():
                if picture.video is not None:
                    frames.setdefault(picture.video, []).append(picture)
        return [
            {
                "name": name,
                "frames": len(members),
                "picture": members[0].id,
                "first": members[0].frame,
                "last": members[-1].frame,
                "width": members[0].size_hw[1],
                "height": members[0].size_hw[0],
                "tracks": _tracks(members),
            }
            for name, members in frames.items()
        ]


def _tracks(frames: Sequence[StoredPicture]) -> list[dict[str, Any]]:
    """Return the tracks in the frames of a video: id, class, numbers of frames, spans of frames, statuses, scores."""
    seen: dict[int, list[tuple[int, int, StoredObject]]] = {}  # position and number of the frame
    for position, picture in enumerate(frames):
        for item in picture.shown:
            if item.track_id is not None and picture.frame is not None:
                seen.setdefault(item.track_id, []).append((position, picture.frame, item))
    tracks = []
    for track_id, members in sorted(seen.items()):
        spans: list[list[int]] = []
        last = -2
        for position, number, _ in members:
            if position == last + 1:
                spans[-1][1] = number
            else:
                spans.append([number, number])
            last = position
        items = [item for _, _, item in members]
        tracks.append(
            {
                "track": track_id,
                "class": Counter(item.class_name for item in items).most_common(1)[0][0],
                "frames": len(items),
                "spans": spans,
                "statuses": dict(Counter(item.status for item in items)),
                "min_score": round(min(item.score for item in items), 6),
            }
        )
    return tracks


def _entries(rows: Sequence[Row], picture: StoredPicture, words: Vocabulary, masks: MaskForm) -> list[dict[str, Any]]:
    """Return object rows of a picture as entries of an answer."""
    known = [{**row, "class_id": words.index(row["class"]), "class": spelled(row["class"], words)} for row in rows]
    detections = detections_from_rows(known, picture.size_hw, words, picture.video is not None)
    entries = object_entries(detections, range(len(detections)), masks) if rows else []
    for entry, row in zip(entries, rows, strict=True):
        entry |= {"object_id": row["object_id"], "status": row["status"]}
        entry |= {key: row[key] for key in ("author", "edited_at", "predicted_class") if row[key] is not None}
        if row["status"] == "rejected" and row["reason"] is not None:
            entry["looks_like"] = row["reason"]
    return entries


def spelled(name: str, vocabulary: Vocabulary) -> str:
    """Return a class as the vocabulary spells it.

    >>> spelled("Green  star", Vocabulary.parse(["green star"]))
    'green star'
    """
    index = vocabulary.index(name)
    return name if index is None else vocabulary.classes[index]


def _listed_as_alike(path: Path) -> set[str]:
    """Return the names of near-duplicates in a `review.csv`; none if there is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["file"] for row in csv.DictReader(file) if row.get("reason") == "alike" and row.get("file")}
    except (OSError, ValueError, csv.Error):
        return set()
