"""Are the labels useful? Train torchvision's Mask R-CNN on an exported COCO file and test it on ground-truth masks.

    python benchmarks/train.py --photos FOLDER --scenes 500 --minutes 8

Labels new scenes of the independent generator with the command (embedded models, six colors), trains a Mask R-CNN with
a ResNet-18 from scratch on nothing but `annotations.json`, and prints mask AP on other scenes against the generator's
own masks, for the trained model and for the models that made the labels.
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
from independent import COLORS, LabeledShape, photo_files, random_scene

CLASSES = [f"{color} shape" for color in COLORS]
CATEGORY_IDS = {color: i + 1 for i, color in enumerate(COLORS)}


def write_scenes(folder: Path, count: int, seed: int, photos: list[Path]) -> list[list[LabeledShape]]:
    """Write scenes as image files; return their objects."""
    folder.mkdir()
    ground_truth = []
    for i in range(count):
        image, objects = random_scene(np.random.default_rng([seed, i]), photos)
        Image.fromarray(image).save(folder / f"{i:04d}.png")
        ground_truth.append(objects)
    return ground_truth


def mask_ap(ground_truth: list[list[LabeledShape]], results: list[dict[str, Any]]) -> tuple[float, float]:
    """Compute AP and AP50 of masks with pycocotools; image ids are indices into `ground_truth`."""
    annotations = []
    for image_id, objects in enumerate(ground_truth):
        for item in objects:
            rle = coco_mask.encode(np.asfortranarray(item.mask, dtype=np.uint8))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": CATEGORY_IDS[item.color],
                "segmentation": rle,
                "bbox": coco_mask.toBbox(rle).tolist(),
                "area": int(item.mask.sum()),
                "iscrowd": 0,
            }
            annotations.append(annotation)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        sizes = [objects[0].mask.shape if objects else (1, 1) for objects in ground_truth]
        images = [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)]
        coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def make_target(coco: COCO, image_id: int) -> dict[str, torch.Tensor]:
    """Convert the annotations of an image to targets, as torchvision's reference scripts do."""
    annotations = [a for a in coco.loadAnns(coco.getAnnIds(imgIds=image_id)) if min(a["bbox"][2:]) >= 1]
    boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = np.array([coco.annToMask(a) for a in annotations])
    height, width = coco.imgs[image_id]["height"], coco.imgs[image_id]["width"]
    return {
        "boxes": boxes,
        "labels": torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
        "masks": torch.from_numpy(masks.reshape(-1, height, width)),
    }


def build_model() -> MaskRCNN:
    """Build an untrained Mask R-CNN with a ResNet-18."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5
    )
    return MaskRCNN(
        backbone,
        num_classes=len(CLASSES) + 1,
        min_size=160,
        max_size=256,
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=100,
        box_batch_size_per_image=64,
    )


def read_image(path: Path) -> torch.Tensor:
    """Read an image as `(3, H, W) float32` from 0 to 1."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1) / 255


def train(annotations: Path, folder: Path, minutes: float) -> MaskRCNN:
    """Train a Mask R-CNN on a COCO file for a number of minutes."""
    torch.manual_seed(0)
    model = build_model()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
    labeled = [i for i in coco.imgs if coco.getAnnIds(imgIds=i)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=1e-2)
    rng, start, steps, losses = np.random.default_rng(0), time.perf_counter(), 0, []
    model.train()
    while (progress := (time.perf_counter() - start) / 60 / minutes) < 1:
        for group in optimizer.param_groups:  # warm-up, then cosine decay
            group["lr"] = 6e-4 * min(1.0, steps / 100) * (0.5 + 0.5 * np.cos(np.pi * progress))
        images, targets = [], []
        for i in rng.choice(labeled, 4, replace=False).tolist():
            image, target = read_image(folder / coco.imgs[i]["file_name"]), make_target(coco, i)
            if rng.random() < 0.5:
                image, target["masks"] = image.flip(-1), target["masks"].flip(-1)
                target["boxes"][:, [0, 2]] = image.shape[-1] - target["boxes"][:, [2, 0]]
            images.append(image)
            targets.append(target)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        steps += 1
        losses.append(float(loss.detach()))
        if steps % 50 == 0:
            print(f"  step {steps}, loss {np.mean(losses[-50:]):.3f}, {100 * progress:.0f}%", flush=True)
    return model.eval()


def predict(model: MaskRCNN, folder: Path) -> list[dict[str, Any]]:
    """Run a trained model on the images of a folder; return COCO results."""
    results = []
    for image_id, path in enumerate(sorted(folder.iterdir())):
        with torch.inference_mode():
            out = model([read_image(path)])[0]
        for mask, label, score in zip(out["masks"], out["labels"].tolist(), out["scores"].tolist(), strict=True):
            rle = coco_mask.encode(np.asfortranarray((mask[0] > 0.5).numpy(), dtype=np.uint8))
            results.append({"image_id": image_id, "category_id": label, "segmentation": rle, "score": score})
    return results


def label_folder(folder: Path, output: Path, *overrides: str) -> Path:
    """Label a folder with the command; return the COCO file."""
    settings = ["preset=[shapes,label]", f"input={folder}", f"output={output}", f"text=[{','.join(CLASSES)}]"]
    subprocess.run([str(Path(sys.executable).with_name("grounded-sam")), *settings, *overrides], check=True)
    return output / "annotations.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photos for a quarter of the backgrounds")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=8)
    args = parser.parse_args()
    photos = photo_files(args.photos)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_scenes(root / "train", args.scenes, 31, photos)
        ground_truth = write_scenes(root / "test", 100, 32, photos)
        labels = label_folder(root / "train", root / "train_labels", "sink=coco")
        test_labels = label_folder(root / "test", root / "test_labels", "sink=coco", "select.score=0.05")
        content = json.loads(test_labels.read_text())
        indices = {image["id"]: int(Path(image["file_name"]).stem) for image in content["images"]}
        results = [{**a, "image_id": indices[a["image_id"]]} for a in content["annotations"]]
        ap, ap50 = mask_ap(ground_truth, results)
        print(f"models that made the labels, on 100 other scenes: segm AP {ap:.3f}, AP50 {ap50:.3f}")
        print(f"training on {labels.name} of {args.scenes} scenes, torchvision {torchvision.__version__}", flush=True)
        model = train(labels, root / "train", args.minutes)
        ap, ap50 = mask_ap(ground_truth, predict(model, root / "test"))
        print(f"Mask R-CNN trained on the labels for {args.minutes:g} minutes: segm AP {ap:.3f}, AP50 {ap50:.3f}")


if __name__ == "__main__":
    main()
