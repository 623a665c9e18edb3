"""Accuracy of the embedded models on new scenes of an independent generator.

    python benchmarks/shapes.py --scenes 300 --photos FOLDER [--precision exact|balanced|fast]

The detector runs three times on every scene, with phrases that exclude each other: ten color-shape pairs (present and
absent ones), the six shapes, and the six colors as "red shape". Printed are AP50 over all classes and over the four
held-out pairs that training never uses, the number of false positives at the default threshold when only absent pairs
are prompted, and the mean IoU of masks from detected boxes for SAM 2 and SAM.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import supervision as sv

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from independent import COLORS, HELD_OUT_PAIRS, SHAPES, LabeledShape, photo_files, random_scene

from grounded_sam import Pipeline, Select, load

LabeledScenes = list[tuple[np.ndarray, list[LabeledShape]]]

PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
#: Class names by kind of prompt.
CLASS_NAMES = {
    "pairs": [f"{color} {shape}" for color, shape in PAIRS],
    "shapes": SHAPES,
    "colors": [f"{color} shape" for color in COLORS],
}


def sample_pairs(rng: np.random.Generator, objects: list[LabeledShape]) -> list[tuple[str, str]]:
    """Sample ten pairs to prompt with: up to six that are present, and absent ones."""
    all_present = list(dict.fromkeys((item.color, item.shape) for item in objects))
    present = all_present[:6]
    absent = [pair for pair in PAIRS if pair not in all_present]
    pairs = present + [absent[i] for i in rng.permutation(len(absent))[: 10 - len(present)]]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def average_precision(
    ground_truth: list[dict], detections: list[dict], num_images: int, names: list[str]
) -> dict[str, float]:
    """Compute AP50 of boxes for each class name with pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i + 1} for i in range(num_images)],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
            "annotations": [dict(entry, id=i + 1, iscrowd=0) for i, entry in enumerate(ground_truth)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections) if detections else COCO(), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, 2]  # recall x class
    return {name: float(precision[:, i].mean()) for i, name in enumerate(names) if precision[0, i] > -1}


def to_xywh(box: tuple[float, ...] | np.ndarray) -> list[float]:
    x1, y1, x2, y2 = (float(v) for v in box)
    return [x1, y1, x2 - x1, y2 - y1]


def detector_ap(scenes: LabeledScenes, kind: str, precision: str = "exact") -> dict[str, float]:
    """Compute AP50 of each class when every scene is prompted with `pairs`, `shapes` or `colors`."""
    model = load(preset="shapes", segmenter="none", precision=precision)
    model = Pipeline(model.detector, None, Select(score=0.0, nms=model.select.nms))
    names = CLASS_NAMES[kind]
    ground_truth, detections = [], []
    for i, (image, objects) in enumerate(scenes):
        prompted = names
        if kind == "pairs":
            pairs = sample_pairs(np.random.default_rng([7, i]), objects)
            prompted = [f"{color} {shape}" for color, shape in pairs]
        detected = model.detect(image, prompted)
        for name, score, box in zip(detected.data["class_name"], detected.confidence, detected.xyxy, strict=True):
            entry = {"image_id": i + 1, "category_id": names.index(name) + 1}
            detections.append(entry | {"score": float(score), "bbox": to_xywh(box)})
        for item in objects:
            name = {"pairs": f"{item.color} {item.shape}", "shapes": item.shape, "colors": f"{item.color} shape"}[kind]
            if name in prompted:
                box = to_xywh(item.box)
                entry = {"image_id": i + 1, "category_id": names.index(name) + 1}
                ground_truth.append(entry | {"bbox": box, "area": box[2] * box[3]})
    return average_precision(ground_truth, detections, len(scenes), names)


def false_positives_per_image(scenes: LabeledScenes, precision: str = "exact") -> float:
    """Count detections per image at the default threshold when ten absent pairs are prompted."""
    model = load(preset="shapes", segmenter="none", precision=precision)
    count = 0
    for i, (image, objects) in enumerate(scenes):
        present = {(item.color, item.shape) for item in objects}
        absent = [f"{color} {shape}" for color, shape in PAIRS if (color, shape) not in present]
        order = np.random.default_rng([8, i]).permutation(len(absent))
        count += len(model.detect(image, [absent[j] for j in order[:10]]))
    return count / len(scenes)


def mean_mask_iou(scenes: LabeledScenes, segmenter: str, precision: str = "exact") -> tuple[float, int]:
    """Compute the mean IoU of masks from detected boxes.

    Returns:
        The mean over the objects that a detected box matches (IoU 0.5), and the number of these objects.
    """
    model = load(preset="shapes", segmenter=segmenter, precision=precision)
    ious: list[float] = []
    for image, objects in scenes:
        detections = model.segment(image, SHAPES) if objects else []
        if not len(detections):
            continue
        box_ious = sv.box_iou_batch(np.array([item.box for item in objects], np.float32), detections.xyxy)
        for item, row in zip(objects, box_ious, strict=True):
            best = row.argmax()
            if row[best] >= 0.5:
                mask = detections.mask[best]
                ious.append(float((mask & item.mask).sum() / (mask | item.mask).sum()))
    return float(np.mean(ious)), len(ious)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--photos", type=Path, help="folder of photos for a quarter of the backgrounds")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--precision", choices=["exact", "balanced", "fast"], default="exact")
    parser.add_argument("--only", choices=["detector", "masks"], help="evaluate only this part")
    args = parser.parse_args()
    photos = photo_files(args.photos) if args.photos else []
    scenes = [random_scene(np.random.default_rng([args.seed, i]), photos) for i in range(args.scenes)]
    if args.only != "masks":
        for kind in CLASS_NAMES:
            ap = detector_ap(scenes, kind, args.precision)
            line = f"{kind:8} AP50 {np.mean(list(ap.values())):.3f}"
            if kind == "pairs":
                held_out = [ap[f"{color} {shape}"] for color, shape in HELD_OUT_PAIRS]
                line += f"   held-out pairs {np.mean(held_out):.3f}   ({', '.join(f'{v:.2f}' for v in held_out)})"
            else:
                line += "   " + "  ".join(f"{name.split()[0]} {value:.2f}" for name, value in ap.items())
            print(line, flush=True)
        false_positives = false_positives_per_image(scenes, args.precision)
        print(f"false positives per image when only absent pairs are prompted: {false_positives:.3f}", flush=True)
    if args.only != "detector":
        for segmenter in ("sam2", "sam"):
            mean, count = mean_mask_iou(scenes, segmenter, args.precision)
            print(f"{segmenter:5} mean IoU of masks from detected boxes {mean:.3f}  ({count} objects)", flush=True)


if __name__ == "__main__":
    main()
