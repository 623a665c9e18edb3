"""This pipeline against straight-line code, on the same weights, photo and thread count.

    python benchmarks/image.py PHOTO [--weights shapes|random] [--rounds 5] [--threads 1]

The reference calls transformers' Grounding DINO and `SAM2ImagePredictor` one after the other, as the
Hugging Face demo of Grounded-SAM-2 does (`grounded_sam2_hf_model_demo.py`), once in 32-bit floats like
ours and once under bf16 autocast as the demo has it. Both keep the same number of boxes. Each runs in
a process of its own, they take turns, and what is printed are ratios with their spread and each
process's peak memory. `--weights random` makes checkpoints of real size (Swin-T with BERT-base,
hiera-tiny) with random weights; `shapes` takes those that ship with the package.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
warnings.simplefilter("ignore")

WORDS = {"shapes": ["red circle", "blue square", "green star"], "random": ["car", "wheel", "truck"]}


def ours(args: argparse.Namespace) -> Callable[[], int]:
    from grounded_sam import load

    model = load(
        f"checkpoints.grounding_dino={args.dino}",
        f"checkpoints.sam2={args.sam2}",
        "select.score=0",
        "select.nms=null",
        "select.min_area=0",
        f"select.top_k={args.boxes}",
        device="cpu",
        text=WORDS[args.weights],
    )
    return lambda: len(model.segment(args.photo).mask)


def reference(args: argparse.Namespace, autocast: bool) -> Callable[[], int]:
    import numpy as np
    import torch
    from PIL import Image
    from sam2.sam2_image_predictor import SAM2ImagePredictor
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    from grounded_sam.checkpoints import find_file, find_folder
    from grounded_sam.segmenters.sam2 import Sam2, fit_predictor

    folder = find_folder(args.dino, "detector")
    processor = AutoProcessor.from_pretrained(folder)
    detector = AutoModelForZeroShotObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    assert find_file(args.sam2, "sam2")
    sam2 = Sam2(args.sam2, device="cpu").model
    predictor = fit_predictor(SAM2ImagePredictor(sam2), sam2)
    text = ". ".join(WORDS[args.weights]) + "."

    def run() -> int:
        image = Image.open(args.photo).convert("RGB")
        predictor.set_image(np.array(image))
        inputs = processor(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            out = detector(**inputs)
        found = processor.post_process_grounded_object_detection(
            out, inputs.input_ids, threshold=0.0, text_threshold=0.3, target_sizes=[image.size[::-1]]
        )[0]
        best = found["scores"].argsort(descending=True)[: args.boxes]
        boxes = found["boxes"][best].float().numpy()
        masks, _, _ = predictor.predict(point_coords=None, point_labels=None, box=boxes, multimask_output=False)
        return len(masks.reshape(-1, *masks.shape[-2:]))

    def cast() -> int:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run()

    return cast if autocast else run


def worker(args: argparse.Namespace) -> None:
    """Load, then run once for every line on standard input and answer with the seconds."""
    import torch

    torch.set_num_threads(args.threads)
    run = ours(args) if args.worker == "ours" else reference(args, args.worker == "reference-bf16")
    run()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        masks = run()
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_mib": peak, "masks": masks}), flush=True)


def checkpoints(args: argparse.Namespace, folder: Path) -> None:
    if args.weights == "shapes":
        args.dino = args.sam2 = "builtin:shapes"
        return
    from checkpoints import grounding_dino, sam2

    args.dino = str(grounding_dino(folder / "dino", full=True))
    args.sam2 = str(sam2(folder / "sam2.1_hiera_tiny.pt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--weights", choices=list(WORDS), default="random")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--boxes", type=int, default=8)
    for hidden in ("--worker", "--dino", "--sam2"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoints(args, Path(folder))
        compare(args)


def compare(args: argparse.Namespace) -> None:
    names = ["ours", "reference", "reference-bf16"]
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    command = [sys.executable, __file__, str(args.photo), "--weights", args.weights, "--threads", str(args.threads)]
    command += ["--boxes", str(args.boxes), "--dino", args.dino, "--sam2", args.sam2, "--worker"]
    running = {}
    for name in names:
        running[name] = subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if json.loads(running[name].stdout.readline() or "0") != "ready":
            sys.exit(f"the {name} process ended early")
    for _ in range(args.rounds):
        for name, process in running.items():
            process.stdin.write("\n")
            process.stdin.flush()
            answers[name].append(json.loads(process.stdout.readline()))
    for process in running.values():
        process.stdin.close()
        process.wait()
    print(
        f"{platform.machine()}, {args.threads} threads, {args.weights} weights, "
        f"{args.boxes} boxes, {args.rounds} rounds"
    )
    for name in names:
        seconds = [a["seconds"] for a in answers[name]]
        ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(answers[name], answers["ours"], strict=True))
        print(
            f"{name:15} {statistics.median(seconds):7.2f} s   "
            f"x{statistics.median(ratios):.2f} of ours ({ratios[0]:.2f} to {ratios[-1]:.2f})   "
            f"peak {max(a['peak_mib'] for a in answers[name]):,.0f} MiB   {answers[name][-1]['masks']} masks"
        )


if __name__ == "__main__":
    main()
