"""Small things in a large picture, with tiles and without.

    python benchmarks/tiles.py [--size 400]

Draws 200 shapes of 44 to 71 px into a picture of 4000x3000 px and looks for them by colour with the embedded models.
Prints recall (a box of IoU 0.5), how many shapes have two such boxes of one class, and seconds.

"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import supervision as sv
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from independent import COLOURS, SHAPES, stencil

from grounded_sam import load


def large(rng: np.random.Generator, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture with one shape somewhere in each cell of 200x300 px, and their boxes `(n, 4)`."""
    image = np.empty((rows * 300, columns * 200, 3), np.uint8)
    image[:] = np.linspace(150, 220, columns * 200, dtype=np.uint8)[None, :, None]
    truth = []
    for place in range(columns * rows):
        colour, side = list(COLOURS)[place % len(COLOURS)], int(rng.integers(44, 72))
        drawn = stencil(SHAPES[place % 3], (side, side), (side / 2, side / 2), side - 4, 0.0)
        alpha = np.asarray(drawn, float)[..., None] / 255
        x = place % columns * 200 + int(rng.integers(0, 200 - side))
        y = place // columns * 300 + int(rng.integers(0, 300 - side))
        there = image[y : y + side, x : x + side]
        there[:] = (there * (1 - alpha) + np.array(COLOURS[colour]) * alpha).astype(np.uint8)
        ys, xs = np.nonzero(alpha[..., 0] > 0.5)
        truth.append((x + xs.min(), y + ys.min(), x + xs.max() + 1, y + ys.max() + 1))
    return image, np.array(truth, np.float32)


def found_in(image: np.ndarray, truth: np.ndarray, size: int | None) -> tuple[float, int, float]:
    """Recall, how many shapes have two such boxes of one class, and seconds."""
    model = load(f"tiles.size={'null' if size is None else size}", preset="shapes", segmenter=None)
    begin = time.perf_counter()
    found = model.detect(Image.fromarray(image), {colour: f"{colour} shape" for colour in COLOURS})
    seconds = time.perf_counter() - begin
    overlaps = sv.box_iou_batch(truth, found.xyxy) if len(found) else np.zeros((len(truth), 1))
    twice = 0
    for row in overlaps:
        classes = found.class_id[np.flatnonzero(row >= 0.5)] if len(found) else np.empty(0)
        twice += len(classes) > len(set(classes.tolist()))
    return float((overlaps.max(1) >= 0.5).mean()), twice, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=400)
    args = parser.parse_args()
    image, truth = large(np.random.default_rng(5), 20, 10)
    for size in (None, args.size):
        recall, twice, seconds = found_in(image, truth, size)
        what = "without tiles" if size is None else f"tiles of {size} px"
        print(f"{what}: recall {recall:.3f}, {twice} shapes twice, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
