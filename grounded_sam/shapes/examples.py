"""Make the clip that ships with the package: `python -m grounded_sam.shapes.examples OUT.mp4`."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from grounded_sam.media.mp4 import Mp4Writer
from grounded_sam.shapes.scenes import COLORS, Scene, SceneObject, draw_scene, make_background

FRAMES, FPS, SIZE_HW = 96, 24, (240, 360)


def example_frame(t: int) -> Scene:
    """Return frame `t`: two shapes cross, one leaves and returns, one enters halfway, one rotates in place.

    >>> example_frame(0).image.shape
    (240, 360, 3)
    """
    height, width = SIZE_HW
    rng = np.random.default_rng(11)
    background = make_background(rng, height, width)
    progress = t / (FRAMES - 1)
    away = float(np.clip(min((progress - 0.25) / 0.12, (0.62 - progress) / 0.12), 0, 1))
    entered = float(np.clip((progress - 0.4) / 0.15, 0, 1))
    poses = [  # color, shape, center x and y, diameter, angle
        ("red", "circle", 60 + 240 * progress, 75, 62, 0.0),
        ("yellow", "triangle", 300 - 240 * progress, 85 + 8 * math.sin(9 * progress), 70, 2 * progress),
        ("blue", "square", 70 - 130 * away, 175, 66, 0.5 + 2 * progress),
        ("orange", "ring", 420 - 120 * entered - 20 * max(progress - 0.6, 0), 180, 72, 0.0),
        ("green", "star", 185 + 15 * math.sin(5 * progress), 185, 76, 3 * progress),
    ]
    objects = [
        SceneObject(
            color=color,
            shape=shape,
            rgb=COLORS[color],
            x=x,
            y=y,
            diameter=diameter,
            angle=angle,
            inner_ratio=0.45 if shape == "star" else 0.55,
            texture_seed=5,
            texture_contrast=0.05,
        )
        for color, shape, x, y, diameter, angle in poses
    ]
    return draw_scene(background, objects, np.random.default_rng(t), noise=4)


def main() -> None:
    """Write the clip to the path on the command line."""
    video = Mp4Writer(Path(sys.argv[1]), crf=24)
    for t in range(FRAMES):
        video.write(example_frame(t).image, t / FPS)
    video.close()


if __name__ == "__main__":
    main()
