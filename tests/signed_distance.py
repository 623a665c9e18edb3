"""Synthetic scenes and clips of colored shapes, drawn with signed distance functions.

A second independent generator for measuring detectors, segmenters and trackers. It shares its ground-truth types with
`independent.py` and no drawing code with any other generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from independent import LabeledShape, TrackedShape
from PIL import Image, ImageOps

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PROPORTIONS = {"star": (0.36, 0.55), "ring": (0.45, 0.70), "cross": (0.22, 0.38)}
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
MINIMUM_VISIBLE = 2 / 3
MINIMUM_PIXELS = 12
HIDDEN_FRAMES = (5, 15)


def star_distance(x: np.ndarray, y: np.ndarray, points: int, outer: float, inner: float) -> np.ndarray:
    """Compute the signed distance to a star with a tip on the positive x axis.

    A triangle is a star of 3 points with an inner radius of 0.5 of the outer one, a square a star of 4 with 0.707.

    Args:
        x: Coordinates relative to the center.
        y: Coordinates relative to the center.
        points: Number of tips.
        outer: Radius of the tips.
        inner: Radius of the notches between them.

    Returns:
        The distances, negative inside.
    """
    half = math.pi / points
    angle = np.abs((np.arctan2(y, x) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    from_tip_x, from_tip_y = radius * np.cos(angle) - outer, radius * np.sin(angle)
    edge_x, edge_y = inner * math.cos(half) - outer, inner * math.sin(half)
    along = np.clip((from_tip_x * edge_x + from_tip_y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
    distance = np.hypot(from_tip_x - along * edge_x, from_tip_y - along * edge_y)
    inside = edge_x * from_tip_y - edge_y * from_tip_x > 0
    return np.where(inside, -distance, distance)


def box_distance(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Compute the signed distance to an axis-aligned rectangle around the origin, negative inside."""
    beyond_x, beyond_y = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(beyond_x, 0), np.maximum(beyond_y, 0)) + np.minimum(np.maximum(beyond_x, beyond_y), 0)


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float, proportion: float) -> np.ndarray:
    """Compute the signed distance to a shape around the origin.

    Args:
        shape: One of `SHAPES`.
        x: Coordinates relative to the center.
        y: Coordinates relative to the center.
        radius: Radius of the circumscribed circle.
        proportion: Inner radius of a star, hole of a ring or arm half-width of a cross, as a share of the radius.

    Returns:
        The distances, negative inside.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - radius * (1 + proportion) / 2) - radius * (1 - proportion) / 2
    if shape == "cross":
        width = radius * proportion
        length = math.sqrt(radius**2 - width**2)
        return np.minimum(box_distance(x, y, length, width), box_distance(x, y, width, length))
    points, inner = {"triangle": (3, 0.5), "square": (4, math.sqrt(0.5)), "star": (5, proportion)}[shape]
    return star_distance(x, y, points, radius, radius * inner)


@dataclass(frozen=True)
class _Figure:
    """How an object looks, apart from where it is.

    Attributes:
        color: Name of its color.
        shape: Name of its shape.
        radius: Radius of the circumscribed circle in pixels.
        proportion: See `shape_distance`.
        rgb: The color that is painted.
        contrast: Amplitude of the texture, as a share of the color.
        frequencies: Waves of the texture along the two axes of the object, in radians per radius.
        phases: Phases of these waves.
    """

    color: str
    shape: str
    radius: float
    proportion: float
    rgb: np.ndarray
    contrast: float
    frequencies: np.ndarray
    phases: np.ndarray

    def paint(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Compute the surface at coordinates relative to the center, RGB `(..., 3)`."""
        wave_x, wave_y = self.frequencies / self.radius
        texture = np.sin(wave_x * x + self.phases[0]) * np.cos(wave_y * y + self.phases[1])
        return self.rgb * (1 + self.contrast * texture[..., None])


