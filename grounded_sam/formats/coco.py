"""Read COCO instances files, and check every entry."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.masks import encode_rle, masks_to_xyxy, unpack_masks
from grounded_sam.structures.ontology import without_root
from grounded_sam.structures.results import Skipped
from grounded_sam.structures.vocabulary import Vocabulary

#: Keys of an image and of an annotation that frames and detections have; the others are their `record`.
_IMAGE_KEYS = {"file_name", "width", "height", "video", "frame", "time_s"}
_ANNOTATION_KEYS = {
    *("image_id", "category_id", "bbox", "segmentation", "area", "iscrowd"),
    *("score", "mask_score", "track_id"),
}
#: Numbers that an annotation may have, with their ranges.
_NUMBERS = {"score": (0.0, 1.0), "mask_score": (-math.inf, math.inf), "track_id": (0.0, math.inf)}


@dataclass(frozen=True)
class _Problem:
    """What is wrong with an annotation, and whether it can be used nevertheless."""

    reason: str
    usable: bool = False


class CocoFile:
    """The images of a COCO instances file, and the annotations of each that can be used.

    An invalid annotation (of no image or category, with a box that is not finite, a mask of another size, a polygon of
    fewer than three points, or an id that occurred before) is left out and noted; one that extends outside its image is
    clipped and noted.

    Args:
        path: The file.
        dataset: For a list of results, which has no images and categories: the COCO file that has them.
        content: What the file would contain, for labels of another format.
        allow_mixed: If some annotations have masks and others do not, use the boxes of all; otherwise those without
            masks are left out.

    Attributes:
        path: As above.
        vocabulary: The categories in the order of the file, with their ids.
        images: The entries of `images`.
        has_masks: Whether annotations have masks.
        notes: Which annotations were left out or changed, and why.

    Raises:
        ConfigError: If the file cannot be read, is not JSON, or has no valid images or categories.
    """

    def __init__(
        self, path: Path, dataset: Path | None = None, content: Any = None, *, allow_mixed: bool = False
    ) -> None:
        self.path = path
        content = _check_content(read_json(path) if content is None else content, path, dataset)
        categories = without_root(content["categories"], content["annotations"])
        self.vocabulary = Vocabulary.from_categories(categories, str(path))
        self.images: list[dict[str, Any]] = []
        self.notes: list[Skipped] = []
        self._class_ids = {number: i for i, number in enumerate(self.vocabulary.category_ids)}
        self._annotations: dict[Any, list[dict[str, Any]]] = {}  # by image id
        self._packed: dict[Any, sv.Detections] = {}  # by image id
        self._licenses = {
            item["id"]: item
            for item in content.get("licenses") or ()
            if isinstance(item, Mapping) and isinstance(item.get("id"), int | str)
        }
        self._add_images(content["images"])
        self.has_masks = self._check_masks(content["annotations"], allow_mixed)
        self._add_annotations(content["annotations"])

    def _add_images(self, images: Sequence[Any]) -> None:
        """Check and add the entries of `images`."""
        for entry in images:
            if not _is_image(entry):
                raise ConfigError(f"{self.path}: an image needs id, file_name, width and height, got {entry!r}")
            image = {**entry, "id": _to_id(entry["id"])}
            if image["id"] in self._annotations:
                raise ConfigError(f"{self.path}: two images have the id {image['id']}")
            self.images.append(image)
            self._annotations[image["id"]] = []

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
            name, annotation = f"number {number}", entry
            if isinstance(entry, Mapping):
                name = entry.get("id", name)
                annotation = {**entry, "image_id": _to_id(entry.get("image_id"))}
            problem = self._entry_problem(annotation, sizes, seen)
            if problem is None:
                size_hw = sizes[annotation["image_id"]]
                problem = self._shape_problem(annotation, size_hw)
            if problem is not None:
                self.notes.append(Skipped(f"annotation {name}", problem.reason))
            if problem is None or problem.usable:
                self._annotations[annotation["image_id"]].append(annotation)

    def _entry_problem(
        self, annotation: Any, sizes: Mapping[Any, tuple[int, int]], seen_ids: set[Any]
    ) -> _Problem | None:
        """Check everything but the box and the mask of an annotation, and add its id to `seen_ids`."""
        if not isinstance(annotation, Mapping):
            return _Problem(f"expected an object, got {annotation!r}")
        image_id, category_id = annotation["image_id"], annotation.get("category_id")
        if isinstance(image_id, list | dict) or image_id not in sizes:
            return _Problem(f"there is no image {image_id!r}")
        if isinstance(category_id, list | dict) or category_id not in self._class_ids:
            known = ", ".join(map(str, self._class_ids))
            return _Problem(f"there is no category {category_id!r}; the ids are {known}")
        for key, (low, high) in _NUMBERS.items():
            value = annotation.get(key)
            if value is not None and not (_is_finite(value) and low <= value <= high):
                span = " from 0 to 1" if high == 1 else ""
                return _Problem(f"{key} must be a finite number{span}, got {value!r}")
        number = annotation.get("id")
        if number is not None and not isinstance(number, int | str):
            return _Problem(f"the id must be a number, got {number!r}")
        if number is not None and number in seen_ids:
            return _Problem(f"another annotation has the same id {number}")
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
        if box is not None and (problem := _box_problem(box, size_hw)) is not None:
            return problem
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


def _is_image(entry: Any) -> bool:
    """Return whether an entry of `images` has everything that is needed."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), int | str):
        return False
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        return False
    return all(isinstance(entry.get(key), int) and entry[key] >= 1 for key in ("width", "height"))


