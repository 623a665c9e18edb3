"""How well objects are followed through a video: J and F by the rules of DAVIS and of SA-V, HOTA, IDF1, switches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Mask = NDArray[np.bool_]

#: Share of the diagonal within which two contours are the same, see `f_measure` of davis2017-evaluation.
TOLERANCE = 0.008


def frame_overlaps(truth: Sequence[Mask], found: Sequence[Mask]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """J and F of each object with each track in one frame, `(n, m)` both; no mask may be empty.

    J is IoU, F the harmonic mean of the shares of either contour that are near the other: `db_eval_iou` and
    `f_measure` of davis2017-evaluation (Perazzi et al. 2016).
    """
    shape = (len(truth), len(found))
    if not all(shape):
        return np.zeros(shape), np.zeros(shape)
    height, width = truth[0].shape
    reach = math.ceil(TOLERANCE * math.hypot(height, width))
    # Only where something is; a pixel more, since contours reach beyond their masks by that.
    everything = np.logical_or.reduce([*truth, *found])
    window = []
    for axis, size in ((1, height), (0, width)):
        places = np.flatnonzero(everything.any(axis))
        window.append(slice(max(0, places[0] - reach - 1), min(size, places[-1] + reach + 2)))
    at = tuple(window)
    j, f = np.zeros(shape), np.zeros(shape)
    theirs, ours = ([_contour(mask[at], reach) for mask in masks] for masks in (truth, found))
    areas = [int(np.count_nonzero(mask)) for mask in found]
    for row, mask in enumerate(truth):
        area, (line, near, length) = int(np.count_nonzero(mask)), theirs[row]
        for column, other in enumerate(found):
            both = np.count_nonzero(mask[at] & other[at])
            j[row, column] = both / (area + areas[column] - both)
            line_, near_, length_ = ours[column]
            if not length or not length_:
                f[row, column] = float(length == length_)
                continue
            precision, recall = np.count_nonzero(line_ & near) / length_, np.count_nonzero(line & near_) / length
            f[row, column] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return j, f


def _contour(mask: Mask, reach: int) -> tuple[Mask, Mask, int]:
    """The contour of a mask as `seg2bmap` draws it, what is near it, and its length."""
    import cv2

    right, below, both = (np.zeros_like(mask) for _ in range(3))
    right[:, :-1], below[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    line = (mask ^ right) | (mask ^ below) | (mask ^ both)
    line[-1] = mask[-1] ^ right[-1]
    line[:, -1] = mask[:, -1] ^ below[:, -1]
    line[-1, -1] = False
    grid = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = ((grid**2).sum(0) <= reach**2).astype(np.uint8)
    near = cv2.dilate(line.astype(np.uint8), disk).astype(bool)
    return line, near, int(np.count_nonzero(line))


@dataclass
class VideoScores:
    """The measured frames of one video; masks are not held.

    Args:
        objects: which track is which object: `best`, by the assignment of highest J&F (Hungarian method, as DAVIS
            unsupervised); `ids`, by their numbers; `one`, all masks of a frame are one object (as DAVIS 2016).
        classes: name of each object's class, where they have one: tracks of another class are no match.
    """

    objects: Literal["best", "ids", "one"] = "best"
    classes: Mapping[int, str] | None = None
    _frames: list[tuple[list[int], list[int], Any, Any]] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict)

    def add(
        self, truth: Mapping[int, Mask], found: Mapping[int, Mask], names: Mapping[int, str] | None = None
    ) -> NDArray[np.float64]:
        """Take a frame.

        Args:
            truth, found: masks by number; none is empty.
            names: class of each track.

        Returns:
            IoU of each object with each track, 0 where their classes differ.
        """
        if self.objects == "one":
            truth, found = ({1: np.logical_or.reduce(list(m.values()))} if m else {} for m in (truth, found))
            names = None
        self._names |= names or {}
        rows, columns = list(truth), list(found)
        j, f = frame_overlaps(list(truth.values()), list(found.values()))
        if self.classes is not None and names is not None:
            same = np.array([[self.classes.get(g) == names.get(k) for k in columns] for g in rows], bool)
            j, f = (np.where(same.reshape(j.shape), value, 0.0) for value in (j, f))
        self._frames.append((rows, columns, j, f))
        return j

    def __len__(self) -> int:
        return len(self._frames)

    def numbers(self, side: int) -> list[int]:
        """The numbers of all objects (0) or tracks (1) so far."""
        return list(dict.fromkeys(number for frame in self._frames for number in frame[side]))

    def _values(self, number: int, track: int | None) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """J and F of an object with a track by frame, `(2, t)`, 1 where both are absent; and where one is there."""
        values, there = np.ones((2, len(self._frames))), np.zeros(len(self._frames), bool)
        for t, (rows, columns, j, f) in enumerate(self._frames):
            row = rows.index(number) if number in rows else None
            column = columns.index(track) if track in columns else None
            there[t] = row is not None or column is not None
            if row is not None and column is not None:
                values[:, t] = j[row, column], f[row, column]
            elif there[t]:
                values[:, t] = 0.0
        return values, there

    def _assigned(self, numbers: list[int], tracks: list[int]) -> dict[int, int | None]:
        if self.objects != "best":
            return {number: number if number in tracks else None for number in numbers}
        # Without a track of its own an object is compared with nothing; DAVIS fills up in the same way.
        wide = max(len(tracks), len(numbers))
        row_of, column_of = ({n: i for i, n in enumerate(side)} for side in (numbers, tracks))
        total, both = np.zeros((len(numbers), wide)), np.zeros((len(numbers), wide))
        seen, found = np.zeros(len(numbers)), np.zeros(wide)
        for rows, columns, j, f in self._frames:
            at = np.ix_([row_of[n] for n in rows], [column_of[n] for n in columns])
            total[at] += (j + f) / 2
            both[at] += 1
            seen[at[0].ravel()] += 1
            found[at[1].ravel()] += 1
        absent = len(self._frames) - seen[:, None] - found[None] + both  # where both are absent the value is 1
        score = (total + absent) / max(1, len(self._frames))
        if self.classes is not None:
            other = [[self.classes.get(n) != self._names.get(k) for k in tracks] for n in numbers]
            score[:, : len(tracks)][np.array(other, bool).reshape(len(numbers), len(tracks))] = -1.0
        rows, columns = linear_sum_assignment(-score)
        chosen: dict[int, int | None] = dict.fromkeys(numbers)
        for row, column in zip(rows, columns, strict=True):
            if column < len(tracks) and score[row, column] >= 0:
                chosen[numbers[row]] = tracks[column]
        return chosen

    def by_object(self) -> dict[int, dict[str, Any]]:
        """Of each object its track and its scores by three rules; None where a rule has no frame for it.

        `davis`: mean, recall (share above 0.5) and decay (first less last quarter) over all frames but the first
        and the last; where object and track are both absent the value is 1. `davis_all_frames`: the same over all.
        `sav`: means from the first frame on that has the object or its track, without the first and last frame;
        an object that is in none of those has no value (`sav_benchmark.py` of SAM 2, as vos-benchmark).
        """
        out = {}
        for number, track in self._assigned(self.numbers(0), self.numbers(1)).items():
            values, there = self._values(number, track)
            inner, inside = values[:, 1:-1], there[1:-1]
            seen = [number in rows for rows, *_ in self._frames][1:-1]
            begun = int(inside.argmax()) if any(seen) else None
            about: dict[str, Any] = {"track": track}
            if self.classes is not None:
                about["class"] = self.classes.get(number)
            about["davis"] = _davis(inner)
            about["davis_all_frames"] = _davis(values)
            late = None if begun is None else inner[:, begun:].mean(1)
            about["sav"] = (
                None if late is None else {"J": float(late[0]), "F": float(late[1]), "JF": float(late.mean())}
            )
            out[number] = about
        return out

    def for_trackeval(self) -> dict[str, Any]:
        """The frames as metrics of trackeval take them; similarity is J."""
        numbers, tracks = ({n: i for i, n in enumerate(self.numbers(side))} for side in (0, 1))
        return {
            "num_timesteps": len(self._frames),
            "num_gt_ids": len(numbers),
            "num_tracker_ids": len(tracks),
            "num_gt_dets": sum(len(rows) for rows, *_ in self._frames),
            "num_tracker_dets": sum(len(columns) for _, columns, *_ in self._frames),
            "gt_ids": [np.array([numbers[n] for n in rows], int) for rows, *_ in self._frames],
            "tracker_ids": [np.array([tracks[n] for n in columns], int) for _, columns, *_ in self._frames],
            "similarity_scores": [j for _, _, j, _ in self._frames],
        }


def _davis(values: NDArray[np.float64]) -> dict[str, float] | None:
    """Mean, recall and decay of J and F, as `db_statistics` of davis2017-evaluation; and J&F."""
    if not values.shape[1]:
        return None
    # DAVIS holds these places in 8 bits, which goes wrong beyond 255 frames.
    places = np.round(np.linspace(1, values.shape[1], 5) + 1e-10).astype(int) - 1
    out: dict[str, float] = {}
    for key, row in zip("JF", values, strict=True):
        quarters = [row[places[i] : places[i + 1] + 1].mean() for i in (0, 3)]
        out |= {f"{key}_mean": float(row.mean()), f"{key}_recall": float((row > 0.5).mean())}
        out[f"{key}_decay"] = float(quarters[0] - quarters[1])
    out["JF"] = (out["J_mean"] + out["F_mean"]) / 2
    return out


def mean_scores(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over objects, all alike, of what `by_object` gives of each; -1 where a rule has no object."""
    out: dict[str, dict[str, float]] = {}
    keys = [f"{part}_{what}" for part in "JF" for what in ("mean", "recall", "decay")]
    for rule, names in (("davis", [*keys, "JF"]), ("davis_all_frames", [*keys, "JF"]), ("sav", ["J", "F", "JF"])):
        rows = [score[rule] for score in scores if score[rule] is not None]
        out[rule] = {name: float(np.mean([row[name] for row in rows])) if rows else -1.0 for name in names}
    return out


