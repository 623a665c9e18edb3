"""Write down what people decide about the objects of a store.

>>> Edit.from_json({"action": "relabel", "object_id": "aef1b2bc-0dcf242072e4", "class": "truck"}).class_name
'truck'
"""

from __future__ import annotations

import datetime
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from filelock import FileLock

from grounded_sam.errors import ConfigError, EditError, one_line, shorten
from grounded_sam.formats.segmentations import encode_segmentation, segmentation_box, segmentation_problem
from grounded_sam.formats.store import find_store
from grounded_sam.formats.store_manifest import PartList, sequence_of
from grounded_sam.formats.store_objects import EARLIER_TRACKS, Row, owner_id
from grounded_sam.formats.store_parts import write_part
from grounded_sam.formats.store_rows import StoreRows
from grounded_sam.formats.store_schema import SCHEMA
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.output.paths import OutputPath, RemotePath
from grounded_sam.output.remote_claim import RemoteLock
from grounded_sam.structures.masks import encode_rle

#: What can be done with an object.
OBJECT_ACTIONS = ("accept", "reject", "relabel", "mask", "box", "reset")
#: What can be done with a track of a video.
TRACK_ACTIONS = ("merge_tracks", "split_track", "relabel_track", "accept_track", "delete_track")
ACTIONS = (*OBJECT_ACTIONS, "add", *TRACK_ACTIONS)
#: Columns that a decision has in common with the image row of its object.
_IMAGE_COLUMNS = ("file", "path", "digest", "video", "take", "frame", "time_s", "width", "height")
#: Longest name of an author or a class.
MAX_TEXT = 200
#: Seconds to wait for another process that writes decisions.
LOCK_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What somebody decided about an object or a track.

    Attributes:
        action: One of `ACTIONS`: `accept`, `reject`, `relabel`, `mask` (another mask, and its box), `box` (another box,
            which is its mask too), `reset` (take back what was decided), `add` (an object that was missed), and for
            tracks of videos `merge_tracks`, `split_track`, `relabel_track`, `accept_track`, `delete_track`.
        object_id: Object that an action on objects is about.
        class_name: New class of `relabel`, `relabel_track` and `add`.
        mask: Mask of `mask` and `add`: `(H, W) bool`, or as COCO has them, RLE or polygons, of the size of the image.
        box: Box of `box` and `add`, xyxy in pixels, inside the image.
        file: Name of the image or frame of `add`; name of the video of an action on tracks.
        track: Track that the action is about; of `add`, the track that the object belongs to, None for a new one.
        into: Track that `merge_tracks` adds `track` to.
        frame: Number of the first frame of the new track of `split_track`.
        looks_like: Of `reject`, what the object is instead, as a phrase; the tuner proposes it as a negative.
        new_class: Whether the class may be one that the store does not have.
    """

    action: str
    object_id: str | None = None
    class_name: str | None = None
    mask: Any = None
    box: Sequence[float] | None = None
    file: str | None = None
    track: int | None = None
    into: int | None = None
    frame: int | None = None
    looks_like: str | None = None
    new_class: bool = False

    @classmethod
    def from_json(cls, value: Any) -> Edit:
        """Read an edit from a JSON object, with the attributes as keys, and `class` for `class_name`.

        Raises:
            ConfigError: If it is no object, or a key is unknown.
        """
        names = ["class" if field.name == "class_name" else field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            raise ConfigError(f"an edit must be an object with the keys {', '.join(names)}; got {shorten(value)}")
        if unknown := set(value) - set(names):
            raise ConfigError(f"an edit has no key {shorten(unknown.pop())}; the keys are {', '.join(names)}")
        if "action" not in value:
            raise ConfigError(f"an edit needs an action, one of {', '.join(ACTIONS)}")
        return cls(**{"class_name" if key == "class" else key: item for key, item in value.items()})


@dataclass(frozen=True)
class EditProblem:
    """Why an edit cannot be applied.

    Attributes:
        index: Position of the edit in its batch.
        reason: What was expected, what was given, what is available.
    """

    index: int
    reason: str


@dataclass(frozen=True)
class AppliedEdits:
    """What became of a batch of edits.

    Attributes:
        object_ids: Ids of the objects that each edit changed or added, empty for edits that were left out.
        problems: Why edits were left out.
        batch: Name of the part that was written, for `StoreEditor.undo`; None if nothing was.
    """

    object_ids: list[list[str]]
    problems: list[EditProblem]
    batch: str | None = None


class StoreEditor:
    """Apply edits to a store.

    Each batch becomes one new part, so it is applied in whole or not at all. Several processes may write into a store
    at the same time, runs too: a lock orders the batches, each of which sees those before it, and where two are about
    one object, the later one wins.

    Args:
        store: Folder of the store, or the output folder that has one; on this machine or at an address.
        max_pixels: A store with larger images is refused.
        rows: Its rows, if they are open already.

    Raises:
        ConfigError: If there is no store, or it is damaged.

    Attributes:
        folder: Folder of the store.
        rows: Its rows, with all decisions up to the last batch.
    """

    def __init__(self, store: str | OutputPath, max_pixels: int = MAX_PIXELS, rows: StoreRows | None = None) -> None:
        self.folder = find_store(store)
        self.rows = StoreRows(self.folder, max_pixels) if rows is None else rows
        self._list = PartList(self.folder)

    def apply(self, edits: Sequence[Edit], author: str = "", *, skip_invalid: bool = False) -> AppliedEdits:
        """Apply a batch of edits.

        Args:
            edits: The edits; no two of them about the same object.
            author: Who decided, for the column `author`.
            skip_invalid: Leave out edits that cannot be applied, instead of applying none.

        Returns:
            Ids of the objects, and the edits that were left out.

        Raises:
            EditError: If an edit cannot be applied, unless `skip_invalid` is set; nothing is written then.
            ConfigError: If `author` is too long, the store is damaged, or it cannot be written.
        """
        with self._locked():
            batch = _Batch(self.rows, _common_columns(author))
            applied = [batch.add(i, edit) for i, edit in enumerate(edits)]
            if batch.problems and not skip_invalid:
                raise EditError([(problem.index, problem.reason) for problem in batch.problems])
            return AppliedEdits(applied, batch.problems, self._write(batch.rows))

    def undo(self, batch: str, author: str = "") -> AppliedEdits:
        """Take a batch back: what was decided before about its objects counts again.

        That writes another batch, which can be taken back too.

        Args:
            batch: Its name, see `AppliedEdits`.
            author: Who takes it back, where nothing was decided before.

        Returns:
            Ids of the objects.

        Raises:
            EditError: If somebody decided about one of its objects since; nothing is written then.
            ConfigError: If there is no such batch, and as for `apply`.
        """
        with self._locked():
            index, common = self.rows.index, _common_columns(author)
            number = next((i for i, part in enumerate(self.rows.parts) if part.stem == batch), None)
            latest = [(id_, row) for decided in index.decisions.values() for id_, row in decided.items()]
            positions = [row for row in (*index.replaced.values(), *(row for _, row in latest)) if row.part == number]
            if not positions:
                raise ConfigError(f"the store has no batch of edits {shorten(batch)}; an edit answers with its batch")
            if len(changed := {row for _, row in latest if row.part == number}) < len(positions):
                names = [self.rows.row(row)["object_id"] for row in positions if row not in changed]
                raise EditError([(0, f"somebody decided about object {name} since") for name in names])
            rows = []
            for position in sorted(changed, key=lambda row: row.row):
                row, before = self.rows.row(position), index.replaced.get(position)
                taken_back = {"status": "predicted", "class": row["predicted_class"] or row["class"], **common}
                rows.append({**row, **taken_back} if before is None else self.rows.row(before))
            return AppliedEdits([[row["object_id"] for row in rows]], [], self._write(rows))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other writers of decisions out, and see theirs."""
        lock = self.folder / ".edits.lock"
        purpose = f"another process is writing decisions into {self.folder}"
        try:
            with (
                RemoteLock(lock, purpose, timeout_s=LOCK_SECONDS)
                if isinstance(lock, RemotePath)
                else FileLock(lock, timeout=LOCK_SECONDS)
            ):
                self.rows.refresh()
                yield
        except OSError as error:
            raise ConfigError(f"cannot write into {self.folder}: {error.strerror or error}") from error

    def _write(self, rows: list[Row]) -> str | None:
        """Write decisions as a new part, and return its name; None if there are none."""
        if not rows:
            return None
        sequence = max(map(sequence_of, self.rows.parts), default=0) + 1
        part = write_part(self.folder, sequence, rows, self._list)
        self.rows.refresh()
        return part.stem


