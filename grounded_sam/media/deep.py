"""Pixels of more than 8 bits per color: one rule that scales them to 8, and the files that Pillow does not read."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ImageError

#: Pixels that are converted at a time, so that the memory for intermediate results is small.
STRIP_PIXELS = 4_000_000
#: Bit depths that an image of integers may have.
DEPTHS = (8, 10, 11, 12, 14, *range(16, 66, 2))
#: Bit depths of floating-point images that exceed the range 0 to 1.
FLOAT_DEPTHS = range(2, 1024, 2)
#: A floating-point image whose brightest pixel is at most this has the range 0 to 1: resampling overshoots.
MAX_UNIT_FLOAT = 1.5


def strips(width: int, height: int) -> Iterator[slice]:
    """Yield the rows of an image in parts of about `STRIP_PIXELS` pixels.

    >>> list(strips(4_000_000, 2))
    [slice(0, 1, None), slice(1, 2, None)]
    """
    rows = max(1, STRIP_PIXELS // max(1, width))
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def black_and_white(parts: Iterable[NDArray[Any]]) -> tuple[float, float]:
    """Return the values that become black and white, by the rule of `media.images.read_image`.

    Args:
        parts: The values of an image, in parts.

    Raises:
        ImageError: If not a single value is finite.

    >>> black_and_white([np.array([0, 3000], np.uint16)]), black_and_white([np.array([0.0, 0.7])])
    ((0.0, 4095.0), (0.0, 1.0))
    """
    low, high, is_float = math.inf, -math.inf, False
    for part in parts:
        values = part
        if part.dtype.kind == "f":
            is_float, values = True, part[np.isfinite(part)]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low > high:
        raise ImageError("the image has no finite value")
    if low < 0:
        return low, max(high, low + 1)
    if is_float and high <= MAX_UNIT_FLOAT:
        return 0.0, 1.0
    depths = FLOAT_DEPTHS if is_float else DEPTHS
    return 0.0, 2.0 ** next(bits for bits in depths if high <= 2.0**bits - 1 or bits == depths[-1]) - 1


def to_8_bits(values: NDArray[Any], black: float, white: float) -> NDArray[np.uint8]:
    """Scale values to 8 bits: `black` becomes 0 and `white` 255, rounded; NaN becomes 0.

    >>> to_8_bits(np.array([0.0, 0.5, 2.0, np.nan]), 0.0, 1.0).tolist()
    [0, 128, 255, 0]
    """
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:  # a table is faster than arithmetic
        table = np.arange(2 ** (8 * values.dtype.itemsize), dtype=np.float64)
        return _scaled(table, black, white)[values]
    return _scaled(values.astype(np.float64), black, white)


def _scaled(values: NDArray[np.float64], black: float, white: float) -> NDArray[np.uint8]:
    values = (values - black) * (255 / (white - black))
    return np.clip(np.round(np.nan_to_num(values, nan=0.0)), 0, 255).astype(np.uint8)


def read_deep(file: Path | bytes) -> NDArray[np.uint8]:
    """Read an image of more than 8 bits per color with OpenCV: RGB `(H, W, 3) uint8`, not rotated.

    Pillow reduces such colors to their upper 8 bits, so that 12-bit values become nearly black. OpenCV returns parts of
    damaged files without an error, and decodes files of any size: check both before.

    Raises:
        ImageError: If OpenCV cannot decode it.
    """
    values = _decode(file)
    height, width, channels = values.shape
    parts = list(strips(width, height))
    color = slice(0, 1) if channels < 3 else slice(2, None, -1)  # OpenCV has blue first
    black, white = black_and_white(values[part, :, color] for part in parts)
    rgb = np.empty((height, width, 3), np.uint8)
    for part in parts:
        rgb[part] = to_8_bits(values[part, :, color], black, white)
        if channels == 4:
            alpha = _opacity(values[part, :, 3:])
            rgb[part] = np.round(rgb[part] * alpha + 255 * (1 - alpha))
    return rgb


def _decode(file: Path | bytes) -> NDArray[Any]:
    """Decode an image with OpenCV: `(H, W, channels)`, blue first."""
    import cv2

    data = np.frombuffer(bytearray(file), np.uint8) if isinstance(file, bytes) else np.memmap(file, np.uint8, "c")
    _remove_orientation(memoryview(data))  # type: ignore[arg-type]
    level = cv2.utils.logging.setLogLevel(0)  # it prints reasons to stderr
    try:
        values: Any = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        values = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if values is None:
        raise ImageError("damaged image, or of a kind that is not read; save it as PNG")
    return values if values.ndim == 3 else values[..., None]


def _remove_orientation(data: memoryview) -> None:
    """Set the orientation of a TIFF in memory to upright: versions of OpenCV differ in whether they apply it."""
    head = bytes(data[:4])
    if head not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return
    order, is_big = ("<" if head[:1] == b"I" else ">"), b"+" in head
    (start,) = struct.unpack_from(order + ("8xQ" if is_big else "4xI"), data)
    (count,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, start)
    first, size, value = (start + 8, 20, 12) if is_big else (start + 2, 12, 8)
    for entry in range(first, min(first + size * count, len(data) - size + 1), size):
        if struct.unpack_from(order + "H", data, entry) == (274,):
            struct.pack_into(order + "H", data, entry + value, 1)


def _opacity(alpha: NDArray[Any]) -> NDArray[np.float64]:
    """Return alpha values as 0 to 1; those of integers have the range of their type."""
    full = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
    return np.clip(alpha / full, 0, 1)


@dataclass(frozen=True)
class TiffLayout:
    """What the header of a TIFF says about its first image.

    Attributes:
        size_wh: Width and height in pixels.
        channels: Numbers per pixel.
        bits: Bits per number.
        is_planar: Whether each channel is a plane of its own.
        orientation: As in EXIF, 1 for upright.
    """

    size_wh: tuple[int, int]
    channels: int
    bits: int
    is_planar: bool
    orientation: int


def read_tiff_layout(file: Path | bytes) -> TiffLayout | None:
    """Read the layout of a TIFF, also of one of which Pillow cannot tell the size; None for any other file."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    with BytesIO(file) if isinstance(file, bytes) else file.open("rb") as content:
        header = content.read(8)
        if header[:4] not in (b"II*\0", b"MM\0*"):
            return None
        tags = ImageFileDirectory_v2(header)
        content.seek(tags.next)
        tags.load(content)
    channels = int(tags.get(277, 1))
    return TiffLayout(
        size_wh=(int(tags[256]), int(tags[257])),
        channels=channels,
        bits=max(map(int, tags.get(258, (1,)))),
        is_planar=channels > 1 and tags.get(284, 1) == 2,
        orientation=int(tags.get(274, 1)),
    )
