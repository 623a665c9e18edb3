"""YOLO segmentation as ultralytics and others train on it."""

from __future__ import annotations

import json
from collections import Counter
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


class YoloSink:
    """Under `yolo/` a `data.yaml`, `images/<part>/` and `labels/<part>/`, one line per object.

    A line is the class number and a polygon through the outermost pixels, as shares of width and height; not a
    point is left out, so that filling it as OpenCV does gives the mask back. The format has one polygon per
    object: holes and separate parts are tied in by lines there and back, which only they add. Without
    masks a line is the class number and the box (centre, width, height). An image without objects has an
    empty file. The format has no scores and no track ids. Supervision's writer makes an object of each part,
    drops holes, and holds all masks at once.

    Args:
        output: folder of the run.
        vocabulary: of the run; class numbers are places in it, from 0.
        split: parts by share, see `Splits`; without it all is `train`, and `val` is the same.
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
        self.folder, self.vocabulary = Path(output) / "yolo", vocabulary
        self.split, self.pictures = Splits(split, seed), DatasetImages(images, "sink.yolo.images")
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> YoloSink:
        return self

    def write(self, result: FrameResult) -> None:
        if not self.counts:
            self.split.claim(self.folder)
        frame, found = result.frame, result.detections
        part, stem = self.split(frame) or "train", self.pictures.stem(frame)
        self.pictures.put(frame, self.folder / "images" / part, stem)
        lines = [line for i in range(len(found)) if (line := self._line(found, i, frame.size_hw))]
        with atomic_write(self.folder / "labels" / part / f"{stem}.txt") as beside:
            beside.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
        self.counts[part] += 1
        self.counts["objects"] += len(lines)

    def _line(self, found: Any, i: int, size_hw: tuple[int, int]) -> str:
        height, width = size_hw
        if found.mask is None:
            x1, y1, x2, y2 = found.xyxy[i].tolist()
            shares = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
        else:
            parts = mask_outlines(np.asarray(found.mask[i], bool), "pixels")
            if not parts:
                return ""
            polygon = join_loops(parts)
            if len(polygon) < 3:  # a single pixel or a line of them
                polygon = np.resize(polygon, (3, 2))
            # A quarter of a pixel in: readers round down or to the nearest, and both arrive at the pixel.
            shares = ((polygon + 0.25) / (width, height)).reshape(-1).tolist()
        return " ".join([str(int(found.class_id[i])), *(f"{share:.7f}".rstrip("0") for share in shares)])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.counts:
            return
        names = self.split.names or ["train"]
        lines = [f"{name}: images/{name}" for name in names]
        lines += [f"{name}: images/{names[0]}" for name in ("train", "val") if name not in names]
        lines += [f"nc: {len(self.vocabulary)}", "names:"]
        lines += [f"  {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(self.vocabulary.classes)]
        for name in names:
            (self.folder / "images" / name).mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / "data.yaml") as beside:
            beside.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def summary(self) -> str:
        images = sum(count for name, count in self.counts.items() if name != "objects")
        return f"{self.counts['objects']} objects of {images} images for YOLO in {self.folder / 'data.yaml'}"
