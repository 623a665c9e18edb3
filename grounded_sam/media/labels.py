"""Write labels beside boxes so that none covers another where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

RGB = tuple[int, int, int]


@cache
def load_font(size: int) -> FreeTypeFont:
    """Load a font with Latin, Greek and Cyrillic letters, which comes with matplotlib (supervision requires it).

    Args:
        size: Height in pixels.
    """
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def draw_labels(
    image: NDArray[np.uint8],
    xyxy: NDArray[np.number],
    texts: Sequence[str],
    colors: Sequence[RGB],
    text_colors: Sequence[RGB],
    size: int | None = None,
) -> NDArray[np.uint8]:
    """Write a label for each box over a copy of an image.

    A label that finds no room beside its box is connected with it by a line.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        xyxy: Boxes in pixels, `(n, 4)`.
        texts: Text of each label.
        colors: Background of each label.
        text_colors: Color of each text.
        size: Height of the font in pixels; None for 1/32 of the shorter side of the image, 9 to 72.

    Returns:
        RGB, `(H, W, 3) uint8`.
    """
    from PIL import Image, ImageDraw

    size = size or int(np.clip(min(image.shape[:2]) / 32, 9, 72))
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    font, padding = load_font(size), max(2, size // 5)
    ascent, descent = font.getmetrics()
    height = ascent + descent + padding
    widths = [round(draw.textlength(text, font)) + 2 * padding for text in texts]
    sizes = np.array([(width, height) for width in widths], int).reshape(-1, 2)
    corners = place_labels(np.asarray(xyxy), sizes, (image.shape[1], image.shape[0]))
    for (x, y), (width, _), box, color in zip(corners.tolist(), sizes.tolist(), xyxy, colors, strict=True):
        x1, y1, x2, y2 = box.tolist()
        if x > x2 or x + width < x1 or y > y2 + height or y + height < y1 - height:
            start = (min(max(x, (x1 + x2) / 2), x + width), y if y > y2 else y + height)
            draw.line([start, ((x1 + x2) / 2, y2 if y > y2 else y1)], fill=color, width=max(1, size // 10))
    labels = zip(corners.tolist(), sizes.tolist(), texts, colors, text_colors, strict=True)
    for (x, y), (width, _), text, color, text_color in labels:
        draw.rectangle([x, y, x + width - 1, y + height - 1], fill=color)
        draw.text((x + padding, y + padding // 2), text, font=font, fill=text_color)
    return np.asarray(picture)


def place_labels(xyxy: NDArray[np.number], sizes: NDArray[np.integer], size_wh: tuple[int, int]) -> NDArray[np.int64]:
    """Find a place for the label of each box, the first boxes first.

    A label goes above its box, else below, inside, or beside it, else to the nearest free place of the image. Where no
    place is free, it overlaps the fewest pixels of the labels before it.

    Args:
        xyxy: Boxes in pixels, `(n, 4)`.
        sizes: Width and height of each label, `(n, 2)`.
        size_wh: Width and height of the image.

    Returns:
        Left and top of each label, `(n, 2)`.

    >>> boxes = np.array([[10, 20, 50, 60], [10, 20, 60, 60]])
    >>> place_labels(boxes, np.array([[25, 10], [25, 10]]), (100, 100)).tolist()
    [[10, 10], [35, 10]]
    """
    placed = np.empty((0, 4), np.int64)
    for box, (width, height) in zip(xyxy, sizes.tolist(), strict=True):
        last = np.maximum(np.array(size_wh) - (width, height), 0)
        x1, y1, x2, y2 = np.round(box).astype(int).tolist()
        left, right, top, bottom, above = x1, x2 - width, y1, y2 - height, y1 - height
        near = [(left, above), (right, above), (left, y2), (right, y2), (left, top), (right, top), (left, bottom)]
        near += [(x2, top), (x1 - width, top), (x2, bottom), (x1 - width, bottom)]
        corners = np.clip(near, 0, last)
        overlap = _overlaps(corners, (width, height), placed)
        if overlap.min() > 0:
            grid = np.meshgrid(_steps(last[0], width // 4), _steps(last[1], height // 2))
            corners = np.stack(grid, -1).reshape(-1, 2)
            overlap = _overlaps(corners, (width, height), placed)
            distance = np.hypot(*(corners - (x1, above)).T)
            best = np.lexsort((distance, overlap))[0]
        else:
            best = int(overlap.argmin())
        x, y = corners[best].tolist()
        placed = np.vstack([placed, [x, y, x + width, y + height]])
    return placed[:, :2]


def _steps(last: int, step: int) -> NDArray[np.int64]:
    """Return positions from 0 to `last` that are at most `step` apart."""
    return np.unique(np.append(np.arange(0, last, max(step, 1)), last))


def _overlaps(corners: NDArray[np.int64], size: tuple[int, int], placed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many pixels of the labels placed so far a label at each of `m` corners would cover, `(m,)`."""
    low = np.maximum(corners[:, None], placed[None, :, :2])
    high = np.minimum((corners + size)[:, None], placed[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), axis=2).sum(1)
