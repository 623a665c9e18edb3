"""Accuracy of text-prompted tracking with the embedded models on new clips of an independent generator.

    python benchmarks/tracking.py --clips 20 [--occluded] [--photos FOLDER] [key=value ...]

Every clip (60 frames, 2 to 6 objects that move, cross, enter, leave and return; with `--occluded` look-alikes that
cross, full occlusions of 5 to 15 frames and a panning camera) is prompted with the color-shape pairs in it. Printed is
what `sink=metrics` measures: J&F as DAVIS 2017 defines it (unsupervised protocol: the Hungarian method assigns tracks
to objects; every frame counts; where an object is absent in ground truth and result, J and F are 1) and as SA-V does
(from an object's first frame on), HOTA, IDF1 and identity switches by trackeval.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from independent import photo_files, random_clip
from signed_distance import occluded_clip

from grounded_sam import load
from grounded_sam.evaluation.video_scores import VideoScores, mean_scores, trackeval_metrics


def evaluate_tracking(
    clips: int, photos: Path | None, overrides: list[str], seed: int = 77, frames: int = 60, occluded: bool = False
) -> dict[str, float]:
    """Track the objects of random clips, print the scores of each clip, and return the means.

    Args:
        clips: Number of clips.
        photos: Folder of photos for backgrounds.
        overrides: Overrides of the config, as on the command line.
        seed: Seed of the clips.
        frames: Number of frames of each clip.
        occluded: Whether objects are hidden and cross look-alikes, before a moving camera.
    """
    model: Any = load(*overrides, preset="shapes")
    photo_paths = photo_files(photos) if photos else []
    values: dict[str, list[float]] = {}
    seconds = 0.0
    for i in range(clips):
        make_clip = occluded_clip if occluded else random_clip
        images, objects = make_clip(np.random.default_rng([seed, i]), photo_paths, frames)
        text = sorted({f"{item.color} {item.shape}" for item in objects})
        video = VideoScores()
        start = time.perf_counter()
        for result in model.track(images, text):
            t, detections = result.frame.index, result.detections
            ground_truth = {n: item.masks[t] for n, item in enumerate(objects) if item.masks[t] is not None}
            ids = [] if detections.tracker_id is None else detections.tracker_id.tolist()
            video.add(ground_truth, dict(zip(ids, detections.mask if ids else [], strict=True)))
        seconds += time.perf_counter() - start
        jf = mean_scores(list(video.by_object().values()))
        tracking, _ = trackeval_metrics({"clip": video.for_trackeval()})
        scores = {"J&F": jf["davis_all_frames"]["JF"], "J&F sav": jf["sav"]["JF"]}
        scores |= {key: tracking[key] for key in ("HOTA", "IDF1", "IDSW")}
        for key, value in scores.items():
            values.setdefault(key, []).append(value)
        print(f"clip {i:2}  {len(objects)} objects  {_format(scores)}", flush=True)
    means = {key: float(np.mean(per_clip)) for key, per_clip in values.items()}
    print(f"mean  {_format(means)}   {seconds / clips / frames:.3f} s per frame")
    return means


def _format(scores: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.3f}" for key, value in scores.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument(
        "--occluded", action="store_true", help="clips with full occlusions, look-alikes and a panning camera"
    )
    parser.add_argument("--photos", type=Path, help="folder of photos for a quarter of the backgrounds")
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("overrides", nargs="*", help="as on the command line, e.g. track.redetect_every=5")
    args = parser.parse_args()
    evaluate_tracking(args.clips, args.photos, args.overrides, args.seed, occluded=args.occluded)
