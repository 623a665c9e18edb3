"""Measure photos, videos and a labeling run on a GPU, beside straight-line code with the same weights.

    python benchmarks/cuda.py [--json FILE] [--only photo networks video label] [--rounds 20] [--photos 500]
    python benchmarks/cuda.py --device cpu --weights shapes --rounds 1 --photos 4 --frames 6 --objects 1   # a dry run

`photo`: a photo of 1280x853 px to 8 masks with this package at each precision, alone and in a list of 8, and with
transformers' Grounding DINO and `SAM2ImagePredictor` one after the other, as the demo of Grounded-SAM-2 does, in fp32
(`reference`) and under bf16 autocast (`reference-bf16`). `networks`: the detector, and the image encoder of SAM 2.1
tiny and large. `video`: 854x480, from JPEG files to masks, with this package's session and with sam2's video predictor
under bf16 autocast. `label`: a run of the command over `--photos` JPEG files with the sinks store and COCO, and with
overlays too.

All candidates of a section are loaded in this process and take turns; medians are printed with the 10th and 90th
percentile, the first call separately. Random weights are of real size (Swin-T with BERT-base, hiera-tiny and
hiera-large) and none is zero, as in `image.py`; no text of the photo is found, so the 8 best boxes are kept. `busy` is
the time in which kernels run, from PyTorch's profiler, as a share of the wall time; of a labeling run it is the share
that `nvidia-smi` reports. Shares of the card are operations of the unmodified networks per second, as a share of the
rate of products of 8192x8192 bf16 matrices. Distances are those from `reference`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
warnings.simplefilter("ignore")
os.environ["TQDM_DISABLE"] = "1"

SECTIONS = ("photo", "networks", "video", "label")
PRECISIONS = ("exact", "balanced", "fast")
BOXES, LIST = 8, 8
PHOTO_HW, VIDEO_HW = (853, 1280), (480, 854)
Row = dict[str, Any]


def synchronize(args: argparse.Namespace) -> None:
    """Wait for the device."""
    import torch

    if args.device == "cuda":
        torch.cuda.synchronize()


def time_in_turns(args: argparse.Namespace, candidates: dict[str, Callable[[], Any]]) -> dict[str, Row]:
    """Call every candidate `rounds` times, in turns after its first calls; return milliseconds by candidate."""
    rows: dict[str, Row] = {}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for name, run in candidates.items():
        rows[name] = {"first_ms": time_once(args, run)}
        for _ in range(args.warmup):
            run()
    for _ in range(args.rounds):
        for name, run in candidates.items():
            times[name].append(time_once(args, run))
    for name, run in candidates.items():
        ordered = sorted(times[name])
        tenth = len(ordered) // 10
        rows[name] |= {"ms": statistics.median(ordered), "p10": ordered[tenth], "p90": ordered[-1 - tenth]}
        rows[name]["busy"] = busy_share(args, run, rows[name]["ms"])
    return rows


def time_once(args: argparse.Namespace, run: Callable[[], Any]) -> float:
    """Return the milliseconds of a call, the device's work included."""
    synchronize(args)
    start = time.perf_counter()
    run()
    synchronize(args)
    return (time.perf_counter() - start) * 1e3


def busy_share(args: argparse.Namespace, run: Callable[[], Any], wall_ms: float) -> float | None:
    """Return the time in which kernels of a call run, as a share of its usual wall time; None without a GPU."""
    if args.device != "cuda":
        return None
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    busy, end = 0.0, 0.0
    for start, stop in sorted(kernels):  # kernels of several streams may overlap
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e3 / wall_ms


def peak_rate(args: argparse.Namespace) -> float:
    """Measure operations per second in products of large matrices, bf16 on a GPU."""
    import torch

    side = 8192 if args.device == "cuda" else 1024
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=args.device, dtype=dtype) for _ in range(2))
    best = min(time_once(args, lambda: torch.mm(a, b)) for _ in range(10))
    return 2 * side**3 / best * 1e3


def make_photo(seed: int, size_hw: tuple[int, int]) -> Any:
    """Make a picture of shapes on a textured background, RGB `(H, W, 3) uint8`."""
    import numpy as np

    from grounded_sam.shapes.scenes import make_scene

    return make_scene(np.random.default_rng(seed), count=BOXES, size_hw=size_hw).image


