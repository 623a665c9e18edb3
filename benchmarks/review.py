"""A scripted annotator: how many errors go away with 200 verdicts that the product chooses, and with 200 random ones?

    python benchmarks/review.py
    python benchmarks/review.py --scenes 300 --work FOLDER

The scenes are of a domain for which the shipped threshold is not the best one: smaller objects, more noise, and
look-alikes (a lime star among yellow stars) that are as frequent as the classes. The embedded detector finds candidates
down to a score of 0.05, which are stored; with `--work`, a second call finds them there. Then an annotator who knows
the ground truth gives verdicts, with what `grounded-sam-review` consists of: the choice of what to look at next, in
rounds, the edits of the store, and the tuner.

Printed are the errors in the whole set: false detections above the threshold of their class, and right candidates below
it. A candidate with a verdict is no error any more. With `--rerun`, the images are processed again with the ontology
that was written, whose negatives take part, in the same way: with the tuned thresholds, candidates down to 0.05.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import supervision as sv
from PIL import Image

from grounded_sam import Vocabulary, load
from grounded_sam.config.compose import compose
from grounded_sam.evaluation.thresholds import write_ontology
from grounded_sam.evaluation.verdicts import (
    Candidate,
    next_candidates,
    proposed_negatives,
    read_verdicts,
    tuned_thresholds,
    tuned_vocabulary,
)
from grounded_sam.formats.store_edits import Edit, StoreEditor
from grounded_sam.formats.store_rows import StoreRows
from grounded_sam.pipeline.runner import Runner
from grounded_sam.shapes.scenes import Scene, make_scene
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.images import ImageSource

#: Classes that are looked for.
CLASSES = [
    (color, shape) for color in ("red", "green", "blue", "yellow") for shape in ("circle", "square", "triangle", "star")
]
#: Objects that look like some of them.
LOOK_ALIKES = [
    *(("lime", "star"), ("lime", "circle"), ("lime", "triangle"), ("navy", "circle"), ("maroon", "triangle")),
    *(("blue", "diamond"), ("red", "diamond"), ("yellow", "diamond")),
]
#: Lowest score of a candidate.
MIN_SCORE = 0.05
#: Name of the class of each object, and the boxes, by image.
Truth = dict[str, tuple[list[str], np.ndarray]]


def scenes(count: int, seed: int) -> Iterator[Scene]:
    """Yield the scenes, the same for a seed."""
    pairs = [*CLASSES, *LOOK_ALIKES * (len(CLASSES) // len(LOOK_ALIKES))]
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        scene = make_scene(rng, pairs, int(rng.integers(2, 7)), (112, 144), diameter=(0.12, 0.3))
        noise = rng.normal(0, rng.uniform(0, 40), scene.image.shape)
        image = np.clip(scene.image + noise, 0, 255).astype(np.uint8)
        yield Scene(image, scene.masks, scene.xyxy, scene.pairs, scene.ids)


def write_scenes(folder: Path, count: int, seed: int) -> Truth:
    """Write the scenes as images, unless they are there, and return their ground truth."""
    folder.mkdir(parents=True, exist_ok=True)
    truth: Truth = {}
    for i, scene in enumerate(scenes(count, seed)):
        name = f"{i:05d}.png"
        truth[name] = [" ".join(pair) for pair in scene.pairs], scene.xyxy
        if not (folder / name).exists():
            Image.fromarray(scene.image).save(folder / name, compress_level=1)
    return truth


def detect(images: Path, output: Path, text: object) -> None:
    """Store the candidates of all images; a second call finds them in the store."""
    model = load(f"select.score={MIN_SCORE}", preset="shapes", segmenter="none")
    words = Vocabulary.parse(text)
    model.vocabulary = Vocabulary(words.classes, words.phrases, words.negatives)  # thresholds are applied later
    store = StoreSink(output, model.vocabulary, {"select": {"score": MIN_SCORE}})
    Runner(model, ImageSource(images), [store], output).run()


def right_ones(candidates: list[Candidate], truth: Truth) -> dict[str, tuple[bool, str | None]]:
    """Return for each candidate whether it is right, and what it is instead, by object id.

    The most confident candidates get objects of their class first, each at most one, at an IoU of 0.5.
    """
    by_file: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_file.setdefault(candidate.file, []).append(candidate)
    result: dict[str, tuple[bool, str | None]] = {}
    for file, members in by_file.items():
        names, boxes = truth[file]
        free = np.ones(len(names), bool)
        for candidate in sorted(members, key=lambda candidate: -candidate.score):
            iou = sv.box_iou_batch(np.array([candidate.box], np.float32), boxes)[0] if len(boxes) else np.zeros(0)
            fitting = iou * free * (np.array(names) == candidate.class_name)
            is_right = bool(len(fitting) and fitting.max() >= 0.5)
            if is_right:
                free[fitting.argmax()] = False
            below = names[int(iou.argmax())] if len(iou) and iou.max() >= 0.5 else None
            result[candidate.object_id] = is_right, None if is_right or below == candidate.class_name else below
    return result


def count_errors(store: StoreRows, truth: Truth, thresholds: Mapping[str, float], words: Vocabulary) -> tuple[int, int]:
    """Count false detections and missed objects among the candidates without a verdict."""
    candidates = read_verdicts(store, words).candidates
    right = right_ones(candidates, truth)
    false = missed = 0
    for candidate in candidates:
        if candidate.is_right is None:
            is_kept = candidate.score >= thresholds[candidate.class_name]
            false += is_kept and not right[candidate.object_id][0]
            missed += not is_kept and right[candidate.object_id][0]
    return false, missed


def annotate(output: Path, truth: Truth, verdicts: int, rounds: int, seed: int | None) -> None:
    """Give verdicts about candidates that the product chooses, or about random ones if there is a seed."""
    editor = StoreEditor(output)
    for part in range(rounds):
        found = read_verdicts(editor.rows)
        count = verdicts * (part + 1) // rounds - verdicts * part // rounds
        if seed is None:
            chosen = next_candidates(found, count)
        else:
            open_ones = [i for i, candidate in enumerate(found.candidates) if candidate.is_right is None]
            chosen = np.random.default_rng([seed, part]).permutation(open_ones)[:count].tolist()
        right = right_ones(found.candidates, truth)
        edits = []
        for i in chosen:
            object_id = found.candidates[i].object_id
            is_right, instead = right[object_id]
            action = "accept" if is_right else "reject"
            edits.append(Edit(action=action, object_id=object_id, looks_like=None if is_right else instead))
        editor.apply(edits, "script")


def tune(output: Path, path: Path, shipped: float) -> tuple[dict[str, float], Vocabulary]:
    """Write the ontology that the verdicts give; return the threshold of each class and the ontology."""
    verdicts = read_verdicts(StoreRows(output / "store"))
    negatives = proposed_negatives(verdicts)
    thresholds = tuned_thresholds(verdicts)
    write_ontology(path, tuned_vocabulary(verdicts, negatives), thresholds, "of the benchmark")
    words = Vocabulary.parse(path)
    return {name: words.class_score.get(name, shipped) for name in words.classes}, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--verdicts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=8, help="in which the product chooses")
    parser.add_argument("--repeats", type=int, default=5, help="of the random choice")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--rerun", action="store_true", help="also process all images again with each ontology")
    parser.add_argument("--work", type=Path, help="folder for images and stores, kept for the next call")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        truth = write_scenes(work / "images", args.scenes, args.seed)
        detect(work / "images", work / "labels", [" ".join(pair) for pair in CLASSES])
        shipped = float(compose(["preset=shapes"]).select.score)
        names = [" ".join(pair) for pair in CLASSES]
        store = StoreRows(work / "labels" / "store")
        words = store.vocabulary
        before = count_errors(store, truth, dict.fromkeys(names, shipped), words)
        print(f"{args.scenes} scenes, {len(read_verdicts(store).candidates):,} candidates, threshold {shipped}:")
        print(f"  {sum(before):6,} errors before  ({before[0]:,} false, {before[1]:,} missed)", flush=True)
        falls = []
        for name, seed in [("chosen", None), *((f"random {i}", i) for i in range(args.repeats))]:
            copy = work / name.replace(" ", "-")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(work / "labels" / "store", copy / "store")
            annotate(copy, truth, args.verdicts, args.rounds, seed)
            thresholds, tuned = tune(copy, copy / "classes.yaml", shipped)
            after = count_errors(StoreRows(copy / "store"), truth, thresholds, words)
            falls.append(sum(before) - sum(after))
            print(
                f"  {sum(after):6,} errors after {args.verdicts} {name} verdicts  ({after[0]:,} false, "
                f"{after[1]:,} missed): {falls[-1]:,} fewer; negatives: {', '.join(tuned.negatives) or 'none'}",
                flush=True,
            )
            if args.rerun:
                detect(work / "images", copy / "again", copy / "classes.yaml")
                again = count_errors(StoreRows(copy / "again" / "store"), truth, thresholds, words)
                print(f"  {sum(again):6,} errors of a run with that ontology ({again[0]:,} false, {again[1]:,} missed)")
    mean = sum(falls[1:]) / max(len(falls) - 1, 1)
    print(
        f"chosen {falls[0]:,} fewer, random {mean:,.1f} fewer on average: {falls[0] / max(mean, 1e-9):.1f} times as far"
    )


if __name__ == "__main__":
    main()
