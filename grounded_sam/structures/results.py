"""What a stage has to be. An own class needs to import nothing from here: having the methods is enough."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import supervision as sv

from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import pack_masks, unpack_masks


class FrameResult:
    """A frame and what was found in it, now or, if `stored`, by an earlier run into the same output.

    Masks are kept as they came and turned into arrays or RLE once, when a sink first asks for `detections` or
    `packed`.

    Args:
        frame: the frame.
        found: what was found, with masks as arrays, packed (see `detections.packed`), or without.
        stored: whether an earlier run found it.

    Attributes:
        found: for who does not look at masks; others take one of the two below.
    """

    def __init__(self, frame: Frame, found: sv.Detections, stored: bool = False) -> None:
        self.frame, self.stored = frame, stored
        self.found = found

    @cached_property
    def detections(self) -> sv.Detections:
        """With masks as arrays, `(n, H, W) bool`."""
        return unpack_masks(self.found, self.frame.size_hw)

    @cached_property
    def packed(self) -> sv.Detections:
        """With masks as RLE in `data["rle"]`."""
        return pack_masks(self.found)


@dataclass(frozen=True)
class Skipped:
    """A file that could not be used, and why."""

    file: str
    reason: str
