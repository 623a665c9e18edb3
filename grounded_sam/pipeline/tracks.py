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

from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.masks import mask_iou
from grounded_sam.structures.vocabulary import Vocabulary


@dataclass(frozen=True)
class TrackSettings:
    """How a video is followed.

    Attributes:
        redetect_every: frames from one keyframe, where the detector looks, to the next.
        match_iou: least mask IoU at which a detection and a track are the same object.
        match_across: also match a detection with a track of another class; the class is then voted on.
        new_track_score: least confidence of a detection to begin a track; null takes all that `select` leaves.
        merge_iou: mask IoU from which two tracks, of one class unless `match_across`, lie on the same thing;
            the younger one is then out of sight.
        lost_patience: frames that a track may be out of sight before it ends for good.
        reach: how far from where it was last seen a track out of sight may be found again by a detection of its
            class, in lengths of its own (diagonals of its box), where the tracker's memory does not find it.
        jump: a track whose mask overlaps its last one by an IoU below this has jumped to something else, and is
            hidden until a detection confirms it; null where things may move by their own size in a frame.
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
    reach: float = 1.0
    jump: float | None = None
    max_objects: int | None = None
    correct: bool = False
    correct_iou: float = 0.8
    direction: Literal["forward", "both"] = "forward"
    backward_window: int = 60
    clicks: Any = None

    def __post_init__(self) -> None:
        for key in ("match_iou", "merge_iou", "correct_iou", "new_track_score", "jump"):
            value = getattr(self, key)
            if key in ("new_track_score", "jump") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"track.{key} must be a number from 0 to 1, got {value!r}")
        if isinstance(self.reach, bool) or not isinstance(self.reach, int | float) or self.reach < 0:
            raise ConfigError(f"track.reach must be a number from 0, got {self.reach!r}")
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
    votes: dict[int, tuple[int, float]] = field(
        default_factory=dict
    )  # class id to how often, and the sum of confidences
    lost: int = 0
    class_id: int = -1
    hidden: bool = False  # found to lie on something else; not shown until a detection confirms it
    box: NDArray[np.float32] | None = None  # where it was last seen, (4,)
    mask: NDArray[np.bool_] | None = None  # the same, (H, W), if jumps are looked for
    beside: set[int] = field(default_factory=set)  # tracks that lay on the same thing when it was last confirmed

    def vote(self, class_id: int, confidence: float) -> None:
        """Count a keyframe's word; a class holds until another one has more confidence behind it in all."""
        count, total = self.votes.get(class_id, (0, 0.0))
        self.votes[class_id] = count + 1, total + confidence
        if self.class_id < 0 or self.votes[class_id][1] > self.votes[self.class_id][1]:
            self.class_id = class_id

    @property
    def confidence(self) -> float:
        """Mean confidence of the keyframes that gave the track its class."""
        count, total = self.votes[self.class_id]
        return total / count


@dataclass(frozen=True)
class MatchResult:
    """What a keyframe changes: objects to begin, objects to prompt again, and ids that lie on something else."""

    new: sv.Detections
    corrected: sv.Detections
    hidden: list[int]


