"""Objects of a store: their ids, what people decided about them, and their form as rows and as detections."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.structures.detections import empty_detections, is_crowd
from grounded_sam.structures.masks import mask_area, with_rles
from grounded_sam.structures.vocabulary import Vocabulary, name_key

#: A row of a part file.
Row = dict[str, Any]
#: IoU from which a prediction of a run with other settings is the object that somebody decided about.
SAME_OBJECT_IOU = 0.5
#: Added to the ids of decided tracks in a video that was processed again, so that they are not those of other tracks.
EARLIER_TRACKS = 1_000_000


def owner_id(name: str) -> str:
    """Return the first part of the ids of all objects in an image or video, 8 hexadecimal digits.

    Args:
        name: Name of the image or video in the store.

    >>> owner_id("street.jpg")
    'aef1b2bc'
    """
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def object_ids(owner: str, name: str, objects: Sequence[tuple[str, Sequence[float], int | None]]) -> list[str]:
    """Return ids for the objects that a run found in an image or frame, from what they are.

    The same detection gets the same id in every run: it is a hash of the names of file and class, the box to a
    hundredth of a pixel, the track, and the position among objects that agree in all of these. Scores and settings do
    not enter.

    Args:
        owner: Name of the image, or of the video.
        name: Name of the image, or of the frame.
        objects: Class, box (xyxy in pixels) and track of each object.

    Returns:
        Ids, no two of a store the same.

    >>> object_ids("street.jpg", "street.jpg", [("car", [0, 0, 9, 9], None)])
    ['aef1b2bc-0dcf242072e4']
    """
    seen: Counter[str] = Counter()
    ids = []
    for class_name, box, track in objects:
        content = json.dumps([name, class_name, [f"{value:.2f}" for value in box], track])
        digest = hashlib.sha256(f"{content}#{seen[content]}".encode()).hexdigest()
        seen[content] += 1
        ids.append(f"{owner_id(owner)}-{digest[:12]}")
    return ids


def with_object_ids(rows: Sequence[Row], owner: str, name: str) -> list[Row]:
    """Return the object rows of an image with ids and statuses, which stores of schema version 1 lack.

    Args:
        rows: All object rows of the image or frame, in their order.
        owner: Name of the image, or of the video.
        name: Name of the image, or of the frame.
    """
    if all(row["object_id"] is not None for row in rows):
        return [row if row["status"] else {**row, "status": "predicted"} for row in rows]
    ids = object_ids(owner, name, [(row["class"], box_of(row), row["tracker_id"]) for row in rows])
    return [
        {**row, "object_id": row["object_id"] or number, "status": row["status"] or "predicted"}
        for row, number in zip(rows, ids, strict=True)
    ]


def box_of(row: Mapping[str, Any]) -> list[float]:
    """Return the box of an object row, xyxy in pixels."""
    return [row["x1"], row["y1"], row["x2"], row["y2"]]


def row_overlaps(rows: Sequence[Row], others: Sequence[Row], size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Compute the IoU of the objects of two lists of rows, of masks if all have one, else of boxes.

    Args:
        rows: `n` object rows.
        others: `m` object rows of the same image.
        size_hw: Height and width of the image.

    Returns:
        `(n, m)`, 0 to 1.
    """
    if not rows or not others:
        return np.zeros((len(rows), len(others)))
    if all(row["counts"] is not None for row in (*rows, *others)):
        from pycocotools import mask as coco_mask

        sides = [[_rle(row["counts"], size_hw) for row in side] for side in (rows, others)]
        return np.asarray(coco_mask.iou(*sides, [0] * len(others)), np.float64)
    first, second = (np.array([box_of(row) for row in side], np.float32) for side in (rows, others))
    return np.asarray(sv.box_iou_batch(first, second), np.float64)


