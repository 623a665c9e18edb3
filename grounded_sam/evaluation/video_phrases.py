"""Presence and phrase metrics of videos: whether each phrase was tracked in the videos that show it, and only there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.evaluation.phrase_scores import PairMatch, match_pair, phrase_scores
from grounded_sam.formats.video_masks import LabelledVideo, Mask
from grounded_sam.structures.vocabulary import Vocabulary


class VideoPhrases:
    """Collect the overlaps of tracks with objects; see `phrase_scores` for the metrics.

    A pair is a video and a class of the run. IoU is that of the masks of all frames together: the sum of the areas of
    intersection over that of the areas of union, as in SA-Co. Labels that list the phrases of a video (SA-Co/VEval)
    decide on these alone; others decide on all of their classes.

    Args:
        vocabulary: Classes of the run.

    >>> from grounded_sam.formats.video_masks import LabelledVideo
    >>> video = LabelledVideo(name="v", size_hw=(4, 4), frames=[0], read=lambda key: {}, classes={1: "dog"})
    >>> phrases, mask = VideoPhrases(Vocabulary.parse(["dog", "cat"])), np.eye(4, dtype=bool)
    >>> phrases.add(video, {1: mask}, {5: mask}, {5: "dog"}, np.ones((1, 1)))
    >>> scores = phrases.values()
    >>> scores["positive_pairs"], scores["negative_pairs"], round(scores["cgF1"], 3)
    (1, 1, 1.0)
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._videos: dict[str, _Overlaps] = {}

    def add(
        self,
        video: LabelledVideo,
        objects: Mapping[int, Mask],
        tracks: Mapping[int, Mask],
        track_classes: Mapping[int, str],
        iou: NDArray[np.float64],
    ) -> None:
        """Add a frame.

        Args:
            video: Labels of its video, with classes.
            objects: Masks of the labels by object id.
            tracks: Masks of the run by tracker id.
            track_classes: Class name of each track.
            iou: `(n, m)`, IoU of each object with each track.
        """
        self._videos.setdefault(video.name, _Overlaps(video)).add(objects, tracks, track_classes, iou)

    def values(self) -> dict[str, Any]:
        """Return the entry of `metrics.json`, of all pairs together."""
        return self._values(self.vocabulary.classes)

    def by_class(self) -> dict[str, dict[str, Any]]:
        """Return the entry of each class in `metrics.json`."""
        return {name: self._values((name,)) for name in self.vocabulary.classes}

    def _values(self, names: tuple[str, ...]) -> dict[str, Any]:
        pairs = [video.match(name) for name in names for video in self._videos.values() if video.decides(name)]
        false = [pair.detections for pair in pairs if not pair.labels]
        return {
            "positive_pairs": len(pairs) - len(false),
            "negative_pairs": len(false),
            "false_per_negative_pair": float(np.mean(false)) if false else -1.0,
            **phrase_scores(pairs),
        }


class _Overlaps:
    """Sums of areas in one video.

    Args:
        video: Its labels.
    """

    def __init__(self, video: LabelledVideo) -> None:
        self.video = video
        self._objects: dict[int, int] = {}
        self._tracks: dict[int, int] = {}
        self._shared: dict[tuple[int, int], int] = {}
        self._track_classes: dict[int, str] = {}

    def add(
        self,
        objects: Mapping[int, Mask],
        tracks: Mapping[int, Mask],
        track_classes: Mapping[int, str],
        iou: NDArray[np.float64],
    ) -> None:
        """Add a frame; see `VideoPhrases.add`."""
        self._track_classes |= track_classes
        of_objects, of_tracks = ({k: int(mask.sum()) for k, mask in masks.items()} for masks in (objects, tracks))
        for total, areas in ((self._objects, of_objects), (self._tracks, of_tracks)):
            for key, area in areas.items():
                total[key] = total.get(key, 0) + area
        for i, (number, area) in enumerate(of_objects.items()):
            for j, (track, other) in enumerate(of_tracks.items()):
                if iou[i, j] > 0:  # the intersection follows from the IoU and both areas
                    shared = round(float(iou[i, j] / (1 + iou[i, j])) * (area + other))
                    self._shared[number, track] = self._shared.get((number, track), 0) + shared

    def decides(self, name: str) -> bool:
        """Return whether the labels decide on a class."""
        return self.video.asked is None or name in self.video.asked

    def match(self, name: str) -> PairMatch:
        """Match the tracks of a class with its objects."""
        classes = self.video.classes or {}
        objects = [number for number in self._objects if classes.get(number) == name]
        tracks = [track for track in self._tracks if self._track_classes[track] == name]
        iou = np.zeros((len(tracks), len(objects)))
        for i, track in enumerate(tracks):
            for j, number in enumerate(objects):
                shared = self._shared.get((number, track), 0)
                iou[i, j] = shared / max(1, self._objects[number] + self._tracks[track] - shared)
        return match_pair(iou)
