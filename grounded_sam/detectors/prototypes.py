"""Find what examples show: boxes of anything from another detector, told apart by the embeddings of their crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_int, check_number
from grounded_sam.errors import ConfigError
from grounded_sam.formats.examples import read_example_classes
from grounded_sam.structures.detections import make_detections, select_rows, validate_detections
from grounded_sam.structures.examples import Example
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import Detector, EmbedsCrops, RefusesAnswers
from grounded_sam.structures.results import Skipped
from grounded_sam.structures.vocabulary import Vocabulary


class PrototypeDetector:
    """Classify the proposals of a detector by their similarity to examples.

    The proposals are what another detector finds for words that fit anything, at a low threshold. Each gets the class
    whose prototype is most similar to its crop. The prototype of a class is the mean of the embeddings of its examples
    (Snell et al. 2017); an example with a mask counts twice, as it is and with gray around it. Confidence is the cosine
    similarity, 0 to 1. A proposal that is more similar to a negative example than to any class is dropped.
    `data["detector_scores"]` has the confidence of the proposal, as `proposal`.

    Args:
        proposals: Detector of the proposals.
        embedder: Model that embeds crops, such as `crop_embedder.CropEmbedder`.
        examples: Examples by class, or a path that gives all classes; see `formats.examples`.
        negative_examples: Examples of look-alikes.
        words: What the detector is asked for.
        min_score: Proposals below this confidence are dropped.
        iou: IoU above which the less confident of two proposals is dropped.
        max_proposals: Largest number of proposals per image.

    Attributes:
        vocabulary: Classes of the examples, for runs without text.

    Raises:
        ConfigError: If there are no examples, one is malformed, or a setting is out of range.
        ImageError: If the image of an example cannot be read.
    """

    def __init__(
        self,
        proposals: Any,
        embedder: Any,
        examples: Mapping[str, Any] | str | None = None,
        negative_examples: Any = None,
        words: Sequence[str] = ("object",),
        min_score: float = 0.1,
        iou: float = 0.6,
        max_proposals: int = 100,
    ) -> None:
        if not isinstance(proposals, Detector) or not isinstance(embedder, EmbedsCrops):
            raise ConfigError("detector.proposals must be a detector, and detector.embedder a model that embeds crops")
        check_number("detector.min_score", min_score, 0, 1)
        check_number("detector.iou", iou, 0, 1)
        check_int("detector.max_proposals", max_proposals, 1)
        self.examples = read_example_classes(examples, negative_examples, "detector.examples")
        if not self.examples.classes:
            raise ConfigError("detector=prototypes needs detector.examples, such as {cup: [cup.jpg]} or a folder")
        self.proposals, self.embedder = proposals, embedder
        self.min_score, self.iou, self.max_proposals = min_score, iou, max_proposals
        self._words = Vocabulary.parse({"object": list(words)})
        names = tuple(self.examples.classes)
        self.vocabulary = Vocabulary(names, tuple((name,) for name in names), queried=False)
        self._prototypes = np.stack([self._prototype(own) for own in self.examples.classes.values()])
        negatives = [self._prototype([example]) for example in self.examples.negatives]
        self._negatives = np.stack(negatives) if negatives else None

    def _prototype(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        """Return the normalized mean of the embeddings of examples, `(d,)`."""
        crops = [Example(example.image, example.box).crop() for example in examples]
        crops += [example.crop() for example in examples if example.mask is not None]
        mean = self.embedder.embed_crops(crops).mean(0)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-9), np.float32)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the proposals with the classes of the examples.

        Raises:
            ConfigError: If a class of text has no examples, or one with examples is not in text.
        """
        missing = [name for name in vocabulary.classes if self.vocabulary.index(name) is None]
        unknown = self.examples.unknown_classes(vocabulary)
        if missing or unknown:
            raise ConfigError(
                f"detector.examples has {', '.join(map(repr, self.vocabulary.classes))}, but text has "
                f"{', '.join(map(repr, vocabulary.classes))}; both must have the same classes, or leave text out"
            )
        return [self._detect(frame, vocabulary) for frame in frames]

    def take_refused(self) -> list[Skipped]:
        """Return what the detector of the proposals refused."""
        return self.proposals.take_refused() if isinstance(self.proposals, RefusesAnswers) else []

    def _detect(self, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        (found,) = self.proposals.detect([frame], self._words)
        found = validate_detections(found, self._words, frame.size_hw, "the detector of the proposals")
        assert found.confidence is not None
        found.mask = None
        found = select_rows(found, found.confidence >= self.min_score).with_nms(self.iou, class_agnostic=True)
        assert found.confidence is not None
        best = np.argsort(-found.confidence, kind="stable")[: self.max_proposals]
        boxes, confidence = found.xyxy[best], found.confidence[best]
        if not len(boxes):
            return make_detections(np.empty((0, 4)), [], [], vocabulary, frame.size_hw)
        crops = [Example(frame.image, box.astype(np.float64)).crop() for box in boxes]
        embeddings = self.embedder.embed_crops(crops)
        similarity = embeddings @ self._prototypes.T
        own = [vocabulary.index(name) for name in self.vocabulary.classes]
        class_ids = np.array(own, np.int64)[similarity.argmax(1)]
        scores = similarity.max(1)
        kept = scores > 0
        if self._negatives is not None:
            kept &= scores >= (embeddings @ self._negatives.T).max(1)
        column = np.empty(len(boxes), object)
        column[:] = [{"proposal": round(float(score), 4)} for score in confidence]
        return make_detections(
            boxes[kept],
            scores[kept].clip(0, 1),
            class_ids[kept],
            vocabulary,
            frame.size_hw,
            detector_scores=column[kept],
        )
