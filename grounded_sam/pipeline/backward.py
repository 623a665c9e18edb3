"""Track objects back to before the keyframe that detected them, within a window of frames kept on disk."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.pipeline.images import convert_errors
from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import mask_iou, masks_to_xyxy
from grounded_sam.structures.protocols import Tracker
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: Consecutive misses that backward tracking of an object tolerates. At the next one it stops: the object is assumed to
#: enter the scene there. The number is small, since no detection confirms the object in those frames.
MAX_MISSED = 3


@dataclass(frozen=True)
class _Object:
    """One object in a buffered frame, with its mask as COCO RLE."""

    tracker_id: int
    class_id: int
    confidence: float
    mask_score: float
    verify_score: float | None
    rle: dict[str, Any]

    @classmethod
    def from_row(
        cls, detections: sv.Detections, i: int, class_id: int, confidence: float, verify_score: float | None
    ) -> _Object:
        """Take the id and the mask of row `i`."""
        from pycocotools import mask as coco_mask

        assert detections.tracker_id is not None and detections.mask is not None
        return cls(
            tracker_id=int(detections.tracker_id[i]),
            class_id=class_id,
            confidence=confidence,
            mask_score=float(detections.data["mask_score"][i]),
            verify_score=verify_score,
            rle=coco_mask.encode(np.asfortranarray(detections.mask[i], dtype=np.uint8)),
        )


@dataclass
class _BufferedFrame:
    """A frame that may still get more objects: pixels in a file, masks as RLE."""

    frame: Frame  # without pixels
    pixels: Path
    size_hw: tuple[int, int]
    objects: list[_Object]

    def masks(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Decode the masks, `(n, H, W) bool`."""
        from pycocotools import mask as coco_mask

        return np.array([coco_mask.decode(item.rle) for item in self.objects], bool).reshape(-1, *self.size_hw)

    def result(self, vocabulary: Vocabulary) -> FrameResult:
        """Decode the result, and delete the file."""
        frame = replace(self.frame, pixels=np.load(self.pixels))
        self.pixels.unlink()
        masks = self.masks()
        classes = np.array([item.class_id for item in self.objects], np.int64)
        verified = [item.verify_score for item in self.objects]
        columns = {}
        if any(score is not None for score in verified):
            columns["verify_score"] = np.array([1.0 if score is None else score for score in verified], np.float32)
        detections = sv.Detections(
            xyxy=masks_to_xyxy(masks),
            mask=masks,
            confidence=np.array([item.confidence for item in self.objects], np.float32),
            class_id=classes,
            tracker_id=np.array([item.tracker_id for item in self.objects], np.int64),
            data={
                "class_name": np.array(vocabulary.classes, dtype=str)[classes],
                "mask_score": np.array([item.mask_score for item in self.objects], np.float32),
                **columns,
            },
        )
        return FrameResult(frame=frame, detections=detections)


def _objects(detections: sv.Detections) -> list[_Object]:
    """Convert the labeled detections of a frame."""
    return [_Object.from_row(detections, i, *_label(detections, i)) for i in range(len(detections))]


def _label(detections: sv.Detections, i: int) -> tuple[int, float, float | None]:
    """Return the class id, the confidence and the verify score, if any, of a labeled detection."""
    assert detections.class_id is not None and detections.confidence is not None
    verified = float(detections.data["verify_score"][i]) if "verify_score" in detections.data else None
    return int(detections.class_id[i]), float(detections.confidence[i]), verified


def track_both_ways(
    steps: Generator[tuple[FrameResult, sv.Detections]],
    tracker: Tracker,
    settings: TrackSettings,
    vocabulary: Vocabulary,
) -> Generator[FrameResult]:
    """Delay results by `backward_window` frames, and add objects to the frames before the one they start in.

    Args:
        steps: Results, each with the detections of the tracks that start there.
        tracker: Opens a session for each way back.
        settings: `backward_window`, and `merge_iou`: on the way back an object ends where it meets the mask of another
            track.
        vocabulary: Classes of the results.
    """
    buffer: deque[_BufferedFrame] = deque()
    with tempfile.TemporaryDirectory(prefix="grounded_sam-") as folder, closing(steps):
        for number, (result, started) in enumerate(steps):
            if len(started) and buffer:
                with convert_errors(tracker):
                    _track_back(buffer, result, started, tracker, settings)
            pixels = Path(folder) / f"{number}.npy"
            np.save(pixels, result.frame.image)
            empty = replace(result.frame, pixels=result.frame.image[:0])
            buffer.append(_BufferedFrame(empty, pixels, result.frame.size_hw, _objects(result.detections)))
            if len(buffer) > settings.backward_window:
                yield buffer.popleft().result(vocabulary)
        while buffer:
            yield buffer.popleft().result(vocabulary)


def _track_back(
    buffer: deque[_BufferedFrame],
    result: FrameResult,
    started: sv.Detections,
    tracker: Tracker,
    settings: TrackSettings,
) -> None:
    """Track objects from the frame they start in to earlier ones, and add them there."""
    assert started.tracker_id is not None
    labels = {int(tracker_id): _label(started, i) for i, tracker_id in enumerate(started.tracker_id)}
    missed = dict.fromkeys(labels, 0)  # frames in a row, of the objects that are still tracked
    session = tracker.open(result.frame.size_hw)
    try:
        session.step(result.frame.image)
        session.prompt(started)
        for earlier in reversed(buffer):
            if not missed:
                break
            seen = session.step(np.load(earlier.pixels))
            assert seen.tracker_id is not None and seen.mask is not None
            overlap = mask_iou(np.asarray(seen.mask, bool), earlier.masks()).max(1, initial=0.0)
            row_of = {int(tracker_id): i for i, tracker_id in enumerate(seen.tracker_id)}
            for tracker_id in list(missed):
                row = row_of.get(tracker_id)
                missed[tracker_id] = missed[tracker_id] + 1 if row is None else 0
                if missed[tracker_id] > MAX_MISSED or (row is not None and overlap[row] >= settings.merge_iou):
                    session.remove(tracker_id)
                    del missed[tracker_id]
                elif row is not None:
                    earlier.objects.append(_Object.from_row(seen, row, *labels[tracker_id]))
    finally:
        session.close()
