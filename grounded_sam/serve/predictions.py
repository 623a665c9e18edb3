"""Detect and segment once, select many times: candidates of images, and selections of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError, GroundedSamError
from grounded_sam.media.images import read_image
from grounded_sam.pipeline.images import DetectThenSegment, StageTimer, process_images
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.pipeline.select import Select, select_detections
from grounded_sam.serve.memory import ByteLimited
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.uploads import Upload
from grounded_sam.serve.worker import readable_error
from grounded_sam.structures.detections import select_rows, validate_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import pack_masks, unpack_masks
from grounded_sam.structures.protocols import Segmenter
from grounded_sam.structures.vocabulary import Vocabulary

#: Largest number of candidates of an image, and largest size of their masks while they are computed, in bytes.
MAX_CANDIDATES, MASK_BYTES = 1000, 2 << 30
#: Column with the confidence that a detection had before its mask changed it.
DETECTOR_SCORE = "detector_score"


@dataclass(frozen=True, eq=False)
class Prediction:
    """The candidates of an image.

    Attributes:
        id: Fingerprint of all that decides them: image, models, classes and what was kept.
        image: Id of the image.
        name: Name of the image.
        size_hw: Its height and width in pixels.
        vocabulary: Classes.
        kept: What was kept: every detection that this selects is a candidate.
        candidates: Detections with masks as RLE, in the form that `structures.detections` describes.
    """

    id: str
    picture: str
    name: str
    size_hw: tuple[int, int]
    vocabulary: Vocabulary
    kept: Select
    candidates: sv.Detections

    @property
    def num_bytes(self) -> int:
        """Estimated size in memory."""
        rles = self.candidates.data.get("rle", ())
        return 2000 + 300 * len(self.candidates) + sum(len(rle["counts"]) for rle in rles)


@dataclass(frozen=True, eq=False)
class Question:
    """What a request asks of the models.

    Attributes:
        id: As that of the prediction.
        upload: The image.
        vocabulary: Classes to look for.
        kept: What to keep.
    """

    id: str
    upload: Upload
    vocabulary: Vocabulary
    kept: Select


class Predictor:
    """Predict images, and keep the predictions.

    Args:
        pipeline: The models.
        fingerprint: Fingerprint of all settings that decide what they find, without selection and classes.
        max_bytes: Largest size of all predictions that are kept.
        max_pixels: Largest image.

    Attributes:
        computed: How many images the models have looked at.
    """

    def __init__(self, pipeline: Pipeline, fingerprint: str, max_bytes: int, max_pixels: int) -> None:
        assert isinstance(pipeline.stages, DetectThenSegment)
        self.pipeline, self.stages, self.fingerprint = pipeline, pipeline.stages, fingerprint
        self.max_pixels, self.computed = max_pixels, 0
        self._kept: ByteLimited[Prediction] = ByteLimited(max_bytes, lambda prediction: prediction.num_bytes)

    def question(
        self, upload: Upload, vocabulary: Vocabulary, select: Select, min_score: float | None = None
    ) -> Question:
        """Return what to compute for a request.

        Args:
            upload: The image.
            vocabulary: Classes to look for.
            select: Selection of the request.
            min_score: Lowest score from which all candidates are kept; None for those that `select` needs.
        """
        kept = kept_selection(select, vocabulary, min_score, self.is_tiled)
        if self.pipeline.segmenter is None:  # areas of boxes count before the number
            kept = replace(kept, top_k=None)
        columns = asdict(vocabulary)
        content = [self.fingerprint, upload.id, columns, asdict(kept)]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        return Question(digest[:32], upload, vocabulary, kept)

    @property
    def is_tiled(self) -> bool:
        """Whether large images are detected in tiles."""
        return self.stages.tiles.size is not None

    def known(self, prediction_id: str) -> Prediction | None:
        """Return a prediction that is kept."""
        return self._kept.get(prediction_id)

    def answer(self, questions: Sequence[Question]) -> list[Prediction | GroundedSamError]:
        """Predict images with the same classes and the same selection; called on the thread of the worker.

        Returns:
            For each question its prediction, or why there is none.
        """
        answers: dict[str, Prediction | GroundedSamError] = {}
        for question in questions:
            if (known := self.known(question.id)) is not None:
                answers[question.id] = known
        missing = list({q.id: q for q in questions if q.id not in answers}.values())
        try:
            answers |= {prediction.id: prediction for prediction in self._compute(missing)}
        except Exception as error:
            if len(missing) > 1:
                for question in missing:
                    answers[question.id] = self.answer([question])[0]
            else:
                answers |= {question.id: readable_error(error) for question in missing}
        return [answers[question.id] for question in questions]

    def _compute(self, questions: Sequence[Question]) -> list[Prediction]:
        """Run the models."""
        if not questions:
            return []
        vocabulary, kept = questions[0].vocabulary, questions[0].kept
        stages = CandidateStages(self.stages, kept)
        frames = (picture_frame(question.upload, self.max_pixels, i) for i, question in enumerate(questions))
        predictions = []
        for question, result in zip(questions, process_images(frames, vocabulary, stages), strict=True):
            self.computed += 1
            size_hw = result.frame.size_hw
            floor = stages.floors.get(result.frame.index)
            prediction = Prediction(
                id=question.id,
                picture=question.upload.id,
                name=question.upload.name,
                size_hw=size_hw,
                vocabulary=vocabulary,
                kept=kept if floor is None else raised(kept, vocabulary, floor),
                candidates=pack_masks(result.raw),
            )
            self._kept.put(prediction.id, prediction)
            predictions.append(prediction)
        return predictions

    def select(self, prediction: Prediction, select: Select) -> list[int]:
        """Select from the candidates of a prediction what the command selects with these settings.

        Returns:
            Indices of the candidates, most confident first.

        Raises:
            ConfigError: If the settings name an unknown class, or select by masks and there are none.
            RequestError: If candidates that the settings may select were not kept (409).
        """
        verifies = self.stages.verifier is not None  # then candidates do not depend on the selection
        if not verifies and not covers(prediction.kept, select, prediction.vocabulary, self.is_tiled):
            raise RequestError(
                409,
                "this prediction has too few candidates for these settings; predict again with min_score="
                f"{min(thresholds(select, prediction.vocabulary).values()):g}, and these settings in select",
            )
        candidates, vocabulary = prediction.candidates, prediction.vocabulary
        rows = np.arange(len(candidates))
        before = select.before_masks()
        if self.stages.refine.changes:
            before = replace(before, nms=None, max_ios=None, top_k=None)
        if verifies:
            pass
        elif DETECTOR_SCORE in candidates.data:
            scored = replace_confidence(candidates, candidates.data[DETECTOR_SCORE])
            rows = rows[_select_rows(scored, rows, before, vocabulary.overlapping, prediction.size_hw)]
            rows.sort()  # as after the masks: in the order in which the candidates are
        elif self.pipeline.segmenter is not None:
            rows = rows[_select_rows(candidates, rows, before, vocabulary.overlapping, prediction.size_hw)]
        return [int(i) for i in rows[_select_rows(candidates, rows, select, vocabulary, prediction.size_hw)]]


class CandidateStages(DetectThenSegment):
    """Detector and segmenter that return what one or more selections may select.

    Args:
        stages: The stages.
        kept: What to keep.

    Attributes:
        floors: Where there were too many candidates: by the index of the frame, the score from which all were kept.
    """

    def __init__(self, stages: DetectThenSegment, kept: Select) -> None:
        super().__init__(
            stages.detector, stages.segmenter, kept, stages.tiles, stages.refine, StageTimer(), stages.verifier
        )
        self.floors: dict[int, float] = {}

    def segment(
        self,
        frames: Sequence[Frame],
        boxes: Sequence[sv.Detections],
        vocabulary: Vocabulary,
        segmenter: Segmenter | None,
    ) -> list[sv.Detections]:
        """Add masks to the candidates, and verify them; see `DetectThenSegment.segment`."""
        name = type(self.detector).__name__
        kept = self.select
        if self.verifier is not None:
            kept = self.before_masks()
        elif self.refine.changes:
            kept = replace(kept, nms=None, max_ios=None, top_k=None)
        changes_score = self.refine.changes or self.refine.verifies
        candidates = []
        for frame, part in zip(frames, boxes, strict=True):
            valid = validate_detections(part, vocabulary, frame.size_hw, name)
            chosen = select_detections(valid, kept, vocabulary.overlapping)
            if changes_score and chosen.confidence is not None:
                chosen.data = {**chosen.data, DETECTOR_SCORE: chosen.confidence.copy()}
            candidates.append(self._limited(frame, chosen))
        return self.verify(frames, self.add_masks(frames, candidates, vocabulary, segmenter), vocabulary)

    def _limited(self, frame: Frame, detections: sv.Detections) -> sv.Detections:
        """Return the most confident detections, as many as an image of this size may have."""
        height, width = frame.size_hw
        limit = max(1, min(MAX_CANDIDATES, MASK_BYTES // (height * width)))
        if len(detections) <= limit:
            return detections
        assert detections.confidence is not None
        order = np.argsort(-detections.confidence, kind="stable")
        floor = detections.confidence[order[limit]]
        self.floors[frame.index] = float(np.nextafter(floor, np.float32(2)))
        return select_rows(detections, np.sort(order[:limit]))


def kept_selection(select: Select, vocabulary: Vocabulary, min_score: float | None, tiled: bool) -> Select:
    """Return what is kept of a prediction.

    Args:
        select: Selection of the request.
        vocabulary: Its classes.
        min_score: Lowest score from which all candidates are kept; None for what the command keeps until it has masks.
        tiled: Whether detections of tiles are merged, which depends on the settings of NMS.

    >>> kept_selection(Select(), Vocabulary.parse(["car"]), 0.1, False).nms is None
    True
    """
    before = select.before_masks()
    if min_score is None:
        return before
    floor = min(min_score, *thresholds(select, vocabulary).values())
    by_class = dict.fromkeys(vocabulary.class_score, floor) or None
    kept = replace(before, score=floor, class_score=by_class, top_k=None)
    return kept if tiled else replace(kept, nms=None, max_ios=None)


def thresholds(select: Select, vocabulary: Vocabulary) -> dict[str, float]:
    """Return the lowest confidence of each class."""
    own = {**vocabulary.class_score, **(select.class_score or {})}
    return {name: float(own.get(name, select.score)) for name in vocabulary.classes}


def raised(select: Select, vocabulary: Vocabulary, floor: float) -> Select:
    """Return a selection whose thresholds are at least `floor`.

    >>> raised(Select(score=0.1), Vocabulary.parse(["car"]), 0.2).class_score
    {'car': 0.2}
    """
    by_class = {name: max(score, floor) for name, score in thresholds(select, vocabulary).items()}
    return replace(select, score=max(select.score, floor), class_score=by_class)


def covers(kept: Select, wanted: Select, vocabulary: Vocabulary, tiled: bool) -> bool:
    """Return whether all detections that one selection may select are among those that another has kept.

    Suppression and number go in order of score: where classes do not affect each other, or have one threshold, a
    stricter threshold afterwards keeps what it would have kept before.

    Args:
        kept: Selection of the candidates.
        wanted: Selection to make.
        vocabulary: Classes.
        tiled: Whether detections of tiles are merged.

    >>> words = Vocabulary.parse(["car", "dog"])
    >>> kept = kept_selection(Select(score=0.3), words, 0.1, False)
    >>> covers(kept, Select(score=0.2, nms=0.5), words, False), covers(kept, Select(score=0.05), words, False)
    (True, False)
    """
    before = wanted.before_masks()
    low, high = thresholds(kept, vocabulary), thresholds(before, vocabulary)
    if any(high[name] < low[name] for name in low):
        return False
    if tiled or kept.nms is not None or kept.max_ios is not None or kept.top_k is not None:
        fields = ("nms", "max_ios", "class_agnostic")
        settings = [[asdict(select)[name] for name in fields] for select in (kept, before)]
        one_threshold = len(set(high.values())) == 1 or high == low
        depends_on_others = kept.class_agnostic or kept.top_k is not None
        if settings[0] != settings[1] or (depends_on_others and not one_threshold):
            return False
    return kept.top_k is None or (before.top_k is not None and before.top_k <= kept.top_k)


def _select_rows(
    detections: sv.Detections, rows: Any, select: Select, vocabulary: Vocabulary, size_hw: tuple[int, int]
) -> np.ndarray:
    """Return which of some rows a selection selects, as positions in `rows`, most confident first."""
    part = select_rows(detections, rows)
    if select.nms_by == "mask" and select.nms is not None and "rle" in part.data:
        low = replace(select, nms=None, max_ios=None, top_k=None, min_area=0, max_area=None)
        passing = _positions(part, low, vocabulary)
        if len(passing) * size_hw[0] * size_hw[1] > MASK_BYTES:
            raise RequestError(422, f"{len(passing)} masks are too many for nms_by=mask; raise the score")
        part = unpack_masks(select_rows(part, passing), size_hw)
        return passing[_positions(part, select, vocabulary)]
    return _positions(part, select, vocabulary)


def _positions(detections: sv.Detections, select: Select, vocabulary: Vocabulary) -> np.ndarray:
    """Return the indices of the selected detections."""
    marked = replace_confidence(detections, detections.confidence)
    marked.data = {**marked.data, "position": np.arange(len(marked))}
    return np.asarray(select_detections(marked, select, vocabulary).data["position"], int)


def replace_confidence(detections: sv.Detections, confidence: Any) -> sv.Detections:
    """Return the same detections with other confidences; arrays are shared."""
    return sv.Detections(
        xyxy=detections.xyxy,
        mask=detections.mask,
        confidence=confidence,
        class_id=detections.class_id,
        tracker_id=detections.tracker_id,
        data=detections.data,
    )


def picture_frame(upload: Upload, max_pixels: int, index: int = 0) -> Frame:
    """Return an image as a frame whose pixels are read when they are needed.

    Args:
        upload: The image.
        max_pixels: Largest number of pixels.
        index: Index of the frame.
    """
    pixels = partial(read_image, upload.path, max_pixels)
    return Frame(pixels=pixels, index=index, name=upload.name, file=upload.path, size=(upload.height, upload.width))


def override_selection(select: Select, options: Mapping[str, Any]) -> Select:
    """Return a selection with some settings of a request.

    Raises:
        ConfigError: If one is out of range.
    """
    try:
        return replace(select, **options)
    except TypeError as error:
        raise ConfigError(f"select: {error}") from error
