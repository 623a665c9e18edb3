"""Accuracy of the embedded models on fresh scenes of an independent generator.

    python benchmarks/shapes.py --scenes 300 --photos FOLDER

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--photos", type=Path, help="folder of photos for a quarter of the backgrounds")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--only", choices=["detector", "masks"], help="leave the other half out")
    args = parser.parse_args()
    photos = pictures(args.photos) if args.photos else []
    scenes = [scene(np.random.default_rng([args.seed, i]), photos) for i in range(args.scenes)]
    if args.only != "masks":
        detector(scenes)
        nothing_there(args, photos)
    if args.only != "detector":
        masks(scenes)


def detector(scenes: list[tuple[np.ndarray, list[Truth]]]) -> None:
    model = load(preset="shapes", segmenter="none")
    model = Pipeline(model.detector, None, Select(score=0.0, nms=model.settings.nms))
    kinds = {
        "pairs": [f"{c} {s}" for c, s in PAIRS],
        "shapes": SHAPES,
        "colours": [f"{c} shape" for c in COLOURS],
    }
    for kind, names in kinds.items():
        truth, found = [], []
        for i, (image, truths) in enumerate(scenes):
            asked = names
            if kind == "pairs":
                asked = [f"{c} {s}" for c, s in ask_pairs(np.random.default_rng([7, i]), truths)]
            got = model.detect(image, asked)
            for name, score, box in zip(got.data["class_name"], got.confidence, got.xyxy, strict=True):
                found.append(
                    {"image_id": i + 1, "category_id": names.index(name) + 1, "score": float(score), "bbox": xywh(box)}
                )
            for t in truths:
                name = {"pairs": f"{t.colour} {t.shape}", "shapes": t.shape, "colours": f"{t.colour} shape"}[kind]
                if name in asked:
                    box = xywh(t.box)
                    truth.append(
                        {"image_id": i + 1, "category_id": names.index(name) + 1, "bbox": box, "area": box[2] * box[3]}
                    )
        ap = average_precision(truth, found, len(scenes), names)
        line = f"{kind:8} AP50 {np.mean(list(ap.values())):.3f}"
        if kind == "pairs":
            unseen = {f"{c} {s}" for c, s in UNSEEN}
            line += f"   unseen {np.mean([v for k, v in ap.items() if k in unseen]):.3f}"
            line += f"   seen {np.mean([v for k, v in ap.items() if k not in unseen]):.3f}"
        elif kind == "shapes":
            line += "   " + "  ".join(f"{k} {v:.2f}" for k, v in ap.items())
        print(line, f"  ({len(truth)} objects)", flush=True)


def nothing_there(args: argparse.Namespace, photos: list[Path]) -> None:
    """False detections per image at the shipped threshold where nothing asked for is there."""
    model = load(preset="shapes", segmenter="none")
    wrong = 0
    for i in range(args.scenes):
        rng = np.random.default_rng([args.seed, 1, i])
        image, truths = scene(rng, photos)
        here = {(t.colour, t.shape) for t in truths}
        absent = [f"{c} {s}" for c, s in PAIRS if (c, s) not in here]
        wrong += len(model.detect(image, [absent[j] for j in rng.permutation(len(absent))[:10]]))
    print(f"false detections per image with nothing asked for there: {wrong / args.scenes:.3f}", flush=True)


def masks(scenes: list[tuple[np.ndarray, list[Truth]]]) -> None:
    """Mean IoU of masks from detected boxes with the truth whose box the detection matches (IoU 0.5)."""
    for segmenter in ("sam2", "sam"):
        model = load(preset="shapes", segmenter=segmenter)
        values: list[float] = []
        for image, truths in scenes:
            if not truths:
                continue
            found = model.segment(image, SHAPES)
            if not len(found):
                continue
            overlap = sv.box_iou_batch(np.array([t.box for t in truths], np.float32), found.xyxy)
            for truth, row in zip(truths, overlap, strict=True):
                best = row.argmax()
                if row[best] >= 0.5:
                    mask = found.mask[best]
                    values.append(float((mask & truth.mask).sum() / (mask | truth.mask).sum()))
        print(
            f"{segmenter:5} mean IoU of masks from detected boxes {np.mean(values):.3f}  ({len(values)} objects)",
            flush=True,
        )


if __name__ == "__main__":
    main()
