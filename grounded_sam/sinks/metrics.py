"""Factory of the sink `metrics`, which measures a run against the labels of the same images or videos.

The sink itself is `evaluation.image_metrics.ImageMetrics` or `evaluation.video_metrics.VideoMetrics`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from grounded_sam.checks import check_choice, check_int, check_number
from grounded_sam.errors import ConfigError
from grounded_sam.evaluation.image_metrics import ImageMetrics
from grounded_sam.evaluation.video_metrics import VideoMetrics
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.formats.video_masks import LabelledVideos
from grounded_sam.hydra_state import in_sweep
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.output.paths import OutputPath
from grounded_sam.structures.vocabulary import Vocabulary


def metrics_sink(
    output: OutputPath,
    vocabulary: Vocabulary,
    truth: str | Path | None = None,
    iou: float = 0.5,
    metric: str | None = None,
    errors: int | None = None,
    precision: float | None = None,
    objects: Literal["best", "ids", "one"] = "best",
    frame_offset: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ImageMetrics | VideoMetrics:
    """Return the metrics for images or for videos, depending on the labels.

    Args:
        output: Folder of the run.
        vocabulary: Classes of the run.
        truth: Path of the ground truth; see `read_ground_truth` for its formats.
        iou: IoU at or above which a detection matches a label, above 0 and up to 1.
        metric: Name of the value that a sweep optimizes.
        errors: Number of images that are drawn in `errors/`; None for 24, or 0 in a sweep.
        precision: Precision that the thresholds in `classes.yaml` must reach; None for the best F1. Images only.
        objects: How tracks are matched to objects: best J&F, the same id, or all as one object. Videos only.
        frame_offset: What to add to the number of a frame for that of its labels; None to find out. Videos only.
        max_pixels: Larger images and masks of the ground truth are refused.

    Raises:
        ConfigError: If a value is out of range, or the ground truth cannot be read or lacks classes of the run.
    """
    if truth is None:
        raise ConfigError("sink=metrics needs ground truth: truth=instances.json")
    check_number("sink.metrics.iou", iou, 0, 1, above=True)
    check_int("sink.metrics.errors", errors, 0, optional=True)
    check_number("sink.metrics.precision", precision, 0, 1, above=True, optional=True)
    check_choice("sink.metrics.objects", objects, ("best", "ids", "one"))
    check_int("sink.metrics.frame_offset", frame_offset, -(2**31), optional=True)
    if errors is None:
        errors = 0 if in_sweep() else 24
    labels = read_ground_truth(truth, max_pixels)
    if isinstance(labels, LabelledVideos):
        return VideoMetrics(output, vocabulary, labels, float(iou), metric, errors, objects, frame_offset)
    return ImageMetrics(output, vocabulary, labels, float(iou), metric, errors, precision)


metrics_sink.takes_address = True  # type: ignore[attr-defined]  # see `structures.protocols.TakesAddress`
