"""COCO instances JSON, as pycocotools and annotation tools read it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, Literal

import numpy as np

from grounded_sam.checks import check_choice
from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_text
from grounded_sam.output.paths import RemotePath, output_path
from grounded_sam.sinks.base import DatasetSink
from grounded_sam.sinks.dataset_images import ImageMode
from grounded_sam.structures.detections import coco_annotation
from grounded_sam.structures.masks import encode_polygons
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


def json_header(vocabulary: Vocabulary, **more: Any) -> str:
    """Return the start of a COCO file, up to its lists of images and annotations, without the closing brace.

    Args:
        vocabulary: Classes of the run.
        more: More keys.
    """
    header = {
        "info": {"description": "Made with grounded_sam"},
        "licenses": [],
        "categories": vocabulary.categories(),
        **more,
    }
    return json.dumps(header, ensure_ascii=False)[:-1]


class _Ids:
    """The ids of the entries of a list: their own while no other entry has them, else the next free number."""

    def __init__(self) -> None:
        self._last = 0
        self._own: set[Any] = set()  # only ids that entries brought along

    def __call__(self, own: Any = None) -> Any:
        """Return the id of an entry.

        Args:
            own: Its id in the file that it comes from, a number or text; None without one.
        """
        is_given = isinstance(own, int) and 1 <= own <= self._last and own not in self._own
        if isinstance(own, int | str) and not isinstance(own, bool) and own not in self._own and not is_given:
            self._own.add(own)
            return own
        self._last += 1
        while self._last in self._own:
            self._last += 1
        return self._last


@dataclass(eq=False)
class CocoSink(DatasetSink):
    """Write COCO instances to `annotations.json`, or to one `annotations_<split>.json` per split.

    Category ids are those of the ontology, or class ids plus 1. Images and annotations of a COCO file keep their ids,
    licenses, attributes and all other keys; other ids count from 1. Annotations have
    `score` (confidence) and `mask_score` (with a segmenter); in videos also `track_id`, and their images have `video`,
    `frame` (number) and `time_s`. Lines go to temporary files during the run and are combined at the end, also after an
    interruption, so that masks are not kept in memory.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        split: Share of each split, see `splits.Splits`.
        seed: Seed of the split.
        images: `none`; `link` or `copy` for image files under `images/`, which `file_name` then names; `address`
            for the addresses of images as `coco_url`, where the input is one.
        segmentation: `rle` (exact), or `polygon` for tools that cannot read RLE (exact too, read by pycocotools).
        tolerance: Largest distance in pixels of simplified polygons from the outline; 0 for exact ones.
        file: Name of the JSON file.

    Raises:
        ConfigError: If `segmentation` is none of its choices, or `file` has a folder.
    """

    name: ClassVar[str] = "coco"
    takes_image_addresses: ClassVar[bool] = True
    takes_address: ClassVar[bool] = True

    images: ImageMode = "none"
    segmentation: Literal["rle", "polygon"] = "rle"
    tolerance: float = 0.0
    file: str = "annotations.json"
    _image_ids: _Ids = field(default_factory=_Ids, init=False, repr=False)
    _annotation_ids: _Ids = field(default_factory=_Ids, init=False, repr=False)
    _license_ids: _Ids = field(default_factory=_Ids, init=False, repr=False)
    _licenses: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    _lines: dict[tuple[str | None, str], IO[str]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("sink.coco.segmentation", self.segmentation, ("rle", "polygon"))
        if Path(self.file).name != self.file:
            raise ConfigError(f"sink.coco.file must be a file name without a folder, got {self.file!r}")
        if self.images in ("link", "copy") and isinstance(output_path(self.output), RemotePath):
            raise ConfigError(
                f"sink.coco.images={self.images} writes image files to a folder, not to {self.output}; use "
                "sink.coco.images=none there"
            )
        super().__post_init__()
        self.folder = output_path(self.output)  # type: ignore[assignment]  # an address has what is used here

    def _path(self, split: str | None) -> Path:
        """Return the path of the JSON file of a split."""
        path = self.folder / self.file
        return path if split is None else path.with_stem(f"{path.stem}_{split}")

    def _split_names(self) -> Sequence[str | None]:
        """Return the names of the splits; `[None]` without splits."""
        return self._splits.names or [None]

    def _open(self) -> None:
        beside = None  # at an address: where the system has temporary files
        if not isinstance(self.folder, RemotePath):
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = self.folder
        for split in self._split_names():
            for key in ("images", "annotations"):
                # Without a name, so that nothing is left when the process is killed.
                lines = tempfile.TemporaryFile("w+", encoding="utf-8", dir=beside)  # noqa: SIM115
                self._lines[split, key] = lines

    def _write_line(self, split: str | None, key: str, entry: dict[str, Any]) -> None:
        self._lines[split, key].write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _write(self, result: FrameResult) -> int:
        frame, detections, split = result.frame, result.packed, self._splits(result.frame)
        name, (height, width) = frame.name, frame.size_hw
        record = dict(frame.record)
        if self.images == "address":
            record["coco_url"] = self._image_files.address(frame)
        elif self.images != "none":
            name = self._image_files.save(frame, self.folder / "images", self._image_files.unique_stem(frame))
        image_id = self._image_ids(record.pop("id", None))
        if isinstance(record.get("license"), dict):
            record["license"] = self._license_id(record["license"])
        image: dict[str, Any] = {**record, "id": image_id, "file_name": name, "width": width, "height": height}
        if frame.video is not None:
            image |= {"video": frame.video, "frame": frame.index, "time_s": frame.time_s}
        self._write_line(split, "images", image)
        for i in range(len(detections)):
            entry = self._annotation(result, i)
            ids = {"id": self._annotation_ids(entry.get("id")), "image_id": image_id}
            self._write_line(split, "annotations", {**ids, **entry, **ids})
        return len(detections)

    def _license_id(self, entry: dict[str, Any]) -> Any:
        """Add a license to the file, and return its id: its own, unless that of another license."""
        for known in self._licenses:
            if {**known, "id": None} == {**entry, "id": None}:
                return known["id"]
        number = self._license_ids(entry.get("id"))
        self._licenses.append({**entry, "id": number})
        return number

    def _annotation(self, result: FrameResult, i: int) -> dict[str, Any]:
        """Return the annotation of one detection."""
        entry = coco_annotation(result.packed, i, self.vocabulary.category_ids)
        if self.segmentation == "polygon" and "segmentation" in entry:
            assert result.detections.mask is not None
            entry["segmentation"] = encode_polygons(np.asarray(result.detections.mask[i], bool), self.tolerance)
        return entry

    def own_folder(self) -> Path:
        """Return the folder of the image files."""
        return self.folder / "images"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or self.num_images:  # a run that failed before its first image keeps the earlier files
            self._image_files.write_names(self.folder)
            self._close()
        for lines in self._lines.values():
            lines.close()

    def _close(self) -> None:
        for split in self._split_names():
            with atomic_text(self._path(split)) as out:
                out.write(json_header(self.vocabulary, licenses=self._licenses))
                for key in ("images", "annotations"):
                    out.write(f',\n"{key}": [')
                    if (split, key) in self._lines:
                        self._lines[split, key].seek(0)
                        for number, line in enumerate(self._lines[split, key]):
                            out.write((",\n" if number else "\n") + line.rstrip("\n"))
                    out.write("\n]")
                out.write("}\n")

    def _last_files(self) -> Sequence[Path]:
        return [self._path(split) for split in self._split_names()]

    def summary(self) -> str:
        """Return the counts and the paths of the files."""
        return f"{self._counts()}: {', '.join(str(self._path(split)) for split in self._split_names())}"