class TrackManager:
    """The live tracks of a video, and the next free id.

    Args:
        settings: how to match.
        reserved: ids that clicks will use, never given to anything else.
    """

    def __init__(self, settings: TrackSettings, reserved: Sequence[int] = ()) -> None:
        self.settings, self.live = settings, dict[int, Track]()
        self.reserved = set(reserved)
        self._theirs: dict[int, int] = {}  # ids of a tracker that gives its own, to ours
        self._next = 1

    def fresh_id(self) -> int:
        """An id that nothing has or had."""
        while self._next in self.reserved:
            self._next += 1
        self._next += 1
        return self._next - 1

    def begin(self, tracker_id: int, class_id: int, confidence: float) -> None:
        """A track with its first vote; if it is live, one more vote, and it is in sight again."""
        track = self.live.setdefault(tracker_id, Track(tracker_id))
        track.vote(class_id, confidence)
        track.hidden, track.lost = False, 0

    def look(self, seen: sv.Detections) -> tuple[sv.Detections, list[int], list[int]]:
        """Count who is out of sight in this frame, and end those for whom patience is over.

        Returns:
            What is to be shown of `seen`, the ids that ended, and those that jumped.
        """
        jumped = self._jumped(seen)
        for tracker_id in jumped:
            self.live[tracker_id].hidden = True
        shown = select_rows(seen, [not self.live[i].hidden for i in _ids(seen).tolist()])
        self.note(shown)
        return shown, self._end(shown), jumped

    def _end(self, shown: sv.Detections) -> list[int]:
        """Count who is out of sight, and end those for whom patience is over."""
        here, over = set(_ids(shown).tolist()), []
        for tracker_id, track in self.live.items():
            track.lost = 0 if tracker_id in here else track.lost + 1
            if track.lost > self.settings.lost_patience:
                over.append(tracker_id)
        for tracker_id in over:
            del self.live[tracker_id]
        return over

    def adopt(self, found: sv.Detections) -> sv.Detections:
        """What a tracker that tells objects apart by itself found in a frame, under ids of ours.

        Its ids stand for ours as long as `lost_patience` lasts; `new_track_score` and `max_objects` hold, and of two
        tracks whose masks lie on one thing the younger is left out. Votes on classes are those of every frame.

        Args:
            found: with `class_id`, `confidence` and the tracker's own `tracker_id`.
        """
        assert found.class_id is not None and found.confidence is not None
        rules, theirs = self.settings, _ids(found).tolist()
        least = -1.0 if rules.new_track_score is None else rules.new_track_score
        rows: list[int] = []
        for row in np.argsort(-found.confidence, kind="stable").tolist():
            if theirs[row] not in self._theirs:
                full = rules.max_objects is not None and len(self.live) >= rules.max_objects
                if full or found.confidence[row] < least:
                    continue
                self._theirs[theirs[row]] = self.fresh_id()
            rows.append(row)
            self.begin(self._theirs[theirs[row]], int(found.class_id[row]), float(found.confidence[row]))
        seen = _with_ids(found, rows, [self._theirs[theirs[row]] for row in rows])
        doubles = self._doubles(seen)
        seen = select_rows(seen, [i not in doubles for i in _ids(seen).tolist()])
        self.note(seen)
        self._end(seen)
        self._theirs = {other: own for other, own in self._theirs.items() if own in self.live}
        return seen

    def _jumped(self, seen: sv.Detections) -> list[int]:
        if self.settings.jump is None or seen.mask is None:
            return []
        out = []
        for tracker_id, mask in zip(_ids(seen).tolist(), seen.mask, strict=True):
            track = self.live[tracker_id]
            if track.hidden or track.mask is None:
                continue
            if mask_iou(track.mask[None], np.asarray(mask, bool)[None])[0, 0] < self.settings.jump:
                out.append(tracker_id)
        return out

    def match(self, shown: sv.Detections, found: sv.Detections, guessed: sv.Detections | None = None) -> MatchResult:
        """Tell a keyframe's detections from the tracks, both with masks.

        Of two tracks on one thing the younger is hidden. The Hungarian method on mask IoU pairs detections
        with tracks in sight, and those left over with tracks out of sight, where the tracker guesses them:
        these are found again. A track without a detection that lies on one of another class has gone astray
        and is hidden, unless the two belong together, which is so if they did when it was last confirmed.
        A detection that is on no track of its class then begins one, if it is confident enough.

        Args:
            shown: tracks in sight.
            found: detections.
            guessed: where tracks out of sight would be.
        """
        rules = self.settings
        assert found.class_id is not None and found.confidence is not None
        hidden = self._doubles(shown)
        shown = select_rows(shown, [i not in hidden for i in _ids(shown).tolist()])
        ids = _ids(shown).tolist()
        overlap = self._overlap(found, shown)
        owners: dict[int, int] = {}  # detection to track
        corrected, corrected_ids = [], []
        for row, column in self._pairs(overlap, found, shown):
            track, confidence = self.live[ids[column]], float(found.confidence[row])
            if rules.correct and overlap[row, column] < rules.correct_iou and confidence > track.confidence:
                corrected.append(row)
                corrected_ids.append(track.tracker_id)
            owners[row] = track.tracker_id
        # What lies on a track already may neither begin one nor be one that is out of sight.
        free = self._alike(overlap, found, ids).max(1, initial=0.0) < rules.match_iou
        if guessed is not None and len(guessed):
            rest = np.array([row for row in range(len(found)) if row not in owners and free[row]], np.intp)
            left, waiting = select_rows(found, rest), _ids(guessed).tolist()
            for row, column in self._pairs(self._overlap(left, guessed), left, guessed):
                owners[int(rest[row])] = waiting[column]
                corrected.append(int(rest[row]))
                corrected_ids.append(waiting[column])
        away = [i for i in self.live if i not in ids and i not in owners.values()]
        rows = [row for row in range(len(found)) if row not in owners and free[row]]
        for row, tracker_id in self._near(found, rows, away):
            owners[row] = tracker_id
            corrected.append(row)
            corrected_ids.append(tracker_id)
        for row, tracker_id in owners.items():
            track = self.live[tracker_id]
            track.box = found.xyxy[row]
            track.vote(int(found.class_id[row]), float(found.confidence[row]))
            track.hidden, track.lost = False, 0
        hidden = [i for i in hidden if i not in owners.values()] + self._astray(overlap, found, ids, owners)
        least = -1.0 if rules.new_track_score is None else rules.new_track_score
        begun, begun_ids = [], []
        for row in np.argsort(-found.confidence, kind="stable").tolist():
            if rules.max_objects is not None and len(self.live) >= rules.max_objects:
                break
            has_mask = found.mask is None or bool(np.asarray(found.mask[row]).any())
            if row in owners or not free[row] or not has_mask or found.confidence[row] < least:
                continue
            tracker_id = self.fresh_id()
            self.begin(tracker_id, int(found.class_id[row]), float(found.confidence[row]))
            self.live[tracker_id].box = found.xyxy[row]
            begun.append(row)
            begun_ids.append(tracker_id)
        for tracker_id in hidden:
            self.live[tracker_id].hidden = True
        return MatchResult(_with_ids(found, begun, begun_ids), _with_ids(found, corrected, corrected_ids), hidden)

    def _pairs(
        self, overlap: NDArray[np.float64], found: sv.Detections, tracks: sv.Detections
    ) -> list[tuple[int, int]]:
        """Detections and tracks that are the same object, as rows and columns of `overlap`."""
        from scipy.optimize import linear_sum_assignment

        alike = self._alike(overlap, found, _ids(tracks).tolist())
        rows, columns = linear_sum_assignment(alike, maximize=True)
        return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True) if alike[r, c] >= self.settings.match_iou]

    def _alike(self, overlap: NDArray[np.float64], found: sv.Detections, ids: list[int]) -> NDArray[np.float64]:
        """IoU where detection and track may be the same by class, else 0."""
        if self.settings.match_across or not overlap.size:
            return overlap
        classes = np.array([self.live[i].class_id for i in ids])
        assert found.class_id is not None
        return np.where(found.class_id[:, None] == classes[None], overlap, 0.0)

    def note(self, shown: sv.Detections) -> None:
        """Note where tracks are seen."""
        for i, tracker_id in enumerate(_ids(shown).tolist()):
            self.live[tracker_id].box = shown.xyxy[i]
            if self.settings.jump is not None and shown.mask is not None:
                self.live[tracker_id].mask = np.asarray(shown.mask[i], bool)

    def _near(self, found: sv.Detections, rows: list[int], away: list[int]) -> list[tuple[int, int]]:
        """Detections and tracks out of sight that were last seen near them, nearest pairs of all."""
        from scipy.optimize import linear_sum_assignment

        far = np.full((len(rows), len(away)), 1e6)
        for column, tracker_id in enumerate(away):
            track = self.live[tracker_id]
            for n, row in enumerate(rows):
                assert found.class_id is not None
                if track.box is None or not (self.settings.match_across or found.class_id[row] == track.class_id):
                    continue
                middles = [(box[:2] + box[2:]) / 2 for box in (found.xyxy[row], track.box)]
                length = float(np.hypot(*(track.box[2:] - track.box[:2])))
                far[n, column] = float(np.hypot(*(middles[0] - middles[1]))) / max(length, 1.0)
        pairs = zip(*linear_sum_assignment(far), strict=True)
        return [(rows[n], away[column]) for n, column in pairs if far[n, column] <= self.settings.reach]

    def _astray(
        self, overlap: NDArray[np.float64], found: sv.Detections, ids: list[int], owners: dict[int, int]
    ) -> list[int]:
        """Unconfirmed tracks that lie on a detection of another class; notes who belongs together."""
        assert found.class_id is not None
        confirmed, astray = set(owners.values()), []
        for column, tracker_id in enumerate(ids):
            track = self.live[tracker_id]
            on = [row for row in range(len(found)) if overlap[row, column] >= self.settings.match_iou]
            others = {owners.get(row, -1) for row in on if int(found.class_id[row]) != track.class_id}
            if tracker_id in confirmed:
                track.beside = others - {-1}
            elif not self.settings.match_across and others - track.beside:
                astray.append(tracker_id)
        return astray

    def _overlap(self, found: sv.Detections, tracks: sv.Detections) -> NDArray[np.float64]:
        """IoU of detections and tracks, `(n, m)`: of masks, or of boxes where the detections have no masks."""
        if not len(found) or not len(tracks):
            return np.zeros((len(found), len(tracks)))
        if found.mask is None or tracks.mask is None:
            return np.asarray(sv.box_iou_batch(found.xyxy, tracks.xyxy), np.float64)
        return mask_iou(np.asarray(found.mask, bool), np.asarray(tracks.mask, bool))

    def _doubles(self, shown: sv.Detections) -> list[int]:
        """The younger one of every two tracks that lie on one thing."""
        ids = _ids(shown).tolist()
        if len(ids) < 2 or shown.mask is None:
            return []
        overlap = mask_iou(np.asarray(shown.mask, bool), np.asarray(shown.mask, bool))
        doubles: list[int] = []
        age = {tracker_id: n for n, tracker_id in enumerate(self.live)}
        for a, b in zip(*np.nonzero(np.triu(overlap >= self.settings.merge_iou, 1)), strict=True):
            alike = self.live[ids[a]].class_id == self.live[ids[b]].class_id
            if (alike or self.settings.match_across) and not {ids[a], ids[b]} & set(doubles):
                doubles.append(max(ids[a], ids[b], key=age.__getitem__))
        return doubles

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
    chosen = select_rows(found, np.array(rows, np.intp))
    chosen.tracker_id = np.array(ids, np.int64)
    return chosen