def text_of(args: argparse.Namespace) -> list[str]:
    """Return the phrases to look for."""
    return ["red circle", "blue square", "green star"] if args.weights == "shapes" else ["car", "wheel", "truck"]


def settings(args: argparse.Namespace, precision: str) -> list[str]:
    """Return the overrides of a run with this package."""
    return [
        "detector=grounding_dino",
        f"checkpoints.grounding_dino={args.dino}",
        f"checkpoints.sam2={args.sam2}",
        "select.score=0",
        "select.nms=null",
        "select.min_area=0",
        f"select.top_k={BOXES}",
        f"device={args.device}",
        f"precision={precision}",
        f"text=[{','.join(text_of(args))}]",
    ]


def load_reference(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Load processor and detector of transformers, and sam2's image predictor, without changes."""
    import torch
    from sam2.sam2_image_predictor import SAM2ImagePredictor
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    from grounded_sam.segmenters.sam2 import fit_predictor
    from grounded_sam.weights.loading import find_folder

    folder = find_folder(args.dino, "detector")
    processor = AutoProcessor.from_pretrained(folder)
    detector = AutoModelForZeroShotObjectDetection.from_pretrained(folder, dtype=torch.float32).eval().to(args.device)
    model = load_sam2(args, args.sam2, "sam2.1_hiera_t.yaml")
    return processor, detector, fit_predictor(SAM2ImagePredictor(model), model)


def load_sam2(args: argparse.Namespace, checkpoint: str, config: str) -> Any:
    """Load an unmodified `SAM2Base`."""
    import sam2 as package

    from grounded_sam.segmenters.sam2 import build_sam2
    from grounded_sam.weights.loading import BUILTIN_DIR, find_file

    architecture = Path(package.__file__).parent / "configs" / "sam2.1" / config
    if args.weights == "shapes":
        architecture = BUILTIN_DIR.parent / "sam2.yaml"
    return build_sam2(architecture, find_file(checkpoint, "sam2"), config).to(args.device)


def reference_runs(args: argparse.Namespace, path: Path) -> dict[str, Callable[[], Any]]:
    """Return the straight-line candidates: detector and predictor, one after the other."""
    import numpy as np
    import torch
    from PIL import Image

    processor, detector, predictor = load_reference(args)
    text = ". ".join(text_of(args)) + "."

    def run(autocast: bool) -> int:
        image = Image.open(path).convert("RGB")
        context = torch.autocast(args.device, torch.bfloat16) if autocast else nullcontext()
        with torch.inference_mode(), context:
            predictor.set_image(np.array(image))
            inputs = processor(images=image, text=text, return_tensors="pt").to(args.device)
            out = detector(**inputs)
            detections = processor.post_process_grounded_object_detection(
                out, inputs.input_ids, threshold=0.0, text_threshold=0.3, target_sizes=[image.size[::-1]]
            )[0]
            best = detections["boxes"][detections["scores"].argsort(descending=True)[:BOXES]]
            masks, _, _ = predictor.predict(box=best.float().cpu().numpy(), multimask_output=False)
        return len(masks)

    return {"reference": lambda: run(False), "reference-bf16": lambda: run(True)}


def measure_photo(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Time a photo from file to masks, alone and in a list."""
    from PIL import Image

    from grounded_sam import load

    path = folder / "photo.jpg"
    Image.fromarray(make_photo(0, PHOTO_HW)).save(path, quality=92)
    candidates = reference_runs(args, path)
    models: dict[str, Any] = {}
    for precision in args.precisions:
        start = time.perf_counter()
        models[precision] = load(*settings(args, precision))
        print(f"loaded {precision} in {time.perf_counter() - start:.1f} s", flush=True)
        candidates[precision] = lambda m=models[precision]: m.segment(str(path))
        candidates[f"{precision} list"] = lambda m=models[precision]: m.segment([str(path)] * LIST)
    rows = time_in_turns(args, candidates)
    for name, row in rows.items():
        row |= {"section": "photo", "name": name}
        if name.endswith("list"):
            row |= {key: row[key] / LIST for key in ("ms", "p10", "p90")}
        row["times"] = rows["reference"]["ms"] / row["ms"]
    distances = measure_distances(args, models, path)
    for name, distance in distances.items():
        rows[name] |= distance
    return list(rows.values())


def measure_distances(args: argparse.Namespace, models: dict[str, Any], path: Path) -> dict[str, Row]:
    """Return how far scores, boxes and masks of each precision are from those of the reference."""
    import numpy as np
    import supervision as sv
    import torch
    from image import make_prompt_boxes

    from grounded_sam.media.images import read_image
    from grounded_sam.structures.frame import to_frame
    from grounded_sam.structures.vocabulary import Vocabulary

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    image, boxes = read_image(path), make_prompt_boxes(path)
    prompts = sv.Detections(xyxy=boxes, confidence=np.ones(len(boxes)), class_id=np.zeros(len(boxes), int))
    processor, detector, predictor = load_reference(args)
    inputs = processor(images=image, text=". ".join(text_of(args)) + ".", return_tensors="pt").to(args.device)
    vocabulary = Vocabulary.parse(text_of(args))
    with torch.inference_mode():
        out = detector(**inputs)
        predictor.set_image(image)
        masks, _, _ = predictor.predict(box=boxes, multimask_output=False)
    expected_masks = masks.reshape(len(boxes), *masks.shape[-2:]) > 0
    height, width = image.shape[:2]
    centers, sizes = out.pred_boxes[0].float().cpu().split(2, -1)
    expected = (torch.cat([centers - sizes / 2, centers + sizes / 2], -1) * torch.tensor([width, height] * 2)).numpy()
    rows = {}
    for name, model in models.items():
        found = model.detector.detect([to_frame(path)], vocabulary)[0]
        overlap = sv.box_iou_batch(found.xyxy, expected)
        masks = np.asarray(model.segmenter.segment(image, prompts).mask, bool)
        iou = (masks & expected_masks).sum((1, 2)) / np.maximum((masks | expected_masks).sum((1, 2)), 1)
        rows[name] = {"box_iou": float(np.median(overlap.max(1))), "mask_iou": float(iou.min())}
    return rows


def measure_networks(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Time detector and image encoders alone, and their share of the card's rate."""
    import torch
    from image import count_operations

    from grounded_sam import load
    from grounded_sam.segmenters.sam2 import Sam2
    from grounded_sam.structures.frame import Frame
    from grounded_sam.structures.vocabulary import Vocabulary

    photo = make_photo(0, PHOTO_HW)
    frames, vocabulary = [Frame(pixels=photo)], Vocabulary.parse(text_of(args))
    processor, detector, predictor = load_reference(args)
    inputs = processor(images=photo, text=". ".join(text_of(args)) + ".", return_tensors="pt").to(args.device)

    def run_reference() -> Any:
        with torch.inference_mode():
            return detector(**inputs)

    def encode_reference() -> None:
        with torch.inference_mode():
            predictor.set_image(photo)

    rate = peak_rate(args)
    groups: dict[str, dict[str, Callable[[], Any]]] = {
        "detector": {"reference": run_reference},
        "encoder tiny": {"reference": encode_reference},
    }
    operations = {"detector": count_operations(run_reference), "encoder tiny": count_operations(encode_reference)}
    for precision in args.precisions:
        model = load(*settings(args, precision))
        groups["detector"][precision] = lambda m=model: m.detector.detect(frames, vocabulary)
        batch = [Frame(pixels=photo, index=i) for i in range(LIST)]
        groups["detector"][f"{precision} list"] = lambda m=model, b=batch: m.detector.detect(b, vocabulary)
        groups["encoder tiny"][precision] = lambda m=model: m.segmenter.encode_image(photo)
    if args.large and args.weights == "random":
        large = load_sam2(args, args.large, "sam2.1_hiera_l.yaml")
        from sam2.sam2_image_predictor import SAM2ImagePredictor

        large_predictor = SAM2ImagePredictor(large)

        def encode_large() -> None:
            with torch.inference_mode():
                large_predictor.set_image(photo)

        operations["encoder large"] = count_operations(encode_large)
        groups["encoder large"] = {"reference": encode_large}
        for precision in args.precisions:
            segmenter = Sam2(args.large, "large", device=args.device, precision=precision)
            groups["encoder large"][precision] = lambda s=segmenter: s.encode_image(photo)
    rows = []
    for group, candidates in groups.items():
        timed = time_in_turns(args, candidates)
        for name, row in timed.items():
            if name.endswith("list"):
                row |= {key: row[key] / LIST for key in ("ms", "p10", "p90")}
            row |= {"section": "networks", "name": f"{group}, {name}", "times": timed["reference"]["ms"] / row["ms"]}
            row["of_card"] = operations[group] / (row["ms"] / 1e3) / rate
            rows.append(row)
    return rows


def measure_video(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Time frames of a video, from JPEG files to masks."""
    from PIL import Image
    from video import make_frames

    frames = folder / "frames"
    frames.mkdir()
    for t, image in enumerate(make_frames(args.frames)):
        Image.fromarray(image).save(frames / f"{t:05d}.jpg", quality=95)
    predictor = video_predictor(args)
    trackers = {precision: load_tracker(args, precision) for precision in args.precisions}
    rows = []
    for objects in args.objects:
        seconds: dict[str, list[float]] = {}
        for _ in range(args.video_rounds + 1):  # the first round pays for first calls
            if objects <= args.reference_objects:
                seconds.setdefault("reference-bf16", []).append(
                    time_once(args, lambda n=objects: run_predictor(predictor, frames, n))
                )
            for name, tracker in trackers.items():
                seconds.setdefault(name, []).append(
                    time_once(args, lambda t=tracker, n=objects: run_tracker(t, frames, n))
                )
        baseline = statistics.median(seconds["reference-bf16"][1:]) if "reference-bf16" in seconds else None
        for name, (first, *others) in seconds.items():
            middle = statistics.median(others) / args.frames
            row = {"section": "video", "name": f"{objects} objects, {name}", "first_ms": first / args.frames}
            row |= {"ms": middle, "p10": min(others) / args.frames, "p90": max(others) / args.frames}
            row["times"] = None if baseline is None else baseline / args.frames / middle
            rows.append(row)
    return rows


def prompt_masks(objects: int) -> Any:
    """Return masks for the first frame, a grid of rectangles, `(objects, H, W) bool`."""
    import numpy as np

    masks = np.zeros((objects, *VIDEO_HW), bool)
    for i, mask in enumerate(masks):
        top, left = 40 + 84 * (i // 10), 4 + 85 * (i % 10)
        mask[top : top + 70, left : left + 75] = True
    return masks


def video_predictor(args: argparse.Namespace) -> Any:
    """Load sam2's video predictor."""
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    model = load_sam2(args, args.sam2, "sam2.1_hiera_t.yaml")
    model.__class__ = SAM2VideoPredictor
    model.fill_hole_area, model.non_overlap_masks = 0, False
    model.clear_non_cond_mem_around_input = model.add_all_frames_to_correct_as_cond = False
    model.binarize_mask_from_pts_for_mem_enc = True
    return model


def run_predictor(predictor: Any, frames: Path, objects: int) -> None:
    """Track with sam2's video predictor under bf16 autocast, loading included."""
    import torch

    device = predictor.device.type
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        state = predictor.init_state(str(frames))
        for i, mask in enumerate(prompt_masks(objects)):
            predictor.add_new_mask(state, 0, i + 1, mask)
        for _, _, logits in predictor.propagate_in_video(state):
            (logits > 0).cpu().numpy()


def load_tracker(args: argparse.Namespace, precision: str) -> Any:
    """Load this package's tracker."""
    from grounded_sam.trackers.sam2 import Sam2Tracker

    return Sam2Tracker(checkpoint=args.sam2, device=args.device, prompt="mask", precision=precision)


def run_tracker(tracker: Any, frames: Path, objects: int) -> None:
    """Track with this package's session, decoding included."""
    import numpy as np
    import supervision as sv

    from grounded_sam.media.prefetch import Prefetch
    from grounded_sam.sources.video import VideoSource
    from grounded_sam.structures.masks import masks_to_xyxy
    from grounded_sam.structures.protocols import EncodesAhead

    masks = prompt_masks(objects)
    session = tracker.open(VIDEO_HW)
    items = Prefetch(iter(VideoSource(frames)), 2)
    for t, frame in enumerate(items):
        following = items.peek()
        if following is not None and isinstance(session, EncodesAhead):
            session.encode_ahead(following.image)
        session.step(frame.image)
        if t == 0:
            ids = np.arange(1, objects + 1)
            session.prompt(sv.Detections(xyxy=masks_to_xyxy(masks), mask=masks, tracker_id=ids))
    session.close()


@contextmanager
def sampled_use(args: argparse.Namespace) -> Iterator[list[float]]:
    """Sample the use of the GPU that `nvidia-smi` reports, 0 to 1."""
    samples: list[float] = []
    if args.device != "cuda":
        yield samples
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout
        reader = Thread(target=lambda: samples.extend(float(line) / 100 for line in lines if line.strip().isdigit()))
        reader.start()
        try:
            yield samples
        finally:
            process.terminate()
            reader.join()


def measure_label(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Time labeling runs: images a second after the models are loaded, with and without overlays."""
    from PIL import Image

    from grounded_sam.config.build import build, build_sinks, build_source
    from grounded_sam.config.compose import compose
    from grounded_sam.pipeline.runner import Runner

    photos = folder / "photos"
    photos.mkdir()
    scenes = [make_photo(seed, PHOTO_HW) for seed in range(8)]
    for i in range(args.photos):
        scene = scenes[i % len(scenes)]
        scene[0, :8] = i % 256  # no file equals another
        Image.fromarray(scene).save(photos / f"{i:05d}.jpg", quality=92)
    rows: list[Row] = []
    for precision in args.precisions:
        for sinks in ("store,coco", "store,coco,overlay"):
            output = folder / f"out-{precision}-{sinks.count(',')}"
            overrides = [*settings(args, precision), f"input={photos}", f"output={output}", f"sink=[{sinks}]"]
            cfg = compose([*overrides, "source=images", "tracker=none"])
            pipeline = build(cfg)
            pipeline.segment([str(photos / "00000.jpg")] * LIST * 4)  # first calls
            request = pipeline.request()
            run = Runner(pipeline, build_source(cfg), build_sinks(cfg, output, request.classes), output, request)
            with sampled_use(args) as samples:
                start = time.perf_counter()
                count = run.run().images
                seconds = time.perf_counter() - start
            row = {"section": "label", "name": f"{precision}, {sinks}", "ms": 1e3 * seconds / count}
            row |= {"per_second": count / seconds, "busy": statistics.fmean(samples) if samples else None}
            row["stages_s"] = {key: round(value, 2) for key, value in pipeline.seconds.items()}
            rows.append(row)
    return rows


def describe(row: Row) -> str:
    """Return one line of the table."""
    parts = [f"{row['section']:9} {row['name']:32} {row['ms']:9.2f} ms"]
    if "p10" in row:
        parts.append(f"({row['p10']:.2f} to {row['p90']:.2f}), first {row['first_ms']:.0f} ms")
    if row.get("times") is not None:
        parts.append(f"{row['times']:.2f} times the reference")
    if row.get("per_second") is not None:
        parts.append(f"{row['per_second']:.1f} images a second, stages {row['stages_s']}")
    for key, label in (("busy", "busy"), ("of_card", "of the card")):
        if row.get(key) is not None:
            parts.append(f"{row[key]:.0%} {label}")
    for key in ("box_iou", "mask_iou"):
        if key in row:
            parts.append(f"{key} {row[key]:.4f}")
    return "  ".join(parts)


def conditions(args: argparse.Namespace) -> Row:
    """Return date, card and versions."""
    import torch

    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    packages = {name: version(name) for name in ("torch", "transformers", "sam2")}
    return {"date": str(datetime.now(UTC).date()), "card": card, "weights": args.weights, **packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["exact", "fast"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--weights", choices=["random", "shapes"], default="random")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=4, help="calls before the timed ones")
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 4, 16, 50])
    parser.add_argument("--reference-objects", type=int, default=16, help="most objects that sam2 tracks")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--video-rounds", type=int, default=2)
    parser.add_argument("--photos", type=int, default=500)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu --weights shapes tries the command out")
    measures = {"photo": measure_photo, "networks": measure_networks, "video": measure_video, "label": measure_label}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.dino = args.sam2 = "builtin:shapes"
        args.large = None
        if args.weights == "random":
            from checkpoints import grounding_dino, sam2

            args.dino = str(grounding_dino(folder / "dino", full=True))
            args.sam2 = str(sam2(folder / "sam2.1_hiera_tiny.pt"))
            args.large = str(sam2(folder / "sam2.1_hiera_large.pt", "sam2.1_hiera_l.yaml"))
        results: Row = {**conditions(args), "rows": []}
        print(json.dumps({key: value for key, value in results.items() if key != "rows"}), flush=True)
        for section in args.only:
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rows = measures[section](args, folder)
            results["rows"] += rows
            for row in rows:
                print(describe(row), flush=True)
            if args.device == "cuda":
                print(f"{section}: peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
            if args.json:  # after every section, so that a run that is cut short leaves something
                args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
