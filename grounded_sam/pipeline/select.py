"""Which detections stay: thresholds, duplicates, sizes, numbers. No model code, so sweeping it is free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.structures.masks import mask_area
from grounded_sam.structures.vocabulary import Vocabulary


@dataclass(frozen=True)
class Select:
    """The settings of `select`, as they stand under `select.` in the config.

    Attributes:
        score: the least confidence, 0 to 1.
        class_score: least confidence of single classes, by name, before what an ontology says; others keep
            `score`; None for no such.
        nms: IoU above which the less confident of two detections is dropped; None keeps all.
        nms_by: whether that IoU is of boxes or of masks.
        nms_across: whether detections of different classes are duplicates too.
        nested: share of a box inside another one of its class (with `nms_across` of any) from which the two are one
            thing and the less confident is dropped; None keeps both.
        top_k: the most detections to keep per image; None keeps all.
        min_area: least area in pixels: of the mask where there is one, else of the box.
        max_area: largest area in pixels, likewise; None for no limit.

    Raises:
        ConfigError: for a value out of its range, naming the key.
    """

    score: float = 0.3
    class_score: Mapping[str, float] | None = None
    nms: float | None = 0.7
    nms_by: Literal["box", "mask"] = "box"
    nms_across: bool = False
    nested: float | None = None
    top_k: int | None = None
    min_area: float = 1.0
    max_area: float | None = None

    def __post_init__(self) -> None:
        if self.class_score is not None and not isinstance(self.class_score, Mapping):
            raise ConfigError(f"select.class_score must map classes to numbers, got {self.class_score!r}")
        shares: dict[str, object] = {"score": self.score}
        shares |= {key: value for key in ("nms", "nested") if (value := getattr(self, key)) is not None}
        shares |= {f"class_score.{name}": value for name, value in (self.class_score or {}).items()}
        for key, value in shares.items():
            if not (_number(value) and 0 <= value <= 1):  # type: ignore[operator]
                raise ConfigError(f"select.{key} must be a number from 0 to 1, got {value!r}")
        sizes: dict[str, object] = {"min_area": self.min_area}
        sizes |= {} if self.max_area is None else {"max_area": self.max_area}
        for key, value in sizes.items():
            if not (_number(value) and value >= 0):  # type: ignore[operator]
                raise ConfigError(f"select.{key} must be a number of pixels from 0, got {value!r}")
        if self.nms_by not in ("box", "mask"):
            raise ConfigError(f"select.nms_by must be box or mask, got {self.nms_by!r}")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 0):
            raise ConfigError(f"select.top_k must be null or a whole number from 0, got {self.top_k!r}")

    def before_masks(self) -> Select:
        """What of it can be settled on boxes alone, so that fewer boxes need a mask."""
        by_mask = self.nms_by == "mask"
        later = by_mask or self.min_area > 1 or self.max_area is not None
        return replace(
            self,
            nms=None if by_mask else self.nms,
            nested=None if by_mask else self.nested,
            top_k=None if later else self.top_k,
            min_area=0.0,
            max_area=None,
        )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def select(found: sv.Detections, settings: Select, vocabulary: Vocabulary) -> sv.Detections:
    """Keep the detections that `settings` ask for, most confident first.

    In this order: scores, duplicates (greedy NMS), nested boxes, areas, number. Applying it twice is applying it once.

    Raises:
        ConfigError: if `class_score` names a class that the vocabulary has not, or `nms_by` is `mask`
            and the detections have no masks.
    """
    unknown = sorted(set(settings.class_score or {}) - set(vocabulary.classes))
    if unknown:
        raise ConfigError(
            f"select.class_score names {', '.join(map(repr, unknown))}; "
            f"the classes are {', '.join(map(repr, vocabulary.classes))}"
        )
    if not len(found):
        return found
    assert found.confidence is not None and found.class_id is not None
    single = {**vocabulary.class_score, **(settings.class_score or {})}
    least = np.array([single.get(name, settings.score) for name in vocabulary.classes])
    # Rows are chosen first and taken once at the end: taking copies masks.
    rows = np.argsort(-found.confidence, kind="stable")
    rows = rows[found.confidence[rows] >= least[found.class_id[rows]].astype(np.float32)]
    if settings.nms is not None and len(rows) > 1:
        rows = rows[_unique(found, rows, settings)]
    if settings.nested is not None and len(rows) > 1:
        metric = sv.OverlapMetric.IOS  # intersection over the smaller one
        above = max(0.0, settings.nested - 1e-6)  # NMS drops what is above; a box wholly inside has a share of 1
        rows = rows[sv.box_non_max_suppression(_table(found, rows, settings), above, metric)]
    if len(rows) and (settings.min_area > 0 or settings.max_area is not None):
        most = np.inf if settings.max_area is None else settings.max_area
        if "rle" in found.data:  # packed, see detections.packed
            area = np.array([mask_area(found, i) for i in rows], np.float64)
        elif found.mask is None:
            area = np.asarray(found.box_area)[rows]
        elif settings.min_area <= 1 and settings.max_area is None:
            area = np.array([found.mask[i].any() for i in rows], np.float64)  # all that is asked
        else:
            area = np.array([np.count_nonzero(found.mask[i]) for i in rows], np.float64)
        rows = rows[(area >= settings.min_area) & (area <= most)]
    if settings.top_k is not None:
        rows = rows[: settings.top_k]
    return found if np.array_equal(rows, np.arange(len(found))) else found[rows]  # type: ignore[return-value]


def _table(found: sv.Detections, rows: NDArray[np.intp], settings: Select) -> NDArray[np.float64]:
    """Boxes, confidence and what has to be alike of duplicates, as NMS wants them.

    For confidence stands the place in the row, since NumPy sorts what is equally confident one way or another.
    """
    assert found.class_id is not None
    groups = np.zeros(len(rows)) if settings.nms_across else found.class_id[rows].astype(float)
    return np.column_stack([found.xyxy[rows], np.arange(len(rows), 0, -1), groups])


def _unique(found: sv.Detections, rows: NDArray[np.intp], settings: Select) -> NDArray[np.bool_]:
    """Which of some rows are no duplicates of a more confident one."""
    assert settings.nms is not None
    table = _table(found, rows, settings)
    if settings.nms_by == "box":
        return sv.box_non_max_suppression(table, iou_threshold=settings.nms)
    if found.mask is None:
        raise ConfigError("select.nms_by=mask needs masks; choose a segmenter, or select.nms_by=box")
    return sv.mask_non_max_suppression(table, np.asarray(found.mask)[rows], iou_threshold=settings.nms)
