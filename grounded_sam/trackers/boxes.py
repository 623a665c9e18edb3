"""Trackers by boxes: ByteTrack, OC-SORT and others of the package `trackers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.checks import check_choice
from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary

#: Class of each method in the package.
METHODS = {
    "bytetrack": "ByteTrackTracker",
    "ocsort": "OCSORTTracker",
    "sort": "SORTTracker",
    "cbiou": "CBIoUTracker",
}

#: Thresholds for open-vocabulary detectors. With the defaults of the package (0.6, 0.7), which are for closed-set
#: detectors, most detections get no id.
THRESHOLDS = {
    "bytetrack": {"track_activation_threshold": 0.3, "high_conf_det_threshold": 0.3},
    "ocsort": {"high_conf_det_threshold": 0.3},
    "cbiou": {"track_activation_threshold": 0.3, "high_conf_det_threshold": 0.3},
}


class BoxTracker:
    """Associate boxes from frame to frame by motion and overlap, without appearance.

    Detector and segmenter run on every frame: `track.redetect_every` has no effect, and `source.stride` skips frames.
    Objects that the method has not confirmed yet are not returned. Association ignores classes; the pipeline votes on
    the class of a track.

    Args:
        segmenter: Segmenter of the pipeline; not used.
        method: `bytetrack` (Zhang et al. 2022), `ocsort` (Cao et al. 2023), `sort` (Bewley et al. 2016) or `cbiou`.
        settings: Arguments of the method's class in `trackers`, such as `minimum_consecutive_frames`. Its confidence
            thresholds (`track_activation_threshold`, `high_conf_det_threshold`) default to 0.3 here. Detections below
            them can continue a track, if they pass `select.score`.

    Raises:
        ConfigError: If the method or a setting is unknown, or the package is not installed.
    """

    def __init__(
        self, segmenter: Any = None, method: str = "bytetrack", settings: Mapping[str, Any] | None = None
    ) -> None:
        check_choice("tracker.method", method, tuple(METHODS))
        try:
            import trackers
        except ImportError as error:
            raise ConfigError(
                "tracker=boxes needs the package trackers; install it with pip install --no-deps trackers"
            ) from error
        self._class: Any = getattr(trackers, METHODS[method])
        self.settings = {**THRESHOLDS.get(method, {}), **(settings or {})}
        try:
            self._class(**self.settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"tracker.settings are not valid for {method}: {' '.join(str(error).split())}") from error

    def track(
        self, frames: Iterator[Frame], vocabulary: Vocabulary, detect: Callable[[Frame], sv.Detections]
    ) -> Iterator[tuple[Frame, sv.Detections]]:
        """Yield every frame with the detections that have an id; see `structures.protocols.EndToEndTracker`."""
        tracker = self._class(**self.settings)
        for frame in frames:
            detections = detect(frame)
            # The package copies its input, which is slow with masks.
            boxes = sv.Detections(
                xyxy=detections.xyxy,
                confidence=detections.confidence,
                class_id=detections.class_id,
                data={"row": np.arange(len(detections))},
            )
            tracked = tracker.update(boxes)
            ids = np.empty(0, np.int64) if tracked.tracker_id is None else np.asarray(tracked.tracker_id, np.int64)
            confirmed = np.flatnonzero(ids >= 0)
            rows: Any = np.asarray(tracked.data["row"], np.intp)[confirmed] if len(confirmed) else []
            chosen = select_rows(detections, rows)
            chosen.tracker_id = ids[confirmed]
            yield frame, chosen
