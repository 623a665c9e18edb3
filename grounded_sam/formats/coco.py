"""COCO instances files, read with every entry looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.masks import encode_rle, unpack_masks
from grounded_sam.structures.results import Skipped
from grounded_sam.structures.vocabulary import Vocabulary


class CocoFile:
    """A COCO instances file: images, and for each the annotations that can be used.

    An annotation that is not sound (of no image or category, a box that is not finite, a mask of another
    size, a polygon of fewer than three points, an id that was there before) is left out and noted; one that
    reaches outside its image is cut to it and noted.

    Args:
        path: the file.
        dataset: for a list of results, which has no images and categories: the file that it is about.
        content: what the file would hold, for labels of another format.
        mixed: keep labels that have no mask where others have one, and then take the boxes of all.

    Attributes:
        vocabulary: the categories in the file's order, with their ids.
        images: the entries of `images`.
        notes: what was left out or changed, and why.

    Raises:
        ConfigError: if the file cannot be read, is no JSON, or has no images or categories.
    """

    def __init__(self, path: Path, dataset: Path | None = None, content: Any = None, mixed: bool = False) -> None:
        self.path = path
        content = read_json(path) if content is None else content
        if isinstance(content, list) and dataset is not None:
            whole = read_json(dataset)
            keys = ("images", "categories")
            content = {**{key: whole.get(key) for key in keys}, "annotations": content}
        if not isinstance(content, Mapping):
            raise ConfigError(
                f"{path}: expected an object with images, annotations and categories, got a list; of results "
                "source.dataset says which file they are about"
            )
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                raise ConfigError(f"{path}: expected a list under {key!r}, got {type(content.get(key)).__name__}")
        if not content["images"]:
            raise ConfigError(f"{path} has no images")
        self.vocabulary = Vocabulary.of_categories(content["categories"], str(path))
        self._class_id = {number: i for i, number in enumerate(self.vocabulary.category_ids)}
        self.images: list[dict[str, Any]] = []
        self._by_image: dict[Any, list[dict[str, Any]]] = {}
        self._packed: dict[Any, sv.Detections] = {}
        for given in content["images"]:
            sound = isinstance(given, Mapping) and all(
                isinstance(given.get(key), kind) for key, kind in (("file_name", str), ("width", int), ("height", int))
            )
            if (
                not sound
                or not given["file_name"]
                or not isinstance(given.get("id"), int | str)
                or min(given["width"], given["height"]) < 1
            ):
                raise ConfigError(f"{path}: an image needs id, file_name, width and height, got {given!r}")
            image = {**given, "id": _id(given["id"])}
            if image["id"] in self._by_image:
                raise ConfigError(f"{path}: two images have the id {image['id']}")
            self.images.append(image)
            self._by_image[image["id"]] = []
        self.notes: list[Skipped] = []
        self.masks = any(isinstance(a, Mapping) and a.get("segmentation") for a in content["annotations"])
        bare = [a for a in content["annotations"] if isinstance(a, Mapping) and not a.get("segmentation")]
        if mixed and self.masks and bare:
            self.masks = False
            why = f"{len(bare)} of {len(content['annotations'])} labels have no mask, so boxes alone are used"
            self.notes.append(Skipped(str(path), why))
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}
        seen: set[Any] = set()
        for number, given in enumerate(content["annotations"]):
            annotation = given
            if isinstance(given, Mapping) and "image_id" in given:
                annotation = {**given, "image_id": _id(given["image_id"])}
            reason = self._wrong(annotation, sizes, seen)
            if reason is not None:
                name = (
                    annotation.get("id", f"number {number}") if isinstance(annotation, Mapping) else f"number {number}"
                )
                self.notes.append(Skipped(f"annotation {name}", reason))
            if reason is None or reason.endswith("used"):
                self._by_image[annotation["image_id"]].append(annotation)

    def _wrong(self, annotation: Any, sizes: dict[Any, tuple[int, int]], seen: set[Any]) -> str | None:
        """What is wrong with an annotation; it ends in `used` if it can be used all the same."""
        if not isinstance(annotation, Mapping):
            return f"expected an object, got {annotation!r}"
        if isinstance(annotation.get("image_id"), list | dict) or annotation.get("image_id") not in sizes:
            return f"there is no image {annotation.get('image_id')!r}"
        category = annotation.get("category_id")
        if isinstance(category, list | dict) or category not in self._class_id:
            known = ", ".join(map(str, self._class_id))
            return f"there is no category {annotation.get('category_id')!r}; the ids are {known}"
        for key, least, most in (("score", 0, 1), ("mask_score", -math.inf, math.inf), ("track_id", 0, math.inf)):
            value = annotation.get(key)
            if value is not None and not (_finite(value) and least <= value <= most):
                span = " from 0 to 1" if most == 1 else ""
                return f"{key} must be a finite number{span}, got {value!r}"
        number = annotation.get("id")
        if number is not None and not isinstance(number, int | str):
            return f"the id must be a number, got {number!r}"
        if number is not None and number in seen:
            return f"another annotation has the id {number} too"
        seen.add(number)
        height, width = sizes[annotation["image_id"]]
        segmentation = annotation.get("segmentation")
        if segmentation:
            reason = wrong_segmentation(segmentation, (height, width))
            if reason is not None:
                return reason
        elif self.masks:
            return "no mask, where others of the file have one"
        box = annotation.get("bbox")
        if box is None and not segmentation:
            return "neither bbox nor segmentation"
        if box is not None:
            if not isinstance(box, Sequence) or len(box) != 4 or not all(_finite(v) for v in box):
                return f"bbox must be four finite numbers, got {box!r}"
            x, y, w, h = box
            if w <= 0 or h <= 0 or x >= width or y >= height or x + w <= 0 or y + h <= 0:
                return f"nothing of the bbox {box!r} is inside the {width}x{height} px image"
            if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
                return f"the bbox {box!r} reaches outside the {width}x{height} px image; what is inside is used"
        if segmentation == []:
            return "the segmentation is empty; its box is used"
        return None

    def annotations(self, image_id: Any) -> list[dict[str, Any]]:
        """The sound annotations of an image, as the file has them."""
        return self._by_image[image_id]

    def detections(self, image: Mapping[str, Any]) -> sv.Detections:
        """The annotations of an image as detections; `score` is 1 where none is given.

        `data["iscrowd"]` and `data["ignore"]` (crowds as well) are bool.
        """
        return unpack_masks(self._detections(image), (image["height"], image["width"]))

    def packed(self, image: Mapping[str, Any]) -> sv.Detections:
        """The same with masks as RLE, see `detections.packed`; made once."""
        if image["id"] not in self._packed:
            self._packed[image["id"]] = self._detections(image)
        return self._packed[image["id"]]

    def _detections(self, image: Mapping[str, Any]) -> sv.Detections:
        annotations, size_hw = self._by_image[image["id"]], (image["height"], image["width"])
        if not annotations:
            return empty_detections(self.vocabulary)
        boxes = [to_xyxy(a["bbox"]) if a.get("bbox") else (0.0, 0.0, 0.0, 0.0) for a in annotations]
        masks = None
        if self.masks:
            from pycocotools import mask as coco_mask

            masks = [encoded_segmentation(a["segmentation"], size_hw) for a in annotations]
            around = coco_mask.toBbox(masks)
            boxes = [b if a.get("bbox") else to_xyxy(m) for a, b, m in zip(annotations, boxes, around, strict=True)]
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations])
        ignore = crowd | np.array([bool(a.get("ignore", 0)) for a in annotations])
        data: dict[str, Any] = {"iscrowd": crowd, "ignore": ignore}
        if all(a.get("mask_score") is not None for a in annotations):
            data["mask_score"] = np.array([a["mask_score"] for a in annotations], np.float32)
        if masks is not None:
            data["rle"] = np.empty(len(masks), object)
            data["rle"][:] = masks
        found = make_detections(
            boxes,
            [1.0 if a.get("score") is None else a["score"] for a in annotations],
            [self._class_id[a["category_id"]] for a in annotations],
            self.vocabulary,
            size_hw,
            track_id=np.array([-1 if a.get("track_id") is None else a["track_id"] for a in annotations], np.int64),
            **data,
        )
        ids = found.data.pop("track_id")
        if image.get("video") is not None and (np.asarray(ids) >= 0).all():
            found.tracker_id = np.asarray(ids)
        return found


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: if it cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def _id(value: Any) -> Any:
    """An id, as a number also where a file has it as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def to_xyxy(box: Sequence[float]) -> tuple[float, float, float, float]:
    """COCO's x, y, width, height to corners."""
    x, y, w, h = (float(v) for v in box)
    return x, y, x + w, y + h


