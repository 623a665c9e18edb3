"""What verification adds to the embedded detector, on new scenes of an independent generator.

    python benchmarks/verify.py --scenes 600 --photos FOLDER [--only together|alone|examples|cost]

Every scene is asked for the pairs in it and for as many that are absent, half of these look-alikes that share a color
or a shape with an object; pairs that no training has seen are more frequent than others. One scene in five is empty.
The detector alone (`preset=shapes`) and `preset=shapes_verified` are measured in the same run, with their settings.

Parts:

- `together`: all phrases in one prompt. Printed are Matthews' correlation coefficient (MCC) of presence, over all pairs
  of a scene and a phrase and over the pairs that no training has seen; F1 of boxes at the threshold; AP50 of all boxes;
  the expected calibration error; and false detections per empty scene.
- `alone`: each phrase in a prompt of its own, MCC only, on a sixth of the scenes.
- `examples`: shapes that have no name, found by three example crops each, among the boxes that the detector proposes
  for colors and other shapes: AP50, and false detections per scene without the shape.
- `cost`: seconds of one CPU core per image of a verifier of real size with random weights, for 8 boxes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

from independent import COLORS, HELD_OUT_PAIRS, NEW_SHAPES, SHAPES, LabeledShape, photo_files, random_scene
from shapes import PAIRS, average_precision, box_iou, match_detections, name_of, to_xywh

from grounded_sam import Pipeline, Select, load
from grounded_sam.evaluation.calibration import measure_reliability
from grounded_sam.pipeline.select import select_detections
from grounded_sam.shapes.training.verifier_calibration import correlation
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary

#: Lowest score of the detections that AP and the calibration error count.
FLOOR = 0.02
#: Lowest confidence of the boxes that are compared with examples.
EXAMPLE_FLOOR = 0.1
UNSEEN = sorted(HELD_OUT_PAIRS)


def sample_scene(rng: np.random.Generator, photos: list[Path]) -> tuple[np.ndarray, list[LabeledShape], list[str]]:
    """Make a scene and the phrases that it is asked for."""
    is_empty = rng.random() < 0.2
    image, objects = random_scene(rng, photos, PAIRS + UNSEEN * 6, count=0 if is_empty else int(rng.integers(1, 9)))
    present = list(dict.fromkeys((item.color, item.shape) for item in objects))
    shared = {word for pair in present for word in pair}
    absent = [pair for pair in PAIRS if pair not in present]
    alike = [pair for pair in absent if shared & set(pair)]
    asked = dict.fromkeys(present)
    for i in range(max(len(present), 4 if is_empty else 1)):
        pool = alike if alike and i % 2 == 0 else absent
        unseen = [pair for pair in pool if pair in HELD_OUT_PAIRS]
        pool = unseen if unseen and rng.random() < 0.4 else pool
        asked[pool[int(rng.integers(len(pool)))]] = None
    names = [f"{color} {shape}" for color, shape in asked]
    return image, objects, [names[i] for i in rng.permutation(len(names))]


@dataclass
class Tally:
    """What one configuration finds, over all scenes.

    Attributes:
        presence: Probability that a phrase is in a scene, whether it is, and whether its pair is unseen.
        scores: Score of each detection above `FLOOR`, and whether it is right.
        boxes: Detections and ground truth for AP.
        counts: Detections that match, detections and objects, of all pairs and of unseen ones, at the threshold.
        false_on_empty: Detections in empty scenes at the threshold.
    """

    presence: list[tuple[float, bool, bool]] = field(default_factory=list)
    scores: list[tuple[float, bool]] = field(default_factory=list)
    boxes: list[dict[str, Any]] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros((2, 3), int))
    false_on_empty: int = 0

    def mcc(self, threshold: float) -> tuple[float, float]:
        """Return MCC over all pairs of a scene and a phrase, and over those of unseen pairs."""
        score, shown, unseen = (np.array(column) for column in zip(*self.presence, strict=True))
        found = score >= threshold
        return correlation(found, shown), correlation(found[unseen], shown[unseen])


def judge(model: Pipeline, image: np.ndarray, vocabulary: Vocabulary, floor: float = 0.0) -> sv.Detections:
    """Return all detections above a confidence of the detector, judged if there is a verifier."""
    frame, stages = Frame(pixels=image), model.stages.with_select(Select(score=floor, nms=None))
    return stages.segment([frame], stages.detect([frame], vocabulary), vocabulary, stages.segmenter)[0]


def with_confidence(detections: sv.Detections, column: str) -> sv.Detections:
    """Return detections with a column as their confidence."""
    changed = select_rows(detections, np.arange(len(detections)))
    if len(changed):
        changed.confidence = np.asarray(changed.data[column], np.float32)
    return changed


def add_scene(
    tally: Tally,
    number: int,
    found: sv.Detections,
    select: Select,
    presence: dict[str, float],
    scene: tuple[np.ndarray, list[LabeledShape], list[str]],
) -> None:
    """Count a scene. `found` has the confidence of the configuration, before selection."""
    _, objects, phrases = scene
    vocabulary = Vocabulary.parse(phrases)
    names = {name_of(item, "pairs") for item in objects}
    unseen = {f"{color} {shape}" for color, shape in HELD_OUT_PAIRS}
    tally.presence += [(presence.get(phrase, 0.0), phrase in names, phrase in unseen) for phrase in phrases]
    every = select_detections(found, Select(score=FLOOR, nms=select.nms), vocabulary)
    right = match_detections(every, objects, "pairs", box_iou(every, objects), 0.5)
    if len(every):
        tally.scores += list(zip(every.confidence.tolist(), right.tolist(), strict=True))
    for name, score, box in zip(every.data.get("class_name", []), every.confidence, every.xyxy, strict=True):
        category = PAIR_NAMES.index(str(name)) + 1
        tally.boxes.append({"image_id": number, "category_id": category, "score": float(score), "bbox": to_xywh(box)})
    kept = select_detections(found, select, vocabulary)
    right = match_detections(kept, objects, "pairs", box_iou(kept, objects), 0.5)
    for row, group in enumerate((set(phrases), unseen)):
        chosen = np.isin(kept.data.get("class_name", np.zeros(0, str)), list(group))
        asked = [name for item in objects if (name := name_of(item, "pairs")) in group]
        tally.counts[row] += (right[chosen].sum(), chosen.sum(), len(asked))
    tally.false_on_empty += 0 if objects else len(kept)


PAIR_NAMES = [f"{color} {shape}" for color, shape in PAIRS]


def measure(scenes: list[Any], verified: Pipeline, alone: Select) -> dict[str, Tally]:
    """Measure the detector alone and the verified preset."""
    tallies = {"detector alone": Tally(), "verified": Tally()}
    judging = without_rescoring(verified)
    for number, scene in enumerate(scenes, 1):
        found = judge(judging, scene[0], Vocabulary.parse(scene[2]))
        best: dict[str, float] = {}
        for name, score in zip(found.data["class_name"], found.confidence, strict=True):
            best[str(name)] = max(best.get(str(name), 0.0), float(score))
        add_scene(tallies["detector alone"], number, found, alone, best, scene)
        calibrated = with_confidence(found, "calibrated_score")
        presence = found.metadata["presence"]
        add_scene(tallies["verified"], number, calibrated, verified.select, presence, scene)
    return tallies


def without_rescoring(model: Pipeline) -> Pipeline:
    """Return a pipeline with the same models whose verifier leaves the confidence of the detector as it is."""
    return Pipeline(model.detector, model.segmenter, verifier=model.stages.verifier)


def print_together(scenes: list[Any], verified: Pipeline, alone: Select) -> None:
    """Print what the part `together` measures."""
    truth = [
        {"image_id": number, "category_id": PAIR_NAMES.index(name_of(item, "pairs")) + 1, "bbox": to_xywh(item.box)}
        for number, (_, objects, _) in enumerate(scenes, 1)
        for item in objects
    ]
    truth = [entry | {"area": entry["bbox"][2] * entry["bbox"][3]} for entry in truth]
    empty = sum(not objects for _, objects, _ in scenes)
    unseen = [f"{color} {shape}" for color, shape in UNSEEN]
    for name, tally in measure(scenes, verified, alone).items():
        threshold = alone.score if name == "detector alone" else verified.select.presence
        score, right = (np.array(column) for column in zip(*tally.scores, strict=True))
        ap = average_precision(truth, tally.boxes, len(scenes), PAIR_NAMES)
        f1 = [2 * matched / max(found + asked, 1) for matched, found, asked in tally.counts]
        mcc = tally.mcc(threshold)
        print(
            f"{name:15} MCC {mcc[0]:.3f}, unseen {mcc[1]:.3f}   F1 {f1[0]:.3f}, unseen {f1[1]:.3f}   "
            f"AP50 {np.mean(list(ap.values())):.3f}, unseen {np.mean([ap[n] for n in unseen if n in ap]):.3f}   "
            f"calibration error {measure_reliability(score, right).error:.3f}   "
            f"false per empty scene {tally.false_on_empty / max(empty, 1):.3f}",
            flush=True,
        )


def print_alone(scenes: list[Any], verified: Pipeline, alone: Select) -> None:
    """Print what the part `alone` measures."""
    apart = [(image, objects, [phrase]) for image, objects, phrases in scenes for phrase in phrases]
    for name, tally in measure(apart, verified, alone).items():
        mcc = tally.mcc(alone.score if name == "detector alone" else verified.select.presence)
        print(f"each phrase alone, {name:15} MCC {mcc[0]:.3f}, unseen {mcc[1]:.3f}", flush=True)


def example_scenes(count: int, seed: int, photos: list[Path]) -> Iterator[tuple[np.ndarray, list[LabeledShape]]]:
    """Yield scenes of shapes with and without a name."""
    pairs = [(color, shape) for color in COLORS for shape in NEW_SHAPES * 2 + SHAPES]
    for i in range(count):
        yield random_scene(np.random.default_rng([seed, 5, i]), photos, pairs, count=1 + i % 5)


def draw_examples(shape: str, seed: int, photos: list[Path]) -> list[dict[str, Any]]:
    """Draw three examples of a shape, each in a scene of its own."""
    examples = []
    for i in range(3):
        rng = np.random.default_rng([seed, 6, NEW_SHAPES.index(shape), i])
        color = PAIRS[int(rng.integers(len(PAIRS)))][0]
        image, objects = random_scene(rng, photos, [(color, shape)], count=1)
        examples.append({"image": image, "box": list(objects[0].box), "mask": objects[0].mask})
    return examples


def print_examples(count: int, seed: int, photos: list[Path], checkpoint: str) -> None:
    """Print what the part `examples` measures, with the threshold that ships: a verify score of 0.5."""
    from grounded_sam.verifiers.image_text import ImageTextVerifier

    scenes = list(example_scenes(count, seed, photos))
    model = load(preset="shapes")
    words = Vocabulary.parse({"object": [*(f"{color} shape" for color in COLORS), *SHAPES]})  # where to look
    finder = Pipeline(model.detector, model.segmenter)
    proposals = [judge(finder, image, words, EXAMPLE_FLOOR) for image, _ in scenes]
    precision, false, without = [], 0, 0
    for shape in NEW_SHAPES:
        settings = verifier_settings() | {"checkpoint": checkpoint}
        verifier = ImageTextVerifier(**settings, examples={"object": draw_examples(shape, seed, photos)})
        boxes, truth = [], []
        for number, ((image, objects), proposed) in enumerate(zip(scenes, proposals, strict=True), 1):
            judged = with_confidence(verifier.verify([image], [proposed], words)[0], "verify_score")
            kept = select_detections(judged, Select(score=FLOOR, nms=0.5), words)
            scores = [] if kept.confidence is None else kept.confidence.tolist()
            boxes += [
                {"image_id": number, "category_id": 1, "score": score, "bbox": to_xywh(box)}
                for score, box in zip(scores, kept.xyxy, strict=True)
            ]
            own = [to_xywh(item.box) for item in objects if item.shape == shape]
            truth += [{"image_id": number, "category_id": 1, "bbox": box, "area": box[2] * box[3]} for box in own]
            if not own:
                without += 1
                false += sum(score >= 0.5 for score in scores)
        precision.append(average_precision(truth, boxes, len(scenes), [shape])[shape])
        print(f"three examples of a {shape}: AP50 {precision[-1]:.3f} ({len(truth)} objects)", flush=True)
    print(f"mean AP50 {np.mean(precision):.3f}, false detections per scene without {false / max(without, 1):.3f}")


def verifier_settings() -> dict[str, Any]:
    """Return the settings of the verifier of the preset."""
    from grounded_sam.config.build import to_plain
    from grounded_sam.config.compose import compose

    settings = dict(to_plain(compose(["preset=shapes_verified"]))["verify"])
    return {key: value for key, value in settings.items() if key not in ("_target_", "examples")}


def print_cost(repeats: int = 2) -> None:
    """Print what the part `cost` measures."""
    import torch
    from checkpoints import image_text

    from grounded_sam.structures.detections import make_detections
    from grounded_sam.verifiers.image_text import ImageTextVerifier

    torch.set_num_threads(1)
    words = Vocabulary.parse(["car", "dog"])
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (800, 1200, 3), dtype=np.uint8)
    corners = np.column_stack([rng.uniform(0, 900, 8), rng.uniform(0, 500, 8)])
    boxes = np.column_stack([corners, corners + rng.uniform(60, 300, (8, 2))])
    masks = np.zeros((8, 800, 1200), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = True
    detections = make_detections(boxes, np.full(8, 0.5), [0, 1] * 4, words, (800, 1200), mask=masks)
    with tempfile.TemporaryDirectory() as folder:
        image_text(Path(folder), "siglip", full=True)
        for crops in (["masked"], ["box", "masked"]):
            verifier = ImageTextVerifier(folder, background=["a sign"], crops=crops)
            verifier.verify([image], [detections], words)
            start = time.process_time()
            for _ in range(repeats):
                verifier.verify([image], [detections], words)
            seconds = (time.process_time() - start) / repeats
            print(
                f"SigLIP base, patches of 16 px, 224 px, 8 boxes as {' and '.join(crops)}: {seconds:.2f} s", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--photos", type=Path, help="folder of photos for a quarter of the backgrounds")
    parser.add_argument("--seed", type=int, default=2031)
    parser.add_argument("--checkpoint", default="builtin:shapes", help="folder of another verifier")
    parts = ["together", "alone", "examples", "cost"]
    parser.add_argument("--only", choices=parts, help="measure only this part")
    args = parser.parse_args()
    photos = photo_files(args.photos) if args.photos else []
    verified = load(f"verify.checkpoint={args.checkpoint}", preset="shapes_verified")
    alone = load(preset="shapes", segmenter="none").select
    for part in [args.only] if args.only else parts:
        if part == "examples":
            print_examples(max(args.scenes // 3, 1), args.seed, photos, args.checkpoint)
        elif part == "cost":
            print_cost()
        else:
            count = args.scenes if part == "together" else max(args.scenes // 6, 1)
            scenes = [sample_scene(np.random.default_rng([args.seed, i]), photos) for i in range(count)]
            (print_together if part == "together" else print_alone)(scenes, verified, alone)


if __name__ == "__main__":
    main()
