"""Every choice of detector, segmenter and tracker on the same photo and clip: size, speed, memory, what it can do.

    python benchmarks/models.py PHOTO --clip CLIP [--weights full|small] [--json FILE] [--readme README.md]
    python benchmarks/models.py PHOTO --clip CLIP --json FILE --only detector=owlv2 tracker=edgetam

The choices are the YAML files of `conf`, each run through `grounded_sam.load` in a process of its own on the CPU.
`--weights full` makes random checkpoints of real size (`tests/checkpoints.py`), `small` takes the embedded ones where
there are any and small random ones elsewhere. EdgeTAM and OmDet-Turbo have image encoders of timm; without timm others
stand in for them, which the table says.

Measured are parameters, seconds (median of 3 after one run to warm up) and the peak of resident memory in those runs:
detectors with three words and at most 8 boxes; segmenters with three boxes by hand; trackers a frame of the clip with
three boxes by hand on its first, the median of the last three of `--frames` (of one that finds things by itself, the
mean of all), without the time of a detector. What a choice can do is tried out: `text` words to boxes of those classes,
`masks` a detector's own, `clicks` a point (of a tracker: boxes) by hand, `everything` the segmenter under
detector=everything, `video` ids that go on from frame to frame (trackers are made to take what they follow for present,
which weights that never saw such a clip may not).
Licences of code are those in the metadata of the Python distribution that has the model's class, those of weights are
in `grounded_sam/weights/models.yaml`.

With `--json` rows are kept as they come, and a later run does only those that are missing, failed, had other weights or
are named by `--only`. `--readme` puts the table between the two marker lines of a Markdown file.
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
WORDS = ["car", "wheel", "sign"]
#: Choices that are no model of their own: nothing, and what an earlier run has stored.
PASSED_OVER = ("none", "stored")
#: Makers of checkpoints that have not the name of the checkpoint, and what they are told.
MAKERS = {name: ("grounding_dino", {"mm": True}) for name in ("mm_grounding_dino", "llmdet")}
#: What random weights need to be told, or take too long without, and what the table says of it.
SETTINGS = {
    "detector=florence2": (["detector.max_new_tokens=32"], "answers of 32 tokens, 3 beams"),
    "detector=everything": ([], "32x32 points"),
}
#: With these random weights find something, when all that is asked is whether a detector can.
LOOSE = {
    "everything": ["detector.points_per_side=4", "detector.pred_iou_thresh=0", "detector.stability_score_thresh=0"],
    "sam3": ["detector.floor=0"],
}
STAND_INS = {"edgetam": "Hiera-T for timm's RepViT-M1", "omdet_turbo": "transformers' Swin-T for timm's"}
OPEN = ["select.score=0", "select.nms=null", "select.min_area=0", "select.top_k=8", "device=cpu"]
BEGIN, END = "<!-- models: made by benchmarks/models.py -->", "<!-- /models -->"
LIMIT_S = 3600


def choices() -> list[str]:
    """`group=choice` of every YAML, without those that are passed over."""
    from grounded_sam.config.hydra import conf_dir

    found = [f"{group}={path.stem}" for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]
    return [name for name in found if name.partition("=")[2] not in PASSED_OVER]


def has(group: str, choice: str) -> bool:
    from grounded_sam.config.hydra import conf_dir

    return (conf_dir() / group / f"{choice}.yaml").is_file()


def checkpoint_names(node: Any) -> Iterator[str]:
    """The NAMEs of every `${checkpoints.NAME}` in a part of a config."""
    yield from dict.fromkeys(re.findall(r"\$\{checkpoints\.(\w+)\}", json.dumps(node)))


def plan(name: str) -> tuple[list[str], list[str], list[str]]:
    """The overrides that choose a stage alone, names of the checkpoints it takes, and their ids on the hub."""
    from omegaconf import OmegaConf

    from grounded_sam.config.compose import compose
    from grounded_sam.segmenters.sam2 import SIZES

    group, _, choice = name.partition("=")
    words = {"detector": "clicks", "segmenter": "none", "tracker": "none"} | {group: choice}
    if group == "tracker" and has("segmenter", choice):
        words["segmenter"] = choice  # shares the model
    overrides = [f"{key}={value}" for key, value in words.items()]
    cfg = OmegaConf.to_container(compose(overrides), resolve=False)
    if "${segmenter}" in json.dumps(cfg[group]):  # it takes the segmenter into its own hands
        overrides[1] = "segmenter=sam2"
        cfg = OmegaConf.to_container(compose(overrides), resolve=False)
        cfg[group]["segmenter"] = cfg["segmenter"]
    names = list(checkpoint_names(cfg[group]))
    return overrides, names, [cfg["checkpoints"].get(key) or SIZES["tiny"][0] for key in names]


def child(task: str, told: dict[str, Any], threads: int) -> str:
    """Do something in a process of its own; the last line that it prints.

    Raises:
        RuntimeError: with the last line of what it complained about.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "-", "--child", json.dumps({"task": task, **told})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {LIMIT_S} s") from None
    if done.returncode < 0:
        raise RuntimeError(f"ended by signal {-done.returncode}")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(re.sub(r"^[\w.]+\.(?=\w+Error)", "", lines[-1]) if lines else "ended without a word")
    return done.stdout.splitlines()[-1]


