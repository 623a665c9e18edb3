"""Pictures with masks, boxes and labels drawn on them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.sinks.files import Names, written_whole
from grounded_sam.stages import FrameResult
from grounded_sam.vocabulary import Vocabulary


@cache
def font() -> str:
    """A font with Latin, Greek and Cyrillic letters; matplotlib, which supervision needs, ships it."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def draw(
    image: NDArray[np.uint8],
    found: sv.Detections,
    masks: bool = True,
    boxes: bool = True,
    labels: bool = True,
    opacity: float = 0.5,
    colour_by: Literal["class", "object"] = "class",
) -> NDArray[np.uint8]:
    """Detections drawn over an RGB image `(H, W, 3) uint8`; returns a new one of the same size."""
    scene = image[..., ::-1].copy()  # supervision draws in BGR
    if not len(found):
        return scene[..., ::-1]
    lookup = sv.ColorLookup.CLASS if colour_by == "class" else sv.ColorLookup.INDEX
    size_wh = (image.shape[1], image.shape[0])
    thickness = sv.calculate_optimal_line_thickness(size_wh)
    if masks and found.mask is not None:
        scene = sv.MaskAnnotator(opacity=opacity, color_lookup=lookup).annotate(scene, found)
        scene = sv.PolygonAnnotator(thickness=max(1, thickness // 2), color_lookup=lookup).annotate(scene, found)
    if boxes:
        scene = sv.BoxAnnotator(thickness=thickness, color_lookup=lookup).annotate(scene, found)
    if labels:
        assert found.confidence is not None
        texts = [f"{name} {score:.2f}" for name, score in zip(found.data["class_name"], found.confidence, strict=True)]
        size = int(np.clip(min(size_wh) / 32, 9, 72))
        scene = sv.RichLabelAnnotator(
            font_path=font(), font_size=size, text_padding=max(2, size // 5), color_lookup=lookup, smart_position=True
        ).annotate(scene, found, texts)
    return np.ascontiguousarray(scene[..., ::-1])


class Overlay:
    """One picture per frame under `overlay/`, at its original size.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        format: `jpg` or `png`.
        masks, boxes, labels: what to draw.
        opacity: of the masks, 0 to 1.
        colour_by: `class`, or `object` to tell objects of one class apart.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        format: Literal["jpg", "png"] = "jpg",
        masks: bool = True,
        boxes: bool = True,
        labels: bool = True,
        opacity: float = 0.5,
        colour_by: Literal["class", "object"] = "class",
    ) -> None:
        if format not in ("jpg", "png"):
            raise ConfigError(f"sink.overlay.format must be jpg or png, got {format!r}")
        if colour_by not in ("class", "object"):
            raise ConfigError(f"sink.overlay.colour_by must be class or object, got {colour_by!r}")
        self.folder = Path(output) / "overlay"
        self.format, self.masks, self.boxes, self.labels = format, masks, boxes, labels
        self.opacity, self.colour_by = opacity, colour_by
        self.names, self.count = Names(), 0

    def __enter__(self) -> Overlay:
        return self

    def write(self, result: FrameResult) -> None:
        from PIL import Image

        picture = draw(
            result.frame.image, result.detections, self.masks, self.boxes, self.labels, self.opacity, self.colour_by
        )
        kind = "png" if max(picture.shape) > 65_500 else self.format  # more, JPEG cannot hold
        with written_whole(self.folder / self.names(result.frame.name, f".{kind}")) as part:
            Image.fromarray(picture).save(part, format="JPEG" if kind == "jpg" else "PNG", quality=92)
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def summary(self) -> str:
        return f"{self.count} pictures in {self.folder}"
