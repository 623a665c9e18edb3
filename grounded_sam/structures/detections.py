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
from grounded_sam.structures.masks import (
    masks_to_xyxy,
)
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


def empty_detections(vocabulary: Vocabulary) -> sv.Detections:
    """No detections, with the columns that some would have."""
    return make_detections(np.empty((0, 4)), [], [], vocabulary, (1, 1))


def validate_detections(
    found: sv.Detections, vocabulary: Vocabulary, size_hw: tuple[int, int], stage: str
) -> sv.Detections:
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


def tracked_detections(
    tracker_id: NDArray[Any], mask: NDArray[np.bool_], confidence: NDArray[Any], mask_score: NDArray[Any]
) -> sv.Detections:
    """What a tracker gives: masks `(n, H, W)` with ids, without classes; objects without a pixel are dropped."""
    seen = mask.any((1, 2))
    return sv.Detections(
        xyxy=masks_to_xyxy(mask[seen]),
        mask=mask[seen],
        confidence=np.asarray(confidence, np.float32)[seen],
        tracker_id=np.asarray(tracker_id, np.int64)[seen],
        data={"mask_score": np.asarray(mask_score, np.float32)[seen]},
    )


def select_rows(found: sv.Detections, rows: Any) -> sv.Detections:
    """Some of the detections, by numbers or by a boolean mask, in that order."""
    return found[np.asarray(rows) if len(rows) else np.empty(0, np.intp)]  # type: ignore[return-value]


def replace_tracks(found: sv.Detections, by: sv.Detections, without: Sequence[int] = ()) -> sv.Detections:
    """Tracked detections with those of `by` instead of their own of the same ids, and without some ids."""
    assert found.tracker_id is not None and by.tracker_id is not None
    rest = select_rows(found, ~np.isin(found.tracker_id, [*by.tracker_id.tolist(), *without]))
    parts = [part for part in (rest, by) if len(part)]
    return sv.Detections.merge(parts) if parts else rest


def merge_detections(parts: Sequence[sv.Detections], vocabulary: Vocabulary) -> sv.Detections:
    """All detections of several parts; the columns of an empty result are there too."""
    filled = [part for part in parts if len(part)]
    return sv.Detections.merge(filled) if filled else empty_detections(vocabulary)
