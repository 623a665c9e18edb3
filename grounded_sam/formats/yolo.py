"""Labels of other formats: of images as the COCO file that they would be, of videos as masklets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grounded_sam.errors import ConfigError
from grounded_sam.formats.coco import annotation_from_mask
from grounded_sam.media.files import natural_key, picture_files
from grounded_sam.media.images import no_pillow_limit, safe_formats


def from_yolo(about: Path) -> dict[str, Any]:
    """A YOLO dataset: polygons filled as OpenCV does it, which is how its trainers see them, or boxes.

    Images of all parts that `data.yaml` names are read, those of a part given as a list of folders too.
    """
    try:
        content = yaml.safe_load(about.read_text(encoding="utf-8"))
        names = content["names"]
        named = dict(enumerate(names)) if isinstance(names, list) else {int(k): str(v) for k, v in names.items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{about}: expected names and train, val or test, as YOLO's data.yaml has them") from error
    base = about.parent / str(content.get("path", ""))
    folders = [folder for part in ("train", "val", "test") for folder in _listed(content.get(part))]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for folder in dict.fromkeys(folders):
        root = (base / folder).resolve()
        files = picture_files(p for p in root.rglob("*") if p.is_file())
        for file in sorted(files, key=lambda p: natural_key(p.as_posix())):
            width, height = _size(file)
            # With the last folder, since parts of a dataset may have pictures of one name.
            images.append({"id": len(images), "file_name": file.relative_to(root.parent).as_posix()})
            images[-1] |= {"width": width, "height": height}
            labels = Path(*("labels" if part == "images" else part for part in root.parts)) / file.relative_to(root)
            for number, line in enumerate(_lines(labels.with_suffix(".txt")), 1):
                try:
                    numbers = [float(word) for word in line.split()]
                    one = _yolo_object(numbers[1:], width, height)
                except (ValueError, OverflowError) as error:
                    where = f"{labels.with_suffix('.txt')}, line {number}"
                    raise ConfigError(f"{where}: expected a class and a box or polygon, got {line[:80]!r}") from error
                annotations.append({"id": len(annotations) + 1, "image_id": images[-1]["id"], **one})
                annotations[-1]["category_id"] = int(numbers[0]) + 1
    categories = [{"id": number + 1, "name": name} for number, name in named.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _listed(value: Any) -> list[str]:
    return [] if value is None else [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()] if path.is_file() else []


def _size(file: Path) -> tuple[int, int]:
    """Width and height of a picture as it is shown, from its header."""
    from PIL import Image

    try:
        with no_pillow_limit(), Image.open(file, formats=safe_formats()) as picture:
            width, height = picture.size
            return (height, width) if picture.getexif().get(0x0112, 1) in (5, 6, 7, 8) else (width, height)
    except Exception as error:  # Pillow's plugins raise all sorts on damaged files
        raise ConfigError(f"{file}: the truth has a picture that cannot be read ({error})") from error


def _yolo_object(numbers: list[float], width: int, height: int) -> dict[str, Any]:
    import cv2

    if len(numbers) == 4:
        x, y, w, h = (v * side for v, side in zip(numbers, (width, height, width, height), strict=True))
        return {"bbox": [x - w / 2, y - h / 2, w, h], "area": w * h, "iscrowd": 0}
    canvas = np.zeros((height, width), np.uint8)
    points = np.array(numbers).reshape(-1, 2) * (width, height)
    cv2.fillPoly(canvas, [points.astype(np.int32)], 1)
    return annotation_from_mask(canvas.astype(bool))
