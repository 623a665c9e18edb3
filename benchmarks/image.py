"""This pipeline against straight-line code, on the same weights, photo and thread count.

    python benchmarks/image.py PHOTO [--weights shapes|random] [--rounds 5] [--threads 1] [--only exact reference]

`exact`, `balanced` and `fast` are this package with that `precision`. `reference` calls transformers' Grounding DINO
and `SAM2ImagePredictor` one after the other, as the Hugging Face demo of Grounded-SAM-2 does
(`grounded_sam2_hf_model_demo.py`), in 32-bit floats; `reference-bf16` the same under bf16 autocast, as the demo has it.
`langsam` does what `LangSAM.predict` does (`lang_sam/lang_sam.py`): the detector's processor with padding, then
`set_image_batch` and `predict_batch`. All keep the same number of boxes.

Each runs in a process of its own, they take turns, and what is printed are ratios with their spread, each process's
peak memory, and how far logits, boxes and masks are from those of `reference`. `--weights random` makes checkpoints of
real size (Swin-T with BERT-base, hiera-tiny) with random weights none of which is zero; `shapes` takes those that ship
with the package.

Rates are the operations of the untouched networks, counted by PyTorch, by the time that they take here, as a share of
what this machine reaches in products of 2048x2048 matrices of 32-bit floats; folding leaves some operations out, so
that a share can be more than what was computed.
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
WORDS = {"shapes": ["red circle", "blue square", "green star"], "random": ["car", "wheel", "truck"]}


@dataclass
class Candidate:
    """What a worker runs and shows.

    Attributes:
        run: a photo to the number of masks.
        look: logits `(q, tokens)` and boxes `(q, 4)` of the detector for the reference's inputs.
        draw: a mask per box by hand.
        parts: the networks alone, by name.
    """

    run: Callable[[], int]
    look: Callable[[], tuple[Any, Any]]
    draw: Callable[[], Any]
    parts: dict[str, Callable[[], Any]]


def boxes_by_hand(photo: Path) -> Any:
    import numpy as np
    from PIL import Image

    width, height = Image.open(photo).size
    corners = np.random.default_rng(0).uniform(0, 0.6, (8, 2))
    return (np.concatenate([corners, corners + 0.35], 1) * [width, height, width, height]).astype(np.float32)


def inputs_of(args: argparse.Namespace) -> Any:
    """What the reference gives its detector."""
    from PIL import Image
    from transformers import AutoProcessor

    from grounded_sam.weights.loading import find_folder

    processor = AutoProcessor.from_pretrained(find_folder(args.dino, "detector"))
    text = ". ".join(WORDS[args.weights]) + "."
    return processor(images=Image.open(args.photo).convert("RGB"), text=text, return_tensors="pt")


def ours(args: argparse.Namespace, precision: str) -> Candidate:
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
        text=WORDS[args.weights],
    )
    image, given = read_image(args.photo), inputs_of(args)
    boxes = boxes_by_hand(args.photo)
    by_hand = sv.Detections(xyxy=boxes, confidence=np.ones(len(boxes)), class_id=np.zeros(len(boxes), int))

    def detect() -> Any:
        with torch.inference_mode():
            return model.detector.model(**given)

    def encode() -> None:
        model.segmenter.predictor.set_image(image)

    def look() -> tuple[Any, Any]:
        out = detect()
        return out.logits[0], out.pred_boxes[0]

    return Candidate(
        lambda: len(model.segment(args.photo).mask),
        look,
        lambda: model.segmenter.segment(image, by_hand).mask,
        {"detector": detect, "encoder": encode},
    )


def reference(args: argparse.Namespace, kind: str) -> Candidate:
    import numpy as np
    import sam2 as package
    import torch
    from PIL import Image
    from sam2.sam2_image_predictor import SAM2ImagePredictor
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    from grounded_sam.segmenters.sam2 import build_model, fit_predictor
    from grounded_sam.weights.loading import BUILTIN_DIR, find_file, find_folder

    folder = find_folder(args.dino, "detector")
    processor = AutoProcessor.from_pretrained(folder)
    detector = AutoModelForZeroShotObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    architecture = Path(package.__file__).parent / "configs" / "sam2.1" / "sam2.1_hiera_t.yaml"
    if args.weights == "shapes":
        architecture = BUILTIN_DIR.parent / "sam2.yaml"
    sam2 = build_model(architecture, find_file(args.sam2, "sam2"), "SAM 2.1 tiny")
    assert not any("forward" in vars(module) for module in sam2.modules())  # no lever of ours
    predictor = fit_predictor(SAM2ImagePredictor(sam2), sam2)
    text, given = ". ".join(WORDS[args.weights]) + ".", inputs_of(args)
    pixels = np.array(Image.open(args.photo).convert("RGB"))
    cast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "reference-bf16")

    def boxes_of(image: Any, inputs: Any) -> Any:
        with torch.no_grad():
            out = detector(**inputs)
        found = processor.post_process_grounded_object_detection(
            out, inputs.input_ids, threshold=0.0, text_threshold=0.3, target_sizes=[image.size[::-1]]
        )[0]
        return found["boxes"][found["scores"].argsort(descending=True)[: args.boxes]].float().numpy()

    def demo() -> int:
        image = Image.open(args.photo).convert("RGB")
        predictor.set_image(np.array(image))
        boxes = boxes_of(image, processor(images=image, text=text, return_tensors="pt"))
        masks, _, _ = predictor.predict(point_coords=None, point_labels=None, box=boxes, multimask_output=False)
        return len(masks.reshape(-1, *masks.shape[-2:]))

    def langsam() -> int:
        image = Image.open(args.photo).convert("RGB")
        boxes = boxes_of(image, processor(images=[image], text=[text], padding=True, return_tensors="pt"))
        predictor.set_image_batch([np.asarray(image)])
        masks, _, _ = predictor.predict_batch(box_batch=[boxes], multimask_output=False)
        return len(masks[0])

    def run() -> int:
        with cast:
            return langsam() if kind == "langsam" else demo()

    def detect() -> Any:
        with torch.no_grad(), cast:
            return detector(**given)

    def encode() -> None:
        with cast:
            predictor.set_image(pixels)

    def look() -> tuple[Any, Any]:
        out = detect()
        return out.logits[0], out.pred_boxes[0]

    def draw() -> Any:
        encode()
        with cast:
            box = boxes_by_hand(args.photo)
            masks, _, _ = predictor.predict(point_coords=None, point_labels=None, box=box, multimask_output=False)
        return masks.reshape(-1, *masks.shape[-2:]) > 0

    return Candidate(run, look, draw, {"detector": detect, "encoder": encode})


def rate() -> float:
    """Operations a second in products of large matrices."""
    import torch

    a, b = torch.randn(2, 2048, 2048)
    seconds = []
    for _ in range(8):
        begun = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - begun)
    return 2 * 2048**3 / min(seconds)


def operations(run: Callable[[], Any]) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])  # type: ignore[no-any-return]

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which PyTorch does not count
    with FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
        run()
    return counter.get_total_flops()


def worker(args: argparse.Namespace) -> None:
    """Load, show results once, then answer every line on standard input: `run`, or the name of a network."""
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    made = ours(args, args.worker) if args.worker in PRECISIONS else reference(args, args.worker)
    made.run()
    logits, boxes = made.look()
    np.savez(Path(args.folder) / f"{args.worker}.npz", logits=logits.float(), boxes=boxes.float(), masks=made.draw())
    told: dict[str, Any] = {"ready": True}
    if args.worker == "reference":
        told["operations"] = {name: operations(part) for name, part in made.parts.items()}
    print(json.dumps(told), flush=True)
    tasks = {"run": made.run, **made.parts}
    for line in sys.stdin:
        if line.strip() == "rate":
            print(json.dumps({"rate": rate()}), flush=True)
            continue
        begun = time.perf_counter()
        out = tasks[line.strip()]()
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        masks = out if isinstance(out, int) else None
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
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--compile", action="store_true", help="let torch.compile have this package's networks")
    parser.add_argument(
        "--backend", choices=("torch", "openvino", "onnxruntime"), default="torch", help="of this package's backbones"
    )
    for hidden in ("--worker", "--dino", "--sam2", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        checkpoints(args, Path(folder))
        compare(args)


class Worker:
    """A process that has loaded one candidate."""

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
        self.told = self._answer()
        if "ready" not in self.told:
            self.process.wait()
            self.log.seek(0)
            sys.exit(f"the {name} process ended early: {(self.log.read().splitlines() or [''])[-1]}")

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
        return answer

    def ask(self, task: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def apart(truth: Any, shown: Any) -> tuple[float, float, int]:
    """How far logits (as a share of the largest) and boxes are off, and how many queries have no like.

    The decoder's queries are the 900 places that the encoder ranks first. Places whose ranks differ by less than
    rounding change theirs, so that each query is compared with the one of the nearest box, and one whose nearest box
    is a thousandth of the picture away has been another place.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    far = np.abs(truth["boxes"][:, None] - shown["boxes"][None]).max(-1)
    there = np.isfinite(truth["logits"]).all(0)
    unlike = np.abs(truth["logits"][:, None, there] - shown["logits"][None][..., there]).max(-1)
    rows, columns = linear_sum_assignment(far + 1e-3 * unlike / unlike.max())
    same = far[rows, columns] < 1e-3
    largest = np.abs(truth["logits"][:, there]).max()
    if not same.any():
        return float("nan"), float("nan"), len(same)
    return unlike[rows, columns][same].max() / largest, far[rows, columns][same].max(), int((~same).sum())


