"""Accuracy of the embedded models on new scenes of independent generators, with the settings that ship.

    python benchmarks/shapes.py --scenes 300 --photos FOLDER [--generator independent|signed_distance] [--only PART]

Parts:

- `detector`: every scene is queried with ten color-shape pairs (present and absent ones), with the six shapes, and
  with the six colors as "red shape". Printed are F1 at the shipped threshold and AP50 of detections above 0.02,
  over all pairs and over the four held-out pairs that training never uses; the expected calibration error; and the
  false detections per image when only absent pairs are queried.
- `masks`: mean IoU of masks from detected boxes, for SAM 2 and SAM.
- `clicks`: mean IoU after a click in the middle of each object, and after each of three corrections, in the middle of
  the largest error.
- `everything`: recall and precision of `detector=everything` at a mask IoU of 0.75.
- `crowded`: recall and precision on scenes of 8 to 30 small objects with `tiles.size=112`, at a box IoU of 0.5.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import supervision as sv

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import independent
import signed_distance
from independent import COLORS, HELD_OUT_PAIRS, SHAPES, LabeledShape, photo_files

from grounded_sam import Pipeline, Select, load
from grounded_sam.evaluation.calibration import measure_reliability
from grounded_sam.shapes.training.segmenter import correcting_click

LabeledScenes = list[tuple[np.ndarray, list[LabeledShape]]]

GENERATORS = {"independent": independent.random_scene, "signed_distance": signed_distance.random_scene}
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
#: Class names by kind of query.
CLASS_NAMES = {
    "pairs": [f"{color} {shape}" for color, shape in PAIRS],
    "shapes": SHAPES,
    "colors": [f"{color} shape" for color in COLORS],
}
#: Lowest score of the detections that AP counts.
AP_MIN_SCORE = 0.02


def sample_pairs(rng: np.random.Generator, objects: list[LabeledShape]) -> list[tuple[str, str]]:
    """Sample ten pairs to query: up to six that are present, and absent ones."""
    all_present = list(dict.fromkeys((item.color, item.shape) for item in objects))
    present = all_present[:6]
    absent = [pair for pair in PAIRS if pair not in all_present]
    pairs = present + [absent[i] for i in rng.permutation(len(absent))[: 10 - len(present)]]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def queries(scenes: LabeledScenes, kind: str) -> list[list[str]]:
    """Return the class names to query in each scene."""
    if kind != "pairs":
        return [CLASS_NAMES[kind]] * len(scenes)
    sampled = (sample_pairs(np.random.default_rng([7, i]), objects) for i, (_, objects) in enumerate(scenes))
    return [[f"{color} {shape}" for color, shape in pairs] for pairs in sampled]


def name_of(item: LabeledShape, kind: str) -> str:
    """Return the class name of an object for a kind of query."""
    return {"pairs": f"{item.color} {item.shape}", "shapes": item.shape, "colors": f"{item.color} shape"}[kind]


def average_precision(
    ground_truth: list[dict], detections: list[dict], num_images: int, names: Sequence[str]
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
    """Compute AP50 of each class when every scene is queried with `pairs`, `shapes` or `colors`."""
    model = load(preset="shapes", segmenter="none", precision=precision)
    model = Pipeline(model.detector, None, Select(score=AP_MIN_SCORE, nms=model.select.nms))
    names = CLASS_NAMES[kind]
    ground_truth, detections = [], []
    for i, ((image, objects), queried) in enumerate(zip(scenes, queries(scenes, kind), strict=True)):
        detected = model.detect(image, queried)
        for name, score, box in zip(detected.data["class_name"], detected.confidence, detected.xyxy, strict=True):
            entry = {"image_id": i + 1, "category_id": names.index(name) + 1}
            detections.append(entry | {"score": float(score), "bbox": to_xywh(box)})
        for item in objects:
            name = name_of(item, kind)
            if name in queried:
                box = to_xywh(item.box)
                entry = {"image_id": i + 1, "category_id": names.index(name) + 1}
                ground_truth.append(entry | {"bbox": box, "area": box[2] * box[3]})
    return average_precision(ground_truth, detections, len(scenes), names)


def match_detections(
    detections: sv.Detections, objects: list[LabeledShape], kind: str, iou: np.ndarray, min_iou: float
) -> np.ndarray:
    """Return which detections match an object of their class, the most confident first, one per object.

    Args:
        detections: `n` detections with `data["class_name"]`.
        objects: `m` objects.
        kind: Kind of query; empty for detections without a class.
        iou: IoU of detections and objects, `(n, m)`.
        min_iou: IoU from which on they match.
    """
    correct, free = np.zeros(len(detections), bool), np.ones(len(objects), bool)
    if not len(detections) or not objects:
        return correct
    names = np.array([name_of(item, kind) if kind else "object" for item in objects])
    for row in np.argsort(-detections.confidence):
        overlap = np.where(free & (names == detections.data["class_name"][row]), iou[row], 0)
        if overlap.max() >= min_iou:
            correct[row], free[overlap.argmax()] = True, False
    return correct


def box_iou(detections: sv.Detections, objects: list[LabeledShape]) -> np.ndarray:
    """Return the IoU of the boxes of detections and objects, `(n, m)`."""
    if not len(detections) or not objects:
        return np.zeros((len(detections), len(objects)))
    return sv.box_iou_batch(detections.xyxy, np.array([item.box for item in objects], np.float32))


def f1_scores(scenes: LabeledScenes, precision: str = "exact") -> tuple[float, float]:
    """Compute F1 at the shipped threshold over all pairs, and over the held-out pairs."""
    model = load(preset="shapes", segmenter="none", precision=precision)
    held_out = {f"{color} {shape}" for color, shape in HELD_OUT_PAIRS}
    counts = np.zeros((2, 3), int)  # matched, detected and present: of all pairs, and of the held-out ones
    for (image, objects), queried in zip(scenes, queries(scenes, "pairs"), strict=True):
        detections = model.detect(image, queried)
        correct = match_detections(detections, objects, "pairs", box_iou(detections, objects), 0.5)
        present = np.array([name for item in objects if (name := name_of(item, "pairs")) in queried])
        for row, names in enumerate((set(queried), held_out)):
            chosen = np.isin(detections.data["class_name"], list(names)) if len(detections) else np.zeros(0, bool)
            counts[row] += (correct[chosen].sum(), chosen.sum(), np.isin(present, list(names)).sum())
    all_pairs, unseen = (float(2 * m / max(d + p, 1)) for m, d, p in counts)
    return all_pairs, unseen


def calibration_error(scenes: LabeledScenes) -> float:
    """Compute the expected calibration error (10 bins) of all detections of pairs above 0.02."""
    model = load(preset="shapes", segmenter="none")
    model = Pipeline(model.detector, None, Select(score=AP_MIN_SCORE, nms=model.select.nms))
    scores, correct = [], []
    for (image, objects), queried in zip(scenes, queries(scenes, "pairs"), strict=True):
        detections = model.detect(image, queried)
        scores.append(detections.confidence)
        correct.append(match_detections(detections, objects, "pairs", box_iou(detections, objects), 0.5))
    return measure_reliability(np.concatenate(scores), np.concatenate(correct)).error


def false_positives_per_image(scenes: LabeledScenes, precision: str = "exact") -> float:
    """Count detections per image at the shipped threshold when ten absent pairs are queried."""
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
        for item, row in zip(objects, box_iou(detections, objects).T, strict=True):
            best = row.argmax()
            if row[best] >= 0.5:
                ious.append(mask_iou(detections.mask[best], item.mask))
    return float(np.mean(ious)), len(ious)


def mask_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the IoU of two masks."""
    return float((mask & truth).sum() / max((mask | truth).sum(), 1))


