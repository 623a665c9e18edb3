"""Check sizes, boxes and masks that come from files, of whatever format, and convert masks to RLE.

pycocotools and OpenCV do not check what they are given: a wrong number makes them crash, read past the end of a buffer,
or allocate all memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import shorten
from grounded_sam.structures.documents import is_text

#: Largest number that a coordinate of a box may have.
MAX_COORDINATE = 1e9
#: Longest outline of a polygon, in pixels: pycocotools takes about 100 bytes for each.
MAX_OUTLINE = 10_000_000
#: Most letters of one number in compressed RLE, 35 bits; more than the pixels of any image.
MAX_LETTERS = 7


def is_number(value: Any, low: float = -MAX_COORDINATE, high: float = MAX_COORDINATE) -> bool:
    """Return whether a value is a finite number in a range, both ends included.

    >>> is_number(3), is_number(float("nan")), is_number(10**400), is_number(True)
    (True, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def size_problem(width: Any, height: Any, max_pixels: int) -> str | None:
    """Return why an image cannot have a size; None if it can.

    Args:
        width: Width in pixels.
        height: Height in pixels.
        max_pixels: Largest number of pixels.

    >>> size_problem(2**64, 4, 100)
    '18446744073709551616x4 px is more than the 100 pixels allowed (source.max_pixels)'
    """
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in (width, height)):
        return f"width and height must be integers >= 1, got {shorten(width)} and {shorten(height)}"
    if width * height > max_pixels:
        return (
            f"{shorten(width)}x{shorten(height)} px is more than the {max_pixels:,} pixels allowed (source.max_pixels)"
        )
    return None


def box_problem(box: Any, size_hw: tuple[int, int]) -> str | None:
    """Return what is wrong with a COCO box, `[x, y, width, height]`; up to one pixel outside the image is rounding.

    Returns:
        The reason, which ends with `it is clipped` if the box can be used; None if nothing is wrong.

    >>> box_problem([5, 0, 10, 2], (4, 8))
    'the bbox [5, 0, 10, 2] extends outside the 8x4 px image; it is clipped'
    """
    height, width = size_hw
    if not isinstance(box, Sequence) or len(box) != 4 or not all(is_number(v) for v in box):
        return f"bbox must be four finite numbers up to {MAX_COORDINATE:,.0f}, got {shorten(box)}"
    x, y, w, h = box
    if w <= 0 or h <= 0 or x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return f"the bbox {box!r} is empty, or outside the {width}x{height} px image"
    if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        return f"the bbox {box!r} extends outside the {width}x{height} px image; it is clipped"
    return None


def segmentation_problem(segmentation: Any, size_hw: tuple[int, int]) -> str | None:
    """Return why a COCO segmentation cannot be used; None if it can.

    Args:
        segmentation: What should be polygons or RLE.
        size_hw: Height and width of the image.

    >>> segmentation_problem([[0, 0, 2, 0]], (2, 3))
    'a polygon needs at least three points (six numbers)'
    """
    height, width = size_hw
    if isinstance(segmentation, Mapping):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            return f"its RLE has the size {shorten(size)}, the image [{height}, {width}]"
        if isinstance(counts, list):
            if not all(isinstance(v, int) and v >= 0 for v in counts) or sum(counts) != height * width:
                return f"the counts of its RLE do not add up to the {height * width} pixels of the image"
            return None
        return counts_problem(counts, height * width) if is_text(counts) and counts else "its RLE has no counts"
    if not isinstance(segmentation, list):
        return f"the segmentation must be polygons or RLE, got {type(segmentation).__name__}"
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "a polygon needs at least three points (six numbers)"
        if not set(map(type, polygon)) <= {int, float} or not _are_finite(polygon):
            return "a polygon has a coordinate that is not a finite number"
    return _outline_problem(segmentation, size_hw)


def _are_finite(values: list[float]) -> bool:
    try:
        return all(map(math.isfinite, values))
    except OverflowError:  # an integer of more than 300 digits
        return False


def _outline_problem(polygons: list[list[float]], size_hw: tuple[int, int]) -> str | None:
    """Return why polygons of finite numbers cannot be drawn; None if they can."""
    height, width = size_hw
    spans = [(min(p), max(p)) for p in polygons]
    small = MAX_OUTLINE / sum(map(len, polygons))  # no outline of this span can be too long
    if all(low >= 0 and 0 < high <= min(size_hw) and high < small for low, high in spans):
        return None
    polygons = cut_polygons(polygons, size_hw)
    if not any(_overlaps(p[::2], width) and _overlaps(p[1::2], height) for p in polygons):
        return f"the polygon lies outside the {width}x{height} px image"
    if sum(len(p) * (max(p) - min(p)) for p in polygons) > MAX_OUTLINE:  # more than the outline can be
        points = [np.array(p).reshape(-1, 2) for p in polygons]
        outline = sum(np.abs(p - np.roll(p, 1, 0)).max(1).sum() for p in points)
        if outline > MAX_OUTLINE:
            return f"the outline of its polygons is {outline:,.0f} px long, more than {MAX_OUTLINE:,}"
    return None


def _overlaps(values: list[float], side: int) -> bool:
    return max(values) > 0 and min(values) < side