def _make_figure(rng: np.random.Generator, color: str, shape: str, radius: float) -> _Figure:
    rgb = np.array(COLORS[color]) * rng.uniform(0.80, 1.12) + rng.uniform(-15, 15, 3)
    return _Figure(
        color,
        shape,
        radius,
        proportion=rng.uniform(*PROPORTIONS.get(shape, (1, 1))),
        rgb=rgb.clip(0, 255),
        contrast=rng.uniform(0, 0.08) * rng.integers(2),
        frequencies=rng.uniform(0, 9, 2) * rng.integers(0, 2, 2),
        phases=rng.uniform(0, 2 * math.pi, 2),
    )


class _Canvas:
    """An image in the making that remembers which object is on top at each pixel.

    Attributes:
        pixels: The image, RGB `(H, W, 3)` floats; None where only the labels are of interest.
        labels: Index of the object on top, `(H, W)`; -1 for the background.
        areas: Areas of the objects in pixels, hidden parts included.
    """

    def __init__(self, size: tuple[int, int], background: np.ndarray | None = None) -> None:
        self.pixels = None if background is None else background.astype(np.float32)
        self.labels = np.full(size, -1, np.int16)
        self.areas: list[int] = []

    def draw(
        self, figure: _Figure, center: tuple[float, float], degrees: float, minimum_visible: float = 0.0
    ) -> np.ndarray | None:
        """Draw an object on top, unless that would hide too much of another one.

        Args:
            figure: What to draw.
            center: Its x and y; may be outside the canvas.
            degrees: Its rotation.
            minimum_visible: Share of each earlier object that has to stay visible.

        Returns:
            The mask of the object, `(H, W) bool`; None if nothing was drawn.
        """
        height, width = self.labels.shape
        reach = figure.radius + 1
        left, right = np.clip([math.floor(center[0] - reach), math.ceil(center[0] + reach)], 0, width)
        top, bottom = np.clip([math.floor(center[1] - reach), math.ceil(center[1] + reach)], 0, height)
        window = np.s_[top:bottom, left:right]
        right_of = (np.arange(left, right)[None] + 0.5 - center[0]).astype(np.float32)
        below = (np.arange(top, bottom)[:, None] + 0.5 - center[1]).astype(np.float32)
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        x, y = cos * right_of + sin * below, cos * below - sin * right_of
        coverage = np.clip(0.5 - shape_distance(figure.shape, x, y, figure.radius, figure.proportion), 0, 1)
        mask = np.zeros((height, width), bool)
        mask[window] = coverage > 0.5
        if minimum_visible and not self._leaves_visible(mask, minimum_visible):
            return None
        if self.pixels is not None:
            alpha = coverage[..., None]
            self.pixels[window] = (1 - alpha) * self.pixels[window] + alpha * figure.paint(x, y)
        self.labels[mask] = len(self.areas)
        self.areas.append(int(mask.sum()))
        return mask

    def visible_areas(self, hidden: np.ndarray | None = None) -> np.ndarray:
        """Count the visible pixels of each object, optionally without those under a mask."""
        labels = self.labels if hidden is None else self.labels[~hidden]
        return np.bincount(labels.ravel() + 1, minlength=len(self.areas) + 1)[1:]

    def _leaves_visible(self, mask: np.ndarray, share: float) -> bool:
        return bool(np.all(self.visible_areas(mask) >= share * np.array(self.areas)))

    def finish(self, rng: np.random.Generator, noise: float) -> np.ndarray:
        """Return the image with noise, RGB `(H, W, 3) uint8`."""
        assert self.pixels is not None
        grain = (rng.standard_normal(self.pixels.shape, np.float32) * (noise / 2)).clip(-noise, noise)
        return np.rint(self.pixels + grain).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=32)
def _read_photo(path: Path) -> Image.Image:
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        levels = np.asarray(image, np.float32)
        image = Image.fromarray((levels * (255 / max(levels.max(), 1))).astype(np.uint8))
    return image.convert("RGB")


def _photo_crop(rng: np.random.Generator, height: int, width: int, photo: Image.Image) -> np.ndarray:
    scale = rng.uniform(0.4, 1) * min(photo.width / width, photo.height / height)
    left = rng.uniform(0, photo.width - scale * width)
    top = rng.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    crop = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box=box))
    return crop[:, ::-1] if rng.integers(2) else crop


