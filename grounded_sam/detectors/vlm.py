"""Vision-language models that write boxes or points as text, such as Qwen3-VL and Molmo 2, with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_choice, check_int
from grounded_sam.detectors.queries import Dtype, check_model_settings, drop_negatives, phrases_of
from grounded_sam.detectors.written_objects import Form, WrittenObject, parse_answer, span_score
from grounded_sam.errors import CheckpointError, ConfigError, VocabularyError, count_of, shorten
from grounded_sam.structures.detections import make_detections, select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import Skipped
from grounded_sam.structures.vocabulary import Vocabulary, name_key
from grounded_sam.weights.loading import load_checkpoint, pick_device

if TYPE_CHECKING:
    from torch import Tensor

Coordinates = Literal["relative", "input"]
Ask = Literal["together", "each"]
#: Form and coordinates of the answers of the models that are known, by `model_type`.
MODELS: dict[str, tuple[Form, Coordinates]] = {
    "qwen3_vl": ("boxes", "relative"),
    "qwen3_vl_moe": ("boxes", "relative"),
    "qwen2_5_vl": ("boxes", "input"),
    "molmo2": ("tags", "relative"),
}
#: Questions of the authors: evaluation/ODinW-13 in the repository of Qwen3-VL, and the training data of Molmo 2.
PROMPTS: dict[Form, str] = {
    "boxes": "Locate every instance that belongs to the following categories: '{}'. "
    "Report bbox coordinates in JSON format.",
    "points": "Locate every instance that belongs to the following categories: '{}'. "
    "Report point coordinates in JSON format.",
    "tags": "Point to {}\nPlease say 'There are none.' if it is not in the image.",
}
#: Largest value of a relative coordinate.
RELATIVE = 1000
#: Frames whose refused answers are kept until somebody takes them.
MAX_NOTES = 1000


class Vlm:
    """Detect with a language model that writes boxes or points.

    What it writes is read strictly (see `written_objects`): what is no valid box or point inside the image, or has a
    label that is no phrase, is refused, counted and named. A point becomes a click for the segmenter, and a box of one
    pixel without one. Boxes that overlap a box of a negative phrase at an IoU of 0.5 or more are dropped.

    **Without `score=tokens` there are no scores**: every box has confidence 1, so thresholds and rankings have no
    effect. With it, the score is the geometric mean of the probabilities of the tokens that write the digits of the
    box, which says how certain the model was of its digits, not whether there is such an object.

    Args:
        checkpoint: Hub id or local folder of an image-text-to-text model of transformers.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        answer: What the model writes: `boxes`, `points` or `tags`, as `written_objects` shows; None for a model that
            is known.
        coordinates: `relative`, 0 to 1000 along each side, or `input`, pixels of the image as the model gets it; None
            for a model that is known.
        ask: `together`, all phrases in one prompt, or `each`; None for `together` with boxes, else `each`.
        prompt: Question with `{}` for the phrases; None for that of the authors.
        score: `none` or `tokens`.
        max_new_tokens: Maximum length of an answer.

    Raises:
        CheckpointError: If the checkpoint is missing, or has no chat template.
        ConfigError: If a setting is not allowed, or one is needed since the model is not known.
    """

    def __init__(
        self,
        checkpoint: str = "Qwen/Qwen3-VL-2B-Instruct",
        device: str = "auto",
        dtype: Dtype = "bfloat16",
        answer: Form | None = None,
        coordinates: Coordinates | None = None,
        ask: Ask | None = None,
        prompt: str | None = None,
        score: Literal["none", "tokens"] = "none",
        max_new_tokens: int = 2048,
    ) -> None:
        check_model_settings(dtype)
        check_choice("detector.answer", answer, tuple(PROMPTS), optional=True)
        check_choice("detector.coordinates", coordinates, ("relative", "input"), optional=True)
        check_choice("detector.ask", ask, ("together", "each"), optional=True)
        check_choice("detector.score", score, ("none", "tokens"))
        check_int("detector.max_new_tokens", max_new_tokens, 1)
        if prompt is not None and (not isinstance(prompt, str) or "{}" not in prompt):
            raise ConfigError(f"detector.prompt must contain {{}} for the phrases, got {shorten(prompt)}")
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        self.device, self.dtype = pick_device(device), getattr(torch, dtype)
        kinds = list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
        model, self.processor = load_checkpoint(
            checkpoint, kinds, AutoModelForImageTextToText, [AutoProcessor], self.dtype
        )
        known = MODELS.get(model.config.model_type, (answer, coordinates))
        form, self.coordinates = answer or known[0], coordinates or known[1]
        if form is None or self.coordinates is None:
            raise ConfigError(
                f"{checkpoint} is a {model.config.model_type}, whose answers are not known: set detector.answer and "
                f"detector.coordinates (known are {', '.join(MODELS)})"
            )
        self.form: Form = form
        if ask == "together" and form == "tags":
            raise ConfigError("detector.ask=together needs labels, and tags have none; use detector.ask=each")
        if self.processor.chat_template is None:
            raise CheckpointError(f"{checkpoint} has no chat template, so it cannot be asked")
        self.together = ask == "together" if ask is not None else self.form == "boxes"
        self.prompt, self.scores, self.max_new_tokens = prompt or PROMPTS[self.form], score, max_new_tokens
        self.model = model.to(self.device)
        self._refused: list[Skipped] = []

    def take_refused(self) -> list[Skipped]:
        """Return what was refused since the last call, one entry per frame, at most for the last `MAX_NOTES` frames."""
        refused, self._refused = self._refused, []
        return refused

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return all boxes or points that the model writes."""
        return [self._detect(frame, vocabulary) for frame in frames]

    def _detect(self, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        phrases, owners = phrases_of(vocabulary)
        self._check_phrases(phrases)
        found: list[tuple[int, list[float], float]] = []  # class id, pixels and score
        refused: list[str] = []
        groups = [list(range(len(phrases)))] if self.together else [[i] for i in range(len(phrases))]
        for group in groups:
            question = self.prompt.replace("{}", ", ".join(phrases[i] for i in group))
            text, tokens, input_wh = self.generate(frame, question)
            answer = parse_answer(text, self.form, input_wh)
            refused += [*answer.refused, *self._check_length(tokens)]
            by_key = {name_key(phrases[i]): owners[i] for i in group}
            scores = self._confidence(text, tokens, answer.objects)
            for item, score in zip(answer.objects, scores, strict=True):
                label = None if item.label is None else by_key.get(name_key(item.label))
                owner = owners[group[0]] if len(group) == 1 else label
                if owner is None:
                    refused.append(f"the label {shorten(item.label)}, which is none of the phrases")
                    continue
                scale = np.tile(np.array(frame.size_hw[::-1]) / np.array(input_wh), len(item.numbers) // 2)
                found.append((owner, (np.array(item.numbers) * scale).tolist(), score))
        self._note(frame, refused, len(found))
        return self._to_detections(frame, found, vocabulary)

    def _check_phrases(self, phrases: Sequence[str]) -> None:
        """Check that no phrase has a special token of the model, such as that of an image.

        Raises:
            VocabularyError: If one has.
        """
        special = set(self.processor.tokenizer.all_special_tokens)
        special |= set(self.processor.tokenizer.get_added_vocab())
        for phrase in phrases:
            inside = sorted(token for token in special if token.strip() and token in phrase)
            if inside:
                raise VocabularyError(f"the phrase {phrase!r} contains {inside[0]!r}, which controls the model")

    def generate(self, frame: Frame, question: str) -> tuple[str, list[tuple[int, float]], tuple[float, float]]:
        """Ask the model about a frame; greedy decoding.

        Args:
            frame: The frame.
            question: The prompt.

        Returns:
            The answer; the id and the log-probability of each of its tokens (0 without `score=tokens`); and the largest
            x and y that the model may write.
        """
        import torch
        from PIL import Image
        from transformers import LogitsProcessorList

        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=[Image.fromarray(frame.image)], return_tensors="pt")
        values = {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in inputs.items()
        }
        logs: list[Tensor] = []

        def record(_: Tensor, logits: Tensor) -> Tensor:
            logs.append(logits[0].float().log_softmax(-1).max())  # of the token that is taken
            return logits

        with torch.inference_mode():
            output = self.model.generate(
                **values,
                logits_processor=LogitsProcessorList([record] if self.scores == "tokens" else []),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                temperature=None,  # of the checkpoint, for sampling
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,  # a penalty would change the digits of one box because of another's
            )
        ids = output[0, values["input_ids"].shape[1] :].tolist()
        values_of_logs = torch.stack(logs).tolist() if logs else [0.0] * len(ids)
        tokens = list(zip(ids, values_of_logs, strict=True))
        return self._decode(tokens), tokens, self._input_wh(inputs)

    def _decode(self, tokens: Sequence[tuple[int, float]]) -> str:
        return str(self.processor.tokenizer.decode([token for token, _ in tokens], skip_special_tokens=True))

    def _input_wh(self, inputs: Any) -> tuple[float, float]:
        """Return the largest x and y that the model may write.

        Raises:
            ConfigError: If the size of the model's input is not known.
        """
        if self.coordinates == "relative":
            return RELATIVE, RELATIVE
        if "image_grid_thw" not in inputs:
            raise ConfigError("detector.coordinates=input needs a model that says its input size; use relative")
        _, height, width = inputs["image_grid_thw"][0].tolist()
        side = self.processor.image_processor.patch_size
        return width * side, height * side

    def _check_length(self, tokens: Sequence[tuple[int, float]]) -> list[str]:
        """Return a reason if the answer does not end."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if len(tokens) < self.max_new_tokens or (tokens and tokens[-1][0] in ends):
            return []
        return [f"what follows after {self.max_new_tokens} tokens; raise detector.max_new_tokens"]

    def _confidence(
        self, text: str, tokens: Sequence[tuple[int, float]], objects: Sequence[WrittenObject]
    ) -> list[float]:
        """Return the confidence of each object of an answer."""
        if self.scores == "none" or not objects:
            return [1.0] * len(objects)
        stops = [len(self._decode(tokens[: i + 1])) for i in range(len(tokens))]
        return [span_score(text, item, stops, lambda token: tokens[token][1]) for item in objects]

    def _note(self, frame: Frame, refused: Sequence[str], accepted: int) -> None:
        """Keep what was refused of the answers about a frame."""
        if refused:
            parts = count_of(len(refused), "part")
            reason = f"{parts} of the answer refused, {count_of(accepted, 'object')} read; the first: {refused[0]}"
            self._refused = [*self._refused[1 - MAX_NOTES :], Skipped(frame.name, reason)]

    def _to_detections(
        self, frame: Frame, found: Sequence[tuple[int, list[float], float]], vocabulary: Vocabulary
    ) -> sv.Detections:
        """Convert boxes and points to detections, and drop those that negatives overlap."""
        owners = np.array([owner for owner, _, _ in found], np.int64)
        scores = np.array([score for _, _, score in found], np.float32)
        columns: dict[str, NDArray[Any]] = {}
        if self.form == "boxes":
            boxes = np.array([numbers for _, numbers, _ in found], np.float32).reshape(-1, 4)
        else:
            height, width = frame.size_hw
            points = np.array([numbers for _, numbers, _ in found], np.float32).reshape(-1, 2)
            points = points.clip(0, [width - 1, height - 1]).astype(np.float32)
            boxes = np.concatenate([points, points + 1], 1)
            columns = {name: np.full(len(points), None, object) for name in ("points", "labels", "prompt_mask")}
            for i, point in enumerate(points):
                columns["points"][i], columns["labels"][i] = point[None], np.ones(1, np.int64)
            columns["prompt_box"] = np.zeros(len(points), bool)
        ids = owners.clip(0)
        detections = make_detections(boxes, scores, ids, vocabulary, frame.size_hw, owner=owners, **columns)
        positive = np.asarray(detections.data.pop("owner")) >= 0
        negatives, sure = owners < 0, self.scores == "none"
        return drop_negatives(
            select_rows(detections, positive),
            boxes[negatives],
            np.full(negatives.sum(), np.inf) if sure else scores[negatives],
        )
