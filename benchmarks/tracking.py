"""Accuracy of text-queried tracking with the embedded models on fresh clips of an independent generator.

    python benchmarks/tracking.py --clips 20 [--photos FOLDER] [key=value ...]

Every clip (60 frames, 2 to 6 objects that move, cross, enter, leave and return) is asked for the
colour-shape pairs in it. Prints J&F, HOTA, IDF1 and identity switches by trackeval, and J&F by the
definition of DAVIS 2017 (unsupervised protocol: tracks are assigned to objects by the Hungarian method;
every frame counts; where an object is absent in truth and result, J and F are 1).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from independent import clip, pictures
from scores import Sequence, davis_j_and_f, trackeval_scores

from grounded_sam import load


def run(clips: int, photos: Path | None, overrides: list[str], seed: int = 77, frames: int = 60) -> dict[str, float]:
    model: Any = load(*overrides, preset="shapes")
    files = pictures(photos) if photos else []
    totals: dict[str, list[float]] = {}
    seconds = 0.0
    for i in range(clips):
        images, things = clip(np.random.default_rng([seed, i]), files, frames)
        asked = sorted({f"{t.colour} {t.shape}" for t in things})
        sequence = Sequence(things)
        begin = time.perf_counter()
        for result in model.track(images, asked):
            sequence.add(result.detections)
        seconds += time.perf_counter() - begin
        scores = trackeval_scores(sequence) | {"davis J&F": davis_j_and_f(sequence)}
        for key, value in scores.items():
            totals.setdefault(key, []).append(value)
        print(f"clip {i:2}  {len(things)} objects  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
    mean = {key: float(np.mean(values)) for key, values in totals.items()}
    print("mean  " + "  ".join(f"{k} {v:.3f}" for k, v in mean.items()), f"  {seconds / clips / frames:.3f} s a frame")
    return mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--photos", type=Path, help="folder of photos for a quarter of the backgrounds")
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("overrides", nargs="*", help="as for the command, e.g. track.redetect_every=5")
    args = parser.parse_args()
    run(args.clips, args.photos, args.overrides, args.seed)
