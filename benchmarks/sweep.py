"""What a sweep over thresholds costs, and what tuned thresholds bring.

    python benchmarks/sweep.py cost --photos FOLDER --scenes 200
    python benchmarks/sweep.py tune --photos FOLDER --scenes 200       (needs the extra optuna)

Both take scenes of the independent generator with their true masks. `cost` runs the command once, and then `-m`
over eight scores and two NMS thresholds, and prints the seconds of both and their ratio. `tune` looks for the
least confidence of each class on one half, by 40 trials of Optuna and by `classes.yaml` of one run, and
prints F1 on the other half with the preset's own threshold, with Optuna's and with those of `classes.yaml`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from independent import COLOURS, pictures, scene

TEXT = f"text={{{', '.join(f'{colour}: {colour} shape' for colour in COLOURS)}}}"


def sample(place: Path, count: int, photos: list[Path], seed: int = 51) -> None:
    """Scenes under `in/`, and `truth.json`, whose classes are the colours."""
    (place / "in").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        image, truths = scene(np.random.default_rng([seed, i]), photos)
        Image.fromarray(image).save(place / "in" / f"{i:04d}.png")
        images.append({"id": i, "file_name": f"{i:04d}.png", "width": image.shape[1], "height": image.shape[0]})
        for truth in truths:
            rle = coco_mask.encode(np.asfortranarray(truth.mask, dtype=np.uint8))
            one = {"id": len(annotations) + 1, "image_id": i, "category_id": list(COLOURS).index(truth.colour) + 1}
            one |= {"bbox": coco_mask.toBbox(rle).tolist(), "area": int(truth.mask.sum()), "iscrowd": 0}
            one["segmentation"] = {"size": list(truth.mask.shape), "counts": rle["counts"].decode()}
            annotations.append(one)
    categories = [{"id": i + 1, "name": colour} for i, colour in enumerate(COLOURS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (place / "truth.json").write_text(json.dumps(content))


def command(place: Path, output: Path, *more: str) -> float:
    """Run the command on a sample; returns the seconds it took."""
    flags = [word for word in more if word.startswith("-")]
    words = ["preset=shapes", f"input={place / 'in'}", f"truth={place / 'truth.json'}", "sink=metrics", TEXT]
    given = [word for word in more if not word.startswith("-")]
    words = [word for word in words if word.split("=")[0] not in {word.split("=")[0] for word in given}]
    words += [f"output={output}", *given]
    begin = time.perf_counter()
    name = str(Path(sys.executable).with_name("grounded-sam"))
    subprocess.run([name, *flags, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def f1(output: Path) -> float:
    return json.loads((output / "metrics.json").read_text())["at_threshold"]["f1"]


def cost(base: Path, scenes: int, photos: list[Path]) -> None:
    sample(base / "sample", scenes, photos)
    one = command(base / "sample", base / "one", "select.score=0.1")
    swept = ["select.score=0.1,0.15,0.2,0.25,0.3,0.35,0.4,0.5", "select.nms=0.5,0.7"]
    many = command(base / "sample", base / "many", "-m", *swept)
    print((base / "many" / "sweep.md").read_text())
    print(f"one run {one:.1f} s, sixteen points {many:.1f} s: {many / one:.2f} times")


def tune(base: Path, scenes: int, photos: list[Path]) -> None:
    sample(base / "half", scenes // 2, photos, 61)
    sample(base / "other", scenes - scenes // 2, photos, 62)
    space = [f"+select.class_score.{colour}=interval(0.05,0.8)" for colour in COLOURS]
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=40", "hydra.sweeper.n_jobs=1"]
    optuna += ["hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=0", "metric=at_threshold.f1"]
    seconds = command(base / "half", base / "trials", "-m", *optuna, *space)
    once = command(base / "half", base / "once", "select.score=0.05")
    print(f"40 trials {seconds:.1f} s, one run for classes.yaml {once:.1f} s")
    for name, more in (
        ("the preset's own threshold", []),
        ("40 trials of Optuna", [f"--config-dir={base / 'trials'}", "preset=best"]),
        ("classes.yaml of one run", [f"text={base / 'once' / 'classes.yaml'}"]),
    ):
        command(base / "other", base / "result", *more)
        print(f"F1 on the other half, {name}: {f1(base / 'result'):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["cost", "tune"])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"cost": cost, "tune": tune}[args.mode](Path(folder), args.scenes, pictures(args.photos))


if __name__ == "__main__":
    main()
