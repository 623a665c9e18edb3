"""OmDet-Turbo from transformers: words to boxes, fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import supervision as sv

from grounded_sam.detectors.queries import check_settings, cxcywh_to_xyxy, load_detector, phrases_of
from grounded_sam.errors import VocabularyError
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import pick_device


class OmdetTurbo:
    """Boxes of an OmDet-Turbo checkpoint (Zhao et al. 2024).

    Every query gives a detection for each class, by its best phrase; of all of them as many are kept as the model has
    queries, as in transformers' post-processing. Queries that a negative phrase wins are dropped.

    Args:
        checkpoint: a hub id or a local folder.
        device: `auto`, `cpu`, `cuda`, `cuda:1`...
        dtype: weights and computation: `float32`, `bfloat16` or `float16`.
        batch_size: images per forward pass.

    Raises:
        CheckpointError: if the checkpoint cannot be had or is of another family.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 1,
    ) -> None:
        check_settings(dtype, batch_size)
        import torch

        self.device, self.dtype, self.batch_size = pick_device(device), getattr(torch, dtype), batch_size
        processor, model = load_detector(checkpoint, ("omdet-turbo",), self.dtype)
        self.model = model.to(self.device)
        self.images, self.words = processor.image_processor, processor.tokenizer

    def _tokens(self, texts: list[str]) -> Any:
        limit = 77
        for text in texts:
            if len(self.words(text)["input_ids"]) > limit:
                raise VocabularyError(f"{text!r} is longer than the {limit} tokens that the model takes")
        return self.words(texts, padding="max_length", max_length=limit, return_tensors="pt").to(self.device)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """As many detections as the model has queries, the surest; no threshold."""
        import torch

        phrases, owners = phrases_of(vocabulary)
        named = self._tokens(phrases)
        # The task says the phrases in a sentence; of what is too long for it the processor keeps the beginning.
        limit = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
        task = self.words([f"Detect {', '.join(phrases)}."], **limit).to(self.device)
        pixels = self.images([f.image for f in frames], input_data_format="channels_last", return_tensors="pt")
        with torch.inference_mode():
            out = self.model(
                pixel_values=pixels["pixel_values"].to(self.device, self.dtype),
                classes_input_ids=named["input_ids"].repeat(len(frames), 1),
                classes_attention_mask=named["attention_mask"].repeat(len(frames), 1),
                tasks_input_ids=task["input_ids"].repeat(len(frames), 1),
                tasks_attention_mask=task["attention_mask"].repeat(len(frames), 1),
                classes_structure=torch.tensor([len(phrases)] * len(frames)),
            )
        found = []
        for frame, logits, boxes in zip(frames, out.decoder_class_logits, out.decoder_coord_logits, strict=True):
            scores = logits[:, : len(phrases)].float().sigmoid().cpu().numpy()
            height, width = frame.size_hw
            corners = cxcywh_to_xyxy(boxes, (width, height))
            kept = np.asarray(owners)[scores.argmax(1)] >= 0
            by_class = np.stack(
                [scores[:, np.asarray(owners) == i].max(1, initial=0.0) for i in range(len(vocabulary))], 1
            )[kept]
            surest = np.argsort(-by_class, axis=None, kind="stable")[: len(scores)]
            row, class_id = np.unravel_index(surest, by_class.shape) if by_class.size else (surest, surest)
            rows = corners[kept][row]
            found.append(make_detections(rows, by_class[row, class_id], class_id, vocabulary, frame.size_hw))
        return found
