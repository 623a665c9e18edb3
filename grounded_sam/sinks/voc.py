"""Pascal VOC: boxes in XML, masks in palette PNGs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from grounded_sam.files import atomic_write
from grounded_sam.media.draw import davis_palette
from grounded_sam.sinks.dataset_images import DatasetImages, Handling
from grounded_sam.sinks.splits import Splits
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class VocSink:
    """Under `voc/` the folders of VOC2012: Annotations, JPEGImages, SegmentationClass, SegmentationObject, ImageSets.

    Boxes are whole pixels from 1, both ends included. In `SegmentationObject` pixel value k is the k-th
    `object` of the XML; in `SegmentationClass` it is class id plus 1 (`classes.txt` has the names in that order);
    where two overlap the smaller lies on top. Beyond 254 values PNGs are 16-bit gray, which VOC does not
    know. `score` is an extra element of an object. Supervision's writer has no masks but polygons without
    holes, one object per part.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        split: parts by share, see `Splits`; without it all is `train`.
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
        self.folder, self.vocabulary = Path(output) / "voc", vocabulary
        self.split, self.pictures = Splits(split, seed), DatasetImages(images, "sink.voc.images")
        self.images = self.objects = 0
        self._lists: dict[str, IO[str]] = {}
        self._masks = False  # whether there are any
        self._bare: list[tuple[str, tuple[int, int]]] = []  # images without objects

    def __enter__(self) -> VocSink:
        return self

    def write(self, result: FrameResult) -> None:
        if not self.images:
            self.split.claim(self.folder)
        frame, found = result.frame, result.detections
        part, stem = self.split(frame) or "train", self.pictures.stem(frame)
        picture = self.pictures.put(frame, self.folder / "JPEGImages", stem)
        self._list(part, stem)
        with atomic_write(self.folder / "Annotations" / f"{stem}.xml") as beside:
            tree = self._tree(result, picture)
            ElementTree.indent(tree)
            beside.write_bytes(ElementTree.tostring(tree, encoding="utf-8", xml_declaration=True))
        if not len(found):
            self._bare.append((stem, frame.size_hw))
        elif found.mask is not None:
            assert found.class_id is not None
            self._masks = True
            order = np.argsort(-np.asarray(found.mask).sum((1, 2)), kind="stable")
            for name, values in (
                ("SegmentationObject", np.arange(1, len(found) + 1)),
                ("SegmentationClass", found.class_id + 1),
            ):
                pixels = np.zeros(frame.size_hw, np.uint16)
                for i in order:
                    pixels[np.asarray(found.mask[i], bool)] = values[i]
                self._save(self.folder / name / f"{stem}.png", pixels)
        self.images += 1
        self.objects += len(found)

    def _list(self, part: str, *stems: str) -> None:
        if part not in self._lists:
            folder = self.folder / "ImageSets" / "Main"
            folder.mkdir(parents=True, exist_ok=True)
            self._lists[part] = (folder / f".{part}.txt.part").open("w", encoding="utf-8")
        self._lists[part].writelines(f"{stem}\n" for stem in stems)

    def _tree(self, result: FrameResult, picture: str) -> ElementTree.Element:
        frame, found = result.frame, result.detections
        height, width = frame.size_hw
        root = ElementTree.Element("annotation")
        folder, _, name = picture.rpartition("/")
        _add(root, "folder", "/".join(filter(None, ["JPEGImages", folder])))
        _add(root, "filename", name)
        size = ElementTree.SubElement(root, "size")
        for key, value in (("width", width), ("height", height), ("depth", 3)):
            _add(size, key, value)
        _add(root, "segmented", int(found.mask is not None))
        for i in range(len(found)):
            assert found.confidence is not None
            one = ElementTree.SubElement(root, "object")
            x1, y1, x2, y2 = found.xyxy[i].tolist()
            edges = (x1 <= 0, y1 <= 0, x2 >= width, y2 >= height)
            _add(one, "name", found.data["class_name"][i])
            _add(one, "pose", "Unspecified")
            _add(one, "truncated", int(any(edges)))
            _add(one, "difficult", 0)
            _add(one, "score", round(float(found.confidence[i]), 6))
            box = ElementTree.SubElement(one, "bndbox")
            corners = (math.floor(x1) + 1, math.floor(y1) + 1, math.ceil(x2), math.ceil(y2))
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                _add(box, key, value)
        return root

    def _save(self, path: Path, pixels: NDArray[np.uint16]) -> None:
        from PIL import Image

        few = pixels.max(initial=0) <= 254  # 255 is what VOC leaves out
        picture = Image.fromarray(pixels.astype(np.uint8) if few else pixels)
        if few:
            picture.putpalette(davis_palette())
        with atomic_write(path) as beside:
            picture.save(beside, format="PNG")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._lists:
            return
        for part in self.split.names or ["train"]:
            self._list(part)
        for part, lines in self._lists.items():
            lines.close()
            place = Path(lines.name).with_name(f"{part}.txt")
            Path(lines.name).replace(place)
            if self._masks:
                with atomic_write(self.folder / "ImageSets" / "Segmentation" / place.name) as beside:
                    shutil.copyfile(place, beside)
        for stem, size_hw in self._bare if self._masks else ():
            for name in ("SegmentationObject", "SegmentationClass"):
                self._save(self.folder / name / f"{stem}.png", np.zeros(size_hw, np.uint16))
        if self._lists:
            with atomic_write(self.folder / "classes.txt") as beside:
                beside.write_text("".join(f"{name}\n" for name in self.vocabulary.classes), encoding="utf-8")

    def summary(self) -> str:
        return f"{self.objects} objects of {self.images} images for Pascal VOC in {self.folder}"


def _add(parent: ElementTree.Element, key: str, value: Any) -> None:
    # Control characters, which a file name may have, cannot stand in XML.
    text = "".join(c for c in str(value) if c in "\t\n\r" or ord(c) >= 32)
    ElementTree.SubElement(parent, key).text = text