def cut_polygons(polygons: list[list[float]], size_hw: tuple[int, int]) -> list[list[float]]:
    """Cut off what lies far outside an image, more than its longer side; the mask inside stays the same.

    Args:
        polygons: Polygons of finite numbers, `[x1, y1, x2, y2, ...]`.
        size_hw: Height and width of the image.

    Returns:
        The polygons, without those that lie far outside altogether.

    >>> cut_polygons([[0, 0, 1e18, 0, 1e18, 2, 0, 2]], (2, 3))
    [[0.0, 0.0, 6.0, 0.0, 6.0, 2.0, 0.0, 2.0]]
    """
    margin = max(size_hw)
    near = min(size_hw) + margin
    cut = [p if min(p) >= -margin and max(p) <= near else _cut_polygon(p, size_hw, margin) for p in polygons]
    return [polygon for polygon in cut if len(polygon) >= 6]


def _cut_polygon(polygon: list[float], size_hw: tuple[int, int], margin: int) -> list[float]:
    """Cut a polygon at the four lines that are `margin` pixels outside an image (Sutherland and Hodgman 1974)."""
    height, width = size_hw
    points = np.array([min(max(v, -1e15), 1e15) for v in polygon], np.float64).reshape(-1, 2)
    for axis, sign, limit in ((0, 1, width + margin), (0, -1, margin), (1, 1, height + margin), (1, -1, margin)):
        values = sign * points[:, axis]  # at most `limit` inside
        inside, step = values <= limit, np.roll(points, -1, 0) - points
        crosses = inside != np.roll(inside, -1)
        part = np.where(crosses, limit - values, 0) / np.where(crosses, np.roll(values, -1) - values, 1)
        crossings = points + part[:, None] * step
        crossings[:, axis] = sign * limit
        keep = np.stack([inside, crosses], 1).reshape(-1)
        points = np.stack([points, crossings], 1).reshape(-1, 2)[keep]
    return points.reshape(-1).tolist()  # type: ignore[no-any-return]


def counts_problem(text: str, pixels: int) -> str | None:
    """Return why compressed RLE counts cannot be decoded, read as `rleFrString` of COCO's maskApi.c does.

    Args:
        text: The counts.
        pixels: Number of pixels that they should add up to.

    >>> counts_problem("06", 6) is None, counts_problem("06", 7)
    (True, 'the counts of its RLE do not add up to the 7 pixels of the image')
    """
    return all_counts_problem([text], pixels)


def all_counts_problem(texts: Sequence[str], pixels: int) -> str | None:
    """Return why the counts of one of several masks of an image cannot be decoded; see `counts_problem`."""
    damaged = "the counts of its RLE are damaged"
    encoded = [text.encode() for text in texts]
    if not encoded or not all(encoded):
        return damaged if encoded else None
    # Each letter holds 5 bits of a number, the lowest first, and whether more follow; the highest bit is the sign.
    codes = np.frombuffer(b"".join(encoded), np.uint8) - np.uint8(48)  # letters below 48 wrap to more than 63
    last_letters = np.cumsum([len(text) for text in encoded]) - 1
    if codes.max() > 63 or (codes[last_letters] & 32).any():
        return damaged
    ends = np.flatnonzero(codes < 32)
    lengths = np.diff(ends, prepend=-1)
    if (longest := int(lengths.max())) > MAX_LETTERS:
        return damaged
    highest = codes[ends].astype(np.int64)
    numbers = (highest & 15) - (highest & 16)
    for place in range(1, longest):
        longer = np.flatnonzero(lengths > place)
        numbers[longer] = numbers[longer] * 32 + (codes[ends[longer] - place] & 31)
    for counts in np.split(numbers, np.searchsorted(ends, last_letters[:-1]) + 1):
        # From the fourth number on, they are differences from the last but one.
        counts[1::2], counts[2::2] = counts[1::2].cumsum(), counts[2::2].cumsum()
        if counts.min() < 0 or counts.sum() != pixels:
            return f"the counts of its RLE do not add up to the {pixels} pixels of the image"
    return None


def decode_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode a COCO segmentation with pycocotools.

    Args:
        segmentation: Polygons, or compressed or uncompressed RLE; see `segmentation_problem` to check it.
        size_hw: Height and width of the image.

    Returns:
        `(H, W) bool`.

    >>> decode_segmentation([[0, 0, 2, 0, 2, 1, 0, 1]], (2, 3)).astype(int).tolist()
    [[1, 1, 0], [0, 0, 0]]
    """
    from pycocotools import mask as coco_mask

    return np.asarray(coco_mask.decode(encode_segmentation(segmentation, size_hw)), bool)


def encode_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> dict[str, Any]:
    """Convert a COCO segmentation in any form to compressed RLE, with `counts` as bytes as pycocotools has them.

    Args:
        segmentation: Polygons, or compressed or uncompressed RLE.
        size_hw: Height and width of the image.
    """
    from pycocotools import mask as coco_mask

    height, width = size_hw
    if isinstance(segmentation, list):
        segmentation = cut_polygons(segmentation, size_hw)
        return dict(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return dict(coco_mask.frPyObjects(segmentation, height, width))
    return {"size": [height, width], "counts": segmentation["counts"].encode()}


def segmentation_box(segmentation: Any, size_hw: tuple[int, int]) -> list[float]:
    """Compute the box around a COCO segmentation, `[x, y, width, height]`.

    Args:
        segmentation: Polygons, or compressed or uncompressed RLE.
        size_hw: Height and width of the image.
    """
    from pycocotools import mask as coco_mask

    box: list[float] = coco_mask.toBbox(encode_segmentation(segmentation, size_hw)).tolist()
    return box
