"""LabelMe: a JSON file beside each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import supervision as sv

from grounded_sam.files import atomic_write_text, encode_controls, encode_lines
from grounded_sam.sinks.base import DatasetSink
from grounded_sam.sinks.dataset_images import ImageMode
from grounded_sam.structures.detections import is_crowd
from grounded_sam.structures.masks import join_loops, mask_outlines
from grounded_sam.structures.results import FrameResult


@dataclass(eq=False)
class LabelMeSink(DatasetSink):
    """Write images under `labelme/`, each with a JSON file that LabelMe opens with it.

    Masks become polygons through their outermost pixels, one shape per connected part. The parts of an object share a
    `group_id`, and a bridge connects each hole to the outline. Without masks, shapes are rectangles. `description`
    holds the score; a crowd has the flag `crowd`. Control characters of class names are encoded, see
    `files.percent_encode`.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        split: Share of each split, see `splits.Splits`; each split has its own folder.
        seed: Seed of the split.
        images: `link`, `copy` or `none`; see `dataset_images.DatasetImages`.
        tolerance: Largest distance in pixels of simplified polygons from the outline; 0 for exact ones.
    """

    name: ClassVar[str] = "labelme"

    images: ImageMode = "link"
    tolerance: float = 0.0

    def _write(self, result: FrameResult) -> int:
        frame, detections = result.frame, result.detections
        folder = self.folder / (self._splits(frame) or "")
        stem = self._image_files.unique_stem(frame)
        image_name = self._image_files.save(frame, folder, stem)
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [shape for i in range(len(detections)) for shape in self._shapes(detections, i)],
            "imagePath": image_name.rpartition("/")[2],
            "imageData": None,
            "imageHeight": frame.size_hw[0],
            "imageWidth": frame.size_hw[1],
        }
        atomic_write_text(folder / f"{stem}.json", json.dumps(content, ensure_ascii=False, indent=1))
        return len(detections)

    def _shapes(self, detections: sv.Detections, i: int) -> list[dict[str, Any]]:
        """Return the shapes of one detection."""
        assert detections.confidence is not None
        if detections.mask is None:
            shape_type, polygons = "rectangle", [detections.xyxy[i].reshape(2, 2).astype(float)]
        else:
            shape_type = "polygon"
            parts = mask_outlines(np.asarray(detections.mask[i], bool), "pixels", self.tolerance)
            polygons = [join_loops([part]) for part in parts]
            polygons = [polygon if len(polygon) >= 3 else np.resize(polygon, (3, 2)) for polygon in polygons]
        common: dict[str, Any] = {
            "label": encode_controls(str(detections.data["class_name"][i])),
            "group_id": i if len(polygons) > 1 else None,
            "description": f"{float(detections.confidence[i]):.3f}",
            "shape_type": shape_type,
            "flags": {"crowd": True} if is_crowd(detections, i) else {},
            "mask": None,
        }
        return [{**common, "points": polygon.tolist()} for polygon in polygons]

    def _close(self) -> None:
        # For `labelme --labels`.
        atomic_write_text(self.folder / "labels.txt", encode_lines(self.vocabulary.classes))

    def _last_files(self) -> Sequence[Path]:
        return (self.folder / "labels.txt",)

    def summary(self) -> str:
        """Return the counts and the folder."""
        return f"{self._counts()} for LabelMe: {self.folder}"
