"""Read the exports with independent libraries and compare images, objects, classes and masks with the store.

    grounded-sam preset=[shapes,label] input=FOLDER text=... output=OUT 'split={train: 0.8, val: 0.2}' \\
        'sink=[store,coco,yolo,voc,labelme,label_studio,cvat,imagefolder]'
    python benchmarks/exports.py OUT

Requires pycocotools, pyarrow and lxml. Readers that are not installed are left out: supervision, ultralytics, labelme,
label-studio-sdk and datasets. A separate environment is best for them: they pin versions that others need newer, and
ultralytics is under the AGPL.
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

#: What a reader yields per image: its name in the store, and the class and the mask (or None) of each object.
ReadImages = Iterator[tuple[str, list[tuple[str, Any]]]]


def polygons_to_mask(polygons: list[list[float]], size_hw: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size_hw))).astype(bool)


def rle_to_mask(size: list[int], counts: str) -> np.ndarray:
    return coco_mask.decode({"size": size, "counts": counts.encode()}).astype(bool)


class StoredResults:
    """Results in the store.

    Args:
        output: Folder of the run.

    Attributes:
        images: Row of each image, by its name.
        objects: Rows of the objects in each image, by its name.
        file_of_stem: Name of the image by the stem that exported datasets give it.
    """

    def __init__(self, output: Path) -> None:
        rows = [row for part in sorted(output.glob("store/part-*")) for row in pq.read_table(part).to_pylist()]
        self.images = {row["file"]: row for row in rows if row["kind"] == "image"}
        self.objects: dict[str, list[dict]] = {name: [] for name in self.images}
        for row in rows:
            if row["kind"] == "object":
                self.objects[row["file"]].append(row)
        names, self.file_of_stem = UniqueNames(), {}
        for file, row in self.images.items():
            path = Path(file)
            is_frame = row["video"] is not None and path.suffix[1:].isdecimal()
            self.file_of_stem[names(file if is_frame else path.with_suffix("").as_posix(), "").as_posix()] = file

    def size_hw(self, file: str) -> tuple[int, int]:
        return self.images[file]["height"], self.images[file]["width"]

    def masks(self, file: str) -> list[np.ndarray]:
        return [rle_to_mask([o["height"], o["width"]], o["counts"]) for o in self.objects[file]]


def read_coco(output: Path, stored: StoredResults) -> ReadImages:
    from pycocotools.coco import COCO

    for path in sorted(output.glob("annotations*.json")):
        with contextlib.redirect_stdout(io.StringIO()):
            data = COCO(str(path))
        for image_id, image in data.imgs.items():
            annotations = data.loadAnns(data.getAnnIds(imgIds=image_id))
            objects = [(data.cats[a["category_id"]]["name"], data.annToMask(a).astype(bool)) for a in annotations]
            yield image["file_name"], objects


def read_yolo_with_supervision(output: Path, stored: StoredResults) -> ReadImages:
    import supervision as sv

    root = output / "yolo"
    for split in sorted((root / "images").iterdir()):
        for folder in sorted({p.parent for p in split.rglob("*") if p.is_file()}):  # it reads one folder at a time
            labels = root / "labels" / split.name / folder.relative_to(split)
            data = sv.DetectionDataset.from_yolo(str(folder), str(labels), str(root / "data.yaml"), force_masks=True)
            for path, _, detections in data:
                stem = Path(path).relative_to(split).with_suffix("").as_posix()
                names = [data.classes[class_id] for class_id in detections.class_id]
                masks = detections.mask if detections.mask is not None else []
                yield stored.file_of_stem[stem], list(zip(names, masks, strict=True))


def read_yolo_with_ultralytics(output: Path, stored: StoredResults) -> ReadImages:
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset, polygons2masks

    data = check_det_dataset(str((output / "yolo" / "data.yaml").resolve()))
    for split in sorted({data["train"], data["val"]}):
        for label in YOLODataset(img_path=split, data=data, task="segment", augment=False).labels:
            file = stored.file_of_stem[Path(label["im_file"]).relative_to(split).with_suffix("").as_posix()]
            height, width = stored.size_hw(file)
            polygons = [(segment * (width, height)).reshape(-1) for segment in label["segments"]]
            masks = [polygons2masks((height, width), [polygon], 1, 1)[0].astype(bool) for polygon in polygons]
            classes = [data["names"][int(c)] for c in label["cls"].reshape(-1)]
            yield file, list(zip(classes, masks, strict=True))


def read_voc_with_lxml(output: Path, stored: StoredResults) -> ReadImages:
    from PIL import Image

    root = output / "voc"
    for path in (root / "Annotations").rglob("*.xml"):
        tree, stem = etree.parse(str(path)), path.relative_to(root / "Annotations").with_suffix("").as_posix()
        file = stored.file_of_stem[stem]
        assert (root / tree.findtext("folder") / tree.findtext("filename")).exists(), path
        objects = []
        for i, element in enumerate(tree.findall("object")):
            voc_box = [int(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
            box = [stored.objects[file][i][key] for key in ("x1", "y1", "x2", "y2")]
            assert np.abs(np.array(voc_box) - (1, 1, 0, 0) - box).max() < 1, path  # VOC counts pixels from 1
            pixels = np.array(Image.open(root / "SegmentationObject" / f"{stem}.png"))
            objects.append((element.findtext("name"), pixels == i + 1))
        yield file, objects


def read_voc_with_supervision(output: Path, stored: StoredResults) -> ReadImages:
    import supervision as sv

    root = output / "voc"
    for folder in sorted({p.parent for p in (root / "Annotations").rglob("*.xml")}):
        images = root / "JPEGImages" / folder.relative_to(root / "Annotations")
        data = sv.DetectionDataset.from_pascal_voc(str(images), str(folder))
        for path, _, detections in data:
            stem = Path(path).relative_to(root / "JPEGImages").with_suffix("").as_posix()
            yield stored.file_of_stem[stem], [(data.classes[class_id], None) for class_id in detections.class_id]


def read_labelme(output: Path, stored: StoredResults) -> ReadImages:
    from labelme.utils import shape_to_mask

    root = output / "labelme"
    splits = {p.name for p in root.iterdir() if p.is_dir()} & {"train", "val", "test"}
    for path in root.rglob("*.json"):
        content, relative = json.loads(path.read_text()), path.relative_to(root)
        if relative.parts[0] in splits:
            relative = relative.relative_to(relative.parts[0])
        size_hw = content["imageHeight"], content["imageWidth"]
        assert (path.parent / content["imagePath"]).exists(), path
        objects: dict[Any, tuple[str, np.ndarray]] = {}
        for i, shape in enumerate(content["shapes"]):
            key = ("ungrouped", i) if shape["group_id"] is None else shape["group_id"]
            mask = shape_to_mask(size_hw, shape["points"], shape["shape_type"])
            objects[key] = (shape["label"], mask | objects[key][1] if key in objects else mask)
        yield stored.file_of_stem[relative.with_suffix("").as_posix()], list(objects.values())


def read_label_studio(output: Path, stored: StoredResults) -> ReadImages:
    from label_studio_sdk.converter import Converter
    from label_studio_sdk.label_interface import LabelInterface

    root = output / "label_studio"
    tasks, config = json.loads((root / "tasks.json").read_text()), (root / "config.xml").read_text()
    interface = LabelInterface(config)
    interface.validate()
    errors = [interface.validate_prediction(p, return_errors=True) for t in tasks for p in t["predictions"]]
    print(f"  label-studio-sdk's validate_prediction: {len(errors)} predictions, {sum(map(bool, errors))} with errors")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        export = [
            {"id": i, "data": t["data"], "annotations": [{"id": i, "result": t["predictions"][0]["result"]}]}
            for i, t in enumerate(tasks)
        ]
        Path(folder, "tasks.json").write_text(json.dumps(export))
        converter = Converter(config=config, project_dir=folder, download_resources=False)
        converter.convert_to_coco(f"{folder}/tasks.json", f"{folder}/out", is_dir=False)
        result = json.loads(Path(folder, "out", "result.json").read_text())
    names = {category["id"]: category["name"] for category in result["categories"]}
    by_url = {unquote(t["data"]["image"].split("?d=")[1]): t["data"]["file"] for t in tasks}
    annotations: dict[int, list] = {image["id"]: [] for image in result["images"]}
    for annotation in result["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    for image in result["images"]:
        file = by_url[unquote(image["file_name"].split("?d=")[-1])]
        size_hw = stored.size_hw(file)
        objects = [
            (names[a["category_id"]], polygons_to_mask(a["segmentation"], size_hw)) for a in annotations[image["id"]]
        ]
        yield file, objects


def read_cvat(output: Path, stored: StoredResults) -> ReadImages:
    for image in etree.parse(str(output / "cvat.xml")).findall("image"):
        objects = []
        for element in image.findall("mask"):
            runs = [int(run) for run in element.get("rle").split(",")]
            left, top, width, height = (int(element.get(key)) for key in ("left", "top", "width", "height"))
            mask = np.zeros((int(image.get("height")), int(image.get("width"))), bool)
            inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(height, width)
            mask[top : top + height, left : left + width] = inside
            objects.append((element.get("label"), mask))
        yield image.get("name"), objects


def read_imagefolder(output: Path, stored: StoredResults) -> ReadImages:
    from datasets import load_dataset

    with tempfile.TemporaryDirectory() as cache:
        data = load_dataset("imagefolder", data_dir=str(output / "imagefolder"), cache_dir=cache)
        for split in data.values():
            for row in split:
                assert row["image"].size[::-1] == stored.size_hw(row["file"])
                masks = [rle_to_mask(rle["size"], rle["counts"]) for rle in row["objects"]["segmentation"]]
                yield row["file"], list(zip(row["objects"]["name"], masks, strict=True))


READERS: dict[str, Callable[[Path, StoredResults], ReadImages]] = {
    "COCO, pycocotools": read_coco,
    "YOLO, supervision": read_yolo_with_supervision,
    "YOLO, ultralytics": read_yolo_with_ultralytics,
    "VOC, lxml": read_voc_with_lxml,
    "VOC, supervision": read_voc_with_supervision,
    "LabelMe, labelme": read_labelme,
    "Label Studio, its COCO": read_label_studio,
    "CVAT, lxml": read_cvat,
    "imagefolder, datasets": read_imagefolder,
}


def main() -> None:
    output = Path(sys.argv[1])
    stored = StoredResults(output)
    classes = Counter(o["class"] for objects in stored.objects.values() for o in objects)
    print(f"store: {len(stored.images)} images, {sum(classes.values())} objects, {dict(classes)}")
    for name, reader in READERS.items():
        num_images, counts, ious = 0, Counter(), []
        try:
            for file, objects in reader(output, stored):
                num_images += 1
                counts.update(name for name, _ in objects)
                masks = stored.masks(file)
                if len(masks) != len(objects):
                    print(f"  {name}: {file} has {len(objects)} objects, the store {len(masks)}")
                pairs = [(m, t) for (_, m), t in zip(objects, masks, strict=False) if m is not None]
                ious += [(m & t).sum() / max((m | t).sum(), 1) for m, t in pairs]
        except ImportError as error:
            print(f"{name:24} left out: {error}")
            continue
        iou = f", mask IoU {np.mean(ious):.4f} (minimum {np.min(ious):.4f})" if ious else ""
        difference = "same classes" if counts == classes else f"different classes: {dict(counts)}"
        print(f"{name:24} {num_images} images, {sum(counts.values())} objects, {difference}{iou}")


if __name__ == "__main__":
    main()
