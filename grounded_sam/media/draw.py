"""Draw detections over images, and write label maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.files import atomic_write
from grounded_sam.media.labels import draw_labels


def davis_palette() -> list[int]:
    """Return the 256 colors of DAVIS and PASCAL VOC as `[r, g, b, r, g, b, ...]`, 0 to 255.

    The bits of an id are spread over red, green and blue, as in VOC's `VOCcolormap.m`.

    >>> davis_palette()[:9]
    [0, 0, 0, 128, 0, 0, 0, 128, 0]
    """
    values = []
    for index in range(256):
        for channel in range(3):
            bits = [(index >> (3 * level + channel)) & 1 for level in range(8)]
            values.append(sum(bit << (7 - level) for level, bit in enumerate(bits)) & 255)
    return values


def paint_masks(
    detections: sv.Detections, values: NDArray[Any], order: Iterable[int], size_hw: tuple[int, int]
) -> NDArray[np.uint16]:
    """Paint the masks of detections into one label map, later ones over earlier ones.

    Args:
        detections: `n` detections with masks; without masks nothing is painted.
        values: `(n,)` integers, the value of each detection, 1 to 65535.
        order: Indices of the detections in the order of painting.
        size_hw: Height and width in pixels.

    Returns:
        `(H, W) uint16`, 0 outside the masks.

    >>> masks = np.array([[[True, True, False]]])
    >>> detections = sv.Detections(xyxy=np.array([[0, 0, 2, 1]]), mask=masks)
    >>> paint_masks(detections, np.array([7]), [0], (1, 3)).tolist()
    [[7, 7, 0]]
    """
    label_map = np.zeros(size_hw, np.uint16)
    if detections.mask is not None:
        for i in order:
            label_map[np.asarray(detections.mask[i], bool)] = values[i]
    return label_map


def save_label_map(path: Path, label_map: NDArray[np.uint16], palette: Sequence[int] | None) -> None:
    """Write a label map as PNG.

    Args:
        path: File to write.
        label_map: `(H, W) uint16`.
        palette: Colors of the values, `[r, g, b, ...]`, for an 8-bit palette image; None for 16-bit gray, which has
            room for values above 255.
    """
    from PIL import Image

    image = Image.fromarray(label_map if palette is None else label_map.astype(np.uint8))
    if palette is not None:
        image.putpalette(list(palette))
    with atomic_write(path) as part:
        image.save(part, format="PNG")


def draw_detections(
    image: NDArray[np.uint8],
    detections: sv.Detections,
    masks: bool = True,
    boxes: bool = True,
    labels: bool = True,
    opacity: float = 0.3,
    color_by: Literal["class", "object"] | None = None,
    palette: Sequence[str] | None = None,
) -> NDArray[np.uint8]:
    """Draw detections over a copy of an image.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        detections: Its detections.
        masks: Whether to draw masks, if there are any.
        boxes: Whether to draw boxes.
        labels: Whether to write class names, scores and track ids.
        opacity: Opacity of masks, 0 to 1.
        color_by: One color per `class` or per `object`; None for per object where there are tracks, else per class.
        palette: A color `#rrggbb` for each class; None for supervision's default palette.

    Returns:
        RGB, `(H, W, 3) uint8`.

    >>> draw_detections(np.zeros((4, 6, 3), np.uint8), sv.Detections.empty()).shape
    (4, 6, 3)
    """
    scene = image[..., ::-1].copy()  # supervision draws in BGR
    if not len(detections):
        return scene[..., ::-1]
    is_tracked = detections.tracker_id is not None
    lookup = sv.ColorLookup.TRACK if is_tracked else sv.ColorLookup.INDEX
    if color_by == "class" or (color_by is None and not is_tracked):
        lookup = sv.ColorLookup.CLASS
    colors = sv.ColorPalette.DEFAULT
    if palette is not None and lookup == sv.ColorLookup.CLASS:
        colors = sv.ColorPalette.from_hex(list(palette))
    contrasts = sv.ColorPalette([_contrast(color) for color in colors.colors])
    thickness = sv.calculate_optimal_line_thickness((image.shape[1], image.shape[0]))
    has_masks = masks and detections.mask is not None
    if has_masks:
        scene = sv.MaskAnnotator(colors, opacity=opacity, color_lookup=lookup).annotate(scene, detections)
        # A wider line of the opposite brightness shows the outline also on an object of the same color.
        for line, width in ((contrasts, 2 * thickness), (colors, thickness)):
            scene = sv.PolygonAnnotator(line, thickness=width, color_lookup=lookup).annotate(scene, detections)
    if boxes:
        width = max(1, thickness // 2) if has_masks else thickness
        scene = sv.BoxAnnotator(colors, thickness=width, color_lookup=lookup).annotate(scene, detections)
    drawn = np.ascontiguousarray(scene[..., ::-1])
    if not labels:
        return drawn
    indices = {sv.ColorLookup.TRACK: detections.tracker_id, sv.ColorLookup.CLASS: detections.class_id}.get(lookup)
    indices = np.arange(len(detections)) if indices is None else indices
    backgrounds, text_colors = ([line.by_idx(i).as_rgb() for i in indices.tolist()] for line in (colors, contrasts))
    return draw_labels(drawn, detections.xyxy, _label_texts(detections), backgrounds, text_colors)


def _contrast(color: sv.Color) -> sv.Color:
    """Return black for a light color and white for a dark one, by its luma (ITU-R BT.601)."""
    return sv.Color.BLACK if 0.299 * color.r + 0.587 * color.g + 0.114 * color.b > 140 else sv.Color.WHITE


def _label_texts(detections: sv.Detections) -> list[str]:
    """Return the class name and score of each detection, after its track id if it has one."""
    assert detections.confidence is not None
    names = detections.data["class_name"]
    texts = [f"{name} {score:.2f}" for name, score in zip(names, detections.confidence, strict=True)]
    if detections.tracker_id is None:
        return texts
    return [f"#{i} {text}" for i, text in zip(detections.tracker_id.tolist(), texts, strict=True)]
