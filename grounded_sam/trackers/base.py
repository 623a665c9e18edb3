"""Shared code of the trackers that use the memory of SAM 2's video models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.segmenters.base import SharableSegmenter
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
        mask_decoder: Module of its model that decodes masks.
        size_hw: Height and width of the frames in pixels.

    Attributes:
        model: Model of the tracker.
        options: Options of the tracker.
        size_hw: As above.
        frame: Number of the current frame; -1 before the first `step`.
        segmenter: Segmenter that reuses the image features of this session; None if the pipeline's segmenter has
            another model.
    """

    def __init__(self, tracker: MemoryTracker, mask_decoder: Any, size_hw: tuple[int, int]) -> None:
        self.model, self.options, self.size_hw = tracker.model, tracker.options, size_hw
        self.frame = -1
        self.segmenter = None if tracker.shared is None else tracker.shared.with_features(self.image_features)
        self._image: NDArray[np.uint8] | None = None  # of the current frame
        self._logits: dict[int, Tensor] = {}  # (1, 1, h, w), of objects propagated to or clicked on this frame, by id
        self._raw_logits: dict[int, Tensor] = {}  # the same, before the model overwrites absent objects
        self._decoder_output: Any = None
        self._hook = mask_decoder.register_forward_hook(self._keep_decoder_output)

    @abstractmethod
    def image_features(self, image: NDArray[np.uint8]) -> Any:
        """Return the features of an image, encoding the current frame once."""

    def _keep_decoder_output(self, _module: Any, _inputs: Any, output: Any) -> None:
        """Keep the mask logits, which the model overwrites for objects that it predicts to be absent."""
        self._decoder_output = output

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
        known = [i for i in ids if i in self._raw_logits]
        masks = np.zeros((len(known), *self.size_hw), bool)
        for mask, tracker_id in zip(masks, known, strict=True):
            mask[:] = self._to_masks(self._raw_logits[tracker_id])[0]
        zeros = np.zeros(len(known))
        return tracked_detections(np.array(known, np.int64), masks, zeros, zeros)

    def _forget_object(self, tracker_id: int) -> None:
        """Drop the logits of an object."""
        self._logits.pop(tracker_id, None)
        self._raw_logits.pop(tracker_id, None)

    def close(self) -> None:
        """Release all resources."""
        self._hook.remove()
        self._logits.clear()
        self._raw_logits.clear()
        self._image = self._decoder_output = None

    def _to_masks(self, logits: Tensor) -> NDArray[np.bool_]:
        """Convert logits `(n, 1, h, w)` to masks of the frame's size, `(n, H, W) bool`."""
        import torch

        resized = torch.nn.functional.interpolate(logits, self.size_hw, mode="bilinear", align_corners=False)
        return (resized[:, 0] > 0).cpu().numpy()  # type: ignore[no-any-return]
