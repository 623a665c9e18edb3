"""What independent readers make of the exports: images, objects, classes, and IoU of masks with the store's.

    grounded-sam preset=[shapes,label] input=FOLDER text=... output=OUT 'split={train: 0.8, val: 0.2}' \\
        'sink=[store,coco,yolo,voc,labelme,label_studio,cvat,imagefolder]'
    python benchmarks/exports.py OUT

Needs pycocotools, pyarrow and lxml, and of the readers what is there: supervision, ultralytics, labelme,
label-studio-sdk, datasets. An environment of their own is best: they pin what others need newer, and ultralytics
is under the AGPL.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
from lxml import etree
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).parents[1]))
from grounded_sam.files import UniqueNames

#: What a reader gives of an image: its name in the store, and for each object class and mask (or None).
Read = Iterator[tuple[str, list[tuple[str, Any]]]]


def from_polygons(polygons: list[list[float]], size_hw: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size_hw))).astype(bool)


def from_rle(size: list[int], counts: str) -> np.ndarray:
    return coco_mask.decode({"size": size, "counts": counts.encode()}).astype(bool)


class Truth:
    """The images of the store, and the stems that datasets give them."""

    def __init__(self, output: Path) -> None:
        rows = [row for part in sorted(output.glob("store/part-*")) for row in pq.read_table(part).to_pylist()]
        self.images = {row["file"]: row for row in rows if row["kind"] == "image"}
        self.objects: dict[str, list[dict]] = {name: [] for name in self.images}
        for row in rows:
            if row["kind"] == "object":
                self.objects[row["file"]].append(row)
        names, self.file = UniqueNames(), {}
        for file, row in self.images.items():
            path = Path(file)
            frame = row["video"] is not None and path.suffix[1:].isdecimal()
            self.file[names(file if frame else path.with_suffix("").as_posix(), "").as_posix()] = file

    def size_hw(self, file: str) -> tuple[int, int]:
        return self.images[file]["height"], self.images[file]["width"]

    def masks(self, file: str) -> list[np.ndarray]:
        return [from_rle([o["height"], o["width"]], o["counts"]) for o in self.objects[file]]


def coco(output: Path, truth: Truth) -> Read:
    from pycocotools.coco import COCO

    for path in sorted(output.glob("annotations*.json")):
        with contextlib.redirect_stdout(io.StringIO()):
            data = COCO(str(path))
        for number, image in data.imgs.items():
            found = data.loadAnns(data.getAnnIds(imgIds=number))
            yield (
                image["file_name"],
                [(data.cats[a["category_id"]]["name"], data.annToMask(a).astype(bool)) for a in found],
            )


def yolo_by_supervision(output: Path, truth: Truth) -> Read:
    import supervision as sv

    root = output / "yolo"
    for part in sorted((root / "images").iterdir()):
        for folder in sorted({p.parent for p in part.rglob("*") if p.is_file()}):  # it reads one folder at a time
            labels = root / "labels" / part.name / folder.relative_to(part)
            data = sv.DetectionDataset.from_yolo(str(folder), str(labels), str(root / "data.yaml"), force_masks=True)
            for path, _, found in data:
                stem = Path(path).relative_to(part).with_suffix("").as_posix()
                masks = found.mask if found.mask is not None else []
                yield truth.file[stem], [(data.classes[c], m) for c, m in zip(found.class_id, masks, strict=True)]


def yolo_by_ultralytics(output: Path, truth: Truth) -> Read:
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset, polygons2masks

    data = check_det_dataset(str((output / "yolo" / "data.yaml").resolve()))
    for part in sorted({data["train"], data["val"]}):
        for label in YOLODataset(img_path=part, data=data, task="segment", augment=False).labels:
            file = truth.file[Path(label["im_file"]).relative_to(part).with_suffix("").as_posix()]
            height, width = truth.size_hw(file)
            polygons = [(segment * (width, height)).reshape(-1) for segment in label["segments"]]
            masks = [polygons2masks((height, width), [polygon], 1, 1)[0].astype(bool) for polygon in polygons]
            classes = [data["names"][int(c)] for c in label["cls"].reshape(-1)]
            yield file, list(zip(classes, masks, strict=True))


def voc_by_lxml(output: Path, truth: Truth) -> Read:
    from PIL import Image

    root = output / "voc"
    for path in (root / "Annotations").rglob("*.xml"):
        tree, stem = etree.parse(str(path)), path.relative_to(root / "Annotations").with_suffix("").as_posix()
        file = truth.file[stem]
        assert (root / tree.findtext("folder") / tree.findtext("filename")).exists(), path
        objects = []
        for i, one in enumerate(tree.findall("object")):
            place = [int(one.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
            box = [truth.objects[file][i][key] for key in ("x1", "y1", "x2", "y2")]
            assert np.abs(np.array(place) - (1, 1, 0, 0) - box).max() < 1, path
            pixels = np.array(Image.open(root / "SegmentationObject" / f"{stem}.png"))
            objects.append((one.findtext("name"), pixels == i + 1))
        yield file, objects


def voc_by_supervision(output: Path, truth: Truth) -> Read:
    import supervision as sv

    root = output / "voc"
    for folder in sorted({p.parent for p in (root / "Annotations").rglob("*.xml")}):
        pictures = root / "JPEGImages" / folder.relative_to(root / "Annotations")
        data = sv.DetectionDataset.from_pascal_voc(str(pictures), str(folder))
        for path, _, found in data:
            stem = Path(path).relative_to(root / "JPEGImages").with_suffix("").as_posix()
            yield truth.file[stem], [(data.classes[c], None) for c in found.class_id]


def labelme(output: Path, truth: Truth) -> Read:
    from labelme.utils import shape_to_mask

    root = output / "labelme"
    splits = {p.name for p in root.iterdir() if p.is_dir()} & {"train", "val", "test"}
    for path in root.rglob("*.json"):
        content, place = json.loads(path.read_text()), path.relative_to(root)
        if place.parts[0] in splits:
            place = place.relative_to(place.parts[0])
        size_hw = content["imageHeight"], content["imageWidth"]
        assert (path.parent / content["imagePath"]).exists(), path
        objects: dict[Any, tuple[str, np.ndarray]] = {}
        for i, shape in enumerate(content["shapes"]):
            key = ("alone", i) if shape["group_id"] is None else shape["group_id"]
            mask = shape_to_mask(size_hw, shape["points"], shape["shape_type"])
            objects[key] = (shape["label"], mask | objects[key][1] if key in objects else mask)
        yield truth.file[place.with_suffix("").as_posix()], list(objects.values())


def label_studio(output: Path, truth: Truth) -> Read:
    from label_studio_sdk.converter import Converter
    from label_studio_sdk.label_interface import LabelInterface

    root = output / "label_studio"
    tasks, config = json.loads((root / "tasks.json").read_text()), (root / "config.xml").read_text()
    interface = LabelInterface(config)
    interface.validate()
    wrong = [interface.validate_prediction(p, return_errors=True) for t in tasks for p in t["predictions"]]
    print(
        f"  label-studio-sdk's validate_prediction: {len(wrong)} predictions, {sum(map(bool, wrong))} with a complaint"
    )
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as place:
        export = [
            {"id": i, "data": t["data"], "annotations": [{"id": i, "result": t["predictions"][0]["result"]}]}
            for i, t in enumerate(tasks)
        ]
        Path(place, "tasks.json").write_text(json.dumps(export))
        converter = Converter(config=config, project_dir=place, download_resources=False)
        converter.convert_to_coco(f"{place}/tasks.json", f"{place}/out", is_dir=False)
        result = json.loads(Path(place, "out", "result.json").read_text())
    names = {category["id"]: category["name"] for category in result["categories"]}
    by_url = {unquote(t["data"]["image"].split("?d=")[1]): t["data"]["file"] for t in tasks}
    found: dict[int, list] = {image["id"]: [] for image in result["images"]}
    for annotation in result["annotations"]:
        found[annotation["image_id"]].append(annotation)
    for image in result["images"]:
        file = by_url[unquote(image["file_name"].split("?d=")[-1])]
        size_hw = truth.size_hw(file)
        yield (
            file,
            [(names[a["category_id"]], from_polygons(a["segmentation"], size_hw)) for a in found[image["id"]]],
        )


def cvat(output: Path, truth: Truth) -> Read:
    for image in etree.parse(str(output / "cvat.xml")).findall("image"):
        objects = []
        for one in image.findall("mask"):
            runs = [int(run) for run in one.get("rle").split(",")]
            left, top, width, height = (int(one.get(key)) for key in ("left", "top", "width", "height"))
            mask = np.zeros((int(image.get("height")), int(image.get("width"))), bool)
            inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(height, width)
            mask[top : top + height, left : left + width] = inside
            objects.append((one.get("label"), mask))
        yield image.get("name"), objects


def imagefolder(output: Path, truth: Truth) -> Read:
    from datasets import load_dataset

    with tempfile.TemporaryDirectory() as place:
        data = load_dataset("imagefolder", data_dir=str(output / "imagefolder"), cache_dir=place)
        for part in data.values():
            for row in part:
                assert row["image"].size[::-1] == truth.size_hw(row["file"])
                masks = [from_rle(rle["size"], rle["counts"]) for rle in row["objects"]["segmentation"]]
                yield row["file"], list(zip(row["objects"]["name"], masks, strict=True))


READERS: dict[str, Callable[[Path, Truth], Read]] = {
    "COCO, pycocotools": coco,
    "YOLO, supervision": yolo_by_supervision,
    "YOLO, ultralytics": yolo_by_ultralytics,
    "VOC, lxml": voc_by_lxml,
    "VOC, supervision": voc_by_supervision,
    "LabelMe, labelme": labelme,
    "Label Studio, its COCO": label_studio,
    "CVAT, lxml": cvat,
    "imagefolder, datasets": imagefolder,
}


def main() -> None:
    output = Path(sys.argv[1])
    truth = Truth(output)
    classes = Counter(o["class"] for objects in truth.objects.values() for o in objects)
    print(f"the store: {len(truth.images)} images, {sum(classes.values())} objects, {dict(classes)}")
    for name, reader in READERS.items():
        images, found, ious = 0, Counter(), []
        try:
            for file, objects in reader(output, truth):
                images += 1
                found.update(cls for cls, _ in objects)
                masks = truth.masks(file)
                if len(masks) != len(objects):
                    print(f"  {name}: {file} has {len(objects)} objects, the store {len(masks)}")
                pairs = [(m, t) for (_, m), t in zip(objects, masks, strict=False) if m is not None]
                ious += [(m & t).sum() / max((m | t).sum(), 1) for m, t in pairs]
        except ImportError as error:
            print(f"{name:24} not read: {error}")
            continue
        iou = f", IoU of masks {np.mean(ious):.4f} (least {np.min(ious):.4f})" if ious else ""
        same = "the same classes" if found == classes else f"other classes: {dict(found)}"
        print(f"{name:24} {images} images, {sum(found.values())} objects, {same}{iou}")


if __name__ == "__main__":
    main()