def decode_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """A COCO segmentation (polygons, compressed or uncompressed RLE) as a mask `(H, W) bool`, by pycocotools."""
    from pycocotools import mask as coco_mask

    return np.asarray(coco_mask.decode(encoded_segmentation(segmentation, size_hw)), bool)


def encoded_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> dict[str, Any]:
    """A COCO segmentation as compressed RLE, with `counts` as bytes as pycocotools has them."""
    from pycocotools import mask as coco_mask

    height, width = size_hw
    if isinstance(segmentation, list):
        return dict(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return dict(coco_mask.frPyObjects(segmentation, height, width))
    return {"size": segmentation["size"], "counts": segmentation["counts"].encode()}


def wrong_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> str | None:
    """Why a segmentation cannot be decoded; pycocotools would crash or read beyond its end."""
    height, width = size_hw
    if isinstance(segmentation, Mapping):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            return f"its RLE is of size {size}, the image of [{height}, {width}]"
        if isinstance(counts, list):
            if not all(isinstance(v, int) and v >= 0 for v in counts) or sum(counts) != height * width:
                return f"the counts of its RLE do not add up to the {height * width} pixels of the image"
        elif not isinstance(counts, str) or not counts:
            return "its RLE has no counts"
        else:
            return _wrong_counts(counts, height * width)
        return None
    if not isinstance(segmentation, list):
        return f"the segmentation must be polygons or RLE, got {type(segmentation).__name__}"
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "a polygon needs at least three points (six numbers)"
        if not all(_finite(v) for v in polygon):
            return "a polygon has a coordinate that is no finite number"
    return None


def _wrong_counts(text: str, pixels: int) -> str | None:
    """Why compressed counts are not of that many pixels; as `rleFrString` of COCO's maskApi.c reads them."""
    counts: list[int] = []
    place = 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            if place >= len(text) or not 0 <= (code := ord(text[place]) - 48) < 64 or shift > 12:
                return "the counts of its RLE are damaged"
            value |= (code & 31) << (5 * shift)
            more = bool(code & 32)
            place, shift = place + 1, shift + 1
            if not more and code & 16:
                value |= -1 << (5 * shift)
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    if any(count < 0 for count in counts) or sum(counts) != pixels:
        return f"the counts of its RLE do not add up to the {pixels} pixels of the image"
    return None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def annotation_from_mask(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    rle = encode_rle(mask)
    box = coco_mask.toBbox({**rle, "counts": rle["counts"].encode()}).tolist()
    return {"segmentation": rle, "bbox": box, "area": int(mask.sum()), "iscrowd": 0}
