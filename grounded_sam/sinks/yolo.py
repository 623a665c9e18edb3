"""YOLO segmentation labels, as ultralytics and other trainers read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import supervision as sv

from grounded_sam.files import atomic_write_text
from grounded_sam.sinks.base import DatasetSink
from grounded_sam.sinks.dataset_images import ImageMode
from grounded_sam.structures.masks import join_loops, mask_outlines
from grounded_sam.structures.results import FrameResult


@dataclass(eq=False)
class YoloSink(DatasetSink):
    """Write `data.yaml`, `images/<split>/` and `labels/<split>/` under `yolo/`, one line per object.

    A line is the class number and a polygon through the outermost pixels, relative to width and height. Polygons are
    not simplified: filled with OpenCV, they reproduce the mask, except for the bridges. The format has one polygon per
    object, so holes and separate parts are connected by bridges one pixel wide. Without masks, a line is the class
    number and the box (center, width, height). An image without objects has an empty file. The format has no scores and
    no track ids. Supervision's writer instead makes an object of each part, drops holes, and keeps all masks in memory.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run; class numbers are indices into it, from 0.
        split: Share of each split, see `splits.Splits`; without it all images are in `train`, and `val` is the same.
        seed: Seed of the split.
        images: `link`, `copy` or `none`; see `dataset_images.DatasetImages`.
    """

    name: ClassVar[str] = "yolo"

    images: ImageMode = "link"

    def _write(self, result: FrameResult) -> int:
        frame, detections = result.frame, result.detections
        split, stem = self._splits(frame) or "train", self._image_files.unique_stem(frame)
        self._image_files.save(frame, self.folder / "images" / split, stem)
        lines = [line for i in range(len(detections)) if (line := self._line(detections, i, frame.size_hw))]
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
            parts = mask_outlines(np.asarray(detections.mask[i], bool), "pixels")
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
        lines = [f"{name}: images/{name}" for name in names]
        lines += [f"{name}: images/{names[0]}" for name in ("train", "val") if name not in names]
        lines += [f"nc: {len(self.vocabulary)}", "names:"]
        lines += [f"  {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(self.vocabulary.classes)]
        for name in names:
            (self.folder / "images" / name).mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.folder / "data.yaml", "\n".join(lines) + "\n")

    def _last_files(self) -> Sequence[Path]:
        return (self.folder / "data.yaml",)

    def summary(self) -> str:
        """Return the counts and the path of `data.yaml`."""
        return f"{self._counts()} for YOLO: {self.folder / 'data.yaml'}"
