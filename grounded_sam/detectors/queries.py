"""Helpers of the detectors that use transformers: settings, loading, and queries to detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_choice, check_int
from grounded_sam.structures.detections import make_detections, select_rows
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

Dtype = Literal["float32", "bfloat16", "float16"]
#: IoU from which a detection and a detection of a negative phrase are the same object.
NEGATIVE_IOU = 0.5


def load_detector(checkpoint: str, kinds: Sequence[str], dtype: Any) -> tuple[Any, Any]:
    """Load processor and model of a zero-shot object detection checkpoint; see `weights.loading.load_checkpoint`."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    model, processor = load_checkpoint(checkpoint, kinds, AutoModelForZeroShotObjectDetection, [AutoProcessor], dtype)
    return processor, model


def check_model_settings(dtype: str, batch_size: int | None = 1, stage: str = "detector") -> None:
    """Check the dtype and batch size of a model.

    Args:
        dtype: Type of weights and activations.
        batch_size: Images per forward pass; None for the default.
        stage: Config group, for messages.

    Raises:
        ConfigError: If one of them is not allowed.
    """
    check_choice(f"{stage}.dtype", dtype, ("float32", "bfloat16", "float16"))
    check_int(f"{stage}.batch_size", batch_size, 1, optional=True)


def phrases_of(vocabulary: Vocabulary) -> tuple[list[str], list[int]]:
    """Return all phrases of a vocabulary, and the class id of each, -1 for negatives.

    >>> phrases_of(Vocabulary.parse({"vehicle": ["car", "bus"]}, ["toy"]))
    (['car', 'bus', 'toy'], [0, 0, -1])
    """
    pairs = [(phrase, i) for i, phrases in enumerate(vocabulary.phrases) for phrase in phrases]
    pairs += [(phrase, -1) for phrase in vocabulary.negatives]
    return [phrase for phrase, _ in pairs], [class_id for _, class_id in pairs]


def cxcywh_to_xyxy(boxes: Tensor, scale_wh: tuple[float, float]) -> NDArray[np.float32]:
    """Convert normalized center, width and height `(n, 4)` to corners in pixels."""
    boxes_ = boxes.float().cpu().numpy()
    corners = np.concatenate([boxes_[:, :2] - boxes_[:, 2:] / 2, boxes_[:, :2] + boxes_[:, 2:] / 2], 1)
    return corners * np.array([*scale_wh, *scale_wh])


def detections_from_queries(
    scores: NDArray[Any],
    owners: Sequence[int],
    xyxy: NDArray[Any],
    vocabulary: Vocabulary,
    size_hw: tuple[int, int],
) -> sv.Detections:
    """Give each query the class of its best phrase, and drop the queries whose best phrase is a negative.

    Args:
        scores: `(queries, phrases)`, 0 to 1.
        owners: Class id of each phrase, -1 for a negative.
        xyxy: `(queries, 4)`, pixels.
        vocabulary: Classes that `class_id` refers to.
        size_hw: Height and width of the image.
    """
    best = scores.argmax(1)
    class_ids = np.asarray(owners)[best]
    positive = class_ids >= 0
    confidence = scores[np.arange(len(scores)), best]
    return make_detections(xyxy[positive], confidence[positive], class_ids[positive], vocabulary, size_hw)


def drop_negatives(detections: sv.Detections, boxes: NDArray[Any], scores: NDArray[Any]) -> sv.Detections:
    """Drop detections that a more confident box of a negative phrase overlaps, at an IoU of 0.5 or more.

    For models whose phrases do not compete with each other.

    Args:
        detections: Detections of the classes.
        boxes: Boxes of negative phrases, xyxy, `(n, 4)` pixels.
        scores: Their confidence, `(n,)`.
    """
    if not len(detections) or not len(boxes):
        return detections
    assert detections.confidence is not None
    overlap = sv.box_iou_batch(detections.xyxy, np.asarray(boxes, np.float32))
    more_confident = np.asarray(scores)[None] > detections.confidence[:, None]
    return select_rows(detections, ~((overlap >= NEGATIVE_IOU) & more_confident).any(1))
