"""Scores of tracking in videos: J and F by the rules of DAVIS and of SA-V, HOTA, CLEAR and identity metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from grounded_sam.formats.video_masks import Mask

#: Tolerance for matching contours, as a fraction of the image diagonal; see `f_measure` of davis2017-evaluation.
TOLERANCE = 0.008


def frame_overlaps(objects: Sequence[Mask], tracks: Sequence[Mask]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute J and F of each object with each track in one frame.

    J is IoU; F is the harmonic mean of the shares of both contours that are near the other one: `db_eval_iou` and
    `f_measure` of davis2017-evaluation (Perazzi et al. 2016).

    Args:
        objects: `n` masks `(H, W) bool` of the ground truth, none of them empty.
        tracks: `m` masks `(H, W) bool` of the run, none of them empty.

    Returns:
        J and F, `(n, m)` each, 0 to 1.

    >>> mask = np.eye(20, dtype=bool)
    >>> frame_overlaps([mask], [mask])[0].tolist()
    [[1.0]]
    """
    shape = (len(objects), len(tracks))
    if not all(shape):
        return np.zeros(shape), np.zeros(shape)
    height, width = objects[0].shape
    radius = math.ceil(TOLERANCE * math.hypot(height, width))
    window = _window([*objects, *tracks], radius)
    object_contours, track_contours = (
        [_Contour.of(mask[window], radius) for mask in masks] for masks in (objects, tracks)
    )
    track_areas = [int(np.count_nonzero(mask)) for mask in tracks]
    j, f = np.zeros(shape), np.zeros(shape)
    for row, mask in enumerate(objects):
        area = int(np.count_nonzero(mask))
        for column, other in enumerate(tracks):
            intersection = np.count_nonzero(mask[window] & other[window])
            j[row, column] = intersection / (area + track_areas[column] - intersection)
            f[row, column] = object_contours[row].f_measure(track_contours[column])
    return j, f


def _window(masks: Sequence[Mask], radius: int) -> tuple[slice, slice]:
    """Return the part of the image that contains all masks and what is near their contours."""
    union = np.logical_or.reduce(list(masks))
    window = []
    for axis, size in ((1, union.shape[0]), (0, union.shape[1])):
        filled = np.flatnonzero(union.any(axis))
        # One more pixel, since contours extend one pixel beyond their masks.
        window.append(slice(max(0, filled[0] - radius - 1), min(size, filled[-1] + radius + 2)))
    return window[0], window[1]


@dataclass(frozen=True)
class _Contour:
    """The contour of a mask.

    Attributes:
        line: Pixels of the contour, `(H, W) bool`, as `seg2bmap` of davis2017-evaluation draws it.
        near: Pixels within the tolerance of the contour, `(H, W) bool`.
        length: Number of pixels of the contour.
    """

    line: Mask
    near: Mask
    length: int

    @classmethod
    def of(cls, mask: Mask, radius: int) -> _Contour:
        """Trace a mask `(H, W) bool`."""
        import cv2

        right, below, diagonal = (np.zeros_like(mask) for _ in range(3))
        right[:, :-1], below[:-1], diagonal[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        line = (mask ^ right) | (mask ^ below) | (mask ^ diagonal)
        line[-1] = mask[-1] ^ right[-1]
        line[:, -1] = mask[:, -1] ^ below[:, -1]
        line[-1, -1] = False
        grid = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        disk = ((grid**2).sum(0) <= radius**2).astype(np.uint8)
        near = cv2.dilate(line.astype(np.uint8), disk).astype(bool)
        return cls(line, near, int(np.count_nonzero(line)))

    def f_measure(self, other: _Contour) -> float:
        """Compute F between this contour, of the ground truth, and the contour of a track."""
        if not self.length or not other.length:
            return float(self.length == other.length)
        precision = np.count_nonzero(other.line & self.near) / other.length
        recall = np.count_nonzero(self.line & other.near) / self.length
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True)
class _FrameScores:
    """J and F of each object with each track in one frame.

    Attributes:
        objects: Ids of the `n` objects of the ground truth.
        tracks: Ids of the `m` tracks of the run.
        j: `(n, m)`.
        f: `(n, m)`.
    """

    objects: list[int]
    tracks: list[int]
    j: NDArray[np.float64]
    f: NDArray[np.float64]


