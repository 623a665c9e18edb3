"""SAM 3's concept segmentation, over transformers: words to masks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import supervision as sv

from grounded_sam.detectors.queries import check_settings, drop_negatives, phrases_of
from grounded_sam.errors import ConfigError, ImageError, VocabularyError
from grounded_sam.structures.clicks import Click, read_click, read_json_entries
from grounded_sam.structures.detections import make_detections, merge_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import load_checkpoint, pick_device

if TYPE_CHECKING:
    from torch import Tensor

#: Tokens that the text encoder takes of a phrase, as `Sam3Processor` has it.
LIMIT = 32


class Sam3:
    """Boxes and masks of everything that a phrase means (SAM 3, Carion et al. 2025).

    The image is encoded once for all phrases, each phrase once for all images; per phrase every query of the model
    gives a detection with score, box and mask, as `Sam3Processor.post_process_instance_segmentation` has them. Phrases
    do not compete inside the model, so a detection that a surer one of a negative phrase overlaps (IoU of boxes from
    0.5) is dropped here.

    Args:
        checkpoint: a hub id or a local folder of a `Sam3Model`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`...
        dtype: weights and computation: `float32`, `bfloat16` or `float16`.
        own_masks: give SAM 3's masks; false gives boxes, for a segmenter.
        floor: detections below this confidence are not given, since each has a mask of the size of the image.
        exemplars: boxes by hand that show what is meant, beside the words, each in the picture that it was drawn in: a
            JSON file, or entries with `class`, `box` (`[x1, y1, x2, y2]` pixels), maybe `negative: true` for what is
            not meant, and `image` (a name as in the output, or its end; without it the box holds for every picture).

    Raises:
        CheckpointError: if the checkpoint cannot be had or is of another family.
    """

    def __init__(
        self,
        checkpoint: str = "facebook/sam3",
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        own_masks: bool = True,
        floor: float = 0.05,
        exemplars: str | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        check_settings(dtype)
        if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
            raise ConfigError(f"detector.floor must be a number from 0 to 1, got {floor!r}")
        self.exemplars = read_exemplars(exemplars)
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer, Sam3Model

        self.device, self.dtype = pick_device(device), getattr(torch, dtype)
        self.own_masks, self.floor = own_masks, floor
        kinds, parts = ("sam3", "sam3_video"), [AutoImageProcessor, AutoTokenizer]
        model, self.images, self.words = load_checkpoint(checkpoint, kinds, Sam3Model, parts, self.dtype)
        self.model = model.to(self.device)
        self._asked: dict[Vocabulary, list[tuple[int, Any, Tensor]]] = {}

    def _texts(self, vocabulary: Vocabulary) -> list[tuple[int, Any, Tensor]]:
        """Of each phrase its class (-1 for a negative), its features, and which tokens are there."""
        import torch

        if vocabulary not in self._asked:
            texts = []
            for phrase, owner in zip(*phrases_of(vocabulary), strict=True):
                given = tokens_of(phrase, self.words).to(self.device)
                with torch.inference_mode():
                    ids, mask = given["input_ids"], given["attention_mask"]
                    features = self.model.get_text_features(input_ids=ids, attention_mask=mask, return_dict=True)
                texts.append((owner, features, mask))
            self._asked[vocabulary] = texts
        return self._asked[vocabulary]

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Every detection from `floor` on, with its mask."""
        return [self._one(frame, vocabulary) for frame in frames]

    def _shown(self, frame: Frame, vocabulary: Vocabulary) -> dict[int, dict[str, Tensor]]:
        """By class what the model takes of the exemplars of a frame: boxes by centre and size, 0 to 1, and labels.

        Raises:
            ConfigError: if one names a class that the vocabulary has not; ImageError: if one lies outside the frame.
        """
        import torch

        unknown = sorted({exemplar.name for exemplar, _ in self.exemplars} - set(vocabulary.classes))
        if unknown:
            raise ConfigError(
                f"detector.exemplars name the classes {', '.join(map(repr, unknown))}, which text has not; "
                f"it has {', '.join(map(repr, vocabulary.classes))}"
            )
        height, width = frame.size_hw
        given: dict[int, tuple[list[Any], list[int]]] = {}
        for exemplar, label in self.exemplars:
            if exemplar.holds_for(frame) and exemplar.box is not None:
                if (exemplar.box < 0).any() or (exemplar.box > [width, height, width, height]).any():
                    raise ImageError(
                        f"exemplar box {exemplar.box.tolist()} lies outside {frame.name}, which is {width}x{height} px"
                    )
                boxes, labels = given.setdefault(vocabulary.classes.index(exemplar.name), ([], []))
                boxes.append(exemplar.box / np.array([width, height, width, height], np.float32))
                labels.append(label)
        out = {}
        for owner, (boxes, labels) in given.items():
            corners = torch.from_numpy(np.stack(boxes))[None].to(self.device, self.dtype)
            middles = torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], -1)
            out[owner] = {"input_boxes": middles, "input_boxes_labels": torch.tensor([labels], device=self.device)}
        return out

    def _one(self, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        import torch

        given = self.images(images=frame.image, return_tensors="pt")
        height, width = frame.size_hw
        shown = self._shown(frame, vocabulary)
        parts: list[sv.Detections] = []
        against: list[tuple[float, Any]] = []  # of negatives
        with torch.inference_mode():
            seen = self.model.get_vision_features(given["pixel_values"].to(self.device, self.dtype))
            for owner, text, mask in self._texts(vocabulary):
                out = self.model(vision_embeds=seen, text_embeds=text, attention_mask=mask, **shown.get(owner, {}))
                scores = out.pred_logits.float().sigmoid()
                if out.presence_logits is not None:
                    scores = scores * out.presence_logits.float().sigmoid()
                kept = scores[0] > self.floor
                confidence = scores[0][kept].cpu().numpy()
                boxes = out.pred_boxes[0][kept].float().cpu().numpy() * np.array([width, height, width, height])
                if owner < 0:
                    against += zip(confidence.tolist(), boxes, strict=True)
                    continue
                masks = None
                if self.own_masks:
                    soft = out.pred_masks[0][kept].float().sigmoid()
                    masks = np.zeros((len(soft), height, width), bool)
                    for one, whole in zip(soft, masks, strict=True):  # each by itself: at image size they are large
                        sized = torch.nn.functional.interpolate(one[None, None], (height, width), mode="bilinear")
                        whole[:] = (sized[0, 0] > 0.5).cpu().numpy()
                ids = np.full(len(confidence), owner)
                parts.append(make_detections(boxes, confidence, ids, vocabulary, frame.size_hw, masks))
        boxes, scores = [box for _, box in against], [score for score, _ in against]
        return drop_negatives(merge_detections(parts, vocabulary), np.array(boxes), np.array(scores))


def tokens_of(phrase: str, words: Any) -> Any:
    """What SAM 3's tokenizer makes of a phrase.

    Raises:
        VocabularyError: if it is longer than the model takes.
    """
    count = len(words(phrase)["input_ids"])
    if count > LIMIT:
        raise VocabularyError(f"{phrase!r} has {count} tokens, the model takes {LIMIT} of a phrase")
    return words([phrase], padding="max_length", max_length=LIMIT, return_tensors="pt")


def read_exemplars(entries: str | Sequence[Mapping[str, Any]] | None) -> list[tuple[Click, int]]:
    """Boxes with 1 for what is meant and 0 for what is not; see `Sam3`.

    Raises:
        ConfigError: if the file cannot be read or an entry is wrong, naming the entry.
    """
    if isinstance(entries, str):
        entries = read_json_entries(Path(entries).expanduser(), "detector.exemplars")
    out = []
    for i, entry in enumerate(entries or ()):
        where = f"detector.exemplars[{i}]"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}: expected a mapping with class and box, got {entry!r}")
        unknown = sorted(set(entry) - {"class", "box", "image", "negative"})
        if unknown or entry.get("box") is None:
            what = f"unknown key {unknown[0]!r}" if unknown else "box is missing"
            raise ConfigError(f"{where}: {what}; the keys are class, box, image, negative")
        negative = entry.get("negative", False)
        if not isinstance(negative, bool):
            raise ConfigError(f"{where}: negative must be true or false, got {negative!r}")
        rest = {key: value for key, value in entry.items() if key != "negative"}
        out.append((read_click(rest, where, Path()), int(not negative)))
    return out
