"""The command `grounded-sam-export`: convert image backbones for other back ends before the runs that use them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grounded_sam.acceleration.backends import MAX_LOADED_SIZES
from grounded_sam.config.build import build, build_source
from grounded_sam.config.compose import compose
from grounded_sam.errors import ConfigError, GroundedSamError
from grounded_sam.files import home_path
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import PromptableSegmenter, Tracker
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

HELP = """\
grounded-sam-export: convert image backbones to ONNX, for OpenVINO or ONNX Runtime on the CPU.

  grounded-sam-export backend=openvino export_dir=exports input=photo.jpg
  grounded-sam-export segmenter.backend=onnxruntime export_dir=exports input=photo.jpg segmenter.size=large
  grounded-sam backend=openvino export_dir=exports input=photos/ 'text=[car, wheel]'       (uses the conversions)

The keys are those of grounded-sam. Each backbone that runs on the images of `input` is converted, compared with PyTorch
on them, and written if the results agree. Segmenters resize all images to one size, so any image will do. The
detector's backbone is converted for each size among the images, up to four, for one image at a time
(detector.batch_size=1). With a video the tracker's backbone is converted too, if it is not the segmenter's.
A run with export_dir=FOLDER converts what the folder lacks and adds it, so this command is only needed to do so in
advance or on another machine. The files are plain ONNX with one input.
"""


def export(overrides: Sequence[str]) -> Path:
    """Convert the backbones of all stages whose back end is not PyTorch.

    Args:
        overrides: `key=value`, as for `grounded-sam`.

    Returns:
        The folder of the conversions.

    Raises:
        ConfigError: If no stage has another back end, or there is no folder or image.
        CheckpointError: If weights are missing, or a conversion fails.
    """
    cfg = compose(overrides)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    if not any(_has_other_backend(plain[key]) for key in ("detector", "segmenter", "tracker")):
        raise ConfigError("nothing to convert: set backend=openvino or backend=onnxruntime; --help shows examples")
    if cfg.export_dir is None:
        raise ConfigError("export_dir is missing: set export_dir=FOLDER, where conversions are written")
    if cfg.input is None:
        raise ConfigError("input is missing: set input=IMAGE, which gives the size and is used to verify conversions")
    cfg.cache.folder = None  # features that are cached would not be computed
    source, pipeline = build_source(cfg), build(cfg)
    vocabulary = pipeline.vocabulary or Vocabulary.parse("thing")
    sizes: set[tuple[int, int]] = set()
    for item in source:
        frame = item.frame if isinstance(item, FrameResult) else item
        if frame.size_hw in sizes:
            continue
        _run_backbones(pipeline, frame, vocabulary, first=not sizes, tracks=_has_other_backend(plain["tracker"]))
        sizes.add(frame.size_hw)
        if len(sizes) == MAX_LOADED_SIZES or frame.video is not None:  # frames of a video have one size
            break
    if not sizes:
        raise ConfigError(f"input={cfg.input} has no image to verify conversions on")
    return home_path(cfg.export_dir)


def _has_other_backend(stage: Any) -> bool:
    """Return whether a stage, or one inside it, has a back end that is not PyTorch."""
    if not isinstance(stage, dict):
        return False
    return stage.get("backend", "torch") != "torch" or any(_has_other_backend(part) for part in stage.values())


def _run_backbones(pipeline: Pipeline, frame: Frame, vocabulary: Vocabulary, first: bool, tracks: bool) -> None:
    """Run each backbone once, which converts it."""
    if pipeline.detector is not None:
        pipeline.stages.detect([frame], vocabulary)
    if first and isinstance(pipeline.segmenter, PromptableSegmenter):
        pipeline.segmenter.encode_image(frame.image)
    tracker = pipeline.tracker if tracks and frame.video is not None else None
    if isinstance(tracker, Tracker):
        _run_tracker(tracker, frame)


def _run_tracker(tracker: Tracker, frame: Frame) -> None:
    """Track one object in one frame; a tracker that shares the segmenter's model converts nothing new."""
    height, width = frame.size_hw
    whole_frame = sv.Detections(
        xyxy=np.array([[0.0, 0.0, width, height]]),
        confidence=np.ones(1),
        class_id=np.zeros(1, int),
        tracker_id=np.ones(1, int),
    )
    session = tracker.open(frame.size_hw)
    session.step(frame.image)
    session.prompt(whole_frame)
    session.close()


def describe(folder: Path) -> Iterator[str]:
    """Yield a line per conversion in a folder: its name, size and error."""
    for path in sorted(folder.glob("*/about.json")):
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        try:
            error = json.loads(path.read_text(encoding="utf-8"))["off"]
            text = f"largest error {error:.0e} of the largest value"
        except (ValueError, KeyError, TypeError):  # written by something else
            text = "cannot be read; delete it"
        yield f"  {path.parent.name}: {size / 1e6:,.0f} MB, {text}"


def main() -> None:
    """Run the command: a user's mistake ends with one line and exit code 1."""
    overrides = sys.argv[1:]
    if not overrides or set(overrides) & {"-h", "--help"}:
        print(HELP, end="")
        return
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for user-defined stages, as in `grounded-sam`
    try:
        folder = export(overrides)
    except (GroundedSamError, OmegaConfBaseException, OSError) as error:
        sys.exit(f"grounded-sam-export: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"Conversions in {folder}:", *describe(folder), sep="\n")


if __name__ == "__main__":
    main()
