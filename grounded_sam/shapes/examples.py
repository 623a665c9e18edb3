"""Make the clip that ships with the package: `python -m grounded_sam.shapes.examples OUT.mp4`."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from grounded_sam.media.mp4 import Mp4Writer
from grounded_sam.shapes.scenes import COLOURS, Scene, Thing, draw, make_background

FRAMES, FPS, SIZE_HW = 96, 24, (240, 360)


def scene(t: int) -> Scene:
    """Frame `t`: two shapes cross, one leaves and returns, one comes in in the middle, one stays and turns."""
    height, width = SIZE_HW
    rng = np.random.default_rng(11)
    background = make_background(rng, height, width)
    u = t / (FRAMES - 1)
    away = float(np.clip(min((u - 0.25) / 0.12, (0.62 - u) / 0.12), 0, 1))
    enters = float(np.clip((u - 0.4) / 0.15, 0, 1))
    places = [
        ("red", "circle", 60 + 240 * u, 75, 62, 0.0),
        ("yellow", "triangle", 300 - 240 * u, 85 + 8 * math.sin(9 * u), 70, 2 * u),
        ("blue", "square", 70 - 130 * away, 175, 66, 0.5 + 2 * u),
        ("orange", "ring", 420 - 120 * enters - 20 * max(u - 0.6, 0), 180, 72, 0.0),
        ("green", "star", 185 + 15 * math.sin(5 * u), 185, 76, 3 * u),
    ]
    things = [
        Thing(colour, shape, COLOURS[colour], x, y, size, turn, 0.45 if shape == "star" else 0.55, 5, 0.05)
        for colour, shape, x, y, size, turn in places
    ]
    return draw(background, things, np.random.default_rng(t), noise=4)


def main() -> None:
    video = Mp4Writer(Path(sys.argv[1]), crf=24)
    for t in range(FRAMES):
        video.write(scene(t).image, t / FPS)
    video.close()


if __name__ == "__main__":
    main()