def _common_columns(author: str) -> Row:
    """Return the columns that all decisions of a batch share."""
    if len(author) > MAX_TEXT or author != one_line(author):
        raise ConfigError(f"author must be one line of at most {MAX_TEXT} characters, got {shorten(author)}")
    return {"author": author, "edited_at": datetime.datetime.now(datetime.UTC).isoformat()}


class _RefusedError(Exception):
    """An edit that cannot be applied; the message says why."""


class _Batch:
    """Rows of the decisions of a batch of edits.

    Args:
        store: Rows of the store.
        common: Columns that all of them share.
    """

    def __init__(self, store: StoreRows, common: Row) -> None:
        self.store, self.rows, self.problems, self._common = store, list[Row](), list[EditProblem](), common
        self._frames: dict[str, list[tuple[Row, list[Row]]]] = {}
        self._edit_of: dict[str, int] = {}  # by object id
        self._new_tracks: dict[str, int] = {}  # highest id of a new track, by key of the video

    def add(self, index: int, edit: Edit) -> list[str]:
        """Add the rows of an edit, or a problem; return the ids of its objects."""
        actions: dict[str, Callable[[Edit], list[Row]]] = {
            **dict.fromkeys(OBJECT_ACTIONS, self._object),
            **dict.fromkeys(TRACK_ACTIONS, self._track),
            "add": self._added,
        }
        try:
            if edit.action not in actions:
                raise _RefusedError(f"action must be one of {', '.join(ACTIONS)}; got {shorten(edit.action)}")
            rows = actions[edit.action](edit)
            for row in rows:
                if (other := self._edit_of.get(row["object_id"])) is not None:
                    raise _RefusedError(f"edit {other} of the same batch is about object {row['object_id']} too")
        except _RefusedError as error:
            self.problems.append(EditProblem(index, str(error)))
            return []
        self._edit_of |= {row["object_id"]: index for row in rows}
        self.rows += rows
        return [row["object_id"] for row in rows]

    def _images(self, key: str) -> list[tuple[Row, list[Row]]]:
        """Return the rows of an image, or of the frames of a video, read once for the batch."""
        if key not in self._frames:
            self._frames[key] = list(self.store.rows(key))
        return self._frames[key]

    def _find(self, edit: Edit) -> tuple[Row, Row]:
        """Return the image row and the row of the object that an edit is about."""
        if not isinstance(edit.object_id, str) or not edit.object_id:
            raise _RefusedError(f"{edit.action} needs object_id")
        keys = self.store.keys_of_owner(edit.object_id.partition("-")[0])
        for key in keys:
            for image, objects in self._images(key):
                for row in objects:
                    if row["object_id"] == edit.object_id:
                        return image, row
        known = [row["object_id"] for key in keys for _, objects in self._images(key) for row in objects]
        hint = f"; {self.store.name(keys[0])} has {', '.join(known[:5]) or 'none'}" if keys else ""
        more = f" and {len(known) - 5:,} more" if len(known) > 5 else ""
        raise _RefusedError(f"the store has no object {shorten(edit.object_id)}{hint}{more}")

    def _decision(self, image: Row, row: Row, status: str, **changes: Any) -> Row:
        """Return the row of a decision about an object."""
        predicted = row["class"] if row["status"] == "predicted" else row["predicted_class"]
        decision = {**dict.fromkeys(SCHEMA.names), **row, **{name: image[name] for name in _IMAGE_COLUMNS}}
        decision |= {"kind": "edit", "objects": None, "class_id": None, "reason": None, "status": status}
        decision |= {"predicted_class": predicted, **self._common, **changes}
        if row["fingerprint"] != image["fingerprint"] and (row["tracker_id"] or 0) >= EARLIER_TRACKS:
            decision["tracker_id"] -= EARLIER_TRACKS  # it is added again when the row is read
        return decision

    def _object(self, edit: Edit) -> list[Row]:
        """Return the decision about one object."""
        image, row = self._find(edit)
        if edit.action == "accept":
            return [self._decision(image, row, "accepted")]
        if edit.action == "reject":
            looks_like = None if edit.looks_like is None else _checked_text("looks_like", edit.looks_like)
            return [self._decision(image, row, "rejected", reason=looks_like)]
        if edit.action == "relabel":
            return [self._decision(image, row, "edited", **{"class": self._class(edit)})]
        if edit.action == "reset":
            if row["status"] == "predicted":
                raise _RefusedError(f"nothing was decided about object {edit.object_id}")
            return [self._decision(image, row, "predicted", **{"class": row["predicted_class"] or row["class"]})]
        return [self._decision(image, row, "edited", **self._region(edit, image, needs=edit.action))]

    def _class(self, edit: Edit) -> str:
        """Return the class of an edit, as the store spells it."""
        name = _checked_text("class", edit.class_name)
        vocabulary = self.store.vocabulary
        if (i := vocabulary.index(name)) is not None:
            return vocabulary.classes[i]
        if not edit.new_class:
            raise _RefusedError(
                f"the store has no class {name!r}; its classes are {', '.join(map(repr, vocabulary.classes))}; "
                "new_class=true adds one"
            )
        return name

    def _region(self, edit: Edit, image: Row, needs: str) -> Row:
        """Return the columns of the mask or box of an edit.

        Args:
            edit: The edit.
            image: Row of the image.
            needs: `mask`, `box` or `add`, which takes either.
        """
        size_hw = (image["height"], image["width"])
        if edit.mask is not None and needs != "box":
            return _mask_columns(edit.mask, size_hw)
        if edit.box is not None and needs != "mask":
            x1, y1, x2, y2 = _checked_box(edit.box, size_hw)
            return {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "counts": None, "area": None, "mask_score": None}
        raise _RefusedError(f"{edit.action} needs {'a mask or a box' if needs == 'add' else f'a {needs}'}")

    def _added(self, edit: Edit) -> list[Row]:
        """Return the row of an object that was missed."""
        key, image = self._image(_checked_text("file", edit.file, longest=4096))
        owner, _ = self.store.owner_and_name(key, image)
        track = None
        if image["video"] is not None:
            track = self._new_track(key) if edit.track is None else _checked_int("track", edit.track)
        row = {**dict.fromkeys(SCHEMA.names), "status": "added", "score": 1.0, "fingerprint": image["fingerprint"]}
        row |= {"object_id": f"{owner_id(owner)}-{uuid.uuid4().hex[:12]}", "tracker_id": track}
        region = self._region(edit, image, needs="add")
        return [self._decision(image, row, "added", **{"class": self._class(edit)}, **region)]

    def _image(self, name: str) -> tuple[str, Row]:
        """Return the key and the row of an image or frame."""
        if (key := self.store.key_of_name(name)) is not None and key in self.store.index.images:
            return key, self._images(key)[0][0]
        parts = name.split("/")
        for end in range(len(parts) - 1, 0, -1):
            if (key := self.store.key_of_name("/".join(parts[:end]))) in self.store.index.videos:
                for image, _ in self._images(str(key)):
                    if self.store.owner_and_name(str(key), image)[1] == name:
                        return str(key), image
        raise _RefusedError(f"the store has no image or frame {shorten(name)}; {self._available()}")

    def _available(self, videos: bool = False) -> str:
        """Return the first names of the store, for messages."""
        index = self.store.index
        names = [self.store.name(key) for key in index.sorted_keys() if key in index.videos or not videos]
        kind = "videos" if videos else "images and videos"
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        return f"its {kind} are {', '.join(names[:5]) or 'none'}{more}"

    def _new_track(self, key: str) -> int:
        """Return an id that no track of a video has."""
        ids = [row["tracker_id"] or 0 for _, objects in self._images(key) for row in objects]
        self._new_tracks[key] = max([self._new_tracks.get(key, 0), *(i for i in ids if i < EARLIER_TRACKS)]) + 1
        return self._new_tracks[key]

    def _track(self, edit: Edit) -> list[Row]:
        """Return the decisions about all objects of a track."""
        name, track = _checked_text("file", edit.file, longest=4096), _checked_int("track", edit.track)
        key = self.store.key_of_name(name)
        if key is None or key not in self.store.index.videos:
            raise _RefusedError(f"the store has no video {shorten(name)}; {self._available(videos=True)}")
        members = self._members(key, name, track)
        if edit.action == "merge_tracks":
            return self._merged(key, name, track, _checked_int("into", edit.into), members)
        if edit.action == "split_track":
            frame = _checked_int("frame", edit.frame)
            tail = [(image, row) for image, row in members if image["frame"] >= frame]
            if not 0 < len(tail) < len(members):
                first, last = members[0][0]["frame"], members[-1][0]["frame"]
                raise _RefusedError(
                    f"track {track} is seen from frame {first} to {last}, so it cannot be split at {frame}"
                )
            new = self._new_track(key)
            return [self._moved(image, row, new) for image, row in tail]
        if edit.action == "relabel_track":
            changes = {"class": self._class(edit)}
            return [self._decision(image, row, "edited", **changes) for image, row in members]
        status = {"accept_track": "accepted", "delete_track": "rejected"}[edit.action]
        return [self._decision(image, row, status) for image, row in members]

    def _members(self, key: str, name: str, track: int) -> list[tuple[Row, Row]]:
        """Return the objects of a track, each with the row of its frame."""
        visible = list(self._visible(key))
        members = [(image, row) for image, row in visible if row["tracker_id"] == track]
        if not members:
            ids = sorted({row["tracker_id"] for _, row in visible if row["tracker_id"] is not None})
            more = f" and {len(ids) - 20:,} more" if len(ids) > 20 else ""
            raise _RefusedError(f"{name} has no track {track}; its tracks are {', '.join(map(str, ids[:20]))}{more}")
        return members

    def _visible(self, key: str) -> Iterator[tuple[Row, Row]]:
        """Yield the objects of a video that nobody rejected, each with the row of its frame."""
        for image, objects in self._images(key):
            yield from ((image, row) for row in objects if row["status"] != "rejected")

    def _moved(self, image: Row, row: Row, track: int, **changes: Any) -> Row:
        """Return the decision that an object belongs to another track."""
        is_earlier = row["fingerprint"] != image["fingerprint"] and row["tracker_id"] >= EARLIER_TRACKS
        decision = self._decision(image, row, "edited", **changes)
        return {**decision, "tracker_id": track - EARLIER_TRACKS if is_earlier else track}

    def _merged(self, key: str, name: str, track: int, into: int, members: list[tuple[Row, Row]]) -> list[Row]:
        """Return the decisions that the objects of a track belong to another one, and have its class."""
        if track == into:
            raise _RefusedError(f"track {track} cannot be merged into itself")
        target = self._members(key, name, into)
        both = {image["frame"] for image, _ in members} & {image["frame"] for image, _ in target}
        if both:
            raise _RefusedError(
                f"tracks {track} and {into} are both seen in {len(both)} frames, such as {min(both)}; "
                "delete or split one of them there"
            )
        class_name = target[0][1]["class"]
        return [self._moved(image, row, into, **{"class": class_name}) for image, row in members]


