"""Masks as polygons that give them back: parts and holes kept, no point moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from grounded_sam.detections import mask_boxes

Loop = NDArray[np.float64]  # (n, 2) x, y


def outlines(mask: NDArray[np.bool_], along: Literal["edges", "pixels"]) -> list[list[Loop]]:
    """The parts of a mask `(H, W) bool`, each its outer loop and then those of its holes.

    Two conventions are about. pycocotools (COCO, CVAT) takes coordinates as lines between pixels: there loops
    go along `edges`. OpenCV and Pillow (YOLO and LabelMe tools) fill from the middle of a pixel to the
    middle of another, both included: there loops go through the outermost `pixels`. Either way the mask
    comes back as it was.
    """
    import cv2

    x1, y1, x2, y2 = mask_boxes(mask[None])[0].astype(int)
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


def joined(parts: Sequence[Sequence[Loop]]) -> Loop:
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
