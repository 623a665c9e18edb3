"""Tracking with this package's session, sam2's `propagate_in_video` and transformers' streaming session.

    python benchmarks/video.py speed  --weights random --objects 1 4 8    seconds per frame and peak memory
    python benchmarks/video.py memory --weights shapes --frames 2000      resident memory over time

All use the same weights and frames. Each runs in its own process, in turns; this package's session runs with each
`precision`. `--weights random` is SAM 2.1 hiera-tiny at real size, `shapes` the embedded model. `speed` fills the
memory bank first, then times `--timed` frames; `--peers sam2` leaves transformers out. `memory` prints the resident
memory after 200 and after `--frames` frames for this package's session, and after 200 and 400 frames for the others,
which keep every frame.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SIZE_HW = (480, 854)
PRECISIONS = ("exact", "balanced", "fast")


def make_frames(count: int) -> Iterator[np.ndarray]:
    """Yield frames of moving shapes at DAVIS's size: a clip of 60, played forward and backward."""
    from grounded_sam.shapes.scenes import make_clip

    clip = [s.image for s in make_clip(np.random.default_rng(1), 60, count=4, size_hw=SIZE_HW)]
    for t in range(count):
        yield clip[min(t % 118, 118 - t % 118)]


def make_prompts(objects: int) -> np.ndarray:
    """Return masks for the first frame, rectangles side by side, `(objects, H, W) bool`."""
    masks = np.zeros((objects, *SIZE_HW), bool)
    for i, mask in enumerate(masks):
        mask[60 + 200 * (i % 2) : 200 + 200 * (i % 2), 20 + 100 * i : 110 + 100 * i] = True
    return masks


def find_checkpoint(weights: str) -> tuple[str, Path]:
    """Return a checkpoint of SAM 2 and the YAML file of its architecture."""
    import sam2
    import torch
    from omegaconf import OmegaConf

    from grounded_sam.weights.loading import BUILTIN_DIR

    if weights == "shapes":
        return "builtin:shapes", BUILTIN_DIR.parent / "sam2.yaml"
    architecture = Path(sam2.__file__).parent / "configs" / "sam2.1" / "sam2.1_hiera_t.yaml"
    path = Path(tempfile.gettempdir()) / "grounded_sam-random-hiera-tiny.pt"
    if not path.exists():
        from hydra.utils import instantiate

        torch.manual_seed(0)
        torch.save(instantiate(OmegaConf.load(architecture).model).state_dict(), path)
    return str(path), architecture


def build_base_model(weights: str) -> tuple[Any, Path]:
    """Return an unmodified `SAM2Base`, and the YAML file of its architecture."""
    from grounded_sam.segmenters.sam2 import build_sam2
    from grounded_sam.weights.loading import find_file

    checkpoint, architecture = find_checkpoint(weights)
    model = build_sam2(architecture, find_file(checkpoint, "sam2"), "SAM 2.1 tiny")
    model.binarize_mask_from_pts_for_mem_enc = True
    return model, architecture


def resident_mib() -> float:
    """Return the resident memory of this process in MiB."""
    import os

    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_package(weights: str, objects: int, count: int, precision: Any = "exact") -> Iterator[None]:
    """Track with this package's session; yield after every frame."""
    import supervision as sv

    from grounded_sam.acceleration.allocator import keep_freed_memory
    from grounded_sam.structures.masks import masks_to_xyxy
    from grounded_sam.trackers.sam2 import Sam2Tracker

    keep_freed_memory()
    checkpoint, _ = find_checkpoint(weights)
    session = Sam2Tracker(checkpoint=checkpoint, device="cpu", prompt="mask", precision=precision).open(SIZE_HW)
    masks = make_prompts(objects)
    for t, image in enumerate(make_frames(count)):
        session.step(image)
        if t == 0:
            ids = np.arange(1, objects + 1)
            session.prompt(sv.Detections(xyxy=masks_to_xyxy(masks), mask=masks, tracker_id=ids))
        yield


def run_sam2(weights: str, objects: int, count: int) -> Iterator[None]:
    """Track with sam2's video predictor; yield after every frame."""
    from PIL import Image
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    predictor, _ = build_base_model(weights)
    predictor.__class__ = SAM2VideoPredictor
    predictor.fill_hole_area, predictor.non_overlap_masks = 0, False
    predictor.clear_non_cond_mem_around_input = predictor.add_all_frames_to_correct_as_cond = False
    with tempfile.TemporaryDirectory() as folder:
        for t, image in enumerate(make_frames(count)):
            Image.fromarray(image).save(f"{folder}/{t:05d}.jpg", quality=95)
        state = predictor.init_state(folder)
    for i, mask in enumerate(make_prompts(objects)):
        predictor.add_new_mask(state, 0, i + 1, mask)
    for _, _, logits in predictor.propagate_in_video(state):
        (logits > 0).numpy()
        yield


