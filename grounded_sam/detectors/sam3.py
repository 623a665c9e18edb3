"""SAM 3's concept segmentation (Carion et al. 2025), with transformers: text to masks in one model.

SAM3-LiteText (Zeng et al. 2026) is the same with a text encoder that is up to 88% smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_bool, check_number
from grounded_sam.detectors.queries import Dtype, check_model_settings, drop_negatives, phrases_of
from grounded_sam.errors import ConfigError, ImageError, VocabularyError
from grounded_sam.files import home_path
from grounded_sam.structures.clicks import Click, read_click, read_json_entries
from grounded_sam.structures.detections import make_detections, merge_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import DetectorTraits
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import load_checkpoint, pick_device

if TYPE_CHECKING:
    from torch import Tensor

#: Tokens that the text encoder takes per phrase, as in `Sam3Processor`.
MAX_TOKENS = 32


@dataclass(frozen=True)
class _Query:
    """A phrase of the vocabulary, encoded."""

    owner: int  # class id, -1 for a negative
    features: Any
    attention_mask: Tensor


class Sam3:
    """Detect and segment all objects that a phrase describes.

    The image is encoded once for all phrases, each phrase once for all images. Each query of the model gives a
    detection with score, box and mask, as in `Sam3Processor.post_process_instance_segmentation`. Phrases do not compete
    inside the model, so detections that a more confident detection of a negative phrase overlaps (IoU >= 0.5) are
    dropped.

    Args:
        checkpoint: Hub id or local folder of a `Sam3Model` or `Sam3LiteTextModel`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        own_masks: Return SAM 3's masks; False returns boxes, for a segmenter.
        min_score: Detections below this confidence are dropped, since each has a mask of the size of the image.
        exemplars: Boxes of example objects, in addition to text, each used in its own image: a JSON file, or
            entries with `class`, `box` (`[x1, y1, x2, y2]` in pixels), optionally `negative: true` for a
            counterexample, and `image` (a name as in the output, or the end of one; by default every image).
        examples: Must be None: SAM 3 cannot use examples from other images.

    Raises:
        CheckpointError: If the checkpoint is missing, or of another model family.
        ConfigError: If an exemplar is malformed, or there are examples from other images.
    """

    def __init__(
        self,
        checkpoint: str = "facebook/sam3",
        device: str = "auto",
        dtype: Dtype = "float32",
        own_masks: bool = True,
        min_score: float = 0.05,
        exemplars: str | Sequence[Mapping[str, Any]] | None = None,
        examples: Any = None,
    ) -> None:
        check_model_settings(dtype)
        if examples is not None:  # its geometry encoder pools the features of the image that is segmented
            raise ConfigError(
                "SAM 3 compares with boxes in the same image only (detector.exemplars); for detector.examples from "
                "other images use detector=owlv2"
            )
        check_bool("detector.own_masks", own_masks)
        check_number("detector.min_score", min_score, 0, 1)
        self.exemplars = read_exemplars(exemplars)
        import torch
        import transformers
        from transformers import AutoImageProcessor, AutoTokenizer, Sam3Model

        self.device, self.dtype = pick_device(device), getattr(torch, dtype)
        self.own_masks, self.min_score = own_masks, min_score
        classes = {"sam3": Sam3Model, "sam3_video": Sam3Model}
        classes["sam3_lite_text"] = getattr(transformers, "Sam3LiteTextModel", None)  # not in older versions
        loaded = load_checkpoint(checkpoint, list(classes), classes, [AutoImageProcessor, AutoTokenizer], self.dtype)
        model, self.image_processor, self.tokenizer = loaded
        self.model = model.to(self.device)
        self._queries: dict[Vocabulary, list[_Query]] = {}

    @classmethod
    def traits(cls, settings: Mapping[str, Any]) -> DetectorTraits:
        """Declare masks unless `own_masks` is false, and boxes in whole images if there are exemplars."""
        own_masks = settings.get("own_masks", True) is True
        return DetectorTraits(
            masks=own_masks, replaces_segmenter=own_masks, image_prompts=bool(settings.get("exemplars"))
        )

    def _encode_phrases(self, vocabulary: Vocabulary) -> list[_Query]:
        """Encode each phrase; done once per vocabulary."""
        import torch

        if vocabulary not in self._queries:
            queries = []
            for phrase, owner in zip(*phrases_of(vocabulary), strict=True):
                inputs = tokenize_phrase(phrase, self.tokenizer).to(self.device)
                ids, mask = inputs["input_ids"], inputs["attention_mask"]
                with torch.inference_mode():
                    features = self.model.get_text_features(input_ids=ids, attention_mask=mask, return_dict=True)
                queries.append(_Query(owner, features, mask))
            self._queries[vocabulary] = queries
        return self._queries[vocabulary]

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the detections with at least `min_score`, with masks if `own_masks` is set.

        Their `metadata["presence"]` is the model's own estimate of whether the image shows each class at all.
        """
        return [self._detect(frame, vocabulary) for frame in frames]

    def _exemplar_inputs(self, frame: Frame, vocabulary: Vocabulary) -> dict[int, dict[str, Tensor]]:
        """Return the model inputs for the exemplars of a frame, by class id: normalized cxcywh boxes, and labels.

        Raises:
            ConfigError: If the vocabulary lacks the class of an exemplar.
            ImageError: If a box lies outside the frame.
        """
        import torch

        unknown = sorted({exemplar.class_name for exemplar, _ in self.exemplars} - set(vocabulary.classes))
        if unknown:
            raise ConfigError(
                f"detector.exemplars name classes that are not in text: {', '.join(map(repr, unknown))}; "
                f"text has {', '.join(map(repr, vocabulary.classes))}"
            )
        height, width = frame.size_hw
        by_class: dict[int, tuple[list[NDArray[np.float32]], list[int]]] = {}
        for exemplar, label in self.exemplars:
            if not exemplar.matches(frame) or exemplar.box is None:
                continue
            if (exemplar.box < 0).any() or (exemplar.box > [width, height, width, height]).any():
                raise ImageError(
                    f"exemplar box {exemplar.box.tolist()} lies outside {frame.name}, which is {width}x{height} px"
                )
            boxes, labels = by_class.setdefault(vocabulary.classes.index(exemplar.class_name), ([], []))
            boxes.append((exemplar.box / [width, height, width, height]).astype(np.float32))
            labels.append(label)
        inputs = {}
        for class_id, (boxes, labels) in by_class.items():
            xyxy = torch.from_numpy(np.stack(boxes))[None].to(self.device, self.dtype)
            cxcywh = torch.cat([(xyxy[..., :2] + xyxy[..., 2:]) / 2, xyxy[..., 2:] - xyxy[..., :2]], -1)
            inputs[class_id] = {
                "input_boxes": cxcywh,
                "input_boxes_labels": torch.tensor([labels], device=self.device),
            }
        return inputs

    def _detect(self, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        import torch

        pixels = self.image_processor(images=frame.image, return_tensors="pt")["pixel_values"]
        height, width = frame.size_hw
        exemplars = self._exemplar_inputs(frame, vocabulary)
        parts: list[sv.Detections] = []
        presence: dict[str, float] = {}
        negatives: list[tuple[float, Any]] = []  # confidence and box
        with torch.inference_mode():
            features = self.model.get_vision_features(pixels.to(self.device, self.dtype))
            for query in self._encode_phrases(vocabulary):
                output = self.model(
                    vision_embeds=features,
                    text_embeds=query.features,
                    attention_mask=query.attention_mask,
                    **exemplars.get(query.owner, {}),
                )
                scores = output.pred_logits.float().sigmoid()
                if output.presence_logits is not None:
                    present = output.presence_logits.float().sigmoid()
                    scores = scores * present
                    if query.owner >= 0:
                        name = vocabulary.classes[query.owner]
                        presence[name] = max(presence.get(name, 0.0), float(present[0, 0]))
                rows = scores[0] > self.min_score
                confidence = scores[0][rows].cpu().numpy()
                boxes = output.pred_boxes[0][rows].float().cpu().numpy() * np.array([width, height, width, height])
                if query.owner < 0:
                    negatives += zip(confidence.tolist(), boxes, strict=True)
                    continue
                masks = _resize_masks(output.pred_masks[0][rows], frame.size_hw) if self.own_masks else None
                ids = np.full(len(confidence), query.owner)
                parts.append(make_detections(boxes, confidence, ids, vocabulary, frame.size_hw, masks))
        detections = merge_detections(parts, vocabulary)
        if presence:
            detections.metadata["presence"] = presence
        return drop_negatives(
            detections, np.array([box for _, box in negatives]), np.array([score for score, _ in negatives])
        )


def _resize_masks(logits: Tensor, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Resize mask logits `(n, h, w)` to masks `(n, H, W) bool`, one at a time to bound memory."""
    import torch

    masks = np.zeros((len(logits), *size_hw), bool)
    for probability, mask in zip(logits.float().sigmoid(), masks, strict=True):
        resized = torch.nn.functional.interpolate(probability[None, None], size_hw, mode="bilinear")
        mask[:] = (resized[0, 0] > 0.5).cpu().numpy()
    return masks


def tokenize_phrase(phrase: str, tokenizer: Any) -> Any:
    """Tokenize a phrase for SAM 3, padded to `MAX_TOKENS`.

    Raises:
        VocabularyError: If it is longer than the model takes.
    """
    count = len(tokenizer(phrase)["input_ids"])
    if count > MAX_TOKENS:
        raise VocabularyError(f"{phrase!r} has {count} tokens; the model takes at most {MAX_TOKENS} per phrase")
    return tokenizer([phrase], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")


def read_exemplars(entries: str | Sequence[Mapping[str, Any]] | None) -> list[tuple[Click, int]]:
    """Read exemplars; see `Sam3`.

    Returns:
        Boxes, each with 1 for an example or 0 for a counterexample.

    Raises:
        ConfigError: If the file cannot be read, or an entry is malformed; the message names it.

    >>> read_exemplars([{"class": "cup", "box": [0, 0, 5, 5], "negative": True}])[0][1]
    0
    """
    if isinstance(entries, str):
        entries = read_json_entries(home_path(entries), "detector.exemplars")
    exemplars = []
    for i, entry in enumerate(entries or ()):
        where = f"detector.exemplars[{i}]"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}: expected a mapping with class and box, got {entry!r}")
        unknown = sorted(set(entry) - {"class", "box", "image", "negative"})
        if unknown or entry.get("box") is None:
            problem = f"unknown key {unknown[0]!r}" if unknown else "box is missing"
            raise ConfigError(f"{where}: {problem}; the keys are class, box, image, negative")
        negative = entry.get("negative", False)
        check_bool(f"{where}: negative", negative)
        rest = {key: value for key, value in entry.items() if key != "negative"}
        exemplars.append((read_click(rest, where, Path()), int(not negative)))
    return exemplars
