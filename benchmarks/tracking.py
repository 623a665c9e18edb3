"""Accuracy of text-queried tracking with the embedded models on fresh clips of an independent generator.

    python benchmarks/tracking.py --clips 20 [--photos FOLDER] [key=value ...]

Every clip (60 frames, 2 to 6 objects that move, cross, enter, leave and return) is asked for the
colour-shape pairs in it. Prints what `sink=metrics` measures: J&F as DAVIS 2017 has it (unsupervised protocol: tracks
are assigned to objects by the Hungarian method; every frame counts; where an object is absent in truth and result, J
and F are 1) and as SA-V has it (from an object's first frame on), HOTA, IDF1 and identity switches by trackeval.
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

from grounded_sam import load
from grounded_sam.evaluation import video_scores as track_scores


def run(clips: int, photos: Path | None, overrides: list[str], seed: int = 77, frames: int = 60) -> dict[str, float]:
    model: Any = load(*overrides, preset="shapes")
    files = pictures(photos) if photos else []
    totals: dict[str, list[float]] = {}
    seconds = 0.0
    for i in range(clips):
        images, things = clip(np.random.default_rng([seed, i]), files, frames)
        asked = sorted({f"{t.colour} {t.shape}" for t in things})
        video = track_scores.VideoScores()
        begin = time.perf_counter()
        for result in model.track(images, asked):
            t, found = result.frame.index, result.detections
            truth = {n: thing.masks[t] for n, thing in enumerate(things) if thing.masks[t] is not None}
            ids = [] if found.tracker_id is None else found.tracker_id.tolist()
            video.add(truth, dict(zip(ids, found.mask if ids else [], strict=True)))
        seconds += time.perf_counter() - begin
        rules = track_scores.mean(list(video.by_object().values()))
        followed, _ = track_scores.tracking({"clip": video.for_trackeval()})
        scores = {"J&F": rules["davis_all_frames"]["JF"], "J&F sav": rules["sav"]["JF"]}
        scores |= {key: followed[key] for key in ("HOTA", "IDF1", "IDSW")}
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
