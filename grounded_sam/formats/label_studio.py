"""Label Studio's regions: boxes, polygons, brushes and bitmaps of images, in percent, and how they are read back."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ImageError, shorten
from grounded_sam.formats.segmentations import encode_segmentation, is_number, segmentation_problem
from grounded_sam.structures.masks import join_loops, mask_outlines

#: Bits of the four run lengths in Label Studio's RLE.
RUN_BITS = (3, 4, 8, 16)
#: Forms of a region.
RegionKind = Literal["brush", "bitmask", "polygon", "rectangle"]
_PNG = "data:image/png;base64,"


@dataclass(frozen=True, eq=False)
class Region:
    """A region of an image.

    Attributes:
        kind: Its form.
        labels: Names of its labels.
        box: xyxy in pixels, inside the image.
        mask: `(H, W) bool`; None for an upright rectangle.
    """

    kind: str
    labels: tuple[str, ...]
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_] | None = None


def encode_brush(mask: NDArray[np.bool_]) -> list[int]:
    """Encode a mask as a brush of Label Studio.

    The format is thi.ng's rle-pack over RGBA bytes: the number of bytes, the bits of a value, the bits of four run
    lengths, then the runs. The result equals that of `label_studio_sdk.converter.brush.mask2rle`, which encodes byte
    by byte and takes seconds for a photo.

    Args:
        mask: `(H, W) bool`.

    Returns:
        Bytes of the code, 0 to 255.

    >>> encode_brush(np.ones((1, 1), bool))
    [0, 0, 0, 4, 57, 27, 252, 127, 224]
    """
    flat = mask.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = 4 * np.diff(np.concatenate([[0], edges, [len(flat)]]))
    bits = [f"{4 * len(flat):032b}{7:05b}", *(f"{size - 1:04b}" for size in RUN_BITS)]
    value = bool(flat[0])
    for length in lengths.tolist():
        remaining = length
        while remaining:
            run = min(remaining, 1 << RUN_BITS[-1])
            size = next(i for i, width in enumerate(RUN_BITS) if run <= 1 << width)
            bits.append(f"1{size:02b}{run - 1:0{RUN_BITS[size]}b}{255 if value else 0:08b}")
            remaining -= run
        value = not value
    code = "".join(bits)
    code += "0" * (-len(code) % 8)
    return [int(byte) for byte in np.packbits(np.frombuffer(code.encode(), np.uint8) - ord("0"))]


def decode_brush(rle: Sequence[int], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode a brush of Label Studio, whose pixels are those that are not transparent.

    Args:
        rle: Bytes of the code, 0 to 255.
        size_hw: Height and width of the image.

    Returns:
        `(H, W) bool`.

    Raises:
        ImageError: If the code is damaged, or that of an image of another size.

    >>> decode_brush([0, 0, 0, 4, 57, 27, 252, 127, 224], (1, 1))
    array([[ True]])
    """
    height, width = size_hw
    if not isinstance(rle, list) or not all(type(byte) is int and 0 <= byte <= 255 for byte in rle):
        raise ImageError(f"the rle of a brush must be a list of bytes, got {shorten(rle)}")
    code = "".join(f"{byte:08b}" for byte in rle)
    count = int(code[:32] or "0", 2)
    if count != 4 * height * width:
        raise ImageError(f"the brush has {count:,} bytes, but {4 * height * width:,} belong to {width}x{height} px")
    word = int(code[32:37] or "0", 2) + 1
    sizes = [int(code[i : i + 4] or "0", 2) + 1 for i in range(37, 53, 4)]
    if word != 8:
        raise ImageError(f"the values of the brush have {word} bits, expected 8")
    values, done, at = np.empty(count, np.uint8), 0, 53
    try:
        while done < count:
            size = sizes[int(code[at + 1 : at + 3], 2)]
            start = at + 3 + size
            run = int(code[at + 3 : start], 2) + 1
            if done + run > count:
                raise ImageError("the brush has more pixels than its image")
            if code[at] == "1":
                values[done : done + run], at = int(code[start : start + 8], 2), start + 8
            else:  # as many values as they are
                at = start + 8 * run
                bits = np.frombuffer(code[start:at].encode(), np.uint8) - ord("0")
                values[done : done + run] = np.packbits(bits)
            done += run
    except (ValueError, IndexError) as error:
        raise ImageError("the rle of a brush ends too early") from error
    return values.reshape(height, width, 4)[..., 3] > 0


def encode_bitmask(mask: NDArray[np.bool_]) -> str:
    """Encode a mask as the image of a bitmask: a PNG whose background is transparent, as a data URL.

    Args:
        mask: `(H, W) bool`.
    """
    from PIL import Image

    gray = np.where(mask, 255, 0).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.dstack([gray, gray]), "LA").save(out, format="PNG")
    return _PNG + base64.b64encode(out.getvalue()).decode("ascii")


