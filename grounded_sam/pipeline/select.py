"""Select detections: thresholds, NMS, areas, number.

No model is involved, so a sweep over these settings costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypedDict

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_bool, check_choice, check_int, check_number
from grounded_sam.errors import ConfigError
from grounded_sam.structures.masks import mask_area
from grounded_sam.structures.vocabulary import Vocabulary

#: Statuses of objects that `select.status` can keep; the others are those of `formats.store_schema`.
KEPT_STATUSES = ("predicted", "accepted", "edited", "added")
#: IoU of boxes from which detections of classes that exclude each other are one object.
EXCLUSIVE_IOU = 0.5


@dataclass(frozen=True)
class Select:
    """Settings of `select_detections`; the config section `select`.

    Attributes:
        score: Lowest confidence to keep, 0 to 1.
        class_score: Lowest confidence by class name; overrides the ontology's, which overrides `score`.
        nms: IoU above which the less confident of two detections is suppressed; None disables NMS.
        nms_by: Whether that IoU is of boxes or of masks.
        class_agnostic: Whether detections of different classes suppress each other.
        max_ios: Intersection over the smaller box (IoS) from which the less confident of two detections is
            suppressed, such as a part inside a whole; None keeps both.
        top_k: Largest number of detections per image; None for no limit.
        min_area: Smallest area in pixels, of the mask if there is one, else of the box.
        max_area: Largest area in pixels; None for no limit.
        status: With `source=stored`, keep only objects of this status, or of one of these: `predicted`, `accepted`,
            `edited` or `added`; None keeps all. Rejected objects are never kept.
        verify: Lowest score of the verifier to keep, 0 to 1; None for any.
        presence: Lowest probability that a class is in the image at all, 0 to 1, below which none of its detections is
            kept; None for any. It comes from a verifier, or from SAM 3.

    Raises:
        ConfigError: If a value is out of range; the message names the key.

    >>> Select(score=0.25, nms=0.5).max_area is None
    True
    """

    score: float = 0.3
    class_score: Mapping[str, float] | None = None
    nms: float | None = 0.7
    nms_by: Literal["box", "mask"] = "box"
    class_agnostic: bool = False
    max_ios: float | None = None
    top_k: int | None = None
    min_area: float = 1.0
    max_area: float | None = None
    status: str | Sequence[str] | None = None
    verify: float | None = None
    presence: float | None = None

    def __post_init__(self) -> None:
        if self.class_score is not None and not isinstance(self.class_score, Mapping):
            raise ConfigError(f"select.class_score must map class names to numbers, got {self.class_score!r}")
        check_number("select.score", self.score, 0, 1)
        for name, score in (self.class_score or {}).items():
            check_number(f"select.class_score.{name}", score, 0, 1)
        check_number("select.nms", self.nms, 0, 1, optional=True)
        check_choice("select.nms_by", self.nms_by, ("box", "mask"))
        check_bool("select.class_agnostic", self.class_agnostic)
        check_number("select.max_ios", self.max_ios, 0, 1, optional=True)
        check_int("select.top_k", self.top_k, 0, optional=True)
        check_number("select.min_area", self.min_area, 0)
        check_number("select.max_area", self.max_area, 0, optional=True)
        check_number("select.verify", self.verify, 0, 1, optional=True)
        check_number("select.presence", self.presence, 0, 1, optional=True)
        if isinstance(self.status, str):
            check_choice("select.status", self.status, KEPT_STATUSES)
        elif self.status is not None:
            if not isinstance(self.status, Sequence) or not self.status:
                raise ConfigError(
                    f"select.status must be one of {', '.join(KEPT_STATUSES)}, or a list of them; got {self.status!r}"
                )
            for status in self.status:
                check_choice("select.status", status, KEPT_STATUSES)

    def before_masks(self) -> Select:
        """Return the part of the settings that boxes alone decide, so that fewer boxes need a mask."""
        by_mask = self.nms_by == "mask"
        needs_area = self.min_area > 1 or self.max_area is not None
        return replace(
            self,
            nms=None if by_mask else self.nms,
            max_ios=None if by_mask else self.max_ios,
            top_k=None if by_mask or needs_area else self.top_k,
            min_area=0.0,
            max_area=None,
            verify=None,
            presence=None,
        )

    def candidates(self, min_score: float) -> Select:
        """Return a selection by a lowest confidence alone, of what a verifier is to judge."""
        return Select(score=min_score, nms=None, min_area=0.0, status=self.status)


class SelectOptions(TypedDict, total=False):
    """The settings of `Select`, all optional, as keyword arguments of a call."""

    score: float
    class_score: Mapping[str, float] | None
    nms: float | None
    nms_by: Literal["box", "mask"]
    class_agnostic: bool
    max_ios: float | None
    top_k: int | None
    min_area: float
    max_area: float | None
    status: str | Sequence[str] | None
    verify: float | None
    presence: float | None


def override_select(settings: Select, options: SelectOptions) -> Select:
    """Return settings with some of them replaced.

    Raises:
        ConfigError: If an option is unknown, or out of range.

    >>> override_select(Select(), {"score": 0.1}).score
    0.1
    """
    known = [field.name for field in fields(settings)]
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}; the settings of select are {', '.join(known)}")
    return replace(settings, **options)


def select_detections(detections: sv.Detections, settings: Select, vocabulary: Vocabulary) -> sv.Detections:
    """Keep the detections that pass, most confident first.

    Steps, in this order: status, score, verify score, presence, exclusive classes, NMS, IoS, area, number. Applying the
    function twice equals applying it once. What a person accepted, edited or added passes all steps but the first, and
    suppresses like the most confident.

    Args:
        detections: With `confidence` and `class_id`; masks as arrays, as RLE, or none.
        settings: What to keep.
        vocabulary: Classes that `class_id` refers to.

    Raises:
        ConfigError: If `class_score` names a class that the vocabulary lacks, `nms_by` is `mask` and there are no
            masks, or `status`, `verify` or `presence` is set and nothing is known about that.
    """
    unknown = sorted(set(settings.class_score or {}) - set(vocabulary.classes))
    if unknown:
        raise ConfigError(
            f"select.class_score names unknown classes: {', '.join(map(repr, unknown))}; "
            f"the classes are {', '.join(map(repr, vocabulary.classes))}"
        )
    if not len(detections):
        return detections
    assert detections.confidence is not None and detections.class_id is not None
    class_score = {**vocabulary.class_score, **(settings.class_score or {})}
    min_score = np.array([class_score.get(name, settings.score) for name in vocabulary.classes], np.float32)
    # Rows are chosen first and indexed once at the end, since indexing copies masks.
    decided = _decided(detections, settings)
    rows = np.lexsort((-detections.confidence, ~decided))
    if settings.status is not None:
        kept = (settings.status,) if isinstance(settings.status, str) else tuple(settings.status)
        rows = rows[np.isin(detections.data["status"][rows], kept)]
    always = rows[decided[rows]]
    passes = (detections.confidence >= min_score[detections.class_id]) & _verified(detections, settings)
    rows = rows[(decided | passes)[rows]]
    if vocabulary.exclusive and len(rows) > 1:
        rows = rows[_wins(detections, rows, decided, vocabulary)]
    if settings.nms is not None and len(rows) > 1:
        rows = rows[_nms(detections, rows, settings)]
    if settings.max_ios is not None and len(rows) > 1:
        # Supervision suppresses above the threshold; a box inside another has an IoS of exactly 1.
        threshold = max(0.0, settings.max_ios - 1e-6)
        table = _nms_table(detections, rows, settings)
        rows = rows[sv.box_non_max_suppression(table, threshold, sv.OverlapMetric.IOS)]
    if len(rows) and (settings.min_area > 0 or settings.max_area is not None):
        area = _areas(detections, rows, settings)
        rows = rows[
            (area >= settings.min_area) & (area <= (np.inf if settings.max_area is None else settings.max_area))
        ]
    if settings.top_k is not None:
        rows = rows[: settings.top_k]
    if len(always):
        rows = np.unique([*rows, *always])
        rows = rows[np.argsort(-detections.confidence[rows], kind="stable")]
    return detections if np.array_equal(rows, np.arange(len(detections))) else detections[rows]  # type: ignore[return-value]


def _decided(detections: sv.Detections, settings: Select) -> NDArray[np.bool_]:
    """Return which detections a person accepted, edited or added, `(n,) bool`."""
    status = detections.data.get("status")
    if status is None:
        if settings.status is not None:
            raise ConfigError("select.status needs objects that somebody reviewed: use source=stored, or remove it")
        return np.zeros(len(detections), bool)
    return np.asarray(np.asarray(status) != "predicted", bool)


def _verified(detections: sv.Detections, settings: Select) -> NDArray[np.bool_]:
    """Return which detections pass the thresholds of a verifier, `(n,) bool`."""
    passes = np.ones(len(detections), bool)
    way_out = "choose a verifier, e.g. verify=siglip2, or replay results that were verified"
    if settings.verify is not None:
        if "verify_score" not in detections.data:
            raise ConfigError(f"select.verify needs detections with a verify score: {way_out}")
        passes &= np.asarray(detections.data["verify_score"]) >= np.float32(settings.verify)
    if settings.presence is not None:
        presence = detections.metadata.get("presence")
        if presence is None:
            raise ConfigError(f"select.presence needs to know which classes are present: {way_out}")
        names = map(str, detections.data["class_name"])
        passes &= np.array([presence.get(name, 0.0) >= settings.presence for name in names], bool)
    return passes


def _wins(
    detections: sv.Detections, rows: NDArray[np.intp], decided: NDArray[np.bool_], vocabulary: Vocabulary
) -> NDArray[np.bool_]:
    """Return which rows are not suppressed by another class that excludes theirs, `(n,) bool`.

    Of two detections whose boxes have an IoU of `EXCLUSIVE_IOU` or more, the one with the higher verify score stays, or
    the more confident one where there are no verify scores.
    """
    assert detections.confidence is not None and detections.class_id is not None
    score = np.asarray(detections.data.get("verify_score", detections.confidence), np.float64)
    score = np.where(decided, np.inf, score)
    wins = np.ones(len(rows), bool)
    for group in vocabulary.exclusive:
        ids = [vocabulary.classes.index(name) for name in group]
        members = np.flatnonzero(np.isin(detections.class_id[rows], ids))
        order = members[np.argsort(-score[rows[members]], kind="stable")]
        overlap = sv.box_iou_batch(detections.xyxy[rows], detections.xyxy[rows])
        for n, first in enumerate(order):
            if not wins[first]:
                continue
            later = order[n + 1 :]
            rivals = detections.class_id[rows[later]] != detections.class_id[rows[first]]
            lost = later[rivals & (overlap[first, later] >= EXCLUSIVE_IOU)]
            wins[lost] &= decided[rows[lost]]
    return wins


def _nms_table(detections: sv.Detections, rows: NDArray[np.intp], settings: Select) -> NDArray[np.float64]:
    """Return xyxy, score and class for NMS, `(n, 6)`.

    Rows are sorted by confidence; their rank stands in for the score, because the order in which NumPy sorts equal
    scores is not defined.
    """
    assert detections.class_id is not None
    classes = np.zeros(len(rows)) if settings.class_agnostic else detections.class_id[rows].astype(float)
    return np.column_stack([detections.xyxy[rows], np.arange(len(rows), 0, -1), classes])


def _nms(detections: sv.Detections, rows: NDArray[np.intp], settings: Select) -> NDArray[np.bool_]:
    """Return which rows survive NMS, `(n,) bool`."""
    assert settings.nms is not None
    table = _nms_table(detections, rows, settings)
    if settings.nms_by == "box":
        return sv.box_non_max_suppression(table, iou_threshold=settings.nms)
    if detections.mask is None:
        raise ConfigError("select.nms_by=mask needs masks; choose a segmenter, or select.nms_by=box")
    return sv.mask_non_max_suppression(table, np.asarray(detections.mask)[rows], iou_threshold=settings.nms)


def _areas(detections: sv.Detections, rows: NDArray[np.intp], settings: Select) -> NDArray[np.float64]:
    """Return the areas of some rows in pixels, `(n,)`."""
    if "rle" in detections.data:
        return np.array([mask_area(detections, i) for i in rows], np.float64)
    if detections.mask is None:
        return np.asarray(detections.box_area)[rows]
    if settings.min_area <= 1 and settings.max_area is None:  # only whether there is a pixel matters
        return np.array([detections.mask[i].any() for i in rows], np.float64)
    return np.array([np.count_nonzero(detections.mask[i]) for i in rows], np.float64)
