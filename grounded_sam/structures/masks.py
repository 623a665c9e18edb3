"""Masks as arrays, as COCO run-length encoding (RLE) and as polygons, and their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

#: Vertices of a closed polygon, `(n, 2)` x, y.
Loop = NDArray[np.float64]


# Boxes and IoU


def masks_to_xyxy(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Compute the boxes around masks.

    Args:
        masks: `(n, H, W) bool`.

    Returns:
        `(n, 4) float32` pixels, right and bottom exclusive; zeros where a mask is empty.

    >>> masks = np.zeros((1, 4, 6), bool)
    >>> masks[0, 1:3, 2:5] = True
    >>> masks_to_xyxy(masks).tolist()
    [[2.0, 1.0, 5.0, 3.0]]
    """
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def mask_iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Compute the IoU of each pair of masks.

    Args:
        a: `(n, H, W) bool`.
        b: `(m, H, W) bool`.

    Returns:
        `(n, m)`, 0 to 1.

    >>> masks = np.array([[[True, True]], [[True, False]]])
    >>> mask_iou(masks, masks).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    from pycocotools import mask as coco_mask

    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    return np.asarray(coco_mask.iou(_encode(a), _encode(b), [0] * len(b)))


# Run-length encoding


def _encode(masks: NDArray[Any]) -> list[dict[str, Any]]:
    """Encode masks `(n, H, W)` as RLE with `counts` as bytes.

    Equals `pycocotools.mask.encode`, but looks only at the columns that a mask covers.
    """
    from pycocotools import mask as coco_mask

    height, width = masks.shape[1:]
    rles = []
    for mask in masks:
        columns = np.flatnonzero(mask.any(0))
        first, last = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        pixels = np.ascontiguousarray(mask[:, first:last].T, bool).ravel()  # runs go down the columns
        is_edge = np.concatenate([pixels[:1], pixels[1:] != pixels[:-1], pixels[-1:]])
        edges = np.flatnonzero(is_edge) + first * height
        counts = np.diff(edges, prepend=0, append=height * width)
        if counts[-1] == 0 and len(counts) > 1:
            counts = counts[:-1]
        rles.append(coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width))
    return rles


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encode a mask as compressed COCO RLE, for JSON.

    Args:
        mask: `(H, W) bool`.

    Returns:
        `size` (height and width) and `counts`, a string.

    >>> encode_rle(np.ones((2, 3), bool))
    {'size': [2, 3], 'counts': '06'}
    """
    return _to_json(_encode(mask[None])[0])


def _to_json(rle: dict[str, Any]) -> dict[str, Any]:
    """Convert an RLE of pycocotools to one for JSON, whose `counts` are a string."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def pack_masks(detections: sv.Detections) -> sv.Detections:
    """Replace mask arrays by compressed COCO RLE, which takes a fraction of the memory.

    Returns:
        Detections with `data["rle"]`, dicts of `size` and `counts` (bytes), and `mask` None; the same detections if
        they have no mask arrays.
    """
    if detections.mask is None:
        return detections
    return with_rles(detections, _encode(np.asarray(detections.mask)))


def unpack_masks(detections: sv.Detections, size_hw: tuple[int, int]) -> sv.Detections:
    """Replace RLE by mask arrays; the inverse of `pack_masks`.

    Args:
        detections: Detections with `data["rle"]`; others are returned as they are.
        size_hw: Height and width of the image.

    Returns:
        Detections with `mask (n, H, W) bool`.

    >>> masks = np.eye(3, dtype=bool)[None]
    >>> detections = sv.Detections(xyxy=masks_to_xyxy(masks), mask=masks)
    >>> bool((unpack_masks(pack_masks(detections), (3, 3)).mask == masks).all())
    True
    """
    if "rle" not in detections.data:
        return detections
    from pycocotools import mask as coco_mask

    mask = np.zeros((0, *size_hw), bool)
    if len(detections):
        stacked = coco_mask.decode(list(detections.data["rle"]))
        mask = np.ascontiguousarray(stacked.transpose(2, 0, 1)).view(bool)
    data = {key: value for key, value in detections.data.items() if key != "rle"}
    return replace_masks(detections, mask, data)


def with_rles(detections: sv.Detections, rles: Sequence[Any]) -> sv.Detections:
    """Set masks that are encoded already, as `pack_masks` returns them.

    Args:
        detections: `n` detections.
        rles: `n` dicts of `size` and `counts` (bytes).
    """
    column = np.empty(len(rles), object)
    column[:] = rles
    return replace_masks(detections, None, {**detections.data, "rle": column})


def replace_masks(detections: sv.Detections, mask: NDArray[np.bool_] | None, data: dict[str, Any]) -> sv.Detections:
    """Copy detections with other masks and columns.

    Args:
        detections: `n` detections.
        mask: `(n, H, W) bool`, or None.
        data: Columns that replace `detections.data`, each `(n, ...)`.
    """
    return sv.Detections(
        xyxy=detections.xyxy,
        mask=mask,
        confidence=detections.confidence,
        class_id=detections.class_id,
        tracker_id=detections.tracker_id,
        data=data,
        metadata=detections.metadata,
    )


