"""Measure every detector, segmenter and tracker on the same photo and clip: size, speed, memory and abilities.

    python benchmarks/models.py PHOTO --clip CLIP [--weights full|small] [--json FILE] [--page docs/reference/models.md]
    python benchmarks/models.py PHOTO --clip CLIP --json FILE --only detector=owlv2 tracker=edgetam

The choices are the YAML files of `conf`; each runs through `grounded_sam.load` in a process of its own on the CPU.
`--weights full` makes random checkpoints of real size (`tests/checkpoints.py`); `small` uses the embedded ones, or
small random ones where there are none. The image encoders of EdgeTAM and OmDet-Turbo are from timm; without timm
others replace them, as the table then says.

Measured are the number of parameters, seconds (median of 3 runs after a warm-up) and peak resident memory: for
detectors with three classes and at most 8 boxes; for segmenters with three boxes as prompts; for trackers per frame of
the clip, with three boxes as prompts on its first frame, the median of the last three of `--frames` without the time of
the detector (for end-to-end trackers the mean of all frames). Abilities are tried out: `text` (boxes of the classes
that are prompted), `masks` (masks of the detector's own), `clicks` (a point as prompt; for trackers boxes),
`everything` (the segmenter under detector=everything), `video` (ids that persist from frame to frame; trackers are made
to predict that objects are present, since random weights may not).
Licenses of code are from the metadata of the Python distribution that has the model's class, those of weights and the
published accuracy (LVIS AP) from `grounded_sam/weights/models.yaml`.

With `--json`, rows are saved as they are measured, and a later run measures only those that are missing, failed, had
other weights or are named by `--only`. `--page` replaces the tables between two marker lines of a Markdown file.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
warnings.simplefilter("ignore")

GROUPS = ("detector", "segmenter", "tracker")
TEXT = ["car", "wheel", "sign"]
#: Choices that are not models, or need examples.
EXCLUDED = ("none", "stored", "prototypes")
#: Functions of `tests/checkpoints.py` that are not named after the checkpoint, and their arguments.
MAKERS: dict[str, tuple[str, dict[str, Any]]] = {"vlm": ("qwen3_vl", {})}
MAKERS |= {name: ("grounding_dino", {"mm": True}) for name in ("mm_grounding_dino", "llmdet")}
#: Overrides with which random weights finish in reasonable time, and what the table says about them.
SETTINGS = {
    "detector=florence2": (["detector.max_new_tokens=32"], "answers of 32 tokens, 3 beams"),
    "detector=vlm": (["detector.max_new_tokens=32"], "answers of 32 tokens, bfloat16"),
    "detector=everything": ([], "32x32 points"),
}
#: Overrides with which random weights detect something, to find out whether a choice can.
PERMISSIVE = {
    "everything": ["detector.points_per_side=4", "detector.pred_iou_thresh=0", "detector.stability_score_thresh=0"],
    "sam3": ["detector.min_score=0"],
    "sam3_lite_text": ["detector.min_score=0"],
}
REPLACEMENTS = {
    "edgetam": "Hiera-T for timm's RepViT-M1",
    "omdet_turbo": "transformers' Swin-T for timm's",
}
COMMON = ["select.score=0", "select.nms=null", "select.min_area=0", "select.top_k=8", "device=cpu"]
BEGIN, END = "<!-- models: made by benchmarks/models.py -->", "<!-- /models -->"
TIMEOUT_S = 3600


@dataclass(frozen=True)
class CheckpointTask:
    """Make a random checkpoint.

    Attributes:
        name: Name of the checkpoint in the config.
        full: Whether it has real size.
        folder: Folder to write it to.
    """

    name: str
    full: bool
    folder: str


@dataclass(frozen=True)
class StageTask:
    """Measure a stage.

    Attributes:
        name: `group=choice`.
        overrides: Overrides of the config.
        checkpoints: Names of the checkpoints that the stage uses.
        threads: Number of threads.
        frames: Number of frames of the clip.
        photo: Path of the photo.
        clip: Path of the clip.
    """

    name: str
    overrides: list[str]
    checkpoints: list[str]
    threads: int
    frames: int
    photo: str
    clip: str

    @property
    def choice(self) -> str:
        """The choice, without its group."""
        return self.name.partition("=")[2]


@dataclass(frozen=True)
class StageConfig:
    """How a stage is chosen.

    Attributes:
        overrides: Overrides that choose it alone.
        checkpoints: Names of the checkpoints that it uses.
        hub_ids: Their ids on the Hugging Face hub.
    """

    overrides: list[str]
    checkpoints: list[str]
    hub_ids: list[str]


def list_choices() -> list[str]:
    """Return `group=choice` for the YAML files of all models."""
    from grounded_sam.config.hydra import conf_dir

    names = [f"{group}={path.stem}" for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]
    return [name for name in names if name.partition("=")[2] not in EXCLUDED]


def has_choice(group: str, choice: str) -> bool:
    from grounded_sam.config.hydra import conf_dir

    return (conf_dir() / group / f"{choice}.yaml").is_file()


def checkpoint_names(node: Any) -> Iterator[str]:
    """Yield the NAMEs of every `${checkpoints.NAME}` in a part of a config."""
    yield from dict.fromkeys(re.findall(r"\$\{checkpoints\.(\w+)\}", json.dumps(node)))


def stage_config(name: str) -> StageConfig:
    """Return how `group=choice` is chosen without other models."""
    from omegaconf import OmegaConf

    from grounded_sam.config.compose import compose
    from grounded_sam.segmenters.sam2 import SIZES

    group, _, choice = name.partition("=")
    choices = {"detector": "clicks", "segmenter": "none", "tracker": "none"} | {group: choice}
    if group == "tracker" and has_choice("segmenter", choice):
        choices["segmenter"] = choice  # they share the model
    overrides = [f"{key}={value}" for key, value in choices.items()]
    cfg = OmegaConf.to_container(compose(overrides), resolve=False)
    if "${segmenter}" in json.dumps(cfg[group]):  # it uses the segmenter itself
        overrides[1] = "segmenter=sam2"
        cfg = OmegaConf.to_container(compose(overrides), resolve=False)
        cfg[group]["segmenter"] = cfg["segmenter"]
    names = list(checkpoint_names(cfg[group]))
    return StageConfig(overrides, names, [cfg["checkpoints"].get(key) or SIZES["tiny"][0] for key in names])


def run_process(task: CheckpointTask | StageTask, threads: int) -> str:
    """Run a task in a process of its own; return the last line that it prints.

    Raises:
        RuntimeError: If the process fails or takes too long, with the last line of its error output.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    description = json.dumps({"task": type(task).__name__, **asdict(task)})
    command = [sys.executable, __file__, "-", "--child", description]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {TIMEOUT_S} s") from None
    if process.returncode < 0:
        raise RuntimeError(f"ended by signal {-process.returncode}")
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        raise RuntimeError(re.sub(r"^[\w.]+\.(?=\w+Error)", "", lines[-1]) if lines else "failed without a message")
    return process.stdout.splitlines()[-1]