def _gradient(rng: np.random.Generator, height: int, width: int, radial: bool) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    if radial:
        ramp = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height))
    else:
        angle = rng.uniform(0, 2 * math.pi)
        ramp = math.cos(angle) * x + math.sin(angle) * y
    ramp = (ramp - ramp.min()) / np.ptp(ramp)
    start, end = rng.uniform(0, 255, (2, 3))
    return start + ramp[..., None] * (end - start)


def _smooth_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    cells = rng.integers(2, 12)
    center, amplitude = rng.uniform(0, 255, 3), rng.uniform(20, 160)
    grid = (center + amplitude * rng.uniform(-1, 1, (cells, cells, 3))).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _fine_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    grain, channels = int(rng.integers(1, 4)), int(rng.choice([1, 3]))
    noise = rng.normal(0, rng.uniform(5, 45), (math.ceil(height / grain), math.ceil(width / grain), channels))
    noise = noise.repeat(grain, axis=0).repeat(grain, axis=1)[:height, :width]
    return (rng.uniform(0, 255, 3) + noise).clip(0, 255)


def _background(rng: np.random.Generator, height: int, width: int, photos: list[Path]) -> np.ndarray:
    kinds = ["flat", "linear", "radial", "smooth", "fine"] + (["photo"] * 2 if photos else [])
    kind = kinds[rng.integers(len(kinds))]
    if kind == "photo":
        return _photo_crop(rng, height, width, _read_photo(photos[rng.integers(len(photos))]))
    if kind == "smooth":
        return _smooth_noise(rng, height, width)
    if kind == "fine":
        return _fine_noise(rng, height, width)
    if kind == "flat":
        return np.broadcast_to(rng.uniform(0, 255, 3), (height, width, 3))
    return _gradient(rng, height, width, radial=kind == "radial")


def _oriented(rng: np.random.Generator, short: int, long: int) -> tuple[int, int]:
    """Return height and width, landscape or portrait at random."""
    return (short, long) if rng.integers(2) else (long, short)


def _blank_canvas(rng: np.random.Generator, short: int, long: int, photos: list[Path]) -> _Canvas:
    size = _oriented(rng, short, long)
    return _Canvas(size, _background(rng, *size, photos))


