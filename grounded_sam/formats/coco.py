"""Read COCO instances files, and check every entry; see `segmentations` for the shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import maxsize
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, shorten
from grounded_sam.formats.known_phrases import ABSENT, INCOMPLETE, KnownPhrases, read_known_phrases
from grounded_sam.formats.sa_co import is_sa_co, read_sa_co
from grounded_sam.formats.segmentations import (
    box_problem,
    cut_polygons,
    encode_segmentation,
    is_number,
    segmentation_box,
    segmentation_problem,
    size_problem,
)
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.structures.class_files import without_root
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.documents import is_text, read_json
from grounded_sam.structures.masks import encode_rle, masks_to_xyxy, unpack_masks
from grounded_sam.structures.ontology import MAX_ID_DIGITS
from grounded_sam.structures.results import Skipped
from grounded_sam.structures.vocabulary import Vocabulary

#: Keys of an image and of an annotation that frames and detections have; the others are their `record`.
#: Lists of category ids are no record, since exports number the classes of their run.
_IMAGE_KEYS = {"file_name", "width", "height", "video", "frame", "time_s", ABSENT, INCOMPLETE}
_ANNOTATION_KEYS = {
    *("image_id", "category_id", "bbox", "segmentation", "area", "iscrowd"),
    *("score", "mask_score", "track_id"),
}
#: Numbers that an annotation may have, with their ranges.
_NUMBERS = {
    "score": (0, 1),
    "mask_score": (-1e30, 1e30),
    "track_id": (0, maxsize),
    "area": (0, 1e18),
    "iscrowd": (0, 1),
    "ignore": (0, 1),
}


@dataclass(frozen=True)
class _Problem:
    """What is wrong with an annotation, and whether it can be used nevertheless."""

    reason: str
    usable: bool = False


class CocoFile:
    """The images of a COCO instances file, and the annotations of each that can be used.

    In a file of SA-Co, whose images are pairs of an image and a phrase, each phrase is a class; see `sa_co`.

    An invalid image (without an id, a usable name or a size of at most `max_pixels`) is left out and noted, with its
    annotations. So is an invalid annotation (of no image or category, with a box that is not finite, a mask of another
    size, a polygon of fewer than three points, or an id that occurred before); one that extends outside its image is
    clipped, and noted if it has a box.

    Args:
        path: The file.
        dataset: For a list of results, which has no images and categories: the COCO file that has them.
        content: What the file would contain, for labels of another format.
        allow_mixed: If some annotations have masks and others do not, use the boxes of all; otherwise those without
            masks are left out.
        max_pixels: Larger images are left out.

    Attributes:
        path: As above.
        vocabulary: The categories in the order of the file, with their ids.
        images: The entries of `images`.
        has_masks: Whether annotations have masks.
        known: Which classes the annotations decide on, by image id; see `known_phrases`.
        notes: Which annotations were left out or changed, and why.

    Raises:
        ConfigError: If the file cannot be read, is not JSON, or has no valid images or categories.
    """

    def __init__(
        self,
        path: Path,
        dataset: Path | None = None,
        content: Any = None,
        *,
        allow_mixed: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path = path
        content = _check_content(read_json(path) if content is None else content, path, dataset)
        self.notes: list[Skipped] = []
        if is_sa_co(content):
            content, self.notes = read_sa_co(content)
        categories = without_root(content["categories"], content["annotations"])
        self.vocabulary = Vocabulary.from_categories(categories, str(path))
        self.images: list[dict[str, Any]] = []
        self._class_ids = {number: i for i, number in enumerate(self.vocabulary.category_ids)}
        self._annotations: dict[Any, list[dict[str, Any]]] = {}  # by image id
        self._packed: dict[Any, sv.Detections] = {}  # by image id
        self._bad_images: set[Any] = set()  # ids
        licenses = content.get("licenses")
        self._licenses = {
            item["id"]: item
            for item in (licenses if isinstance(licenses, list) else ())
            if isinstance(item, Mapping) and isinstance(item.get("id"), int | str)
        }
        self._add_images(content["images"], max_pixels)
        self.has_masks = self._check_masks(content["annotations"], allow_mixed)
        self._add_annotations(content["annotations"])
        self.known = {image["id"]: self._known_phrases(image) for image in self.images}

    def _known_phrases(self, image: Mapping[str, Any]) -> KnownPhrases:
        """Return which classes the annotations of an image decide on, and note lists of it that cannot be used."""
        annotations = self._annotations[image["id"]]
        ids = [self._class_ids[annotation["category_id"]] for annotation in annotations]
        crowds = [i for i, a in zip(ids, annotations, strict=True) if a.get("iscrowd") or a.get("ignore")]
        known, notes = read_known_phrases(image, ids, crowds, self._category_index)
        self.notes += notes
        return known

    def _category_index(self, category_id: Any) -> int | None:
        """Return the index of the class with an id; None if there is none."""
        return self._class_ids.get(_to_id(category_id)) if _is_id(category_id) else None

    def _add_images(self, images: Sequence[Any], max_pixels: int) -> None:
        """Check the entries of `images`, add those that can be used, and note the others."""
        for number, entry in enumerate(images):
            image_id = _to_id(entry.get("id")) if isinstance(entry, Mapping) else None
            reason = _image_problem(entry, image_id, max_pixels)
            if reason is None and image_id in self._annotations:
                reason = "another image has the same id"
            if reason is None:
                self.images.append({**entry, "id": image_id})
                self._annotations[image_id] = []
                continue
            self.notes.append(Skipped(f"image {shorten(image_id) if image_id else f'number {number}'}", reason))
            if _is_id(image_id) and image_id not in self._annotations:
                self._bad_images.add(image_id)
        if not self.images:
            first = self.notes[0]
            raise ConfigError(f"{self.path} has no usable image; the first: {first.file}: {first.reason}")

    def _check_masks(self, annotations: Sequence[Any], allow_mixed: bool) -> bool:
        """Return whether masks are used; note if some are ignored because other annotations have none."""
        with_mask = [bool(a.get("segmentation")) for a in annotations if isinstance(a, Mapping)]
        if not allow_mixed or all(with_mask) or not any(with_mask):
            return any(with_mask)
        count = with_mask.count(False)
        self.notes.append(
            Skipped(str(self.path), f"{count} of {len(annotations)} labels have no mask, so only boxes are used")
        )
        return False

    def _add_annotations(self, annotations: Sequence[Any]) -> None:
        """Check the entries of `annotations`, add those that can be used, and note problems."""
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}
        seen: set[Any] = set()
        for number, entry in enumerate(annotations):
            annotation = entry
            if isinstance(entry, Mapping):
                ids = {key: _to_id(entry.get(key)) for key in ("image_id", "category_id")}
                given = {k: v for k, v in entry.items() if v is not None} if None in entry.values() else entry
                annotation = {**given, **ids}
                if _is_id(ids["image_id"]) and ids["image_id"] in self._bad_images:
                    continue  # noted with its image
            problem = self._entry_problem(annotation, sizes, seen)
            if problem is None:
                size_hw = sizes[annotation["image_id"]]
                problem = self._shape_problem(annotation, size_hw)
            if problem is not None:
                has_id = isinstance(entry, Mapping) and "id" in entry
                name = shorten(entry["id"]) if has_id else f"number {number}"
                self.notes.append(Skipped(f"annotation {name}", problem.reason))
            if problem is None or problem.usable:
                if isinstance(annotation.get("segmentation"), list):
                    annotation["segmentation"] = cut_polygons(annotation["segmentation"], size_hw)
                self._annotations[annotation["image_id"]].append(annotation)

    def _entry_problem(
        self, annotation: Any, sizes: Mapping[Any, tuple[int, int]], seen_ids: set[Any]
    ) -> _Problem | None:
        """Check everything but the box and the mask of an annotation, and add its id to `seen_ids`."""
        if not isinstance(annotation, Mapping):
            return _Problem(f"expected an object, got {shorten(annotation)}")
        image_id, category_id = annotation["image_id"], annotation["category_id"]
        if not _is_id(image_id) or image_id not in sizes:
            return _Problem(f"there is no image {shorten(image_id)}")
        if not _is_id(category_id) or category_id not in self._class_ids:
            known = shorten(list(self._class_ids)).strip("[]")
            return _Problem(f"there is no category {shorten(category_id)}; the ids are {known}")
        for key, (low, high) in _NUMBERS.items():
            value = annotation.get(key)
            is_flag = isinstance(value, bool) and high == 1
            if value is not None and not is_flag and not is_number(value, low, high):
                span = " from 0 to 1" if high == 1 else ""
                return _Problem(f"{key} must be a finite number{span}, got {shorten(value)}")
        number = annotation.get("id")
        if number is not None and not _is_id(number):
            return _Problem(f"the id must be a number, got {shorten(number)}")
        if number is not None and number in seen_ids:
            return _Problem(f"another annotation has the same id {shorten(number)}")
        seen_ids.add(number)
        return None

    def _shape_problem(self, annotation: Mapping[str, Any], size_hw: tuple[int, int]) -> _Problem | None:
        """Check the box and the mask of an annotation."""
        segmentation, box = annotation.get("segmentation"), annotation.get("bbox")
        if segmentation:
            reason = segmentation_problem(segmentation, size_hw)
            if reason is not None:
                return _Problem(reason)
        elif self.has_masks:
            return _Problem("no mask, although other annotations have one")
        if box is None and not segmentation:
            return _Problem("neither bbox nor segmentation")
        if box is not None and (reason := box_problem(box, size_hw)) is not None:
            return _Problem(reason, usable=reason.endswith("clipped"))
        if segmentation == []:
            return _Problem("the segmentation is empty; only the box is used", usable=True)
        return None

    def image_record(self, image: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the file says about one of `images` besides name and size; see `Frame.record`."""
        record = {key: value for key, value in image.items() if key not in _IMAGE_KEYS}
        number = record.get("license")
        if isinstance(number, int | str) and number in self._licenses:
            record["license"] = self._licenses[number]
        return record

    def annotations(self, image_id: Any) -> list[dict[str, Any]]:
        """Return the annotations of an image that can be used, as the file has them."""
        return self._annotations[image_id]

    def detections(self, image: Mapping[str, Any]) -> sv.Detections:
        """Convert the annotations of an image to detections.

        Args:
            image: One of `images`.

        Returns:
            Detections with confidence 1 where there is no `score`, `tracker_id` if all annotations of a video frame
            have a `track_id`, and in `data` the columns `iscrowd` and `ignore` (also true for crowds), both bool, and
            `record`, a dict with the other keys of each annotation, such as `id` and `attributes`.
        """
        return unpack_masks(self._to_detections(image), (image["height"], image["width"]))

    def packed_labels(self, image: Mapping[str, Any]) -> sv.Detections:
        """Convert the labels of an image as `detections` does, but with masks as RLE (see `pack_masks`); cached."""
        if image["id"] not in self._packed:
            self._packed[image["id"]] = self._to_detections(image)
        return self._packed[image["id"]]

    def _to_detections(self, image: Mapping[str, Any]) -> sv.Detections:
        """Convert the annotations of an image, with masks as RLE."""
        annotations, size_hw = self._annotations[image["id"]], (image["height"], image["width"])
        if not annotations:
            return empty_detections(self.vocabulary)
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations])
        ignore = crowd | np.array([bool(a.get("ignore", 0)) for a in annotations])
        data: dict[str, Any] = {"iscrowd": crowd, "ignore": ignore, "record": np.empty(len(annotations), object)}
        data["record"][:] = [{k: v for k, v in a.items() if k not in _ANNOTATION_KEYS} for a in annotations]
        if all(a.get("mask_score") is not None for a in annotations):
            data["mask_score"] = np.array([a["mask_score"] for a in annotations], np.float32)
        if self.has_masks:
            data["rle"] = np.empty(len(annotations), object)
            data["rle"][:] = [encode_segmentation(a["segmentation"], size_hw) for a in annotations]
        boxes = [xywh_to_xyxy(a.get("bbox") or segmentation_box(a["segmentation"], size_hw)) for a in annotations]
        detections = make_detections(
            boxes,
            [1.0 if a.get("score") is None else a["score"] for a in annotations],
            [self._class_ids[a["category_id"]] for a in annotations],
            self.vocabulary,
            size_hw,
            track_id=np.array([-1 if a.get("track_id") is None else a["track_id"] for a in annotations], np.int64),
            **data,
        )
        track_ids = np.asarray(detections.data.pop("track_id"))
        if image.get("video") is not None and (track_ids >= 0).all():
            detections.tracker_id = track_ids
        return detections


