"""Labels of other formats: of images as the COCO file that they would be, of videos as masklets."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml

from grounded_sam.coco import CocoFile, read_json
from grounded_sam.errors import ConfigError
from grounded_sam.frames import no_pillow_limit, safe_formats
from grounded_sam.masklets import Masklets
from grounded_sam.sinks.coco import encode_mask
from grounded_sam.sources.images import natural, picture_files


def read_truth(given: str | Path) -> CocoFile | Masklets:
    """Labels: of images a COCO file, a YOLO `data.yaml` or its folder, or a folder of Pascal VOC; of videos a folder
    of DAVIS, SA-V's JSON or YouTube-VIS JSON.

    Raises:
        ConfigError: if it is none of these, or cannot be read.
    """
    path = Path(str(given)).expanduser()
    if not path.exists():
        raise ConfigError(f"truth={given}: no such file or folder")
    if path.is_file() and path.suffix.lower() == ".json":
        about = path.stat()
        return _from_json(path, about.st_mtime_ns, about.st_size)
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        return CocoFile(path, content=from_yolo(path), mixed=True)
    if (path / "data.yaml").is_file():
        return CocoFile(path, content=from_yolo(path / "data.yaml"), mixed=True)
    if next(path.rglob("*.xml"), None) is not None:
        return CocoFile(path, content=from_voc(path), mixed=True)
    if path.is_dir():
        return Masklets(path)
    raise ConfigError(
        f"truth={given}: expected a COCO file (.json), a YOLO dataset (data.yaml), a folder of Pascal VOC (.xml) or of "
        "DAVIS (.png), SA-V's JSON or YouTube-VIS JSON"
    )


@lru_cache(maxsize=1)  # the jobs of a sweep ask for the same
def _from_json(path: Path, changed: int, size: int) -> CocoFile | Masklets:
    content = read_json(path)
    videos = isinstance(content, dict) and ("masklet" in content or "videos" in content)
    return (
        Masklets(path, content) if videos and "images" not in content else CocoFile(path, content=content, mixed=True)
    )


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
        for file in sorted(files, key=lambda p: natural(p.as_posix())):
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
    return _of_mask(canvas.astype(bool))


def _of_mask(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    rle = encode_mask(mask)
    box = coco_mask.toBbox({**rle, "counts": rle["counts"].encode()}).tolist()
    return {"segmentation": rle, "bbox": box, "area": int(mask.sum()), "iscrowd": 0}


def from_voc(folder: Path) -> dict[str, Any]:
    """Pascal VOC: boxes of the XML files, and the masks of `SegmentationObject` where they are there.

    Objects marked `difficult` become crowds, which cost nothing if missed or found, as VOC's own evaluation has it.
    """
    from PIL import Image

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    names: dict[str, int] = {}
    root = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    for path in sorted(root.rglob("*.xml"), key=lambda p: natural(p.as_posix())):
        try:
            tree = ElementTree.parse(path)
            width, height = (int(tree.findtext(f"size/{key}", "")) for key in ("width", "height"))
            parts = [p for p in tree.findtext("folder", "").split("/") if p != "JPEGImages"]
            name = "/".join([*parts, tree.findtext("filename", "")]).lstrip("/")
            image = {"id": len(images), "file_name": name, "width": width, "height": height}
            masks = folder / "SegmentationObject" / path.relative_to(root).with_suffix(".png")
            pixels = np.array(Image.open(masks)) if masks.is_file() else None
            for number, one in enumerate(tree.iterfind("object"), 1):
                corners = [float(one.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
                x1, y1, x2, y2 = corners
                entry: dict[str, Any] = {"bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], "iscrowd": 0}
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]
                if pixels is not None and (pixels == number).any():
                    entry |= {**_of_mask(pixels == number), "bbox": entry["bbox"]}
                entry["iscrowd"] = int(one.findtext("difficult", "0") or 0)
                about = {"id": len(annotations) + 1, "image_id": image["id"]}
                category = names.setdefault(one.findtext("name", ""), len(names) + 1)
                annotations.append({**about, "category_id": category, **entry})
        except (ElementTree.ParseError, ValueError, OSError) as error:
            raise ConfigError(f"{path}: not an annotation of Pascal VOC ({error})") from error
        images.append(image)
    categories = [{"id": number, "name": name} for name, number in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
