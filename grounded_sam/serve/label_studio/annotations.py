"""Annotations of Label Studio as decisions about the objects of a store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
from pycocotools import mask as coco_mask

from grounded_sam.errors import ImageError, one_line, shorten
from grounded_sam.formats.label_studio import Region, read_region
from grounded_sam.formats.label_studio_config import LabelingConfig, read_labeling_config
from grounded_sam.formats.label_studio_video import DEFAULT_FPS, TrackBoxes
from grounded_sam.formats.segmentations import is_number
from grounded_sam.formats.store import find_store
from grounded_sam.formats.store_edits import MAX_TEXT, Edit, StoreEditor
from grounded_sam.formats.store_objects import Row, box_of
from grounded_sam.serve.label_studio.bodies import WebhookBody
from grounded_sam.serve.problems import RequestError
from grounded_sam.structures.masks import encode_rle
from grounded_sam.structures.vocabulary import name_key

log = logging.getLogger(__name__)

#: IoU from which a region is an object of the store, and from which it is as it was; of the boxes of a track likewise.
SAME_IOU, UNCHANGED_IOU, UNCHANGED_BOX_IOU = 0.5, 0.97, 0.85
#: Suffixes that `sink=label_studio` gives to the ids of objects.
_SUFFIXES = ("-brush", "-polygon", "-rectangle", "-bitmask")


@dataclass(frozen=True, eq=False)
class Drawn:
    """What an annotation says about an object in an image or frame.

    Attributes:
        object_id: The object, if its id says so.
        track: Its track, likewise.
        class_name: Its class.
        region: Its mask or box.
        is_untouched: Whether it is a prediction that nobody has changed.
        threshold: IoU from which it is as it was.
        new_track: Track to add it to if the store does not have it.
    """

    object_id: str | None
    track: int | None
    class_name: str | None
    region: Region
    is_untouched: bool
    threshold: float = UNCHANGED_IOU
    new_track: int | None = None


class Annotations:
    """Takes annotations into stores.

    Args:
        stores: Folders of the stores by name.
        max_pixels: A store with larger images is refused.
    """

    def __init__(self, stores: Mapping[str, Path], max_pixels: int) -> None:
        self._stores, self._max_pixels = stores, max_pixels
        self._editors: dict[Path, StoreEditor] = {}
        self._lock = threading.Lock()

    def take(self, body: WebhookBody) -> dict[str, Any]:
        """Apply what a webhook says.

        Args:
            body: Its body.

        Returns:
            `edits`, how many were applied, and `notes`: what was not, and why. Where a region cannot be read, no object
            is rejected.

        Raises:
            RequestError: If there is no such store (404), or the body is malformed (422).
            ConfigError: If the store cannot be written.
        """
        if not body.action.startswith("ANNOTATION"):
            return {"edits": 0, "notes": []}
        if body.action == "ANNOTATIONS_DELETED":
            note = "Label Studio does not say what was in a deleted annotation; nothing is taken back"
            return {"edits": 0, "notes": [note]}
        annotations = body.annotation if isinstance(body.annotation, list) else [body.annotation]
        tasks = body.task if isinstance(body.task, list) else [body.task]
        edits, notes = 0, list[str]()
        for annotation in annotations:
            number_of = None if annotation is None else annotation.get("task")
            of_it = (task for task in tasks if task is not None and task.get("id") == number_of)
            task = next(of_it, tasks[0] if len(tasks) == 1 else None)
            if not isinstance(annotation, dict) or not isinstance(task, dict) or not isinstance(task.get("data"), dict):
                raise RequestError(422, "the webhook must send its payload: an annotation with its task")
            with self._lock:  # an editor is for one thread
                number, found = self._take(annotation, task, str((body.project or {}).get("label_config") or ""))
            edits += number
            notes += found
        return {"edits": edits, "notes": notes}

    def _take(self, annotation: Mapping[str, Any], task: Mapping[str, Any], xml: str) -> tuple[int, list[str]]:
        """Apply one annotation; return the number of edits, and what could not be applied."""
        if annotation.get("was_cancelled"):
            return 0, []  # the task was skipped
        data = task["data"]
        editor, results = self._editor(data.get("store")), annotation.get("result")
        if not isinstance(results, list) or not all(isinstance(result, Mapping) for result in results):
            raise RequestError(422, "the result of an annotation must be a list of regions")
        editor.rows.refresh()
        file = data.get("file")
        key = editor.rows.key_of_name(file) if isinstance(file, str) else None
        if key is None:
            raise RequestError(404, f"the store has no image or video {shorten(file)}, the `file` of the task")
        names = _class_names(xml)
        notes: list[str] = []
        edits: list[list[Edit]] = [[], []]
        unread = 0
        for image, rows, drawn in _frames(editor, key, results, names, data, notes):
            name = editor.rows.owner_and_name(key, image)[1]
            first, second = edits_of(rows, drawn, name, (image["height"], image["width"]))
            if unread := len(notes):  # what is missing may be what could not be read
                first = [edit for edit in first if edit.action != "reject"]
            edits[0] += first
            edits[1] += second
        if unread:
            notes.append("so nothing is rejected")
        author, count = _author(annotation), 0
        for batch in edits:
            if batch:
                applied = editor.apply(batch, author, skip_invalid=True)
                notes += [problem.reason for problem in applied.problems]
                count += len(batch) - len(applied.problems)
        return count, notes

    def _editor(self, name: Any) -> StoreEditor:
        """Return the editor of the store of a task; where the task names none, of the only one."""
        if name is None and len(self._stores) == 1:
            name = next(iter(self._stores))
        if not isinstance(name, str) or name not in self._stores:
            known = ", ".join(self._stores) or "none; see serve.stores"
            raise RequestError(404, f"the task names the store {shorten(name)}; the stores of this server are {known}")
        folder = find_store(self._stores[name])
        if folder not in self._editors:
            self._editors[folder] = StoreEditor(folder, self._max_pixels)
        return self._editors[folder]


def _class_names(xml: str) -> dict[str, str]:
    """Return the values of the labels of a config by their names in results."""
    if not xml:
        return {}
    config: LabelingConfig = read_labeling_config(xml)
    return {label.name: label.value for control in config.controls for label in control.labels}


def _author(annotation: Mapping[str, Any]) -> str:
    """Return who annotated, such as `a@b.co`; the id of the user where the name is not told."""
    name = str(annotation.get("created_username") or "").rpartition(",")[0] or annotation.get("completed_by")
    if isinstance(name, Mapping):
        name = name.get("email") or name.get("id")
    return one_line(f"Label Studio {name or ''}")[:MAX_TEXT].strip()


def _frames(
    editor: StoreEditor,
    key: str,
    results: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    data: Mapping[str, Any],
    notes: list[str],
) -> Iterator[tuple[Row, list[Row], list[Drawn]]]:
    """Yield the row of an image or of each frame, its objects, and what the annotation says about them."""
    frames = list(editor.rows.rows(key))
    if frames[0][0]["video"] is None:
        image, rows = frames[0]
        yield image, rows, _drawn_in_image(results, names, (image["height"], image["width"]), notes)
        return
    size_hw = frames[0][0]["height"], frames[0][0]["width"]
    given: Any = data.get("fps")
    fps = float(given) if is_number(given, 1e-3, 1e5) else DEFAULT_FPS
    last = max([row["tracker_id"] or 0 for _, rows in frames for row in rows], default=0)
    tracks: list[tuple[int | None, int, TrackBoxes, Mapping[str, Any]]] = []
    for result in results:
        if result.get("type") != "videorectangle":
            continue
        try:
            boxes = TrackBoxes(_value(result), size_hw)
        except ImageError as error:
            notes.append(str(error))
            continue
        number = _base_id(result).removeprefix("track-")
        last += 1
        tracks.append((int(number) if number.isdecimal() else None, last, boxes, result))
        if boxes.is_rotated:
            log.warning("the rotation of track %s is left out: boxes of a store are upright", number)
    for image, rows in frames:
        drawn = []
        for track, new, boxes, result in tracks:
            if (box := boxes.at(1 + round(image["time_s"] * fps))) is None:
                continue
            drawn.append(
                Drawn(
                    object_id=None,
                    track=track,
                    class_name=names.get(boxes.labels[0], boxes.labels[0]) if boxes.labels else None,
                    region=Region("rectangle", boxes.labels, box),
                    is_untouched=result.get("origin") == "prediction",
                    threshold=UNCHANGED_BOX_IOU,
                    new_track=new,
                )
            )
        yield image, rows, drawn


def _value(result: Mapping[str, Any]) -> Mapping[str, Any]:
    value = result.get("value")
    return value if isinstance(value, Mapping) else {}


def _base_id(result: Mapping[str, Any]) -> str:
    """Return the id of a region without what the page and `sink=label_studio` append to it."""
    text = str(result.get("id", "")).partition("#")[0]
    return next((text.removesuffix(suffix) for suffix in _SUFFIXES if text.endswith(suffix)), text)


def _drawn_in_image(
    results: Sequence[Mapping[str, Any]], names: Mapping[str, str], size_hw: tuple[int, int], notes: list[str]
) -> list[Drawn]:
    """Return what an annotation has drawn in an image; of the forms of one object, the most exact one."""
    labels_of: dict[Any, list[str]] = {}
    for result in results:
        given = _value(result).get("labels")
        if result.get("type") == "labels" and isinstance(given, list):
            labels_of[result.get("id")] = [label for label in given if isinstance(label, str)]
    drawn: dict[str, Drawn] = {}
    order = {"brush": 0, "bitmask": 0, "polygon": 1, "rectangle": 2}
    for result in results:
        try:
            region = read_region(result, size_hw)
        except ImageError as error:
            notes.append(str(error))
            continue
        if region is None:
            if str(result.get("type")) not in ("labels", "textarea", "choices", "keypointlabels"):
                notes.append(f"regions of type {shorten(result.get('type'))} are not taken into the store")
            continue
        labels = region.labels or tuple(labels_of.get(result.get("id"), ()))
        base = _base_id(result)
        new = Drawn(
            object_id=base,
            track=None,
            class_name=names.get(labels[0], labels[0]) if labels else None,
            region=region,
            is_untouched=result.get("origin") == "prediction",
        )
        if base not in drawn or order[region.kind] < order[drawn[base].region.kind]:
            drawn[base] = new
    return list(drawn.values())


def edits_of(
    rows: Sequence[Row], drawn: Sequence[Drawn], file: str, size_hw: tuple[int, int]
) -> tuple[list[Edit], list[Edit]]:
    """Return the edits after which the objects of an image are those that an annotation has drawn.

    A region is the object whose id or track it has, else the one that it overlaps most, by half or more. Objects
    without a region are rejected.

    Args:
        rows: Objects of the image or frame, also rejected ones.
        drawn: The regions.
        file: Name of the image or frame.
        size_hw: Its height and width.

    Returns:
        Edits, and those that have to come after them, since they are about the same objects.
    """
    overlaps = np.array([[_overlap(row, item.region, size_hw) for row in rows] for item in drawn])
    pairs = _matches(rows, drawn, overlaps.reshape(len(drawn), len(rows)))
    first: list[Edit] = []
    second: list[Edit] = []
    for i, item in enumerate(drawn):
        region = item.region
        shape: dict[str, Any] = {"box": region.box} if region.mask is None else {"mask": encode_rle(region.mask)}
        if i not in pairs:
            if item.class_name is not None:
                shape |= {"class_name": item.class_name, "track": item.new_track, "new_class": True}
                first.append(Edit(action="add", file=file, **shape))
            continue
        row, object_id = rows[pairs[i]], rows[pairs[i]]["object_id"]
        is_same_class = item.class_name is None or name_key(item.class_name) == name_key(row["class"])
        is_same_shape = item.is_untouched or overlaps[i, pairs[i]] >= item.threshold
        relabel = Edit(action="relabel", object_id=object_id, class_name=item.class_name, new_class=True)
        if not is_same_shape:
            first.append(Edit(action="box" if region.mask is None else "mask", object_id=object_id, **shape))
            second += [] if is_same_class else [relabel]
        elif not is_same_class:
            first.append(relabel)
        elif row["status"] in ("predicted", "rejected"):
            first.append(Edit(action="accept", object_id=object_id))
    for j, row in enumerate(rows):
        if j not in pairs.values() and row["status"] != "rejected":
            first.append(Edit(action="reject", object_id=row["object_id"]))
    return first, second


def _matches(rows: Sequence[Row], drawn: Sequence[Drawn], overlaps: Any) -> dict[int, int]:
    """Return the index of the object of each region that has one."""
    pairs: dict[int, int] = {}
    for i, item in enumerate(drawn):
        for j, row in enumerate(rows):
            has_id = item.object_id == row["object_id"] if item.track is None else item.track == row["tracker_id"]
            if has_id and j not in pairs.values():
                pairs[i] = j
                break
    order = np.argsort(-overlaps, axis=None)
    for i, j in zip(*np.unravel_index(order, overlaps.shape), strict=True) if overlaps.size else ():
        if overlaps[i, j] < SAME_IOU:
            break
        if int(i) not in pairs and int(j) not in pairs.values():
            pairs[int(i)] = int(j)
    return pairs


def _overlap(row: Row, region: Region, size_hw: tuple[int, int]) -> float:
    """Return the IoU of an object and a region: of their masks, or of their boxes where one has no mask."""
    if row["counts"] is None or region.mask is None:
        boxes = np.array([box_of(row)], np.float32), np.array([region.box], np.float32)
        return float(sv.box_iou_batch(*boxes)[0, 0])
    own = {"size": list(size_hw), "counts": row["counts"].encode()}
    return float(coco_mask.iou([own], [encode_rle(region.mask)], [0])[0, 0])