def _place(
    rng: np.random.Generator,
    canvas: _Canvas,
    pair: tuple[str, str],
    diameters: tuple[float, float],
    neighbor: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """Draw an object where it fits.

    The largest allowed diameter shrinks from try to try.

    Args:
        rng: Source of randomness.
        canvas: Where to draw.
        pair: Color and shape.
        diameters: Smallest and largest diameter, as shares of the canvas's shorter side.
        neighbor: Center of another object to be close to; None for anywhere.

    Returns:
        The center of the object.

    Raises:
        ValueError: If there is no room.
    """
    height, width = canvas.labels.shape
    smallest, largest = diameters
    for shrink in np.linspace(0, 1, 200):
        limit = largest - shrink * (largest - smallest)
        radius = rng.uniform(smallest, limit) * min(height, width) / 2
        low, high = np.full(2, radius), np.array([width, height]) - radius
        center = rng.uniform(low, high)
        if neighbor is not None and shrink < 0.5:
            angle, distance = rng.uniform(0, 2 * math.pi), radius * rng.uniform(1.2, 2.5)
            center = (np.array(neighbor) + distance * np.array([math.cos(angle), math.sin(angle)])).clip(low, high)
        figure = _make_figure(rng, *pair, radius)
        if canvas.draw(figure, (center[0], center[1]), rng.uniform(0, 360), MINIMUM_VISIBLE) is not None:
            return center[0], center[1]
    raise ValueError(f"no room for another object among {len(canvas.areas)}")


def _finish_scene(
    rng: np.random.Generator, canvas: _Canvas, pairs: list[tuple[str, str]]
) -> tuple[np.ndarray, list[LabeledShape]]:
    objects = [LabeledShape(color, shape, canvas.labels == i) for i, (color, shape) in enumerate(pairs)]
    return canvas.finish(rng, rng.uniform(0, 8)), objects


def random_scene(
    rng: np.random.Generator, photos: list[Path], pairs: list[tuple[str, str]] | None = None, count: int | None = None
) -> tuple[np.ndarray, list[LabeledShape]]:
    """Make a scene of up to eight objects.

    Args:
        rng: Source of randomness.
        photos: Files to take backgrounds from; may be empty.
        pairs: Color and shape pairs that may appear; None for all.
        count: Number of objects; None for a random one from 0 to 8.

    Returns:
        The image, RGB `(H, W, 3) uint8`, and its objects in drawing order.
    """
    short = int(rng.integers(96, 513))
    long = int(rng.integers(short, min(512, 2 * short) + 1))
    canvas = _blank_canvas(rng, short, long, photos)
    choices = pairs or PAIRS
    count = int(rng.integers(0, 9)) if count is None else count
    drawn = [choices[i] for i in rng.integers(len(choices), size=count)]
    for pair in drawn:
        _place(rng, canvas, pair, (0.10, 0.45))
    return _finish_scene(rng, canvas, drawn)


def crowded_scene(
    rng: np.random.Generator, photos: list[Path], count: int | None = None
) -> tuple[np.ndarray, list[LabeledShape]]:
    """Make a scene of many small objects of two to six color and shape pairs.

    Args:
        rng: Source of randomness.
        photos: Files to take backgrounds from; may be empty.
        count: Number of objects; None for a random one from 8 to 30.

    Returns:
        The image, RGB `(H, W, 3) uint8`, and its objects in drawing order.
    """
    long = int(rng.integers(320, 641))
    short = int(rng.integers(math.ceil(long / 2), long + 1))
    canvas = _blank_canvas(rng, short, long, photos)
    count = int(rng.integers(8, 31)) if count is None else count
    different = rng.choice(len(PAIRS), size=rng.integers(2, 7), replace=False)
    repeated = rng.choice(different, size=max(count - len(different), 0))
    drawn = [PAIRS[i] for i in rng.permutation(np.concatenate([different, repeated])[:count])]
    clustering = rng.uniform(0, 0.7)
    centers: list[tuple[float, float]] = []
    for pair in drawn:
        clustered = centers and rng.random() < clustering
        neighbor = centers[rng.integers(len(centers))] if clustered else None
        centers.append(_place(rng, canvas, pair, (0.04, 0.12), neighbor))
    return _finish_scene(rng, canvas, drawn)


@dataclass(frozen=True)
class _Track:
    """How an object of a clip looks and moves: sinusoids along both axes, close to a straight line in a short clip.

    Attributes:
        figure: How it looks.
        anchor: Center at the anchor time, before the camera moves, `(2,)`.
        time: The anchor time in frames.
        velocity: Velocity at the anchor time, which is the fastest, in pixels per frame, `(2,)`.
        periods: Periods of the sinusoids in frames, `(2,)`.
        degrees: Rotation on the first frame.
        spin: Degrees per frame.
    """

    figure: _Figure
    anchor: np.ndarray
    time: float
    velocity: np.ndarray
    periods: np.ndarray
    degrees: float
    spin: float

    def center(self, time: float) -> np.ndarray:
        """Return x and y at a time, before the camera moves."""
        waves = 2 * math.pi / self.periods
        return self.anchor + self.velocity / waves * np.sin(waves * (time - self.time))

    def velocity_at(self, time: float) -> np.ndarray:
        """Return the velocity at a time in pixels per frame."""
        return self.velocity * np.cos(2 * math.pi / self.periods * (time - self.time))


@dataclass(frozen=True)
class _Plan:
    """What happens in a clip.

    Attributes:
        size: Height and width.
        camera: Position of the canvas's corner on each frame, `(frames, 2)` integers, zero at the least.
        tracks: The objects in drawing order.
        occlusions: Index of the hidden object and the time at which it is hidden.
    """

    size: tuple[int, int]
    camera: np.ndarray
    tracks: list[_Track]
    occlusions: list[tuple[int, float]]

    def draw(self, frame: int, background: np.ndarray | None = None) -> _Canvas:
        """Draw a frame on its part of the background; without one, only its labels."""
        canvas = _Canvas(self.size, background)
        for track in self.tracks:
            x, y = track.center(frame) - self.camera[frame]
            canvas.draw(track.figure, (x, y), track.degrees + track.spin * frame)
        return canvas


def _make_camera(rng: np.random.Generator, short: int, frames: int) -> np.ndarray:
    """Return the positions of a slowly panning camera, `(frames, 2)` integers, zero at the least."""
    progress = np.linspace(0, 1, frames)
    if rng.integers(2):
        progress = progress**2 * (3 - 2 * progress)
    total = rng.uniform(0.1, 0.4) * short * min(1, frames / 60)
    angle = rng.uniform(0, 2 * math.pi)
    positions = np.rint(total * progress[:, None] * [math.cos(angle), math.sin(angle)]).astype(int)
    return positions - positions.min(axis=0)


def _look_alikes(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Choose two to four pairs that share the color or the shape; in a third of the cases two are identical."""
    count = int(rng.integers(2, 5))
    colors, shapes = rng.permutation(list(COLORS)).tolist(), rng.permutation(SHAPES).tolist()
    same_color = bool(rng.integers(2))
    pairs = [(colors[0], shapes[i]) if same_color else (colors[i], shapes[0]) for i in range(count)]
    if rng.integers(3) == 0:
        pairs[1] = pairs[0]
    return pairs


def _make_velocity(rng: np.random.Generator, short: int, other: np.ndarray | None = None) -> np.ndarray:
    """Choose a velocity of up to 1% of the shorter side per frame, clearly different from another one."""
    while True:
        speed, angle = rng.uniform(0.004, 0.01) * short, rng.uniform(0, 2 * math.pi)
        velocity = speed * np.array([math.cos(angle), math.sin(angle)])
        if other is None or np.hypot(*(velocity - other)) > 0.006 * short:
            return velocity


def _make_track(
    rng: np.random.Generator, figure: _Figure, anchor: np.ndarray, time: float, velocity: np.ndarray
) -> _Track:
    spin = rng.uniform(-1.5, 1.5) * rng.integers(2)
    return _Track(figure, anchor, time, velocity, rng.uniform(160, 320, 2), rng.uniform(0, 360), spin)


def _crossing_tracks(rng: np.random.Generator, size: tuple[int, int], camera: np.ndarray) -> list[_Track]:
    """Make look-alikes, which cross each other; from the third on some cross the edge of the canvas instead."""
    frames, short = len(camera), min(size)
    extent = np.array(size[::-1])
    tracks: list[_Track] = []
    for color, shape in _look_alikes(rng):
        figure = _make_figure(rng, color, shape, rng.uniform(0.05, 0.10) * short)
        time = rng.uniform(0.2, 0.8) * (frames - 1)
        if tracks and (len(tracks) < 2 or rng.random() < 0.25):
            other = tracks[rng.integers(len(tracks))]
            anchor = other.center(time) + rng.uniform(-0.7, 0.7, 2) * other.figure.radius
            velocity = _make_velocity(rng, short, other.velocity_at(time))
        else:
            place = rng.uniform(0.1, 0.9, 2)
            pan = (camera[-1] - camera[0]) / frames
            if tracks:
                place[np.argmax(np.abs(pan))] = rng.integers(2)
            anchor = place * extent + camera[int(time)]
            velocity = _make_velocity(rng, short, pan)
        tracks.append(_make_track(rng, figure, anchor, time, velocity))
    return tracks


def _occluding_track(rng: np.random.Generator, target: _Track, time: float, short: int) -> _Track:
    """Make a larger solid object that passes over a target around a time, long enough to hide it."""
    velocity = _make_velocity(rng, short, target.velocity_at(time))
    approach = velocity - target.velocity_at(time)
    margin = np.hypot(*approach) * rng.uniform(HIDDEN_FRAMES[0], HIDDEN_FRAMES[1] - 3) / 2
    inscribed = max(target.figure.radius + margin, 1.2 * target.figure.radius)
    shape = ("circle", "square")[rng.integers(2)]
    radius = inscribed * (math.sqrt(2) if shape == "square" else 1)
    colors = [color for color in COLORS if color != target.figure.color]
    figure = _make_figure(rng, colors[rng.integers(len(colors))], shape, radius)
    anchor = target.center(time) + rng.uniform(-0.2, 0.2, 2) * margin
    return _make_track(rng, figure, anchor, time, velocity)


def _make_plan(rng: np.random.Generator, frames: int) -> _Plan:
    short = int(rng.integers(128, 385))
    size = _oriented(rng, short, int(rng.integers(short, min(384, 2 * short) + 1)))
    camera = _make_camera(rng, short, frames)
    tracks = _crossing_tracks(rng, size, camera)
    hidden = rng.permutation(len(tracks))[: rng.integers(1, 3)]
    occlusions = [(int(i), rng.uniform(0.3, 0.7) * (frames - 1)) for i in hidden]
    occluders = [_occluding_track(rng, tracks[i], time, short) for i, time in occlusions]
    return _Plan(size, camera, tracks + occluders, occlusions)


def _longest_run(flags: np.ndarray) -> int:
    """Return the length of the longest run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return int(np.max(edges[1::2] - edges[::2], initial=0))


def _is_good(plan: _Plan) -> bool:
    """Tell whether a plan keeps its promises.

    Every object is seen for some frames, none is hidden for too long while on the canvas, and the objects to hide
    disappear completely for 5 to 15 frames and are half visible or more at a time before and after.
    """
    frames = len(plan.camera)
    centers = np.array([[track.center(frame) for track in plan.tracks] for frame in range(frames)])
    centers -= plan.camera[:, None]
    inside = np.all((centers > 0) & (centers < plan.size[::-1]), axis=2)
    if not all(inside[round(time), index] for index, time in plan.occlusions):
        return False
    areas = np.stack([plan.draw(frame).visible_areas() for frame in range(frames)])
    seen = areas >= MINIMUM_PIXELS
    if np.any(seen.sum(axis=0) < min(10, frames / 4)):
        return False
    if max(_longest_run(column) for column in (inside & ~seen).T) > HIDDEN_FRAMES[1]:
        return False
    clear = seen & (areas > areas.max(axis=0) / 2)
    for index, time in plan.occlusions:
        middle = round(time)
        if not clear[:middle, index].any() or not clear[middle:, index].any():
            return False
        start = np.flatnonzero(seen[:middle, index])[-1] + 1
        end = middle + np.flatnonzero(seen[middle:, index])[0]
        if end - start > HIDDEN_FRAMES[1] or np.sum(areas[start:end, index] == 0) < HIDDEN_FRAMES[0]:
            return False
    return True


def occluded_clip(
    rng: np.random.Generator, photos: list[Path], frames: int = 60
) -> tuple[list[np.ndarray], list[TrackedShape]]:
    """Make a clip of look-alikes that cross each other, larger objects that hide some, and a panning camera.

    Args:
        rng: Source of randomness.
        photos: Files to take backgrounds from; may be empty.
        frames: Number of frames; in less than 30 no object has to be hidden for 5 to 15 frames.

    Returns:
        The frames, RGB `(H, W, 3) uint8`, and the objects in drawing order, the larger ones last.
    """
    plan = _make_plan(rng, frames)
    for _ in range(60 if frames >= 30 else 0):
        if _is_good(plan):
            break
        plan = _make_plan(rng, frames)
    height, width = plan.size
    world_width, world_height = plan.camera.max(axis=0) + [width, height]
    background = _background(rng, world_height, world_width, photos)
    noise = rng.uniform(0, 8)
    images = []
    objects = [TrackedShape(track.figure.color, track.figure.shape, []) for track in plan.tracks]
    for frame, (left, top) in enumerate(plan.camera):
        canvas = plan.draw(frame, background[top : top + height, left : left + width])
        images.append(canvas.finish(rng, noise))
        for i, (item, area) in enumerate(zip(objects, canvas.visible_areas(), strict=True)):
            item.masks.append(canvas.labels == i if area >= MINIMUM_PIXELS else None)
    return images, objects
