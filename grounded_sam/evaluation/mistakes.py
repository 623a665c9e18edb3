"""Images of the mistakes of a run: missed labels in blue, false detections in red."""

from __future__ import annotations

import heapq
import io
import itertools
from dataclasses import dataclass, replace

import numpy as np
import supervision as sv

from grounded_sam.errors import ImageError
from grounded_sam.files import UniqueNames, atomic_write_bytes
from grounded_sam.media.labels import draw_labels
from grounded_sam.output.paths import OutputPath
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import pack_masks, unpack_masks
from grounded_sam.structures.results import FrameResult


@dataclass(frozen=True)
class _Mistakes:
    """Mistakes in a frame, with masks as RLE."""

    frame: Frame
    missed: sv.Detections
    false: sv.Detections


class WorstImages:
    """Keep the images with the most mistakes, and draw them at the end.

    Args:
        max_images: How many to keep.
    """

    def __init__(self, max_images: int) -> None:
        self.max_images, self._order = max_images, itertools.count()
        # A heap of tuples: number of mistakes, order (earlier images win), name, and the mistakes or a JPEG of them.
        self._heap: list[tuple[int, int, str, _Mistakes | bytes]] = []

    def offer(self, result: FrameResult, missed: sv.Detections, false: sv.Detections) -> None:
        """Keep an image if it is among the worst so far.

        Args:
            result: Result of the image.
            missed: Labels without a detection.
            false: Detections without a label.
        """
        count = len(missed) + len(false)
        is_full = len(self._heap) == self.max_images
        if not count or not self.max_images or (is_full and count <= self._heap[0][0]):
            return
        frame = replace(result.frame, annotations=None)
        mistakes: _Mistakes | bytes | None = _Mistakes(frame, pack_masks(missed), pack_masks(false))
        if not callable(frame.pixels):  # drawn now, so that pixels are not kept in memory
            mistakes = _draw(_Mistakes(frame, missed, false))
        assert mistakes is not None
        push = heapq.heapreplace if is_full else heapq.heappush
        push(self._heap, (count, -next(self._order), result.frame.name, mistakes))

    def write(self, folder: OutputPath) -> None:
        """Write the images as JPEG files, except those whose pixels can no longer be read."""
        names = UniqueNames()
        for _, _, name, mistakes in sorted(self._heap, key=lambda item: item[:2], reverse=True):
            jpeg = _draw(mistakes) if isinstance(mistakes, _Mistakes) else mistakes
            if jpeg is None:
                continue
            atomic_write_bytes(folder / names(name, ".jpg").as_posix(), jpeg)
        self._heap.clear()


def _draw(mistakes: _Mistakes) -> bytes | None:
    """Draw mistakes and encode the image as JPEG; None if its pixels cannot be read."""
    from PIL import Image

    try:
        scene = mistakes.frame.image[..., ::-1].copy()
    except ImageError:
        return None
    boxes, texts, colors = [], [], []
    for detections, color, word in (
        (mistakes.missed, sv.Color.BLUE, "missed"),
        (mistakes.false, sv.Color.RED, "false"),
    ):
        masks = unpack_masks(detections, scene.shape[:2]).mask
        shown = sv.Detections(xyxy=detections.xyxy, mask=masks, class_id=detections.class_id)
        if shown.mask is not None:
            scene = sv.MaskAnnotator(color, opacity=0.4).annotate(scene, shown)
        scene = sv.BoxAnnotator(color).annotate(scene, shown)
        boxes += list(detections.xyxy)
        texts += [f"{word}: {name}" for name in detections.data.get("class_name", [])]
        colors += [color.as_rgb()] * len(detections)
    image = np.ascontiguousarray(scene[..., ::-1])
    drawn = draw_labels(image, np.reshape(boxes, (-1, 4)), texts, colors, [(255, 255, 255)] * len(texts))
    out = io.BytesIO()
    Image.fromarray(drawn).save(out, format="JPEG", quality=88)
    return out.getvalue()
