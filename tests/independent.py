"""A second generator of shape scenes, written to the description alone.

It shares no code with `grounded_sam.shapes.scenes` (other drawing library, other outlines, other
backgrounds), so that what is measured on it is not how well a model knows its own generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
SHAPES = ["circle", "square", "triangle", "star", "ring", "cross"]
UNSEEN = {("green", "triangle"), ("purple", "cross"), ("red", "ring"), ("blue", "star")}
FINE = 4


@dataclass
class Truth:
    colour: str
    shape: str
    mask: np.ndarray  # (H, W) bool, what can be seen

    @property
    def box(self) -> tuple[int, int, int, int]:
        left, top, right, bottom = Image.fromarray(self.mask).getbbox()
        return left, top, right, bottom


def stencil(
    shape: str, size: tuple[int, int], centre: tuple[float, float], diameter: float, degrees: float
) -> Image.Image:
    """The outline of a shape as a gray picture of the canvas."""
    width, height = size
    big = Image.new("L", (width * FINE, height * FINE), 0)
    pen = ImageDraw.Draw(big)
    x, y, r = centre[0] * FINE, centre[1] * FINE, diameter / 2 * FINE

    def corners(n: int, radius: float, start: float = 0.0) -> list[tuple[float, float]]:
        turns = [math.radians(degrees + start + 360 * i / n) for i in range(n)]
        return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns]

    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            pen.ellipse((x - 0.58 * r, y - 0.58 * r, x + 0.58 * r, y + 0.58 * r), fill=0)
    elif shape == "square":
        pen.polygon(corners(4, r), fill=255)
    elif shape == "triangle":
        pen.polygon(corners(3, r), fill=255)
    elif shape == "star":
        outer, inner = corners(5, r), corners(5, 0.45 * r, 36)
        pen.polygon([p for pair in zip(outer, inner, strict=True) for p in pair], fill=255)
    else:
        arm = 0.3 * r
        reach = math.sqrt(r * r - arm * arm)
        turn = math.radians(degrees)
        for a, b in ((reach, arm), (arm, reach)):
            square = [(-a, -b), (a, -b), (a, b), (-a, b)]
            pen.polygon(
                [
                    (x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn))
                    for u, v in square
                ],
                fill=255,
            )
    return big.resize(size, Image.Resampling.BOX)


def backdrop(rng: np.random.Generator, size: tuple[int, int], photos: list[Path]) -> Image.Image:
    width, height = size
    kind = rng.integers(4 if photos else 3)
    if kind == 0:
        return Image.new("RGB", size, tuple(int(v) for v in rng.integers(0, 256, 3)))
    if kind == 1:
        ends = [Image.new("RGB", size, tuple(int(v) for v in rng.integers(0, 256, 3))) for _ in range(2)]
        ramp = Image.linear_gradient("L").rotate(float(rng.integers(4) * 90)).resize(size)
        return Image.composite(ends[0], ends[1], ramp)
    if kind == 2:
        base, spread = rng.integers(40, 216, 3), rng.uniform(5, 40)
        noise = np.clip(base + rng.normal(0, spread, (height, width, 3)), 0, 255).astype(np.uint8)
        return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))
    with Image.open(photos[rng.integers(len(photos))]) as file:
        photo = ImageOps.exif_transpose(file).convert("RGB")
    scale = max(width / photo.width, height / photo.height) * rng.uniform(1, 2.5)
    photo = photo.resize((max(width, round(photo.width * scale)), max(height, round(photo.height * scale))))
    left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
    return photo.crop((left, top, left + width, top + height))


def scene(
    rng: np.random.Generator, photos: list[Path], pairs: list[tuple[str, str]] | None = None, count: int | None = None
) -> tuple[np.ndarray, list[Truth]]:
    """An RGB picture and its objects, bottom one first."""
    long = int(rng.integers(96, 513))
    short = int(rng.integers(max(96, math.ceil(long / 2)), long + 1)) if long > 96 else 96
    width, height = (long, short) if rng.integers(2) else (short, long)
    picture = backdrop(rng, (width, height), photos)
    choices = pairs or [(c, s) for c in COLOURS for s in SHAPES]
    truths: list[Truth] = []
    whole: list[int] = []
    for _ in range(int(rng.integers(0, 9)) if count is None else count):
        colour, shape = choices[rng.integers(len(choices))]
        for _ in range(30):
            diameter = rng.uniform(0.10, 0.45) * short
            centre = (rng.uniform(diameter / 2, width - diameter / 2), rng.uniform(diameter / 2, height - diameter / 2))
            alpha = stencil(shape, (width, height), centre, diameter, float(rng.uniform(0, 360)))
            mask = np.asarray(alpha) > 127
            left = [(t.mask & ~mask).sum() for t in truths]
            if all(rest >= full * 2 / 3 for rest, full in zip(left, whole, strict=True)):
                break
        else:
            continue
        paint = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.8, 1.12) + rng.uniform(-15, 15, 3), 0, 255)
        stripes = 1 + rng.uniform(0, 0.06) * np.sin(np.arange(width) / rng.uniform(1, 6))[None, :, None]
        layer = np.clip(paint * stripes * np.ones((height, 1, 1)), 0, 255).astype(np.uint8)
        picture.paste(Image.fromarray(layer), (0, 0), alpha)
        for truth in truths:
            truth.mask = truth.mask & ~mask
        truths.append(Truth(colour, shape, mask))
        whole.append(int(mask.sum()))
    noise = int(rng.integers(0, 9))
    grain = rng.integers(-noise, noise + 1, (height, width, 3))
    return np.clip(np.asarray(picture, np.int16) + grain, 0, 255).astype(np.uint8), truths


@dataclass
class Moving:
    """One object of a clip."""

    colour: str
    shape: str
    masks: list[np.ndarray | None]  # per frame, (H, W) bool of what can be seen; None where nothing can


def clip(
    rng: np.random.Generator, photos: list[Path], frames: int = 60, count: int | None = None
) -> tuple[list[np.ndarray], list[Moving]]:
    """RGB frames and their 2 to 6 objects, which move, turn, cross, come in later, leave and return."""
    long = int(rng.integers(200, 361))
    short = int(rng.integers(math.ceil(long / 2), long + 1))
    width, height = (long, short) if rng.random() < 0.7 else (short, long)
    ground = backdrop(rng, (width, height), photos)
    count = int(rng.integers(2, 7)) if count is None else count
    actors = []
    for n in range(count):
        diameter = rng.uniform(0.18, 0.4) * short
        spot = np.array(
            [rng.uniform(diameter / 2, width - diameter / 2), rng.uniform(diameter / 2, height - diameter / 2)]
        )
        heading = rng.uniform(0, 2 * math.pi)
        pace = rng.uniform(0.2, 1.6) * np.array([math.cos(heading), math.sin(heading)]) * short / 200
        outside = (np.array([-0.8 * diameter, spot[1]]), np.array([width + 0.8 * diameter, spot[1]]))[rng.integers(2)]
        role = ["stay", "stay", "enter", "leave and return"][rng.integers(4)] if n else "stay"
        paint = np.clip(np.array(list(COLOURS.values())[k := int(rng.integers(6))]) * rng.uniform(0.85, 1.1), 0, 255)
        actors.append(
            {
                "colour": list(COLOURS)[k],
                "shape": SHAPES[rng.integers(6)],
                "diameter": diameter,
                "spot": spot,
                "pace": pace,
                "outside": outside,
                "role": role,
                "paint": tuple(int(v) for v in paint),
                "turn": rng.uniform(-4, 4),
                "degrees": rng.uniform(0, 360),
                "breathe": rng.uniform(0, 0.12),
            }
        )
    pictures_, moving = [], [Moving(a["colour"], a["shape"], []) for a in actors]
    noise = int(rng.integers(0, 9))
    for t in range(frames):
        picture, seen = ground.copy(), []
        for actor in actors:
            spot = actor["spot"] + actor["pace"] * t
            room = np.array([width, height]) - actor["diameter"]  # bounces off the edges
            spot = actor["diameter"] / 2 + room - np.abs((spot - actor["diameter"] / 2) % (2 * room) - room)
            away = {
                "stay": 0.0,
                "enter": np.clip(1 - (t - 18) / 14, 0, 1),
                "leave and return": np.clip(min((t - 14) / 12, (50 - t) / 12), 0, 1),
            }[actor["role"]]
            spot = spot * (1 - away) + actor["outside"] * away
            size = actor["diameter"] * (1 + actor["breathe"] * math.sin(t / 6))
            degrees = actor["degrees"] + actor["turn"] * t
            alpha = stencil(actor["shape"], (width, height), tuple(spot), size, degrees)
            mask = np.asarray(alpha) > 127
            picture.paste(actor["paint"], (0, 0), alpha)
            seen = [m & ~mask for m in seen] + [mask]
        for thing, mask in zip(moving, seen, strict=True):
            thing.masks.append(mask if mask.sum() >= 12 else None)
        grain = rng.integers(-noise, noise + 1, (height, width, 3))
        pictures_.append(np.clip(np.asarray(picture, np.int16) + grain, 0, 255).astype(np.uint8))
    return pictures_, moving


def pictures(folder: Path) -> list[Path]:
    """Photos to take backgrounds from."""
    return [p for p in sorted(folder.glob("*")) if p.suffix in {".jpg", ".png"} and p.stat().st_size > 50_000]
