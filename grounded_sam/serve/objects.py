"""Detections as JSON, with masks in the form that a client asks for, and masks that clients send."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.formats.segmentations import all_counts_problem
from grounded_sam.serve.problems import RequestError
from grounded_sam.structures.masks import coco_segmentation, encode_polygons, mask_area

#: Forms of a mask: COCO RLE, COCO polygons, a PNG in base64, or none at all.
MaskForm = Literal["rle", "polygon", "png", "none"]


def object_entries(detections: sv.Detections, rows: Iterable[int], masks: MaskForm) -> list[dict[str, Any]]:
    """Return detections as entries of an answer.

    Args:
        detections: Detections with masks as RLE, or without.
        rows: Which of them, in this order; their index is the `id` of the entry.
        masks: Form of the masks.

    Returns:
        `id`, `class`, `class_id`, `score`, `box` (xyxy in pixels), `area` (pixels), and where they exist `track_id`,
        `mask_score`, `verify_score`, `detector_score` (before the mask or the verifier changed it) and `mask`.
    """
    assert detections.class_id is not None and detections.confidence is not None
    entries = []
    for i in rows:
        x1, y1, x2, y2 = (round(float(value), 3) for value in detections.xyxy[i])
        has_mask = "rle" in detections.data
        entry: dict[str, Any] = {
            "id": i,
            "class": str(detections.data["class_name"][i]),
            "class_id": int(detections.class_id[i]),
            "score": round(float(detections.confidence[i]), 6),
            "box": [x1, y1, x2, y2],
            "area": mask_area(detections, i) if has_mask else round((x2 - x1) * (y2 - y1), 3),
        }
        if detections.tracker_id is not None:
            entry["track_id"] = int(detections.tracker_id[i])
        for key in ("mask_score", "verify_score", "detector_score"):
            if key in detections.data:
                entry[key] = round(float(detections.data[key][i]), 6)
        if has_mask and masks != "none":
            entry["mask"] = _to_form(detections, i, masks)
        entries.append(entry)
    return entries


def _to_form(detections: sv.Detections, i: int, masks: MaskForm) -> Any:
    """Return the mask of a detection in a form other than `none`."""
    if masks == "rle":
        return coco_segmentation(detections, i)
    from pycocotools import mask as coco_mask

    mask = coco_mask.decode(detections.data["rle"][i])
    return encode_polygons(mask.astype(bool)) if masks == "polygon" else _png(mask)


def _png(mask: NDArray[np.uint8]) -> str:
    """Return a mask `(H, W)` of 0 and 1 as a black and white PNG in base64."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(mask * np.uint8(255)).convert("1").save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode("ascii")


def decode_mask(rle: Mapping[str, Any], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode a mask that a client sends.

    Args:
        rle: Compressed COCO RLE: `size` and `counts`.
        size_hw: Height and width that it must have.

    Returns:
        `(H, W) bool`.

    Raises:
        RequestError: If it is of another size, or damaged (422).

    >>> decode_mask({"size": [2, 3], "counts": "06"}, (2, 3)).sum()
    np.int64(6)
    """
    from pycocotools import mask as coco_mask

    size, counts = list(rle.get("size", ())), rle.get("counts")
    if size != list(size_hw) or not isinstance(counts, str):
        raise RequestError(422, f"a mask must be COCO RLE of size {list(size_hw)}, got size {size[:4]}")
    if (problem := all_counts_problem([counts], size_hw[0] * size_hw[1])) is not None:
        raise RequestError(422, f"a mask is damaged: {problem}")
    return np.asarray(coco_mask.decode({"size": size, "counts": counts.encode("ascii")}), bool)


def jpeg(image: NDArray[np.uint8], max_side: int | None, quality: int = 88) -> bytes:
    """Return an image as JPEG, scaled down.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        max_side: Longest side in pixels; None for no limit.
        quality: Quality of the JPEG, 1 to 95.

    >>> jpeg(np.zeros((4, 6, 3), np.uint8), 2)[:2]
    b'\\xff\\xd8'
    """
    from PIL import Image

    picture = Image.fromarray(image)
    if max_side is not None:
        picture.thumbnail((max_side, max_side))
    elif max(picture.size) > 65500:  # the largest that a JPEG has
        picture.thumbnail((65500, 65500))
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=quality)
    return out.getvalue()
