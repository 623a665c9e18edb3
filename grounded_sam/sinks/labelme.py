"""LabelMe: a JSON file beside each picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from grounded_sam.files import atomic_write
from grounded_sam.sinks.dataset_images import DatasetImages, Handling
from grounded_sam.sinks.splits import Splits
from grounded_sam.structures.masks import join_loops, mask_outlines
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class LabelMeSink:
    """Under `labelme/` pictures, each with the JSON that LabelMe opens with it.

    Masks become polygons through the outermost pixels, a shape per part, and parts of one object share its
    `group_id`; a hole is tied to its outline by a line there and back. `description` has the score.
    Without masks shapes are rectangles.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        split: parts by share, see `Splits`, each a folder of its own.
        seed: of the split.
        images: `link`, `copy` or `none`; see `Pictures`.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        split: dict[str, float] | None = None,
        seed: int = 0,
        images: Handling = "link",
    ) -> None:
        self.folder, self.vocabulary = Path(output) / "labelme", vocabulary
        self.split, self.pictures = Splits(split, seed), DatasetImages(images, "sink.labelme.images")
        self.images = self.objects = 0

    def __enter__(self) -> LabelMeSink:
        return self

    def write(self, result: FrameResult) -> None:
        if not self.images:
            self.split.claim(self.folder)
        frame, found = result.frame, result.detections
        folder = self.folder / (self.split(frame) or "")
        stem = self.pictures.stem(frame)
        picture = self.pictures.put(frame, folder, stem)
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [shape for i in range(len(found)) for shape in self._shapes(found, i)],
            "imagePath": picture.rpartition("/")[2],
            "imageData": None,
            "imageHeight": frame.size_hw[0],
            "imageWidth": frame.size_hw[1],
        }
        with atomic_write(folder / f"{stem}.json") as beside:
            beside.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        self.images += 1
        self.objects += len(found)

    def _shapes(self, found: Any, i: int) -> list[dict[str, Any]]:
        if found.mask is None:
            kind, shapes = "rectangle", [found.xyxy[i].reshape(2, 2).astype(float)]
        else:
            kind = "polygon"
            shapes = [join_loops([part]) for part in mask_outlines(np.asarray(found.mask[i], bool), "pixels")]
            shapes = [shape if len(shape) >= 3 else np.resize(shape, (3, 2)) for shape in shapes]
        common: dict[str, Any] = {
            "label": str(found.data["class_name"][i]),
            "group_id": i if len(shapes) > 1 else None,
            "description": f"{float(found.confidence[i]):.3f}",
            "shape_type": kind,
            "flags": {},
            "mask": None,
        }
        return [{**common, "points": shape.tolist()} for shape in shapes]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.images:
            with atomic_write(self.folder / "labels.txt") as beside:  # for `labelme --labels`
                beside.write_text("".join(f"{name}\n" for name in self.vocabulary.classes), encoding="utf-8")

    def summary(self) -> str:
        return f"{self.objects} objects of {self.images} images for LabelMe in {self.folder}"