class VideoScores:
    """Collect the frames of one video, and score its objects. Masks are not kept.

    Args:
        assignment: Which track belongs to which object: `best`, the assignment of the highest J&F (Hungarian method, as
            in DAVIS unsupervised); `ids`, the track with the id of the object; `one`, all masks of a frame are one
            object (as in DAVIS 2016).
        classes: Class name of each object; tracks of other classes do not match. None if objects have no classes.

    >>> video, mask = VideoScores(), np.eye(20, dtype=bool)
    >>> for _ in range(3):
    ...     overlap = video.add({1: mask}, {7: mask})
    >>> video.by_object()[1]["track"], video.by_object()[1]["davis_all_frames"]["JF"]
    (7, 1.0)
    """

    def __init__(
        self, assignment: Literal["best", "ids", "one"] = "best", classes: Mapping[int, str] | None = None
    ) -> None:
        self.assignment, self.classes = assignment, classes
        self._frames: list[_FrameScores] = []
        self._track_classes: dict[int, str] = {}

    def add(
        self,
        objects: Mapping[int, Mask],
        tracks: Mapping[int, Mask],
        track_classes: Mapping[int, str] | None = None,
    ) -> NDArray[np.float64]:
        """Add a frame.

        Args:
            objects: Masks `(H, W) bool` of the ground truth by object id, none of them empty.
            tracks: Masks `(H, W) bool` of the run by tracker id, none of them empty.
            track_classes: Class name of each track.

        Returns:
            IoU of each object with each track, 0 where their classes differ.
        """
        if self.assignment == "one":
            objects, tracks = (_union(masks) for masks in (objects, tracks))
            track_classes = None
        self._track_classes |= track_classes or {}
        j, f = frame_overlaps(list(objects.values()), list(tracks.values()))
        if self.classes is not None and track_classes is not None:
            same = [[self.classes.get(n) == track_classes.get(k) for k in tracks] for n in objects]
            same_class = np.array(same, bool).reshape(j.shape)
            j, f = np.where(same_class, j, 0.0), np.where(same_class, f, 0.0)
        self._frames.append(_FrameScores(list(objects), list(tracks), j, f))
        return j

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._frames)

    def object_ids(self) -> list[int]:
        """Return the ids of all objects so far."""
        return list(dict.fromkeys(number for frame in self._frames for number in frame.objects))

    def track_ids(self) -> list[int]:
        """Return the ids of all tracks so far."""
        return list(dict.fromkeys(track for frame in self._frames for track in frame.tracks))

    def _scores(self, number: int, track: int | None) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return J and F of an object with a track by frame, and where either is present.

        Returns:
            `(2, t)`, 1 where both are absent, and `(t,)`.
        """
        scores, present = np.ones((2, len(self._frames))), np.zeros(len(self._frames), bool)
        for t, frame in enumerate(self._frames):
            row = frame.objects.index(number) if number in frame.objects else None
            column = frame.tracks.index(track) if track in frame.tracks else None
            present[t] = row is not None or column is not None
            if row is not None and column is not None:
                scores[:, t] = frame.j[row, column], frame.f[row, column]
            elif present[t]:
                scores[:, t] = 0.0
        return scores, present

    def _assign(self) -> dict[int, int | None]:
        """Return the track of each object; None for an object without a track."""
        numbers, tracks = self.object_ids(), self.track_ids()
        if self.assignment != "best":
            return {number: number if number in tracks else None for number in numbers}
        scores = self._mean_scores(numbers, tracks)
        if self.classes is not None:
            differ = [[self.classes.get(n) != self._track_classes.get(k) for k in tracks] for n in numbers]
            scores[:, : len(tracks)][np.array(differ, bool).reshape(len(numbers), len(tracks))] = -1.0
        assigned: dict[int, int | None] = dict.fromkeys(numbers)
        for row, column in zip(*linear_sum_assignment(-scores), strict=True):
            if column < len(tracks) and scores[row, column] >= 0:
                assigned[numbers[row]] = tracks[column]
        return assigned

    def _mean_scores(self, numbers: list[int], tracks: list[int]) -> NDArray[np.float64]:
        """Compute the mean of J and F over all frames, `(n, max(n, m))`.

        More columns than tracks stand for no track, as in DAVIS.
        """
        shape = (len(numbers), max(len(tracks), len(numbers)))
        row_of, column_of = ({number: i for i, number in enumerate(ids)} for ids in (numbers, tracks))
        total, both_present = np.zeros(shape), np.zeros(shape)
        object_present, track_present = np.zeros(shape[0]), np.zeros(shape[1])
        for frame in self._frames:
            cells = np.ix_([row_of[n] for n in frame.objects], [column_of[k] for k in frame.tracks])
            total[cells] += (frame.j + frame.f) / 2
            both_present[cells] += 1
            object_present[cells[0].ravel()] += 1
            track_present[cells[1].ravel()] += 1
        both_absent = len(self._frames) - object_present[:, None] - track_present[None] + both_present  # J and F are 1
        return (total + both_absent) / max(1, len(self._frames))

    def by_object(self) -> dict[int, dict[str, Any]]:
        """Score each object by three rules.

        `davis` (semi-supervised): mean, recall (fraction above 0.5) and decay (first minus last quarter) over all
        frames but the first and the last; where object and track are both absent, J and F are 1. `davis_all_frames`
        (unsupervised): the same over all frames. `sav`: means starting at the first frame with the object or its track,
        without the first and last frame of the video (`sav_benchmark.py` of SAM 2, as vos-benchmark).

        Returns:
            By object id the id of its `track` or None, its `class` if objects have classes, and the scores by rule as
            in `metrics.json`; None for a rule that has no frame for it.
        """
        scores_by_object = {}
        for number, track in self._assign().items():
            scores, present = self._scores(number, track)
            inner = scores[:, 1:-1]
            occurs = any(number in frame.objects for frame in self._frames[1:-1])
            sav = None
            if occurs:
                j, f = inner[:, int(present[1:-1].argmax()) :].mean(1).tolist()
                sav = {"J": j, "F": f, "JF": (j + f) / 2}
            entry: dict[str, Any] = {"track": track}
            if self.classes is not None:
                entry["class"] = self.classes.get(number)
            entry |= {"davis": _davis(inner), "davis_all_frames": _davis(scores), "sav": sav}
            scores_by_object[number] = entry
        return scores_by_object

    def for_trackeval(self) -> dict[str, Any]:
        """Return the frames in the form of trackeval's `eval_sequence`; similarity is J."""
        objects, tracks = ({n: i for i, n in enumerate(ids)} for ids in (self.object_ids(), self.track_ids()))
        return {
            "num_timesteps": len(self._frames),
            "num_gt_ids": len(objects),
            "num_tracker_ids": len(tracks),
            "num_gt_dets": sum(len(frame.objects) for frame in self._frames),
            "num_tracker_dets": sum(len(frame.tracks) for frame in self._frames),
            "gt_ids": [np.array([objects[n] for n in frame.objects], int) for frame in self._frames],
            "tracker_ids": [np.array([tracks[k] for k in frame.tracks], int) for frame in self._frames],
            "similarity_scores": [frame.j for frame in self._frames],
        }


