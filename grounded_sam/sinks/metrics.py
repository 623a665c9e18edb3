"""How good it is: what was found against labels of the same images or videos."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from grounded_sam.config.hydra import in_sweep
from grounded_sam.errors import ConfigError
from grounded_sam.evaluation.image_metrics import ImageMetrics
from grounded_sam.evaluation.video_metrics import VideoMetrics
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.formats.video_masks import LabelledVideos
from grounded_sam.structures.vocabulary import Vocabulary


def metrics_sink(
    output: Path,
    vocabulary: Vocabulary,
    truth: str | Path | None = None,
    iou: float = 0.5,
    metric: str | None = None,
    errors: int | None = None,
    precision: float | None = None,
    objects: Literal["best", "ids", "one"] = "best",
) -> ImageMetrics | VideoMetrics:
    """Metrics of images or of videos, as the labels are.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        truth: labels; see `truth.read_truth`.
        iou, metric, precision: see `ImageMetrics`; `VideoMetrics` has the first two.
        errors: images drawn under `errors/`; None for 24, but none for a job of a sweep.
        objects: see `VideoMetrics`.

    Raises:
        ConfigError: for a value out of its range; if the truth cannot be read, or has not the classes asked for.
    """
    if truth is None:
        raise ConfigError("sink=metrics needs labels to measure against: truth=instances.json")
    if isinstance(iou, bool) or not isinstance(iou, int | float) or not 0 < iou <= 1:
        raise ConfigError(f"sink.metrics.iou must be a number above 0 and up to 1, got {iou!r}")
    if errors is None:
        errors = 0 if in_sweep() else 24
    if isinstance(errors, bool) or not isinstance(errors, int) or errors < 0:
        raise ConfigError(f"sink.metrics.errors must be a whole number from 0, got {errors!r}")
    if precision is not None and (isinstance(precision, bool) or not 0 < precision <= 1):
        raise ConfigError(f"sink.metrics.precision must be null or a number above 0 and up to 1, got {precision!r}")
    if objects not in ("best", "ids", "one"):
        raise ConfigError(f"sink.metrics.objects must be best, ids or one, got {objects!r}")
    labels = read_ground_truth(truth)
    if isinstance(labels, LabelledVideos):
        return VideoMetrics(output, vocabulary, labels, float(iou), metric, errors, objects)
    return ImageMetrics(output, vocabulary, labels, float(iou), metric, errors, precision)
