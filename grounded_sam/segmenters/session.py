"""Segment any number of prompts on one image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.structures.clicks import Click, Clicks
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import PromptableSegmenter

#: Number of entries whose logits are kept.
MAX_LOGITS = 256


class SegmentSession:
    """Encode an image once and segment any number of prompts on it.

    >>> with model.session("cup.jpg") as session:                               # doctest: +SKIP
    ...     detections = session.segment([{"class": "cup", "points": [[320, 200]]}])
    ...     detections = session.segment([{"class": "cup", "points": [[320, 200], [300, 90]], "labels": [1, 0]}])

    Corrections work as in the demos of SAM and SAM 2: if an entry has the points of an earlier one and more, with the
    same class and box, the logits of that entry's mask are a prompt as well.

    Several sessions may be open on one model, on the same image or on others. Closing one frees its features.

    Args:
        segmenter: A segmenter that takes prompts, such as `sam2`.
        frame: The image.
    """

    def __init__(self, segmenter: PromptableSegmenter, frame: Frame) -> None:
        self.segmenter, self.frame = segmenter, frame
        self._features: dict[str, Any] | None = segmenter.encode_image(frame.image)
        self._logits: OrderedDict[tuple[Any, ...], NDArray[np.float32]] = OrderedDict()  # of the masks of entries

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
        detections = clicks.to_detections(entries, self.frame, clicks.vocabulary)
        detections.data["prompt_logits"] = previous = np.full(len(entries), None, dtype=object)
        for i, entry in enumerate(entries):
            previous[i] = self._corrected_logits(entry)
        segmented = self.segment_boxes(detections)
        for entry, logits in zip(entries, segmented.data.pop("prompt_logits"), strict=True):
            if entry.mask is None:
                self._logits[_entry_key(entry)] = logits
        while len(self._logits) > MAX_LOGITS:
            self._logits.popitem(last=False)
        return segmented

    @property
    def num_bytes(self) -> int:
        """Size of the features, and of the logits that corrections start from, in bytes."""
        return tensor_bytes(self._features) + sum(logits.nbytes for logits in self._logits.values())

    def _corrected_logits(self, entry: Click) -> NDArray[np.float32] | None:
        """Return the logits of the mask that an entry corrects; None if it is the first of its object."""
        if entry.points is None or entry.mask is not None:
            return None
        earlier = (self._logits.get(_entry_key(entry, count)) for count in reversed(range(len(entry.points))))
        return next((logits for logits in earlier if logits is not None), None)

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
        self._logits.clear()

    def __enter__(self) -> SegmentSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tensor_bytes(value: Any) -> int:
    """Return the size of all tensors and arrays in nested dicts and lists.

    >>> tensor_bytes({"a": [np.zeros(2, np.float32), None]})
    8
    """
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    return int(getattr(value, "nbytes", 0))


def _entry_key(entry: Click, count: int | None = None) -> tuple[Any, ...]:
    """Return what identifies an entry with its first `count` points: these, their labels, class and box."""
    box = None if entry.box is None else tuple(entry.box.tolist())
    points = [] if entry.points is None else entry.points[:count].tolist()
    labels = [] if entry.labels is None else entry.labels[:count].tolist()
    return entry.class_name, box, tuple(map(tuple, points)), tuple(labels)