def click_iou(scenes: LabeledScenes, segmenter: str, clicks: int = 4) -> list[float]:
    """Compute the mean IoU after one click on each object, after two, and so on."""
    model = load(preset="shapes", segmenter=segmenter)
    ious: list[list[float]] = []
    for image, objects in scenes:
        if not objects:
            continue
        with model.session(image) as session:
            for item in objects:
                points, labels, mask = [], [], np.zeros_like(item.mask)
                ious.append([])
                for _ in range(clicks):
                    x, y, label = correcting_click(mask, item.mask)
                    points.append([x, y])
                    labels.append(label)
                    mask = session.segment([{"class": "object", "points": points, "labels": labels}]).mask[0]
                    ious[-1].append(mask_iou(mask, item.mask))
    return np.mean(ious, axis=0).tolist()


def everything_scores(scenes: LabeledScenes, segmenter: str) -> tuple[float, float]:
    """Compute recall and precision of `detector=everything` at a mask IoU of 0.75."""
    model = load(preset="shapes", detector="everything", segmenter=segmenter)
    matched = detected = present = 0
    for image, objects in scenes:
        detections = model.segment(image)
        masks = [] if detections.mask is None else detections.mask
        iou = np.array([[mask_iou(mask, item.mask) for item in objects] for mask in masks])
        matched += int(match_detections(detections, objects, "", iou, 0.75).sum())
        detected += len(detections)
        present += len(objects)
    return matched / present, matched / max(detected, 1)


