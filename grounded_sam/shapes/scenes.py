"""Scenes and clips of coloured shapes, drawn with exact ground truth.

A scene is a canvas of 96 to 512 px a side with up to eight objects, each a shape in a colour. The
truth of an object is what can be seen of it: its mask without the parts that others cover, and the
box of that mask. Everything is drawn from one `numpy.random.Generator`, so a seed is a scene.
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

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
#: More colours for training alone: with few pairs a model learns them by heart, and fails on unseen ones.
EXTRA_COLOURS = {
    "cyan": (40, 200, 210),
    "pink": (245, 130, 190),
    "brown": (125, 80, 45),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
#: More shapes, for the same reason.
EXTRA_SHAPES = ("heart", "arrow", "moon", "diamond")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
#: Colour and shape pairs that no training scene or phrase holds: the zero-shot test.
UNSEEN = (("green", "triangle"), ("purple", "cross"), ("red", "ring"), ("blue", "star"))

Background = Literal["flat", "gradient", "noise", "photo"]
#: Share of an object that others may cover.
MAX_COVERED = 1 / 3


@dataclass(frozen=True)
class Thing:
    """One object: what it is and where it lies, in pixels of its canvas."""

    colour: str
    shape: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    diameter: float  # of the circle around it
    angle: float  # radians
    inner: float  # hole of a ring, notch of a star, arm of a cross; share of the outer radius
    texture: int  # seed of the pattern on its surface
    contrast: float  # of that pattern, 0 to 0.08


@dataclass(frozen=True)
class Scene:
    """An image and the truth about it; objects in drawing order, fully hidden ones kept out.

    Attributes:
        image: RGB, `(H, W, 3) uint8`.
        masks: what is visible of each object, `(n, H, W) bool`.
        xyxy: boxes of the masks in pixels, right and bottom exclusive, `(n, 4) float32`.
        pairs: colour and shape of each object.
        ids: which object of the clip it is, `(n,) int64`; 0 to n-1 in a single scene.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    xyxy: NDArray[np.float32]
    pairs: tuple[tuple[str, str], ...]
    ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def outline(shape: str, inner: float) -> list[NDArray[np.float64]]:
    """Closed outlines of a shape in the unit circle; a second one is a hole."""

    def regular(n: int, radius: float = 1.0) -> NDArray[np.float64]:
        turn = np.arange(n) * 2 * math.pi / n
        return radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)

    if shape == "circle":
        return [regular(72)]
    if shape == "square":
        return [regular(4)]
    if shape == "triangle":
        return [regular(3)]
    if shape == "star":
        points = regular(10)
        points[1::2] *= inner
        return [points]
    if shape == "ring":
        return [regular(72), regular(60, inner)]
    if shape == "cross":
        a, b = inner, math.sqrt(1 - inner * inner)
        corners = [(b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a)]
        return [np.array(corners + [(-x, -y) for x, y in corners])]
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        wave = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [np.stack([16 * np.sin(t) ** 3, 2.5 - wave], axis=1) / 17]
    if shape == "arrow":
        upper = [(1.0, 0.0), (0.1, 0.75), (0.1, inner), (-0.9, inner)]
        return [np.array(upper + [(x, -y) for x, y in reversed(upper[1:])])]
    if shape == "moon":
        # The unit circle without one of radius 0.85 around (0.5, 0), which cuts it at these angles.
        outer, hollow = np.linspace(1.015, 2 * math.pi - 1.015, 48), np.linspace(2 * math.pi - 1.538, 1.538, 32)
        bite = np.stack([0.5 + 0.85 * np.cos(hollow), 0.85 * np.sin(hollow)], axis=1)
        return [np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), bite])]
    if shape == "diamond":
        return [np.array([(1.0, 0.0), (0.0, inner), (-1.0, 0.0), (0.0, -inner)])]
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")


INNER = {"star": (0.36, 0.55), "ring": (0.45, 0.7), "cross": (0.22, 0.38), "arrow": (0.2, 0.35), "diamond": (0.5, 0.65)}