def _check_content(content: Any, path: Path, dataset: Path | None) -> Mapping[str, Any]:
    """Check that a file has images, annotations and categories; take those of results from their dataset."""
    if isinstance(content, list) and dataset is not None:
        labels = read_json(dataset)
        content = {**labels, "annotations": content}
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{path}: expected an object with images, annotations and categories, got a list; for a list of results "
            "set source.dataset to the COCO file of their images"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise ConfigError(f"{path}: expected a list under {key!r}, got {type(content.get(key)).__name__}")
    if not content["images"]:
        raise ConfigError(f"{path} has no images")
    return content


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _image_problem(entry: Any, image_id: Any, max_pixels: int) -> str | None:
    """Return why an entry of `images` cannot be used; None if it can."""
    if not isinstance(entry, Mapping) or not _is_id(image_id):
        return f"an image needs id, file_name, width and height, got {shorten(entry)}"
    for key in ("file_name", "video"):
        value = entry.get(key)
        if not (is_text(value) and value) and (key == "file_name" or value is not None):
            return f"{key} must be text, got {shorten(value)}"
    for key in ("frame", "time_s"):
        value = entry.get(key)
        if value is not None and not (is_number(value, 0) and (key == "time_s" or isinstance(value, int))):
            return f"{key} must be a number from 0, got {shorten(value)}"
    return size_problem(entry.get("width"), entry.get("height"), max_pixels)


def _to_id(value: Any) -> Any:
    """Convert an id that is written as a string of digits to a number."""
    if isinstance(value, str) and value.isdecimal() and len(value) <= MAX_ID_DIGITS:
        return int(value)
    return value


def xywh_to_xyxy(box: Sequence[float]) -> tuple[float, float, float, float]:
    """Convert a COCO box to corners.

    >>> xywh_to_xyxy([1, 2, 3, 4])
    (1.0, 2.0, 4.0, 6.0)
    """
    x, y, w, h = (float(v) for v in box)
    return x, y, x + w, y + h


def annotation_from_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Make the geometry fields of a COCO annotation: `segmentation`, `bbox`, `area` and `iscrowd`.

    Args:
        mask: `(H, W) bool`.

    >>> annotation_from_mask(np.ones((2, 3), bool))["bbox"]
    [0.0, 0.0, 3.0, 2.0]
    """
    x1, y1, x2, y2 = masks_to_xyxy(mask[None])[0].tolist()
    return {"segmentation": encode_rle(mask), "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()), "iscrowd": 0}
