"""Masks as PNG files: one per object, or one map of classes or of tracks per image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray


def davis_palette() -> list[int]:
    """The 256 colours of DAVIS and PASCAL VOC: the bits of an id, spread over red, green and blue."""
    colours = []
    for number in range(256):
        for channel in range(3):
            bits = [(number >> (3 * place + channel)) & 1 for place in range(8)]
            colours.append(sum(bit << (7 - place) for place, bit in enumerate(bits)) & 255)
    return colours


@cache
def font() -> str:
    """A font with Latin, Greek and Cyrillic letters; matplotlib, which supervision needs, ships it."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def draw_detections(
    image: NDArray[np.uint8],
    found: sv.Detections,
    masks: bool = True,
    boxes: bool = True,
    labels: bool = True,
    opacity: float = 0.5,
    colour_by: Literal["class", "object"] | None = None,
    palette: Sequence[str] | None = None,
) -> NDArray[np.uint8]:
    """Detections drawn over an RGB image `(H, W, 3) uint8`; returns a new one of the same size.

    Without `colour_by`, tracked objects have colours of their own and others that of their class; `palette`
    has a colour `#rrggbb` for each class, by default supervision's.
    """
    scene = image[..., ::-1].copy()  # supervision draws in BGR
    if not len(found):
        return scene[..., ::-1]
    tracked = found.tracker_id is not None
    lookup = sv.ColorLookup.TRACK if tracked else sv.ColorLookup.INDEX
    if colour_by == "class" or (colour_by is None and not tracked):
        lookup = sv.ColorLookup.CLASS
    colours = sv.ColorPalette.DEFAULT
    if palette is not None and lookup == sv.ColorLookup.CLASS:
        colours = sv.ColorPalette.from_hex(list(palette))
    size_wh = (image.shape[1], image.shape[0])
    thickness = sv.calculate_optimal_line_thickness(size_wh)
    if masks and found.mask is not None:
        scene = sv.MaskAnnotator(colours, opacity=opacity, color_lookup=lookup).annotate(scene, found)
        scene = sv.PolygonAnnotator(colours, thickness=max(1, thickness // 2), color_lookup=lookup).annotate(
            scene, found
        )
    if boxes:
        scene = sv.BoxAnnotator(colours, thickness=thickness, color_lookup=lookup).annotate(scene, found)
    if labels:
        assert found.confidence is not None
        texts = [f"{name} {score:.2f}" for name, score in zip(found.data["class_name"], found.confidence, strict=True)]
        if found.tracker_id is not None:
            texts = [f"#{i} {text}" for i, text in zip(found.tracker_id.tolist(), texts, strict=True)]
        size = int(np.clip(min(size_wh) / 32, 9, 72))
        scene = sv.RichLabelAnnotator(
            colours,
            font_path=font(),
            font_size=size,
            text_padding=max(2, size // 5),
            color_lookup=lookup,
            smart_position=True,
        ).annotate(scene, found, texts)
    return np.ascontiguousarray(scene[..., ::-1])
