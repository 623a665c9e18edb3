"""Match detections with tracks: by overlap, and by distance where a track is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.masks import mask_iou

#: Stands for "no match" in a cost matrix; larger than any distance.
NO_MATCH = 1e6


@dataclass
class Track:
    """One object of a video.

    Attributes:
        tracker_id: Id of the object.
        votes: By class id, how often keyframes gave that class, and the sum of their confidences.
        verified: How often keyframes verified it, and the sum of their verify scores.
        class_id: Class with the highest sum of confidences; -1 before the first vote.
        lost: Number of frames in a row in which the track was not visible.
        hidden: Whether the track jumped, drifted or duplicates another (see `tracks.TrackManager`), so that it is not
            shown until a detection or a click confirms it.
        strayed: Whether its mask went over to another object; its box is from before that.
        box: Last visible box, `(4,) float32`.
        confirmed_box: Box of the detection that last confirmed the track, `(4,) float32`.
        mask: Last visible mask, `(H, W) bool`, kept where `min_step_iou` is set.
        companions: Tracks of other classes that were on the same object when the track was last confirmed.
    """

    tracker_id: int
    votes: dict[int, tuple[int, float]] = field(default_factory=dict)
    verified: tuple[int, float] = (0, 0.0)
    class_id: int = -1
    lost: int = 0
    hidden: bool = False
    strayed: bool = False
    box: NDArray[np.float32] | None = None
    confirmed_box: NDArray[np.float32] | None = None
    mask: NDArray[np.bool_] | None = None
    companions: set[int] = field(default_factory=set)

    def vote(self, class_id: int, confidence: float) -> None:
        """Count the class of a keyframe; the class changes when another has a higher sum of confidences."""
        count, total = self.votes.get(class_id, (0, 0.0))
        self.votes[class_id] = count + 1, total + confidence
        if self.class_id < 0 or self.votes[class_id][1] > self.votes[self.class_id][1]:
            self.class_id = class_id

    def verify(self, score: float) -> None:
        """Count the verify score of a keyframe."""
        count, total = self.verified
        self.verified = count + 1, total + score

    @property
    def verify_score(self) -> float:
        """Mean verify score of the keyframes; 1 for a track that only clicks have confirmed."""
        count, total = self.verified
        return total / count if count else 1.0

    @property
    def confidence(self) -> float:
        """Mean confidence of the keyframes that voted for the class of the track."""
        count, total = self.votes[self.class_id]
        return total / count


def tracker_ids(detections: sv.Detections) -> NDArray[np.int64]:
    """Return the ids of tracked detections, `(n,) int64`; empty where there are none."""
    if detections.tracker_id is None:
        return np.empty(0, np.int64)
    return np.asarray(detections.tracker_id, np.int64)


def overlaps(detections: sv.Detections, tracks: sv.Detections) -> NDArray[np.float64]:
    """Return the IoU of detections and tracks, `(n, m)`: of masks, or of boxes where there are no masks."""
    if not len(detections) or not len(tracks):
        return np.zeros((len(detections), len(tracks)))
    if detections.mask is None or tracks.mask is None:
        return np.asarray(sv.box_iou_batch(detections.xyxy, tracks.xyxy), np.float64)
    return mask_iou(np.asarray(detections.mask, bool), np.asarray(tracks.mask, bool))


def same_class_overlaps(
    overlap: NDArray[np.float64], detections: sv.Detections, tracks: Sequence[Track], settings: TrackSettings
) -> NDArray[np.float64]:
    """Return `overlap (n, m)` with 0 where the classes differ, unless matching is class-agnostic."""
    if settings.class_agnostic or not overlap.size:
        return overlap
    assert detections.class_id is not None
    classes = np.array([track.class_id for track in tracks])
    return np.where(detections.class_id[:, None] == classes[None], overlap, 0.0)


def match_by_overlap(overlap: NDArray[np.float64], min_iou: float) -> list[tuple[int, int]]:
    """Match rows and columns of an IoU matrix one to one, maximizing the sum of IoU (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    pairs = zip(*linear_sum_assignment(overlap, maximize=True), strict=True)
    return [(int(row), int(column)) for row, column in pairs if overlap[row, column] >= min_iou]


def match_by_box(
    detections: sv.Detections,
    free: NDArray[np.bool_],
    visible: sv.Detections,
    tracks: Sequence[Track],
    owners: Mapping[int, int],
    settings: TrackSettings,
) -> dict[int, int]:
    """Match free detections with visible tracks that no detection confirms, by the IoU of their boxes.

    Where two objects cross, the box of one may get the mask of the other. Such a detection is no new object.

    Args:
        detections: Detections of a keyframe.
        free: Which of them are on no track, `(n,)`.
        visible: Visible tracks.
        tracks: The same.
        owners: Tracker id that each matched detection belongs to, by row.
        settings: `match_iou` and `class_agnostic`.

    Returns:
        The tracker id by row of `detections`.
    """
    if not len(detections) or not len(visible):
        return {}
    iou = np.asarray(sv.box_iou_batch(detections.xyxy, visible.xyxy), np.float64)
    iou = same_class_overlaps(iou, detections, tracks, settings)
    iou[[row for row in range(len(detections)) if row in owners or not free[row]]] = 0.0
    iou[:, [track.tracker_id in owners.values() for track in tracks]] = 0.0
    # An IoU of 0 is no match, even where `match_iou` is 0.
    pairs = [(row, column) for row, column in match_by_overlap(iou, settings.match_iou) if iou[row, column] > 0]
    return {row: tracks[column].tracker_id for row, column in pairs}


def find_parts(
    detections: sv.Detections,
    visible: sv.Detections,
    tracks: Sequence[Track],
    owners: Mapping[int, int],
    settings: TrackSettings,
) -> NDArray[np.bool_]:
    """Return which detections are a part of an object that another detection has confirmed, `(n,) bool`.

    Such as what is left of an object on one side of something in front of it. Of its box and of its mask, at least
    `merge_iou` lies in the box of the other detection and in the mask of the track.

    Args:
        detections: Detections of a keyframe.
        visible: Visible tracks.
        tracks: The same.
        owners: Tracker id that each matched detection belongs to, by row.
        settings: `merge_iou` and `class_agnostic`.
    """
    parts = np.zeros(len(detections), bool)
    if detections.mask is None or visible.mask is None or detections.class_id is None:
        return parts
    columns = {track.tracker_id: column for column, track in enumerate(tracks)}
    for row in (row for row in range(len(detections)) if row not in owners):
        mask, box = np.asarray(detections.mask[row], bool), detections.xyxy[row]
        for owner, tracker_id in owners.items():
            column = columns[tracker_id]
            same_class = settings.class_agnostic or detections.class_id[row] == tracks[column].class_id
            low, high = np.maximum(box[:2], detections.xyxy[owner, :2]), np.minimum(box[2:], detections.xyxy[owner, 2:])
            inside = np.prod(np.maximum(high - low, 0)) >= settings.merge_iou * np.prod(box[2:] - box[:2])
            if same_class and inside:
                covered = np.count_nonzero(mask & np.asarray(visible.mask[column], bool))
                parts[row] |= bool(covered >= settings.merge_iou * np.count_nonzero(mask) > 0)
    return parts


def recover_lost(
    detections: sv.Detections,
    rows: Sequence[int],
    lost: Sequence[Track],
    predicted: sv.Detections | None,
    settings: TrackSettings,
) -> dict[int, int]:
    """Match detections with tracks that are not visible.

    First come tracks that were visible since the previous keyframe, by overlap with their last box or with where they
    are predicted; then others, by overlap with where they are predicted; then all, by distance from their last box.
    Where a track that strayed is predicted counts last: a memory that confuses two objects of a class predicts it on
    the wrong one.

    Args:
        detections: Detections of a keyframe.
        rows: Which of them are free.
        lost: Tracks that are not visible.
        predicted: Where they are predicted, if the tracker can say.
        settings: `match_iou`, `max_center_distance`, `redetect_every` and `class_agnostic`.

    Returns:
        The tracker id by row of `detections`.
    """
    columns = {track.tracker_id: column for column, track in enumerate(lost)}
    by_prediction = np.zeros((len(detections), len(lost)))
    if predicted is not None and len(predicted):
        known = [n for n, tracker_id in enumerate(tracker_ids(predicted).tolist()) if tracker_id in columns]
        predicted = select_rows(predicted, np.array(known, np.intp))
        by_prediction[:, [columns[i] for i in tracker_ids(predicted).tolist()]] = overlaps(detections, predicted)
    by_place = np.zeros_like(by_prediction)
    for column, track in enumerate(lost):
        if track.box is not None and len(detections):
            by_place[:, column] = sv.box_iou_batch(detections.xyxy, track.box[None])[:, 0]
    recent = np.array([track.lost <= settings.redetect_every for track in lost], bool)
    trusted = np.where([track.strayed for track in lost], 0.0, by_prediction)
    recovered: dict[int, int] = {}

    def match(overlap: NDArray[np.float64]) -> None:
        rest = [row for row in rows if row not in recovered]
        left = [column for column, track in enumerate(lost) if track.tracker_id not in recovered.values()]
        pairs = match_by_overlap(overlap[np.ix_(rest, left)], settings.match_iou)
        recovered.update({rest[n]: lost[left[m]].tracker_id for n, m in pairs})

    match(same_class_overlaps(np.where(recent, np.maximum(trusted, by_place), 0.0), detections, lost, settings))
    match(same_class_overlaps(trusted, detections, lost, settings))
    rest = [row for row in rows if row not in recovered]
    left = [track for track in lost if track.tracker_id not in recovered.values()]
    recovered |= dict(match_by_distance(detections, rest, left, settings))
    match(same_class_overlaps(by_prediction, detections, lost, settings))
    return recovered


def match_by_distance(
    detections: sv.Detections, rows: Sequence[int], lost: Sequence[Track], settings: TrackSettings
) -> list[tuple[int, int]]:
    """Match detections with lost tracks of their class that were last seen nearby.

    Args:
        detections: Detections of a keyframe.
        rows: Which of them are free.
        lost: Tracks that are not visible.
        settings: `max_center_distance` and `class_agnostic`.

    Returns:
        Pairs of a row of `detections` and a tracker id, with the smallest sum of distances.
    """
    from scipy.optimize import linear_sum_assignment

    assert detections.class_id is not None
    distance = np.full((len(rows), len(lost)), NO_MATCH)
    for column, track in enumerate(lost):
        for n, row in enumerate(rows):
            same_class = settings.class_agnostic or detections.class_id[row] == track.class_id
            if track.box is None or not same_class:
                continue
            centers = [(box[:2] + box[2:]) / 2 for box in (detections.xyxy[row], track.box)]
            # The last box of an object that went behind something is that of a small part of it.
            diagonal = max(float(np.hypot(*(box[2:] - box[:2]))) for box in (detections.xyxy[row], track.box))
            distance[n, column] = float(np.hypot(*(centers[0] - centers[1]))) / max(diagonal, 1.0)
    pairs = zip(*linear_sum_assignment(distance), strict=True)
    limit = settings.max_center_distance
    return [(rows[n], lost[column].tracker_id) for n, column in pairs if distance[n, column] <= limit]


def find_duplicates(
    visible: sv.Detections,
    live: Mapping[int, Track],
    settings: TrackSettings,
    detections: sv.Detections | None = None,
    overlap: NDArray[np.float64] | None = None,
) -> list[int]:
    """Return the id to hide of every two tracks whose masks are the same object.

    If a detection shows that the object is that of one of the two, it is the other one, whose mask went over to the
    object, as it may when two objects of a class cross. Otherwise it is the younger one.

    Args:
        visible: Tracked detections of a frame, with masks.
        live: All tracks by id, oldest first.
        settings: `merge_iou`, `match_iou` and `class_agnostic`.
        detections: Detections of a keyframe; None for none.
        overlap: IoU of `detections` and `visible`, `(n, m)`.
    """
    ids = tracker_ids(visible).tolist()
    if len(ids) < 2 or visible.mask is None:
        return []
    masks = np.asarray(visible.mask, bool)
    iou = mask_iou(masks, masks)
    age = {tracker_id: n for n, tracker_id in enumerate(live)}
    duplicates: list[int] = []
    for a, b in zip(*np.nonzero(np.triu(iou >= settings.merge_iou, 1)), strict=True):
        same_class = live[ids[a]].class_id == live[ids[b]].class_id
        if (same_class or settings.class_agnostic) and not {ids[a], ids[b]} & set(duplicates):
            pair = live[ids[a]], live[ids[b]]
            stayed = np.zeros(2)
            if detections is not None and overlap is not None and len(detections):
                on_both = overlap[:, [a, b]].min(1)
                if on_both.max() >= settings.match_iou:
                    stayed = np.array([_was_at(track, detections.xyxy[on_both.argmax()]) for track in pair])
            stray = pair[int(stayed.argmin())].tracker_id
            were_apart = stayed.max() >= settings.match_iou > stayed.min()
            duplicates.append(stray if were_apart else max(ids[a], ids[b], key=age.__getitem__))
    return duplicates


def _was_at(track: Track, box: NDArray[np.float32]) -> float:
    """Return the IoU of a box with that of the detection that last confirmed a track; 0 if none did."""
    if track.confirmed_box is None:
        return 0.0
    return float(sv.box_iou_batch(box[None], track.confirmed_box[None])[0, 0])


def find_drifted(
    overlap: NDArray[np.float64],
    detections: sv.Detections,
    tracks: Sequence[Track],
    owners: Mapping[int, int],
    settings: TrackSettings,
) -> list[int]:
    """Return tracks that no detection confirms, and that newly overlap the detection of another object.

    That is a detection of another class, or one of its class that confirms another track and is away from where this
    one was last confirmed. A track may share an object with a track of another class, such as a wheel with a car, if it
    did so when it was last confirmed; confirmed tracks record such companions here.

    Args:
        overlap: IoU of detections and tracks, `(n, m)`.
        detections: Detections of a keyframe.
        tracks: Visible tracks, one per column of `overlap`.
        owners: Tracker id that each matched detection belongs to, by row.
        settings: `match_iou` and `class_agnostic`.
    """
    assert detections.class_id is not None
    confirmed, drifted = set(owners.values()), []
    for column, track in enumerate(tracks):
        rows = [row for row in range(len(detections)) if overlap[row, column] >= settings.match_iou]
        others = {owners.get(row, -1) for row in rows if int(detections.class_id[row]) != track.class_id}
        if track.tracker_id in confirmed:
            track.companions = others - {-1}
            continue
        on_look_alike = track.confirmed_box is not None and any(
            row in owners and int(detections.class_id[row]) == track.class_id
            for row in rows
            if _was_at(track, detections.xyxy[row]) < settings.match_iou
        )
        if on_look_alike or (not settings.class_agnostic and others - track.companions):
            drifted.append(track.tracker_id)
    return drifted