def merge_decisions(
    predicted: Sequence[Row], decisions: Sequence[Row], fingerprint: str | None, size_hw: tuple[int, int]
) -> list[Row]:
    """Combine what a run predicted in an image with what people decided.

    A decision replaces the prediction with its id. If its object was predicted by a run with other settings, it also
    stands for every prediction of the same class that overlaps it, and stays if there is none: so another run removes
    no object that somebody accepted, and brings none back that somebody rejected.

    Args:
        predicted: Object rows of the image, with ids.
        decisions: Rows of the latest decision about each object of the image.
        fingerprint: That of the run that predicted.
        size_hw: Height and width of the image.

    Returns:
        Rows of all objects, also of rejected ones.
    """
    decisions = [row for row in decisions if row["status"] != "predicted"]  # those were taken back
    if not decisions:
        return list(predicted)
    by_id = {row["object_id"]: row for row in decisions}
    others = [row for row in predicted if row["object_id"] not in by_id]
    earlier = [row for row in decisions if row["fingerprint"] != fingerprint]
    is_same = row_overlaps(others, earlier, size_hw) >= SAME_OBJECT_IOU
    dropped = {
        row["object_id"]
        for row, same in zip(others, is_same.tolist(), strict=True)
        if any(hit and _same_class(row, decision) for hit, decision in zip(same, earlier, strict=True))
    }
    merged = [by_id.pop(row["object_id"], row) for row in predicted if row["object_id"] not in dropped]
    for row in by_id.values():
        stale = row["fingerprint"] != fingerprint and row["tracker_id"] is not None and row["status"] != "rejected"
        merged.append({**row, "tracker_id": row["tracker_id"] + EARLIER_TRACKS} if stale else row)
    return merged


def _same_class(row: Row, decision: Row) -> bool:
    """Return whether a prediction has the class that an object has, or that it had before somebody changed it."""
    names = {decision["class"], decision["predicted_class"]} - {None}
    return name_key(row["class"]) in map(name_key, names)


def _rle(counts: str, size_hw: tuple[int, int]) -> dict[str, Any]:
    return {"size": list(size_hw), "counts": counts.encode()}


def detections_from_rows(
    rows: Sequence[Row], size_hw: tuple[int, int], vocabulary: Vocabulary, tracked: bool
) -> sv.Detections:
    """Convert object rows to detections with masks as RLE, ids and statuses.

    Args:
        rows: Object rows, with `class_id` of `vocabulary`.
        size_hw: Height and width of the image.
        vocabulary: Classes.
        tracked: Whether the image is a frame of a video.
    """
    if not rows:
        empty = empty_detections(vocabulary)
        empty.tracker_id = np.empty(0, np.int64) if tracked else None
        return empty
    ids = [row["tracker_id"] for row in rows]
    data: dict[str, Any] = {"class_name": np.array([row["class"] for row in rows], dtype=str)}
    data |= {name: np.array([row[name] for row in rows], dtype=str) for name in ("object_id", "status")}
    if any(row["record"] is not None for row in rows):
        records = [read_record(row) for row in rows]
        data["iscrowd"] = np.array([bool(record.pop("iscrowd", False)) for record in records])
        data["ignore"] = data["iscrowd"] | np.array([bool(record.get("ignore")) for record in records])
        data["record"] = np.empty(len(rows), object)
        data["record"][:] = records
    decided = [row["status"] != "predicted" for row in rows]  # a person's mask needs no estimate
    if any(row["mask_score"] is not None for row in rows) and all(
        known or row["mask_score"] is not None for row, known in zip(rows, decided, strict=True)
    ):
        scores = [1.0 if row["mask_score"] is None else row["mask_score"] for row in rows]
        data["mask_score"] = np.array(scores, np.float32)
    if any(row["verify_score"] is not None for row in rows):  # a person's object needs no verification
        scores = [1.0 if row["verify_score"] is None else row["verify_score"] for row in rows]
        data["verify_score"] = np.array(scores, np.float32)
    detections = sv.Detections(
        xyxy=np.array([box_of(row) for row in rows], np.float32),
        confidence=np.array([row["score"] for row in rows], np.float32),
        class_id=np.array([row["class_id"] for row in rows], np.int64),
        tracker_id=None if None in ids else np.array(ids, np.int64),
        data=data,
    )
    counts = [row["counts"] for row in rows]
    if None in [text for text, known in zip(counts, decided, strict=True) if not known] or set(counts) == {None}:
        return detections
    rles = [
        box_rle(box_of(row), size_hw) if text is None else _rle(text, size_hw)
        for row, text in zip(rows, counts, strict=True)
    ]
    return with_rles(detections, rles)


