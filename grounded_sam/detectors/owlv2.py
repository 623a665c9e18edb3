"""OWLv2 and OWL-ViT (Minderer et al. 2022, 2023), with transformers: text or image examples to boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import supervision as sv

from grounded_sam.detectors.queries import (
    Dtype,
    check_model_settings,
    cxcywh_to_xyxy,
    detections_from_queries,
    load_detector,
    phrases_of,
)
from grounded_sam.errors import ConfigError, VocabularyError
from grounded_sam.formats.examples import read_example_classes
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import pick_device

if TYPE_CHECKING:
    from torch import Tensor


class Owlv2:
    """Detect with an OWLv2 or OWL-ViT checkpoint, by text and by image examples.

    Each patch of the image gives one box, whose class is that of the most similar phrase or example. The image is
    encoded once for any number of phrases, and phrases once for any number of images. Scores are sigmoids, as in
    transformers' `post_process_object_detection`, for examples too (transformers rescales those for display).

    Args:
        checkpoint: Hub id or local folder.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        examples: Examples by class, with or without text, such as
            `{cup: [cup.jpg, {image: table.jpg, box: [40, 60, 90, 300]}]}`; or a folder, a COCO file or a store: see
            `formats.examples`.
        batch_size: Images per forward pass.
        negative_examples: Examples of look-alikes: what is more similar to one of them is dropped.

    Raises:
        CheckpointError: If the checkpoint is missing, or of another model family.
        ConfigError: If an example is malformed.
        ImageError: If the image of an example cannot be read.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        dtype: Dtype = "float32",
        examples: Mapping[str, Any] | str | None = None,
        batch_size: int = 1,
        negative_examples: Any = None,
    ) -> None:
        check_model_settings(dtype, batch_size)
        self.examples = read_example_classes(examples, negative_examples, "detector.examples")
        import torch

        self.device, self.dtype, self.batch_size = pick_device(device), getattr(torch, dtype), batch_size
        processor, model = load_detector(checkpoint, ("owlv2", "owlvit"), self.dtype)
        self.model = model.to(self.device)
        self.image_processor, self.tokenizer = processor.image_processor, processor.tokenizer
        #: Classes of the examples, for runs without text.
        names = tuple(self.examples.classes)
        self.vocabulary = Vocabulary(names, tuple((name,) for name in names), queried=False) if names else None
        self._examples = {
            name: torch.cat([self._embed_example(example.crop()) for example in examples])
            for name, examples in self.examples.classes.items()
        }
        self._look_alikes = [self._embed_example(example.crop()) for example in self.examples.negatives]
        self._queries: dict[Vocabulary, tuple[Tensor, list[int]]] = {}

    def _preprocess(self, images: Sequence[Any]) -> Tensor:
        inputs = self.image_processor(list(images), input_data_format="channels_last", return_tensors="pt")
        return inputs["pixel_values"].to(self.device, self.dtype)  # type: ignore[no-any-return]

    def _embed_example(self, image: Any) -> Tensor:
        """Return the embedding of the most object-like patch of an image, `(1, d)`."""
        import torch

        with torch.inference_mode():
            features = self.model.image_embedder(pixel_values=self._preprocess([image]))[0]
            query, _, _ = self.model.embed_image_query(features.flatten(1, 2), features)
        return query[0]  # type: ignore[no-any-return]

    def _embed_phrases(self, phrases: list[str]) -> Tensor:
        """Return the embeddings of phrases, `(n, d)`.

        Raises:
            VocabularyError: If a phrase is longer than the model takes.
        """
        import torch

        limit = self.model.config.text_config.max_position_embeddings
        for phrase, ids in zip(phrases, self.tokenizer(phrases)["input_ids"], strict=True):
            if len(ids) > limit:
                raise VocabularyError(f"{phrase!r} has {len(ids)} tokens; the model takes at most {limit} per phrase")
        inputs = self.tokenizer(phrases, padding="max_length", max_length=limit, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            towers = self.model.owlv2 if hasattr(self.model, "owlv2") else self.model.owlvit
            output = towers.get_text_features(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return output if isinstance(output, torch.Tensor) else output.pooler_output  # type: ignore[no-any-return]

    def queries(self, vocabulary: Vocabulary) -> tuple[Tensor, list[int]]:
        """Return the embeddings of all phrases and examples, `(n, d)`, and the class id of each, -1 for negatives.

        Raises:
            ConfigError: If the vocabulary lacks a class with examples.
            VocabularyError: If a phrase is longer than the model takes.
        """
        import torch

        if vocabulary not in self._queries:
            unknown = self.examples.unknown_classes(vocabulary)
            if unknown:
                raise ConfigError(
                    f"detector.examples name classes that are not in text: {', '.join(map(repr, unknown))}; "
                    f"text has {', '.join(map(repr, vocabulary.classes))}"
                )
            # Without text, the class names come from the examples and are not used as phrases.
            phrases, owners = ([], []) if vocabulary is self.vocabulary else phrases_of(vocabulary)
            parts = [self._embed_phrases(phrases)] if phrases else []
            for name, embeddings in self._examples.items():
                owner = vocabulary.index(name)
                assert owner is not None
                parts.append(embeddings)
                owners += [owner] * len(embeddings)
            parts += self._look_alikes
            owners += [-1] * len(self._look_alikes)
            self._queries[vocabulary] = torch.cat(parts), owners
        return self._queries[vocabulary]

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return one detection per patch, except those whose best phrase is a negative; no threshold."""
        import torch

        queries, owners = self.queries(vocabulary)
        with torch.inference_mode():
            maps = self.model.image_embedder(pixel_values=self._preprocess([frame.image for frame in frames]))[0]
            features = maps.flatten(1, 2)
            logits, _ = self.model.class_predictor(features, queries.expand(len(frames), -1, -1), None)
            boxes = self.model.box_predictor(features, maps)
        is_padded = self.model.config.model_type == "owlv2"  # to a square, at the right and bottom
        results = []
        for frame, scores, boxes_ in zip(frames, logits.float().sigmoid().cpu().numpy(), boxes, strict=True):
            height, width = frame.size_hw
            scale = (max(height, width), max(height, width)) if is_padded else (width, height)
            xyxy = cxcywh_to_xyxy(boxes_, scale)
            results.append(detections_from_queries(scores, owners, xyxy, vocabulary, frame.size_hw))
        return results