def run_transformers(weights: str, objects: int, count: int) -> Iterator[None]:
    """Track with transformers' streaming session; yield after every frame."""
    import torch
    from transformers import Sam2VideoModel, Sam2VideoProcessor, Sam2VideoVideoProcessor
    from transformers.models.sam2 import Sam2ImageProcessor

    from grounded_sam.weights.sam2_conversion import rename_weights, video_config

    base, architecture = build_base_model(weights)
    model = Sam2VideoModel(video_config(architecture))
    model.load_state_dict(rename_weights(base.state_dict()))
    model.eval()
    del base
    side = model.config.image_size
    size, low = {"height": side, "width": side}, {"height": side // 4, "width": side // 4}
    processor = Sam2VideoProcessor(
        Sam2ImageProcessor(size=size, mask_size=low), Sam2VideoVideoProcessor(size=size), target_size=side
    )
    session = processor.init_video_session(inference_device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        for t, image in enumerate(make_frames(count)):
            inputs = processor(images=image, return_tensors="pt")
            if t == 0:
                processor.add_inputs_to_inference_session(
                    inference_session=session,
                    frame_idx=0,
                    obj_ids=list(range(1, objects + 1)),
                    input_masks=list(make_prompts(objects)),
                    original_size=SIZE_HW,
                )
            out = model(inference_session=session, frame=inputs.pixel_values[0])
            (processor.post_process_masks([out.pred_masks], [SIZE_HW], binarize=False)[0] > 0).numpy()
            yield


def work(args: argparse.Namespace) -> None:
    """Run one implementation in this process, and print a line of JSON at the end."""
    import resource

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    trackers = {"sam2": run_sam2, "transformers": run_transformers}
    trackers |= {name: partial(run_package, precision=name) for name in PRECISIONS}
    run = trackers[args.work]
    resident_after: dict[int, float] = {}
    times = []
    start = time.perf_counter()
    for t, _ in enumerate(run(args.weights, args.objects[0], args.frames)):
        now = time.perf_counter()
        times.append(now - start)
        start = now
        if t + 1 in (200, 400, args.frames):
            resident_after[t + 1] = resident_mib()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"s": float(np.median(times[-args.timed :])), "peak": peak, "resident_after": resident_after}))


def run_process(name: str, args: argparse.Namespace, objects: int, count: int) -> dict[str, Any]:
    """Run one implementation in a process of its own; see `work`."""
    arguments = [
        args.mode,
        "--work",
        name,
        "--weights",
        args.weights,
        "--objects",
        str(objects),
        "--frames",
        str(count),
    ]
    arguments += ["--timed", str(args.timed), "--threads", str(args.threads)]
    process = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(process.stderr)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def speed(args: argparse.Namespace) -> None:
    """Print seconds per frame and peak memory of all implementations."""
    for objects in args.objects:
        rows: dict[str, list[dict[str, Any]]] = {}
        for _ in range(args.rounds):
            for name in (*args.precisions, *args.peers):
                rows.setdefault(name, []).append(run_process(name, args, objects, args.fill + args.timed))
        baseline = min(row["s"] for row in rows["sam2"])
        for name, results in rows.items():
            seconds, peak = min(row["s"] for row in results), max(row["peak"] for row in results)
            line = f"{objects} objects  {name:12} {seconds:7.3f} s per frame  {seconds / baseline:.2f} of sam2's"
            print(f"{line}  peak {peak:,.0f} MiB", flush=True)


def memory(args: argparse.Namespace) -> None:
    """Print how resident memory grows."""
    for name, count in (
        ("exact", args.frames),
        ("sam2", 200),
        ("sam2", 400),
        ("transformers", 200),
        ("transformers", 400),
    ):
        result = run_process(name, args, args.objects[0], count)
        text = ", ".join(f"{mib:,.0f} MiB after {frame} frames" for frame, mib in result["resident_after"].items())
        values = list(result["resident_after"].values())
        growth = f"  ({100 * (values[-1] / values[0] - 1):+.1f}%)" if name == "exact" else ""
        print(
            f"{name:12} {count:5} frames, {args.objects[0]} objects: {text}{growth}; peak {result['peak']:,.0f} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["speed", "memory"])
    parser.add_argument("--weights", choices=["random", "shapes"], default="random")
    parser.add_argument("--objects", type=int, nargs="+", default=[3])
    parser.add_argument("--frames", type=int, default=2000, help="frames of `memory`, for this package's session")
    parser.add_argument("--fill", type=int, default=17, help="frames of `speed` before the timed ones")
    parser.add_argument("--timed", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--peers", nargs="+", choices=["sam2", "transformers"], default=["sam2", "transformers"])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
    else:
        {"speed": speed, "memory": memory}[args.mode](args)


if __name__ == "__main__":
    main()
