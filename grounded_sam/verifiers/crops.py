"""Square crops of detections, with what surrounds the object dimmed by its mask."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

#: Value of pixels outside the image, and of what is dimmed completely.
GRAY = 127


def crop_square(
    pixels: NDArray[np.uint8] | NDArray[np.bool_],
    xyxy: NDArray[np.floating],
    margin: float,
    size: int,
    fill: int = GRAY,
) -> NDArray[np.uint8]:
    """Cut out the square around a box and resize it.

    Args:
        pixels: Image `(H, W, 3) uint8`, or mask `(H, W) bool` or `uint8`; True becomes 255.
        xyxy: The box in pixels, `(4,)`.
        margin: Side of the square, as a multiple of the longer side of the box.
        size: Side of the result in pixels.
        fill: Value of pixels outside the image.

    Returns:
        `(size, size, 3)` or `(size, size)`, `uint8`.

    >>> image = np.full((40, 60, 3), 200, np.uint8)
    >>> crop = crop_square(image, np.array([0, 0, 10, 20]), 1.2, 48)
    >>> crop.shape, crop[0, 0].tolist(), crop[30, 30].tolist()
    ((48, 48, 3), [127, 127, 127], [200, 200, 200])
    """
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = (float(value) for value in xyxy)
    side = max(round(max(x2 - x1, y2 - y1) * margin), 1)
    left, top = math.floor((x1 + x2 - side) / 2 + 0.5), math.floor((y1 + y2 - side) / 2 + 0.5)
    square = np.full((side, side, *pixels.shape[2:]), fill, np.uint8)
    scale = 255 if pixels.dtype == np.bool_ else 1
    x_from, x_to = min(max(left, 0), width), max(min(left + side, width), 0)
    y_from, y_to = min(max(top, 0), height), max(min(top + side, height), 0)
    if x_from < x_to and y_from < y_to:
        square[y_from - top : y_to - top, x_from - left : x_to - left] = pixels[y_from:y_to, x_from:x_to] * np.uint8(
            scale
        )
    if side == size:
        return square
    resized = cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)


def dim_surroundings(crop: NDArray[np.uint8], mask: NDArray[np.uint8], strength: float) -> NDArray[np.uint8]:
    """Blend what lies outside the mask with gray.

    Args:
        crop: `(H, W, 3) uint8`.
        mask: Coverage of each pixel by the object, 0 to 255, `(H, W) uint8`.
        strength: 0 leaves the crop as it is, 1 replaces everything outside the mask with gray.

    >>> crop = np.full((1, 2, 3), 227, np.uint8)
    >>> dim_surroundings(crop, np.array([[255, 0]], np.uint8), 0.5)[0, :, 0].tolist()
    [227, 177]
    """
    outside = (strength / 255) * (255 - mask[..., None].astype(np.float32))
    blended = crop + outside * (GRAY - crop.astype(np.float32))
    return np.rint(blended).astype(np.uint8)
