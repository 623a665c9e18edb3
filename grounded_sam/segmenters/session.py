"""Segment any number of prompts on one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import supervision as sv

from grounded_sam.structures.clicks import Clicks
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import PromptableSegmenter


class SegmentSession:
    """Encode an image once and segment any number of prompts on it.

    >>> with model.session("cup.jpg") as session:                               # doctest: +SKIP
    ...     detections = session.segment([{"class": "cup", "points": [[320, 200]]}])
    ...     detections = session.segment([{"class": "cup", "points": [[320, 200], [300, 90]], "labels": [1, 0]}])

    Several sessions may be open on one model, on the same image or on others. Closing one frees its features.

    Args:
        segmenter: A segmenter that takes prompts, such as `sam2`.
        frame: The image.
    """

    def __init__(self, segmenter: PromptableSegmenter, frame: Frame) -> None:
        self.segmenter, self.frame = segmenter, frame
        self._features: dict[str, Any] | None = segmenter.encode_image(frame.image)

    def segment(self, prompts: Sequence[Mapping[str, Any]]) -> sv.Detections:
        """Segment the objects of some prompts.

        Args:
            prompts: Entries, as `structures.clicks.Clicks` takes them.

        Returns:
            As many detections in the same order, with `mask` and `data["mask_score"]`.

        Raises:
            ConfigError: If an entry is malformed.
            ImageError: If a prompt lies outside the image.
            ValueError: If the session is closed.
        """
        clicks = Clicks(prompts, "prompts")
        entries = clicks.for_image(self.frame)
        return self.segment_boxes(clicks.to_detections(entries, self.frame, clicks.vocabulary))

    def segment_boxes(self, detections: sv.Detections) -> sv.Detections:
        """Segment the boxes of detections in the image.

        Raises:
            ValueError: If the session is closed.
        """
        if self._features is None:
            raise ValueError("the session is closed")
        return self.segmenter.segment_encoded(self.frame.size_hw, detections, self._features)

    def close(self) -> None:
        """Free the features."""
        self._features = None

    def __enter__(self) -> SegmentSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
