"""Manual prompts in place of a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import supervision as sv

from grounded_sam.structures.clicks import Clicks
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import DetectorTraits
from grounded_sam.structures.vocabulary import Vocabulary


class ClickDetector:
    """Turn points, boxes and masks that a person drew into prompts for a segmenter.

    Args:
        prompts: Entries, or the path of a JSON file of them; see `structures.clicks.Clicks`.

    Attributes:
        clicks: The prompts.
        vocabulary: Their classes.

    Raises:
        ConfigError: If there are no entries, the file cannot be read, or an entry is malformed.

    >>> import numpy as np
    >>> detector = ClickDetector([{"class": "cup", "points": [[3, 4]]}])
    >>> frame = Frame(pixels=np.zeros((10, 10, 3), np.uint8))
    >>> detector.detect([frame], detector.vocabulary)[0].xyxy.tolist()
    [[3.0, 4.0, 4.0, 5.0]]
    """

    def __init__(self, prompts: str | Sequence[Mapping[str, Any]] | None) -> None:
        self.clicks = Clicks(prompts, "detector.prompts")
        self.vocabulary = self.clicks.vocabulary

    @classmethod
    def traits(cls, settings: Mapping[str, Any]) -> DetectorTraits:
        """Declare that tracks can start from the prompts without masks."""
        return DetectorTraits(clicks=True)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the prompts of each frame with confidence 1; see `Clicks.to_detections`.

        Raises:
            ImageError: If a prompt lies outside its frame, or a mask has another size.
        """
        return [self.clicks.to_detections(self.clicks.for_image(frame), frame, vocabulary) for frame in frames]