def make_checkpoint(told: dict[str, Any]) -> str:
    """Make a random checkpoint; prints where it is."""
    import checkpoints

    maker, extra = MAKERS.get(told["name"], (told["name"], {}))
    make = getattr(checkpoints, maker, None)
    if make is None:
        raise LookupError(f"tests/checkpoints.py has no maker {maker}")
    takes = inspect.signature(make).parameters
    place = Path(told["folder"]) / (f"{told['name']}.pt" if "path" in takes else told["name"])
    return str(make(place, **extra, **({"full": told["full"]} if "full" in takes else {})))


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one choice; of one that fails the reason."""
    from grounded_sam.config.hydra import conf_dir

    row: dict[str, Any] = {"asked": args.weights}
    try:
        words, names, hub = plan(name)
        row["hub"] = hub
        import yaml

        shapes = yaml.safe_load((conf_dir() / "preset" / "shapes.yaml").read_text())["checkpoints"]
        settings, note = SETTINGS.get(name, ([], ""))
        notes, kinds = [note] if note else [], []
        with tempfile.TemporaryDirectory() as folder:
            for key in names:
                place, kind = shapes.get(key), "embedded"
                if args.weights == "full" or place is None:
                    kind = "random, real size" if args.weights == "full" else "random, reduced"
                    told = {"name": key, "full": args.weights == "full", "folder": folder}
                    place = child("checkpoint", told, args.threads)
                    if key in STAND_INS and args.weights == "full" and not find_spec("timm"):
                        notes.append(STAND_INS[key])
                kinds.append(kind)
                words.append(f"checkpoints.{key}='{place}'")
            row["weights"] = "; ".join([" and ".join(dict.fromkeys(kinds)) or "none needed", *notes])
            told = {"name": name, "words": [*words, *settings], "threads": args.threads, "frames": args.frames}
            told |= {"takes": names, "photo": str(args.photo), "clip": str(args.clip)}
            row |= json.loads(child("stage", told, args.threads))
    except Exception as error:
        row["failed"] = " ".join(str(error).split())[:200] or type(error).__name__
    return row


def boxes_by_hand(size_hw: tuple[int, int]) -> str:
    """Three boxes side by side, as the override of detector=clicks."""
    height, width = size_hw
    box = [(0.05, 0.2, 0.3, 0.6), (0.35, 0.3, 0.65, 0.8), (0.7, 0.1, 0.95, 0.7)]
    scaled = [[round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)] for x0, y0, x1, y1 in box]
    return f"detector.prompts=[{','.join(f'{{class:thing,box:{entry}}}' for entry in scaled)}]"


def modules_of(stage: Any) -> list[Any]:
    """The outermost torch modules that an object holds, also within what it holds."""
    from torch import nn

    found: dict[int, Any] = {}
    seen: set[int] = set()
    stack = [stage]
    while stack:
        it = stack.pop()
        if id(it) in seen or isinstance(it, type | str | bytes):
            continue
        seen.add(id(it))
        if isinstance(it, nn.Module):
            found[id(it)] = it
        elif isinstance(it, dict):
            stack += it.values()
        elif isinstance(it, list | tuple):
            stack += it
        elif hasattr(it, "__dict__") and not inspect.isroutine(it) and not inspect.ismodule(it):
            stack += vars(it).values()
    return list(found.values())


def code_licence(package: str) -> str:
    """What the metadata of a distribution say, or else the first words of its licence."""
    held = distribution(packages_distributions().get(package, [package])[0])
    about = held.metadata
    classifiers = [c.rpartition(":: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License")]
    said = about.get("License-Expression") or about.get("License") or ", ".join(classifiers)
    if not said:
        files = [f for f in held.files or [] if f.name.upper().startswith(("LICENSE", "LICENCE"))]
        said = " ".join(files[0].read_text().split())[:40] if files else "?"
    return "Apache-2.0" if re.match(r"apache\b.*\b2\.0\b", said, re.I) else said.splitlines()[0]


def peak_mib() -> float:
    """The most that was resident of this process; unlike `ru_maxrss` not of the one that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def timed(run: Callable[[], Any]) -> float:
    """Median of 3, warm already."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def cost(stage: Any, seconds: float) -> dict[str, Any]:
    held = modules_of(stage)
    parameters = {id(p): p.numel() for module in held for p in module.parameters()}
    packages = dict.fromkeys(type(it).__module__.partition(".")[0] for it in held or [stage])
    return {
        "seconds": seconds,
        "mib": peak_mib(),
        "parameters": sum(parameters.values()) / 1e6,
        "code": ", ".join(dict.fromkeys(code_licence(package) for package in packages)),
    }


def names_of(found: Any) -> set[str]:
    return {str(name) for name in found.data.get("class_name", [])}


def detector(told: dict[str, Any], photo: Any) -> dict[str, Any]:
    from grounded_sam import GroundedSamError, load

    by_hand = "detector=clicks" in told["words"]
    model = load(*told["words"], *OPEN, *([boxes_by_hand(photo.shape[:2])] if by_hand else []))
    text: list[str] | None = WORDS
    try:
        found = model.detect(photo, text)
    except GroundedSamError:  # takes no words
        text = None
        found = model.detect(photo)
    row = cost(model.detector, timed(partial(model.detect, photo, text)))
    choice = told["name"].partition("=")[2]
    if not len(found) and choice in LOOSE:
        del model
        found = load(*told["words"], *OPEN, *LOOSE[choice]).detect(photo, text)
    there = len(found) > 0
    return row | {
        "text": text is not None and there and names_of(found) <= set(WORDS),
        "masks": there and found.mask is not None,
        "clicks": there if by_hand else None,
        "found": len(found),
    }


def segmenter(told: dict[str, Any], photo: Any) -> dict[str, Any]:
    from grounded_sam import GroundedSamError, load
    from grounded_sam.detectors.clicks import ClickDetector

    model = load(*told["words"], *OPEN, boxes_by_hand(photo.shape[:2]))
    found = model.segment(photo)
    if len(found) != 3 or found.mask is None:
        raise RuntimeError(f"gave {len(found)} masks for 3 boxes")
    row = cost(model.segmenter, timed(partial(model.segment, photo)))
    height, width = photo.shape[:2]
    model.detector = ClickDetector([{"class": "thing", "points": [[width // 2, height // 2]]}])
    try:
        clicked = model.segment(photo)
        row["clicks"] = len(clicked) == 1 and clicked.mask is not None
    except GroundedSamError:
        row["clicks"] = False
    del model
    try:
        words = ["detector=everything" if word == "detector=clicks" else word for word in told["words"]]
        load(*words, *OPEN, *LOOSE["everything"]).segment(photo)
        row["everything"] = True
    except GroundedSamError:
        row["everything"] = False
    return row


def say_present(stage: Any) -> None:
    """Let what is prompted count as seen in every frame: random weights would toss a coin, embedded ones say no."""
    import torch

    with torch.no_grad():
        for module in modules_of(stage):
            for name, weight in module.named_parameters():
                if re.search(r"pred_obj_score_head.*\.(layers\.2|proj_out)\.bias$", name):
                    weight.fill_(10.0)


def follow(told: dict[str, Any], words: list[str], text: list[str] | None) -> dict[str, Any]:
    """The frames of the clip through a pipeline: what it costs without the detector, and what came out."""
    from grounded_sam import load
    from grounded_sam.sources.video import VideoSource

    model = load(*words, *OPEN)
    say_present(model.tracker)
    seconds, ids, names = [], [], set()
    begin, detecting = time.perf_counter(), 0.0
    for result in model.track(VideoSource(told["clip"], stop=told["frames"]), text):
        found = result.detections
        seconds.append(time.perf_counter() - begin - (model.seconds["detect"] - detecting))
        ids.append(set() if found.tracker_id is None else set(found.tracker_id.tolist()))
        names |= names_of(found)
        begin, detecting = time.perf_counter(), model.seconds["detect"]
    # One that finds things by itself may hold frames back: then how they come says nothing, but how long all took.
    alone = hasattr(model.tracker, "follow")
    row = cost(model.tracker, statistics.mean(seconds) if alone else statistics.median(seconds[-3:]))
    row |= {"ids": [sorted(here) for here in ids], "names": sorted(names)}
    lasting = len(ids) == told["frames"] and any(a & b for a, b in pairwise(ids))
    return row | {"video": lasting if any(ids) else None}  # of nothing there is nothing to follow


def tracker(told: dict[str, Any], photo: Any) -> dict[str, Any]:
    from grounded_sam import GroundedSamError
    from grounded_sam.sources.video import VideoSource

    size_hw = next(iter(VideoSource(told["clip"]))).size_hw
    chosen = [word for word in told["words"] if not word.startswith(("detector=", "segmenter="))]
    ways: dict[str, tuple[list[str], list[str] | None]] = {
        "clicks": ([*told["words"], boxes_by_hand(size_hw)], None),
        "text": ([*chosen, "detector=none", "segmenter=none"], WORDS),
    }
    if not told["takes"]:  # it may need boxes in every frame
        fed = ["checkpoints.grounding_dino=builtin:shapes", "track.redetect_every=1", "segmenter=none"]
        ways["boxes"] = ([*chosen, *fed], WORDS)
    rows: dict[str, dict[str, Any]] = {}
    refused: list[GroundedSamError] = []
    for way, (words, text) in ways.items():
        try:
            rows[way] = follow(told, words, text)
        except GroundedSamError as error:
            refused.append(error)
        gc.collect()
    if not rows:
        raise refused[0]
    row = next((row for row in rows.values() if row["video"]), next(iter(rows.values())))
    seen = any(row["names"] for row in rows.values())
    # Random weights may find nothing, which says nothing of what others can.
    able = {
        way: (bool(rows[way]["names"]) or None) if way in rows else False if seen else None
        for way in ("clicks", "text")
    }
    note = {} if seen else {"note": "nothing was found"}
    return row | able | note | {"clip": f"{size_hw[1]}x{size_hw[0]}", "refused": [str(error) for error in refused]}


def run_stage(told: dict[str, Any]) -> str:
    import torch
    import transformers

    from grounded_sam.media.images import read_image

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(told["threads"])
    photo, group = read_image(told["photo"]), told["name"].partition("=")[0]
    row = {"detector": detector, "segmenter": segmenter, "tracker": tracker}[group](told, photo)
    if group != "tracker":
        row["photo"] = f"{photo.shape[1]}x{photo.shape[0]}"
    return json.dumps(row | {"with": conditions(told)})


def conditions(told: dict[str, Any]) -> str:
    """When and on what."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    packages = []
    for name in ("torch", "transformers", "sam2", "segment_anything", "timm"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"no {name}")
    machine = cpu[1].strip() if cpu else platform.machine()
    today = datetime.now(UTC).date()
    return f"{today}, {machine}, {told['threads']} threads, Python {platform.python_version()}, {', '.join(packages)}"


