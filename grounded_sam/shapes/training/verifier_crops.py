"""Crops for training the verifier: objects of scenes, random outlines, and boxes of nothing.

They are drawn once, before the training, which then varies their surroundings, masks and orientation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.files import atomic_write
from grounded_sam.shapes.scenes import (
    COLORS,
    EXTRA_COLORS,
    EXTRA_SHAPES,
    SHAPES,
    Pair,
    Scene,
    make_background,
    make_scene,
)
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.verifiers.crops import crop_square

log = logging.getLogger(__name__)

SIZE = 48
ALL_SHAPES, ALL_COLORS = (*SHAPES, *EXTRA_SHAPES), (*COLORS, *EXTRA_COLORS)
#: Label of a crop that shows nothing.
NOTHING = -1
#: Label of the first random outline; those of named shapes are indices into `ALL_SHAPES`.
FIRST_OUTLINE = 100
_OUTLINE_SIDE = 128


@dataclass(frozen=True)
class Crops:
    """Crops and what they show.

    Attributes:
        pixels: RGB, `(n, 48, 48, 3) uint8`.
        masks: Coverage by the object, 0 to 255, `(n, 48, 48) uint8`.
        labels: Color and shape of the object, `(n, 2) int64`: an index into `ALL_COLORS`, and one into `ALL_SHAPES` or
            `FIRST_OUTLINE` plus the number of an outline; both are `NOTHING` where there is none.
    """

    pixels: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @classmethod
    def join(cls, parts: Sequence[Crops]) -> Crops:
        """Concatenate crops."""
        return cls(
            np.concatenate([part.pixels for part in parts]),
            np.concatenate([part.masks for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )


def load_or_draw(path: Path, draw: list[tuple[str, int]], seed: int, pairs: Sequence[Pair], photos: list) -> Crops:
    """Read crops that an earlier start of the same training has drawn, or draw and write them.

    Args:
        path: A `.npz` file.
        draw: Kinds of crops and their numbers: `objects` and `outlines`.
        seed: Seed of all random numbers.
        pairs: Color and shape pairs of objects.
        photos: RGB arrays for backgrounds.
    """
    if path.exists():
        with np.load(path) as arrays:
            return Crops(arrays["pixels"], arrays["masks"], arrays["labels"])
    parts = []
    for kind, count in draw:
        if kind == "objects":
            parts.append(draw_objects(seed, count, pairs, photos))
        else:
            parts.append(draw_outlines(seed, count, photos))
        log.info("%d crops of %s", count, kind)
    crops = Crops.join(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, pixels=crops.pixels, masks=crops.masks, labels=crops.labels)
    return crops


def _jitter(rng: np.random.Generator, xyxy: NDArray[np.floating], amount: float = 0.08) -> NDArray[np.float64]:
    """Move the sides of a box by up to a fraction of its size, as detectors do."""
    x1, y1, x2, y2 = (float(value) for value in xyxy)
    width, height = x2 - x1, y2 - y1
    shift = rng.uniform(-amount, amount, 4) * (width, height, width, height)
    return np.array([x1, y1, x2, y2]) + shift


def draw_objects(seed: int, count: int, pairs: Sequence[Pair], photos: list[NDArray[np.uint8]]) -> Crops:
    """Draw scenes and crop their objects, each in two ways, and in every third scene a box of nothing."""
    pixels: list[NDArray[np.uint8]] = []
    masks: list[NDArray[np.uint8]] = []
    labels: list[tuple[int, int]] = []
    scene_number = 0
    while len(labels) < count:
        rng = np.random.default_rng([seed, 11, scene_number])
        scene_number += 1
        scene = make_scene(rng, pairs, photos=photos, diameter=(0.08, 0.45))
        for i, (color, shape) in enumerate(scene.pairs):
            for _ in range(2):
                box, margin = _jitter(rng, scene.xyxy[i]), rng.uniform(1.05, 1.45)
                mask = scene.masks[i].astype(np.uint8) * 255
                pixels.append(crop_square(scene.image, box, margin, SIZE))
                masks.append(crop_square(mask, box, margin, SIZE, fill=0))
                labels.append((ALL_COLORS.index(color), ALL_SHAPES.index(shape)))
        if scene_number % 3 == 0 and (empty := _crop_nothing(rng, scene)) is not None:
            pixels.append(empty[0])
            masks.append(empty[1])
            labels.append((NOTHING, NOTHING))
    return Crops(np.stack(pixels[:count]), np.stack(masks[:count]), np.array(labels[:count], np.int64))


def _crop_nothing(rng: np.random.Generator, scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
    """Crop a box that contains no object; its mask is what has a similar color as its center."""
    height, width = scene.image.shape[:2]
    for _ in range(10):
        w, h = rng.uniform(0.1, 0.4, 2) * min(height, width)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        box = np.array([x, y, x + w, y + h])
        if len(scene.xyxy) and sv.box_iou_batch(box[None], scene.xyxy).max() > 0.05:
            continue
        margin = rng.uniform(1.05, 1.45)
        crop = crop_square(scene.image, box, margin, SIZE)
        distance = np.abs(crop.astype(int) - crop[SIZE // 2, SIZE // 2]).sum(2)
        similar = (distance <= np.quantile(distance, rng.uniform(0.2, 0.8))).astype(np.uint8) * 255
        inside = np.full((height, width), 255, np.uint8)
        left, top, right, bottom = (round(float(value)) for value in box)
        inside[:top], inside[bottom:], inside[:, :left], inside[:, right:] = 0, 0, 0, 0
        mask = cv2.medianBlur(similar, 5) & crop_square(inside, box, margin, SIZE, fill=0)
        return crop, np.asarray(mask, np.uint8)
    return None


def random_outline(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a random outline: a polygon, a blob, a union of bars, or a figure with a bite.

    Returns:
        A mask of 0 and 255 that lies in the circle inscribed in the canvas, `(128, 128) uint8`.
    """
    canvas = np.zeros((_OUTLINE_SIDE, _OUTLINE_SIDE), np.uint8)
    kind = rng.integers(4)
    if kind == 0:
        cv2.fillPoly(canvas, [_to_pixels(_star_convex(rng, int(rng.integers(3, 10)), 0.3))], 255)
    elif kind == 1:
        cv2.fillPoly(canvas, [_to_pixels(_blob(rng))], 255)
    elif kind == 2:
        for _ in range(int(rng.integers(2, 4))):
            cv2.fillPoly(canvas, [_to_pixels(_bar(rng))], 255)
    else:
        outer = _blob(rng, 0.1) if rng.random() < 0.5 else _star_convex(rng, int(rng.integers(3, 7)), 0.7)
        bite = _blob(rng, 0.1) if rng.random() < 0.5 else _star_convex(rng, int(rng.integers(3, 6)), 0.7)
        cv2.fillPoly(canvas, [_to_pixels(outer)], 255)
        heading = rng.uniform(0, 2 * np.pi)
        offset = rng.uniform(0, 0.9) * np.array([np.cos(heading), np.sin(heading)])
        cv2.fillPoly(canvas, [_to_pixels(bite * rng.uniform(0.35, 0.75) + offset)], 0)
    return canvas if (canvas > 0).mean() > 0.08 else random_outline(rng)


