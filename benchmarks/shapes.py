"""Accuracy of the embedded models on fresh scenes of an independent generator.

    python benchmarks/shapes.py --scenes 300 --photos FOLDER [--precision exact|balanced|fast]

Asks every scene three times, with phrases that exclude each other: ten colour-shape pairs (present
and absent ones), the six shapes, and the six colours as "red shape". Prints AP50 over all classes and
over the four pairs that training never saw, mean mask IoU from detected boxes for SAM 2 and SAM, and
false detections at the shipped threshold on scenes with none of the asked objects.
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

from independent import COLOURS, SHAPES, UNSEEN, Truth, pictures, scene

from grounded_sam import Pipeline, Select, load

PAIRS = [(c, s) for c in COLOURS for s in SHAPES]


def ask_pairs(rng: np.random.Generator, truths: list[Truth]) -> list[tuple[str, str]]:
    """Ten pairs: up to six of those present, the others absent."""
    present = list(dict.fromkeys((t.colour, t.shape) for t in truths))[:6]
    absent = [p for p in PAIRS if p not in present and p not in {(t.colour, t.shape) for t in truths}]
    asked = present + [absent[i] for i in rng.permutation(len(absent))[: 10 - len(present)]]
    return [asked[i] for i in rng.permutation(len(asked))]


def average_precision(truth: list[dict], found: list[dict], images: int, names: list[str]) -> dict[str, float]:
    """AP50 of boxes for each class name, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i + 1} for i in range(images)],
            "categories": [{"id": i + 1, "name": n} for i, n in enumerate(names)],
            "annotations": [dict(t, id=i + 1, iscrowd=0) for i, t in enumerate(truth)],
        }
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(found) if found else COCO(), "bbox")
        run.params.iouThrs = np.array([0.5])
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][0, :, :, 0, 2]  # recall x class
    return {n: float(precision[:, i].mean()) for i, n in enumerate(names) if precision[0, i] > -1}


def xywh(box: tuple[float, ...] | np.ndarray) -> list[float]:
    x1, y1, x2, y2 = (float(v) for v in box)
    return [x1, y1, x2 - x1, y2 - y1]


Scenes = list[tuple[np.ndarray, list[Truth]]]
NAMES = {
    "pairs": [f"{c} {s}" for c, s in PAIRS],
    "shapes": SHAPES,
    "colours": [f"{c} shape" for c in COLOURS],
}


def detector(scenes: Scenes, kind: str, precision: str = "exact") -> dict[str, float]:
    """AP50 of each class when every scene is asked for `pairs`, `shapes` or `colours`."""
    model = load(preset="shapes", segmenter="none", precision=precision)
    model = Pipeline(model.detector, None, Select(score=0.0, nms=model.settings.nms))
    names = NAMES[kind]
    truth, found = [], []
    for i, (image, truths) in enumerate(scenes):
        asked = names
        if kind == "pairs":
            asked = [f"{c} {s}" for c, s in ask_pairs(np.random.default_rng([7, i]), truths)]
        got = model.detect(image, asked)
        for name, score, box in zip(got.data["class_name"], got.confidence, got.xyxy, strict=True):
            entry = {"image_id": i + 1, "category_id": names.index(name) + 1}
            found.append(entry | {"score": float(score), "bbox": xywh(box)})
        for t in truths:
            name = {"pairs": f"{t.colour} {t.shape}", "shapes": t.shape, "colours": f"{t.colour} shape"}[kind]
            if name in asked:
                box = xywh(t.box)
                entry = {"image_id": i + 1, "category_id": names.index(name) + 1}
                truth.append(entry | {"bbox": box, "area": box[2] * box[3]})
    return average_precision(truth, found, len(scenes), names)


def nothing_there(scenes: Scenes, precision: str = "exact") -> float:
    """False detections per image at the shipped threshold, asked for ten pairs that are not there."""
    model = load(preset="shapes", segmenter="none", precision=precision)
    wrong = 0
    for i, (image, truths) in enumerate(scenes):
        here = {(t.colour, t.shape) for t in truths}
        absent = [f"{c} {s}" for c, s in PAIRS if (c, s) not in here]
        order = np.random.default_rng([8, i]).permutation(len(absent))
        wrong += len(model.detect(image, [absent[j] for j in order[:10]]))
    return wrong / len(scenes)


def masks(scenes: Scenes, segmenter: str, precision: str = "exact") -> tuple[float, int]:
    """Mean IoU of masks from detected boxes with the truths that the boxes match (IoU 0.5), and their number."""
    model = load(preset="shapes", segmenter=segmenter, precision=precision)
    values: list[float] = []
    for image, truths in scenes:
        found = model.segment(image, SHAPES) if truths else []
        if not len(found):
            continue
        overlap = sv.box_iou_batch(np.array([t.box for t in truths], np.float32), found.xyxy)
        for truth, row in zip(truths, overlap, strict=True):
            best = row.argmax()
            if row[best] >= 0.5:
                mask = found.mask[best]
                values.append(float((mask & truth.mask).sum() / (mask | truth.mask).sum()))
    return float(np.mean(values)), len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--photos", type=Path, help="folder of photos for a quarter of the backgrounds")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--precision", choices=["exact", "balanced", "fast"], default="exact")
    parser.add_argument("--only", choices=["detector", "masks"], help="leave the other half out")
    args = parser.parse_args()
    photos = pictures(args.photos) if args.photos else []
    scenes = [scene(np.random.default_rng([args.seed, i]), photos) for i in range(args.scenes)]
    if args.only != "masks":
        for kind in NAMES:
            ap = detector(scenes, kind, args.precision)
            line = f"{kind:8} AP50 {np.mean(list(ap.values())):.3f}"
            if kind == "pairs":
                unseen = [ap[f"{c} {s}"] for c, s in UNSEEN]
                line += f"   the unseen four {np.mean(unseen):.3f}   ({', '.join(f'{v:.2f}' for v in unseen)})"
            else:
                line += "   " + "  ".join(f"{k.split()[0]} {v:.2f}" for k, v in ap.items())
            print(line, flush=True)
        print(
            f"false detections per image with nothing asked for there: {nothing_there(scenes, args.precision):.3f}",
            flush=True,
        )
    if args.only != "detector":
        for segmenter in ("sam2", "sam"):
            mean, count = masks(scenes, segmenter, args.precision)
            print(f"{segmenter:5} mean IoU of masks from detected boxes {mean:.3f}  ({count} objects)", flush=True)


if __name__ == "__main__":
    main()
