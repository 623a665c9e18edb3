"""Pascal VOC: boxes in XML, masks in palette PNGs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import supervision as sv

from grounded_sam.files import PendingFile, atomic_write, atomic_write_text, encode_controls, encode_lines
from grounded_sam.media.draw import davis_palette, paint_masks, save_label_map
from grounded_sam.sinks.base import DatasetSink
from grounded_sam.sinks.dataset_images import ImageMode
from grounded_sam.structures.detections import is_crowd
from grounded_sam.structures.results import FrameResult

#: Folders of the label maps.
LABEL_MAPS = ("SegmentationObject", "SegmentationClass")


@dataclass(eq=False)
class VocSink(DatasetSink):
    """Write a dataset with the folders of VOC2012 under `voc/`.

    They are Annotations, JPEGImages, SegmentationClass, SegmentationObject and ImageSets. Boxes are whole pixels
    counted from 1, both ends included. In `SegmentationObject` the pixel value k is the k-th `object` of the XML; in
    `SegmentationClass` it is the class id plus 1 (`classes.txt` has the names in that order). Where two masks overlap,
    the smaller is on top. With more than 254 values, PNGs are 16-bit gray, which VOC does not define. `score` is an
    additional element of an object; a crowd is `difficult`, which VOC's evaluation does not count either. Control
    characters of class names are encoded, see `files.percent_encode`. Supervision's writer instead has polygons without
    holes, one object per part.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        split: Share of each split, see `splits.Splits`; without it all images are in `train`.
        seed: Seed of the split.
        images: `link`, `copy` or `none`; see `dataset_images.DatasetImages`.
    """

    name: ClassVar[str] = "voc"

    images: ImageMode = "link"
    _image_sets: dict[str, PendingFile] = field(default_factory=dict, init=False, repr=False)
    _stems: set[str] = field(default_factory=set, init=False, repr=False)
    _has_masks: bool = field(default=False, init=False, repr=False)
    _empty_images: list[tuple[str, tuple[int, int]]] = field(default_factory=list, init=False, repr=False)

    def _write(self, result: FrameResult) -> int:
        frame, detections = result.frame, result.detections
        split, stem = self._splits(frame) or "train", self._image_files.unique_stem(frame)
        image_name = self._image_files.save(frame, self.folder / "JPEGImages", stem)
        self._image_set(split).text.write(f"{stem}\n")
        self._stems.add(stem)
        tree = _annotation(result, image_name)
        ElementTree.indent(tree)
        with atomic_write(self.folder / "Annotations" / f"{stem}.xml") as part:
            part.write_bytes(ElementTree.tostring(tree, encoding="utf-8", xml_declaration=True))
        if not len(detections):
            self._empty_images.append((stem, frame.size_hw))
        elif detections.mask is not None:
            self._has_masks = True
            self._write_label_maps(detections, frame.size_hw, stem)
        return len(detections)

    def _image_set(self, split: str) -> PendingFile:
        """Return the list of the images of a split."""
        if split not in self._image_sets:
            self._image_sets[split] = PendingFile(self.folder / "ImageSets" / "Main" / f"{split}.txt")
        return self._image_sets[split]

    def _write_label_maps(self, detections: sv.Detections, size_hw: tuple[int, int], stem: str) -> None:
        """Write the label maps of objects and of classes."""
        assert detections.class_id is not None
        areas = [] if detections.mask is None else [int(np.asarray(mask).sum()) for mask in detections.mask]
        order = sorted(range(len(areas)), key=lambda i: -areas[i])
        for folder, values in zip(LABEL_MAPS, (np.arange(len(detections)) + 1, detections.class_id + 1), strict=True):
            label_map = paint_masks(detections, values, order, size_hw)
            has_colors = label_map.max(initial=0) <= 254  # VOC reserves 255 for pixels to ignore
            save_label_map(self.folder / folder / f"{stem}.png", label_map, davis_palette() if has_colors else None)

    def _close(self) -> None:
        if self._has_masks:
            for stem, size_hw in self._empty_images:
                self._write_label_maps(sv.Detections.empty(), size_hw, stem)
        for split in self._splits.names or ["train"]:
            self._image_set(split)  # also those without images
        for image_set in self._image_sets.values():
            image_set.text.writelines(f"{stem}\n" for stem in self._earlier_stems(image_set.path))
            image_set.commit()
            stems = image_set.path.read_text(encoding="utf-8").splitlines()
            stems = [stem for stem in stems if (self.folder / LABEL_MAPS[0] / f"{stem}.png").is_file()]
            if stems or self._has_masks:
                path = self.folder / "ImageSets" / "Segmentation" / image_set.path.name
                atomic_write_text(path, "".join(f"{stem}\n" for stem in stems))
        atomic_write_text(self.folder / "classes.txt", encode_lines(self.vocabulary.classes))

    def _earlier_stems(self, path: Path) -> list[str]:
        """Return the images that earlier runs listed in an image set, as far as their labels are still there."""
        stems = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        annotations = self.folder / "Annotations"
        return [stem for stem in stems if stem not in self._stems and (annotations / f"{stem}.xml").is_file()]

    def _last_files(self) -> Sequence[Path]:
        return (self.folder / "classes.txt",)

    def summary(self) -> str:
        """Return the counts and the folder."""
        return f"{self._counts()} for Pascal VOC: {self.folder}"


def _annotation(result: FrameResult, image_name: str) -> ElementTree.Element:
    """Return the XML of one image."""
    frame, detections = result.frame, result.detections
    height, width = frame.size_hw
    root = ElementTree.Element("annotation")
    folder, _, name = image_name.rpartition("/")
    _add(root, "folder", "/".join(filter(None, ["JPEGImages", folder])))
    _add(root, "filename", name)
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", width), ("height", height), ("depth", 3)):
        _add(size, key, value)
    _add(root, "segmented", int(detections.mask is not None))
    for i in range(len(detections)):
        assert detections.confidence is not None
        element = ElementTree.SubElement(root, "object")
        x1, y1, x2, y2 = detections.xyxy[i].tolist()
        is_truncated = x1 <= 0 or y1 <= 0 or x2 >= width or y2 >= height
        _add(element, "name", encode_controls(str(detections.data["class_name"][i])))
        _add(element, "pose", "Unspecified")
        _add(element, "truncated", int(is_truncated))
        _add(element, "difficult", int(is_crowd(detections, i)))
        _add(element, "score", round(float(detections.confidence[i]), 6))
        box = ElementTree.SubElement(element, "bndbox")
        corners = (math.floor(x1) + 1, math.floor(y1) + 1, math.ceil(x2), math.ceil(y2))
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            _add(box, key, value)
    return root


def _add(parent: ElementTree.Element, key: str, value: Any) -> None:
    """Append an element with a text."""
    ElementTree.SubElement(parent, key).text = str(value)
