"""The command `grounded-sam-export`: image backbones converted for other back ends, ahead of the runs that use them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grounded_sam.acceleration.backends import SIZES
from grounded_sam.config.build import build, build_source
from grounded_sam.config.compose import compose
from grounded_sam.errors import ConfigError, GroundedSamError
from grounded_sam.segmenters.base import PromptedSegmenter
from grounded_sam.structures.vocabulary import Vocabulary

if TYPE_CHECKING:
    from grounded_sam.structures.frame import Frame

HELP = """\
grounded-sam-export: convert image backbones to ONNX, for OpenVINO or ONNX Runtime on the CPU.

  grounded-sam-export backend=openvino exports=exports input=photo.jpg
  grounded-sam-export segmenter.backend=onnxruntime exports=exports input=photo.jpg segmenter.size=large
  grounded-sam backend=openvino exports=exports input=photos/ 'text=[car, wheel]'        (takes them from there)

Keys are those of grounded-sam. What runs on a picture of `input` is converted, compared with PyTorch on it, and written
if it is the same. Segmenters see pictures of one size only, for which any picture will do; the detector's backbone is
converted for each size among the pictures of `input`, up to four, for one picture at a time (detector.batch_size=1).
With a video the tracker's is converted too, if it is not the segmenter's.
A run with exports=FOLDER that finds no conversion there makes one and adds it, so that this command is for doing it
ahead, or elsewhere. The files are ONNX, one input, and run in what reads it.
"""


def export(words: Sequence[str]) -> Path:
    """Convert the backbones of the stages that a config gives to another back end; the folder where they lie.

    Raises:
        ConfigError: if it gives none to another, or says not where to put them; CheckpointError: if one cannot be had.
    """
    cfg = compose(words)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    if not any(_elsewhere(plain[key]) for key in ("detector", "segmenter", "tracker")):
        raise ConfigError("say what to convert for: backend=openvino or backend=onnxruntime; --help shows examples")
    if cfg.exports is None:
        raise ConfigError("say where to put conversions: exports=FOLDER")
    if cfg.input is None:
        raise ConfigError("say input=PICTURE, which shows sizes and is what conversions are checked on")
    cfg.cache.folder = None  # what is kept there would not be computed
    source, pipeline = build_source(cfg), build(cfg)
    vocabulary = pipeline.vocabulary or Vocabulary.parse("thing")
    seen: set[tuple[int, int]] = set()
    for item in source:
        frame: Any = getattr(item, "frame", item)
        if frame.size_hw in seen:
            continue
        if pipeline.detector is not None:
            pipeline.look([frame], vocabulary)
        if not seen and isinstance(pipeline.segmenter, PromptedSegmenter):
            pipeline.segmenter.encoded(frame.image)
        if frame.video is not None and _elsewhere(plain["tracker"]):
            _follow(pipeline.tracker, frame)
        seen.add(frame.size_hw)
        if len(seen) == SIZES or frame.video is not None:  # frames of a video are alike
            break
    if not seen:
        raise ConfigError(f"input={cfg.input} has no picture to check conversions on")
    return Path(cfg.exports).expanduser()


def _elsewhere(stage: Any) -> bool:
    """Whether a stage, or one in it, has a back end that is not PyTorch."""
    if not isinstance(stage, dict):
        return False
    return stage.get("backend", "torch") != "torch" or any(_elsewhere(part) for part in stage.values())


def _follow(tracker: Any, frame: Frame) -> None:
    """Let a tracker see a frame; one that shares the segmenter's model has done so already."""
    height, width = frame.size_hw
    whole = sv.Detections(
        xyxy=np.array([[0.0, 0.0, width, height]]),
        confidence=np.ones(1),
        class_id=np.zeros(1, int),
        tracker_id=np.ones(1, int),
    )
    session = tracker.open(frame.size_hw)
    session.step(frame.image)
    session.prompt(whole)
    session.close()


def lines(folder: Path) -> Iterator[str]:
    """What a folder of conversions holds."""
    for path in sorted(folder.glob("*/about.json")):
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        try:
            off = f"off by {json.loads(path.read_text(encoding='utf-8'))['off']:.0e} of the largest value"
        except (ValueError, KeyError, TypeError):  # not of this run
            off = "cannot be read; delete it"
        yield f"  {path.parent.name}: {size / 1e6:,.0f} MB, {off}"


def main() -> None:
    """Entry point: a user's mistake ends in one line and exit code 1."""
    words = sys.argv[1:]
    if not words or set(words) & {"-h", "--help"}:
        print(HELP, end="")
        return
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own stages, as `grounded-sam` has it
    try:
        folder = export(words)
    except (GroundedSamError, OmegaConfBaseException, OSError) as error:
        sys.exit(f"grounded-sam-export: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"conversions in {folder}:", *lines(folder), sep="\n")


if __name__ == "__main__":
    main()