def coco_segmentation(detections: sv.Detections, i: int) -> dict[str, Any] | None:
    """Return the mask of one detection as COCO RLE for JSON.

    Args:
        detections: Detections from `pack_masks`.
        i: Index of the detection.

    Returns:
        `size` and `counts` (a string); None without masks.
    """
    return _to_json(detections.data["rle"][i]) if "rle" in detections.data else None


def mask_area(detections: sv.Detections, i: int) -> int:
    """Return the number of pixels of the mask of one detection.

    Args:
        detections: Detections from `pack_masks`.
        i: Index of the detection.
    """
    from pycocotools import mask as coco_mask

    return int(coco_mask.area(detections.data["rle"][i]))


# Polygons


def mask_outlines(
    mask: NDArray[np.bool_], along: Literal["edges", "pixels"], tolerance: float = 0.0
) -> list[list[Loop]]:
    """Trace the outlines of a mask; without a tolerance, filling them gives exactly the mask again.

    There are two conventions. pycocotools (COCO, CVAT) takes coordinates as lines between pixels: its outlines run
    along the `edges` of pixels. OpenCV and Pillow (YOLO and LabelMe tools) fill from the center of one pixel to the
    center of another, both included: their outlines run through the outermost `pixels`.

    Args:
        mask: `(H, W) bool`.
        along: Convention of the program that will fill the outlines.
        tolerance: Largest distance in pixels of a simplified outline from the exact one.

    Returns:
        For each connected part its outer loop, followed by those of its holes; empty for an empty mask.

    >>> mask_outlines(np.ones((2, 3), bool), "pixels")[0][0].tolist()
    [[0.0, 0.0], [0.0, 1.0], [2.0, 1.0], [2.0, 0.0]]
    """
    import cv2

    x1, y1, x2, y2 = masks_to_xyxy(mask[None])[0].astype(int)
    if x2 <= x1:
        return []
    crop = mask[y1:y2, x1:x2].astype(np.uint8)
    if along == "edges":
        crop = crop.repeat(2, 0).repeat(2, 1)
    contours, hierarchy = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    loops = [contour[:, 0].astype(np.float64) for contour in contours]
    if along == "edges":
        # In an image twice as large, left and upper borders lie on even numbers, right and lower ones on odd numbers.
        loops = [_simplify(np.ceil(loop / 2)) for loop in loops]
    if tolerance > 0:
        loops = [_approximate(loop, tolerance) for loop in loops]
    loops = [loop + (x1, y1) for loop in loops]
    parents = [node[3] for node in hierarchy[0]]  # -1 for outer loops
    parts = [
        [i, *(j for j, parent in enumerate(parents) if parent == i)]
        for i, parent_of_i in enumerate(parents)
        if parent_of_i < 0
    ]
    return [[loops[i] for i in part] for part in parts]


def join_loops(parts: Sequence[Sequence[Loop]]) -> Loop:
    """Join loops to one polygon, with bridges traversed in both directions.

    For formats with one polygon per object; filled by the even-odd rule it covers the same area. Like ultralytics'
    `merge_multi_segment`, but each loop is connected where it is nearest to the polygon so far.

    Args:
        parts: Parts of a mask, from `mask_outlines`.

    Returns:
        `(n, 2)` x, y.
    """
    from scipy.spatial import cKDTree

    polygon, *others = sorted((loop for part in parts for loop in part), key=len, reverse=True)
    for loop in others:
        distances, nearest = cKDTree(polygon).query(loop)
        start = int(distances.argmin())
        vertex = int(nearest[start])
        rotated = np.concatenate([loop[start:], loop[: start + 1]])
        polygon = np.concatenate([polygon[: vertex + 1], rotated, polygon[vertex:]])
    return polygon


def _approximate(loop: Loop, tolerance: float) -> Loop:
    """Simplify a loop with the algorithm of Douglas and Peucker, unless fewer than three points would be left."""
    import cv2

    simplified = cv2.approxPolyDP(loop.astype(np.float32), tolerance, closed=True)[:, 0].astype(np.float64)
    return simplified if len(simplified) >= 3 else loop


def _simplify(loop: Loop) -> Loop:
    """Remove vertices that repeat the one before, or lie on the line between their neighbors."""
    loop = loop[(loop != np.roll(loop, 1, 0)).any(1)]
    before, after = loop - np.roll(loop, 1, 0), np.roll(loop, -1, 0) - loop
    is_corner = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return loop[is_corner] if is_corner.sum() >= 3 else loop


def encode_polygons(mask: NDArray[np.bool_], tolerance: float = 0.0) -> list[list[float]]:
    """Convert a mask to COCO polygons along the edges of its pixels, from which pycocotools makes the same mask.

    Args:
        mask: `(H, W) bool`.
        tolerance: Largest distance in pixels of simplified polygons from the exact ones.

    Returns:
        One polygon per connected part, `[x1, y1, x2, y2, ...]`; bridges connect holes to the outline, see `join_loops`.

    >>> encode_polygons(np.ones((2, 3), bool))
    [[0.0, 0.0, 0.0, 2.0, 3.0, 2.0, 3.0, 0.0]]
    """
    return [join_loops([part]).reshape(-1).tolist() for part in mask_outlines(mask, "edges", tolerance)]