def run_task(description: str) -> str:
    """Run a task that `run_process` describes; return the line to print."""
    fields = json.loads(description)
    if fields.pop("task") == CheckpointTask.__name__:
        return make_checkpoint(CheckpointTask(**fields))
    return measure_stage(StageTask(**fields))


def make_checkpoint(task: CheckpointTask) -> str:
    """Make a random checkpoint; return its path."""
    import checkpoints

    maker, arguments = MAKERS.get(task.name, (task.name, {}))
    make = getattr(checkpoints, maker, None)
    if make is None:
        raise LookupError(f"tests/checkpoints.py has no function {maker}")
    parameters = inspect.signature(make).parameters
    path = Path(task.folder) / (f"{task.name}.pt" if "path" in parameters else task.name)
    return str(make(path, **arguments, **({"full": task.full} if "full" in parameters else {})))


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a choice; if it fails, with the reason."""
    row: dict[str, Any] = {"asked": args.weights}
    try:
        config = stage_config(name)
        row["hub"] = config.hub_ids
        settings, note = SETTINGS.get(name, ([], ""))
        with tempfile.TemporaryDirectory() as folder:
            overrides, kinds, notes = prepare_checkpoints(config.checkpoints, folder, args)
            notes = [note, *notes] if note else notes
            row["weights"] = "; ".join([" and ".join(dict.fromkeys(kinds)) or "none needed", *notes])
            task = StageTask(
                name=name,
                overrides=[*config.overrides, *overrides, *settings],
                checkpoints=config.checkpoints,
                threads=args.threads,
                frames=args.frames,
                photo=str(args.photo),
                clip=str(args.clip),
            )
            row |= json.loads(run_process(task, args.threads))
    except Exception as error:
        row["failed"] = " ".join(str(error).split())[:200] or type(error).__name__
    return row


def prepare_checkpoints(
    names: list[str], folder: str, args: argparse.Namespace
) -> tuple[list[str], list[str], list[str]]:
    """Find or make checkpoints; return the overrides that choose them, their kinds, and notes for the table."""
    import yaml

    from grounded_sam.config.hydra import conf_dir

    embedded = yaml.safe_load((conf_dir() / "preset" / "shapes.yaml").read_text())["checkpoints"]
    is_full = args.weights == "full"
    overrides, kinds, notes = [], [], []
    for name in names:
        path, kind = embedded.get(name), "embedded"
        if is_full or path is None:
            kind = "random, real size" if is_full else "random, reduced"
            path = run_process(CheckpointTask(name=name, full=is_full, folder=folder), args.threads)
            if name in REPLACEMENTS and is_full and not find_spec("timm"):
                notes.append(REPLACEMENTS[name])
        kinds.append(kind)
        overrides.append(f"checkpoints.{name}='{path}'")
    return overrides, kinds, notes


def prompt_boxes(size_hw: tuple[int, int]) -> str:
    """Return three boxes side by side as the override of detector=clicks."""
    height, width = size_hw
    boxes = [(0.05, 0.2, 0.3, 0.6), (0.35, 0.3, 0.65, 0.8), (0.7, 0.1, 0.95, 0.7)]
    scaled = [
        [round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)] for x0, y0, x1, y1 in boxes
    ]
    return f"detector.prompts=[{','.join(f'{{class:object,box:{box}}}' for box in scaled)}]"


def find_modules(stage: Any) -> list[Any]:
    """Return the outermost torch modules that an object refers to, directly or through other objects."""
    from torch import nn

    modules: dict[int, Any] = {}
    visited: set[int] = set()
    stack = [stage]
    while stack:
        value = stack.pop()
        if id(value) in visited or isinstance(value, type | str | bytes):
            continue
        visited.add(id(value))
        if isinstance(value, nn.Module):
            modules[id(value)] = value
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
        elif hasattr(value, "__dict__") and not inspect.isroutine(value) and not inspect.ismodule(value):
            stack += vars(value).values()
    return list(modules.values())


def code_license(package: str) -> str:
    """Return the license in the metadata of a distribution, or the first words of its license file."""
    installed = distribution(packages_distributions().get(package, [package])[0])
    metadata = installed.metadata
    classifiers = [c.rpartition(":: ")[2] for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    license_text = metadata.get("License-Expression") or metadata.get("License") or ", ".join(classifiers)
    if not license_text:
        files = [f for f in installed.files or [] if f.name.upper().startswith(("LICENSE", "LICENCE"))]
        license_text = " ".join(files[0].read_text().split())[:40] if files else "?"
    return "Apache-2.0" if re.match(r"apache\b.*\b2\.0\b", license_text, re.I) else license_text.splitlines()[0]


def peak_mib() -> float:
    """Return the peak resident memory of this process; `ru_maxrss` can be that of the parent process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def median_seconds(run: Callable[[], Any]) -> float:
    """Return the median run time of 3 calls."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def cost(stage: Any, seconds: float) -> dict[str, Any]:
    """Return the columns on size, speed, memory and license."""
    modules = find_modules(stage)
    parameters = {id(p): p.numel() for module in modules for p in module.parameters()}
    packages = dict.fromkeys(type(module).__module__.partition(".")[0] for module in modules or [stage])
    return {
        "seconds": seconds,
        "mib": peak_mib(),
        "parameters": sum(parameters.values()) / 1e6,
        "code": ", ".join(dict.fromkeys(code_license(package) for package in packages)),
    }


def class_names(detections: Any) -> set[str]:
    return {str(name) for name in detections.data.get("class_name", [])}


def measure_detector(task: StageTask, photo: Any) -> dict[str, Any]:
    from grounded_sam import GroundedSamError, load

    takes_clicks = "detector=clicks" in task.overrides
    model = load(*task.overrides, *COMMON, *([prompt_boxes(photo.shape[:2])] if takes_clicks else []))
    text: list[str] | None = TEXT
    try:
        detections = model.detect(photo, text)
    except GroundedSamError:  # it takes no text
        text = None
        detections = model.detect(photo)
    row = cost(model.detector, median_seconds(partial(model.detect, photo, text)))
    if not len(detections) and task.choice in PERMISSIVE:
        del model
        detections = load(*task.overrides, *COMMON, *PERMISSIVE[task.choice]).detect(photo, text)
    has_detections = len(detections) > 0
    return row | {
        "text": text is not None and has_detections and class_names(detections) <= set(TEXT),
        "masks": has_detections and detections.mask is not None,
        "clicks": has_detections if takes_clicks else None,
        "found": len(detections),
    }


def measure_segmenter(task: StageTask, photo: Any) -> dict[str, Any]:
    from grounded_sam import GroundedSamError, Pipeline, load
    from grounded_sam.detectors.clicks import ClickDetector

    height, width = photo.shape[:2]
    model = load(*task.overrides, *COMMON, prompt_boxes((height, width)))
    detections = model.segment(photo)
    if len(detections) != 3 or detections.mask is None:
        raise RuntimeError(f"returned {len(detections)} masks for 3 boxes")
    row = cost(model.segmenter, median_seconds(partial(model.segment, photo)))
    point = ClickDetector([{"class": "object", "points": [[width // 2, height // 2]]}])
    try:
        detections = Pipeline(point, model.segmenter, model.select).segment(photo)
        row["clicks"] = len(detections) == 1 and detections.mask is not None
    except GroundedSamError:
        row["clicks"] = False
    del model
    try:
        overrides = ["detector=everything" if word == "detector=clicks" else word for word in task.overrides]
        load(*overrides, *COMMON, *PERMISSIVE["everything"]).segment(photo)
        row["everything"] = True
    except GroundedSamError:
        row["everything"] = False
    return row


def predict_present(stage: Any) -> None:
    """Make a tracker predict that objects are present: random weights predict it at random, embedded ones do not."""
    import torch

    with torch.no_grad():
        for module in find_modules(stage):
            for name, weight in module.named_parameters():
                if re.search(r"pred_obj_score_head.*\.(layers\.2|proj_out)\.bias$", name):
                    weight.fill_(10.0)


def track_clip(task: StageTask, overrides: list[str], text: list[str] | None) -> dict[str, Any]:
    """Track through the clip; return the cost without the detector, and the ids and classes of the objects."""
    from grounded_sam import load
    from grounded_sam.sources.video import VideoSource
    from grounded_sam.structures.protocols import EndToEndTracker, TextTracker

    model = load(*overrides, *COMMON)
    predict_present(model.tracker)
    seconds, ids, names = [], [], set()
    start, detector_s = time.perf_counter(), 0.0
    for result in model.track(VideoSource(task.clip, stop=task.frames), text):
        detections = result.detections
        seconds.append(time.perf_counter() - start - (model.seconds["detect"] - detector_s))
        ids.append(set() if detections.tracker_id is None else set(detections.tracker_id.tolist()))
        names |= class_names(detections)
        start, detector_s = time.perf_counter(), model.seconds["detect"]
    # End-to-end trackers may hold frames back, so that the time of a single frame means nothing.
    is_end_to_end = isinstance(model.tracker, EndToEndTracker | TextTracker)
    row = cost(model.tracker, statistics.mean(seconds) if is_end_to_end else statistics.median(seconds[-3:]))
    row |= {"ids": [sorted(frame_ids) for frame_ids in ids], "names": sorted(names)}
    persists = len(ids) == task.frames and any(a & b for a, b in pairwise(ids))
    return row | {"video": persists if any(ids) else None}  # unknown without objects


def measure_tracker(task: StageTask, photo: Any) -> dict[str, Any]:
    from grounded_sam import GroundedSamError
    from grounded_sam.sources.video import VideoSource

    size_hw = next(iter(VideoSource(task.clip))).size_hw
    tracker_only = [word for word in task.overrides if not word.startswith(("detector=", "segmenter="))]
    prompts: dict[str, tuple[list[str], list[str] | None]] = {
        "clicks": ([*task.overrides, prompt_boxes(size_hw)], None),
        "text": ([*tracker_only, "detector=none", "segmenter=none"], TEXT),
    }
    if not task.checkpoints:  # it may need detections on every frame
        detector = ["checkpoints.grounding_dino=builtin:shapes", "track.redetect_every=1", "segmenter=none"]
        prompts["boxes"] = ([*tracker_only, *detector], TEXT)
    rows: dict[str, dict[str, Any]] = {}
    errors: list[GroundedSamError] = []
    for kind, (overrides, text) in prompts.items():
        try:
            rows[kind] = track_clip(task, overrides, text)
        except GroundedSamError as error:
            errors.append(error)
        gc.collect()
    if not rows:
        raise errors[0]
    row = next((row for row in rows.values() if row["video"]), next(iter(rows.values())))
    has_objects = any(row["names"] for row in rows.values())
    # Where random weights find no object, nothing is known about the abilities.
    abilities: dict[str, bool | None] = {}
    for kind in ("clicks", "text"):
        if kind in rows:
            abilities[kind] = bool(rows[kind]["names"]) or None
        else:
            abilities[kind] = False if has_objects else None
    note = {} if has_objects else {"note": "nothing was found"}
    return row | abilities | note | {"clip": f"{size_hw[1]}x{size_hw[0]}", "refused": [str(error) for error in errors]}


def measure_stage(task: StageTask) -> str:
    """Measure a stage in this process; return its columns as JSON."""
    import torch
    import transformers

    from grounded_sam.media.images import read_image

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(task.threads)
    photo, group = read_image(Path(task.photo)), task.name.partition("=")[0]
    measures = {"detector": measure_detector, "segmenter": measure_segmenter, "tracker": measure_tracker}
    row = measures[group](task, photo)
    if group != "tracker":
        row["photo"] = f"{photo.shape[1]}x{photo.shape[0]}"
    return json.dumps(row | {"with": describe_conditions(task.threads)})


def describe_conditions(threads: int) -> str:
    """Return the date, the machine and the versions."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    packages = []
    for name in ("torch", "transformers", "sam2", "segment_anything", "timm"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"no {name}")
    machine = cpu[1].strip() if cpu else platform.machine()
    today = datetime.now(UTC).date()
    return f"{today}, {machine}, {threads} threads, Python {platform.python_version()}, {', '.join(packages)}"


