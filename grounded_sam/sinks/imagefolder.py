"""Hugging Face `imagefolder`: images with a `metadata.parquet`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import supervision as sv

from grounded_sam.checks import check_choice
from grounded_sam.files import PendingFile, atomic_write_text
from grounded_sam.sinks.base import DatasetSink
from grounded_sam.sinks.dataset_images import ImageMode
from grounded_sam.structures.masks import coco_segmentation, mask_area
from grounded_sam.structures.results import FrameResult

#: Columns of an object; a row has a list of each.
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
#: Rows per row group of the Parquet file.
ROW_GROUP = 256


class _Metadata:
    """The `metadata.parquet` of a split, written in row groups."""

    def __init__(self, file: PendingFile) -> None:
        self._file, self._writer = file, pq.ParquetWriter(file.part, SCHEMA)
        self._rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        """Add the row of an image."""
        self._rows.append(row)
        if len(self._rows) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
        self._rows = []

    def close(self) -> None:
        """Write the last rows and rename the file into place."""
        if self._rows:
            self._flush()
        self._writer.close()
        self._file.commit()


@dataclass(eq=False)
class ImageFolderSink(DatasetSink):
    """Write a folder per split under `imagefolder/`, for `datasets.load_dataset("imagefolder", data_dir=...)`.

    A row has `image`, `file`, `width`, `height` and `objects`, with a list each of `bbox` (x, y, width, height),
    `category` (index in `categories.json`), `name`, `score`, `area`, `segmentation` (COCO RLE, null without masks) and
    `track_id` (null outside of videos). The metadata are Parquet, not JSON lines, so that the types of columns do not
    depend on the rows of a split.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        split: Share of each split, see `splits.Splits`; without it all images are in `train`.
        seed: Seed of the split.
        images: `link` or `copy`; see `dataset_images.DatasetImages`.

    Raises:
        ConfigError: If `images` is neither; `none` would leave the folder without its images.
    """

    name: ClassVar[str] = "imagefolder"

    images: ImageMode = "copy"
    _metadata: dict[str, _Metadata] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("sink.imagefolder.images", self.images, ("link", "copy"))
        super().__post_init__()

    def _write(self, result: FrameResult) -> int:
        frame, detections = result.frame, result.packed
        split = self._splits(frame) or "train"
        name = self._image_files.save(frame, self.folder / split, self._image_files.unique_stem(frame))
        height, width = frame.size_hw
        objects = [self._object(detections, i) for i in range(len(detections))]
        columns = {key: [entry[key] for entry in objects] for key in OBJECT}
        if split not in self._metadata:
            self._metadata[split] = _Metadata(PendingFile(self.folder / split / "metadata.parquet"))
        self._metadata[split].append(
            {"file_name": name, "file": frame.name, "width": width, "height": height, "objects": columns}
        )
        return len(detections)

    def _object(self, detections: sv.Detections, i: int) -> dict[str, Any]:
        """Return the columns of one detection."""
        assert detections.class_id is not None and detections.confidence is not None
        x1, y1, x2, y2 = (round(float(value), 3) for value in detections.xyxy[i])
        rle = coco_segmentation(detections, i)
        return {
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "category": int(detections.class_id[i]),
            "name": str(detections.data["class_name"][i]),
            "score": float(detections.confidence[i]),
            "area": (x2 - x1) * (y2 - y1) if rle is None else float(mask_area(detections, i)),
            "segmentation": rle,
            "track_id": None if detections.tracker_id is None else int(detections.tracker_id[i]),
        }

    def _close(self) -> None:
        for metadata in self._metadata.values():
            metadata.close()
        categories = json.dumps(self.vocabulary.classes, ensure_ascii=False, indent=1)
        atomic_write_text(self.folder / "categories.json", categories)

    def _last_files(self) -> Sequence[Path]:
        return (self.folder / "categories.json",)

    def own_folder(self) -> Path:
        """Return the folder of the dataset, whose one list of labels has the images of the last run only."""
        return self.folder

    def summary(self) -> str:
        """Return the counts and the folder."""
        return f"{self._counts()} as an imagefolder: {self.folder}"
