"""What the detectors of transformers share: loading, and queries of a model to classes of the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import make_detections, select_rows
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


def load_detector(checkpoint: str, kinds: Sequence[str], dtype: Any) -> tuple[Any, Any]:
    """Processor and model of a zero-shot object detection checkpoint; see `load_checkpoint`."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    model, processor = load_checkpoint(checkpoint, kinds, AutoModelForZeroShotObjectDetection, [AutoProcessor], dtype)
    return processor, model


def check_settings(dtype: str, batch_size: int | None = 1, stage: str = "detector") -> None:
    """Raises ConfigError for a dtype or a batch size that a stage cannot have."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"{stage}.dtype must be float32, bfloat16 or float16, got {dtype!r}")
    wrong = isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
    if batch_size is not None and wrong:
        raise ConfigError(f"{stage}.batch_size must be a whole number from 1, got {batch_size!r}")


def phrases_of(vocabulary: Vocabulary) -> tuple[list[str], list[int]]:
    """All phrases of a vocabulary, and of each its class, -1 for negatives."""
    named = [(phrase, i) for i, phrases in enumerate(vocabulary.phrases) for phrase in phrases]
    named += [(phrase, -1) for phrase in vocabulary.negatives]
    return [phrase for phrase, _ in named], [owner for _, owner in named]


def cxcywh_to_xyxy(boxes: Tensor, scale_wh: tuple[float, float]) -> NDArray[np.float32]:
    """Boxes `(q, 4)` as centre and size, 0 to 1, to corners in pixels."""
    centres = boxes.float().cpu().numpy()
    corners = np.concatenate([centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2], 1)
    return corners * np.array([*scale_wh, *scale_wh])


def detections_from_queries(
    scores: NDArray[Any],
    owners: Sequence[int],
    xyxy: NDArray[Any],
    vocabulary: Vocabulary,
    size_hw: tuple[int, int],
) -> sv.Detections:
    """One detection per query, of the class whose best phrase scores highest; queries that a negative wins are dropped.

    Args:
        scores: `(q, phrases)`, 0 to 1.
        owners: of each phrase its class, -1 for a negative.
        xyxy: `(q, 4)` pixels.
    """
    best = scores.argmax(1)
    owner = np.asarray(owners)[best]
    named = owner >= 0
    confidence = scores[np.arange(len(scores)), best]
    return make_detections(xyxy[named], confidence[named], owner[named], vocabulary, size_hw)


def drop_negatives(found: sv.Detections, boxes: NDArray[Any], scores: NDArray[Any]) -> sv.Detections:
    """Without what a surer box of a negative phrase overlaps, IoU from 0.5; for models whose phrases do not compete.

    Args:
        boxes: of negatives, `(n, 4)` pixels.
        scores: `(n,)`.
    """
    if not len(found) or not len(boxes):
        return found
    assert found.confidence is not None
    overlap = sv.box_iou_batch(found.xyxy, np.asarray(boxes, np.float32))
    surer = np.asarray(scores)[None] > found.confidence[:, None]
    return select_rows(found, ~((overlap >= 0.5) & surer).any(1))
