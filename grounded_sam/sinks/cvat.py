"""CVAT for images 1.1, as one XML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from xml.sax.saxutils import XMLGenerator

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_choice
from grounded_sam.files import PendingFile, encode_controls
from grounded_sam.sinks.base import DatasetSink
from grounded_sam.structures.masks import join_loops, mask_outlines, masks_to_xyxy
from grounded_sam.structures.results import FrameResult


@dataclass(eq=False)
class CvatSink(DatasetSink):
    """Write `cvat.xml`, for "Upload annotations" as CVAT 1.1 in a task with the same images.

    Objects have the attributes `score` and, in videos, `track_id`. Masks are exact; polygons run along the edges of
    pixels, and zero-width bridges connect separate parts and holes. Without masks, objects are boxes. Control
    characters of names, which XML cannot have, are encoded, see `files.percent_encode`.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        split: Share of each split, see `splits.Splits`; written as `subset` of an image.
        seed: Seed of the split.
        shape: `mask` or `polygon`.
        tolerance: Largest distance in pixels of simplified polygons from the outline; 0 for exact ones.

    Raises:
        ConfigError: If `shape` is neither.
    """

    name: ClassVar[str] = "cvat"

    shape: Literal["mask", "polygon"] = "mask"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_choice("sink.cvat.shape", self.shape, ("mask", "polygon"))
        super().__post_init__()
        self.path = Path(self.output) / "cvat.xml"

    def _open(self) -> None:
        self._file = PendingFile(self.path)
        self._xml = XMLGenerator(self._file.text, "utf-8", short_empty_elements=True)
        self._xml.startDocument()
        self._start("annotations")
        self._element("version", "1.1")
        for tag in ("meta", "task", "labels"):
            self._start(tag)
        for name, color in zip(self.vocabulary.classes, self.vocabulary.palette(), strict=True):
            self._start("label")
            self._element("name", encode_controls(name))
            self._element("color", color)
            self._start("attributes")
            for attribute in ("score", "track_id"):
                self._start("attribute")
                for key, value in (("name", attribute), ("mutable", "True"), ("input_type", "text")):
                    self._element(key, value)
                self._end("attribute")
            self._end("attributes")
            self._end("label")
        for tag in ("labels", "task", "meta"):
            self._end(tag)

    def _start(self, tag: str, **attributes: Any) -> None:
        """Write a start tag, with the attributes that are not None."""
        texts = {key: str(value) for key, value in attributes.items() if value is not None}
        self._xml.startElement(tag, texts)  # type: ignore[arg-type]

    def _end(self, tag: str) -> None:
        self._xml.endElement(tag)
        self._xml.ignorableWhitespace("\n")

    def _element(self, tag: str, text: Any, **attributes: Any) -> None:
        """Write an element with a text."""
        self._start(tag, **attributes)
        self._xml.characters(str(text))
        self._end(tag)

    def _write(self, result: FrameResult) -> int:
        frame, detections = result.frame, result.detections
        (height, width), split = frame.size_hw, self._splits(frame)
        # Otherwise as it is, since CVAT compares it with the names of its images.
        name = frame.name if frame.name.isprintable() else encode_controls(frame.name)
        self._start("image", id=self.num_images, name=name, subset=split, width=width, height=height)
        for i in range(len(detections)):
            self._write_object(detections, i)
        self._end("image")
        return len(detections)

    def _write_object(self, detections: sv.Detections, i: int) -> None:
        """Write one detection, unless its mask is empty."""
        assert detections.confidence is not None
        if detections.mask is None:
            x1, y1, x2, y2 = (f"{value:.2f}" for value in detections.xyxy[i].tolist())
            tag, geometry = "box", {"xtl": x1, "ytl": y1, "xbr": x2, "ybr": y2}
        else:
            mask = np.asarray(detections.mask[i], bool)
            if not mask.any():
                return
            tag = self.shape
            geometry = _mask_geometry(mask) if tag == "mask" else _polygon_geometry(mask, self.tolerance)
        label = encode_controls(str(detections.data["class_name"][i]))
        self._start(tag, label=label, source="auto", occluded=0, z_order=0, **geometry)
        self._element("attribute", f"{float(detections.confidence[i]):.4f}", name="score")
        if detections.tracker_id is not None:
            self._element("attribute", int(detections.tracker_id[i]), name="track_id")
        self._end(tag)

    def _close(self) -> None:
        self._end("annotations")
        self._xml.endDocument()
        self._file.commit()

    def _last_files(self) -> Sequence[Path]:
        return (self.path,)

    def summary(self) -> str:
        """Return the counts and the path of the file."""
        return f"{self._counts()} for CVAT: {self.path}"


def _mask_geometry(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the attributes of a mask: its box, and the run lengths within the box, starting with zeros."""
    x1, y1, x2, y2 = masks_to_xyxy(mask[None])[0].astype(int).tolist()
    flat = mask[y1:y2, x1:x2].reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    rle = ", ".join(map(str, [0, *lengths] if flat[0] else lengths))
    return {"rle": rle, "left": x1, "top": y1, "width": x2 - x1, "height": y2 - y1}


def _polygon_geometry(mask: NDArray[np.bool_], tolerance: float) -> dict[str, Any]:
    """Return the attributes of a polygon."""
    polygon = join_loops(mask_outlines(mask, "edges", tolerance))
    return {"points": ";".join(f"{x:.2f},{y:.2f}" for x, y in polygon)}
