"""Label Studio's tracks of videos: a `VideoRectangle` has boxes at keyframes, with straight lines between them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ImageError, shorten
from grounded_sam.formats.label_studio import rectangle_in_pixels
from grounded_sam.formats.segmentations import is_number

#: Frames a second of a `Video` tag that does not say.
DEFAULT_FPS = 24.0
#: Largest difference of a box from the straight line between two keyframes, in percent of the side.
TOLERANCE = 0.25
#: Largest number of a frame.
MAX_FRAME = 100_000_000


@dataclass(eq=False)
class VideoTrack:
    """A track of a video, as it is collected frame by frame.

    Attributes:
        class_name: Class in its last frame so far.
        score: Sum of its confidences.
        positions: Position of each of its frames among those of the video that were processed.
        times: Seconds of each of its frames from the start of the video.
        boxes: Boxes, xyxy in percent, four numbers each.
    """

    class_name: str = ""
    score: float = 0.0
    positions: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))
    boxes: array[float] = field(default_factory=lambda: array("d"))

    def add(
        self,
        position: int,
        time_s: float,
        box: Sequence[float],
        size_hw: tuple[int, int],
        class_name: str,
        score: float,
    ) -> None:
        """Add a frame.

        Args:
            position: Position of the frame among those that were processed.
            time_s: Seconds from the start of the video.
            box: xyxy in pixels.
            size_hw: Height and width of the frame.
            class_name: Class of the object.
            score: Its confidence.
        """
        height, width = size_hw
        scale = np.array([100 / width, 100 / height] * 2)
        self.class_name, self.score = class_name, self.score + score
        self.positions.append(position)
        self.times.append(time_s)
        self.boxes.extend(np.clip(np.asarray(box) * scale, 0, 100).tolist())

    def value(self, fps: float, frame_count: int, duration_s: float) -> dict[str, Any]:
        """Return the `value` of the region, without its labels.

        A keyframe is where the box leaves the straight line between its neighbors by more than `TOLERANCE`; the last
        one before the object disappears is not `enabled`.

        Args:
            fps: Frames a second of the `Video` tag, which numbers its frames from 1.
            frame_count: Number of frames of the video, by that.
            duration_s: Length of the video in seconds.

        >>> track = VideoTrack()
        >>> for i in range(5):
        ...     track.add(i, i / 10, [i, 0, i + 10, 10], (100, 100), "car", 0.9)
        >>> [(key["frame"], key["x"], key["enabled"]) for key in track.value(10, 5, 0.5)["sequence"]]
        [(1, 0.0, True), (5, 4.0, False)]
        """
        all_boxes = np.array(self.boxes).reshape(-1, 4)
        breaks = [i for i in range(1, len(self.positions)) if self.positions[i] != self.positions[i - 1] + 1]
        sequence: list[dict[str, Any]] = []
        for start, end in zip([0, *breaks], [*breaks, len(self.positions)], strict=True):
            by_frame = {1 + round(self.times[i] * fps): all_boxes[i] for i in range(start, end)}
            frames, boxes = list(by_frame), np.array(list(by_frame.values()))
            if sequence and frames[0] <= sequence[-1]["frame"]:  # two frames of the file in one of the tag
                sequence.pop()
            keys = _keyframes(np.array(frames, float), boxes)
            for i in keys:
                x1, y1, x2, y2 = (round(float(v), 4) for v in boxes[i])
                box = {"x": x1, "y": y1, "width": round(x2 - x1, 4), "height": round(y2 - y1, 4), "rotation": 0}
                time_s = round((frames[i] - 1) / fps, 6)
                sequence.append({"frame": frames[i], "time": time_s, "enabled": i != keys[-1], **box})
        return {"framesCount": frame_count, "duration": round(duration_s, 6), "sequence": sequence}


def _keyframes(frames: NDArray[np.float64], boxes: NDArray[np.float64]) -> list[int]:
    """Return the indices of the boxes that the others follow from, by linear interpolation within `TOLERANCE`."""
    kept, stack = {0, len(frames) - 1}, [(0, len(frames) - 1)]
    while stack:
        first, last = stack.pop()
        if last - first < 2:
            continue
        share = ((frames[first + 1 : last] - frames[first]) / (frames[last] - frames[first]))[:, None]
        off = np.abs(boxes[first] + share * (boxes[last] - boxes[first]) - boxes[first + 1 : last]).max(1)
        worst = int(off.argmax())
        if off[worst] > TOLERANCE:
            middle = first + 1 + worst
            kept.add(middle)
            stack += [(first, middle), (middle, last)]
    return sorted(kept)


def track_regions(
    tracks: Mapping[int, VideoTrack], control: str, obj: str, size_hw: tuple[int, int], fps: float, frame_count: int
) -> list[dict[str, Any]]:
    """Return the regions of the tracks of a video.

    Args:
        tracks: The tracks by id.
        control: Name of the `VideoRectangle`.
        obj: Name of the `Video`.
        size_hw: Height and width of the frames.
        fps: Frames a second of the `Video`.
        frame_count: Number of its frames.
    """
    height, width = size_hw
    return [
        {
            "id": f"track-{number}",
            "type": "videorectangle",
            "from_name": control,
            "to_name": obj,
            "original_width": width,
            "original_height": height,
            "score": round(track.score / len(track.positions), 6),
            "value": {**track.value(fps, frame_count, frame_count / fps), "labels": [track.class_name]},
            "meta": {"text": [f"track {number}"]},
        }
        for number, track in sorted(tracks.items())
    ]


class TrackBoxes:
    """The boxes of a `VideoRectangle` at any frame.

    Args:
        value: `value` of the region.
        size_hw: Height and width of the frames.

    Raises:
        ImageError: If it is malformed.

    >>> keys = [{"frame": 1, "enabled": True, "x": 0, "y": 0, "width": 10, "height": 10},
    ...         {"frame": 3, "enabled": False, "x": 20, "y": 0, "width": 10, "height": 10}]
    >>> boxes = TrackBoxes({"sequence": keys, "labels": ["car"]}, (100, 100))
    >>> boxes.at(2), boxes.at(4)
    ((10.0, 0.0, 20.0, 10.0), None)
    """

    def __init__(self, value: Mapping[str, Any], size_hw: tuple[int, int]) -> None:
        sequence, labels = value.get("sequence"), value.get("labels", [])
        if not isinstance(sequence, list) or not sequence or not all(isinstance(key, Mapping) for key in sequence):
            raise ImageError(f"the sequence of a track must be a list of keyframes, got {shorten(sequence)}")
        if not all(type(key.get("frame")) is int and 0 < key["frame"] <= MAX_FRAME for key in sequence):
            raise ImageError("the frame of a keyframe must be a whole number, from 1")
        self.labels = tuple(label for label in labels if isinstance(label, str)) if isinstance(labels, list) else ()
        self.size_hw = size_hw
        by_frame = {key["frame"]: key for key in sequence}
        self._frames = sorted(by_frame)
        self._enabled = [by_frame[frame].get("enabled", True) is not False for frame in self._frames]
        self._boxes = np.array([rectangle_in_pixels(by_frame[frame], size_hw) for frame in self._frames])
        self.is_rotated = any(is_number(key.get("rotation")) and key["rotation"] for key in sequence)

    def at(self, frame: int) -> tuple[float, float, float, float] | None:
        """Return the box at a frame, xyxy in pixels; None where the object is not there, or outside.

        Args:
            frame: Number of the frame, from 1.
        """
        i = int(np.searchsorted(self._frames, frame, "right")) - 1
        if i < 0 or (self._frames[i] != frame and not self._enabled[i]):
            return None
        box = self._boxes[i]
        if self._frames[i] != frame and i + 1 < len(self._frames):
            share = (frame - self._frames[i]) / (self._frames[i + 1] - self._frames[i])
            box = box + share * (self._boxes[i + 1] - box)
        height, width = self.size_hw
        x, y, w, h = (float(v) for v in box)
        clipped = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
        return clipped if clipped[0] < clipped[2] and clipped[1] < clipped[3] else None
