"""YOLO segmentation labels, as ultralytics and other trainers read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import supervision as sv
import yaml

from grounded_sam.errors import count_of
from grounded_sam.files import atomic_write_text
from grounded_sam.sinks.base import DatasetSink
from grounded_sam.sinks.dataset_images import ImageMode
from grounded_sam.structures.detections import is_crowd
from grounded_sam.structures.masks import join_loops, mask_outlines
from grounded_sam.structures.results import FrameResult, Skipped


@dataclass(eq=False)
class YoloSink(DatasetSink):
    """Write `data.yaml`, `images/<split>/` and `labels/<split>/` under `yolo/`, one line per object.

    A line is the class number and a polygon through the outermost pixels, relative to width and height. Polygons are
    not simplified: filled with OpenCV, they reproduce the mask, except for the bridges. The format has one polygon per
    object, so holes and separate parts are connected by bridges one pixel wide. Without masks, a line is the class
    number and the box (center, width, height). An image without objects has an empty file. The format has no scores, no
    track ids and no crowds, which are left out. A folder called `images` is encoded, see `files.UniqueNames`.
    Supervision's writer instead makes an object of each part, drops holes, and keeps all masks in memory.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run; class numbers are indices into it, from 0.
        split: Share of each split, see `splits.Splits`; without it all images are in `train`, and `val` is the same.
        seed: Seed of the split.
        images: `link`, `copy` or `none`; see `dataset_images.DatasetImages`.
        tolerance: Largest distance in pixels of simplified polygons from the outline; 0 for exact ones.
    """

    name: ClassVar[str] = "yolo"
    reserved_folders: ClassVar[frozenset[str]] = frozenset({"images"})  # readers replace the last one by `labels`

    images: ImageMode = "link"
    tolerance: float = 0.0
    _num_crowds: int = field(default=0, init=False, repr=False)

    def _write(self, result: FrameResult) -> int:
        frame, detections = result.frame, result.detections
        split, stem = self._splits(frame) or "train", self._image_files.unique_stem(frame)
        self._image_files.save(frame, self.folder / "images" / split, stem)
        objects = [i for i in range(len(detections)) if not is_crowd(detections, i)]
        self._num_crowds += len(detections) - len(objects)
        lines = [line for i in objects if (line := self._line(detections, i, frame.size_hw))]
        atomic_write_text(self.folder / "labels" / split / f"{stem}.txt", "".join(f"{line}\n" for line in lines))
        return len(lines)

    def _line(self, detections: sv.Detections, i: int, size_hw: tuple[int, int]) -> str:
        """Return the line of one detection; empty if its mask is."""
        assert detections.class_id is not None
        height, width = size_hw
        if detections.mask is None:
            x1, y1, x2, y2 = detections.xyxy[i].tolist()
            values = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
        else:
            parts = mask_outlines(np.asarray(detections.mask[i], bool), "pixels", self.tolerance)
            if not parts:
                return ""
            polygon = join_loops(parts)
            if len(polygon) < 3:  # a single pixel or a line of them
                polygon = np.resize(polygon, (3, 2))
            # Shifted by a quarter of a pixel: readers round down or to the nearest, and both arrive at the pixel.
            values = ((polygon + 0.25) / (width, height)).reshape(-1).tolist()
        return " ".join([str(int(detections.class_id[i])), *(f"{value:.7f}".rstrip("0") for value in values)])

    def _close(self) -> None:
        names = self._splits.names or ["train"]
        content: dict[str, Any] = {name: f"images/{name}" for name in names}
        content |= {name: f"images/{names[0]}" for name in ("train", "val") if name not in names}
        content |= {"nc": len(self.vocabulary), "names": dict(enumerate(self.vocabulary.classes))}
        for name in names:
            (self.folder / "images" / name).mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=10_000)
        atomic_write_text(self.folder / "data.yaml", text)

    def _last_files(self) -> Sequence[Path]:
        return (self.folder / "data.yaml",)

    def summary(self) -> str:
        """Return the counts and the path of `data.yaml`."""
        return f"{self._counts()} for YOLO: {self.folder / 'data.yaml'}"

    @property
    def skipped(self) -> list[Skipped]:
        """Parts of the split that got no image, and the crowds that were left out."""
        if not self._num_crowds:
            return super().skipped
        crowds = count_of(self._num_crowds, "crowd")
        reason = f"left out {crowds} (iscrowd), which YOLO cannot mark; sink=coco keeps them"
        return [*super().skipped, Skipped("yolo", reason)]
