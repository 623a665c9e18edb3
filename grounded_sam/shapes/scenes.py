"""Synthetic scenes and clips of colored shapes with exact ground truth.

A scene is a canvas of 96 to 512 px per side with up to eight objects, each of them a shape in a color. Crowded scenes
have 8 to 30 small objects. The ground truth of an object is its visible part: its mask without what other objects
occlude, and the box of that mask. All random numbers come from one `numpy.random.Generator`, so a seed determines a
scene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from grounded_sam.structures.masks import masks_to_xyxy

#: A color and a shape.
Pair = tuple[str, str]

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
#: Colors that only training uses: with few pairs, a model memorizes them and fails on unseen ones.
EXTRA_COLORS = {
    "cyan": (40, 200, 210),
    "pink": (245, 130, 190),
    "brown": (125, 80, 45),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
    "navy": (25, 35, 100),
    "maroon": (110, 25, 40),
    "lime": (165, 225, 60),
    "beige": (228, 208, 168),
}
#: Shapes that only training uses, for the same reason.
EXTRA_SHAPES = ("heart", "arrow", "moon", "diamond", "oval", "bolt", "drop")
PAIRS: tuple[Pair, ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
#: Pairs that appear in no training scene and no training phrase, to test zero-shot generalization.
HELD_OUT_PAIRS: tuple[Pair, ...] = (("green", "triangle"), ("purple", "cross"), ("red", "ring"), ("blue", "star"))
#: The pairs of `PAIRS` that may be trained on.
TRAIN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)
#: Pairs with an extra color or shape that are not trained either, to calibrate and validate on pairs that a model has
#: not seen.
VALIDATION_PAIRS: tuple[Pair, ...] = (
    *(("cyan", "star"), ("pink", "triangle"), ("brown", "ring"), ("white", "cross"), ("black", "circle")),
    *(("red", "heart"), ("green", "moon"), ("blue", "arrow"), ("yellow", "oval"), ("purple", "drop")),
    *(("orange", "bolt"), ("lime", "square"), ("navy", "cross"), ("maroon", "star"), ("beige", "triangle")),
)
#: The other pairs with an extra color or shape.
EXTRA_PAIRS: tuple[Pair, ...] = tuple(
    (color, shape)
    for color in (*COLORS, *EXTRA_COLORS)
    for shape in (*SHAPES, *EXTRA_SHAPES)
    if (color in EXTRA_COLORS or shape in EXTRA_SHAPES) and (color, shape) not in VALIDATION_PAIRS
)

#: Range of `SceneObject.inner_ratio` by shape.
INNER_RATIOS = {
    "star": (0.36, 0.55),
    "ring": (0.45, 0.7),
    "cross": (0.22, 0.38),
    "arrow": (0.2, 0.35),
    "diamond": (0.5, 0.65),
    "oval": (0.45, 0.65),
}
#: Largest fraction of an object that others may occlude.
MAX_OCCLUSION = 1 / 3


@dataclass(frozen=True)
class SceneObject:
    """A colored shape and its position.

    Attributes:
        color: Name of the color.
        shape: Name of the shape.
        rgb: The color that is painted, 0 to 255; it varies around the named one.
        x: Center, in pixels from the left edge of the canvas.
        y: Center, in pixels from the top edge.
        diameter: Diameter of the circumscribed circle, in pixels.
        angle: Rotation in radians.
        inner_ratio: Size of a ring's hole, a star's notches or a cross's arms, as a fraction of the outer radius.
        texture_seed: Seed of the pattern on its surface.
        texture_contrast: Contrast of that pattern, 0 to 0.08.
    """

    color: str
    shape: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    diameter: float
    angle: float
    inner_ratio: float
    texture_seed: int
    texture_contrast: float


@dataclass(frozen=True)
class Scene:
    """An image and its ground truth: the visible objects in drawing order.

    Attributes:
        image: RGB, `(H, W, 3) uint8`.
        masks: Visible part of each object, `(n, H, W) bool`; the masks do not overlap.
        xyxy: Boxes of the masks in pixels, right and bottom exclusive, `(n, 4) float32`.
        pairs: Color and shape of each object.
        ids: Index of each object in its clip, or among the objects that were drawn, `(n,) int64`.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    xyxy: NDArray[np.float32]
    pairs: tuple[Pair, ...]
    ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def shape_outlines(shape: str, inner_ratio: float) -> list[NDArray[np.float64]]:
    """Return the closed outlines of a shape in the unit circle.

    Args:
        shape: One of `SHAPES` or `EXTRA_SHAPES`.
        inner_ratio: See `SceneObject`.

    Returns:
        Polygons `(points, 2)`; a second one is a hole.

    Raises:
        ValueError: If there is no such shape.

    >>> shape_outlines("square", 0.5)[0].round().tolist()
    [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-0.0, -1.0]]
    """
    if shape == "circle":
        return [_regular_polygon(72)]
    if shape == "square":
        return [_regular_polygon(4)]
    if shape == "triangle":
        return [_regular_polygon(3)]
    if shape == "star":
        points = _regular_polygon(10)
        points[1::2] *= inner_ratio
        return [points]
    if shape == "ring":
        return [_regular_polygon(72), _regular_polygon(60, inner_ratio)]
    if shape == "cross":
        a, b = inner_ratio, math.sqrt(1 - inner_ratio * inner_ratio)
        half = [(b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a)]
        return [np.array(half + [(-x, -y) for x, y in half])]
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        wave = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [np.stack([16 * np.sin(t) ** 3, 2.5 - wave], axis=1) / 17]
    if shape == "arrow":
        upper = [(1.0, 0.0), (0.1, 0.75), (0.1, inner_ratio), (-0.9, inner_ratio)]
        return [np.array(upper + [(x, -y) for x, y in reversed(upper[1:])])]
    if shape == "moon":
        # The unit circle without a circle of radius 0.85 around (0.5, 0), which intersects it at these angles.
        outer, inner = np.linspace(1.015, 2 * math.pi - 1.015, 48), np.linspace(2 * math.pi - 1.538, 1.538, 32)
        bite = np.stack([0.5 + 0.85 * np.cos(inner), 0.85 * np.sin(inner)], axis=1)
        return [np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), bite])]
    if shape == "diamond":
        return [np.array([(1.0, 0.0), (0.0, inner_ratio), (-1.0, 0.0), (0.0, -inner_ratio)])]
    if shape == "oval":
        return [_regular_polygon(72) * (1.0, inner_ratio)]
    if shape == "bolt":
        half = [(0.12, 0.98), (-0.42, -0.1), (-0.02, -0.1)]
        return [np.array(half + [(-x, -y) for x, y in half])]
    if shape == "drop":
        t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        return [np.stack([np.cos(t), 0.95 * np.sin(t) * np.sin(t / 2) ** 1.3], axis=1)]
    raise ValueError(f"shape must be one of {', '.join((*SHAPES, *EXTRA_SHAPES))}; got {shape!r}")


