"""`supervision.Detections` as the interchange type: how it is made here and what holds of it.

xyxy                (n, 4) float32, pixels, 0 <= x1 < x2 <= W and 0 <= y1 < y2 <= H
confidence          (n,) float32, 0 to 1
class_id            (n,) int64, index into the vocabulary
mask                (n, H, W) bool, or None before a segmenter ran
data["class_name"]  (n,) str
data["mask_score"]  (n,) float32, the segmenter's own estimate of IoU, where a segmenter ran
tracker_id          (n,) int64, one per object and video, or None where nothing is tracked
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import GroundedSamError
from grounded_sam.vocabulary import Vocabulary


def make_detections(
    xyxy: Any,
    confidence: Any,
    class_id: Any,
    vocabulary: Vocabulary,
    size_hw: tuple[int, int],
    mask: NDArray[np.bool_] | None = None,
    **data: Any,
) -> sv.Detections:
    """Detections that keep to the rules of this module.

    Boxes are clipped to the image; those with nothing inside it are dropped.

    Args:
        xyxy: `(n, 4)` pixels.
        confidence: `(n,)`, 0 to 1.
        class_id: `(n,)`, index into `vocabulary.classes`.
        size_hw: height and width of the image.
        mask: `(n, H, W) bool`.
        data: more columns, each `(n, ...)`.
    """
    height, width = size_hw
    boxes = np.array(xyxy, np.float32).reshape(-1, 4)
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, height)
    ids = np.asarray(class_id, np.int64).reshape(-1)
    found = sv.Detections(
        xyxy=boxes,
        confidence=np.asarray(confidence, np.float32).reshape(-1),
        class_id=ids,
        mask=mask,
        data={"class_name": np.array(vocabulary.classes, dtype=str)[ids], **data},
    )
    sound = np.isfinite(boxes).all(1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return found if sound.all() else found[sound]  # type: ignore[return-value]


def empty(vocabulary: Vocabulary) -> sv.Detections:
    """No detections, with the columns that some would have."""
    return make_detections(np.empty((0, 4)), [], [], vocabulary, (1, 1))


def check(found: sv.Detections, vocabulary: Vocabulary, size_hw: tuple[int, int], stage: str) -> sv.Detections:
    """Hand detections through if they keep to the rules; for stages that others wrote.

    Raises:
        GroundedSamError: naming the stage, the rule, and what came.
    """
    n, (height, width) = len(found), size_hw

    def wrong(rule: str, got: object) -> GroundedSamError:
        return GroundedSamError(f"{stage}: expected {rule}, got {got}")

    if found.confidence is None or found.confidence.shape != (n,):
        raise wrong(f"confidence of shape ({n},)", None if found.confidence is None else found.confidence.shape)
    # As files and stores hold them, so that a threshold says the same of both.
    found.confidence, found.xyxy = found.confidence.astype(np.float32), found.xyxy.astype(np.float32)
    if found.class_id is None or found.class_id.shape != (n,):
        raise wrong(f"class_id of shape ({n},)", None if found.class_id is None else found.class_id.shape)
    if n and not (found.class_id.min() >= 0 and found.class_id.max() < len(vocabulary)):
        raise wrong(f"class_id from 0 to {len(vocabulary) - 1}", sorted(set(found.class_id.tolist())))
    if found.mask is not None and found.mask.shape != (n, height, width):
        raise wrong(f"masks of shape {(n, height, width)}", found.mask.shape)
    inside = (found.xyxy >= 0) & (found.xyxy <= np.array([width, height, width, height]))
    if not inside.all():
        raise wrong(f"boxes inside the {width}x{height} px image", found.xyxy[~inside.all(1)][0].tolist())
    if "class_name" not in found.data:
        found.data["class_name"] = np.array(vocabulary.classes, dtype=str)[found.class_id]
    return found


def with_masks(found: sv.Detections, mask: NDArray[np.bool_], mask_score: NDArray[np.float32]) -> sv.Detections:
    """The same detections, in the same order, with masks and their scores."""
    return sv.Detections(
        xyxy=found.xyxy,
        mask=mask,
        confidence=found.confidence,
        class_id=found.class_id,
        tracker_id=found.tracker_id,
        data={**found.data, "mask_score": mask_score},
        metadata=found.metadata,
    )


def tracked(
    tracker_id: NDArray[Any], mask: NDArray[np.bool_], confidence: NDArray[Any], mask_score: NDArray[Any]
) -> sv.Detections:
    """What a tracker gives: masks `(n, H, W)` with ids, without classes; objects without a pixel are dropped."""
    seen = mask.any((1, 2))
    return sv.Detections(
        xyxy=mask_boxes(mask[seen]),
        mask=mask[seen],
        confidence=np.asarray(confidence, np.float32)[seen],
        tracker_id=np.asarray(tracker_id, np.int64)[seen],
        data={"mask_score": np.asarray(mask_score, np.float32)[seen]},
    )


def pick(found: sv.Detections, rows: Any) -> sv.Detections:
    """Some of the detections, by numbers or by a boolean mask, in that order."""
    return found[np.asarray(rows) if len(rows) else np.empty(0, np.intp)]  # type: ignore[return-value]


def replaced(found: sv.Detections, by: sv.Detections, without: Sequence[int] = ()) -> sv.Detections:
    """Tracked detections with those of `by` instead of their own of the same ids, and without some ids."""
    assert found.tracker_id is not None and by.tracker_id is not None
    rest = pick(found, ~np.isin(found.tracker_id, [*by.tracker_id.tolist(), *without]))
    parts = [part for part in (rest, by) if len(part)]
    return sv.Detections.merge(parts) if parts else rest


def mask_boxes(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Boxes around masks `(n, H, W)`, `(n, 4) float32`, right and bottom exclusive; zeros where empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def packed(found: sv.Detections) -> sv.Detections:
    """The same with masks as compressed COCO RLE in `data["rle"]`, dicts of `size` and `counts`, instead of arrays."""
    if found.mask is None:
        return found
    from pycocotools import mask as coco_mask

    rles = coco_mask.encode(np.asfortranarray(np.asarray(found.mask).transpose(1, 2, 0), dtype=np.uint8))
    return with_rles(found, rles)


def with_rles(found: sv.Detections, rles: Sequence[Any]) -> sv.Detections:
    """Detections with masks that are RLE already, see `packed`."""
    column = np.empty(len(rles), object)
    column[:] = rles
    return sv.Detections(
        xyxy=found.xyxy,
        confidence=found.confidence,
        class_id=found.class_id,
        tracker_id=found.tracker_id,
        data={**found.data, "rle": column},
        metadata=found.metadata,
    )


def unpacked(found: sv.Detections, size_hw: tuple[int, int]) -> sv.Detections:
    """What `packed` packed."""
    if "rle" not in found.data:
        return found
    from pycocotools import mask as coco_mask

    data = {key: value for key, value in found.data.items() if key != "rle"}
    mask = np.zeros((0, *size_hw), bool)
    if len(found):
        stacked = coco_mask.decode(list(found.data["rle"]))
        mask = np.ascontiguousarray(stacked.transpose(2, 0, 1)).view(bool)
    return sv.Detections(
        xyxy=found.xyxy,
        mask=mask,
        confidence=found.confidence,
        class_id=found.class_id,
        tracker_id=found.tracker_id,
        data=data,
        metadata=found.metadata,
    )


def segmentation_of(found: sv.Detections, i: int) -> dict[str, Any] | None:
    """The mask of one of packed detections as JSON has it; None without masks."""
    if "rle" not in found.data:
        return None
    rle = found.data["rle"][i]
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def area_of(found: sv.Detections, i: int) -> int:
    """Pixels of the mask of one of packed detections."""
    from pycocotools import mask as coco_mask

    return int(coco_mask.area(found.data["rle"][i]))


def merge(parts: Sequence[sv.Detections], vocabulary: Vocabulary) -> sv.Detections:
    """All detections of several parts; the columns of an empty result are there too."""
    filled = [part for part in parts if len(part)]
    return sv.Detections.merge(filled) if filled else empty(vocabulary)
