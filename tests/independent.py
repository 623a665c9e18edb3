"""A second generator of scenes of shapes, written from the description alone.

It shares no code with `grounded_sam.shapes.scenes` and differs in its drawing library, its outlines and its
backgrounds, so that accuracy measured on it is not that of a model on its own generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
SHAPES = ["circle", "square", "triangle", "star", "ring", "cross"]
#: Shapes that no training names, for measuring examples.
NEW_SHAPES = ["pentagon", "L", "half disc", "crescent"]
#: Pairs that training never uses.
HELD_OUT_PAIRS = {("green", "triangle"), ("purple", "cross"), ("red", "ring"), ("blue", "star")}
OVERSAMPLING = 4


@dataclass
class LabeledShape:
    """Ground truth of an object in a scene.

    Attributes:
        color: Name of its color.
        shape: Name of its shape.
        mask: Its visible part, `(H, W) bool`.
    """

    color: str
    shape: str
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Box of the mask, xyxy in pixels, right and bottom exclusive."""
        left, top, right, bottom = Image.fromarray(self.mask).getbbox()
        return left, top, right, bottom


def shape_mask(
    shape: str, size: tuple[int, int], center: tuple[float, float], diameter: float, degrees: float
) -> Image.Image:
    """Draw a shape, antialiased, on a gray canvas of a size (width, height)."""
    width, height = size
    large = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING), 0)
    pen = ImageDraw.Draw(large)
    x, y, r = center[0] * OVERSAMPLING, center[1] * OVERSAMPLING, diameter / 2 * OVERSAMPLING

    def corners(n: int, radius: float, start: float = 0.0) -> list[tuple[float, float]]:
        angles = [math.radians(degrees + start + 360 * i / n) for i in range(n)]
        return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]

    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            pen.ellipse((x - 0.58 * r, y - 0.58 * r, x + 0.58 * r, y + 0.58 * r), fill=0)
    elif shape in ("half disc", "crescent"):
        pen.pieslice((x - r, y - r, x + r, y + r), degrees, degrees + (180 if shape == "half disc" else 360), fill=255)
        if shape == "crescent":
            angle = math.radians(degrees)
            u, v, bite = x + 0.45 * r * math.cos(angle), y + 0.45 * r * math.sin(angle), 0.8 * r
            pen.ellipse((u - bite, v - bite, u + bite, v + bite), fill=0)
    elif shape == "L":
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        outline = [(-0.7, -0.7), (-0.25, -0.7), (-0.25, 0.25), (0.7, 0.25), (0.7, 0.7), (-0.7, 0.7)]
        pen.polygon([(x + r * (u * cos - v * sin), y + r * (u * sin + v * cos)) for u, v in outline], fill=255)
    elif shape in ("square", "pentagon"):
        pen.polygon(corners(4 if shape == "square" else 5, r), fill=255)
    elif shape == "triangle":
        pen.polygon(corners(3, r), fill=255)
    elif shape == "star":
        outer, inner = corners(5, r), corners(5, 0.45 * r, 36)
        pen.polygon([point for pair in zip(outer, inner, strict=True) for point in pair], fill=255)
    else:
        half_width = 0.3 * r
        half_length = math.sqrt(r * r - half_width * half_width)
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        for a, b in ((half_length, half_width), (half_width, half_length)):
            bar = [(-a, -b), (a, -b), (a, b), (-a, b)]
            pen.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in bar], fill=255)
    return large.resize(size, Image.Resampling.BOX)


def random_background(rng: np.random.Generator, size: tuple[int, int], photos: list[Path]) -> Image.Image:
    """Make a flat, gradient, noise or photo background of a size (width, height)."""
    width, height = size
    kind = rng.integers(4 if photos else 3)
    if kind == 0:
        return Image.new("RGB", size, tuple(int(v) for v in rng.integers(0, 256, 3)))
    if kind == 1:
        ends = [Image.new("RGB", size, tuple(int(v) for v in rng.integers(0, 256, 3))) for _ in range(2)]
        ramp = Image.linear_gradient("L").rotate(float(rng.integers(4) * 90)).resize(size)
        return Image.composite(ends[0], ends[1], ramp)
    if kind == 2:
        base, deviation = rng.integers(40, 216, 3), rng.uniform(5, 40)
        noise = np.clip(base + rng.normal(0, deviation, (height, width, 3)), 0, 255).astype(np.uint8)
        return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))
    with Image.open(photos[rng.integers(len(photos))]) as file:
        photo = ImageOps.exif_transpose(file).convert("RGB")
    scale = max(width / photo.width, height / photo.height) * rng.uniform(1, 2.5)
    photo = photo.resize((max(width, round(photo.width * scale)), max(height, round(photo.height * scale))))
    left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
    return photo.crop((left, top, left + width, top + height))


