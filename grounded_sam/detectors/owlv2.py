"""OWLv2 from transformers: words, or crops of examples, to boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import supervision as sv

from grounded_sam.detectors.queries import (
    check_settings,
    cxcywh_to_xyxy,
    detections_from_queries,
    load_detector,
    phrases_of,
)
from grounded_sam.errors import ConfigError, VocabularyError
from grounded_sam.media.images import read_image
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import pick_device

if TYPE_CHECKING:
    from torch import Tensor


class Owlv2:
    """Boxes of an OWLv2 or OWL-ViT checkpoint (Minderer et al. 2023), by words and by pictures of examples.

    Each patch of the image gives one box; its class is the one whose best phrase or example is most like it. The
    image is encoded once for any number of phrases, and phrases once for any number of images. Scores are
    sigmoids as in transformers' `post_process_object_detection`; for examples too, which that library rescales for
    display.

    Args:
        checkpoint: a hub id or a local folder.
        device: `auto`, `cpu`, `cuda`, `cuda:1`...
        dtype: weights and computation: `float32`, `bfloat16` or `float16`.
        examples: pictures by class, `{cup: [cup.jpg, {image: table.jpg, box: [40, 60, 90, 300]}]}`: a picture, or a
            box in one. They may stand beside `text` or instead of it.
        batch_size: images per forward pass.

    Raises:
        CheckpointError: if the checkpoint cannot be had or is of another family.
        ConfigError: if an example is none; ImageError: if its picture cannot be read.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        examples: Mapping[str, Any] | None = None,
        batch_size: int = 1,
    ) -> None:
        check_settings(dtype, batch_size)
        crops = {str(name): _crops(str(name), given) for name, given in (examples or {}).items()}
        import torch

        self.device, self.dtype, self.batch_size = pick_device(device), getattr(torch, dtype), batch_size
        processor, model = load_detector(checkpoint, ("owlv2", "owlvit"), self.dtype)
        self.model = model.to(self.device)
        self.images, self.words = processor.image_processor, processor.tokenizer
        #: Classes of the examples, for runs without words.
        self.vocabulary = Vocabulary(tuple(crops), tuple((name,) for name in crops), asked=False) if crops else None
        self._examples = {name: torch.cat([self._example(crop) for crop in given]) for name, given in crops.items()}
        self._asked: dict[Vocabulary, tuple[Tensor, list[int]]] = {}

    def _pixels(self, images: Sequence[Any]) -> Tensor:
        pixels = self.images(list(images), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.dtype)  # type: ignore[no-any-return]

    def _example(self, crop: Any) -> Tensor:
        """The embedding of what is most like an object in a picture, `(1, d)`."""
        import torch

        with torch.inference_mode():
            features = self.model.image_embedder(pixel_values=self._pixels([crop]))[0]
            query, _, _ = self.model.embed_image_query(features.flatten(1, 2), features)
        return query[0]  # type: ignore[no-any-return]

    def queries(self, vocabulary: Vocabulary) -> tuple[Tensor, list[int]]:
        """Embeddings of all phrases and examples, `(n, d)`, and of each its class, -1 for negatives.

        Raises:
            VocabularyError: if a phrase is longer than the model takes.
        """
        import torch

        if vocabulary in self._asked:
            return self._asked[vocabulary]
        phrases, owners = phrases_of(vocabulary)
        if vocabulary is self.vocabulary:  # nothing but examples
            phrases, owners = [], []
        parts: list[Tensor] = []
        if phrases:
            limit = self.model.config.text_config.max_position_embeddings
            ids = self.words(phrases)["input_ids"]
            for phrase, tokens in zip(phrases, ids, strict=True):
                if len(tokens) > limit:
                    raise VocabularyError(f"{phrase!r} has {len(tokens)} tokens, the model takes {limit} of a phrase")
            given = self.words(phrases, padding="max_length", max_length=limit, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                tower = self.model.owlv2 if hasattr(self.model, "owlv2") else self.model.owlvit
                text = tower.get_text_features(given["input_ids"], attention_mask=given["attention_mask"])
                parts.append(text if isinstance(text, torch.Tensor) else text.pooler_output)
        for i, name in enumerate(vocabulary.classes):
            if name in self._examples:
                parts.append(self._examples[name])
                owners += [i] * len(self._examples[name])
        self._asked[vocabulary] = torch.cat(parts), owners
        return self._asked[vocabulary]

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """One detection per patch, minus those that a negative phrase won; no threshold."""
        import torch

        queries, owners = self.queries(vocabulary)
        with torch.inference_mode():
            maps = self.model.image_embedder(pixel_values=self._pixels([frame.image for frame in frames]))[0]
            features = maps.flatten(1, 2)
            logits, _ = self.model.class_predictor(features, queries.expand(len(frames), -1, -1), None)
            boxes = self.model.box_predictor(features, maps)
        padded = self.model.config.model_type == "owlv2"  # to a square, right and below
        found = []
        for frame, scores, given in zip(frames, logits.float().sigmoid().cpu().numpy(), boxes, strict=True):
            height, width = frame.size_hw
            scale = (max(height, width), max(height, width)) if padded else (width, height)
            found.append(
                detections_from_queries(scores, owners, cxcywh_to_xyxy(given, scale), vocabulary, frame.size_hw)
            )
        return found


def _crops(name: str, given: Any) -> list[Any]:
    """The pictures of a class's examples, RGB."""
    crops = []
    for one in given if isinstance(given, list | tuple) else [given]:
        if isinstance(one, str | Path):
            crops.append(read_image(one))
            continue
        box = one.get("box") if isinstance(one, Mapping) else None
        if box is None or not isinstance(box, list | tuple) or len(box) != 4 or "image" not in one:
            raise ConfigError(f"detector.examples.{name}: expected a picture or {{image: ..., box: [x1, y1, x2, y2]}}")
        image = read_image(one["image"])
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        crop = image[max(0, y1) : max(0, y2), max(0, x1) : max(0, x2)]
        if not crop.size:
            raise ConfigError(
                f"detector.examples.{name}: nothing of the box {list(box)} is inside {one['image']}, "
                f"{image.shape[1]}x{image.shape[0]} px"
            )
        crops.append(crop)
    if not crops:
        raise ConfigError(f"detector.examples.{name}: no example")
    return crops
