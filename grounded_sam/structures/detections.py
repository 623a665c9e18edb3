"""`supervision.Detections` as the interchange type between stages: how it is made, and its rules.

| | |
|---|---|
| `xyxy` | (n, 4) float32, pixels, 0 <= x1 < x2 <= W and 0 <= y1 < y2 <= H |
| `confidence` | (n,) float32, 0 to 1 |
| `class_id` | (n,) int64, index into the vocabulary |
| `mask` | (n, H, W) bool; None before segmentation, without a segmenter, and where masks are packed |
| `data["rle"]` | (n,) object, dicts `{size: [H, W], counts: bytes}` of COCO RLE; only where masks are packed |
| `data["class_name"]` | (n,) str |
| `data["mask_score"]` | (n,) float32, the segmenter's own estimate of IoU, after segmentation |
| `data["verify_score"]` | (n,) float32, 0 to 1, how well the object fits its phrase, after verification |
| `data["calibrated_score"]` | (n,) float32, 0 to 1, probability that the detection is right, after verification |
| `metadata["presence"]` | probability by class name, 0 to 1, that the image shows one at all; classes that were not \
detected are missing, and without a model that estimates it so is the key |
| `tracker_id` | (n,) int64, one per object and video, or None without tracking |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import StageError
from grounded_sam.structures.masks import coco_segmentation, mask_area, masks_to_xyxy, replace_masks
from grounded_sam.structures.vocabulary import Vocabulary


def make_detections(
    xyxy: Any,
    confidence: Any,
    class_id: Any,
    vocabulary: Vocabulary,
    size_hw: tuple[int, int],
    mask: NDArray[np.bool_] | None = None,
    **data: Any,
) -> sv.Detections:
    """Make detections that follow the rules of this module.

    Boxes are clipped to the image; those outside of it, empty or not finite are dropped.

    Args:
        xyxy: `(n, 4)` pixels.
        confidence: `(n,)`, 0 to 1.
        class_id: `(n,)`, index into `vocabulary.classes`.
        vocabulary: Classes.
        size_hw: Height and width of the image.
        mask: `(n, H, W) bool`.
        data: More columns, each `(n, ...)`.

    >>> words = Vocabulary.parse(["car"])
    >>> make_detections([[-5, 0, 5, 9], [20, 20, 30, 30]], [0.9, 0.8], [0, 0], words, (10, 10)).xyxy.tolist()
    [[0.0, 0.0, 5.0, 9.0]]
    """
    height, width = size_hw
    boxes = np.array(xyxy, np.float32).reshape(-1, 4)
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, height)
    ids = np.asarray(class_id, np.int64).reshape(-1)
    detections = sv.Detections(
        xyxy=boxes,
        confidence=np.asarray(confidence, np.float32).reshape(-1),
        class_id=ids,
        mask=mask,
        data={"class_name": np.array(vocabulary.classes, dtype=str)[ids], **data},
    )
    valid = np.isfinite(boxes).all(1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return detections if valid.all() else detections[valid]  # type: ignore[return-value]


def empty_detections(vocabulary: Vocabulary) -> sv.Detections:
    """Return empty detections with the usual columns."""
    return make_detections(np.empty((0, 4)), [], [], vocabulary, (1, 1))


def validate_detections(
    detections: sv.Detections, vocabulary: Vocabulary, size_hw: tuple[int, int], stage: str
) -> sv.Detections:
    """Check that the detections of a stage follow the rules of this module, and return them.

    Numbers are converted to 32 bits and class names added, in place.

    Args:
        detections: Detections that a stage returned.
        vocabulary: Classes that they refer to.
        size_hw: Height and width of the image.
        stage: Name of the stage, for messages.

    Raises:
        StageError: If they break a rule; the message names the stage, the rule and the value.
    """
    n, (height, width) = len(detections), size_hw

    def invalid(rule: str, got: object) -> StageError:
        return StageError(f"{stage}: expected {rule}, got {got}")

    confidence, class_id = detections.confidence, detections.class_id
    if confidence is None or confidence.shape != (n,):
        raise invalid(f"confidence of shape ({n},)", None if confidence is None else confidence.shape)
    # Files and the store hold 32 bits: a threshold then selects the same before and after.
    detections.confidence, detections.xyxy = confidence.astype(np.float32), detections.xyxy.astype(np.float32)
    if class_id is None or class_id.shape != (n,):
        raise invalid(f"class_id of shape ({n},)", None if class_id is None else class_id.shape)
    if n and not (class_id.min() >= 0 and class_id.max() < len(vocabulary)):
        raise invalid(f"class_id from 0 to {len(vocabulary) - 1}", sorted(set(class_id.tolist())))
    if detections.mask is not None and detections.mask.shape != (n, height, width):
        raise invalid(f"masks of shape {(n, height, width)}", detections.mask.shape)
    inside = (detections.xyxy >= 0) & (detections.xyxy <= np.array([width, height, width, height]))
    if not inside.all():
        raise invalid(f"boxes inside the {width}x{height} px image", detections.xyxy[~inside.all(1)][0].tolist())
    if "class_name" not in detections.data:
        detections.data["class_name"] = np.array(vocabulary.classes, dtype=str)[class_id]
    return detections


def with_masks(detections: sv.Detections, mask: NDArray[np.bool_], mask_score: NDArray[np.float32]) -> sv.Detections:
    """Add masks and their scores to detections.

    Args:
        detections: `n` detections, which are not changed.
        mask: `(n, H, W) bool`, in the same order.
        mask_score: `(n,) float32`, estimated IoU.
    """
    return replace_masks(detections, mask, {**detections.data, "mask_score": mask_score})


def tracked_detections(
    tracker_id: NDArray[Any], mask: NDArray[np.bool_], confidence: NDArray[Any], mask_score: NDArray[Any]
) -> sv.Detections:
    """Make the detections that a tracker returns: with ids and masks, without classes.

    Args:
        tracker_id: `(n,)`.
        mask: `(n, H, W) bool`; objects with an empty mask are dropped.
        confidence: `(n,)`, 0 to 1.
        mask_score: `(n,)`, estimated IoU.

    >>> masks = np.array([[[True, False]], [[False, False]]])
    >>> tracked_detections(np.array([7, 8]), masks, np.ones(2), np.ones(2)).tracker_id.tolist()
    [7]
    """
    visible = mask.any((1, 2))
    return sv.Detections(
        xyxy=masks_to_xyxy(mask[visible]),
        mask=mask[visible],
        confidence=np.asarray(confidence, np.float32)[visible],
        tracker_id=np.asarray(tracker_id, np.int64)[visible],
        data={"mask_score": np.asarray(mask_score, np.float32)[visible]},
    )


def select_rows(detections: sv.Detections, rows: Any) -> sv.Detections:
    """Select detections by indices, in that order, or by a boolean mask; also if there are none."""
    return detections[np.asarray(rows) if len(rows) else np.empty(0, np.intp)]  # type: ignore[return-value]


def replace_tracks(detections: sv.Detections, by: sv.Detections, without: Sequence[int] = ()) -> sv.Detections:
    """Replace tracks by others with the same ids, and remove some.

    Args:
        detections: Tracked detections.
        by: Tracked detections that replace those of the same `tracker_id`, or are added.
        without: Ids to remove.
    """
    assert detections.tracker_id is not None and by.tracker_id is not None
    others = select_rows(detections, ~np.isin(detections.tracker_id, [*by.tracker_id.tolist(), *without]))
    parts = [part for part in (others, by) if len(part)]
    return sv.Detections.merge(parts) if parts else others


def merge_detections(parts: Sequence[sv.Detections], vocabulary: Vocabulary) -> sv.Detections:
    """Concatenate detections; an empty result has the columns too.

    >>> len(merge_detections([], Vocabulary.parse(["car"])))
    0
    """
    filled = [part for part in parts if len(part)]
    return sv.Detections.merge(filled) if filled else empty_detections(vocabulary)


def is_crowd(detections: sv.Detections, i: int) -> bool:
    """Return whether a detection is a label of a crowd, a region of objects that were not told apart."""
    return "iscrowd" in detections.data and bool(detections.data["iscrowd"][i])


def coco_annotation(detections: sv.Detections, i: int, category_ids: Sequence[int]) -> dict[str, Any]:
    """Return a detection as an annotation of a COCO file, with its id if it comes from one.

    Args:
        detections: Detections with packed masks (see `structures.masks.pack_masks`), or without masks.
        i: Index of the detection.
        category_ids: Category id of each class.

    Returns:
        `category_id`, `bbox` (xywh in pixels), `area`, `iscrowd`, `score`, where there are any `segmentation` (RLE),
        `track_id`, `mask_score` and `verify_score`, and the other keys that a label came with.
    """
    assert detections.class_id is not None and detections.confidence is not None
    x1, y1, x2, y2 = (round(float(value), 3) for value in detections.xyxy[i])
    entry: dict[str, Any] = {
        **(detections.data["record"][i] if "record" in detections.data else {}),
        "category_id": category_ids[int(detections.class_id[i])],
        "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
        "area": round((x2 - x1) * (y2 - y1), 3),
        "iscrowd": int(is_crowd(detections, i)),
        "score": round(float(detections.confidence[i]), 6),
    }
    if "rle" in detections.data:
        entry |= {"area": mask_area(detections, i), "segmentation": coco_segmentation(detections, i)}
    if detections.tracker_id is not None:
        entry["track_id"] = int(detections.tracker_id[i])
    for name in ("mask_score", "verify_score"):
        if name in detections.data:
            entry[name] = round(float(detections.data[name][i]), 6)
    return entry