def random_scene(
    rng: np.random.Generator, photos: list[Path], pairs: list[tuple[str, str]] | None = None, count: int | None = None
) -> tuple[np.ndarray, list[LabeledShape]]:
    """Make a scene.

    Args:
        rng: Source of randomness.
        photos: Files to take backgrounds from.
        pairs: Color and shape pairs that may appear; None for all.
        count: Number of objects; None for a random one from 0 to 8.

    Returns:
        The image, RGB `(H, W, 3) uint8`, and its objects in drawing order.
    """
    long = int(rng.integers(96, 513))
    short = int(rng.integers(max(96, math.ceil(long / 2)), long + 1)) if long > 96 else 96
    width, height = (long, short) if rng.integers(2) else (short, long)
    image = random_background(rng, (width, height), photos)
    choices = pairs or [(color, shape) for color in COLORS for shape in SHAPES]
    objects: list[LabeledShape] = []
    full_areas: list[int] = []
    for _ in range(int(rng.integers(0, 9)) if count is None else count):
        color, shape = choices[rng.integers(len(choices))]
        for _ in range(30):
            diameter = rng.uniform(0.10, 0.45) * short
            center = (rng.uniform(diameter / 2, width - diameter / 2), rng.uniform(diameter / 2, height - diameter / 2))
            alpha = shape_mask(shape, (width, height), center, diameter, float(rng.uniform(0, 360)))
            mask = np.asarray(alpha) > 127
            visible_areas = [(item.mask & ~mask).sum() for item in objects]
            if all(visible >= full * 2 / 3 for visible, full in zip(visible_areas, full_areas, strict=True)):
                break
        else:
            continue
        rgb = np.clip(np.array(COLORS[color]) * rng.uniform(0.8, 1.12) + rng.uniform(-15, 15, 3), 0, 255)
        stripes = 1 + rng.uniform(0, 0.06) * np.sin(np.arange(width) / rng.uniform(1, 6))[None, :, None]
        layer = np.clip(rgb * stripes * np.ones((height, 1, 1)), 0, 255).astype(np.uint8)
        image.paste(Image.fromarray(layer), (0, 0), alpha)
        for item in objects:
            item.mask = item.mask & ~mask
        objects.append(LabeledShape(color, shape, mask))
        full_areas.append(int(mask.sum()))
    return _add_noise(image, rng, int(rng.integers(0, 9))), objects


def _add_noise(image: Image.Image, rng: np.random.Generator, maximum: int) -> np.ndarray:
    pixels = np.asarray(image, np.int16)
    return np.clip(pixels + rng.integers(-maximum, maximum + 1, pixels.shape), 0, 255).astype(np.uint8)


@dataclass
class TrackedShape:
    """Ground truth of an object in a clip.

    Attributes:
        color: Name of its color.
        shape: Name of its shape.
        masks: Its visible part on each frame, `(H, W) bool`; None where less than 12 pixels are visible.
    """

    color: str
    shape: str
    masks: list[np.ndarray | None]