def cover(thing: Thing, height: int, width: int) -> tuple[slice, slice, NDArray[np.float32]]:
    """Where a thing covers a canvas: the rows, the columns and the coverage in them, 0 to 1."""
    radius = thing.diameter / 2
    top, left = math.floor(thing.y - radius) - 1, math.floor(thing.x - radius) - 1
    bottom, right = math.ceil(thing.y + radius) + 1, math.ceil(thing.x + radius) + 1
    fine = 4 if radius < 40 else 2
    patch = np.zeros(((bottom - top) * fine, (right - left) * fine), np.uint8)
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    polygons = []
    for points in outline(thing.shape, thing.inner):
        turned = radius * (points @ np.array([[cos, sin], [-sin, cos]]))
        placed = fine * np.add(turned, (thing.x - left, thing.y - top)) - 0.5
        polygons.append(np.round(placed * 16).astype(np.int32))
    cv2.fillPoly(patch, polygons, 255, shift=4)
    small = cv2.resize(patch, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    y0, y1 = max(top, 0), min(bottom, height)
    x0, x1 = max(left, 0), min(right, width)
    if y0 >= y1 or x0 >= x1:
        return slice(0, 0), slice(0, 0), np.zeros((0, 0), np.float32)
    inside = small[y0 - top : y1 - top, x0 - left : x1 - left]
    return slice(y0, y1), slice(x0, x1), inside.astype(np.float32) / 255


def draw(
    background: NDArray[np.uint8],
    things: Sequence[Thing],
    rng: np.random.Generator,
    noise: int = 0,
    smooth: bool = True,
    ids: Sequence[int] | None = None,
) -> Scene:
    """Draw things over a background, later ones on top, with noise of up to `noise` levels."""
    height, width = background.shape[:2]
    image = background.astype(np.float32)
    masks = np.zeros((len(things), height, width), bool)
    for i, thing in enumerate(things):
        rows, columns, alpha = cover(thing, height, width)
        solid = alpha >= 0.5
        masks[:i, rows, columns] &= ~solid
        masks[i, rows, columns] = solid
        if not alpha.size:
            continue
        pattern = np.random.default_rng(thing.texture)
        coarse = pattern.uniform(-1, 1, (4, 4, 1)).astype(np.float32)
        surface = cv2.resize(coarse, alpha.shape[::-1], interpolation=cv2.INTER_LINEAR)[..., None]
        paint = np.array(thing.rgb, np.float32) * (1 + thing.contrast * surface)
        opacity = (alpha if smooth else solid.astype(np.float32))[..., None]
        image[rows, columns] += opacity * (paint - image[rows, columns])
    if noise:
        image += rng.integers(-noise, noise + 1, image.shape, dtype=np.int8)
    seen = masks.reshape(len(things), -1).any(1) if len(things) else np.zeros(0, bool)
    keep = np.flatnonzero(seen).tolist()
    names = np.arange(len(things)) if ids is None else np.asarray(ids)
    return Scene(
        image=np.clip(image, 0, 255).astype(np.uint8),
        masks=masks[keep],
        xyxy=masks_to_xyxy(masks[keep]),
        pairs=tuple((things[i].colour, things[i].shape) for i in keep),
        ids=names[keep].astype(np.int64),
    )


def load_photos(folder: str | Path | None, longest: int = 900) -> list[NDArray[np.uint8]]:
    """Photos of a folder (recursive), as RGB arrays of at most `longest` px, for backgrounds."""
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
            rgb.thumbnail((longest, longest))
            photos.append(np.asarray(rgb))
    return photos


def make_background(
    rng: np.random.Generator, height: int, width: int, photos: Sequence[NDArray[np.uint8]] = ()
) -> NDArray[np.uint8]:
    """A flat, gradient, noise or photo background, each as likely (no photo if none is given)."""
    kind = rng.choice(["flat", "gradient", "noise", "photo"][: 4 if len(photos) else 3])
    if kind == "photo":
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

    def tone() -> NDArray[np.float32]:
        if rng.random() < 0.5:  # a grey, more or less tinted
            grey = rng.uniform(0, 255)
            return np.clip(grey + rng.uniform(-25, 25, 3), 0, 255).astype(np.float32)
        return rng.uniform(0, 255, 3).astype(np.float32)

    if kind == "flat":
        return np.broadcast_to(tone(), (height, width, 3)).astype(np.uint8)
    if kind == "gradient":
        a, b = tone(), tone()
        turn = rng.uniform(0, 2 * math.pi)
        ys, xs = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)].astype(np.float32)
        t = xs * math.cos(turn) + ys * math.sin(turn)
        t = ((t - t.min()) / max(float(np.ptp(t)), 1e-6))[..., None]
        return np.asarray(a + (b - a) * t, np.uint8)
    spread = rng.uniform(8, 60)
    cell = int(rng.choice([1, 1, 2, 4, 8, 16]))
    grid = (-(-height // cell) + 1, -(-width // cell) + 1, 3 if rng.random() < 0.6 else 1)
    field_ = rng.normal(0, spread, grid).astype(np.float32)
    field_ = cv2.resize(field_, (width, height), interpolation=int(rng.choice([cv2.INTER_NEAREST, cv2.INTER_LINEAR])))
    if field_.ndim == 2:
        field_ = field_[..., None]
    return np.clip(tone() + field_, 0, 255).astype(np.uint8)


def make_thing(
    rng: np.random.Generator,
    pair: tuple[str, str],
    height: int,
    width: int,
    diameter: tuple[float, float] = (0.10, 0.45),
) -> Thing:
    """A thing of a colour and shape at a random place, all of it inside the canvas."""
    colour, shape = pair
    size = rng.uniform(*diameter) * min(height, width)
    margin = size / 2
    rgb = np.array((COLOURS | EXTRA_COLOURS)[colour]) * rng.uniform(0.8, 1.12) + rng.uniform(-15, 15, 3)
    red, green, blue = np.clip(rgb, 0, 255).tolist()
    return Thing(
        colour=colour,
        shape=shape,
        rgb=(red, green, blue),
        x=rng.uniform(margin, width - margin),
        y=rng.uniform(margin, height - margin),
        diameter=size,
        angle=rng.uniform(0, 2 * math.pi),
        inner=rng.uniform(*INNER.get(shape, (0.5, 0.5))),
        texture=int(rng.integers(2**31)),
        contrast=rng.uniform(0, 0.08),
    )


def _covered(things: Sequence[Thing], height: int, width: int) -> float:
    """The largest share of any thing that the others cover."""
    masks = np.zeros((len(things), height, width), bool)
    areas = []
    for i, thing in enumerate(things):
        rows, columns, alpha = cover(thing, height, width)
        solid = alpha >= 0.5
        areas.append(max(int(solid.sum()), 1))
        masks[:i, rows, columns] &= ~solid
        masks[i, rows, columns] = solid
    visible = masks.reshape(len(things), -1).sum(1)
    return float(1 - (visible / areas).min())


def make_scene(
    rng: np.random.Generator,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    count: int | None = None,
    size_hw: tuple[int, int] | None = None,
    photos: Sequence[NDArray[np.uint8]] = (),
) -> Scene:
    """One scene.

    Args:
        rng: where everything is drawn from.
        pairs: colour and shape pairs that may appear.
        count: how many objects to place, 0 to 8 by chance if not given; fewer if there is no room.
        size_hw: canvas, 96 to 512 px a side and at most 2:1 by chance if not given.
        photos: RGB arrays to crop backgrounds from.
    """
    if size_hw is None:
        long = int(rng.integers(96, 513))
        short = int(rng.integers(max(96, -(-long // 2)), long + 1))
        size_hw = (long, short) if rng.random() < 0.5 else (short, long)
    height, width = size_hw
    count = int(rng.integers(0, 9)) if count is None else count
    background = make_background(rng, height, width, photos)
    things: list[Thing] = []
    for _ in range(count):
        for _ in range(12):
            thing = make_thing(rng, pairs[int(rng.integers(len(pairs)))], height, width)
            if not any(math.hypot(t.x - thing.x, t.y - thing.y) < (t.diameter + thing.diameter) / 2 for t in things):
                break
            # Only shares matter, so overlap is judged on a small canvas.
            scale = min(1.0, 128 / max(height, width))
            small = [replace(t, x=t.x * scale, y=t.y * scale, diameter=t.diameter * scale) for t in [*things, thing]]
            if _covered(small, math.ceil(height * scale), math.ceil(width * scale)) < MAX_COVERED:
                break
        else:
            continue
        things.append(thing)
    noise = int(rng.integers(0, 9))
    return draw(background, things, rng, noise=noise, smooth=rng.random() < 0.8)


def make_clip(
    rng: np.random.Generator,
    frames: int,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    count: int | None = None,
    size_hw: tuple[int, int] | None = None,
    photos: Sequence[NDArray[np.uint8]] = (),
    speed: float = 0.02,
    away: float = 0.0,
) -> list[Scene]:
    """A clip: things that move, turn, grow and shrink, pass over each other, leave and come back.

    Args:
        rng: where everything is drawn from.
        frames: how many.
        pairs, size_hw, photos: see `make_scene`.
        count: how many objects, 1 to 5 by chance if not given.
        speed: typical way of an object from frame to frame, share of the canvas's shorter side.
        away: chance of an object to be out of the picture for a stretch of frames, not at the first one,
            and to come back somewhere else, or of one to come in later.

    Returns:
        One scene a frame; `ids` says which object of the clip each is. An object that is hidden or
        outside in a frame is not in that scene.
    """
    if size_hw is None:
        long = int(rng.integers(128, 385))
        short = int(rng.integers(max(96, -(-long // 2)), long + 1))
        size_hw = (short, long) if rng.random() < 0.7 else (long, short)
    height, width = size_hw
    side = min(size_hw)
    count = int(rng.integers(1, 6)) if count is None else count
    background = make_background(rng, height, width, photos)
    things = [make_thing(rng, pairs[int(rng.integers(len(pairs)))], height, width, (0.15, 0.45)) for _ in range(count)]
    drift = rng.normal(0, speed * side, (count, 2))
    sway = rng.uniform(0, 0.12 * side, (count, 2))
    phase, pace = rng.uniform(0, 2 * math.pi, (2, count, 2))
    turn = rng.normal(0, 0.05, count)
    swell, swell_pace = rng.uniform(0, 0.25, count), rng.uniform(0.02, 0.15, count)
    # An object goes out by a margin and comes back from where it left.
    low, high = np.array([-0.3 * side, -0.3 * side]), np.array([width + 0.3 * side, height + 0.3 * side])
    noise, smooth = int(rng.integers(0, 9)), bool(rng.random() < 0.8)
    gone = np.zeros((count, 2), int)  # first frame away, first one back
    if away and frames > 2:
        start = np.where(rng.random(count) < 0.7, rng.integers(1, frames - 1, count), 0)
        stop = start + rng.integers(1, max(2, frames - 1), count)
        gone = np.where((rng.random(count) < away)[:, None], np.stack([start, stop], 1), 0)
    back = rng.uniform(0.15, 0.85, (count, 2)) * (width, height) - [(thing.x, thing.y) for thing in things]
    clip = []
    for t in range(frames):
        now = []
        for i, thing in enumerate(things):
            place = np.array([thing.x, thing.y]) + drift[i] * t
            place += sway[i] * (np.sin(phase[i] + 0.05 * pace[i] * t) - np.sin(phase[i]))
            span = high - low
            folded = np.abs((place - low) % (2 * span) - span)  # there and back again
            x, y = high - folded
            if gone[i, 0] <= t < gone[i, 1]:
                x = -2.0 * thing.diameter
            elif 0 < gone[i, 1] <= t:
                x, y = np.clip((x, y) + back[i], 0, (width, height))
            size = thing.diameter * (1 + swell[i] * math.sin(swell_pace[i] * t))
            now.append(replace(thing, x=float(x), y=float(y), diameter=size, angle=thing.angle + turn[i] * t))
        clip.append(draw(background, now, rng, noise=noise, smooth=smooth))
    return clip
