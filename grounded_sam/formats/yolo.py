"""Read YOLO datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.formats.coco import annotation_from_mask
from grounded_sam.formats.segmentations import cut_polygons, is_number
from grounded_sam.media.files import common_folder, image_files, natural_key, path_ends, read_path_list
from grounded_sam.media.images import MAX_PIXELS, displayed_size
from grounded_sam.structures.documents import is_text, read_yaml


def read_yolo(data_yaml: Path, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Read a YOLO dataset of boxes or polygons.

    Polygons are filled by OpenCV, which is how YOLO trainers see them. The images of all splits in `data.yaml` are
    read, also where a split is a list of folders, or a `.txt` file with the path of an image per line.

    Args:
        data_yaml: The `data.yaml` of the dataset.
        max_pixels: Larger images are refused.

    Returns:
        The labels as the content of a COCO file.

    Raises:
        ConfigError: If `data.yaml`, an image or a label cannot be read; the message names it.
    """
    config = read_yaml(data_yaml)
    try:
        names = config["names"]
        class_names = {int(k): str(v) for k, v in (enumerate(names) if isinstance(names, list) else names.items())}
        base = data_yaml.parent / str(config.get("path") or "").replace("\\", "/")
        folders = [folder for split in ("train", "val", "test") for folder in _as_list(config.get(split))]
        if not all(map(is_text, (str(base), *folders))):
            raise ValueError("a folder that is not text")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{data_yaml}: expected names and train, val or test, as in YOLO's data.yaml") from error
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    seen: set[Path] = set()
    for path in dict.fromkeys(_split_path(folder, base, data_yaml) for folder in folders):
        root, files = _split_images(path, base)
        for file in files:
            if file in seen:  # listed in two splits
                continue
            seen.add(file)
            height, width = _displayed_size(file, max_pixels)
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


def _split_images(path: Path, base: Path) -> tuple[Path, list[Path]]:
    """Return the images of a split, a folder or a list, and the folder that has all of them."""
    if path.is_dir():
        files = image_files(file for file in path.rglob("*") if file.is_file())
        return path, sorted(files, key=lambda file: natural_key(file.as_posix()))
    files = [file.resolve() for file in read_path_list(path, base)]
    return common_folder(files), files


def _split_path(name: str, base: Path, data_yaml: Path) -> Path:
    """Return the folder of a split, or the file that lists its images.

    Exports name it in many ways: relative to `path`, which may be on another machine, or with a `../` too many.

    Raises:
        ConfigError: If there is no such folder or file.
    """
    candidates = [folder / end for end in (name, *path_ends(name)[:1]) for folder in (base, data_yaml.parent)]
    is_list = name.lower().endswith(".txt")
    found = next((path for path in candidates if (path.is_file() if is_list else path.is_dir())), None)
    if found is None:
        kind = "file" if is_list else "folder"
        raise ConfigError(f"{data_yaml}: there is no {kind} {candidates[0]}; correct or remove {name} there")
    return found.resolve()


def _as_list(value: Any) -> list[str]:
    """Convert a value that may be missing or a single one to a list."""
    return [] if value is None else [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _displayed_size(file: Path, max_pixels: int) -> tuple[int, int]:
    """Return height and width of an image."""
    try:
        return displayed_size(file, max_pixels)
    except ImageError as error:
        raise ConfigError(f"an image of the ground truth cannot be used: {error}") from error


def _read_labels(path: Path, width: int, height: int) -> list[dict[str, Any]]:
    """Read the label file of an image of some size as COCO annotations; none if there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected lines of numbers in UTF-8, got other bytes ({error.reason})") from error
    annotations = []
    for number, line in enumerate((line for line in lines if line.strip()), 1):
        try:
            class_id, *coordinates = (float(word) for word in line.split())
            if not all(is_number(value) for value in (class_id, *coordinates)):
                raise ValueError("a number that is not finite")
            shape = _to_shape(coordinates, width, height)
            annotations.append({**shape, "category_id": int(class_id) + 1})
        except ValueError as error:
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
    points = np.array(coordinates).reshape(-1, 2) * (width, height)
    canvas = np.zeros((height, width), np.uint8)
    for polygon in cut_polygons([points.reshape(-1).tolist()], (height, width)):
        cv2.fillPoly(canvas, [np.array(polygon).reshape(-1, 2).astype(np.int32)], 1)
    return annotation_from_mask(canvas.astype(bool))
