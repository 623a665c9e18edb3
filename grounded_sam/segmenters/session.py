"""What a segmenter makes of a picture before it is prompted, kept: in memory for a session, on disk for later runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import supervision as sv

from grounded_sam.structures.frame import Frame

if TYPE_CHECKING:
    from grounded_sam.segmenters.base import PromptedSegmenter


class SegmentSession:
    """One picture, encoded once, and any number of prompts on it.

    >>> with model.session("cup.jpg") as session:                               # doctest: +SKIP
    ...     found = session.segment([{"class": "cup", "points": [[320, 200]]}])
    ...     found = session.segment([{"class": "cup", "points": [[320, 200], [300, 90]], "labels": [1, 0]}])

    Several may be open on one model, of the same picture or of others. Closing one frees its features.

    Args:
        segmenter: `sam`, `sam2`, `sam2_hf`, `sam_hq` and their kin.
        frame: the picture.
    """

    def __init__(self, segmenter: PromptedSegmenter, frame: Frame) -> None:
        self.segmenter, self.frame = segmenter, frame
        self._features: Any = segmenter.encoded(frame.image)

    def segment(self, prompts: Sequence[Mapping[str, Any]]) -> sv.Detections:
        """Masks of objects that someone points at.

        Args:
            prompts: entries as `detectors.clicks.Clicks` has them.

        Returns:
            As many detections in the same order, with `mask` and `data["mask_score"]`.

        Raises:
            ConfigError: if an entry is wrong; ImageError: if one lies outside the picture; ValueError: after `close`.
        """
        from grounded_sam.detectors.clicks import ClickDetector

        clicks = ClickDetector(prompts)
        return self.cut(clicks.detect([self.frame], clicks.vocabulary)[0])

    def cut(self, found: sv.Detections) -> sv.Detections:
        """Masks of boxes that a detector found in the picture.

        Raises:
            ValueError: after `close`.
        """
        if self._features is None:
            raise ValueError("the session is closed")
        return self.segmenter.cut(self.frame.image.shape[:2], found, self._features)  # type: ignore[arg-type]

    def close(self) -> None:
        """Let go of the features."""
        self._features = None

    def __enter__(self) -> SegmentSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
