"""COCO instances JSON, as pycocotools and annotation tools read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np

from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write
from grounded_sam.sinks.dataset_images import DatasetImages, Handling
from grounded_sam.sinks.splits import Splits
from grounded_sam.structures.masks import (
    coco_segmentation,
    encode_polygons,
    mask_area,
)
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class CocoSink:
    """All frames in `annotations.json`, or with a split in `annotations_<part>.json` each.

    Category ids are those of the ontology, or class ids plus 1; image and annotation ids count from 1.
    Lines go to hidden files as they come and are put together at the end, also after an interruption;
    no mask is held. Annotations carry `score` (confidence) and, if a segmenter ran, `mask_score`; in a
    video also `track_id`, and images `video`, `frame` (number) and `time_s`.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        segmentation: `rle` (exact), or `polygon` for tools that read no RLE (exact too where pycocotools
            reads them).
        file: name of the JSON in the folder.
        split: parts by share, see `Splits`.
        seed: of the split.
        images: `none`, or `link` or `copy` for pictures under `images/`, which `file_name` then names.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        segmentation: Literal["rle", "polygon"] = "rle",
        file: str = "annotations.json",
        split: dict[str, float] | None = None,
        seed: int = 0,
        images: Handling = "none",
    ) -> None:
        if segmentation not in ("rle", "polygon"):
            raise ConfigError(f"sink.coco.segmentation must be rle or polygon, got {segmentation!r}")
        if Path(file).name != file:
            raise ConfigError(f"sink.coco.file must be a plain file name, got {file!r}")
        self.path = Path(output) / file
        self.vocabulary, self.segmentation = vocabulary, segmentation
        self.split, self.pictures = Splits(split, seed), DatasetImages(images, "sink.coco.images")
        self.images = self.annotations = 0
        self._lines: dict[tuple[str | None, str], IO[str]] = {}

    def __enter__(self) -> CocoSink:
        return self

    def _file(self, part: str | None) -> Path:
        return self.path if part is None else self.path.with_stem(f"{self.path.stem}_{part}")

    def _parts(self) -> Sequence[str | None]:
        return self.split.names or [None]

    def _line(self, part: str | None, kind: str, entry: dict[str, Any]) -> None:
        if (part, kind) not in self._lines:
            path = self._file(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lines[part, kind] = (path.parent / f".{path.name}.{kind}").open("w+", encoding="utf-8")
        self._lines[part, kind].write(json.dumps(entry, ensure_ascii=False) + "\n")

    def write(self, result: FrameResult) -> None:
        frame, found, part = result.frame, result.packed, self.split(result.frame)
        name, (height, width) = frame.name, frame.size_hw
        if self.pictures.how != "none":
            name = self.pictures.put(frame, self.path.parent / "images", self.pictures.stem(frame))
        self.images += 1
        image: dict[str, Any] = {"id": self.images, "file_name": name, "width": width, "height": height}
        if frame.video is not None:
            image |= {"video": frame.video, "frame": frame.index, "time_s": frame.time_s}
        self._line(part, "images", image)
        for i in range(len(found)):
            self.annotations += 1
            entry = {"id": self.annotations, "image_id": self.images, **self._entry(result, i)}
            self._line(part, "annotations", entry)

    def _entry(self, result: FrameResult, i: int) -> dict[str, Any]:
        found = result.packed
        assert found.class_id is not None and found.confidence is not None
        x1, y1, x2, y2 = (round(float(v), 3) for v in found.xyxy[i])
        entry: dict[str, Any] = {
            "category_id": self.vocabulary.category_ids[int(found.class_id[i])],
            "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
            "area": round((x2 - x1) * (y2 - y1), 3),
            "iscrowd": int(found.data["iscrowd"][i]) if "iscrowd" in found.data else 0,
            "score": round(float(found.confidence[i]), 6),
        }
        if "rle" in found.data:
            entry["area"] = mask_area(found, i)
            entry["segmentation"] = coco_segmentation(found, i)
            if self.segmentation == "polygon":
                assert result.detections.mask is not None
                entry["segmentation"] = encode_polygons(np.asarray(result.detections.mask[i], bool))
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
            "categories": self.vocabulary.categories(),
        }
        for part in self._parts():
            with atomic_write(self._file(part)) as beside, beside.open("w", encoding="utf-8") as out:
                out.write(json.dumps(head, ensure_ascii=False)[:-1])
                for key in ("images", "annotations"):
                    out.write(f',\n"{key}": [')
                    if (part, key) in self._lines:
                        self._lines[part, key].seek(0)
                        for number, line in enumerate(self._lines[part, key]):
                            out.write((",\n" if number else "\n") + line.rstrip("\n"))
                    out.write("\n]")
                out.write("}\n")
        for lines in self._lines.values():
            lines.close()
            Path(lines.name).unlink()

    def summary(self) -> str:
        files = ", ".join(str(self._file(part)) for part in self._parts())
        return f"{self.annotations} objects of {self.images} images in {files}"