def has_trackeval() -> bool:
    """Whether HOTA, IDF1 and switches can be measured."""
    return find_spec("trackeval") is not None


def trackeval_metrics(videos: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """HOTA (Luiten et al. 2020), CLEAR and identity metrics by trackeval, of all videos together and of each.

    Args:
        videos: of each what `VideoScores.for_trackeval` gives.
    """
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        from trackeval import _timing
        from trackeval.metrics import CLEAR, HOTA, Identity

        _timing.DO_TIMING = False
        quiet = {"PRINT_CONFIG": False}
        single: dict[str, dict[str, Any]] = {name: {} for name in videos}
        whole: dict[str, Any] = {}
        for metric in (HOTA(), CLEAR(quiet), Identity(quiet)):
            each = {name: metric.eval_sequence(dict(data)) for name, data in videos.items()}
            for name, values in each.items():
                single[name] |= _few(values)
            whole |= _few(metric.combine_sequences(each))
    return whole, single


def _few(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of trackeval's fields those that are told; HOTA's are means over its thresholds."""
    means = {key: float(np.mean(values[key])) for key in ("HOTA", "DetA", "AssA", "LocA") if key in values}
    shares = {key: float(values[key]) for key in ("MOTA", "IDF1", "IDP", "IDR") if key in values}
    counts = {key: int(values[key]) for key in ("IDSW", "Frag") if key in values}
    return {**means, **shares, **counts}