def _to_pixels(points: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.round((0.97 * points + 1) * _OUTLINE_SIDE / 2 - 0.5).astype(np.int32)


def _star_convex(rng: np.random.Generator, corners: int, smallest: float) -> NDArray[np.float64]:
    gaps = rng.uniform(0.5, 1.5, corners)
    angles = np.cumsum(gaps) * 2 * np.pi / gaps.sum()
    radii = rng.uniform(smallest, 1, corners)
    radii /= radii.max()
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _blob(rng: np.random.Generator, waviness: float = 0.3) -> NDArray[np.float64]:
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    radii = np.ones_like(angles)
    for frequency in range(1, 6):
        radii += rng.uniform(-waviness, waviness) * np.cos(frequency * angles + rng.uniform(0, 2 * np.pi))
    radii = np.maximum(radii, 0.15)
    radii /= radii.max()
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _bar(rng: np.random.Generator) -> NDArray[np.float64]:
    length, width = rng.uniform(0.4, 0.7), rng.uniform(0.12, 0.35)
    angle, (x, y) = rng.uniform(0, np.pi), rng.uniform(-0.25, 0.25, 2)
    corners = np.array([(-length, -width), (length, -width), (length, width), (-length, width)])
    cos, sin = np.cos(angle), np.sin(angle)
    return corners @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def draw_outlines(seed: int, count: int, photos: list[NDArray[np.uint8]], views: int = 24) -> Crops:
    """Draw random outlines, each `views` times: at any angle and size, in any color, on any background."""
    pixels: list[NDArray[np.uint8]] = []
    masks: list[NDArray[np.uint8]] = []
    labels: list[tuple[int, int]] = []
    for i in range(count):
        rng = np.random.default_rng([seed, 12, i // views, i % views])
        if i % views == 0:
            outline = random_outline(rng)
        crop, mask, color = draw_outline(rng, outline, photos)
        pixels.append(crop)
        masks.append(mask)
        labels.append((ALL_COLORS.index(color), FIRST_OUTLINE + i // views))
    return Crops(np.stack(pixels), np.stack(masks), np.array(labels, np.int64))


def draw_outline(
    rng: np.random.Generator, outline: NDArray[np.uint8], photos: list[NDArray[np.uint8]]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], str]:
    """Draw an outline in a random color on a random background and crop it; return crop, mask and color."""
    diameter = float(np.exp(rng.uniform(np.log(14), np.log(150))))
    side = int(diameter * 1.7)
    scale = diameter / _OUTLINE_SIDE
    matrix = cv2.getRotationMatrix2D((_OUTLINE_SIDE / 2 - 0.5,) * 2, rng.uniform(0, 360), scale)
    matrix[:, 2] += side / 2 - _OUTLINE_SIDE / 2
    smooth = cv2.GaussianBlur(outline, (0, 0), max(0.4 / scale, 0.5))
    coverage = cv2.warpAffine(smooth, matrix, (side, side), flags=cv2.INTER_LINEAR).astype(np.float32)[..., None] / 255
    color = ALL_COLORS[int(rng.integers(len(ALL_COLORS)))]
    rgb = np.array((COLORS | EXTRA_COLORS)[color]) * rng.uniform(0.8, 1.12) + rng.uniform(-15, 15, 3)
    texture = cv2.resize(rng.uniform(-1, 1, (4, 4)).astype(np.float32), (side, side))[..., None]
    painted = np.clip(rgb * (1 + rng.uniform(0, 0.08) * texture), 0, 255)
    background = make_background(rng, side, side, photos).astype(np.float32)
    image = background + coverage * (painted - background)
    noise = int(rng.integers(0, 9))
    image += rng.integers(-noise, noise + 1, image.shape)
    solid = coverage[..., 0] >= 0.5
    if not solid.any():
        solid[side // 2, side // 2] = True
    box, margin = _jitter(rng, masks_to_xyxy(solid[None])[0]), rng.uniform(1.05, 1.45)
    crop = crop_square(np.clip(image, 0, 255).astype(np.uint8), box, margin, SIZE)
    return crop, crop_square(solid.astype(np.uint8) * 255, box, margin, SIZE, fill=0), color
