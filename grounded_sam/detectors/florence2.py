"""Florence-2's phrase grounding and open-vocabulary detection, over transformers: words to boxes without scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.detectors.queries import check_settings, drop_negatives, phrases_of
from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import make_detections, merge_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import load_checkpoint, pick_device

if TYPE_CHECKING:
    from torch import Tensor

TASKS = {"grounding": "<CAPTION_TO_PHRASE_GROUNDING>", "detection": "<OPEN_VOCABULARY_DETECTION>"}


class Florence2:
    """Boxes that a language model writes down (Florence-2, Xiao et al. 2024).

    Each phrase is a question of its own, so what is answered belongs to the class of the phrase, whatever the model
    calls it; the image is encoded once for all. Boxes are those of `Florence2Processor.post_process_generation`.
    **The model gives no scores**: the confidence of every box is 1, so thresholds and rankings by score say nothing,
    and it often answers with a box where nothing of the kind is there. What a negative phrase finds as well (IoU of
    boxes from 0.5) is dropped.

    Args:
        checkpoint: a hub id or a local folder of a `Florence2ForConditionalGeneration`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`...
        dtype: weights and computation: `float32`, `bfloat16` or `float16`.
        task: `grounding`, the phrase as a caption to ground, or `detection`, open-vocabulary detection.
        beams: of the beam search, 1 for none.
        max_new_tokens: the longest answer; a box takes four tokens and its name.

    Raises:
        CheckpointError: if the checkpoint cannot be had or is of another family.
    """

    def __init__(
        self,
        checkpoint: str = "florence-community/Florence-2-base",
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        task: Literal["grounding", "detection"] = "detection",
        beams: int = 3,
        max_new_tokens: int = 1024,
    ) -> None:
        check_settings(dtype)
        if task not in TASKS:
            raise ConfigError(f"detector.task must be {' or '.join(TASKS)}, got {task!r}")
        for key, value in (("beams", beams), ("max_new_tokens", max_new_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"detector.{key} must be a whole number from 1, got {value!r}")
        import torch
        from transformers import AutoProcessor, Florence2ForConditionalGeneration

        self.device, self.dtype = pick_device(device), getattr(torch, dtype)
        self.task, self.beams, self.max_new_tokens = TASKS[task], beams, max_new_tokens
        kind = Florence2ForConditionalGeneration
        model, self.processor = load_checkpoint(checkpoint, ["florence2"], kind, [AutoProcessor], self.dtype)
        self.model = model.to(self.device)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Every box that is answered, with confidence 1."""
        return [self._one(frame, vocabulary) for frame in frames]

    def _one(self, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        import torch

        pixels = self.processor.image_processor(images=frame.image, return_tensors="pt")["pixel_values"]
        parts, against = [], np.empty((0, 4), np.float32)
        with torch.inference_mode():
            seen = self.model.get_image_features(pixels.to(self.device, self.dtype)).pooler_output
            for phrase, owner in zip(*phrases_of(vocabulary), strict=True):
                boxes = self._boxes(self._answer(seen, frame, phrase), frame.size_hw)
                if owner < 0:
                    against = np.concatenate([against, boxes])
                else:
                    ones, ids = np.ones(len(boxes)), np.full(len(boxes), owner)
                    parts.append(make_detections(boxes, ones, ids, vocabulary, frame.size_hw))
        return drop_negatives(merge_detections(parts, vocabulary), against, np.full(len(against), np.inf))

    def _answer(self, seen: Tensor, frame: Frame, phrase: str) -> str:
        """What the model writes of a phrase, given the features `(1, tokens, d)` of the image."""
        # The words alone, laid out as for an image: the processor would prepare the pixels anew for each phrase.
        processor, tokens = self.processor, seen.shape[1]
        prompt = processor._construct_prompts(self.task + phrase)[0]
        text = processor.tokenizer.bos_token + prompt + processor.tokenizer.eos_token
        words = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self.device)
        embedded = self.model.get_input_embeddings()(words)
        given = self.model.model.language_model.encoder(inputs_embeds=_joined(seen, embedded))
        written = self.model.generate(
            encoder_outputs=given,
            attention_mask=words.new_ones(1, tokens + words.shape[1]),
            max_new_tokens=self.max_new_tokens,
            num_beams=self.beams,
            do_sample=False,
        )
        return str(processor.batch_decode(written, skip_special_tokens=False)[0])

    def _boxes(self, answer: str, size_hw: tuple[int, int]) -> NDArray[np.float32]:
        """The boxes of an answer, `(n, 4)` pixels; of polygons their boxes."""
        height, width = size_hw
        found = self.processor.post_process_generation(answer, task=self.task, image_size=(width, height))[self.task]
        boxes = [list(box) for box in found["bboxes"]]
        for rings in found.get("polygons", []):
            corners = np.concatenate([np.reshape(ring, (-1, 2)) for ring in rings])
            boxes.append([*corners.min(0), *corners.max(0)])
        return np.array(boxes, np.float32).reshape(-1, 4)


def _joined(seen: Tensor, embedded: Tensor) -> Tensor:
    """Features of the image, then those of the words, as the image tokens in front of a prompt are filled."""
    import torch

    return torch.cat([seen.to(embedded.dtype), embedded], 1)
