"""How objects are tracked through a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from grounded_sam.checks import check_bool, check_choice, check_int, check_number


@dataclass(frozen=True)
class TrackSettings:
    """How objects are tracked through a video; the config section `track`.

    Attributes:
        redetect_every: Number of frames from one keyframe, where the detector runs, to the next.
        match_iou: Mask IoU from which a detection and a track are the same object.
        class_agnostic: Match detections with tracks of other classes too; the class of a track is then voted on.
        new_track_score: Lowest confidence of a detection that starts a track; None for all that `select` keeps.
        merge_iou: Mask IoU from which two tracks (of one class unless `class_agnostic`) are the same object; the
            younger one is hidden.
        max_lost_frames: Number of frames in a row that a track may be lost or hidden before it ends.
        max_center_distance: How far from its last box a lost track may be matched with a detection of its class, as a
            multiple of the diagonal of the larger one of the two boxes.
        min_step_iou: Mask IoU from one frame to the next below which a track has jumped to something else; it is
            hidden until a detection confirms it. Leave None if objects may move by their own size.
        max_objects: Largest number of tracks at a time, most confident detections first; None for no limit.
        correct: Prompt a track again with a matched detection that is more confident than the track and overlaps it by
            less than `correct_iou`.
        correct_iou: See `correct`.
        direction: `forward`, or `both` to also track objects back to before the keyframe that detected them.
        backward_window: Largest number of frames to track back; as many are kept on disk.
        clicks: Manual points, boxes or masks, as a JSON file or entries; see `structures.clicks.Clicks`.

    Raises:
        ConfigError: If a value is out of range; the message names the key.

    >>> TrackSettings(redetect_every=5).max_lost_frames
    30
    """

    redetect_every: int = 10
    match_iou: float = 0.5
    class_agnostic: bool = False
    new_track_score: float | None = None
    merge_iou: float = 0.7
    max_lost_frames: int = 30
    max_center_distance: float = 1.0
    min_step_iou: float | None = None
    max_objects: int | None = None
    correct: bool = False
    correct_iou: float = 0.8
    direction: Literal["forward", "both"] = "forward"
    backward_window: int = 60
    clicks: Any = None

    def __post_init__(self) -> None:
        for key in ("match_iou", "merge_iou", "correct_iou"):
            check_number(f"track.{key}", getattr(self, key), 0, 1)
        for key in ("new_track_score", "min_step_iou"):
            check_number(f"track.{key}", getattr(self, key), 0, 1, optional=True)
        check_number("track.max_center_distance", self.max_center_distance, 0)
        check_int("track.redetect_every", self.redetect_every, 1)
        check_int("track.max_lost_frames", self.max_lost_frames, 0)
        check_int("track.max_objects", self.max_objects, 1, optional=True)
        check_int("track.backward_window", self.backward_window, 1)
        check_bool("track.class_agnostic", self.class_agnostic)
        check_bool("track.correct", self.correct)
        check_choice("track.direction", self.direction, ("forward", "both"))
