"""COCO instances JSON, as pycocotools and annotation tools read it."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.detections import mask_boxes
from grounded_sam.errors import ConfigError
from grounded_sam.sinks.files import written_whole
from grounded_sam.stages import FrameResult
from grounded_sam.vocabulary import Vocabulary


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask `(H, W) bool` as compressed COCO RLE with `counts` as text."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def encode_polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """A mask `(H, W) bool` as COCO polygons; holes are lost. What is too thin for one gets its rectangle."""
    polygons = [p.reshape(-1).astype(float).tolist() for p in sv.mask_to_polygons(mask) if len(p) >= 3]
    if not polygons:
        x1, y1, x2, y2 = (float(v) for v in mask_boxes(mask[None])[0])
        polygons = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return polygons


class Coco:
    """All frames in one `annotations.json`: category ids are class ids plus 1, image and annotation ids from 1.

    Lines go to hidden files as they come and are put together at the end, also after an interruption;
    no mask is held. Annotations carry `score` (confidence) and, if a segmenter ran, `mask_score`; in a
    video also `track_id`, and images `video`, `frame` (number) and `time_s`.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        segmentation: `rle` (exact) or `polygon` (for tools that read no RLE; holes are lost).
        file: name of the JSON in the folder.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        segmentation: Literal["rle", "polygon"] = "rle",
        file: str = "annotations.json",
    ) -> None:
        if segmentation not in ("rle", "polygon"):
            raise ConfigError(f"sink.coco.segmentation must be rle or polygon, got {segmentation!r}")
        if Path(file).name != file:
            raise ConfigError(f"sink.coco.file must be a plain file name, got {file!r}")
        self.path = Path(output) / file
        self.vocabulary, self.segmentation = vocabulary, segmentation
        self.images = self.annotations = 0
        self._lines: dict[str, IO[str]] = {}

    def __enter__(self) -> Coco:
        return self

    def _line(self, kind: str, entry: dict[str, Any]) -> None:
        if kind not in self._lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lines[kind] = (self.path.parent / f".{self.path.name}.{kind}").open("w+", encoding="utf-8")
        self._lines[kind].write(json.dumps(entry, ensure_ascii=False) + "\n")

    def write(self, result: FrameResult) -> None:
        self.images += 1
        height, width = result.frame.size_hw
        name = result.frame.name
        image: dict[str, Any] = {"id": self.images, "file_name": name, "width": width, "height": height}
        if result.frame.video is not None:
            image |= {"video": result.frame.video, "frame": result.frame.index, "time_s": result.frame.time_s}
        self._line("images", image)
        found = result.detections
        for i in range(len(found)):
            self.annotations += 1
            self._line("annotations", {"id": self.annotations, "image_id": self.images, **self._entry(found, i)})

    def _entry(self, found: sv.Detections, i: int) -> dict[str, Any]:
        assert found.class_id is not None and found.confidence is not None
        x1, y1, x2, y2 = (round(float(v), 3) for v in found.xyxy[i])
        entry: dict[str, Any] = {
            "category_id": int(found.class_id[i]) + 1,
            "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
            "area": round((x2 - x1) * (y2 - y1), 3),
            "iscrowd": 0,
            "score": round(float(found.confidence[i]), 6),
        }
        if found.mask is not None:
            mask = np.asarray(found.mask[i], bool)
            entry["area"] = int(mask.sum())
            entry["segmentation"] = encode_mask(mask) if self.segmentation == "rle" else encode_polygons(mask)
        if found.tracker_id is not None:
            entry["track_id"] = int(found.tracker_id[i])
        if "mask_score" in found.data:
            entry["mask_score"] = round(float(found.data["mask_score"][i]), 6)
        return entry

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self.images:
            return  # it never began; what may be there from before stays
        head = {
            "info": {"description": "Made with grounded_sam"},
            "licenses": [],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(self.vocabulary.classes)],
        }
        with written_whole(self.path) as part, part.open("w", encoding="utf-8") as out:
            out.write(json.dumps(head, ensure_ascii=False)[:-1])
            for key in ("images", "annotations"):
                out.write(f',\n"{key}": [')
                if key in self._lines:
                    self._lines[key].seek(0)
                    for number, line in enumerate(self._lines[key]):
                        out.write((",\n" if number else "\n") + line.rstrip("\n"))
                out.write("\n]")
            out.write("}\n")
        for lines in self._lines.values():
            lines.close()
            Path(lines.name).unlink()

    def summary(self) -> str:
        return f"{self.annotations} objects of {self.images} images in {self.path}"
