"""Masks as polygons that give them back: parts and holes kept, no point moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

Loop = NDArray[np.float64]  # (n, 2) x, y


def mask_outlines(mask: NDArray[np.bool_], along: Literal["edges", "pixels"]) -> list[list[Loop]]:
    """The parts of a mask `(H, W) bool`, each its outer loop and then those of its holes.

    Two conventions are about. pycocotools (COCO, CVAT) takes coordinates as lines between pixels: there loops
    go along `edges`. OpenCV and Pillow (YOLO and LabelMe tools) fill from the middle of a pixel to the
    middle of another, both included: there loops go through the outermost `pixels`. Either way the mask
    comes back as it was.
    """
    import cv2

    x1, y1, x2, y2 = masks_to_xyxy(mask[None])[0].astype(int)
    if x2 <= x1:
        return []
    crop = mask[y1:y2, x1:x2].astype(np.uint8)
    if along == "edges":
        crop = crop.repeat(2, 0).repeat(2, 1)
    found, tree = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    loops = [contour[:, 0].astype(np.float64) for contour in found]
    if along == "edges":
        # In a picture twice as large a left or upper border lies on even, a right or lower one on odd numbers.
        loops = [_distinct(np.ceil(loop / 2)) for loop in loops]
    loops = [loop + (x1, y1) for loop in loops]
    parts = [
        [i, *(j for j, node in enumerate(tree[0]) if node[3] == i)] for i, node in enumerate(tree[0]) if node[3] < 0
    ]
    return [[loops[i] for i in part] for part in parts]


def join_loops(parts: Sequence[Sequence[Loop]]) -> Loop:
    """All loops as one polygon, holes and separate parts tied in by lines that go there and back.

    For formats that have one polygon an object; filled by parity it is the same area. As ultralytics'
    `merge_multi_segment`, each tied where it comes nearest to what there is.
    """
    from scipy.spatial import cKDTree

    whole, *rest = sorted((loop for part in parts for loop in part), key=len, reverse=True)
    for loop in rest:
        distance, nearest = cKDTree(whole).query(loop)
        start = int(distance.argmin())
        tie = int(nearest[start])
        turned = np.concatenate([loop[start:], loop[: start + 1]])
        whole = np.concatenate([whole[: tie + 1], turned, whole[tie:]])
    return whole


def _distinct(loop: Loop) -> Loop:
    """Without points that repeat the one before or lie on the line between their neighbours."""
    loop = loop[(loop != np.roll(loop, 1, 0)).any(1)]
    before, after = loop - np.roll(loop, 1, 0), np.roll(loop, -1, 0) - loop
    bends = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return loop[bends] if bends.sum() >= 3 else loop


def mask_iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> NDArray[np.float64]:
    """IoU of masks `(n, H, W)` and `(m, H, W)`, `(n, m)`."""
    from pycocotools import mask as coco_mask

    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    encoded = [coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)) for masks in (a, b)]
    return np.asarray(coco_mask.iou(*encoded, [0] * len(b)))


def masks_to_xyxy(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Boxes around masks `(n, H, W)`, `(n, 4) float32`, right and bottom exclusive; zeros where empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def pack_masks(found: sv.Detections) -> sv.Detections:
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


def unpack_masks(found: sv.Detections, size_hw: tuple[int, int]) -> sv.Detections:
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


def coco_segmentation(found: sv.Detections, i: int) -> dict[str, Any] | None:
    """The mask of one of packed detections as JSON has it; None without masks."""
    if "rle" not in found.data:
        return None
    rle = found.data["rle"][i]
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def mask_area(found: sv.Detections, i: int) -> int:
    """Pixels of the mask of one of packed detections."""
    from pycocotools import mask as coco_mask

    return int(coco_mask.area(found.data["rle"][i]))


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask `(H, W) bool` as compressed COCO RLE with `counts` as text."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def encode_polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """A mask `(H, W) bool` as COCO polygons along the edges of its pixels, one a part.

    A hole is tied to its outline by a line there and back. `pycocotools` makes the same mask of them.
    """
    return [join_loops([part]).reshape(-1).tolist() for part in mask_outlines(mask, "edges")]