def in_vocabulary(rows: Sequence[Row], vocabulary: Vocabulary) -> list[Row]:
    """Return the objects of some classes, with the class ids and names of a vocabulary, without rejected ones.

    Args:
        rows: Object rows.
        vocabulary: The classes.
    """
    known = ((row, vocabulary.index(row["class"])) for row in rows if row["status"] != "rejected")
    return [{**row, "class_id": i, "class": vocabulary.classes[i]} for row, i in known if i is not None]


def box_rle(box: Sequence[float], size_hw: tuple[int, int]) -> dict[str, Any]:
    """Return the pixels of a box as RLE, for objects that somebody drew as a box among objects with masks.

    >>> box_rle([0, 0, 1, 2], (2, 2))["counts"]
    b'022'
    """
    from pycocotools import mask as coco_mask

    height, width = size_hw
    x1, y1 = (int(np.floor(value)) for value in box[:2])
    x2, y2 = (int(np.ceil(value)) for value in box[2:])
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    return dict(coco_mask.encode(mask))


def read_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the `record` of a row; empty if there is none, or it is no JSON object."""
    try:
        record = json.loads(row["record"] or "{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def read_detector_scores(row: Mapping[str, Any]) -> dict[str, float]:
    """Read the `detector_scores` of a row; empty if there are none, or they are no numbers by name."""
    try:
        scores = json.loads(row["detector_scores"] or "{}")
        return {str(name): min(max(float(score), 0.0), 1.0) for name, score in scores.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def read_presence(row: Mapping[str, Any]) -> dict[str, float] | None:
    """Read the `presence` of an image row; None if there is none, or it is no numbers by name.

    >>> read_presence({"presence": '{"car": 0.25}'})
    {'car': 0.25}
    """
    try:
        presence = json.loads(row["presence"] or "null")
        return None if presence is None else {str(k): min(max(float(v), 0.0), 1.0) for k, v in presence.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def object_rows(detections: sv.Detections) -> list[Row]:
    """Convert detections to the columns of object rows that belong to an object alone.

    Args:
        detections: With masks as RLE, or without masks.
    """
    return [_object_row(detections, i) for i in range(len(detections))]


def _object_row(detections: sv.Detections, i: int) -> Row:
    assert detections.class_id is not None and detections.confidence is not None
    columns: Row = {
        "class_id": int(detections.class_id[i]),
        "class": str(detections.data["class_name"][i]),
        "score": float(detections.confidence[i]),
        **dict(zip(("x1", "y1", "x2", "y2"), detections.xyxy[i].tolist(), strict=True)),
    }
    if "object_id" in detections.data:
        columns |= {name: str(detections.data[name][i]) for name in ("object_id", "status")}
    if "rle" in detections.data:
        counts = detections.data["rle"][i]["counts"].decode("ascii")
        columns |= {"area": mask_area(detections, i), "counts": counts}
    if "mask_score" in detections.data:
        columns["mask_score"] = float(detections.data["mask_score"][i])
    if "verify_score" in detections.data:
        columns["verify_score"] = float(detections.data["verify_score"][i])
    if "record" in detections.data:
        columns["record"] = json.dumps({**detections.data["record"][i], "iscrowd": int(is_crowd(detections, i))})
    if "detector_scores" in detections.data:
        columns["detector_scores"] = json.dumps(detections.data["detector_scores"][i])
    if detections.tracker_id is not None:
        columns["tracker_id"] = int(detections.tracker_id[i])
    return columns