def read_known_models() -> dict[str, dict[str, Any]]:
    """Return what `grounded_sam/weights/models.yaml` says about repositories on the hub."""
    import yaml

    path = Path(__file__).parents[1] / "grounded_sam" / "weights" / "models.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def published_accuracy(hub_ids: list[str]) -> str:
    """Return the published zero-shot accuracy of a detector; empty if there is none, or it has several models."""
    return str((read_known_models().get(hub_ids[0]) or {}).get("lvis", "")) if len(hub_ids) == 1 else ""


def weights_license(hub_ids: list[str]) -> str:
    """Return the licenses of repositories on the hub."""
    models, licenses = read_known_models(), []
    for hub_id in hub_ids:
        entry = models.get(hub_id) or {}
        licenses.append(str(entry.get("license") or "?") + (", gated" if entry.get("gated") else ""))
    return "; ".join(dict.fromkeys(licenses))


def format_seconds(seconds: float) -> str:
    return "< 0.001" if seconds < 0.001 else f"{seconds:.{3 if seconds < 0.1 else 2 if seconds < 10 else 1}f}"


ABILITIES = ["text", "masks", "clicks", "everything", "video"]


def format_tables(rows: dict[str, dict[str, Any]]) -> str:
    """Format the rows as two Markdown tables, of abilities and of costs, with a line on the conditions."""
    abilities = [["stage", "choice", *ABILITIES, "LVIS AP", "license of code", "license of weights"]]
    costs = [["stage", "choice", "weights", "parameters", "seconds", "peak MiB", "note"]]
    for name, row in rows.items():
        group, _, choice = name.partition("=")
        start, hub_ids = [group, f"`{choice}`"], row.get("hub", [])
        tried = [{True: "yes", False: "no", None: ""}[row.get(key)] for key in ABILITIES]
        accuracy = published_accuracy(hub_ids) if group == "detector" else ""
        abilities.append([*start, *tried, accuracy, row.get("code", ""), weights_license(hub_ids)])
        costs.append([*start, ", ".join(hub_ids), *format_costs(row)])
    measured = [row for row in rows.values() if "failed" not in row]
    photos, clips = ({row[key] for row in measured if key in row} for key in ("photo", "clip"))
    sizes = [f"photo of {size} px" for size in sorted(photos)] + [f"clip of {size} px" for size in sorted(clips)]
    conditions = f"By `benchmarks/models.py`: {'; '.join([*sorted({row['with'] for row in measured}), *sizes])}."
    return "\n\n".join([markdown_table(abilities), markdown_table(costs), conditions])