def crowded_scores(scenes: LabeledScenes, overrides: Sequence[str] = ("tiles.size=112",)) -> tuple[float, float]:
    """Compute recall and precision on crowded scenes, queried with the pairs in them, at a box IoU of 0.5."""
    model = load(*overrides, preset="shapes", segmenter="none")
    matched = detected = present = 0
    for image, objects in scenes:
        detections = model.detect(image, sorted({name_of(item, "pairs") for item in objects}))
        matched += int(match_detections(detections, objects, "pairs", box_iou(detections, objects), 0.5).sum())
        detected += len(detections)
        present += len(objects)
    return matched / present, matched / max(detected, 1)


def print_detector(scenes: LabeledScenes, precision: str) -> None:
    """Print what the part `detector` measures."""
    all_pairs, held_out = f1_scores(scenes, precision)
    print(f"F1 at the shipped threshold {all_pairs:.3f}   held-out pairs {held_out:.3f}", flush=True)
    for kind in CLASS_NAMES:
        ap = detector_ap(scenes, kind, precision)
        line = f"{kind:8} AP50 {np.mean(list(ap.values())):.3f}"
        if kind == "pairs":
            unseen = [ap[name] for color, shape in HELD_OUT_PAIRS if (name := f"{color} {shape}") in ap]
            line += f"   held-out pairs {np.mean(unseen):.3f}   ({', '.join(f'{v:.2f}' for v in unseen)})"
        else:
            line += "   " + "  ".join(f"{name.split()[0]} {value:.2f}" for name, value in ap.items())
        print(line, flush=True)
    print(f"expected calibration error {calibration_error(scenes):.3f}")
    false_positives = false_positives_per_image(scenes, precision)
    print(f"false detections per image when only absent pairs are queried: {false_positives:.3f}", flush=True)


def print_segmenters(scenes: LabeledScenes, part: str, precision: str) -> None:
    """Print what the parts `masks`, `clicks` and `everything` measure."""
    for segmenter in ("sam2", "sam"):
        if part == "masks":
            mean, count = mean_mask_iou(scenes, segmenter, precision)
            print(f"{segmenter:5} mean IoU of masks from detected boxes {mean:.3f}  ({count} objects)", flush=True)
        elif part == "clicks":
            values = ", ".join(f"{value:.3f}" for value in click_iou(scenes, segmenter))
            print(f"{segmenter:5} mean IoU after 1, 2, 3 and 4 clicks: {values}", flush=True)
        else:
            recall, exact = everything_scores(scenes, segmenter)
            print(f"{segmenter:5} everything: recall {recall:.3f}, precision {exact:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--photos", type=Path, help="folder of photos for a quarter of the backgrounds")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--generator", choices=GENERATORS, default="independent")
    parser.add_argument("--precision", choices=["exact", "balanced", "fast"], default="exact")
    parts = ["detector", "masks", "clicks", "everything", "crowded"]
    parser.add_argument("--only", choices=parts, help="evaluate only this part")
    args = parser.parse_args()
    photos = photo_files(args.photos) if args.photos else []
    random_scene: Callable[..., tuple[np.ndarray, list[LabeledShape]]] = GENERATORS[args.generator]
    scenes = [random_scene(np.random.default_rng([args.seed, i]), photos) for i in range(args.scenes)]
    for part in [args.only] if args.only else parts:
        if part == "detector":
            print_detector(scenes, args.precision)
        elif part == "crowded":
            rngs = (np.random.default_rng([args.seed, 1, i]) for i in range(max(args.scenes // 5, 1)))
            recall, exact = crowded_scores([signed_distance.crowded_scene(rng, photos) for rng in rngs])
            print(f"crowded scenes with tiles.size=112: recall {recall:.3f}, precision {exact:.3f}", flush=True)
        else:
            print_segmenters(scenes, part, args.precision)


if __name__ == "__main__":
    main()
