"""Draw the images and the clip that ship with the package: `python -m grounded_sam.shapes.examples FOLDER`.

Everything is drawn in twice the size and reduced, so that edges are smooth. `demo_images` and `demo_clip` return the
ground truth too, which the labels of the demo are compared with.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from grounded_sam.files import atomic_write, atomic_write_text
from grounded_sam.formats.coco import annotation_from_mask
from grounded_sam.media.mp4 import Mp4Writer
from grounded_sam.shapes.scenes import COLORS, EXTRA_COLORS, Scene, SceneObject, draw_scene
from grounded_sam.structures.masks import masks_to_xyxy

FRAMES, FPS = 96, 24
IMAGE_HW, CLIP_HW = (640, 960), (480, 720)
SCALE = 2

_RGB = COLORS | EXTRA_COLORS
_INNER_RATIO = {"star": 0.45, "ring": 0.58, "cross": 0.3}
#: Rotation with which a shape stands upright, in degrees.
_UPRIGHT = {"square": 45, "triangle": -90, "star": -90}

#: Color, shape, center x and y and diameter in pixels, rotation from upright in degrees.
Item = tuple[str, str, float, float, float, float]
Background = tuple[tuple[int, int, int], tuple[int, int, int], float]

#: Each image: its background as two colors and the direction of the gradient in radians, and its objects.
IMAGES: Sequence[tuple[Background, Sequence[Item]]] = (
    (
        ((247, 243, 234), (226, 218, 205), 1.1),
        (
            ("blue", "square", 262, 392, 330, 14),
            ("yellow", "triangle", 452, 262, 300, 0),
            ("red", "circle", 196, 158, 176, 0),
            ("orange", "ring", 742, 430, 270, 0),
            ("green", "star", 742, 168, 220, 12),
            ("purple", "cross", 548, 508, 150, 20),
        ),
    ),
    (
        ((20, 24, 48), (64, 44, 92), 0.9),
        (
            ("orange", "ring", 690, 250, 290, 0),
            ("red", "circle", 690, 520, 124, 0),
            ("green", "star", 214, 210, 200, 10),
            ("green", "star", 420, 130, 104, -14),
            ("yellow", "triangle", 396, 356, 150, 28),
            ("white", "circle", 112, 520, 140, 0),
            ("yellow", "star", 536, 508, 112, 8),
            ("purple", "cross", 286, 486, 120, 45),
            ("blue", "square", 842, 520, 130, 30),
        ),
    ),
    (
        ((252, 228, 196), (236, 170, 140), 1.57),
        (
            ("red", "circle", 640, 190, 210, 0),
            ("yellow", "triangle", 196, 428, 300, 0),
            ("yellow", "triangle", 470, 420, 150, 0),
            ("brown", "triangle", 760, 446, 260, 0),
            ("blue", "square", 596, 540, 130, 0),
            ("green", "star", 168, 132, 120, 0),
            ("purple", "circle", 400, 190, 110, 0),
        ),
    ),
    (
        ((222, 234, 232), (190, 212, 214), 0.5),
        (
            ("red", "circle", 130, 120, 130, 0),
            ("blue", "circle", 305, 120, 130, 0),
            ("blue", "square", 480, 120, 150, 0),
            ("green", "square", 655, 120, 150, 0),
            ("green", "star", 830, 120, 150, 0),
            ("orange", "star", 130, 320, 150, 0),
            ("orange", "ring", 305, 320, 140, 0),
            ("purple", "ring", 480, 320, 140, 0),
            ("purple", "cross", 655, 320, 140, 0),
            ("yellow", "cross", 830, 320, 140, 0),
            ("yellow", "triangle", 130, 530, 150, 0),
            ("red", "triangle", 305, 530, 150, 0),
            ("red", "circle", 480, 520, 130, 0),
            ("white", "circle", 655, 520, 130, 0),
            ("blue", "square", 830, 520, 150, 0),
        ),
    ),
)


def demo_images() -> list[Scene]:
    """Draw the images of the demo.

    >>> [scene.image.shape for scene in demo_images()]
    [(640, 960, 3), (640, 960, 3), (640, 960, 3), (640, 960, 3)]
    """
    return [_draw(background, items, IMAGE_HW) for background, items in IMAGES]


def demo_clip() -> Iterator[Scene]:
    """Draw the frames of the clip of the demo; the ids of its objects are the same in all frames.

    A red circle is hidden by a white square for some frames, a blue square leaves, an orange ring enters, a yellow
    triangle crosses a purple cross, and a green star rotates in place.

    >>> next(demo_clip()).image.shape
    (480, 720, 3)
    """
    for t in range(FRAMES):
        yield _draw(((228, 236, 246), (190, 204, 226), 1.2), _clip_items(t / (FRAMES - 1)), CLIP_HW)


def _clip_items(progress: float) -> list[Item]:
    """Return the objects of the clip at a moment from 0, its start, to 1, its end."""
    leaves = float(np.clip((progress - 0.45) / 0.3, 0, 1)) ** 2
    enters = float(np.clip((progress - 0.3) / 0.3, 0, 1))
    return [
        ("purple", "cross", 520, 130 + 20 * math.sin(4 * progress), 120, 90 * progress),
        ("yellow", "triangle", 640 - 480 * progress, 176, 130, -140 * progress),
        ("red", "circle", 84 + 400 * progress, 316, 104, 0),
        ("white", "square", 330 - 60 * progress, 320, 235, 0),
        ("blue", "square", 120 - 240 * leaves, 150 - 20 * progress, 130, 60 * progress),
        ("orange", "ring", 820 - 190 * enters, 350 - 40 * progress, 140, 0),
        ("green", "star", 100 + 30 * progress, 408, 120, 120 * progress),
    ]


def _draw(background: Background, items: Sequence[Item], size_hw: tuple[int, int]) -> Scene:
    """Draw in `SCALE` times the size, and reduce the image and the masks."""
    height, width = size_hw
    large = draw_scene(
        _gradient(background, height * SCALE, width * SCALE),
        [_scene_object(item) for item in items],
        np.random.default_rng(0),
    )
    masks = np.stack([_reduce(mask.astype(np.float32), size_hw) >= 0.5 for mask in large.masks])
    return Scene(
        image=np.round(_reduce(large.image.astype(np.float32), size_hw)).astype(np.uint8),
        masks=masks,
        xyxy=masks_to_xyxy(masks),
        pairs=large.pairs,
        ids=large.ids,
    )


def _reduce(values: NDArray[np.float32], size_hw: tuple[int, int]) -> NDArray[Any]:
    return cv2.resize(values, size_hw[::-1], interpolation=cv2.INTER_AREA)


def _gradient(background: Background, height: int, width: int) -> NDArray[np.uint8]:
    start, stop, direction = background
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    position = x * math.cos(direction) + y * math.sin(direction)
    position = ((position - position.min()) / np.ptp(position))[..., None]
    values = np.add(start, np.subtract(stop, start) * position)
    dither = np.random.default_rng(0).random((height, width, 1))  # so that the gradient shows no bands
    return np.clip(values + dither, 0, 255).astype(np.uint8)


def _scene_object(item: Item) -> SceneObject:
    color, shape, x, y, diameter, rotation = item
    return SceneObject(
        color=color,
        shape=shape,
        rgb=_RGB[color],
        x=x * SCALE,
        y=y * SCALE,
        diameter=diameter * SCALE,
        angle=math.radians(_UPRIGHT.get(shape, 0) + rotation),
        inner_ratio=_INNER_RATIO.get(shape, 0.5),
        texture_seed=0,
        texture_contrast=0.0,
    )


def demo_labels() -> dict[str, Any]:
    """Return the ground truth of the images of the demo as COCO, with masks.

    >>> len(demo_labels()["images"])
    4
    """
    scenes = demo_images()
    names = sorted({" ".join(pair) for scene in scenes for pair in scene.pairs})
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }
    for image_id, scene in enumerate(scenes, 1):
        height, width = scene.image.shape[:2]
        content["images"].append(
            {"id": image_id, "file_name": f"scene-{image_id}.png", "width": width, "height": height}
        )
        for pair, mask in zip(scene.pairs, scene.masks, strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": names.index(" ".join(pair)) + 1,
                    **annotation_from_mask(mask),
                }
            )
    return content


def main() -> None:
    """Write the images, their ground truth and the clip to the folder on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(demo_images(), 1):
        with atomic_write(folder / f"scene-{number}.png") as part:
            Image.fromarray(scene.image).save(part, format="PNG", optimize=True)
    atomic_write_text(folder / "instances.json", json.dumps(demo_labels(), indent=1))
    video = Mp4Writer(folder / "clip.mp4", crf=24)
    for t, scene in enumerate(demo_clip()):
        video.write(scene.image, t / FPS)
    video.close()


if __name__ == "__main__":
    main()