def format_costs(row: dict[str, Any]) -> list[str]:
    """Return the cells of parameters, seconds, memory and what was special about the measurement."""
    if "failed" in row:
        return ["", "", "", f"failed: {row['failed']}".replace("|", "\\|")]
    parameters = f"{row['parameters']:,.{0 if row['parameters'] >= 10 else 1}f} M" if row["parameters"] else ""
    usual = row["weights"] in ("random, real size", "none needed")
    notes = [*([] if usual else [row["weights"]]), *([row["note"]] if "note" in row else [])]
    return [parameters, format_seconds(row["seconds"]), f"{row['mib']:,.0f}", "; ".join(notes)]


def markdown_table(rows: list[list[str]]) -> str:
    """Format rows, the first of which is the header."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def replace_table(page: Path, text: str) -> None:
    """Replace what is between the marker lines."""
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        sys.exit(f"{page} must contain the lines {BEGIN} and {END}, in this order and once each")
    before, rest = old.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--weights", choices=["full", "small"], default="full")
    parser.add_argument("--only", nargs="+", default=[], metavar="GROUP=CHOICE", help="measure only these, again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=6, help="number of frames of the clip, for trackers")
    parser.add_argument("--json", type=Path, help="file to save rows in; rows of earlier runs are reused")
    parser.add_argument("--page", type=Path, help="Markdown file whose tables are replaced")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(run_task(args.child))
        return
    choices = list_choices()
    if unknown := [name for name in args.only if name not in choices]:
        parser.error(f"unknown choice {', '.join(unknown)}; the choices are {', '.join(choices)}")
    if args.clip is None or not args.clip.is_file() or not args.photo.is_file():
        parser.error("PHOTO and --clip must be files")
    if args.page and args.only and not args.json:
        parser.error("--page with --only requires --json, to keep the other rows")
    if args.page:  # fails now, not after the measurements, if there are no markers
        replace_table(args.page, args.page.read_text(encoding="utf-8").split(BEGIN)[-1].split(END)[0].strip("\n"))
    rows: dict[str, dict[str, Any]] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in choices:
        old = rows.get(name)
        is_measured = old is not None and "failed" not in old and old["asked"] == args.weights
        if name not in args.only if args.only else is_measured:
            continue
        start = time.perf_counter()
        rows[name] = measure(name, args)
        outcome = rows[name].get("failed") or f"{rows[name]['seconds']:.2f} s, {rows[name]['mib']:,.0f} MiB"
        print(f"{name}: {outcome} (took {time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    text = format_tables({name: rows[name] for name in choices if name in rows})
    print(text)
    if args.page:
        replace_table(args.page, text)


if __name__ == "__main__":
    main()
