"""Grounding DINO (Liu et al. 2023) and MM-Grounding-DINO: words to boxes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import supervision as sv

from grounded_sam.acceleration.backends import Backend, BackendSettings
from grounded_sam.acceleration.grounding_dino import speed_up
from grounded_sam.acceleration.patching import Precision, check_precision, to_device
from grounded_sam.detectors.queries import check_settings, cxcywh_to_xyxy, detections_from_queries, load_detector
from grounded_sam.errors import ConfigError, VocabularyError
from grounded_sam.structures.detections import merge_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import pick_device

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One text for the model, and where in it each phrase lies.

    Attributes:
        ids: `[CLS] phrase . phrase . [SEP]` as token ids.
        spans: for each phrase, (class index or -1 for a negative, first token, token after its last).
    """

    ids: list[int]
    spans: list[tuple[int, int, int]]


def write_prompts(
    vocabulary: Vocabulary, tokenize: Callable[[str], list[int]], ids: dict[str, int], limit: int
) -> list[Prompt]:
    """Put a vocabulary into as few prompts as hold it; never cut a phrase, repeat the negatives in each.

    Args:
        vocabulary: what to ask for.
        tokenize: phrase to token ids, without special tokens.
        ids: the ids of `cls`, `sep`, `stop` (the full stop that parts phrases) and `ends`, see below.
        limit: the most tokens of a prompt.

    Full stops and question marks end a phrase for the model, wherever they stand, so inside a phrase
    they are left out: `U.S. flag` is asked as `u s flag`.

    Raises:
        VocabularyError: if one phrase, or the negatives with it, exceed `limit`.
    """

    def tokens(phrase: str) -> list[int]:
        found = [i for i in tokenize(re.sub(r"[.?]+", " ", phrase)) if i not in (ids["cls"], ids["sep"], ids["stop"])]
        if not found:
            raise VocabularyError(f"the detector's tokenizer finds no word in the phrase {phrase!r}")
        if len(found) + 3 > limit:
            raise VocabularyError(
                f"the phrase {phrase!r} has {len(found)} tokens; the detector takes at most {limit - 3}"
            )
        return found

    negatives = [(-1, tokens(phrase)) for phrase in vocabulary.negatives]
    wanted = [(i, tokens(phrase)) for i, phrases in enumerate(vocabulary.phrases) for phrase in phrases]
    spent = 2 + sum(len(found) + 1 for _, found in negatives)
    longest = max(len(found) + 1 for _, found in wanted)
    if spent + longest > limit:
        raise VocabularyError(
            f"the negatives take {spent - 2} tokens and leave no room for the phrases: "
            f"the detector takes {limit} in all"
        )
    chunks: list[list[tuple[int, list[int]]]] = [[]]
    used = spent
    for item in wanted:
        if used + len(item[1]) + 1 > limit:
            chunks.append([])
            used = spent
        chunks[-1].append(item)
        used += len(item[1]) + 1
    prompts = []
    for chunk in chunks:
        line, spans = [ids["cls"]], []
        for owner, found in [*chunk, *negatives]:
            spans.append((owner, len(line), len(line) + len(found)))
            line += [*found, ids["stop"]]
        prompts.append(Prompt([*line, ids["sep"]], spans))
    return prompts


def phrase_scores(probability: Tensor, spans: Sequence[tuple[int, int, int]], by: str) -> Tensor:
    """Score of every phrase from its own tokens: token probabilities `(q, T)` to `(q, phrases)`."""
    import torch

    reduce = torch.mean if by == "mean" else torch.amax
    return torch.stack([reduce(probability[:, start:stop], 1) for _, start, stop in spans], 1)


@contextmanager
def backbone_once(model: Any) -> Iterator[None]:
    """While it lasts, the image backbone runs on the first call only: all prompts see one image."""
    backbone = model.model.backbone
    features: list[Any] = []

    def once(pixel_values: Tensor, pixel_mask: Tensor) -> tuple[list[Any], list[Any]]:
        if not features:
            features.append(type(backbone).forward(backbone, pixel_values, pixel_mask))
        maps, positions = features[0]
        return list(maps), list(positions)  # the model appends to the second

    backbone.forward = once
    try:
        yield
    finally:
        del backbone.forward


