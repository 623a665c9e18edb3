"""What the detectors of transformers share: loading, and queries of a model to classes of the user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checkpoints import cached_or_fetched, find_folder
from grounded_sam.detections import make_detections, pick
from grounded_sam.errors import CheckpointError, ConfigError
from grounded_sam.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor


def load_checkpoint(
    checkpoint: str, kinds: Sequence[str], model_kind: Any, part_kinds: Sequence[Any], dtype: Any
) -> tuple[Any, ...]:
    """A model of transformers, in evaluation mode, and what belongs to it, such as its processor.

    Args:
        checkpoint: a hub id, a local folder, or `builtin:NAME`.
        kinds: the `model_type`s that will do.
        model_kind: class that loads the model.
        part_kinds: classes that load the rest.
        dtype: torch's, of the weights.

    Raises:
        CheckpointError: if the checkpoint cannot be had, is damaged, lacks weights or is of another kind.
    """
    folder = find_folder(checkpoint, "detector")
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for the milliseconds of reading a file

    def load(local_files_only: bool) -> tuple[Any, ...]:
        safe = {"local_files_only": local_files_only, "trust_remote_code": False}
        kind = AutoConfig.from_pretrained(folder, **safe).model_type
        if kind not in kinds:
            raise CheckpointError(f"{checkpoint} is a {kind} checkpoint; expected {' or '.join(kinds)}")
        parts = [part.from_pretrained(folder, **safe) for part in part_kinds]
        return *model_kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **safe), *parts

    try:
        model, loaded, *parts = load(True) if Path(folder).is_dir() else cached_or_fetched(folder, load)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files make transformers and safetensors raise all sorts
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"cannot load {checkpoint}: {reason}") from error
    lacking = sorted([*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])])
    if lacking:
        raise CheckpointError(f"{checkpoint} lacks {len(lacking)} weights of its model, such as {lacking[0]}")
    return model.eval(), *parts


def load_detector(checkpoint: str, kinds: Sequence[str], dtype: Any) -> tuple[Any, Any]:
    """Processor and model of a zero-shot object detection checkpoint; see `load_checkpoint`."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    model, processor = load_checkpoint(checkpoint, kinds, AutoModelForZeroShotObjectDetection, [AutoProcessor], dtype)
    return processor, model


def check_settings(dtype: str, batch_size: int | None = 1) -> None:
    """Raises ConfigError for a dtype or a batch size that a detector cannot have."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"detector.dtype must be float32, bfloat16 or float16, got {dtype!r}")
    wrong = isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
    if batch_size is not None and wrong:
        raise ConfigError(f"detector.batch_size must be a whole number from 1, got {batch_size!r}")


def phrases_of(vocabulary: Vocabulary) -> tuple[list[str], list[int]]:
    """All phrases of a vocabulary, and of each its class, -1 for negatives."""
    named = [(phrase, i) for i, phrases in enumerate(vocabulary.phrases) for phrase in phrases]
    named += [(phrase, -1) for phrase in vocabulary.negatives]
    return [phrase for phrase, _ in named], [owner for _, owner in named]


def to_corners(boxes: Tensor, scale_wh: tuple[float, float]) -> NDArray[np.float32]:
    """Boxes `(q, 4)` as centre and size, 0 to 1, to corners in pixels."""
    centres = boxes.float().cpu().numpy()
    corners = np.concatenate([centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2], 1)
    return corners * np.array([*scale_wh, *scale_wh])


def of_queries(
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


def without_look_alikes(found: sv.Detections, boxes: NDArray[Any], scores: NDArray[Any]) -> sv.Detections:
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
    return pick(found, ~((overlap >= 0.5) & surer).any(1))
