"""Compare this pipeline with straight-line code, on the same weights, photo and number of threads.

    python benchmarks/image.py PHOTO [--weights shapes|random] [--rounds 5] [--threads 1] [--only exact reference]

`exact`, `balanced` and `fast` are this package with that `precision`. `reference` calls transformers' Grounding DINO
and `SAM2ImagePredictor` one after the other, as the Hugging Face demo of Grounded-SAM-2 does
(`grounded_sam2_hf_model_demo.py`), in fp32; `reference-bf16` runs the same under bf16 autocast, as the demo does.
`langsam` does what `LangSAM.predict` does (`lang_sam/lang_sam.py`): the detector's processor with padding, then
`set_image_batch` and `predict_batch`. All keep the same number of boxes.

Each candidate runs in its own process, and they take turns. Printed are speed ratios with their range, each process's
peak memory, and the differences of logits, boxes and masks from those of `reference`. `--weights random` makes
checkpoints of real size (Swin-T with BERT-base, hiera-tiny) with random weights, none of which is zero; `shapes` uses
the embedded ones.

Rates are the operations of the unmodified networks, counted by PyTorch, per second, as a share of the rate that this
machine reaches in products of 2048x2048 fp32 matrices. As folding saves some operations, a share can exceed what was
computed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
warnings.simplefilter("ignore")

PRECISIONS = ("exact", "balanced", "fast")
NAMES = [*PRECISIONS, "reference", "reference-bf16", "langsam"]
TEXT = {"shapes": ["red circle", "blue square", "green star"], "random": ["car", "wheel", "truck"]}


@dataclass
class Candidate:
    """What a worker can run.

    Attributes:
        run: Run the whole pipeline on the photo; return the number of masks.
        detect: Return the detector's logits `(q, tokens)` and boxes `(q, 4)` for the reference's inputs.
        segment: Return a mask for each prompt box, `(n, H, W) bool`.
        networks: Run one network alone, by name.
    """

    run: Callable[[], int]
    detect: Callable[[], tuple[Any, Any]]
    segment: Callable[[], Any]
    networks: dict[str, Callable[[], Any]]


def make_prompt_boxes(photo: Path) -> Any:
    """Make eight random boxes in the photo, xyxy in pixels, `(8, 4) float32`."""
    import numpy as np
    from PIL import Image

    width, height = Image.open(photo).size
    corners = np.random.default_rng(0).uniform(0, 0.6, (8, 2))
    return (np.concatenate([corners, corners + 0.35], 1) * [width, height, width, height]).astype(np.float32)


def detector_inputs(args: argparse.Namespace) -> Any:
    """Return the inputs of the detector, as the reference prepares them."""
    from PIL import Image
    from transformers import AutoProcessor

    from grounded_sam.weights.loading import find_folder

    processor = AutoProcessor.from_pretrained(find_folder(args.dino, "detector"))
    text = ". ".join(TEXT[args.weights]) + "."
    return processor(images=Image.open(args.photo).convert("RGB"), text=text, return_tensors="pt")


def load_package(args: argparse.Namespace, precision: str) -> Candidate:
    """Load this package at a precision."""
    import numpy as np
    import supervision as sv
    import torch

    from grounded_sam import load
    from grounded_sam.media.images import read_image

    model: Any = load(
        f"checkpoints.grounding_dino={args.dino}",
        f"checkpoints.sam2={args.sam2}",
        "select.score=0",
        "select.nms=null",
        "select.min_area=0",
        f"select.top_k={args.boxes}",
        device="cpu",
        precision=precision,
        compile=args.compile,
        backend=args.backend,
        text=TEXT[args.weights],
    )
    image, inputs = read_image(args.photo), detector_inputs(args)
    boxes = make_prompt_boxes(args.photo)
    prompts = sv.Detections(xyxy=boxes, confidence=np.ones(len(boxes)), class_id=np.zeros(len(boxes), int))

    def run_detector() -> Any:
        with torch.inference_mode():
            return model.detector.model(**inputs)

    def encode() -> None:
        model.segmenter.predictor.set_image(image)

    def detect() -> tuple[Any, Any]:
        out = run_detector()
        return out.logits[0], out.pred_boxes[0]

    return Candidate(
        lambda: len(model.segment(args.photo).mask),
        detect,
        lambda: model.segmenter.segment(image, prompts).mask,
        {"detector": run_detector, "encoder": encode},
    )


def load_reference(args: argparse.Namespace, kind: str) -> Candidate:
    """Load the networks as their authors publish them: `reference`, `reference-bf16` or `langsam`."""
    import numpy as np
    import sam2 as package
    import torch
    from PIL import Image
    from sam2.sam2_image_predictor import SAM2ImagePredictor
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    from grounded_sam.segmenters.sam2 import build_sam2, fit_predictor
    from grounded_sam.weights.loading import BUILTIN_DIR, find_file, find_folder

    folder = find_folder(args.dino, "detector")
    processor = AutoProcessor.from_pretrained(folder)
    detector = AutoModelForZeroShotObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    architecture = Path(package.__file__).parent / "configs" / "sam2.1" / "sam2.1_hiera_t.yaml"
    if args.weights == "shapes":
        architecture = BUILTIN_DIR.parent / "sam2.yaml"
    sam2 = build_sam2(architecture, find_file(args.sam2, "sam2"), "SAM 2.1 tiny")
    assert not any("forward" in vars(module) for module in sam2.modules())  # not patched by this package
    predictor = fit_predictor(SAM2ImagePredictor(sam2), sam2)
    text, inputs = ". ".join(TEXT[args.weights]) + ".", detector_inputs(args)
    pixels = np.array(Image.open(args.photo).convert("RGB"))
    cast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "reference-bf16")

    def detect_boxes(image: Any, inputs: Any) -> Any:
        with torch.no_grad():
            out = detector(**inputs)
        detections = processor.post_process_grounded_object_detection(
            out, inputs.input_ids, threshold=0.0, text_threshold=0.3, target_sizes=[image.size[::-1]]
        )[0]
        return detections["boxes"][detections["scores"].argsort(descending=True)[: args.boxes]].float().numpy()

    def demo() -> int:
        image = Image.open(args.photo).convert("RGB")
        predictor.set_image(np.array(image))
        boxes = detect_boxes(image, processor(images=image, text=text, return_tensors="pt"))
        masks, _, _ = predictor.predict(point_coords=None, point_labels=None, box=boxes, multimask_output=False)
        return len(masks.reshape(-1, *masks.shape[-2:]))

    def langsam() -> int:
        image = Image.open(args.photo).convert("RGB")
        boxes = detect_boxes(image, processor(images=[image], text=[text], padding=True, return_tensors="pt"))
        predictor.set_image_batch([np.asarray(image)])
        masks, _, _ = predictor.predict_batch(box_batch=[boxes], multimask_output=False)
        return len(masks[0])

    def run() -> int:
        with cast:
            return langsam() if kind == "langsam" else demo()

    def run_detector() -> Any:
        with torch.no_grad(), cast:
            return detector(**inputs)

    def encode() -> None:
        with cast:
            predictor.set_image(pixels)

    def detect() -> tuple[Any, Any]:
        out = run_detector()
        return out.logits[0], out.pred_boxes[0]

    def segment() -> Any:
        encode()
        with cast:
            boxes = make_prompt_boxes(args.photo)
            masks, _, _ = predictor.predict(point_coords=None, point_labels=None, box=boxes, multimask_output=False)
        return masks.reshape(-1, *masks.shape[-2:]) > 0

    return Candidate(run, detect, segment, {"detector": run_detector, "encoder": encode})


def matmul_rate() -> float:
    """Measure operations per second in products of large matrices."""
    import torch

    a, b = torch.randn(2, 2048, 2048)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def count_operations(run: Callable[[], Any]) -> int:
    """Count the floating-point operations of a function."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])  # type: ignore[no-any-return]

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # PyTorch does not count it
    with FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
        run()
    return counter.get_total_flops()