def _checked_text(key: str, value: Any, longest: int = MAX_TEXT) -> str:
    """Check a name, and return it without spaces around it."""
    if not isinstance(value, str) or not value.strip():
        raise _RefusedError(f"{key} must be a text, got {shorten(value)}")
    text = value.strip()
    if len(text) > longest or text != one_line(text) or any("\ud800" <= char <= "\udfff" for char in text):
        raise _RefusedError(f"{key} must be one line of at most {longest} characters, got {shorten(text)}")
    return text


def _checked_int(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _RefusedError(f"{key} must be a whole number, got {shorten(value)}")
    return value


def _checked_box(box: Any, size_hw: tuple[int, int]) -> list[float]:
    """Check that a box has an area and is inside its image."""
    height, width = size_hw
    try:
        values = [float(value) for value in box]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise _RefusedError(f"box must be four numbers, x1, y1, x2, y2; got {shorten(box)}")
    x1, y1, x2, y2 = values
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise _RefusedError(f"the box {values} must have an area and be inside the {width}x{height} px image")
    return values


def _mask_columns(mask: Any, size_hw: tuple[int, int]) -> Row:
    """Check a mask, and return the columns of its pixels and box."""
    height, width = size_hw
    segmentation = mask
    if isinstance(mask, np.ndarray):
        if mask.shape != size_hw or mask.dtype not in (np.bool_, np.uint8):
            raise _RefusedError(
                f"the mask must be bool or uint8 of shape ({height}, {width}), got {mask.dtype} {mask.shape}"
            )
        segmentation = encode_rle(mask.astype(bool))
    elif isinstance(mask, Mapping) and isinstance(mask.get("counts"), bytes):
        segmentation = {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii", "replace")}
    if (problem := segmentation_problem(segmentation, size_hw)) is not None:
        raise _RefusedError(f"the mask cannot be used: {problem}")
    rle = encode_segmentation(segmentation, size_hw)
    x, y, box_width, box_height = segmentation_box(segmentation, size_hw)
    if not box_width or not box_height:
        raise _RefusedError("the mask is empty; reject the object instead")
    from pycocotools import mask as coco_mask

    columns = {"counts": rle["counts"].decode("ascii"), "area": int(coco_mask.area(rle)), "mask_score": None}
    return {**columns, "x1": x, "y1": y, "x2": x + box_width, "y2": y + box_height}
