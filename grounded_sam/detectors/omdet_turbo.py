"""OmDet-Turbo (Zhao et al. 2024), with transformers: a fast text-to-boxes detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.detectors.queries import Dtype, check_model_settings, cxcywh_to_xyxy, load_detector, phrases_of
from grounded_sam.errors import VocabularyError
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import pick_device

#: Tokens that CLIP's text encoder takes.
MAX_TOKENS = 77


class OmdetTurbo:
    """Detect with an OmDet-Turbo checkpoint.

    Every query gives a detection for each class, scored by the best phrase of the class; the most confident are kept,
    as many as the model has queries, as in transformers' post-processing. Queries whose best phrase is a
    negative are dropped.

    Args:
        checkpoint: Hub id or local folder.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        batch_size: Images per forward pass.

    Raises:
        CheckpointError: If the checkpoint is missing, or of another model family.
    """

    def __init__(self, checkpoint: str, device: str = "auto", dtype: Dtype = "float32", batch_size: int = 1) -> None:
        check_model_settings(dtype, batch_size)
        import torch

        self.device, self.dtype, self.batch_size = pick_device(device), getattr(torch, dtype), batch_size
        processor, model = load_detector(checkpoint, ("omdet-turbo",), self.dtype)
        self.model = model.to(self.device)
        self.image_processor, self.tokenizer = processor.image_processor, processor.tokenizer

    def _tokenize(self, phrases: list[str]) -> Any:
        """Tokenize each phrase, padded to the length that the model takes."""
        for phrase in phrases:
            if len(self.tokenizer(phrase)["input_ids"]) > MAX_TOKENS:
                raise VocabularyError(f"{phrase!r} is longer than the {MAX_TOKENS} tokens that the model takes")
        padding = {"padding": "max_length", "max_length": MAX_TOKENS, "return_tensors": "pt"}
        return self.tokenizer(phrases, **padding).to(self.device)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the most confident detections of each frame, as many as the model has queries; no threshold."""
        import torch

        phrases, owners = phrases_of(vocabulary)
        classes = self._tokenize(phrases)
        # The task lists all phrases in one sentence, which transformers' processor truncates too.
        padding = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        task = self.tokenizer([f"Detect {', '.join(phrases)}."], **padding).to(self.device)
        images = [frame.image for frame in frames]
        pixels = self.image_processor(images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            output = self.model(
                pixel_values=pixels.to(self.device, self.dtype),
                classes_input_ids=classes["input_ids"].repeat(len(frames), 1),
                classes_attention_mask=classes["attention_mask"].repeat(len(frames), 1),
                tasks_input_ids=task["input_ids"].repeat(len(frames), 1),
                tasks_attention_mask=task["attention_mask"].repeat(len(frames), 1),
                classes_structure=torch.tensor([len(phrases)] * len(frames)),
            )
        results = []
        for frame, logits, boxes in zip(frames, output.decoder_class_logits, output.decoder_coord_logits, strict=True):
            scores = logits[:, : len(phrases)].float().sigmoid().cpu().numpy()
            height, width = frame.size_hw
            xyxy = cxcywh_to_xyxy(boxes, (width, height))
            positive = np.asarray(owners)[scores.argmax(1)] >= 0
            by_class = np.stack(
                [scores[:, np.asarray(owners) == i].max(1, initial=0.0) for i in range(len(vocabulary))], 1
            )[positive]
            best = np.argsort(-by_class, axis=None, kind="stable")[: len(scores)]
            query, class_id = np.unravel_index(best, by_class.shape) if by_class.size else (best, best)
            confidence = by_class[query, class_id]
            results.append(make_detections(xyxy[positive][query], confidence, class_id, vocabulary, frame.size_hw))
        return results
