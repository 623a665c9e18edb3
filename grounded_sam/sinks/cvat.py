"""CVAT for images 1.1, one XML."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal
from xml.sax.saxutils import XMLGenerator

import numpy as np

from grounded_sam.errors import ConfigError
from grounded_sam.sinks.splits import Splits
from grounded_sam.structures.masks import join_loops, mask_outlines, masks_to_xyxy
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class CvatSink:
    """`cvat.xml`, which a task with the same pictures takes under "Upload annotations", CVAT 1.1.

    Objects have the attributes `score` and, of videos, `track_id`. Masks are exact; polygons go along the edges
    of pixels, parts and holes tied in by lines there and back. Without masks objects are boxes.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        split: parts by share, see `Splits`, as `subset` of an image.
        seed: of the split.
        shape: `mask` or `polygon`.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        split: dict[str, float] | None = None,
        seed: int = 0,
        shape: Literal["mask", "polygon"] = "mask",
    ) -> None:
        if shape not in ("mask", "polygon"):
            raise ConfigError(f"sink.cvat.shape must be mask or polygon, got {shape!r}")
        self.path, self.vocabulary, self.shape = Path(output) / "cvat.xml", vocabulary, shape
        self.split = Splits(split, seed)
        self.images = self.objects = 0
        self._out: IO[str] | None = None

    def __enter__(self) -> CvatSink:
        return self

    def _begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._out = (self.path.parent / f".{self.path.name}.part").open("w", encoding="utf-8")
        self._xml = XMLGenerator(self._out, "utf-8", short_empty_elements=True)
        self._xml.startDocument()
        self._open("annotations")
        self._leaf("version", "1.1")
        for tag in ("meta", "task", "labels"):
            self._open(tag)
        for name, colour in zip(self.vocabulary.classes, self.vocabulary.palette(), strict=True):
            self._open("label")
            self._leaf("name", name)
            self._leaf("color", colour)
            self._open("attributes")
            for attribute in ("score", "track_id"):
                self._open("attribute")
                for key, value in (("name", attribute), ("mutable", "True"), ("input_type", "text")):
                    self._leaf(key, value)
                self._close("attribute")
            self._close("attributes")
            self._close("label")
        for tag in ("labels", "task", "meta"):
            self._close(tag)

    def _open(self, tag: str, **attributes: Any) -> None:
        texts = {key: "".join(c for c in str(v) if ord(c) >= 32) for key, v in attributes.items() if v is not None}
        self._xml.startElement(tag, texts)  # type: ignore[arg-type]

    def _close(self, tag: str) -> None:
        self._xml.endElement(tag)
        self._xml.ignorableWhitespace("\n")

    def _leaf(self, tag: str, text: Any, **attributes: Any) -> None:
        self._open(tag, **attributes)
        self._xml.characters(str(text))
        self._close(tag)

    def write(self, result: FrameResult) -> None:
        if self._out is None:
            self._begin()
        frame, found = result.frame, result.detections
        height, width = frame.size_hw
        self._open("image", id=self.images, name=frame.name, subset=self.split(frame), width=width, height=height)
        for i in range(len(found)):
            self._object(found, i)
        self._close("image")
        self.images += 1
        self.objects += len(found)

    def _object(self, found: Any, i: int) -> None:
        common = {"label": found.data["class_name"][i], "source": "auto", "occluded": 0, "z_order": 0}
        if found.mask is None:
            x1, y1, x2, y2 = (f"{v:.2f}" for v in found.xyxy[i].tolist())
            tag, place = "box", {"xtl": x1, "ytl": y1, "xbr": x2, "ybr": y2}
        else:
            mask = np.asarray(found.mask[i], bool)
            if not mask.any():
                return
            if self.shape == "mask":
                x1, y1, x2, y2 = masks_to_xyxy(mask[None])[0].astype(int).tolist()
                runs = _runs(mask[y1:y2, x1:x2].reshape(-1))
                tag = "mask"
                place = {"rle": ", ".join(map(str, runs)), "left": x1, "top": y1, "width": x2 - x1, "height": y2 - y1}
            else:
                polygon = join_loops(mask_outlines(mask, "edges"))
                tag, place = "polygon", {"points": ";".join(f"{x:.2f},{y:.2f}" for x, y in polygon)}
        self._open(tag, **common, **place)
        self._leaf("attribute", f"{float(found.confidence[i]):.4f}", name="score")
        if found.tracker_id is not None:
            self._leaf("attribute", int(found.tracker_id[i]), name="track_id")
        self._close(tag)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._out is None:
            return
        self._close("annotations")
        self._xml.endDocument()
        self._out.close()
        Path(self._out.name).replace(self.path)

    def summary(self) -> str:
        return f"{self.objects} objects of {self.images} images for CVAT in {self.path}"


def _runs(flat: np.ndarray) -> list[int]:
    """Lengths of runs, the first one of zeros, as CVAT counts them."""
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return [0, *lengths] if flat[0] else lengths
