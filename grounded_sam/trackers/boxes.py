"""Ids for what the detector finds in every frame: ByteTrack, OC-SORT and their kin of the package `trackers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary

METHODS = {
    "bytetrack": "ByteTrackTracker",
    "ocsort": "OCSORTTracker",
    "sort": "SORTTracker",
    "cbiou": "CBIoUTracker",
}

#: For the scores of text-queried detectors; the package's own (0.6, 0.7) are for detectors of fixed classes, and leave
#: most of these without an id.
THRESHOLDS = {
    "bytetrack": {"track_activation_threshold": 0.3, "high_conf_det_threshold": 0.3},
    "ocsort": {"high_conf_det_threshold": 0.3},
    "cbiou": {"track_activation_threshold": 0.3, "high_conf_det_threshold": 0.3},
}


class BoxTracker:
    """Associates boxes from frame to frame by motion and overlap; no memory of looks, and nothing between detections.

    For when masks per frame are enough: detector and segmenter work on every frame, so `track.redetect_every` has no
    say; `source.stride` leaves frames out. Objects that the method has not confirmed yet are not shown. Ids follow
    boxes of any class; the class of a track is voted on.

    Args:
        segmenter: of the pipeline; not used.
        method: `bytetrack` (Zhang et al. 2022), `ocsort` (Cao et al. 2023), `sort` or `cbiou`.
        settings: arguments of the method's class in `trackers`, such as `minimum_consecutive_frames`. Thresholds on
            confidence are 0.3 here where they are not given (`track_activation_threshold`, `high_conf_det_threshold`).
            What is weaker goes on with tracks that exist, if it comes this far: `select.score=0.1`.

    Raises:
        ConfigError: for an unknown method or setting, or without the package.
    """

    def __init__(
        self, segmenter: Any = None, method: str = "bytetrack", settings: Mapping[str, Any] | None = None
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"tracker.method must be one of {', '.join(METHODS)}, got {method!r}")
        try:
            import trackers
        except ImportError as error:
            raise ConfigError("tracker=boxes needs the package trackers: pip install --no-deps trackers") from error
        self._kind: Any = getattr(trackers, METHODS[method])
        self.settings = {**THRESHOLDS.get(method, {}), **(settings or {})}
        try:
            self._kind(**self.settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"tracker.settings do not fit {method}: {' '.join(str(error).split())}") from error

    def follow(
        self, frames: Iterator[Frame], vocabulary: Vocabulary, look: Callable[[Frame], sv.Detections]
    ) -> Iterator[tuple[Frame, sv.Detections]]:
        """Every frame with the objects found in it that the method has given an id."""
        tracker = self._kind(**self.settings)
        for frame in frames:
            found = look(frame)
            # The package copies what it is given; masks stay here.
            given = sv.Detections(
                xyxy=found.xyxy,
                confidence=found.confidence,
                class_id=found.class_id,
                data={"row": np.arange(len(found))},
            )
            seen = tracker.update(given)
            ids = np.empty(0, np.int64) if seen.tracker_id is None else np.asarray(seen.tracker_id, np.int64)
            named = np.flatnonzero(ids >= 0)
            out = select_rows(found, np.asarray(seen.data["row"], np.intp)[named] if len(named) else [])
            out.tracker_id = ids[named]
            yield frame, out
