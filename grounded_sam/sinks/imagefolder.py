"""Hugging Face `imagefolder`: pictures with a `metadata.parquet`."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write
from grounded_sam.sinks.dataset_images import DatasetImages, Handling
from grounded_sam.sinks.splits import Splits
from grounded_sam.structures.masks import coco_segmentation, mask_area
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: Of an object; a row has a list of each.
OBJECT = {
    "bbox": pa.list_(pa.float64()),
    "category": pa.int64(),
    "name": pa.string(),
    "score": pa.float64(),
    "area": pa.float64(),
    "segmentation": pa.struct([("size", pa.list_(pa.int64())), ("counts", pa.string())]),
    "track_id": pa.int64(),
}
SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("file", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("objects", pa.struct([(key, pa.list_(kind)) for key, kind in OBJECT.items()])),
    ]
)
#: Rows that are written at once.
GROUP = 256


class ImageFolderSink:
    """Under `imagefolder/` a folder per part, for `datasets.load_dataset("imagefolder", data_dir=...)`.

    A row has `image`, `file`, `width`, `height` and `objects`, with a list each of `bbox` (x, y, width,
    height), `category` (place in `categories.json`), `name`, `score`, `area`, `segmentation` (COCO RLE, null
    without masks) and `track_id` (null outside of videos). Parquet and not JSON lines, so that the types of
    columns do not depend on what a part happens to hold.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        split: parts by share, see `Splits`; without it all is `train`.
        seed: of the split.
        images: `link` or `copy`; see `Pictures`.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        split: dict[str, float] | None = None,
        seed: int = 0,
        images: Handling = "copy",
    ) -> None:
        if images == "none":
            raise ConfigError("sink.imagefolder.images must be link or copy: the format is a folder of images")
        self.folder, self.vocabulary = Path(output) / "imagefolder", vocabulary
        self.split, self.pictures = Splits(split, seed), DatasetImages(images, "sink.imagefolder.images")
        self.images = self.objects = 0
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._files: dict[str, Any] = {}

    def __enter__(self) -> ImageFolderSink:
        return self

    def write(self, result: FrameResult) -> None:
        if not self.images:
            self.split.claim(self.folder)
        frame, found = result.frame, result.packed
        part = self.split(frame) or "train"
        name = self.pictures.put(frame, self.folder / part, self.pictures.stem(frame))
        height, width = frame.size_hw
        objects = [self._object(found, i) for i in range(len(found))]
        columns = {key: [one[key] for one in objects] for key in OBJECT}
        rows = self._rows.setdefault(part, [])
        rows.append({"file_name": name, "file": frame.name, "width": width, "height": height, "objects": columns})
        if len(rows) >= GROUP:
            self._flush(part)
        self.images += 1
        self.objects += len(found)

    def _object(self, found: sv.Detections, i: int) -> dict[str, Any]:
        assert found.class_id is not None and found.confidence is not None
        x1, y1, x2, y2 = (round(float(v), 3) for v in found.xyxy[i])
        rle = coco_segmentation(found, i)
        return {
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "category": int(found.class_id[i]),
            "name": str(found.data["class_name"][i]),
            "score": float(found.confidence[i]),
            "area": (x2 - x1) * (y2 - y1) if rle is None else float(mask_area(found, i)),
            "segmentation": rle,
            "track_id": None if found.tracker_id is None else int(found.tracker_id[i]),
        }

    def _flush(self, part: str) -> None:
        if part not in self._files:
            self._files[part] = pq.ParquetWriter(self.folder / part / ".metadata.parquet.part", SCHEMA)
        rows = self._rows.pop(part, [])
        self._files[part].write_table(pa.Table.from_pylist(rows, SCHEMA))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in list(self._rows):
            self._flush(part)
        for part, file in self._files.items():
            file.close()
            beside = self.folder / part / ".metadata.parquet.part"
            beside.replace(self.folder / part / "metadata.parquet")
        if self._files:
            with atomic_write(self.folder / "categories.json") as beside:
                beside.write_text(json.dumps(self.vocabulary.classes, ensure_ascii=False, indent=1), encoding="utf-8")

    def summary(self) -> str:
        return f"{self.objects} objects of {self.images} images as an imagefolder in {self.folder}"
