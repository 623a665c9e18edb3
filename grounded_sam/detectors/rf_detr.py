"""RF-DETR with masks (Robinson et al. 2025), with transformers: a fast detector of the classes of its training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_bool, check_number
from grounded_sam.detectors.queries import Dtype, check_model_settings, cxcywh_to_xyxy, phrases_of
from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import DetectorTraits
from grounded_sam.structures.results import Skipped
from grounded_sam.structures.vocabulary import Vocabulary, name_key
from grounded_sam.weights.loading import load_checkpoint, pick_device

if TYPE_CHECKING:
    from torch import Tensor

#: Labels of checkpoints that are no classes.
NO_CLASS = re.compile(r"|n/?a|background|label_\d+|__\w+__", re.I)


class RfDetr:
    """Detect and segment the classes of an RF-DETR checkpoint, such as the 80 of COCO.

    A class of the vocabulary is found where one of its phrases is a label of the model, without case and spacing.
    Phrases that the model does not know are named in `take_refused`. Scores, boxes and masks are those of
    `RfDetrImageProcessor`: the most confident pairs of query and class, as many as there are queries. Queries whose
    best label is a negative phrase are dropped.

    Args:
        checkpoint: Hub id or local folder of an `RfDetrForInstanceSegmentation`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        own_masks: Return RF-DETR's masks; False returns boxes, for a segmenter.
        min_score: Detections below this confidence are dropped, since each has a mask of the size of the image.

    Attributes:
        vocabulary: Classes of the model, for runs without text.

    Raises:
        CheckpointError: If the checkpoint is missing, or of another model family.
    """

    def __init__(
        self,
        checkpoint: str = "Roboflow/rf-detr-seg-medium",
        device: str = "auto",
        dtype: Dtype = "float32",
        own_masks: bool = True,
        min_score: float = 0.05,
    ) -> None:
        check_model_settings(dtype)
        check_bool("detector.own_masks", own_masks)
        check_number("detector.min_score", min_score, 0, 1)
        import torch
        import transformers
        from transformers import AutoImageProcessor

        self.device, self.dtype = pick_device(device), getattr(torch, dtype)
        self.own_masks, self.min_score = own_masks, min_score
        model_class = getattr(transformers, "RfDetrForInstanceSegmentation", None)  # not in older versions
        loaded = load_checkpoint(checkpoint, ["rf_detr"], model_class, [AutoImageProcessor], self.dtype)
        model, self.image_processor = loaded
        self.model = model.to(self.device)
        labels = {int(i): str(name) for i, name in model.config.id2label.items()}
        names = {i: name for i, name in sorted(labels.items()) if not NO_CLASS.fullmatch(name)}
        #: Place of each label among the logits, by its name without case and spacing.
        self.labels = {name_key(name): i for i, name in reversed(list(names.items()))}
        classes = tuple(dict.fromkeys(names.values()))
        self.vocabulary = Vocabulary(classes, tuple((name,) for name in classes), queried=False) if classes else None
        self._refused: list[Skipped] = []
        self._checked: set[Vocabulary] = set()

    @classmethod
    def traits(cls, settings: Mapping[str, Any]) -> DetectorTraits:
        """Declare masks unless `own_masks` is false."""
        own_masks = settings.get("own_masks", True) is True
        return DetectorTraits(masks=own_masks, replaces_segmenter=own_masks)

    def take_refused(self) -> list[Skipped]:
        """Return which phrases the model does not know, once for each vocabulary, and forget it."""
        refused, self._refused = self._refused, []
        self._checked.clear()
        return refused

    def _columns(self, vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
        """Return the label of each phrase that the model knows, and its class id, -1 for negatives.

        Raises:
            ConfigError: If it knows none.
        """
        known, unknown = [], []
        for phrase, owner in zip(*phrases_of(vocabulary), strict=True):
            label = self.labels.get(name_key(phrase))
            if label is not None:
                known.append((label, owner))
            else:
                unknown.append(phrase)
        names = ", ".join(self.vocabulary.classes if self.vocabulary is not None else ())
        if all(owner < 0 for _, owner in known):
            raise ConfigError(
                f"detector=rf_detr knows none of {', '.join(map(repr, unknown))}; its classes are {names or 'unnamed'}"
            )
        if unknown and vocabulary not in self._checked:
            self._checked.add(vocabulary)
            reason = f"detector=rf_detr does not know {', '.join(map(repr, unknown))}; its classes are {names}"
            self._refused.append(Skipped("text", reason))
        return [label for label, _ in known], [owner for _, owner in known]

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the detections with at least `min_score`, with masks if `own_masks` is set."""
        labels, owners = self._columns(vocabulary)
        return [self._detect(frame, vocabulary, labels, np.array(owners)) for frame in frames]

    def _detect(
        self, frame: Frame, vocabulary: Vocabulary, labels: Sequence[int], owners: NDArray[np.int64]
    ) -> sv.Detections:
        import torch

        inputs = self.image_processor(images=frame.image, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        with torch.inference_mode():
            output = self.model(**inputs.to(self.device))
        scores = output.logits[0].float().sigmoid().cpu().numpy()[:, labels]
        positive = owners[scores.argmax(1)] >= 0
        by_class = np.stack([scores[:, owners == i].max(1, initial=0.0) for i in range(len(vocabulary))], 1)
        by_class[~positive] = 0
        best = np.argsort(-by_class, axis=None, kind="stable")[: len(scores)]
        query, class_id = np.unravel_index(best, by_class.shape)
        kept = by_class[query, class_id] > self.min_score
        query, class_id = query[kept], class_id[kept]
        height, width = frame.size_hw
        boxes = cxcywh_to_xyxy(output.pred_boxes[0], (width, height))[query]
        masks = _resize_logits(output.pred_masks[0][query.tolist()], frame.size_hw) if self.own_masks else None
        return make_detections(boxes, by_class[query, class_id], class_id, vocabulary, frame.size_hw, masks)


def _resize_logits(logits: Tensor, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Resize mask logits `(n, h, w)` to masks `(n, H, W) bool`, one at a time to bound memory."""
    import torch

    masks = np.zeros((len(logits), *size_hw), bool)
    for values, mask in zip(logits.float(), masks, strict=True):
        resized = torch.nn.functional.interpolate(values[None, None], size_hw, mode="bilinear", align_corners=False)
        mask[:] = (resized[0, 0] > 0).cpu().numpy()
    return masks
