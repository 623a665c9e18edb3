"""Labels of other formats: of images as the COCO file that they would be, of videos as masklets."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from grounded_sam.errors import ConfigError
from grounded_sam.formats.coco import annotation_from_mask
from grounded_sam.media.files import natural_key


def from_voc(folder: Path) -> dict[str, Any]:
    """Pascal VOC: boxes of the XML files, and the masks of `SegmentationObject` where they are there.

    Objects marked `difficult` become crowds, which cost nothing if missed or found, as VOC's own evaluation has it.
    """
    from PIL import Image

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    names: dict[str, int] = {}
    root = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    for path in sorted(root.rglob("*.xml"), key=lambda p: natural_key(p.as_posix())):
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
                    entry |= {**annotation_from_mask(pixels == number), "bbox": entry["bbox"]}
                entry["iscrowd"] = int(one.findtext("difficult", "0") or 0)
                about = {"id": len(annotations) + 1, "image_id": image["id"]}
                category = names.setdefault(one.findtext("name", ""), len(names) + 1)
                annotations.append({**about, "category_id": category, **entry})
        except (ElementTree.ParseError, ValueError, OSError) as error:
            raise ConfigError(f"{path}: not an annotation of Pascal VOC ({error})") from error
        images.append(image)
    categories = [{"id": number, "name": name} for name, number in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
