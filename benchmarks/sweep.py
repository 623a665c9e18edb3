"""What a sweep over thresholds costs, and what tuned thresholds gain.

    python benchmarks/sweep.py cost --photos FOLDER --scenes 200
    python benchmarks/sweep.py tune --photos FOLDER --scenes 200       (requires the extra optuna)

Both use scenes of the independent generator with their ground-truth masks. `cost` runs the command once, then with `-m`
over eight scores and two NMS thresholds, and prints the seconds of both and their ratio. `tune` determines the score
threshold of each class on one half of the scenes, by 40 trials of Optuna and by `classes.yaml` of a single run, and
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
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from independent import COLORS, LabeledShape, photo_files, random_scene

TEXT = f"text={{{', '.join(f'{color}: {color} shape' for color in COLORS)}}}"


def write_sample(folder: Path, count: int, photos: list[Path], seed: int = 51) -> None:
    """Write scenes to `in/`, and their ground truth, with the colors as classes, to `truth.json`."""
    (folder / "in").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        image, objects = random_scene(np.random.default_rng([seed, i]), photos)
        Image.fromarray(image).save(folder / "in" / f"{i:04d}.png")
        images.append({"id": i, "file_name": f"{i:04d}.png", "width": image.shape[1], "height": image.shape[0]})
        annotations += [{"image_id": i, **to_annotation(item)} for item in objects]
    annotations = [{"id": i + 1, **annotation} for i, annotation in enumerate(annotations)]
    categories = [{"id": i + 1, "name": color} for i, color in enumerate(COLORS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(content))


def to_annotation(item: LabeledShape) -> dict[str, Any]:
    """Convert an object to a COCO annotation without ids of itself and its image."""
    rle = coco_mask.encode(np.asfortranarray(item.mask, dtype=np.uint8))
    return {
        "category_id": list(COLORS).index(item.color) + 1,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(item.mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(item.mask.shape), "counts": rle["counts"].decode()},
    }


def run_command(sample: Path, output: Path, *arguments: str) -> float:
    """Run the command on a sample; return the seconds that it took."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    defaults = ["preset=shapes", f"input={sample / 'in'}", f"truth={sample / 'truth.json'}", "sink=metrics", TEXT]
    overridden = {override.split("=")[0] for override in overrides}
    defaults = [default for default in defaults if default.split("=")[0] not in overridden]
    start = time.perf_counter()
    executable = str(Path(sys.executable).with_name("grounded-sam"))
    command = [executable, *flags, *defaults, f"output={output}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def read_f1(output: Path) -> float:
    f1: float = json.loads((output / "metrics.json").read_text())["at_threshold"]["f1"]
    return f1


def cost(folder: Path, scenes: int, photos: list[Path]) -> None:
    """Compare the run time of a sweep with that of one run."""
    sample = folder / "sample"
    write_sample(sample, scenes, photos)
    single_s = run_command(sample, folder / "single", "select.score=0.1")
    sweep = ["select.score=0.1,0.15,0.2,0.25,0.3,0.35,0.4,0.5", "select.nms=0.5,0.7"]
    sweep_s = run_command(sample, folder / "sweep", "-m", *sweep)
    print((folder / "sweep" / "sweep.md").read_text())
    print(f"one run {single_s:.1f} s, sweep of sixteen jobs {sweep_s:.1f} s: {sweep_s / single_s:.2f} times")


def tune(folder: Path, scenes: int, photos: list[Path]) -> None:
    """Compare thresholds that are tuned on one half of the scenes on the other half."""
    tuning, test = folder / "tuning", folder / "test"
    write_sample(tuning, scenes // 2, photos, 61)
    write_sample(test, scenes - scenes // 2, photos, 62)
    space = [f"+select.class_score.{color}=interval(0.05,0.8)" for color in COLORS]
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=40", "hydra.sweeper.n_jobs=1"]
    optuna += ["hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=0", "metric=at_threshold.f1"]
    trials_s = run_command(tuning, folder / "trials", "-m", *optuna, *space)
    single_s = run_command(tuning, folder / "single", "select.score=0.05")
    print(f"40 trials {trials_s:.1f} s, one run for classes.yaml {single_s:.1f} s")
    for name, arguments in (
        ("the preset's own threshold", []),
        ("40 trials of Optuna", [f"--config-dir={folder / 'trials'}", "preset=best"]),
        ("classes.yaml of one run", [f"text={folder / 'single' / 'classes.yaml'}"]),
    ):
        run_command(test, folder / "result", *arguments)
        print(f"F1 on the other half, {name}: {read_f1(folder / 'result'):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["cost", "tune"])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"cost": cost, "tune": tune}[args.mode](Path(folder), args.scenes, photo_files(args.photos))


if __name__ == "__main__":
    main()
