"""Which detection is which object: matching, ids, classes and ends of tracks.

Rules of ids: they count up from 1 in the order of appearance, save those that a user gave to clicks; no
id is given twice, to two things or after its track has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.detections import pick
from grounded_sam.errors import ConfigError
from grounded_sam.vocabulary import Vocabulary


@dataclass(frozen=True)
class Tracking:
    """How a video is followed.

    Attributes:
        redetect_every: frames from one keyframe, where the detector looks, to the next.
        match_iou: least mask IoU at which a detection and a track are the same object.
        match_across: also match a detection with a track of another class; the class is then voted on.
        new_track_score: least confidence of a detection to begin a track; null takes all that `select` leaves.
        merge_iou: mask IoU from which two tracks, of one class unless `match_across`, are the same object;
            the younger one ends.
        lost_patience: frames that a track may be out of sight before it ends for good.
        max_objects: tracks at one time; the most confident detections come first; null for any number.
        correct: prompt a track again with a matched detection that is more confident than the track and
            overlaps it by less than `correct_iou`.
        correct_iou: see `correct`.
        direction: `forward`, or `both` to also follow objects back to before the keyframe that found them.
        backward_window: frames to go back at most; as many are kept on disk.
        clicks: points, boxes or masks by hand, as a JSON file or entries; see `detectors.clicks.Clicks`.

    Raises:
        ConfigError: naming the key that is out of range.
    """

    redetect_every: int = 10
    match_iou: float = 0.5
    match_across: bool = False
    new_track_score: float | None = None
    merge_iou: float = 0.7
    lost_patience: int = 30
    max_objects: int | None = None
    correct: bool = False
    correct_iou: float = 0.8
    direction: Literal["forward", "both"] = "forward"
    backward_window: int = 60
    clicks: Any = None

    def __post_init__(self) -> None:
        for key in ("match_iou", "merge_iou", "correct_iou", "new_track_score"):
            value = getattr(self, key)
            if key == "new_track_score" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"track.{key} must be a number from 0 to 1, got {value!r}")
        for key, least in (("redetect_every", 1), ("lost_patience", 0), ("max_objects", 1), ("backward_window", 1)):
            value = getattr(self, key)
            if key == "max_objects" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"track.{key} must be a whole number from {least}, got {value!r}")
        if self.direction not in ("forward", "both"):
            raise ConfigError(f"track.direction must be forward or both, got {self.direction!r}")


@dataclass
class Track:
    """One object: its id, what it was called at keyframes, and for how many frames it is out of sight."""

    tracker_id: int
    votes: dict[int, list[float]] = field(default_factory=dict)  # class id to confidences
    lost: int = 0
    class_id: int = -1

    def vote(self, class_id: int, confidence: float) -> None:
        """Count a keyframe's word; a class holds until another one has more confidence behind it in all."""
        self.votes.setdefault(class_id, []).append(confidence)
        if self.class_id < 0 or sum(self.votes[class_id]) > sum(self.votes[self.class_id]):
            self.class_id = class_id

    @property
    def confidence(self) -> float:
        """Mean confidence of the keyframes that gave the track its class."""
        return float(np.mean(self.votes[self.class_id]))


@dataclass(frozen=True)
class Keyframe:
    """What a keyframe changes: objects to begin, objects to prompt again, ids that end as duplicates."""

    new: sv.Detections
    corrected: sv.Detections
    merged: list[int]


def mask_iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> NDArray[np.float64]:
    """IoU of masks `(n, H, W)` and `(m, H, W)`, `(n, m)`."""
    from pycocotools import mask as coco_mask

    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    encoded = [coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)) for masks in (a, b)]
    return np.asarray(coco_mask.iou(*encoded, [0] * len(b)))


