"""Read YOLO datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grounded_sam.errors import ConfigError
from grounded_sam.formats.coco import annotation_from_mask
from grounded_sam.media.files import image_files, natural_key
from grounded_sam.media.images import no_pillow_limit, safe_formats

#: EXIF tag of the orientation, and its values that swap width and height.
_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)


def read_yolo(data_yaml: Path) -> dict[str, Any]:
    """Read a YOLO dataset of boxes or polygons.

    Polygons are filled by OpenCV, which is how YOLO trainers see them. The images of all splits in `data.yaml` are
    read, also where a split is a list of folders.

    Args:
        data_yaml: The `data.yaml` of the dataset.

    Returns:
        The labels as the content of a COCO file.

    Raises:
        ConfigError: If `data.yaml`, an image or a label cannot be read; the message names it.
    """
    try:
        config = yaml.safe_load(data_yaml.read_text(encoding="utf-8"))
        names = config["names"]
        class_names = dict(enumerate(names)) if isinstance(names, list) else {int(k): str(v) for k, v in names.items()}
        base = data_yaml.parent / str(config.get("path", ""))
        folders = [folder for split in ("train", "val", "test") for folder in _as_list(config.get(split))]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{data_yaml}: expected names and train, val or test, as in YOLO's data.yaml") from error
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for folder in dict.fromkeys(folders):
        root = (base / folder).resolve()
        files = image_files(path for path in root.rglob("*") if path.is_file())
        for file in sorted(files, key=lambda path: natural_key(path.as_posix())):
            width, height = _image_size(file)
            image_id = len(images)
            # The name includes the last folder, since images of different splits may have the same name.
            name = file.relative_to(root.parent).as_posix()
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            label_file = _label_file(file)
            for label in _read_labels(label_file, width, height):
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **label})
    categories = [{"id": number + 1, "name": name} for number, name in class_names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _label_file(image: Path) -> Path:
    """Return the label file of an image, as YOLO trainers find it: the last folder `images` becomes `labels`."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _as_list(value: Any) -> list[str]:
    """Convert a value that may be missing or a single one to a list."""
    return [] if value is None else [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _image_size(file: Path) -> tuple[int, int]:
    """Read width and height of an image as displayed, from its header."""
    from PIL import Image

    try:
        with no_pillow_limit(), Image.open(file, formats=safe_formats()) as picture:
            width, height = picture.size
            return (height, width) if picture.getexif().get(_ORIENTATION, 1) in _TRANSPOSED else (width, height)
    except Exception as error:  # Pillow's plugins raise many kinds of error on damaged files
        raise ConfigError(f"{file}: cannot read this image of the ground truth ({error})") from error


def _read_labels(path: Path, width: int, height: int) -> list[dict[str, Any]]:
    """Read the label file of an image of some size as COCO annotations; none if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    annotations = []
    for number, line in enumerate((line for line in lines if line.strip()), 1):
        try:
            class_id, *coordinates = (float(word) for word in line.split())
            shape = _to_shape(coordinates, width, height)
            annotations.append({**shape, "category_id": int(class_id) + 1})
        except (ValueError, OverflowError) as error:
            raise ConfigError(
                f"{path}, line {number}: expected a class and a box or polygon, got {line[:80]!r}"
            ) from error
    return annotations


def _to_shape(coordinates: Sequence[float], width: int, height: int) -> dict[str, Any]:
    """Convert a box (x and y of the center, width, height) or a polygon, 0 to 1, to the shape of a COCO annotation."""
    import cv2

    if len(coordinates) == 4:
        x, y, w, h = (v * side for v, side in zip(coordinates, (width, height, width, height), strict=True))
        return {"bbox": [x - w / 2, y - h / 2, w, h], "area": w * h, "iscrowd": 0}
    canvas = np.zeros((height, width), np.uint8)
    points = np.array(coordinates).reshape(-1, 2) * (width, height)
    cv2.fillPoly(canvas, [points.astype(np.int32)], 1)
    return annotation_from_mask(canvas.astype(bool))
