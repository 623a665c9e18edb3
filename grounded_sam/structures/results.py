"""What comes out of the pipeline for one frame, and which files were skipped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import supervision as sv

from grounded_sam.errors import count_of
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import pack_masks, unpack_masks


class FrameResult:
    """A frame and its detections, computed now or stored by an earlier run.

    Masks are kept in the form they arrive in. The other form is made once, when `detections` or `packed` is
    first read: a sink that writes RLE never decodes masks, and one that draws never encodes them.

    Args:
        frame: The frame.
        detections: Its detections, with masks as arrays, as RLE (see `structures.masks.pack_masks`), or without.
        stored: Whether an earlier run into the same output, or an earlier job of the sweep, computed them.
        predicted: What the run found, where `detections` have what people decided or the frame another name.

    Attributes:
        frame: The frame.
        raw: The detections as given, with masks in either form, for readers that ignore masks.
        stored: As above.
        predicted: As above; None where it would be the same.

    >>> import numpy as np
    >>> frame = Frame(pixels=np.zeros((4, 6, 3), np.uint8))
    >>> len(FrameResult(frame=frame, detections=sv.Detections.empty()).detections)
    0
    """

    def __init__(
        self, *, frame: Frame, detections: sv.Detections, stored: bool = False, predicted: FrameResult | None = None
    ) -> None:
        self.frame, self.raw, self.stored, self.predicted = frame, detections, stored, predicted

    def __repr__(self) -> str:
        frame, count = self.frame, count_of(len(self.raw), "object")
        if frame.video is None and frame.time_s is None:
            return f"FrameResult({frame.name}: {count})"
        time = "" if frame.time_s is None else f", {frame.time_s:.2f} s"
        return f"FrameResult({frame.video or 'video'}, frame {frame.index}{time}: {count})"

    @cached_property
    def detections(self) -> sv.Detections:
        """Detections with `mask (n, H, W) bool`, or None where there are no masks."""
        return unpack_masks(self.raw, self.frame.size_hw)

    @cached_property
    def packed(self) -> sv.Detections:
        """Detections with masks as compressed COCO RLE, for sinks that write RLE, such as `coco` and `store`.

        `mask` is None. `data["rle"]` is `(n,) object`: dicts `{size: [H, W], counts: bytes}`, as pycocotools has them.
        Without masks there is no such column, nor in some frames without objects, so test `"rle" in data`. Everything
        else is as in `detections`, where detectors may add columns: `xyxy (n, 4) float32`,
        `confidence (n,) float32`, `class_id (n,) int64`, `tracker_id (n,) int64` or None, `data["class_name"] (n,) str`
        and, after segmentation, `data["mask_score"] (n,) float32`.
        """
        return pack_masks(self.raw)


@dataclass(frozen=True)
class Skipped:
    """A file that was skipped in whole or in part, or anything else that was asked for and not done.

    Attributes:
        file: Name relative to the input, with `/`; or that of a click or of a part of the split.
        reason: What was wrong with it, in one line.
    """

    file: str
    reason: str