def compare(args: argparse.Namespace) -> None:
    import numpy as np

    names = [name for name in NAMES if name in args.only]
    running = {name: Worker(args, name) for name in names}
    base = "reference" if "reference" in names else names[0]
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {
        task: {name: [] for name in names} for task in ("run", "detector", "encoder")
    }
    rates = []
    for _ in range(args.rounds):
        rates.append(running[base].ask("rate")["rate"])
        for task, by_name in answers.items():
            for name, process in running.items():
                by_name[name].append(process.ask(task))
    for process in running.values():
        process.end()
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sam2"))
    print(f"{datetime.now(UTC).date()}, {cpu[1] if cpu else platform.machine()}, {args.threads} threads, {packages}")
    how = f"{args.backend}{', compiled' if args.compile else ''}"
    print(f"{args.weights} weights, {how}, {args.boxes} boxes, {args.rounds} rounds")
    print(f"products of matrices: {statistics.median(rates) / 1e9:.0f} GFLOP/s")
    counted = running[base].told.get("operations")
    truth = np.load(Path(args.folder) / f"{base}.npz")
    for name in names:
        runs = answers["run"][name]
        seconds = [a["seconds"] for a in runs]
        ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(runs, answers["run"][base], strict=True))
        print(
            f"{name:15} {statistics.median(seconds):7.2f} s  {statistics.median(ratios):.2f} times as fast as {base} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})  peak {max(a['peak_mib'] for a in runs):,.0f} MiB  "
            f"{runs[-1]['masks']} masks"
        )
        line = []
        for task in ("detector", "encoder"):
            took = statistics.median(a["seconds"] for a in answers[task][name])
            share = f" ({counted[task] / took / statistics.median(rates):.0%} of that)" if counted else ""
            line.append(f"{task} {took:.2f} s{share}")
        shown = np.load(Path(args.folder) / f"{name}.npz")
        off, moved, lost = apart(truth, shown)
        both, either = ((f(shown["masks"], truth["masks"])).sum((1, 2)) for f in (np.logical_and, np.logical_or))
        line.append(f"logits off by {off:.1e} of the largest, boxes by {moved:.1e}, {lost} queries others")
        line.append(f"mask IoU {(both / np.maximum(either, 1)).min():.4f}")
        print(f"{'':15} {', '.join(line)}")


if __name__ == "__main__":
    main()