def _union(masks: Mapping[int, Mask]) -> dict[int, Mask]:
    """Merge all masks of a frame into one object with id 1."""
    return {1: np.logical_or.reduce(list(masks.values()))} if masks else {}


def _davis(scores: NDArray[np.float64]) -> dict[str, float] | None:
    """Compute mean, recall and decay of J and F, as `db_statistics` of davis2017-evaluation, and J&F.

    Args:
        scores: J and F by frame, `(2, t)`.

    Returns:
        None without frames.
    """
    if not scores.shape[1]:
        return None
    # DAVIS keeps these indices in 8 bits, which overflow after 255 frames.
    bounds = np.round(np.linspace(1, scores.shape[1], 5) + 1e-10).astype(int) - 1
    statistics: dict[str, float] = {}
    for key, row in zip("JF", scores, strict=True):
        first, last = (row[bounds[i] : bounds[i + 1] + 1].mean() for i in (0, 3))
        statistics |= {f"{key}_mean": float(row.mean()), f"{key}_recall": float((row > 0.5).mean())}
        statistics[f"{key}_decay"] = float(first - last)
    statistics["JF"] = (statistics["J_mean"] + statistics["F_mean"]) / 2
    return statistics


def mean_scores(objects: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Average the scores of objects by rule.

    Args:
        objects: Scores of objects, from `VideoScores.by_object`.

    Returns:
        By rule the mean of each score; -1 where a rule has no object.
    """
    means: dict[str, dict[str, float]] = {}
    keys = [f"{measure}_{statistic}" for measure in "JF" for statistic in ("mean", "recall", "decay")]
    for rule, names in (("davis", [*keys, "JF"]), ("davis_all_frames", [*keys, "JF"]), ("sav", ["J", "F", "JF"])):
        rows = [scores[rule] for scores in objects if scores[rule] is not None]
        means[rule] = {name: float(np.mean([row[name] for row in rows])) if rows else -1.0 for name in names}
    return means


def has_trackeval() -> bool:
    """Return whether trackeval, which computes HOTA, CLEAR and identity metrics, is installed."""
    return find_spec("trackeval") is not None


def trackeval_metrics(videos: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Compute HOTA (Luiten et al. 2020), CLEAR and identity metrics with trackeval.

    Args:
        videos: Frames of each video, from `VideoScores.for_trackeval`.

    Returns:
        Metrics of all videos together, and those of each video by name.
    """
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        from trackeval import _timing
        from trackeval.metrics import CLEAR, HOTA, Identity

        _timing.DO_TIMING = False
        config = {"PRINT_CONFIG": False}
        by_video: dict[str, dict[str, Any]] = {name: {} for name in videos}
        overall: dict[str, Any] = {}
        for metric in (HOTA(), CLEAR(config), Identity(config)):
            results = {name: metric.eval_sequence(dict(frames)) for name, frames in videos.items()}
            for name, fields in results.items():
                by_video[name] |= _main_fields(fields)
            overall |= _main_fields(metric.combine_sequences(results))
    return overall, by_video


def _main_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the fields of trackeval that are reported; those of HOTA are averaged over its thresholds."""
    means = {key: float(np.mean(fields[key])) for key in ("HOTA", "DetA", "AssA", "LocA") if key in fields}
    ratios = {key: float(fields[key]) for key in ("MOTA", "IDF1", "IDP", "IDR") if key in fields}
    counts = {key: int(fields[key]) for key in ("IDSW", "Frag") if key in fields}
    return {**means, **ratios, **counts}
