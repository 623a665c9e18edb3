"""Tracks of a video: ids, classes, and when a track starts, is hidden and ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import supervision as sv

from grounded_sam.pipeline.matching import (
    Track,
    find_drifted,
    find_duplicates,
    find_parts,
    match_by_box,
    match_by_overlap,
    overlaps,
    recover_lost,
    same_class_overlaps,
    tracker_ids,
)
from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.masks import mask_iou
from grounded_sam.structures.vocabulary import Vocabulary


@dataclass(frozen=True)
class FrameUpdate:
    """What a new frame changes.

    Attributes:
        visible: Tracked detections to show.
        ended: Ids of tracks that ended.
        jumped: Ids of tracks that jumped and are hidden, see `TrackManager`.
    """

    visible: sv.Detections
    ended: list[int]
    jumped: list[int]


@dataclass(frozen=True)
class MatchResult:
    """What the detections of a keyframe change.

    Attributes:
        new: Detections that start tracks, with their new ids.
        corrected: Detections to prompt existing tracks with, with the ids of those.
        hidden: Ids of tracks that are duplicates or have drifted, see `TrackManager`.
    """

    new: sv.Detections
    corrected: sv.Detections
    hidden: list[int]


class TrackManager:
    """The live tracks of one video.

    Ids count up from 1 in order of appearance, except those that a user gave to clicks. No id is used for two objects,
    nor again after its track has ended, unless a click asks for it.

    A live track is visible, or lost, or hidden:

    - *lost*: the tracker shows no mask of it, but it is still held. A detection of its class where the tracker predicts
      it, or near its last box, recovers it.
    - *hidden*: its mask is probably on another object, so it is left out until a detection or a click confirms the
      track. A track has *jumped* if the IoU of its mask with its last visible one is below `min_step_iou`. It has
      *drifted* if, at a keyframe, no detection confirms it and it newly overlaps that of another object
      (`matching.find_drifted`). It is a *duplicate* if the IoU of its mask with that of another track is `merge_iou` or
      more and the object is that of the other one (`matching.find_duplicates`).

    A hidden track ages like a lost one: `Track.lost` counts the frames of both, and `update` and `adopt` end the track
    after more than `max_lost_frames` in a row.

    Args:
        settings: How to match.
        detected: Classes that detections can confirm; None for all. A track of another class, which a click started, is
            never hidden because nothing confirms it.

    Attributes:
        live: Tracks by id, oldest first.
    """

    def __init__(self, settings: TrackSettings, detected: Collection[int] | None = None) -> None:
        self.settings, self.live, self.detected = settings, dict[int, Track](), detected
        self._used: set[int] = set()
        self._ids_by_foreign_id: dict[int, int] = {}  # ids of an end-to-end tracker to ids of this manager
        self._next_id = 1

    def new_id(self) -> int:
        """Return an id that was never used."""
        while self._next_id in self._used:
            self._next_id += 1
        self._next_id += 1
        return self._next_id - 1

    def start_or_confirm(self, tracker_id: int, class_id: int, confidence: float) -> None:
        """Start a track with a first vote for its class, or confirm a live one with another vote."""
        track = self.live.setdefault(tracker_id, Track(tracker_id))
        self._used.add(tracker_id)
        track.vote(class_id, confidence)
        track.hidden, track.strayed, track.lost = False, False, 0

    def forget(self, tracker_id: int) -> None:
        """Drop a track, because its object has another id."""
        del self.live[tracker_id]

    def update(self, detections: sv.Detections) -> FrameUpdate:
        """Take in what a tracker sees in the next frame, and end tracks that were lost or hidden for too long.

        Args:
            detections: Tracked detections of the frame, including hidden tracks.
        """
        jumped = self._find_jumps(detections)
        for tracker_id in jumped:
            self.live[tracker_id].hidden = self.live[tracker_id].strayed = True
        visible = select_rows(detections, [not self.live[i].hidden for i in tracker_ids(detections).tolist()])
        self.remember(visible)
        return FrameUpdate(visible, self._end_lost(visible), jumped)

    def _end_lost(self, visible: sv.Detections) -> list[int]:
        """Count the frames without each track; end tracks that exceed `max_lost_frames`, and return their ids."""
        visible_ids = set(tracker_ids(visible).tolist())
        for tracker_id, track in self.live.items():
            track.lost = 0 if tracker_id in visible_ids else track.lost + 1
        ended = [i for i, track in self.live.items() if track.lost > self.settings.max_lost_frames]
        for tracker_id in ended:
            del self.live[tracker_id]
        return ended

    def adopt(self, detections: sv.Detections) -> sv.Detections:
        """Take over the tracks of an end-to-end tracker in a frame, under this manager's ids.

        An id of the tracker stands for the same id here until that track ends. `new_track_score` and `max_objects`
        apply, and of two tracks on the same object the younger one is dropped. Every frame votes for the class.

        Args:
            detections: With `class_id`, `confidence` and the tracker's own `tracker_id`.
        """
        assert detections.class_id is not None and detections.confidence is not None
        foreign_ids, rows = tracker_ids(detections).tolist(), list[int]()
        for row in np.argsort(-detections.confidence, kind="stable").tolist():
            if foreign_ids[row] not in self._ids_by_foreign_id:
                if self._is_full() or detections.confidence[row] < self._min_new_score():
                    continue
                self._ids_by_foreign_id[foreign_ids[row]] = self.new_id()
            rows.append(row)
            tracker_id = self._ids_by_foreign_id[foreign_ids[row]]
            self.start_or_confirm(tracker_id, int(detections.class_id[row]), float(detections.confidence[row]))
            self._verify(tracker_id, detections, row)
        visible = _with_ids(detections, rows, [self._ids_by_foreign_id[foreign_ids[row]] for row in rows])
        duplicates = find_duplicates(visible, self.live, self.settings)
        visible = select_rows(visible, [i not in duplicates for i in tracker_ids(visible).tolist()])
        self.remember(visible)
        self._end_lost(visible)
        self._ids_by_foreign_id = {foreign: own for foreign, own in self._ids_by_foreign_id.items() if own in self.live}
        return visible

    def match(
        self, visible: sv.Detections, detections: sv.Detections, predicted: sv.Detections | None = None
    ) -> MatchResult:
        """Match the detections of a keyframe with the tracks.

        1. Of two visible tracks on the same object one is hidden.
        2. Detections are matched with visible tracks by mask IoU, and what is left by box IoU.
        3. Free detections are matched with lost and hidden tracks, see `matching.recover_lost`. Such tracks are
           recovered.
        4. A visible track that has drifted is hidden.
        5. A detection that is on no track of its class, nor a part of one, starts a track, if it is confident enough.

        Args:
            visible: Visible tracks, with masks.
            detections: Detections of the keyframe.
            predicted: Where lost and hidden tracks are predicted, if the tracker can say.
        """
        assert detections.class_id is not None and detections.confidence is not None
        overlap = overlaps(detections, visible)
        duplicates = find_duplicates(visible, self.live, self.settings, detections, overlap)
        kept = [i not in duplicates for i in tracker_ids(visible).tolist()]
        visible, overlap = select_rows(visible, kept), overlap[:, np.array(kept, bool)]
        tracks = [self.live[i] for i in tracker_ids(visible).tolist()]
        self._distrust(duplicates)
        same_class = same_class_overlaps(overlap, detections, tracks, self.settings)
        owners: dict[int, int] = {}  # row of a detection to the id of its track
        corrected: dict[int, int] = {}
        for row, column in match_by_overlap(same_class, self.settings.match_iou):
            track = owners[row] = tracks[column].tracker_id
            if self._should_correct(overlap[row, column], float(detections.confidence[row]), self.live[track]):
                corrected[row] = track
        # A detection on a visible track can neither start a track nor be a lost one.
        free = same_class.max(1, initial=0.0) < self.settings.match_iou
        clicked = [not self._can_be_confirmed(track) for track in tracks]  # under a name of the user's own
        free &= overlap[:, clicked].max(1, initial=0.0) < self.settings.merge_iou
        free &= ~find_parts(detections, visible, tracks, owners, self.settings)
        by_box = match_by_box(detections, free, visible, tracks, owners, self.settings)
        owners |= by_box
        taken = {track.tracker_id for track in tracks}
        lost = [track for tracker_id, track in self.live.items() if tracker_id not in taken]
        rows = [row for row in range(len(detections)) if row not in owners and free[row]]
        recovered = recover_lost(detections, rows, lost, predicted, self.settings)
        owners |= recovered
        corrected |= recovered
        for row, tracker_id in owners.items():
            self.live[tracker_id].box = self.live[tracker_id].confirmed_box = detections.xyxy[row]
            self.start_or_confirm(tracker_id, int(detections.class_id[row]), float(detections.confidence[row]))
            self._verify(tracker_id, detections, row)
        hidden = [i for i in duplicates if i not in owners.values()]
        overlap[list(by_box)] = 0.0  # their masks say nothing about where objects are
        drifted = find_drifted(overlap, detections, tracks, owners, self.settings)
        hidden += [tracker_id for tracker_id in drifted if self._can_be_confirmed(self.live[tracker_id])]
        new = self._start_tracks(detections, [row for row in range(len(detections)) if row not in owners and free[row]])
        self._distrust(hidden)
        for tracker_id in hidden:
            self.live[tracker_id].hidden = True
        return MatchResult(
            _with_ids(detections, list(new), list(new.values())),
            _with_ids(detections, list(corrected), list(corrected.values())),
            hidden,
        )

    def _distrust(self, ids: list[int]) -> None:
        """Expect tracks whose masks are on other objects where detections last confirmed them."""
        for track in (self.live[i] for i in ids):
            track.strayed, track.box = True, track.box if track.confirmed_box is None else track.confirmed_box

    def _should_correct(self, iou: float, confidence: float, track: Track) -> bool:
        """Return whether to prompt a track again with a detection that matches it."""
        return self.settings.correct and iou < self.settings.correct_iou and confidence > track.confidence

    def _start_tracks(self, detections: sv.Detections, rows: list[int]) -> dict[int, int]:
        """Start tracks for some detections, most confident first; return the new id by row."""
        assert detections.class_id is not None and detections.confidence is not None
        started: dict[int, int] = {}
        for row in sorted(rows, key=lambda row: -detections.confidence[row]):  # type: ignore[index]
            if self._is_full():
                break
            empty = detections.mask is not None and not np.asarray(detections.mask[row]).any()
            if empty or detections.confidence[row] < self._min_new_score():
                continue
            started[row] = self.new_id()
            self.start_or_confirm(started[row], int(detections.class_id[row]), float(detections.confidence[row]))
            self.live[started[row]].box = self.live[started[row]].confirmed_box = detections.xyxy[row]
            self._verify(started[row], detections, row)
        return started

    def _verify(self, tracker_id: int, detections: sv.Detections, row: int) -> None:
        """Count the verify score of a detection that started or confirmed a track, if it has one."""
        if "verify_score" in detections.data:
            self.live[tracker_id].verify(float(detections.data["verify_score"][row]))

    def _is_full(self) -> bool:
        return self.settings.max_objects is not None and len(self.live) >= self.settings.max_objects

    def _min_new_score(self) -> float:
        return -1.0 if self.settings.new_track_score is None else self.settings.new_track_score

    def _can_be_confirmed(self, track: Track) -> bool:
        return self.detected is None or track.class_id in self.detected

    def _find_jumps(self, detections: sv.Detections) -> list[int]:
        """Return tracks whose mask overlaps their last one by less than `min_step_iou`."""
        if self.settings.min_step_iou is None or detections.mask is None:
            return []
        jumps = []
        for tracker_id, mask in zip(tracker_ids(detections).tolist(), detections.mask, strict=True):
            track = self.live[tracker_id]
            if track.hidden or track.mask is None or not self._can_be_confirmed(track):
                continue
            if mask_iou(track.mask[None], np.asarray(mask, bool)[None])[0, 0] < self.settings.min_step_iou:
                jumps.append(tracker_id)
        return jumps

    def remember(self, visible: sv.Detections) -> None:
        """Record where the visible tracks are."""
        for i, tracker_id in enumerate(tracker_ids(visible).tolist()):
            self.live[tracker_id].box = visible.xyxy[i]
            if self.settings.min_step_iou is not None and visible.mask is not None:
                self.live[tracker_id].mask = np.asarray(visible.mask[i], bool)

    def label(self, detections: sv.Detections, vocabulary: Vocabulary) -> sv.Detections:
        """Return tracked detections with the class, class name and confidence of their tracks, oldest track first."""
        age = {tracker_id: n for n, tracker_id in enumerate(self.live)}
        ids = tracker_ids(detections)
        order = sorted((i for i in range(len(ids)) if int(ids[i]) in age), key=lambda i: age[int(ids[i])])
        tracks = [self.live[int(ids[i])] for i in order]
        classes = np.array([track.class_id for track in tracks], np.int64)
        columns = {key: np.asarray(value)[order] for key, value in detections.data.items() if key == "mask_score"}
        if any(track.verified[0] for track in tracks):
            columns["verify_score"] = np.array([track.verify_score for track in tracks], np.float32)
        return sv.Detections(
            xyxy=detections.xyxy[order].astype(np.float32),
            mask=None if detections.mask is None else detections.mask[order],
            confidence=np.array([track.confidence for track in tracks], np.float32),
            class_id=classes,
            tracker_id=ids[order],
            data={"class_name": np.array(vocabulary.classes, dtype=str)[classes], **columns},
        )


def _with_ids(detections: sv.Detections, rows: list[int], ids: list[int]) -> sv.Detections:
    """Return some of the detections with tracker ids."""
    chosen = select_rows(detections, np.array(rows, np.intp))
    chosen.tracker_id = np.array(ids, np.int64)
    return chosen