@dataclass
class _MovingShape:
    """How an object of a clip looks and moves.

    Attributes:
        color: Name of its color.
        shape: Name of its shape.
        rgb: The color that is painted.
        diameter: Mean diameter in pixels.
        start: Center on the first frame, as if it were not absent.
        velocity: Pixels per frame.
        outside: A center outside the canvas, where the object is while absent.
        presence: `stay`, `enter` or `leave and return`.
        rotation: Degrees per frame.
        degrees: Rotation on the first frame.
        swell: Amplitude of the change of size, as a share of the diameter.
    """

    color: str
    shape: str
    rgb: tuple[int, ...]
    diameter: float
    start: np.ndarray
    velocity: np.ndarray
    outside: np.ndarray
    presence: str
    rotation: float
    degrees: float
    swell: float

    @classmethod
    def sample(cls, rng: np.random.Generator, width: int, height: int, stays: bool) -> _MovingShape:
        short = min(width, height)
        diameter = rng.uniform(0.18, 0.4) * short
        start = np.array(
            [rng.uniform(diameter / 2, width - diameter / 2), rng.uniform(diameter / 2, height - diameter / 2)]
        )
        heading = rng.uniform(0, 2 * math.pi)
        velocity = rng.uniform(0.2, 1.6) * np.array([math.cos(heading), math.sin(heading)]) * short / 200
        outside = (np.array([-0.8 * diameter, start[1]]), np.array([width + 0.8 * diameter, start[1]]))[rng.integers(2)]
        presence = "stay" if stays else ["stay", "stay", "enter", "leave and return"][rng.integers(4)]
        color = list(COLORS)[rng.integers(6)]
        rgb = np.clip(np.array(COLORS[color]) * rng.uniform(0.85, 1.1), 0, 255)
        return cls(
            color=color,
            shape=SHAPES[rng.integers(6)],
            rgb=tuple(int(v) for v in rgb),
            diameter=diameter,
            start=start,
            velocity=velocity,
            outside=outside,
            presence=presence,
            rotation=rng.uniform(-4, 4),
            degrees=rng.uniform(0, 360),
            swell=rng.uniform(0, 0.12),
        )

    def mask_at(self, t: int, width: int, height: int) -> Image.Image:
        """Draw the object at frame `t`; see `shape_mask`."""
        room = np.array([width, height]) - self.diameter
        center = self.start + self.velocity * t
        # Reflected at the edges of the canvas.
        center = self.diameter / 2 + room - np.abs((center - self.diameter / 2) % (2 * room) - room)
        away = {
            "stay": 0.0,
            "enter": np.clip(1 - (t - 18) / 14, 0, 1),
            "leave and return": np.clip(min((t - 14) / 12, (50 - t) / 12), 0, 1),
        }[self.presence]
        center = center * (1 - away) + self.outside * away
        diameter = self.diameter * (1 + self.swell * math.sin(t / 6))
        return shape_mask(self.shape, (width, height), tuple(center), diameter, self.degrees + self.rotation * t)


def random_clip(
    rng: np.random.Generator, photos: list[Path], frames: int = 60, count: int | None = None
) -> tuple[list[np.ndarray], list[TrackedShape]]:
    """Make a clip of objects that move, rotate, cross, enter late, leave and return.

    Args:
        rng: Source of randomness.
        photos: Files to take backgrounds from.
        frames: Number of frames.
        count: Number of objects; None for a random one from 2 to 6.

    Returns:
        The frames, RGB `(H, W, 3) uint8`, and the objects.
    """
    long = int(rng.integers(200, 361))
    short = int(rng.integers(math.ceil(long / 2), long + 1))
    width, height = (long, short) if rng.random() < 0.7 else (short, long)
    background = random_background(rng, (width, height), photos)
    count = int(rng.integers(2, 7)) if count is None else count
    moving = [_MovingShape.sample(rng, width, height, stays=i == 0) for i in range(count)]
    images, tracks = [], [TrackedShape(item.color, item.shape, []) for item in moving]
    noise = int(rng.integers(0, 9))
    for t in range(frames):
        image, visible = background.copy(), []
        for item in moving:
            alpha = item.mask_at(t, width, height)
            mask = np.asarray(alpha) > 127
            image.paste(item.rgb, (0, 0), alpha)
            visible = [other & ~mask for other in visible] + [mask]
        for track, mask in zip(tracks, visible, strict=True):
            track.masks.append(mask if mask.sum() >= 12 else None)
        images.append(_add_noise(image, rng, noise))
    return images, tracks


def photo_files(folder: Path) -> list[Path]:
    """List the photos of a folder to take backgrounds from: JPEG and PNG files of more than 50 kB."""
    return [p for p in sorted(folder.glob("*")) if p.suffix in {".jpg", ".png"} and p.stat().st_size > 50_000]