class Tracks:
    """The live tracks of a video, and the next free id.

    Args:
        settings: how to match.
        reserved: ids that clicks will use, never given to anything else.
    """

    def __init__(self, settings: Tracking, reserved: Sequence[int] = ()) -> None:
        self.settings, self.live = settings, dict[int, Track]()
        self.reserved = set(reserved)
        self._next = 1

    def fresh_id(self) -> int:
        """An id that nothing has or had."""
        while self._next in self.reserved:
            self._next += 1
        self._next += 1
        return self._next - 1

    def begin(self, tracker_id: int, class_id: int, confidence: float) -> None:
        """A track with its first vote; one more vote if it is live."""
        self.live.setdefault(tracker_id, Track(tracker_id)).vote(class_id, confidence)

    def look(self, seen: sv.Detections) -> list[int]:
        """Count who is out of sight in this frame; ends, and returns, those for whom patience is over."""
        here = set(_ids(seen).tolist())
        over = []
        for tracker_id, track in self.live.items():
            track.lost = 0 if tracker_id in here else track.lost + 1
            if track.lost > self.settings.lost_patience:
                over.append(tracker_id)
        for tracker_id in over:
            del self.live[tracker_id]
        return over

    def match(self, seen: sv.Detections, found: sv.Detections) -> Keyframe:
        """Tell a keyframe's detections from the tracks seen in it, both with masks.

        The Hungarian method on mask IoU pairs them. What is left over begins a track if it is confident
        enough and lies on no track of its class.
        """
        from scipy.optimize import linear_sum_assignment

        rules = self.settings
        assert found.class_id is not None and found.confidence is not None
        merged = self._merge(seen)
        here = pick(seen, [i not in merged for i in _ids(seen).tolist()] if len(seen) else [])
        ids = _ids(here).tolist()
        overlap = self._overlap(found, here)
        taken: set[int] = set()
        corrected, corrected_ids = [], []
        for row, column in zip(*linear_sum_assignment(overlap, maximize=True), strict=True):
            if overlap[row, column] < rules.match_iou:
                continue
            track = self.live[ids[column]]
            confidence = float(found.confidence[row])
            drifted = rules.correct and overlap[row, column] < rules.correct_iou and confidence > track.confidence
            track.vote(int(found.class_id[row]), confidence)
            taken.add(row)
            if drifted:
                corrected.append(row)
                corrected_ids.append(track.tracker_id)
        free = overlap.max(1, initial=0.0) < rules.match_iou
        least = -1.0 if rules.new_track_score is None else rules.new_track_score
        begun, begun_ids = [], []
        for row in np.argsort(-found.confidence, kind="stable").tolist():
            if rules.max_objects is not None and len(self.live) >= rules.max_objects:
                break
            has_mask = found.mask is None or bool(np.asarray(found.mask[row]).any())
            if row in taken or not free[row] or not has_mask or found.confidence[row] < least:
                continue
            tracker_id = self.fresh_id()
            self.begin(tracker_id, int(found.class_id[row]), float(found.confidence[row]))
            begun.append(row)
            begun_ids.append(tracker_id)
        return Keyframe(_with_ids(found, begun, begun_ids), _with_ids(found, corrected, corrected_ids), merged)

    def _overlap(self, found: sv.Detections, here: sv.Detections) -> NDArray[np.float64]:
        """IoU of detections and tracks, `(n, m)`: of masks, or of boxes where the detections have no masks."""
        if not len(found) or not len(here):
            return np.zeros((len(found), len(here)))
        if found.mask is None or here.mask is None:
            overlap = np.asarray(sv.box_iou_batch(found.xyxy, here.xyxy), np.float64)
        else:
            overlap = mask_iou(np.asarray(found.mask, bool), np.asarray(here.mask, bool))
        if self.settings.match_across:
            return overlap
        classes = np.array([self.live[i].class_id for i in _ids(here).tolist()])
        assert found.class_id is not None
        return np.where(found.class_id[:, None] == classes[None], overlap, 0.0)

    def _merge(self, seen: sv.Detections) -> list[int]:
        """End the younger of two tracks that lie on one object; returns their ids."""
        ids = _ids(seen).tolist()
        if len(ids) < 2 or seen.mask is None:
            return []
        overlap = mask_iou(np.asarray(seen.mask, bool), np.asarray(seen.mask, bool))
        ended: list[int] = []
        age = {tracker_id: n for n, tracker_id in enumerate(self.live)}
        for a, b in zip(*np.nonzero(np.triu(overlap >= self.settings.merge_iou, 1)), strict=True):
            if ids[a] in ended or ids[b] in ended:
                continue
            alike = self.live[ids[a]].class_id == self.live[ids[b]].class_id
            if alike or self.settings.match_across:
                ended.append(max(ids[a], ids[b], key=age.__getitem__))
        for tracker_id in ended:
            del self.live[tracker_id]
        return ended

    def label(self, seen: sv.Detections, vocabulary: Vocabulary) -> sv.Detections:
        """Tracked masks with class, class name and confidence of their tracks, oldest track first."""
        age = {tracker_id: n for n, tracker_id in enumerate(self.live)}
        ids = _ids(seen)
        order = sorted((i for i in range(len(ids)) if int(ids[i]) in age), key=lambda i: age[int(ids[i])])
        tracks = [self.live[int(ids[i])] for i in order]
        classes = np.array([track.class_id for track in tracks], np.int64)
        columns = {key: np.asarray(value)[order] for key, value in seen.data.items() if key == "mask_score"}
        return sv.Detections(
            xyxy=seen.xyxy[order].astype(np.float32),
            mask=None if seen.mask is None else seen.mask[order],
            confidence=np.array([track.confidence for track in tracks], np.float32),
            class_id=classes,
            tracker_id=ids[order],
            data={"class_name": np.array(vocabulary.classes, dtype=str)[classes], **columns},
        )


def _ids(found: sv.Detections) -> NDArray[np.int64]:
    return np.empty(0, np.int64) if found.tracker_id is None else np.asarray(found.tracker_id, np.int64)


def _with_ids(found: sv.Detections, rows: list[int], ids: list[int]) -> sv.Detections:
    """Some of the detections, with ids."""
    chosen = pick(found, np.array(rows, np.intp))
    chosen.tracker_id = np.array(ids, np.int64)
    return chosen