def _regular_polygon(num_points: int, radius: float = 1.0) -> NDArray[np.float64]:
    angles = np.arange(num_points) * 2 * math.pi / num_points
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def rasterize(item: SceneObject, height: int, width: int) -> tuple[slice, slice, NDArray[np.float32]]:
    """Rasterize an object on a canvas, antialiased.

    Args:
        item: The object; it may lie partly or fully outside the canvas.
        height: Height of the canvas in pixels.
        width: Width of the canvas in pixels.

    Returns:
        The rows and the columns of the canvas that the object's patch lies in, and the coverage of each pixel in
        them, 0 to 1. All are empty if the object lies outside the canvas.
    """
    radius = item.diameter / 2
    top, left = math.floor(item.y - radius) - 1, math.floor(item.x - radius) - 1
    bottom, right = math.ceil(item.y + radius) + 1, math.ceil(item.x + radius) + 1
    oversampling = 4 if radius < 40 else 2
    patch = np.zeros(((bottom - top) * oversampling, (right - left) * oversampling), np.uint8)
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    polygons = []
    for points in shape_outlines(item.shape, item.inner_ratio):
        rotated = radius * (points @ np.array([[cos, sin], [-sin, cos]]))
        scaled = oversampling * np.add(rotated, (item.x - left, item.y - top)) - 0.5
        polygons.append(np.round(scaled * 16).astype(np.int32))
    cv2.fillPoly(patch, polygons, 255, shift=4)  # coordinates in 1/16 px
    coverage = cv2.resize(patch, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    y0, y1 = max(top, 0), min(bottom, height)
    x0, x1 = max(left, 0), min(right, width)
    if y0 >= y1 or x0 >= x1:
        return slice(0, 0), slice(0, 0), np.zeros((0, 0), np.float32)
    inside = coverage[y0 - top : y1 - top, x0 - left : x1 - left]
    return slice(y0, y1), slice(x0, x1), inside.astype(np.float32) / 255


def draw_scene(
    background: NDArray[np.uint8],
    objects: Sequence[SceneObject],
    rng: np.random.Generator,
    noise: int = 0,
    antialias: bool = True,
) -> Scene:
    """Draw objects over a background, later ones on top.

    Args:
        background: RGB, `(H, W, 3) uint8`.
        objects: What to draw. Objects of which nothing is visible are left out of the ground truth.
        rng: Source of the noise.
        noise: Largest value that is added to or subtracted from each channel of a pixel, in levels of 255.
        antialias: Whether edges are blended with what is behind them.
    """
    height, width = background.shape[:2]
    image = background.astype(np.float32)
    masks = np.zeros((len(objects), height, width), bool)
    for i, item in enumerate(objects):
        rows, columns, coverage = rasterize(item, height, width)
        solid = coverage >= 0.5
        _add_on_top(masks, i, rows, columns, solid)
        if not coverage.size:
            continue
        texture_rng = np.random.default_rng(item.texture_seed)
        coarse = texture_rng.uniform(-1, 1, (4, 4, 1)).astype(np.float32)
        texture = cv2.resize(coarse, coverage.shape[::-1], interpolation=cv2.INTER_LINEAR)[..., None]
        color = np.array(item.rgb, np.float32) * (1 + item.texture_contrast * texture)
        opacity = (coverage if antialias else solid.astype(np.float32))[..., None]
        image[rows, columns] += opacity * (color - image[rows, columns])
    if noise:
        image += rng.integers(-noise, noise + 1, image.shape, dtype=np.int8)
    is_visible = masks.reshape(len(objects), -1).any(1) if len(objects) else np.zeros(0, bool)
    visible = np.flatnonzero(is_visible)
    return Scene(
        image=np.clip(image, 0, 255).astype(np.uint8),
        masks=masks[visible],
        xyxy=masks_to_xyxy(masks[visible]),
        pairs=tuple((objects[i].color, objects[i].shape) for i in visible.tolist()),
        ids=visible.astype(np.int64),
    )


def _add_on_top(masks: NDArray[np.bool_], i: int, rows: slice, columns: slice, solid: NDArray[np.bool_]) -> None:
    """Set the mask of object `i`, and remove its pixels from the masks of the objects below it."""
    masks[:i, rows, columns] &= ~solid
    masks[i, rows, columns] = solid


def load_photos(folder: str | Path | None, max_side: int = 900) -> list[NDArray[np.uint8]]:
    """Load photos for backgrounds.

    Args:
        folder: Searched recursively for JPEG, PNG and WebP files; None for no photos.
        max_side: Longest side in pixels; larger photos are scaled down.

    Returns:
        RGB arrays `(H, W, 3) uint8`. Unreadable files, and those with a side below 96 px, are left out.

    >>> load_photos(None)
    []
    """
    from PIL import Image, ImageOps

    if folder is None:
        return []
    photos = []
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() not in {".jpg", ".jpeg", ".png", ".webp"}:
            continue
        try:
            with Image.open(path) as photo:
                rgb = ImageOps.exif_transpose(photo).convert("RGB")
        except (OSError, Image.DecompressionBombError):
            continue
        if min(rgb.size) >= 96:
            rgb.thumbnail((max_side, max_side))
            photos.append(np.asarray(rgb))
    return photos


def make_background(
    rng: np.random.Generator, height: int, width: int, photos: Sequence[NDArray[np.uint8]] = ()
) -> NDArray[np.uint8]:
    """Make a flat, gradient, noise or photo background, each equally likely; no photo if there are none.

    Args:
        rng: Source of randomness.
        height: Height in pixels.
        width: Width in pixels.
        photos: RGB arrays to crop from.

    Returns:
        RGB, `(height, width, 3) uint8`.

    >>> make_background(np.random.default_rng(0), 4, 6).shape
    (4, 6, 3)
    """
    kind: Literal["flat", "gradient", "noise", "photo"]
    kind = rng.choice(["flat", "gradient", "noise", "photo"][: 4 if len(photos) else 3])
    if kind == "photo":
        return _photo_crop(rng, height, width, photos)
    if kind == "flat":
        return np.broadcast_to(_random_tone(rng), (height, width, 3)).astype(np.uint8)
    if kind == "gradient":
        return _gradient(rng, height, width)
    return _noise(rng, height, width)


def _photo_crop(
    rng: np.random.Generator, height: int, width: int, photos: Sequence[NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    photo = photos[int(rng.integers(len(photos)))]
    scale = rng.uniform(0.25, 1.0)
    crop_h = max(int(scale * photo.shape[0]), 32)
    crop_w = min(max(int(crop_h * width / height), 32), photo.shape[1])
    y, x = rng.integers(photo.shape[0] - crop_h + 1), rng.integers(photo.shape[1] - crop_w + 1)
    crop = photo[y : y + crop_h, x : x + crop_w]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(crop)


def _random_tone(rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a color: in half of the cases a gray with a slight tint."""
    if rng.random() < 0.5:
        gray = rng.uniform(0, 255)
        return np.clip(gray + rng.uniform(-25, 25, 3), 0, 255).astype(np.float32)
    return rng.uniform(0, 255, 3).astype(np.float32)


def _gradient(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    start, end = _random_tone(rng), _random_tone(rng)
    angle = rng.uniform(0, 2 * math.pi)
    ys, xs = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)].astype(np.float32)
    t = xs * math.cos(angle) + ys * math.sin(angle)
    t = ((t - t.min()) / max(float(np.ptp(t)), 1e-6))[..., None]
    return np.asarray(start + (end - start) * t, np.uint8)


def _noise(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    deviation = rng.uniform(8, 60)
    cell = int(rng.choice([1, 1, 2, 4, 8, 16]))
    grid = (-(-height // cell) + 1, -(-width // cell) + 1, 3 if rng.random() < 0.6 else 1)
    noise = rng.normal(0, deviation, grid).astype(np.float32)
    noise = cv2.resize(noise, (width, height), interpolation=int(rng.choice([cv2.INTER_NEAREST, cv2.INTER_LINEAR])))
    if noise.ndim == 2:
        noise = noise[..., None]
    return np.clip(_random_tone(rng) + noise, 0, 255).astype(np.uint8)


def sample_object(
    rng: np.random.Generator,
    pair: Pair,
    height: int,
    width: int,
    diameter: tuple[float, float] = (0.10, 0.45),
) -> SceneObject:
    """Sample an object of a color and shape, at a random position fully inside the canvas.

    Args:
        rng: Source of randomness.
        pair: Its color and shape.
        height: Height of the canvas in pixels.
        width: Width of the canvas in pixels.
        diameter: Range of its diameter, as a fraction of the canvas's shorter side.

    >>> sample_object(np.random.default_rng(0), ("red", "star"), 96, 96).shape
    'star'
    """
    color, shape = pair
    size = rng.uniform(*diameter) * min(height, width)
    margin = size / 2
    rgb = np.array((COLORS | EXTRA_COLORS)[color]) * rng.uniform(0.8, 1.12) + rng.uniform(-15, 15, 3)
    red, green, blue = np.clip(rgb, 0, 255).tolist()
    return SceneObject(
        color=color,
        shape=shape,
        rgb=(red, green, blue),
        x=rng.uniform(margin, width - margin),
        y=rng.uniform(margin, height - margin),
        diameter=size,
        angle=rng.uniform(0, 2 * math.pi),
        inner_ratio=rng.uniform(*INNER_RATIOS.get(shape, (0.5, 0.5))),
        texture_seed=int(rng.integers(2**31)),
        texture_contrast=rng.uniform(0, 0.08),
    )


def _max_occlusion(objects: Sequence[SceneObject], height: int, width: int) -> float:
    """Return the largest fraction of an object that other objects occlude, 0 to 1."""
    masks = np.zeros((len(objects), height, width), bool)
    areas = []
    for i, item in enumerate(objects):
        rows, columns, coverage = rasterize(item, height, width)
        solid = coverage >= 0.5
        areas.append(max(int(solid.sum()), 1))
        _add_on_top(masks, i, rows, columns, solid)
    visible = masks.reshape(len(objects), -1).sum(1)
    return float(1 - (visible / areas).min())


def make_scene(
    rng: np.random.Generator,
    pairs: Sequence[Pair] = PAIRS,
    count: int | None = None,
    size_hw: tuple[int, int] | None = None,
    photos: Sequence[NDArray[np.uint8]] = (),
    diameter: tuple[float, float] = (0.10, 0.45),
) -> Scene:
    """Make a random scene.

    Args:
        rng: Source of randomness.
        pairs: Color and shape pairs that may appear.
        count: Number of objects, fewer if there is no room; None for a random one from 0 to 8.
        size_hw: Height and width in pixels; None for 96 to 512 px per side at an aspect ratio of at most 2:1.
        photos: RGB arrays to crop backgrounds from.
        diameter: Range of diameters, as a fraction of the canvas's shorter side.

    >>> scene = make_scene(np.random.default_rng(3), count=2, size_hw=(96, 128))
    >>> scene.image.shape, scene.masks.shape
    ((96, 128, 3), (2, 96, 128))
    """
    if size_hw is None:
        long, short = _sample_sides(rng, 96, 512)
        size_hw = (long, short) if rng.random() < 0.5 else (short, long)
    height, width = size_hw
    count = int(rng.integers(0, 9)) if count is None else count
    background = make_background(rng, height, width, photos)
    objects: list[SceneObject] = []
    for _ in range(count):
        for _ in range(12):
            candidate = sample_object(rng, pairs[int(rng.integers(len(pairs)))], height, width, diameter)
            if _fits(candidate, objects, height, width):
                objects.append(candidate)
                break
    noise = int(rng.integers(0, 9))
    return draw_scene(background, objects, rng, noise=noise, antialias=rng.random() < 0.8)


def make_crowded_scene(
    rng: np.random.Generator,
    pairs: Sequence[Pair] = PAIRS,
    count: int | None = None,
    photos: Sequence[NDArray[np.uint8]] = (),
) -> Scene:
    """Make a random scene of many small objects, 320 to 640 px along its longer side.

    Args:
        rng: Source of randomness.
        pairs: Color and shape pairs that may appear; a scene has at most six of them.
        count: Number of objects, fewer if there is no room; None for a random one from 8 to 30.
        photos: RGB arrays to crop backgrounds from.

    >>> len(make_crowded_scene(np.random.default_rng(0), count=12).pairs)
    12
    """
    long = int(rng.integers(320, 641))
    short = int(rng.integers(max(240, -(-long // 2)), long + 1))
    size_hw = (long, short) if rng.random() < 0.5 else (short, long)
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=int(rng.integers(2, 7)))]
    count = int(rng.integers(8, 31)) if count is None else count
    return make_scene(rng, chosen, count, size_hw, photos, diameter=(0.04, 0.12))


def crop_scene(scene: Scene, x: int, y: int, width: int, height: int, min_visible: float = 0.3) -> Scene:
    """Crop a scene, as tiles do.

    Args:
        scene: The scene.
        x: Left edge of the crop, in pixels.
        y: Top edge.
        width: Width of the crop.
        height: Height of the crop.
        min_visible: Smallest fraction of an object's mask inside the crop; objects with less are left out.
    """
    masks = scene.masks[:, y : y + height, x : x + width]
    areas = scene.masks.reshape(len(masks), -1).sum(1)
    kept = np.flatnonzero(masks.reshape(len(masks), -1).sum(1) >= np.maximum(min_visible * areas, 1))
    return Scene(
        image=np.ascontiguousarray(scene.image[y : y + height, x : x + width]),
        masks=np.ascontiguousarray(masks[kept]),
        xyxy=masks_to_xyxy(masks[kept]),
        pairs=tuple(scene.pairs[i] for i in kept.tolist()),
        ids=scene.ids[kept],
    )


def _sample_sides(rng: np.random.Generator, minimum: int, maximum: int) -> tuple[int, int]:
    """Sample the longer side of a canvas, and a shorter one of at least 96 px and half of it."""
    long = int(rng.integers(minimum, maximum + 1))
    return long, int(rng.integers(max(96, -(-long // 2)), long + 1))


def _fits(candidate: SceneObject, objects: Sequence[SceneObject], height: int, width: int) -> bool:
    """Return whether no object would be occluded too much if `candidate` were drawn on top."""
    if not any(
        math.hypot(other.x - candidate.x, other.y - candidate.y) < (other.diameter + candidate.diameter) / 2
        for other in objects
    ):
        return True
    # A small canvas is enough, since only shares of areas matter.
    scale = min(1.0, 128 / max(height, width))
    scaled = [
        replace(item, x=item.x * scale, y=item.y * scale, diameter=item.diameter * scale)
        for item in [*objects, candidate]
    ]
    return _max_occlusion(scaled, math.ceil(height * scale), math.ceil(width * scale)) < MAX_OCCLUSION


def make_clip(
    rng: np.random.Generator,
    frames: int,
    pairs: Sequence[Pair] = PAIRS,
    count: int | None = None,
    size_hw: tuple[int, int] | None = None,
    photos: Sequence[NDArray[np.uint8]] = (),
    speed: float = 0.02,
    away: float = 0.0,
) -> list[Scene]:
    """Make a random clip of objects that move, rotate, change size, occlude each other, leave and return.

    Args:
        rng: Source of randomness.
        frames: Number of frames.
        pairs: Color and shape pairs that may appear.
        count: Number of objects; None for a random one from 1 to 5.
        size_hw: Height and width in pixels; None for 96 to 384 px per side at an aspect ratio of at most 2:1.
        photos: RGB arrays to crop the background from.
        speed: Standard deviation of an object's motion per frame, as a fraction of the canvas's shorter side.
        away: Probability that an object is absent for some consecutive frames. It then either leaves after the
            first frame and returns elsewhere, or enters later.

    Returns:
        One scene per frame, whose `ids` identify the objects. An object that is hidden or outside the canvas is
        missing in the scene.

    >>> clip = make_clip(np.random.default_rng(0), 3, count=2, size_hw=(96, 96))
    >>> [scene.ids.tolist() for scene in clip]
    [[0, 1], [0, 1], [0, 1]]
    """
    if size_hw is None:
        long, short = _sample_sides(rng, 128, 384)
        size_hw = (short, long) if rng.random() < 0.7 else (long, short)
    height, width = size_hw
    count = int(rng.integers(1, 6)) if count is None else count
    background = make_background(rng, height, width, photos)
    objects = [
        sample_object(rng, pairs[int(rng.integers(len(pairs)))], height, width, (0.15, 0.45)) for _ in range(count)
    ]
    motion = _Motion.sample(rng, count, size_hw, speed)
    noise, antialias = int(rng.integers(0, 9)), bool(rng.random() < 0.8)
    absence = _Absence.sample(rng, objects, size_hw, frames, away)
    clip = []
    for t in range(frames):
        moved = [absence.apply(motion.apply(item, i, t), i, t) for i, item in enumerate(objects)]
        clip.append(draw_scene(background, moved, rng, noise=noise, antialias=antialias))
    return clip


def make_occluded_clip(
    rng: np.random.Generator,
    frames: int,
    pairs: Sequence[Pair] = PAIRS,
    size_hw: tuple[int, int] | None = None,
    photos: Sequence[NDArray[np.uint8]] = (),
) -> list[Scene]:
    """Make a random clip that is hard to track: look-alikes that cross, full occlusions, a moving camera.

    Two to four objects that share a color or a shape move through the scene. A larger object passes over one or two of
    them and hides each for 5 to 15 frames, fewer in clips of less than 30 frames. The camera pans, so that objects
    leave and enter.

    Args:
        rng: Source of randomness.
        frames: Number of frames.
        pairs: Color and shape pairs that may appear.
        size_hw: Height and width in pixels; None for 128 to 384 px per side at an aspect ratio of at most 2:1.
        photos: RGB arrays to crop the background from.

    Returns:
        One scene per frame, as `make_clip` returns them.

    >>> clip = make_occluded_clip(np.random.default_rng(0), 40, size_hw=(160, 200))
    >>> len(clip), clip[0].image.shape
    (40, (160, 200, 3))
    """
    if size_hw is None:
        long, short = _sample_sides(rng, 128, 384)
        size_hw = (short, long) if rng.random() < 0.7 else (long, short)
    height, width = size_hw
    color, shape = pairs[int(rng.integers(len(pairs)))]
    alike = [pair for pair in pairs if (pair[0] == color) != (pair[1] == shape)] + [(color, shape)]
    count = int(rng.integers(2, 5))
    objects = [
        sample_object(rng, alike[int(rng.integers(len(alike)))], height, width, (0.14, 0.28)) for _ in range(count)
    ]
    motion = _Motion.sample(rng, count, size_hw, speed=min(0.012, 0.36 / frames))
    pan = rng.normal(0, 0.25, 2) * min(size_hw) / frames
    camera = np.outer(np.arange(frames), pan)
    shift = np.ceil(np.abs(camera[-1])).astype(int)
    wide = make_background(rng, height + int(shift[1]), width + int(shift[0]), photos)
    victims = rng.permutation(count)[: int(rng.integers(1, 3))]
    motion.swell[victims] = 0  # so that they stay hidden for as long as planned
    passes = [_Pass.sample(rng, objects[i], int(i), frames, pairs) for i in victims]
    noise, antialias = int(rng.integers(0, 9)), bool(rng.random() < 0.8)
    clip = []
    for t in range(frames):
        moved = [motion.apply(item, i, t) for i, item in enumerate(objects)]
        drawn = [*moved, *(over.apply(moved[over.below], t) for over in passes)]
        drawn = [replace(item, x=item.x - camera[t, 0], y=item.y - camera[t, 1]) for item in drawn]
        x, y = (np.round(camera[t]).astype(int) + np.where(pan < 0, shift, 0)).tolist()
        background = wide[y : y + height, x : x + width]
        clip.append(draw_scene(background, drawn, rng, noise=noise, antialias=antialias))
    return clip


@dataclass(frozen=True)
class _Pass:
    """An object that passes over another one and hides it for some frames.

    Attributes:
        item: The object on top.
        below: Index of the object that it hides.
        middle: Frame at which it is exactly over that object.
        step: Motion relative to that object, in pixels per frame, `(2,)`.
    """

    item: SceneObject
    below: int
    middle: float
    step: NDArray[np.float64]

    @classmethod
    def sample(
        cls, rng: np.random.Generator, victim: SceneObject, below: int, frames: int, pairs: Sequence[Pair]
    ) -> _Pass:
        hidden = int(rng.integers(5, 16)) if frames >= 30 else int(rng.integers(1, max(2, frames // 3)))
        solid = [pair for pair in pairs if pair[1] in ("circle", "square")]
        item = sample_object(rng, solid[int(rng.integers(len(solid)))], 96, 96)
        # The inscribed circle of a square is smaller than its circumscribed one.
        reach = victim.diameter * rng.uniform(1.45, 1.8)
        inscribed = 1.0 if item.shape == "circle" else math.sqrt(0.5)
        speed = (reach - victim.diameter) / hidden
        heading = rng.uniform(0, 2 * math.pi)
        middle = rng.uniform(0.3, 0.7) * (frames - 1)
        step = speed * np.array([math.cos(heading), math.sin(heading)])
        return cls(replace(item, diameter=reach / inscribed), below, middle, step)

    def apply(self, victim: SceneObject, t: int) -> SceneObject:
        """Return the object on top at frame `t`, given where the object below is."""
        # It approaches and leaves faster than it passes, so that it is away from the victim in most frames.
        offset = t - self.middle
        reach = 1 + 6 * max(abs(offset) - 8, 0) / 8
        x, y = np.array([victim.x, victim.y]) + self.step * offset * reach
        return replace(self.item, x=float(x), y=float(y))


@dataclass(frozen=True)
class _Motion:
    """How the objects of a clip move: a drift that is reflected outside the canvas's edges, and a sway.

    Attributes:
        drift: Motion per frame in pixels, `(n, 2)`.
        sway: Amplitude of an oscillation in pixels, `(n, 2)`.
        phase: Its phase in radians, `(n, 2)`.
        pace: Its relative frequency, `(n, 2)`.
        rotation: Rotation per frame in radians, `(n,)`.
        swell: Amplitude of the change of size, as a fraction of the diameter, `(n,)`.
        swell_pace: Its angular frequency in radians per frame, `(n,)`.
        low: Smallest x and y of an object's center, outside the canvas.
        high: Largest x and y of an object's center.
    """

    drift: NDArray[np.float64]
    sway: NDArray[np.float64]
    phase: NDArray[np.float64]
    pace: NDArray[np.float64]
    rotation: NDArray[np.float64]
    swell: NDArray[np.float64]
    swell_pace: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def sample(cls, rng: np.random.Generator, count: int, size_hw: tuple[int, int], speed: float) -> _Motion:
        height, width = size_hw
        side = min(size_hw)
        drift = rng.normal(0, speed * side, (count, 2))
        sway = rng.uniform(0, 0.12 * side, (count, 2))
        phase, pace = rng.uniform(0, 2 * math.pi, (2, count, 2))
        rotation = rng.normal(0, 0.05, count)
        swell, swell_pace = rng.uniform(0, 0.25, count), rng.uniform(0.02, 0.15, count)
        # An object moves out by a margin and returns where it left.
        low, high = np.array([-0.3 * side, -0.3 * side]), np.array([width + 0.3 * side, height + 0.3 * side])
        return cls(drift, sway, phase, pace, rotation, swell, swell_pace, low, high)

    def apply(self, item: SceneObject, i: int, t: int) -> SceneObject:
        """Return object `i` as it is at frame `t`, given as it was at the first one."""
        center = np.array([item.x, item.y]) + self.drift[i] * t
        center += self.sway[i] * (np.sin(self.phase[i] + 0.05 * self.pace[i] * t) - np.sin(self.phase[i]))
        span = self.high - self.low
        x, y = self.high - np.abs((center - self.low) % (2 * span) - span)  # reflected at both ends
        diameter = item.diameter * (1 + self.swell[i] * math.sin(self.swell_pace[i] * t))
        angle = item.angle + self.rotation[i] * t
        return replace(item, x=float(x), y=float(y), diameter=diameter, angle=angle)


@dataclass(frozen=True)
class _Absence:
    """When the objects of a clip are absent, and where they return.

    Attributes:
        spans: First frame without the object and first frame with it again, `(n, 2)`; 0 and 0 for none.
        offset: How far from their own path objects return, in pixels, `(n, 2)`.
        size_hw: Height and width of the canvas.
    """

    spans: NDArray[np.int64]
    offset: NDArray[np.float64]
    size_hw: tuple[int, int]

    @classmethod
    def sample(
        cls,
        rng: np.random.Generator,
        objects: Sequence[SceneObject],
        size_hw: tuple[int, int],
        frames: int,
        probability: float,
    ) -> _Absence:
        height, width = size_hw
        count = len(objects)
        spans = np.zeros((count, 2), int)
        if probability and frames > 2:
            start = np.where(rng.random(count) < 0.7, rng.integers(1, frames - 1, count), 0)
            stop = start + rng.integers(1, max(2, frames - 1), count)
            spans = np.where((rng.random(count) < probability)[:, None], np.stack([start, stop], 1), 0)
        centers = np.reshape([(item.x, item.y) for item in objects], (count, 2))
        offset = rng.uniform(0.15, 0.85, (count, 2)) * (width, height) - centers
        return cls(spans, offset, size_hw)

    def apply(self, item: SceneObject, i: int, t: int) -> SceneObject:
        """Move object `i` out of the canvas where it is absent at frame `t`, and elsewhere once it has returned."""
        start, stop = self.spans[i]
        if start <= t < stop:
            return replace(item, x=-2.0 * item.diameter)
        if 0 < stop <= t:
            height, width = self.size_hw
            x, y = np.clip((item.x, item.y) + self.offset[i], 0, (width, height))
            return replace(item, x=float(x), y=float(y))
        return item
