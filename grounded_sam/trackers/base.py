"""Shared code of the trackers that use the memory of SAM 2's video models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.acceleration.patching import inference
from grounded_sam.acceleration.transfer import Download
from grounded_sam.segmenters.base import SharableSegmenter, upsample_masks
from grounded_sam.structures.detections import tracked_detections
from grounded_sam.trackers.options import TrackerOptions

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S", bound=SharableSegmenter)


def find_shared(segmenter: object, cls: type[S], identity: tuple[Hashable, ...]) -> S | None:
    """Return a segmenter if a tracker can share its model, or None.

    Args:
        segmenter: Segmenter of the pipeline.
        cls: Class that it must have.
        identity: Identity of the tracker's model; see `segmenters.options.model_identity`.
    """
    return segmenter if isinstance(segmenter, cls) and segmenter.identity == identity else None


class MemoryTracker:
    """Base of the trackers with memory.

    Args:
        options: What objects are prompted with, how many prompts are kept, and where the model runs.
        shared: Segmenter of the pipeline, if it has the same model; None otherwise.

    Attributes:
        options: As above.
        shared: As above.
        model: Video model, in evaluation mode; set by the subclass.
    """

    #: Dataclass of the options, which a subclass takes as keyword arguments.
    OPTIONS = TrackerOptions

    model: Any

    def __init__(self, options: TrackerOptions, shared: SharableSegmenter | None) -> None:
        self.options, self.shared = options, shared

    @classmethod
    def needs_masks(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether these settings take mask prompts only."""
        return settings.get("prompt") == "mask"


class MemorySession(ABC):
    """Base of the sessions of these trackers; see `structures.protocols.TrackSession` for the methods.

    Args:
        tracker: The tracker that opens the session.
        size_hw: Height and width of the frames in pixels.

    Attributes:
        model: Model of the tracker.
        options: Options of the tracker.
        size_hw: As above.
        frame: Number of the current frame; -1 before the first `step`.
        segmenter: Segmenter that reuses the image features of this session; None if the pipeline's segmenter has
            another model.
    """

    def __init__(self, tracker: MemoryTracker, size_hw: tuple[int, int]) -> None:
        self.model, self.options, self.size_hw = tracker.model, tracker.options, size_hw
        self.frame = -1
        self.segmenter = None if tracker.shared is None else tracker.shared.with_features(self.image_features)
        self._image: NDArray[np.uint8] | None = None  # of the current frame
        self._logits: dict[int, Tensor] = {}  # (1, 1, h, w), of objects propagated to or clicked on this frame, by id
        self._raw_logits: dict[int, Tensor] = {}  # the same, before the model overwrites absent objects

    @abstractmethod
    def image_features(self, image: NDArray[np.uint8]) -> Any:
        """Return the features of an image, encoding the current frame once."""

    def _start_frame(self, image: NDArray[np.uint8]) -> None:
        """Make an image the current frame.

        Raises:
            ValueError: If it does not have the size of the session.
        """
        if image.shape[:2] != self.size_hw:
            height, width = self.size_hw
            raise ValueError(f"expected a frame of {width}x{height} px, got {image.shape[1]}x{image.shape[0]} px")
        self.frame += 1
        self._image = image
        self._logits.clear()
        self._raw_logits.clear()

    def predict_lost(self, ids: Sequence[int]) -> sv.Detections:
        """Return the masks of lost or hidden tracks on the current frame, as if their objects were present.

        Args:
            ids: Ids of the objects; those without a mask are left out.
        """
        import torch

        known = [i for i in ids if i in self._raw_logits]
        masks = np.zeros((0, *self.size_hw), bool)
        if known:
            with inference():
                masks = self._to_masks(torch.cat([self._raw_logits[i] for i in known]))
        zeros = np.zeros(len(known))
        return tracked_detections(np.array(known, np.int64), masks, zeros, zeros)

    def _forget_object(self, tracker_id: int) -> None:
        """Drop the logits of an object."""
        self._logits.pop(tracker_id, None)
        self._raw_logits.pop(tracker_id, None)

    def close(self) -> None:
        """Release all resources."""
        self._logits.clear()
        self._raw_logits.clear()
        self._image = None

    def _to_masks(self, logits: Tensor) -> NDArray[np.bool_]:
        """Convert logits `(n, 1, h, w)` to masks of the frame's size, `(n, H, W) bool`."""
        download = Download()
        for masks in upsample_masks(logits[:, 0], self.size_hw):
            download.add(masks)
        return np.concatenate(download.wait())
