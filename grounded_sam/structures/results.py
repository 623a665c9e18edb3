"""What comes out of the pipeline for one frame, and which files did not make it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import supervision as sv

from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import pack_masks, unpack_masks


class FrameResult:
    """A frame and its detections, computed now or stored by an earlier run.

    Masks are kept in the form they arrive in. The other form is made once, when `detections` or `packed` is
    first read: a sink that writes RLE never decodes masks, and one that draws never encodes them.

    Args:
        frame: The frame.
        detections: Its detections, with masks as arrays, as RLE (see `structures.masks.pack_masks`), or without.
        stored: Whether an earlier run into the same output computed them.

    Attributes:
        frame: The frame.
        raw: The detections as given, for readers that ignore masks.
        stored: As above.

    >>> import numpy as np
    >>> frame = Frame(pixels=np.zeros((4, 6, 3), np.uint8))
    >>> len(FrameResult(frame=frame, detections=sv.Detections.empty()).detections)
    0
    """

    def __init__(self, *, frame: Frame, detections: sv.Detections, stored: bool = False) -> None:
        self.frame, self.raw, self.stored = frame, detections, stored

    @cached_property
    def detections(self) -> sv.Detections:
        """Detections with `mask (n, H, W) bool`, or None where there are no masks."""
        return unpack_masks(self.raw, self.frame.size_hw)

    @cached_property
    def packed(self) -> sv.Detections:
        """Detections with masks as COCO RLE in `data["rle"]`, dicts of `size` and `counts`, and `mask` None."""
        return pack_masks(self.raw)


@dataclass(frozen=True)
class Skipped:
    """A file that could not be used.

    Attributes:
        file: Name relative to the input, with `/`.
        reason: What was wrong with it, in one line.
    """

    file: str
    reason: str