class GroundingDino:
    """Words to boxes with any Grounding DINO or MM-Grounding-DINO checkpoint of transformers.

    Every query of the model gives one detection: its box, and the class whose best phrase scores
    highest. A phrase is scored over its own tokens only, so a label is always a class that the user
    named. Queries that a negative phrase wins are dropped.

    Args:
        checkpoint: a hub id (LLMDet's load too), a local folder, or `builtin:NAME`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`...
        dtype: weights and computation: `float32`, `bfloat16` or `float16`.
        phrase_score: how token probabilities make a phrase's score: `mean` (the protocol of
            Grounding DINO's and MMDetection's evaluation, where each word has to fit) or `max`
            (transformers' post-processing, where one fitting word is enough).
        batch_size: images per forward pass; by default 4 on CUDA and 1 elsewhere, since a batch was
            measured to gain nothing on CPU.
        precision: `exact` with levers that change no result, `balanced` and `fast` with more bfloat16; see `speed`.
        compile: let `torch.compile` have the layers that take the time; pays for many pictures.
        backend: what runs the image backbone on the CPU: `torch`, or `openvino`, `onnxruntime` (extras), which convert
            it anew for pictures of another size.
        exports: a folder of conversions for such a back end; null: converted anew in each run.

    Raises:
        CheckpointError: if the checkpoint cannot be had or is of another family.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        phrase_score: Literal["mean", "max"] = "mean",
        batch_size: int | None = None,
        precision: Precision = "exact",
        compile: bool = False,
        backend: Backend = "torch",
        exports: str | None = None,
    ) -> None:
        if phrase_score not in ("mean", "max"):
            raise ConfigError(f"detector.phrase_score must be mean or max, got {phrase_score!r}")
        check_settings(dtype, batch_size)
        check_precision(precision, compile, "detector")
        where = BackendSettings(backend, exports)
        where.check(pick_device(device), "detector")
        if backend != "torch" and dtype != "float32":
            raise ConfigError(f"detector.backend={backend} takes detector.dtype=float32, got {dtype}")
        import torch

        self.device = pick_device(device)
        self.dtype = getattr(torch, dtype)
        self.phrase_score = phrase_score
        self.batch_size = batch_size or (4 if self.device.startswith("cuda") else 1)
        processor, model = load_detector(checkpoint, ("grounding-dino", "mm-grounding-dino"), self.dtype)
        self.model = model.to(self.device)
        speed_up(self.model, precision, compile, where)
        self.images, self.words = processor.image_processor, processor.tokenizer
        self._prompts: dict[Vocabulary, list[Prompt]] = {}

    def prompts(self, vocabulary: Vocabulary) -> list[Prompt]:
        """The prompts that ask for a vocabulary; written once and kept."""
        if vocabulary not in self._prompts:
            ids = {
                "cls": self.words.cls_token_id,
                "sep": self.words.sep_token_id,
                "stop": self.words.convert_tokens_to_ids("."),
            }

            def tokenize(phrase: str) -> list[int]:
                return self.words(phrase.lower(), add_special_tokens=False)["input_ids"]

            limit = self.model.config.max_text_len
            self._prompts[vocabulary] = write_prompts(vocabulary, tokenize, ids, limit)
        return self._prompts[vocabulary]

    def forward(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> Iterator[tuple[Prompt, Any]]:
        """The model's own output for each prompt; the image backbone runs once for all of them."""
        import torch

        images = [frame.image for frame in frames]
        pixels = self.images(images, input_data_format="channels_last", return_tensors="pt")
        values, mask = (to_device(pixels[key], self.device) for key in ("pixel_values", "pixel_mask"))
        with torch.inference_mode(), backbone_once(self.model):
            for prompt in self.prompts(vocabulary):
                text = torch.tensor([prompt.ids] * len(frames), device=self.device)
                yield (
                    prompt,
                    self.model(
                        pixel_values=values.to(self.dtype),
                        pixel_mask=mask,
                        input_ids=text,
                        attention_mask=torch.ones_like(text),
                        token_type_ids=torch.zeros_like(text),
                    ),
                )

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """One detection per query and prompt, minus those that a negative phrase won; no threshold."""
        parts: list[list[sv.Detections]] = [[] for _ in frames]
        for prompt, out in self.forward(frames, vocabulary):
            for frame, logits, boxes, part in zip(frames, out.logits, out.pred_boxes, parts, strict=True):
                scores = phrase_scores(logits.float().sigmoid(), prompt.spans, self.phrase_score)
                owners = [owner for owner, _, _ in prompt.spans]
                height, width = frame.size_hw
                corners = cxcywh_to_xyxy(boxes, (width, height))
                part.append(detections_from_queries(scores.cpu().numpy(), owners, corners, vocabulary, frame.size_hw))
        return [merge_detections(part, vocabulary) for part in parts]
