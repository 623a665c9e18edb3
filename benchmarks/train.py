"""Are the labels of use? Trains torchvision's Mask R-CNN on an exported COCO file and tests it on true masks.

    python benchmarks/train.py --photos FOLDER --scenes 500 --minutes 8

Labels fresh scenes of the independent generator with the command (the small models, six colours), trains
a Mask R-CNN with a ResNet-18 from scratch on nothing but `annotations.json`, and reports AP of masks on other
scenes against the generator's own masks, for the trained model and, beside it, for the labels' own model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from independent import COLOURS, Truth, pictures, scene

CLASSES = [f"{colour} shape" for colour in COLOURS]
COLOURS_ID = {colour: i + 1 for i, colour in enumerate(COLOURS)}


def make(folder: Path, count: int, seed: int, photos: list[Path]) -> list[list[Truth]]:
    """Scenes as picture files, and what is in them."""
    folder.mkdir()
    truths = []
    for i in range(count):
        image, truth = scene(np.random.default_rng([seed, i]), photos)
        Image.fromarray(image).save(folder / f"{i:04d}.png")
        truths.append(truth)
    return truths


def ap(truths: list[list[Truth]], results: list[dict[str, Any]]) -> tuple[float, float]:
    """AP and AP50 of masks over the classes, by pycocotools; image ids are places in `truths`."""
    annotations = []
    for image_id, truth in enumerate(truths):
        for one in truth:
            rle = coco_mask.encode(np.asfortranarray(one.mask, dtype=np.uint8))
            about = {"image_id": image_id, "category_id": COLOURS_ID[one.colour], "segmentation": rle, "iscrowd": 0}
            box = coco_mask.toBbox(rle).tolist()
            annotations.append({"id": len(annotations) + 1, "area": int(one.mask.sum()), "bbox": box, **about})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        sizes = [truth[0].mask.shape if truth else (1, 1) for truth in truths]
        images = [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)]
        coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(results), "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0]), float(run.stats[1])


def target(coco: COCO, image_id: int) -> dict[str, torch.Tensor]:
    """The annotations of an image as torchvision's references make them of COCO."""
    found = [a for a in coco.loadAnns(coco.getAnnIds(imgIds=image_id)) if min(a["bbox"][2:]) >= 1]
    boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = np.array([coco.annToMask(a) for a in found])
    height, width = coco.imgs[image_id]["height"], coco.imgs[image_id]["width"]
    return {
        "boxes": boxes,
        "labels": torch.tensor([a["category_id"] for a in found], dtype=torch.int64),
        "masks": torch.from_numpy(masks.reshape(-1, height, width)),
    }


def train(annotations: Path, folder: Path, minutes: float) -> MaskRCNN:
    """Mask R-CNN from scratch, for so many minutes, on what the file says."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5
    )
    model = MaskRCNN(
        backbone,
        num_classes=len(CLASSES) + 1,
        min_size=160,
        max_size=256,
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=100,
        box_batch_size_per_image=64,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
    usable = [i for i in coco.imgs if coco.getAnnIds(imgIds=i)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=1e-2)
    rng, begin, steps, losses = np.random.default_rng(0), time.perf_counter(), 0, []
    model.train()
    while (spent := (time.perf_counter() - begin) / 60 / minutes) < 1:
        for group in optimizer.param_groups:  # warm up, then down to nothing
            group["lr"] = 6e-4 * min(1.0, steps / 100) * (0.5 + 0.5 * np.cos(np.pi * spent))
        images, targets = [], []
        for i in rng.choice(usable, 4, replace=False).tolist():
            picture = np.asarray(Image.open(folder / coco.imgs[i]["file_name"]).convert("RGB"))
            image, one = torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255, target(coco, i)
            if rng.random() < 0.5:
                image, one["masks"] = image.flip(-1), one["masks"].flip(-1)
                one["boxes"][:, [0, 2]] = image.shape[-1] - one["boxes"][:, [2, 0]]
            images.append(image)
            targets.append(one)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        steps += 1
        losses.append(float(loss.detach()))
        if steps % 50 == 0:
            print(f"  step {steps}, loss {np.mean(losses[-50:]):.3f}, {100 * spent:.0f}%", flush=True)
    return model.eval()


def predicted(model: MaskRCNN, folder: Path) -> list[dict[str, Any]]:
    results = []
    for image_id, path in enumerate(sorted(folder.iterdir())):
        image = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1) / 255
        with torch.inference_mode():
            out = model([image])[0]
        for mask, label, score in zip(out["masks"], out["labels"].tolist(), out["scores"].tolist(), strict=True):
            rle = coco_mask.encode(np.asfortranarray((mask[0] > 0.5).numpy(), dtype=np.uint8))
            results.append({"image_id": image_id, "category_id": label, "segmentation": rle, "score": score})
    return results


def command(folder: Path, output: Path, *more: str) -> Path:
    """Label a folder with the command; returns the COCO file."""
    words = ["preset=[shapes,label]", f"input={folder}", f"output={output}", f"text=[{','.join(CLASSES)}]", *more]
    subprocess.run([str(Path(sys.executable).with_name("grounded-sam")), *words], check=True)
    return output / "annotations.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="backgrounds of a quarter of the scenes")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=8)
    args = parser.parse_args()
    photos = pictures(args.photos)
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        make(base / "train", args.scenes, 31, photos)
        truths = make(base / "test", 100, 32, photos)
        labels = command(base / "train", base / "labels", "sink=coco")
        own = command(base / "test", base / "own", "sink=coco", "select.score=0.05")
        content = json.loads(own.read_text())
        place_of = {image["id"]: int(Path(image["file_name"]).stem) for image in content["images"]}
        results = [{**a, "image_id": place_of[a["image_id"]]} for a in content["annotations"]]
        whole, half = ap(truths, results)
        print(f"the labels' own model on 100 other scenes: segm AP {whole:.3f}, AP50 {half:.3f}")
        print(f"training on {labels.name} of {args.scenes} scenes, torchvision {torchvision.__version__}", flush=True)
        model = train(labels, base / "train", args.minutes)
        whole, half = ap(truths, predicted(model, base / "test"))
        print(f"Mask R-CNN trained on the labels for {args.minutes:g} minutes: segm AP {whole:.3f}, AP50 {half:.3f}")


if __name__ == "__main__":
    main()