def worker(args: argparse.Namespace) -> None:
    """Load a candidate, write its results to a file, and run a task for every line on standard input.

    A task is `run`, the name of a network, or `rate` for the machine's rate of matrix products; the answer is a line of
    JSON.
    """
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    load = load_package if args.worker in PRECISIONS else load_reference
    candidate = load(args, args.worker)
    candidate.run()
    logits, boxes = candidate.detect()
    masks = candidate.segment()
    np.savez(Path(args.folder) / f"{args.worker}.npz", logits=logits.float(), boxes=boxes.float(), masks=masks)
    greeting: dict[str, Any] = {"ready": True}
    if args.worker == "reference":
        greeting["operations"] = {name: count_operations(run) for name, run in candidate.networks.items()}
    print(json.dumps(greeting), flush=True)
    tasks = {"run": candidate.run, **candidate.networks}
    for line in sys.stdin:
        if line.strip() == "rate":
            print(json.dumps({"rate": matmul_rate()}), flush=True)
            continue
        start = time.perf_counter()
        out = tasks[line.strip()]()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        num_masks = out if isinstance(out, int) else None
        print(json.dumps({"seconds": seconds, "peak_mib": peak, "masks": num_masks}), flush=True)


def set_checkpoints(args: argparse.Namespace, folder: Path) -> None:
    """Set `args.dino` and `args.sam2`, making random checkpoints in `folder` if they are asked for."""
    if args.weights == "shapes":
        args.dino = args.sam2 = "builtin:shapes"
        return
    from checkpoints import grounding_dino, sam2

    args.dino = str(grounding_dino(folder / "dino", full=True))
    args.sam2 = str(sam2(folder / "sam2.1_hiera_tiny.pt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--weights", choices=list(TEXT), default="random")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--boxes", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--compile", action="store_true", help="compile this package's networks")
    parser.add_argument(
        "--backend",
        choices=("torch", "openvino", "onnxruntime"),
        default="torch",
        help="backend of this package's backbones",
    )
    for hidden in ("--worker", "--dino", "--sam2", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        set_checkpoints(args, Path(folder))
        compare(args)


class Worker:
    """A process that has loaded one candidate.

    Args:
        args: The arguments of the command.
        name: The candidate.

    Attributes:
        greeting: What the process printed after loading.
    """

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        command = [sys.executable, __file__, str(args.photo), "--weights", args.weights, "--folder", args.folder]
        command += ["--boxes", str(args.boxes), "--dino", args.dino, "--sam2", args.sam2, "--worker", name]
        command += ["--threads", str(args.threads), *(["--compile"] if args.compile else [])]
        command += ["--backend", args.backend]
        self.log = (Path(args.folder) / f"{name}.log").open("w+")
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.greeting = self._read_answer()
        if "ready" not in self.greeting:
            self.process.wait()
            self.log.seek(0)
            sys.exit(f"the {name} process ended early: {(self.log.read().splitlines() or [''])[-1]}")

    def _read_answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
        return answer

    def request(self, task: str) -> dict[str, Any]:
        """Run a task and return its answer; see `worker`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        return self._read_answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Differences:
    """Largest differences of a candidate's detector outputs from the reference's.

    Attributes:
        logits: Difference of logits, as a share of the largest logit.
        boxes: Difference of box coordinates, as a share of the image's sides.
        other_queries: Number of queries that have no counterpart, and are not compared.
    """

    logits: float
    boxes: float
    other_queries: int


def compare_outputs(reference: Any, candidate: Any) -> Differences:
    """Compare the outputs of two detectors, query by query.

    The decoder's queries are the 900 positions that the encoder ranks highest. Rounding can swap positions of almost
    equal rank, so each query is compared with the one of the nearest box; if that box differs by a thousandth of the
    image or more, the query belongs to another position.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    box_differences = np.abs(reference["boxes"][:, None] - candidate["boxes"][None]).max(-1)
    is_token = np.isfinite(reference["logits"]).all(0)
    expected, actual = reference["logits"][:, is_token], candidate["logits"][:, is_token]
    logit_differences = np.abs(expected[:, None] - actual[None]).max(-1)
    rows, columns = linear_sum_assignment(box_differences + 1e-3 * logit_differences / logit_differences.max())
    is_same = box_differences[rows, columns] < 1e-3
    if not is_same.any():
        return Differences(float("nan"), float("nan"), len(is_same))
    return Differences(
        logit_differences[rows, columns][is_same].max() / np.abs(expected).max(),
        box_differences[rows, columns][is_same].max(),
        int((~is_same).sum()),
    )


Answers = dict[str, dict[str, list[dict[str, Any]]]]


def compare(args: argparse.Namespace) -> None:
    """Run all candidates in turns and print the comparison."""
    names = [name for name in NAMES if name in args.only]
    workers = {name: Worker(args, name) for name in names}
    baseline = "reference" if "reference" in names else names[0]
    answers: Answers = {task: {name: [] for name in names} for task in ("run", "detector", "encoder")}
    rates = []
    for _ in range(args.rounds):
        rates.append(workers[baseline].request("rate")["rate"])
        for task, by_name in answers.items():
            for name, process in workers.items():
                by_name[name].append(process.request(task))
    for process in workers.values():
        process.close()
    print_conditions(args, statistics.median(rates))
    operations = workers[baseline].greeting.get("operations")
    for name in names:
        print_speed(name, baseline, answers)
        networks = network_times(name, answers, operations, statistics.median(rates))
        print(f"{'':15} {', '.join([*networks, *output_differences(name, baseline, Path(args.folder))])}")


def print_conditions(args: argparse.Namespace, rate: float) -> None:
    """Print the machine, the versions, the settings and the rate of matrix products."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sam2"))
    print(f"{datetime.now(UTC).date()}, {cpu[1] if cpu else platform.machine()}, {args.threads} threads, {packages}")
    backend = f"{args.backend}{', compiled' if args.compile else ''}"
    print(f"{args.weights} weights, {backend}, {args.boxes} boxes, {args.rounds} rounds")
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s")


def print_speed(name: str, baseline: str, answers: Answers) -> None:
    """Print the run time of a candidate, absolute and relative to the baseline's, and its peak memory."""
    runs = answers["run"][name]
    seconds = statistics.median(run["seconds"] for run in runs)
    ratios = sorted(base["seconds"] / run["seconds"] for run, base in zip(runs, answers["run"][baseline], strict=True))
    print(
        f"{name:15} {seconds:7.2f} s  {statistics.median(ratios):.2f} times as fast as {baseline} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})  peak {max(run['peak_mib'] for run in runs):,.0f} MiB  "
        f"{runs[-1]['masks']} masks"
    )


def network_times(name: str, answers: Answers, operations: dict[str, int] | None, rate: float) -> list[str]:
    """Describe the run time of each network of a candidate, and its share of the rate of matrix products."""
    lines = []
    for network in ("detector", "encoder"):
        seconds = statistics.median(answer["seconds"] for answer in answers[network][name])
        share = f" ({operations[network] / seconds / rate:.0%} of the matrix rate)" if operations else ""
        lines.append(f"{network} {seconds:.2f} s{share}")
    return lines


def output_differences(name: str, baseline: str, folder: Path) -> list[str]:
    """Describe how the results of a candidate differ from the baseline's."""
    import numpy as np

    reference, candidate = np.load(folder / f"{baseline}.npz"), np.load(folder / f"{name}.npz")
    differences = compare_outputs(reference, candidate)
    intersection = (candidate["masks"] & reference["masks"]).sum((1, 2))
    union = (candidate["masks"] | reference["masks"]).sum((1, 2))
    return [
        f"logits differ by {differences.logits:.1e} of the largest, boxes by {differences.boxes:.1e}, "
        f"{differences.other_queries} other queries",
        f"mask IoU {(intersection / np.maximum(union, 1)).min():.4f}",
    ]


if __name__ == "__main__":
    main()
