"""Grounding DINO (Liu et al. 2023) and MM-Grounding-DINO (Zhao et al. 2024): text to boxes."""

from __future__ import annotations

import math
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import supervision as sv

from grounded_sam.acceleration.backends import Backend, BackendSettings
from grounded_sam.acceleration.device_images import grounding_dino_input
from grounded_sam.acceleration.dino_network import Predictions
from grounded_sam.acceleration.grounding_dino import speed_up
from grounded_sam.acceleration.patching import Precision, check_precision, inference
from grounded_sam.checks import check_choice
from grounded_sam.detectors.queries import (
    Dtype,
    check_model_settings,
    cxcywh_to_xyxy,
    load_detector,
)
from grounded_sam.errors import CheckpointError, ConfigError, VocabularyError
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import pick_device

if TYPE_CHECKING:
    from torch import Tensor

#: Vocabularies whose encoded prompts are kept on the device.
MAX_VOCABULARIES = 32


@dataclass(frozen=True)
class Prompt:
    """One text input of the model, and the tokens of each phrase in it.

    Attributes:
        ids: Token ids of `[CLS] phrase . phrase . [SEP]`.
        spans: For each phrase: class id (-1 for a negative), first token, token after the last.
    """

    ids: list[int]
    spans: list[tuple[int, int, int]]


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that structure a prompt: start, end, and the full stop between phrases."""

    cls: int
    sep: int
    stop: int


def check_words(vocabulary: Vocabulary, tokenize: Callable[[str], list[int]], unknown: int | None) -> None:
    """Check that the tokenizer knows every word; it would replace all others by the same token.

    Args:
        vocabulary: Classes to look for.
        tokenize: Function from text to token ids, without special tokens.
        unknown: Id of the token for unknown words; None if there is none.

    Raises:
        VocabularyError: If it does not know some words; the message names them.
    """
    phrases = [phrase for phrases in (*vocabulary.phrases, vocabulary.negatives) for phrase in phrases]
    words = dict.fromkeys(word for phrase in phrases for word in re.findall(r"[^\W_]+", phrase))
    strange = [word for word in words if unknown is not None and unknown in tokenize(word)]
    if strange:
        raise VocabularyError(
            f"the detector's tokenizer does not know {', '.join(map(repr, strange))}; use English words, or a file "
            f"text=classes.yaml with lines such as '{strange[0]}: english words', which keeps the name of the class"
        )


def write_prompts(
    vocabulary: Vocabulary, tokenize: Callable[[str], list[int]], special: SpecialTokens, limit: int
) -> list[Prompt]:
    """Distribute the phrases of a vocabulary over as few prompts as possible.

    No phrase is cut, and every prompt contains all negatives. A full stop or question mark ends a phrase wherever it
    stands, so these are removed inside phrases: `U.S. flag` becomes `u s flag`.

    Args:
        vocabulary: Classes to look for.
        tokenize: Function from a phrase to token ids, without special tokens.
        special: Ids of the special tokens.
        limit: Largest number of tokens in a prompt.

    Raises:
        VocabularyError: If a phrase, or the negatives together with one, exceed `limit`.
    """

    def tokens_of(phrase: str) -> list[int]:
        tokens = [
            i for i in tokenize(re.sub(r"[.?]+", " ", phrase)) if i not in (special.cls, special.sep, special.stop)
        ]
        if not tokens:
            raise VocabularyError(f"the detector's tokenizer finds no word in the phrase {phrase!r}")
        if len(tokens) + 3 > limit:
            raise VocabularyError(
                f"the phrase {phrase!r} has {len(tokens)} tokens; the detector takes at most {limit - 3}"
            )
        return tokens

    negatives = [(-1, tokens_of(phrase)) for phrase in vocabulary.negatives]
    positives = [(i, tokens_of(phrase)) for i, phrases in enumerate(vocabulary.phrases) for phrase in phrases]
    fixed = 2 + sum(len(tokens) + 1 for _, tokens in negatives)
    longest = max(len(tokens) + 1 for _, tokens in positives)
    if fixed + longest > limit:
        raise VocabularyError(
            f"the negatives take {fixed - 2} tokens and leave no room for the phrases: "
            f"the detector takes {limit} in all"
        )
    chunks: list[list[tuple[int, list[int]]]] = [[]]
    used = fixed
    for item in positives:
        if used + len(item[1]) + 1 > limit:
            chunks.append([])
            used = fixed
        chunks[-1].append(item)
        used += len(item[1]) + 1
    prompts = []
    for chunk in chunks:
        ids, spans = [special.cls], []
        for class_id, tokens in [*chunk, *negatives]:
            spans.append((class_id, len(ids), len(ids) + len(tokens)))
            ids += [*tokens, special.stop]
        prompts.append(Prompt([*ids, special.sep], spans))
    return prompts


def read_calibration(value: Any, checkpoint: str) -> list[tuple[float, float]]:
    """Read `phrase_calibration` from the config of a checkpoint.

    Args:
        value: A list of `[scale, offset]`, the first for phrases of one token, the second for two and so on, the last
            for all longer ones; None for no calibration.
        checkpoint: Name of the checkpoint, for messages.

    Raises:
        CheckpointError: If it is anything else.

    >>> read_calibration([[1.2, -0.5], [1, 0]], "x")
    [(1.2, -0.5), (1.0, 0.0)]
    """
    if value is None:
        return []
    try:
        pairs = [(float(scale), float(offset)) for scale, offset in value]
        if not pairs or not all(math.isfinite(scale + offset) and scale > 0 for scale, offset in pairs):
            raise ValueError
    except (TypeError, ValueError):
        raise CheckpointError(
            f"{checkpoint}: phrase_calibration in config.json must be a list of [scale > 0, offset], got {value!r}"
        ) from None
    return pairs


class PhraseScorer:
    """Scores of the phrases of a prompt, in a few steps for all of them.

    Args:
        spans: Phrases, as in `Prompt`.
        reduction: `mean` or `max` of the probabilities of a phrase's tokens.
        calibration: Scales and offsets by number of tokens, as `read_calibration` returns them. The logit of each score
            is multiplied by a scale and an offset is added (Platt 1999), so that scores of phrases of different lengths
            mean the same.
        device: Where the logits are.

    >>> import torch
    >>> score = PhraseScorer([(0, 1, 3), (1, 4, 5)], "mean", [], "cpu")
    >>> score(torch.tensor([[0.0, 3.0, 3.0, 0.0, 0.0, 0.0]])).tolist()
    [[0.9525741338729858, 0.5]]
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int, int]],
        reduction: str,
        calibration: Sequence[tuple[float, float]],
        device: Any,
    ) -> None:
        import torch

        self.reduction = reduction
        lengths = [stop - start for _, start, stop in spans]
        longest = range(max(lengths))
        # Shorter phrases repeat their last token, which does not change the maximum and has no weight in the mean.
        tokens = [[min(start + i, stop - 1) for _, start, stop in spans] for i in longest]
        weights = [[float(i < length) / length for length in lengths] for i in longest]
        self._tokens, self._weights = torch.tensor(tokens, device=device), torch.tensor(weights, device=device)
        used = [calibration[min(length, len(calibration)) - 1] for length in lengths if calibration]
        self._calibration = torch.tensor(used, device=device).T if used else None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the scores `(..., phrases)` for the logits of tokens `(..., t)`."""
        import torch

        probability = logits.sigmoid()
        scores = torch.zeros((), device=logits.device)
        for tokens, weights in zip(self._tokens, self._weights, strict=True):  # the first of each phrase, the second...
            part = probability[..., tokens]
            scores = scores + part * weights if self.reduction == "mean" else torch.maximum(scores, part)
        if self._calibration is not None:
            scale, offset = self._calibration
            scores = (torch.logit(scores, eps=1e-6) * scale + offset).sigmoid()
        return scores


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt on the device.

    Attributes:
        prompt: The prompt.
        text: What the network made of it.
        score: Function from logits of tokens to scores of phrases.
        owners: Class id of each phrase, -1 for a negative.
    """

    prompt: Prompt
    text: Any
    score: PhraseScorer
    owners: Tensor