def decode_bitmask(url: Any, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode the image of a bitmask.

    Args:
        url: PNG as a data URL.
        size_hw: Height and width of the image.

    Raises:
        ImageError: If it is no PNG of this size.

    >>> decode_bitmask(encode_bitmask(np.array([[True, False]])), (1, 2))
    array([[ True, False]])
    """
    from PIL import Image

    if not isinstance(url, str) or not url.startswith(_PNG):
        raise ImageError(f"the imageDataURL of a bitmask must begin with {_PNG}, got {shorten(url)}")
    try:
        with Image.open(io.BytesIO(base64.b64decode(url[len(_PNG) :], validate=True)), formats=["PNG"]) as image:
            if image.size != (size_hw[1], size_hw[0]):
                raise ImageError(
                    f"the bitmask has {image.size[0]}x{image.size[1]} px, its image {size_hw[1]}x{size_hw[0]}"
                )
            return np.asarray(image.convert("RGBA"))[..., 3] > 0
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise ImageError("the image of the bitmask is damaged") from error


def region_value(
    kind: str,
    box: Sequence[float],
    mask: NDArray[np.bool_] | None,
    size_hw: tuple[int, int],
    tolerance: float = 0.0,
) -> dict[str, Any] | None:
    """Return the `value` of a region, without its labels.

    Args:
        kind: A `RegionKind`.
        box: xyxy in pixels.
        mask: `(H, W) bool`; needed for all but `rectangle`.
        size_hw: Height and width of the image.
        tolerance: Largest distance in pixels of a simplified polygon from the outline.

    Returns:
        The value; None if the mask is empty.

    >>> region_value("rectangle", [0, 0, 3, 2], None, (4, 6))
    {'x': 0.0, 'y': 0.0, 'width': 50.0, 'height': 50.0, 'rotation': 0}
    """
    height, width = size_hw
    scale = np.array([100 / width, 100 / height])
    if kind == "rectangle":
        (x1, y1), (x2, y2) = np.clip(np.reshape(box, (2, 2)) * scale, 0, 100).tolist()
        return {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0}
    assert mask is not None
    if not mask.any():
        return None
    if kind == "polygon":
        points = np.minimum(join_loops(mask_outlines(mask, "edges", tolerance)) * scale, 100).tolist()
        return {"points": points, "closed": True}
    if kind == "brush":
        return {"format": "rle", "rle": encode_brush(mask)}
    return {"imageDataURL": encode_bitmask(mask)}


def read_region(result: Mapping[str, Any], size_hw: tuple[int, int]) -> Region | None:
    """Read a region of an annotation.

    Args:
        result: An entry of `result`.
        size_hw: Height and width of the image.

    Returns:
        The region; None for what is none, such as a choice, or for one of a kind that has no area.

    Raises:
        ImageError: If its value is malformed, empty, or outside the image.

    >>> value = {"x": 0, "y": 0, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["car"]}
    >>> read_region({"type": "rectanglelabels", "value": value}, (4, 6)).box
    (0.0, 0.0, 3.0, 2.0)
    """
    kind, value = str(result.get("type", "")).removesuffix("labels"), result.get("value")
    if kind not in ("brush", "bitmask", "polygon", "rectangle"):
        return None
    if not isinstance(value, Mapping):
        raise ImageError(f"the value of a region must be an object, got {shorten(value)}")
    given = value.get(f"{kind}labels", [])
    labels = tuple(label for label in given if isinstance(label, str)) if isinstance(given, list) else ()
    if kind == "rectangle" and not value.get("rotation"):
        x1, y1, w, h = rectangle_in_pixels(value, size_hw)
        height, width = size_hw
        box = (max(x1, 0.0), max(y1, 0.0), min(x1 + w, float(width)), min(y1 + h, float(height)))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ImageError(f"a rectangle is empty, or outside of the {width}x{height} px image")
        return Region(kind, labels, box)
    mask = _read_mask(kind, value, size_hw)
    if not mask.any():
        raise ImageError(f"a {kind} is empty")
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))
    return Region(kind, labels, box, mask)


def _read_mask(kind: str, value: Mapping[str, Any], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask of a region that is not an upright rectangle."""
    if kind == "brush":
        if value.get("format") != "rle":
            raise ImageError(f"the format of a brush must be rle, got {shorten(value.get('format'))}")
        return decode_brush(value.get("rle", ()), size_hw)
    if kind == "bitmask":
        return decode_bitmask(value.get("imageDataURL"), size_hw)
    height, width = size_hw
    if kind == "rectangle":
        points = _corners(value, size_hw)
    else:
        given: Any = value.get("points")
        is_list = isinstance(given, list) and all(isinstance(p, list) and len(p) == 2 for p in given)
        if not is_list or not all(is_number(v) for p in given for v in p):
            raise ImageError(f"the points of a polygon must be pairs of numbers, got {shorten(given)}")
        points = [[x * width / 100, y * height / 100] for x, y in given]
    polygon = [[float(v) for point in points for v in point]]
    if (problem := segmentation_problem(polygon, size_hw)) is not None:
        raise ImageError(f"a {kind} cannot be used: {problem}")
    from pycocotools import mask as coco_mask

    return np.asarray(coco_mask.decode(encode_segmentation(polygon, size_hw)), bool)


def rectangle_in_pixels(value: Mapping[str, Any], size_hw: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, width and height in pixels of a rectangle in percent.

    Raises:
        ImageError: If they are no numbers, or the rectangle has no area.
    """
    numbers: list[Any] = [value.get(key) for key in ("x", "y", "width", "height")]
    if not all(is_number(number, -1e6, 1e6) for number in numbers) or numbers[2] <= 0 or numbers[3] <= 0:
        raise ImageError(f"a rectangle needs x, y, width and height in percent, got {shorten(dict(value))}")
    height, width = size_hw
    x, y, w, h = numbers
    return x * width / 100, y * height / 100, w * width / 100, h * height / 100


def _corners(value: Mapping[str, Any], size_hw: tuple[int, int]) -> list[list[float]]:
    """Return the corners in pixels of a rectangle that is rotated clockwise around its first one."""
    x, y, w, h = rectangle_in_pixels(value, size_hw)
    if not is_number(value["rotation"], -1e6, 1e6):
        raise ImageError(f"rotation must be a number, got {shorten(value['rotation'])}")
    cos, sin = math.cos(math.radians(value["rotation"])), math.sin(math.radians(value["rotation"]))
    return [[x + dx * cos - dy * sin, y + dx * sin + dy * cos] for dx, dy in ((0, 0), (w, 0), (w, h), (0, h))]