def _box_problem(box: Any, size_hw: tuple[int, int]) -> _Problem | None:
    """Check a box; up to one pixel outside the image is rounding."""
    height, width = size_hw
    if not isinstance(box, Sequence) or len(box) != 4 or not all(_is_finite(v) for v in box):
        return _Problem(f"bbox must be four finite numbers, got {box!r}")
    x, y, w, h = box
    if w <= 0 or h <= 0 or x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return _Problem(f"the bbox {box!r} is empty, or outside the {width}x{height} px image")
    if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        return _Problem(f"the bbox {box!r} extends outside the {width}x{height} px image; it is clipped", usable=True)
    return None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ConfigError: If it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def _to_id(value: Any) -> Any:
    """Convert an id that is written as a string of digits to a number."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def xywh_to_xyxy(box: Sequence[float]) -> tuple[float, float, float, float]:
    """Convert a COCO box to corners.

    >>> xywh_to_xyxy([1, 2, 3, 4])
    (1.0, 2.0, 4.0, 6.0)
    """
    x, y, w, h = (float(v) for v in box)
    return x, y, x + w, y + h


def decode_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode a COCO segmentation with pycocotools.

    Args:
        segmentation: Polygons, or compressed or uncompressed RLE; see `segmentation_problem` to check it.
        size_hw: Height and width of the image.

    Returns:
        `(H, W) bool`.

    >>> decode_segmentation([[0, 0, 2, 0, 2, 1, 0, 1]], (2, 3)).astype(int).tolist()
    [[1, 1, 0], [0, 0, 0]]
    """
    from pycocotools import mask as coco_mask

    return np.asarray(coco_mask.decode(encode_segmentation(segmentation, size_hw)), bool)


def encode_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> dict[str, Any]:
    """Convert a COCO segmentation in any form to compressed RLE, with `counts` as bytes as pycocotools has them.

    Args:
        segmentation: Polygons, or compressed or uncompressed RLE.
        size_hw: Height and width of the image.
    """
    from pycocotools import mask as coco_mask

    height, width = size_hw
    if isinstance(segmentation, list):
        return dict(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return dict(coco_mask.frPyObjects(segmentation, height, width))
    return {"size": segmentation["size"], "counts": segmentation["counts"].encode()}


def segmentation_box(segmentation: Any, size_hw: tuple[int, int]) -> list[float]:
    """Compute the box around a COCO segmentation, `[x, y, width, height]`.

    Args:
        segmentation: Polygons, or compressed or uncompressed RLE.
        size_hw: Height and width of the image.
    """
    from pycocotools import mask as coco_mask

    box: list[float] = coco_mask.toBbox(encode_segmentation(segmentation, size_hw)).tolist()
    return box


def segmentation_problem(segmentation: Any, size_hw: tuple[int, int]) -> str | None:
    """Return why a COCO segmentation cannot be decoded; None if it can.

    pycocotools does not check this itself, and would crash or read past the end of its buffer.

    Args:
        segmentation: What should be polygons or RLE.
        size_hw: Height and width of the image.

    >>> segmentation_problem([[0, 0, 2, 0]], (2, 3))
    'a polygon needs at least three points (six numbers)'
    """
    height, width = size_hw
    if isinstance(segmentation, Mapping):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            return f"its RLE has the size {size}, the image [{height}, {width}]"
        if isinstance(counts, list):
            if not all(isinstance(v, int) and v >= 0 for v in counts) or sum(counts) != height * width:
                return f"the counts of its RLE do not add up to the {height * width} pixels of the image"
            return None
        return counts_problem(counts, height * width) if isinstance(counts, str) and counts else "its RLE has no counts"
    if not isinstance(segmentation, list):
        return f"the segmentation must be polygons or RLE, got {type(segmentation).__name__}"
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "a polygon needs at least three points (six numbers)"
        if not all(_is_finite(v) for v in polygon):
            return "a polygon has a coordinate that is not a finite number"
    return None


def counts_problem(text: str, pixels: int) -> str | None:
    """Return why compressed RLE counts cannot be decoded, read as `rleFrString` of COCO's maskApi.c does.

    Args:
        text: The counts.
        pixels: Number of pixels that they should add up to.

    >>> counts_problem("06", 6) is None, counts_problem("06", 7)
    (True, 'the counts of its RLE do not add up to the 7 pixels of the image')
    """
    counts: list[int] = []
    index = 0
    while index < len(text):
        value, shift, more = 0, 0, True
        while more:
            if index >= len(text) or not 0 <= (code := ord(text[index]) - 48) < 64 or shift > 12:
                return "the counts of its RLE are damaged"
            value |= (code & 31) << (5 * shift)
            more = bool(code & 32)
            index, shift = index + 1, shift + 1
            if not more and code & 16:
                value |= -1 << (5 * shift)
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    if any(count < 0 for count in counts) or sum(counts) != pixels:
        return f"the counts of its RLE do not add up to the {pixels} pixels of the image"
    return None


def annotation_from_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Make the geometry fields of a COCO annotation: `segmentation`, `bbox`, `area` and `iscrowd`.

    Args:
        mask: `(H, W) bool`.

    >>> annotation_from_mask(np.ones((2, 3), bool))["bbox"]
    [0.0, 0.0, 3.0, 2.0]
    """
    x1, y1, x2, y2 = masks_to_xyxy(mask[None])[0].tolist()
    return {"segmentation": encode_rle(mask), "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()), "iscrowd": 0}
