"""Small objects in a large image, with and without tiles.

    python benchmarks/tiles.py [--size 400]

Draws 200 shapes of 44 to 71 px into an image of 4000x3000 px and detects them by color with the embedded models.
Printed are recall (a box with IoU 0.5), how many shapes have two such boxes of one class, and seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import supervision as sv
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from independent import COLORS, SHAPES, shape_mask

from grounded_sam import load

CELL_HW = (300, 200)


@dataclass(frozen=True)
class DetectionScores:
    """Accuracy and speed of detection in one image.

    Attributes:
        recall: Share of the shapes that are detected.
        duplicates: Number of shapes that are detected twice as the same class.
        seconds: Run time.
    """

    recall: float
    duplicates: int
    seconds: float


def make_large_image(rng: np.random.Generator, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one shape at a random position in each cell of 200x300 px.

    Returns:
        The image, RGB, and the boxes of the shapes, xyxy, `(n, 4)`.
    """
    height, width = CELL_HW
    image = np.empty((rows * height, columns * width, 3), np.uint8)
    image[:] = np.linspace(150, 220, columns * width, dtype=np.uint8)[None, :, None]
    boxes = []
    for cell in range(columns * rows):
        color, side = list(COLORS)[cell % len(COLORS)], int(rng.integers(44, 72))
        mask = shape_mask(SHAPES[cell % 3], (side, side), (side / 2, side / 2), side - 4, 0.0)
        alpha = np.asarray(mask, float)[..., None] / 255
        x = cell % columns * width + int(rng.integers(0, width - side))
        y = cell // columns * height + int(rng.integers(0, height - side))
        patch = image[y : y + side, x : x + side]
        patch[:] = (patch * (1 - alpha) + np.array(COLORS[color]) * alpha).astype(np.uint8)
        ys, xs = np.nonzero(alpha[..., 0] > 0.5)
        boxes.append((x + xs.min(), y + ys.min(), x + xs.max() + 1, y + ys.max() + 1))
    return image, np.array(boxes, np.float32)


def evaluate_tiles(image: np.ndarray, boxes: np.ndarray, size: int | None) -> DetectionScores:
    """Detect the shapes in tiles of a size in pixels; None for the whole image at once."""
    model = load(f"tiles.size={'null' if size is None else size}", preset="shapes", segmenter=None)
    start = time.perf_counter()
    detections = model.detect(Image.fromarray(image), {color: f"{color} shape" for color in COLORS})
    seconds = time.perf_counter() - start
    ious = sv.box_iou_batch(boxes, detections.xyxy) if len(detections) else np.zeros((len(boxes), 1))
    duplicates = 0
    for row in ious:
        classes = detections.class_id[np.flatnonzero(row >= 0.5)] if len(detections) else np.empty(0)
        duplicates += len(classes) > len(set(classes.tolist()))
    return DetectionScores(float((ious.max(1) >= 0.5).mean()), duplicates, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=400)
    args = parser.parse_args()
    image, boxes = make_large_image(np.random.default_rng(5), 20, 10)
    for size in (None, args.size):
        scores = evaluate_tiles(image, boxes, size)
        name = "without tiles" if size is None else f"tiles of {size} px"
        print(f"{name}: recall {scores.recall:.3f}, {scores.duplicates} duplicates, {scores.seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
