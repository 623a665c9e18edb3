"""Read Pascal VOC datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.files import require_regular
from grounded_sam.formats.coco import annotation_from_mask
from grounded_sam.media.files import natural_key
from grounded_sam.media.images import MAX_PIXELS, read_label_map


def read_voc(folder: Path, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Read a Pascal VOC dataset: the boxes of its XML files, and masks from `SegmentationObject` where there are some.

    Objects marked `difficult` become crowds: as in VOC's own evaluation, they count neither when missed nor when found.

    Args:
        folder: Folder of the dataset, with its XML files directly in it or in `Annotations`.
        max_pixels: Larger masks are refused.

    Returns:
        The labels as the content of a COCO file.

    Raises:
        ConfigError: If an XML file or a mask cannot be read; the message names it.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    category_ids: dict[str, int] = {}
    root = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    for path in sorted(root.rglob("*.xml"), key=lambda path: natural_key(path.as_posix())):
        try:
            require_regular(path)
            tree = ElementTree.parse(path)
            image = _read_image(tree, len(images))
            map_file = folder / "SegmentationObject" / path.relative_to(root).with_suffix(".png")
            instances = read_label_map(map_file, max_pixels) if map_file.is_file() else None
            for number, element in enumerate(tree.iterfind("object"), 1):
                category_id = category_ids.setdefault(element.findtext("name", ""), len(category_ids) + 1)
                annotation = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category_id}
                mask = None if instances is None else instances == number
                annotations.append(annotation | _read_object(element, mask))
        except ImageError as error:
            raise ConfigError(str(error)) from error
        except (ElementTree.ParseError, ValueError, OverflowError, LookupError, OSError) as error:
            raise ConfigError(f"{path}: not a Pascal VOC annotation ({' '.join(str(error).split())})") from error
        images.append(image)
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _read_image(tree: ElementTree.ElementTree[Any], image_id: int) -> dict[str, Any]:
    """Read the entry of an image."""
    width, height = (int(tree.findtext(f"size/{key}", "")) for key in ("width", "height"))
    folders = [part for part in tree.findtext("folder", "").split("/") if part != "JPEGImages"]
    name = "/".join([*folders, tree.findtext("filename", "")]).lstrip("/")
    return {"id": image_id, "file_name": name, "width": width, "height": height}


def _read_object(element: ElementTree.Element, mask: NDArray[np.bool_] | None) -> dict[str, Any]:
    """Read the shape of an object, whose box has pixel numbers from 1, both ends included."""
    x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
    width, height = x2 - x1 + 1, y2 - y1 + 1
    shape: dict[str, Any] = {"area": width * height}
    if mask is not None and mask.any():
        shape = annotation_from_mask(mask)
    difficult = int(element.findtext("difficult", "0") or 0)
    return {**shape, "bbox": [x1 - 1, y1 - 1, width, height], "iscrowd": difficult}
