"""What is known of the images of a store, which of them are listed, and how they are answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grounded_sam.formats.store_index import RowIndex
from grounded_sam.formats.store_objects import Row, detections_from_rows
from grounded_sam.formats.store_rows import StoreRows
from grounded_sam.formats.store_schema import STATUSES
from grounded_sam.serve.objects import MaskForm, object_entries
from grounded_sam.structures.vocabulary import Vocabulary

#: Images of a page.
PAGE = 50
#: Why an image is worth a look: no object, many objects, an uncertain object, similar to another one, unusable.
Reason = Literal["empty", "crowded", "uncertain", "alike", "skipped"]
#: What is known of an object, see `store_schema.STATUSES`.
Status = Literal["predicted", "accepted", "rejected", "edited", "added"]
#: By name, or those first whose least certain object has the lowest score.
Order = Literal["name", "uncertain"]


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
    """What is known of an image without reading it.

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
    """Which images are listed, and in which order.

    Attributes:
        class_name: Only images with an object of this class.
        max_score: Only images with an object of at most this score.
        status: Only images with an object of this status. All three must hold for the same object.
        unreviewed: Only images with an object that nobody decided about; it must be the object of the three above.
        video: Only frames of this video.
        reason: Only images that are worth a look for this reason, and those first that are it most.
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
        return self.unreviewed or any(value is not None for value in (self.class_name, self.max_score, self.status))

    def apply(self, pictures: Sequence[StoredPicture], alike: set[str]) -> list[StoredPicture]:
        """Return the images that match a filter, in the order asked for.

        Args:
            images: All images, in order of their names.
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


def describe_picture(store: StoreRows, picture_id: str, key: str, number: int | None, index: RowIndex) -> StoredPicture:
    """Read what an image has.

    Args:
        store: Rows of the store.
        picture_id: Its id in the server.
        key: Key of the image or video.
        number: Number of the frame; None for an image.
        index: Where its row is.
    """
    image, rows = store.rows_at(key, index)
    owner, name = store.owner_and_name(key, image)
    words = store.vocabulary
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


def count_reviewed(pictures: Sequence[StoredPicture]) -> dict[str, Any]:
    """Return the numbers of objects by status, and of objects and images that are reviewed or not."""
    statuses = Counter(item.status for picture in pictures for item in picture.objects)
    left = sum(bool(picture.unreviewed) for picture in pictures)
    return {
        "statuses": {status: statuses[status] for status in STATUSES},
        "reviewed": statuses.total() - statuses["predicted"],
        "unreviewed": statuses["predicted"],
        "reviewed_pictures": len(pictures) - left,
        "unreviewed_pictures": left,
    }


def describe_videos(pictures: Sequence[StoredPicture]) -> list[dict[str, Any]]:
    """Return the videos with their tracks: name, frames, size, and of each track where it is seen.

    Args:
        images: All images, frames in their order.
    """
    frames: dict[str, list[StoredPicture]] = {}
    for picture in pictures:
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


def row_entries(
    rows: Sequence[Row], picture: StoredPicture, words: Vocabulary, masks: MaskForm
) -> list[dict[str, Any]]:
    """Return object rows of an image as entries of an answer.

    Args:
        rows: The rows.
        image: The image.
        words: All classes of the store.
        masks: Form of the masks.
    """
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
