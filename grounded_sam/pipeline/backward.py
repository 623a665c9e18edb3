"""Objects followed back to before the keyframe that found them, within a window of frames kept on disk."""

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

from grounded_sam.pipeline.tracks import TrackSettings
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import mask_iou, masks_to_xyxy
from grounded_sam.structures.protocols import Tracker
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: Frames out of sight after which an object is held to begin: short, since nothing confirms it back there.
PATIENCE = 3


@dataclass
class _Waiting:
    """A frame whose result may still grow: its pixels are in a file, its masks are RLE."""

    frame: Frame  # without pixels
    pixels: Path
    size_hw: tuple[int, int]
    rows: list[dict[str, Any]]  # id, class_id, confidence, mask_score, rle

    def result(self, vocabulary: Vocabulary) -> FrameResult:
        """The result, decoded; the file is removed."""
        from pycocotools import mask as coco_mask

        frame = replace(self.frame, pixels=np.load(self.pixels))
        self.pixels.unlink()
        masks = np.array([coco_mask.decode(row["rle"]) for row in self.rows], bool).reshape(-1, *self.size_hw)
        classes = np.array([row["class_id"] for row in self.rows], np.int64)
        found = sv.Detections(
            xyxy=masks_to_xyxy(masks),
            mask=masks,
            confidence=np.array([row["confidence"] for row in self.rows], np.float32),
            class_id=classes,
            tracker_id=np.array([row["id"] for row in self.rows], np.int64),
            data={
                "class_name": np.array(vocabulary.classes, dtype=str)[classes],
                "mask_score": np.array([row["mask_score"] for row in self.rows], np.float32),
            },
        )
        return FrameResult(frame, found)


def _rows(found: sv.Detections) -> list[dict[str, Any]]:
    from pycocotools import mask as coco_mask

    assert found.mask is not None and found.class_id is not None
    assert found.confidence is not None and found.tracker_id is not None
    return [
        {
            "id": int(found.tracker_id[i]),
            "class_id": int(found.class_id[i]),
            "confidence": float(found.confidence[i]),
            "mask_score": float(found.data["mask_score"][i]),
            "rle": coco_mask.encode(np.asfortranarray(found.mask[i], dtype=np.uint8)),
        }
        for i in range(len(found))
    ]


def track_both_ways(
    steps: Generator[tuple[FrameResult, sv.Detections]],
    tracker: Tracker,
    rules: TrackSettings,
    vocabulary: Vocabulary,
) -> Generator[FrameResult]:
    """Results `rules.backward_window` frames late, with objects also before the frame they begin in.

    Args:
        steps: results, each with the objects that begin in it.
        tracker: opens a session of its own for every way back.
        rules: `backward_window` and `merge_iou`: on the way back an object ends where it meets a mask
            that another track has already.
        vocabulary: of the results.
    """
    waiting: deque[_Waiting] = deque()
    with tempfile.TemporaryDirectory(prefix="grounded_sam-") as folder, closing(steps):
        for number, (result, begun) in enumerate(steps):
            if len(begun) and waiting:
                _go_back(waiting, result, begun, tracker, rules)
            pixels = Path(folder) / f"{number}.npy"
            np.save(pixels, result.frame.image)
            empty = replace(result.frame, pixels=result.frame.image[:0])
            waiting.append(_Waiting(empty, pixels, result.frame.size_hw, _rows(result.detections)))
            if len(waiting) > rules.backward_window:
                yield waiting.popleft().result(vocabulary)
        while waiting:
            yield waiting.popleft().result(vocabulary)


def _go_back(
    waiting: deque[_Waiting], result: FrameResult, begun: sv.Detections, tracker: Tracker, rules: TrackSettings
) -> None:
    """Follow objects from the frame they begin in to earlier ones, and add them there."""
    from pycocotools import mask as coco_mask

    assert begun.tracker_id is not None and begun.class_id is not None and begun.confidence is not None
    about = {
        int(i): (int(c), float(s)) for i, c, s in zip(begun.tracker_id, begun.class_id, begun.confidence, strict=True)
    }
    missed = dict.fromkeys(about, 0)
    session = tracker.open(result.frame.size_hw)
    try:
        session.step(result.frame.image)
        session.prompt(begun)
        for earlier in reversed(waiting):
            if not missed:
                break
            seen = session.step(np.load(earlier.pixels))
            assert seen.tracker_id is not None and seen.mask is not None
            taken = np.array([coco_mask.decode(row["rle"]) for row in earlier.rows], bool)
            overlap = mask_iou(np.asarray(seen.mask, bool), taken).max(1, initial=0.0)
            here = {int(tracker_id): i for i, tracker_id in enumerate(seen.tracker_id)}
            for tracker_id in list(missed):
                row = here.get(tracker_id)
                missed[tracker_id] = missed[tracker_id] + 1 if row is None else 0
                if missed[tracker_id] > PATIENCE or (row is not None and overlap[row] >= rules.merge_iou):
                    session.remove(tracker_id)
                    del missed[tracker_id]
                elif row is not None:
                    class_id, confidence = about[tracker_id]
                    earlier.rows.append(
                        {
                            "id": tracker_id,
                            "class_id": class_id,
                            "confidence": confidence,
                            "mask_score": float(seen.data["mask_score"][row]),
                            "rle": coco_mask.encode(np.asfortranarray(seen.mask[row], dtype=np.uint8)),
                        }
                    )
    finally:
        session.close()
