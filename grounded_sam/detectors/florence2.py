"""Florence-2 (Xiao et al. 2024), with transformers: phrase grounding and open-vocabulary detection, without scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_choice, check_int
from grounded_sam.detectors.queries import Dtype, check_model_settings, drop_negatives, phrases_of
from grounded_sam.structures.detections import make_detections, merge_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import load_checkpoint, pick_device

if TYPE_CHECKING:
    from torch import Tensor

TASKS = {"grounding": "<CAPTION_TO_PHRASE_GROUNDING>", "detection": "<OPEN_VOCABULARY_DETECTION>"}


class Florence2:
    """Detect with a language model that generates boxes as text.

    Each phrase is a prompt of its own, so every box belongs to the class of its phrase, whatever the model calls it.
    The image is encoded once for all phrases. Boxes are those of `Florence2Processor.post_process_generation`.

    **The model gives no scores.** Every box has confidence 1, so thresholds and rankings have no effect, and it often
    returns a box for objects that are not in the image. Boxes that a negative phrase finds too (IoU >= 0.5) are
    dropped.

    Args:
        checkpoint: Hub id or local folder of a `Florence2ForConditionalGeneration`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        task: `detection` (open-vocabulary detection) or `grounding` (phrase grounding, with the phrase as a caption).
        beams: Beams of the search; 1 for greedy decoding.
        max_new_tokens: Maximum number of generated tokens; a box takes four, in addition to those of its label.

    Raises:
        CheckpointError: If the checkpoint is missing, or of another model family.
    """

    def __init__(
        self,
        checkpoint: str = "florence-community/Florence-2-base",
        device: str = "auto",
        dtype: Dtype = "float32",
        task: Literal["grounding", "detection"] = "detection",
        beams: int = 3,
        max_new_tokens: int = 1024,
    ) -> None:
        check_model_settings(dtype)
        check_choice("detector.task", task, tuple(TASKS))
        check_int("detector.beams", beams, 1)
        check_int("detector.max_new_tokens", max_new_tokens, 1)
        import torch
        from transformers import AutoProcessor, Florence2ForConditionalGeneration

        self.device, self.dtype = pick_device(device), getattr(torch, dtype)
        self.task, self.beams, self.max_new_tokens = TASKS[task], beams, max_new_tokens
        model, self.processor = load_checkpoint(
            checkpoint, ["florence2"], Florence2ForConditionalGeneration, [AutoProcessor], self.dtype
        )
        self.model = model.to(self.device)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return all boxes that the model generates, with confidence 1."""
        return [self._detect(frame, vocabulary) for frame in frames]

    def _detect(self, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        import torch

        pixels = self.processor.image_processor(images=frame.image, return_tensors="pt")["pixel_values"]
        parts, negatives = [], np.empty((0, 4), np.float32)
        with torch.inference_mode():
            features = self.model.get_image_features(pixels.to(self.device, self.dtype)).pooler_output
            for phrase, owner in zip(*phrases_of(vocabulary), strict=True):
                boxes = self._parse(self._generate(features, phrase), frame.size_hw)
                if owner < 0:
                    negatives = np.concatenate([negatives, boxes])
                else:
                    ones, ids = np.ones(len(boxes)), np.full(len(boxes), owner)
                    parts.append(make_detections(boxes, ones, ids, vocabulary, frame.size_hw))
        return drop_negatives(merge_detections(parts, vocabulary), negatives, np.full(len(negatives), np.inf))

    def _generate(self, features: Tensor, phrase: str) -> str:
        """Generate the text for a phrase from image features `(1, tokens, d)`."""
        import torch

        # Only the text is tokenized here: the processor would preprocess the image again for every phrase.
        processor = self.processor
        prompt = processor._construct_prompts(self.task + phrase)[0]
        text = processor.tokenizer.bos_token + prompt + processor.tokenizer.eos_token
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self.device)
        embedded = self.model.get_input_embeddings()(ids)
        # Image features replace the image tokens in front of the prompt.
        inputs = torch.cat([features.to(embedded.dtype), embedded], 1)
        generated = self.model.generate(
            encoder_outputs=self.model.model.language_model.encoder(inputs_embeds=inputs),
            attention_mask=ids.new_ones(1, inputs.shape[1]),
            max_new_tokens=self.max_new_tokens,
            num_beams=self.beams,
            do_sample=False,
        )
        return str(processor.batch_decode(generated, skip_special_tokens=False)[0])

    def _parse(self, text: str, size_hw: tuple[int, int]) -> NDArray[np.float32]:
        """Parse generated text to boxes, xyxy, `(n, 4)` pixels; polygons become the boxes around them."""
        height, width = size_hw
        parsed = self.processor.post_process_generation(text, task=self.task, image_size=(width, height))[self.task]
        boxes = [list(box) for box in parsed["bboxes"]]
        for rings in parsed.get("polygons", []):
            corners = np.concatenate([np.reshape(ring, (-1, 2)) for ring in rings])
            boxes.append([*corners.min(0), *corners.max(0)])
        return np.array(boxes, np.float32).reshape(-1, 4)