def weights_licence(hub: list[str]) -> str:
    """What `grounded_sam/weights/models.yaml` says of repositories on the hub."""
    import yaml

    path = Path(__file__).parents[1] / "grounded_sam" / "weights" / "models.yaml"
    known = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    said = []
    for name in hub:
        about = known.get(name) or {}
        said.append(str(about.get("licence") or "?") + (", gated" if about.get("gated") else ""))
    return "; ".join(dict.fromkeys(said))


def short(seconds: float) -> str:
    return "< 0.001" if seconds < 0.001 else f"{seconds:.{3 if seconds < 0.1 else 2 if seconds < 10 else 1}f}"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown, and a line on how they were made."""
    able = ["text", "masks", "clicks", "everything", "video"]
    head = ["stage", "choice", "weights", "parameters", "seconds", "peak MiB", *able]
    head += ["licence of code", "of weights", "measured with"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, row in rows.items():
        group, _, choice = name.partition("=")
        cells = [group, f"`{choice}`", ", ".join(row.get("hub", []))]
        if "failed" in row:
            cells += [""] * (len(head) - len(cells) - 2)
            cells += [weights_licence(row.get("hub", [])), f"failed: {row['failed']}".replace("|", "\\|")]
        else:
            cells.append(f"{row['parameters']:,.{0 if row['parameters'] >= 10 else 1}f} M" if row["parameters"] else "")
            cells += [short(row["seconds"]), f"{row['mib']:,.0f}"]
            cells += [{True: "yes", False: "no", None: ""}[row.get(key)] for key in able]
            measured = "; ".join([row["weights"], *([row["note"]] if "note" in row else [])])
            cells += [row["code"], weights_licence(row["hub"]), measured]
        lines.append(f"| {' | '.join(cells)} |")
    fine = [row for row in rows.values() if "failed" not in row]
    photos, clips = ({row[key] for row in fine if key in row} for key in ("photo", "clip"))
    sizes = [f"photo of {size} px" for size in sorted(photos)] + [f"clip of {size} px" for size in sorted(clips)]
    lines += ["", f"By `benchmarks/models.py`: {'; '.join([*sorted({row['with'] for row in fine}), *sizes])}."]
    return "\n".join(lines)


def into(readme: Path, text: str) -> None:
    """Replace what is between the marker lines."""
    old = readme.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        sys.exit(f"{readme} must have the line {BEGIN} and after it {END}, each once")
    before, rest = old.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--weights", choices=["full", "small"], default="full")
    parser.add_argument("--only", nargs="+", default=[], metavar="GROUP=CHOICE", help="measure these, anew")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=6, help="of the clip, for trackers")
    parser.add_argument("--json", type=Path, help="keeps the rows, and has those of earlier runs")
    parser.add_argument("--readme", type=Path, help="file whose table is replaced")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        told = json.loads(args.child)
        print(make_checkpoint(told) if told["task"] == "checkpoint" else run_stage(told))
        return
    known = choices()
    if wrong := [name for name in args.only if name not in known]:
        parser.error(f"there is no {', '.join(wrong)}; the choices are {', '.join(known)}")
    if args.clip is None or not args.clip.is_file() or not args.photo.is_file():
        parser.error("give a photo and --clip, both files")
    if args.readme and args.only and not args.json:
        parser.error("--readme with --only would leave all other rows out; keep them with --json")
    if args.readme:
        into(args.readme, args.readme.read_text(encoding="utf-8").split(BEGIN)[-1].split(END)[0].strip("\n"))
    rows: dict[str, dict[str, Any]] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in known:
        old = rows.get(name)
        kept = old is not None and "failed" not in old and old["asked"] == args.weights
        if name not in args.only if args.only else kept:
            continue
        begin = time.perf_counter()
        rows[name] = measure(name, args)
        outcome = rows[name].get("failed") or f"{rows[name]['seconds']:.2f} s, {rows[name]['mib']:,.0f} MiB"
        print(f"{name}: {outcome} (took {time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    text = table({name: rows[name] for name in known if name in rows})
    print(text)
    if args.readme:
        into(args.readme, text)


if __name__ == "__main__":
    main()