class GroundingDino:
    """Detect with any Grounding DINO or MM-Grounding-DINO checkpoint of transformers.

    Every query of the model gives one detection: its box, and the class whose best phrase scores highest. A phrase is
    scored over its own tokens only, so a label is always a class that the user named. Queries whose best phrase is a
    negative are dropped.

    Args:
        checkpoint: Hub id (LLMDet's load too), local folder, or `builtin:NAME`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        phrase_score: How token probabilities become the score of a phrase: `mean`, as in the evaluation of Grounding
            DINO and MMDetection, where every word has to fit; or `max`, as in transformers' post-processing, where one
            word is enough.
        batch_size: Images per forward pass; None for 8 on CUDA and 1 elsewhere, since batches are no faster on a CPU.
        precision: `exact` with patches that do not change results; `balanced` and `fast` with more bfloat16.
        compile: Compile the slowest layers with `torch.compile`; pays off with many images.
        backend: What runs the image backbone on a CPU: `torch`, `openvino` or `onnxruntime` (extras). The last two
            convert it for each image size.
        export_dir: Folder for the exported backbone; None exports it again in every run.

    Raises:
        CheckpointError: If the checkpoint is missing, or of another model family.
        ConfigError: If a setting is not allowed, or settings do not work together.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        dtype: Dtype = "float32",
        phrase_score: Literal["mean", "max"] = "mean",
        batch_size: int | None = None,
        precision: Precision = "exact",
        compile: bool = False,
        backend: Backend = "torch",
        export_dir: str | None = None,
    ) -> None:
        check_choice("detector.phrase_score", phrase_score, ("mean", "max"))
        check_model_settings(dtype, batch_size)
        check_precision(precision, compile, "detector")
        backend_settings = BackendSettings(backend, export_dir)
        backend_settings.validate(pick_device(device), "detector")
        if backend != "torch" and dtype != "float32":
            raise ConfigError(f"detector.backend={backend} needs detector.dtype=float32, got {dtype}")
        import torch

        self.device, self.dtype = pick_device(device), getattr(torch, dtype)
        self.phrase_score = phrase_score
        self.batch_size = batch_size or (8 if self.device.startswith("cuda") else 1)
        processor, model = load_detector(checkpoint, ("grounding-dino", "mm-grounding-dino"), torch.float32)
        self.model = model.to(self.device)
        self.network = speed_up(self.model, precision, compile, backend_settings, dtype)
        self.image_processor, self.tokenizer = processor.image_processor, processor.tokenizer
        backbone = model.config.backbone_config
        # Swin pads images to whole patches itself; other backbones would take the padding for a part of the image.
        self._size_step = backbone.patch_size if backbone.model_type == "swin" else 1
        self.calibration = read_calibration(getattr(model.config, "phrase_calibration", None), checkpoint)
        self._prompts: dict[Vocabulary, list[Prompt]] = {}
        self._encoded: OrderedDict[Vocabulary, list[EncodedPrompt]] = OrderedDict()

    def prompts(self, vocabulary: Vocabulary) -> list[Prompt]:
        """Return the prompts for a vocabulary; computed once."""
        if vocabulary not in self._prompts:
            tokenizer = self.tokenizer
            special = SpecialTokens(
                tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.convert_tokens_to_ids(".")
            )

            def tokenize(phrase: str) -> list[int]:
                return tokenizer(phrase.lower(), add_special_tokens=False)["input_ids"]

            check_words(vocabulary, tokenize, tokenizer.unk_token_id)
            limit = self.model.config.max_text_len
            self._prompts[vocabulary] = write_prompts(vocabulary, tokenize, special, limit)
        return self._prompts[vocabulary]

    def batch_key(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the size of a frame as the model gets it, which frames of a forward pass have in common.

        Args:
            size_hw: Height and width of the frame in pixels.

        Returns:
            Height and width after resizing, rounded up to whole patches of a Swin backbone.
        """
        from transformers.image_transforms import get_size_with_aspect_ratio

        size = dict(self.image_processor.size)
        if not self.image_processor.do_resize or set(size) != {"shortest_edge", "longest_edge"}:
            return size_hw
        height, width = get_size_with_aspect_ratio(size_hw, size["shortest_edge"], size["longest_edge"])
        step = self._size_step
        return -(-height // step) * step, -(-width // step) * step

    def prepare(self, frames: Sequence[Frame]) -> Tensor:
        """Resize and normalize frames with the same `batch_key`, and pad them with zeros to whole patches.

        Returns:
            `(b, 3, h, w)` on the device, in the dtype of the model.
        """
        from torch.nn.functional import pad

        images = [frame.image for frame in frames]
        pixels = grounding_dino_input(images, self.image_processor, self.device).to(self.dtype)
        height, width = pixels.shape[2:]
        return pad(pixels, (0, -width % self._size_step, 0, -height % self._size_step))

    def encoded_prompts(self, vocabulary: Vocabulary) -> list[EncodedPrompt]:
        """Return the prompts for a vocabulary on the device; those of the last `MAX_VOCABULARIES` are kept."""
        import torch

        if vocabulary not in self._encoded:
            self._encoded[vocabulary] = [
                EncodedPrompt(
                    prompt,
                    self.network.encode_text(prompt.ids),
                    PhraseScorer(prompt.spans, self.phrase_score, self.calibration, self.device),
                    torch.tensor([class_id for class_id, _, _ in prompt.spans], device=self.device),
                )
                for prompt in self.prompts(vocabulary)
            ]
            if len(self._encoded) > MAX_VOCABULARIES:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(vocabulary)
        return self._encoded[vocabulary]

    def forward(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> Iterator[tuple[EncodedPrompt, Predictions]]:
        """Yield the predictions for each prompt; the image backbone runs once for all.

        Args:
            frames: Frames with the same `batch_key`.
            vocabulary: Classes to look for.
        """

        with inference():
            images = self.network.encode_images(self.prepare(frames))
            for encoded in self.encoded_prompts(vocabulary):
                yield encoded, self.network.predict(images, encoded.text)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return one detection per query and prompt, except those whose best phrase is a negative; no threshold.

        Frames of different sizes run in forward passes of their own, so that each has the result that it has alone.
        """
        groups = defaultdict(list)
        for row, frame in enumerate(frames):
            groups[self.batch_key(frame.size_hw)].append(row)
        results: dict[int, sv.Detections] = {}
        for rows in groups.values():
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                detected = self._detect_batch([frames[row] for row in batch], vocabulary)
                results |= zip(batch, detected, strict=True)
        return [results[row] for row in range(len(frames))]

    def _detect_batch(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the detections of frames with the same `batch_key`."""
        import torch

        parts = []
        for encoded, output in self.forward(frames, vocabulary):
            confidence, phrase = encoded.score(output.logits).max(-1)
            class_ids = encoded.owners[phrase]
            parts.append(torch.cat((output.pred_boxes, confidence[..., None], class_ids[..., None]), -1))
        found = torch.cat(parts, 1).cpu()  # one download for all frames and prompts
        return [self._to_detections(rows, frame, vocabulary) for rows, frame in zip(found, frames, strict=True)]

    def _to_detections(self, rows: Tensor, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        """Convert rows of box, confidence and class id, without those of negatives."""
        height, width = frame.size_hw
        rows = rows[rows[:, 5] >= 0]
        xyxy = cxcywh_to_xyxy(rows[:, :4], (width, height))
        class_ids = rows[:, 5].int().numpy()
        return make_detections(xyxy, rows[:, 4].numpy(), class_ids, vocabulary, frame.size_hw)
