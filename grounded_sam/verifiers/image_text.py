"""Verify detections: compare crops of them with their own phrase, the other ones, and examples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_bool, check_choice, check_number
from grounded_sam.errors import CheckpointError, ConfigError
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.verifiers.calibration import MAX_MARGIN, ScoreWeights, to_logit, to_probability
from grounded_sam.verifiers.crops import crop_square, dim_surroundings
from grounded_sam.verifiers.embedding import ImageTextModel
from grounded_sam.verifiers.prototypes import Prototypes

#: Kinds of crops.
CROPS = ("masked", "box")
#: Vocabularies whose embedded phrases are kept.
MAX_VOCABULARIES = 32
#: Logit that stands for "nothing to compare with".
NOTHING = -1e9


@dataclass(frozen=True)
class _Phrases:
    """The embedded phrases of a vocabulary.

    Attributes:
        embeddings: `(p, d) float32`.
        owners: Class id of each phrase, -1 for what competes with all classes, `(p,)`.
    """

    embeddings: NDArray[np.float32]
    owners: NDArray[np.int64]


class ImageTextVerifier:
    """Judge detections on square crops, by text or by examples, with SigLIP, SigLIP 2 or CLIP.

    `data["verify_score"]` is the sigmoid of a logit. With `score: sigmoid` this is the model's own logit of the best
    phrase of the class or, if that is lower, how far it is above the best negative or background phrase. With
    `score: relative` it is how far it is above the logarithm of the summed exponentials of these, which for CLIP is
    zero-shot classification of the phrase against them: published models rank phrases well, but their sigmoids are
    not probabilities for crops.

    `data["verify_margin"]` is how far the logit of the class is above that of the best other one, -10 to 10.
    `data["calibrated_score"]` combines these with the other scores, see `calibration.ScoreWeights`, and
    `metadata["presence"]` maps each class that was detected to the probability that it is in the image at all: the same
    combination for its best box, which has the largest product of confidence and verify score. If the detector
    estimates presence (SAM 3), the logits of both are averaged.

    Args:
        checkpoint: Hub id, local folder, or `builtin:shapes`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        batch_size: Crops per forward pass.
        min_score: Detections with a lower confidence are dropped before masks are made.
        crops: What the model sees of a detection, `masked` (what its mask leaves out is dimmed), `box` (all of the
            box with its margin), or both, whose logits are averaged. Without masks both are the same.
        margin: Side of a crop, as a multiple of the longer side of the box.
        dim: How far pixels outside the mask are dimmed, from 0 to 1 for plain gray.
        prompt_template: Template for each phrase, such as `a photo of a {}`.
        background: Phrases that compete with all classes, beside the vocabulary's negatives.
        score: `sigmoid` or `relative`; see above.
        calibration: Weights of the calibrated score; None for those of the checkpoint, else for equal ones.
        presence: Weights of presence, likewise.
        whole_image: Whether presence averages the logits of the best box and of the whole image.
        examples: Examples by class; see `formats.examples`.
        negative_examples: Example images of look-alikes, which compete with all classes.
        words: Whether classes with examples are compared with their phrases as well; the better one counts.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged or of another model.
        ConfigError: If a setting is out of range, or `score: relative` has nothing to compare with.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 64,
        min_score: float = 0.1,
        crops: Sequence[str] | str = ("box", "masked"),
        margin: float = 1.25,
        dim: float = 0.7,
        prompt_template: str = "{}",
        background: Sequence[str] = (),
        score: Literal["sigmoid", "relative"] = "relative",
        calibration: Mapping[str, float] | None = None,
        presence: Mapping[str, float] | None = None,
        whole_image: bool = False,
        examples: Any = None,
        negative_examples: Any = None,
        words: bool = False,
    ) -> None:
        self.crops = (crops,) if isinstance(crops, str) else tuple(crops)
        if not self.crops:
            raise ConfigError(f"verify.crops must be some of {', '.join(CROPS)}, got none")
        for name in self.crops:
            check_choice("verify.crops", name, CROPS)
        check_number("verify.min_score", min_score, 0, 1)
        check_number("verify.margin", margin, 1)
        check_number("verify.dim", dim, 0, 1)
        check_choice("verify.score", score, ("sigmoid", "relative"))
        check_bool("verify.whole_image", whole_image)
        check_bool("verify.words", words)
        if prompt_template.count("{}") != 1:
            raise ConfigError(f"verify.prompt_template must have one {{}}, got {prompt_template!r}")
        self.min_score, self.margin, self.dim, self.score = min_score, margin, dim, score
        self.prompt_template, self.background = prompt_template, tuple(background or ())
        if score == "relative" and not self.background:
            raise ConfigError("verify.score=relative needs phrases to compare with; list some in verify.background")
        self.network = ImageTextModel(checkpoint, device, dtype, batch_size)
        self.model = self.network.model
        if score == "sigmoid" and self.network.kind == "clip":
            raise ConfigError("CLIP has no sigmoid; use verify.score=relative")
        fitted = getattr(self.model.config, "verification", None) or {}
        if not isinstance(fitted, Mapping):
            raise CheckpointError(f"{checkpoint}: verification in config.json must be a mapping, got {fitted!r}")
        self.calibration = ScoreWeights.read(calibration or fitted.get("calibration"), "verify.calibration")
        self.presence = ScoreWeights.read(presence or fitted.get("presence"), "verify.presence")
        self.whole_image, self.words = whole_image, words
        self.prototypes = Prototypes(self.network, fitted.get("examples"), examples, negative_examples)
        self._phrases: OrderedDict[Vocabulary, _Phrases] = OrderedDict()

    def verify(
        self, images: Sequence[NDArray[np.uint8]], detections: Sequence[sv.Detections], vocabulary: Vocabulary
    ) -> list[sv.Detections]:
        """Judge the detections of images; see the class and `structures.protocols.Verifier`.

        Raises:
            ConfigError: If there are examples of a class that the vocabulary lacks.
        """
        self.prototypes.check_classes(vocabulary)
        numbers: dict[bytes, int] = {}  # of distinct crops, since one box may have several classes
        crops: list[NDArray[np.uint8]] = []
        views: list[NDArray[np.int64]] = []  # by image, numbers of the crops of each detection
        for image, part in zip(images, detections, strict=True):
            of_part = [self._crops(image, part, i) for i in range(len(part))]
            rows = [[self._number(crop, numbers, crops) for crop in of_row] for of_row in of_part]
            views.append(np.array(rows, np.int64).reshape(len(part), len(self.crops)))
        whole = [self._number(self._whole(image), numbers, crops) for image in images] if self.whole_image else []
        embeddings = self.network.embed_crops(crops)
        logits, against = self._logits(embeddings, vocabulary)
        results = []
        for i, (part, rows_) in enumerate(zip(detections, views, strict=True)):
            classes = logits[rows_].mean(1)
            judged, margin = self._judge(part, classes, against[rows_].mean(1))
            of_image = (logits[whole[i]], against[whole[i]]) if self.whole_image else None
            presence = self._presence(judged, margin, of_image)
            judged.metadata = {**part.metadata, "presence": _averaged(presence, part.metadata.get("presence"))}
            results.append(judged)
        return results

    @staticmethod
    def _number(crop: NDArray[np.uint8], numbers: dict[bytes, int], crops: list[NDArray[np.uint8]]) -> int:
        """Return the number of a crop, and add it to the list if it is new."""
        number = numbers.setdefault(crop.tobytes(), len(crops))
        if number == len(crops):
            crops.append(crop)
        return number

    def _crops(self, image: NDArray[np.uint8], detections: sv.Detections, i: int) -> list[NDArray[np.uint8]]:
        """Return the crops of a detection, one for each of `self.crops`."""
        box, size = detections.xyxy[i], self.network.size
        crop = crop_square(image, box, self.margin, size)
        mask = None if detections.mask is None else np.asarray(detections.mask[i], bool)
        if mask is None or "masked" not in self.crops or not mask.any():
            return [crop] * len(self.crops)
        masked = dim_surroundings(crop, crop_square(mask, box, self.margin, size, fill=0), self.dim)
        return [masked if name == "masked" else crop for name in self.crops]

    def _whole(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = image.shape[:2]
        return crop_square(image, np.array([0, 0, width, height]), 1.0, self.network.size)

    def _embed_phrases(self, vocabulary: Vocabulary) -> _Phrases:
        """Embed the phrases of a vocabulary, its negatives and the background; done once per vocabulary."""
        if vocabulary not in self._phrases:
            pairs = [(phrase, i) for i, phrases in enumerate(vocabulary.phrases) for phrase in phrases]
            pairs += [(phrase, -1) for phrase in (*vocabulary.negatives, *self.background)]
            texts = [self.prompt_template.replace("{}", phrase) for phrase, _ in pairs]
            owners = np.array([owner for _, owner in pairs], np.int64)
            self._phrases[vocabulary] = _Phrases(self.network.embed_texts(texts), owners)
            while len(self._phrases) > MAX_VOCABULARIES:
                self._phrases.popitem(last=False)
        self._phrases.move_to_end(vocabulary)
        return self._phrases[vocabulary]

    def _logits(
        self, embeddings: NDArray[np.float32], vocabulary: Vocabulary
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the logits of crops and classes `(n, c)`, and those of what competes with all classes `(n,)`."""
        phrases = self._embed_phrases(vocabulary)
        logits = np.float64(self.network.scale) * (embeddings @ phrases.embeddings.T) + self.network.bias
        classes = np.full((len(embeddings), len(vocabulary)), NOTHING)
        for column, owner in enumerate(phrases.owners.tolist()):
            if owner >= 0:
                classes[:, owner] = np.maximum(classes[:, owner], logits[:, column])
        others = logits[:, phrases.owners < 0]
        against = np.full(len(embeddings), NOTHING)
        if others.shape[1]:
            against = np.logaddexp.reduce(others, 1) if self.score == "relative" else others.max(1)
        if self.prototypes.classes:
            by_example, look_alike = self.prototypes.logits(embeddings)
            for name, column_ in zip(self.prototypes.classes, by_example.T, strict=True):
                i = vocabulary.index(name)
                assert i is not None
                # Examples have logits of their own, which are not compared with those of words.
                own = np.minimum(column_, column_ - look_alike)
                classes[:, i] = np.maximum(classes[:, i] - self._rivals(against), own) if self.words else own
                classes[:, i] += self._rivals(against)
        return classes, against

    def _rivals(self, against: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what `_judge` subtracts from the logits of a class, 0 where there is nothing."""
        return np.where(against > NOTHING, np.maximum(against, 0) if self.score == "sigmoid" else against, 0.0)

    def _score(self, own: NDArray[np.float64], against: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the verify scores for logits of the own class and of what competes with it, `(n,) float32`."""
        logit = own - self._rivals(against)
        return to_probability(logit).astype(np.float32)

    def _judge(
        self, detections: sv.Detections, classes: NDArray[np.float64], against: NDArray[np.float64]
    ) -> tuple[sv.Detections, NDArray[np.float64]]:
        """Return the detections of an image with their scores, and the margins to the best other class, `(n,)`."""
        assert detections.class_id is not None and detections.confidence is not None
        rows, ids = np.arange(len(detections)), detections.class_id
        own = classes[rows, ids]
        others = classes.copy()
        others[rows, ids] = NOTHING
        rival = others.max(1, initial=NOTHING)
        margin = np.where(rival > NOTHING / 2, own - rival, np.inf)
        verify_score = self._score(own, against)
        mask_score = detections.data.get("mask_score")
        calibrated = self.calibration.probability(detections.confidence, verify_score, margin, mask_score)
        judged = select_rows(detections, rows)
        judged.data |= {
            "verify_score": verify_score,
            "verify_margin": margin.clip(-MAX_MARGIN, MAX_MARGIN).astype(np.float32),
            "calibrated_score": calibrated,
        }
        return judged, margin

    def _presence(
        self,
        detections: sv.Detections,
        margin: NDArray[np.float64],
        whole: tuple[NDArray[np.float64], np.float64] | None,
    ) -> dict[str, float]:
        """Return how likely each detected class is in the image, by name.

        Args:
            detections: With `verify_score`.
            margin: Margins to the best other class, `(n,)`.
            whole: Logits of the whole image and the classes, and of what competes with them; None to use boxes alone.
        """
        assert detections.class_id is not None and detections.confidence is not None
        verify_score = np.asarray(detections.data["verify_score"], np.float64)
        mask_score = detections.data.get("mask_score")
        product = detections.confidence.astype(np.float64) * verify_score
        presence: dict[str, float] = {}
        for class_id in dict.fromkeys(detections.class_id.tolist()):
            rows = np.flatnonzero(detections.class_id == class_id)
            best = rows[[product[rows].argmax()]]
            verified = verify_score[best]
            if whole is not None:
                of_image = self._score(whole[0][[class_id]], np.atleast_1d(whole[1]))
                verified = to_probability((to_logit(verified) + to_logit(of_image)) / 2)
            iou = None if mask_score is None else np.asarray(mask_score)[best]
            probability = self.presence.probability(detections.confidence[best], verified, margin[best], iou)
            presence[str(detections.data["class_name"][best[0]])] = float(probability[0])
        return presence


def _averaged(presence: dict[str, float], by_detector: Mapping[str, float] | None) -> dict[str, float]:
    """Average the logits of presence with those of the detector, where it estimates presence."""
    logits = {name: to_logit(value) for name, value in presence.items()}
    for name, value in (by_detector or {}).items():
        logits[name] = (logits[name] + to_logit(value)) / 2 if name in logits else to_logit(value)
    return {name: float(to_probability(logit)) for name, logit in logits.items()} if by_detector else presence
