"""Shared code of SAM-like segmenters: group prompts, decode them in chunks, clean and score masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.segmenters.feature_cache import FeatureCache, feature_key
from grounded_sam.segmenters.options import SegmenterOptions
from grounded_sam.structures.detections import with_masks
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.weights.loading import weights_digest

if TYPE_CHECKING:
    from torch import Tensor

#: Largest size in bytes of the logits of a chunk of masks at image size.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Prompts:
    """Prompts of the same kinds for n objects, in pixels of the image; None for kinds that are not given.

    Attributes:
        rows: `(n,)`, indices of the detections that they belong to.
        boxes: `(n, 4)`, xyxy.
        points: `(n, p, 2)`, xy.
        labels: `(n, p)`, 1 for points on the object, 0 for points on the background.
        masks: `(n, H, W) bool`.
        logits: `(n, h, w)`, mask logits of the previous round, as the decoder returned them.
    """

    rows: NDArray[np.int64]
    boxes: NDArray[np.float32] | None = None
    points: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None
    masks: NDArray[np.bool_] | None = None
    logits: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class DecodedMasks:
    """Output of a mask decoder for n prompts, k masks each.

    Attributes:
        masks: `(n, k, H, W) bool`, at image size.
        scores: `(n, k)`, predicted IoU.
        logits: `(n, k, h, w)`, at the decoder's size.
    """

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    logits: NDArray[np.float32]

    def best(self) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
        """Return the mask with the highest score for each prompt, with its score and its logits."""
        index = np.arange(len(self.scores)), self.scores.argmax(1)
        return self.masks[index], self.scores[index], self.logits[index]


def group_prompts(detections: sv.Detections, chunk: int) -> Iterator[Prompts]:
    """Split detections into chunks of prompts of the same kinds, with the same number of points.

    Without clicks, each detection is prompted with its box. Clicks are columns of `data`, as
    `structures.clicks.Clicks.to_detections` makes them: `points`, `labels` and `prompt_mask` (object arrays, None where
    not given) and `prompt_box` (bool). `prompt_logits` (object array) has logits of the mask that clicks correct.

    Args:
        detections: Detections of one image.
        chunk: Largest number of prompts in a chunk.

    Yields:
        Chunks that cover each detection once.

    >>> detections = sv.Detections(xyxy=np.array([[0.0, 0, 9, 9]] * 3))
    >>> [prompts.rows.tolist() for prompts in group_prompts(detections, chunk=2)]
    [[0, 1], [2]]
    """
    n, data = len(detections), detections.data
    missing = np.full(n, None, dtype=object)
    points, labels = data.get("points", missing), data.get("labels", missing)
    masks, logits = data.get("prompt_mask", missing), data.get("prompt_logits", missing)
    has_box = np.asarray(data.get("prompt_box", np.ones(n, bool)), bool)
    groups: dict[tuple[bool, int, bool, bool], list[int]] = {}
    for i in range(n):
        count = 0 if points[i] is None else len(points[i])
        kinds = (bool(has_box[i]), count, masks[i] is not None and logits[i] is None, logits[i] is not None)
        groups.setdefault(kinds, []).append(i)
    for (box, count, mask, has_logits), members in groups.items():
        for start in range(0, len(members), chunk):
            rows = np.array(members[start : start + chunk])
            yield Prompts(
                rows=rows,
                boxes=detections.xyxy[rows].astype(np.float32) if box else None,
                points=np.stack([points[i] for i in rows]).astype(np.float32) if count else None,
                labels=np.stack([labels[i] for i in rows]).astype(np.int64) if count else None,
                masks=np.stack([masks[i] for i in rows]) if mask else None,
                logits=np.stack([logits[i] for i in rows]) if has_logits else None,
            )


class PromptedSegmenter(ABC):
    """Base of SAM-like segmenters: encode an image once, decode prompts in chunks, keep the best mask of each.

    A subclass sets `model` and implements the abstract methods. It keeps the features of the current image as
    attributes of an object, such as the predictor of the authors' package; `segment_encoded` sets and resets them.

    Args:
        options: How prompts are decoded, and where and how the model runs.

    Attributes:
        options: As above.
        model: Model with weights, in evaluation mode.
    """

    #: Dataclass of the options, which a subclass takes as keyword arguments.
    OPTIONS = SegmenterOptions

    model: Any

    def __init__(self, options: SegmenterOptions) -> None:
        self.options = options
        self._cache: FeatureCache | None = None
        self._weights_digest: str | None = None

    @abstractmethod
    def _feature_attributes(self) -> tuple[Any, tuple[str, ...]]:
        """Return the object that holds the features of the current image, and the names of its attributes."""

    @abstractmethod
    def _set_image(self, image: NDArray[np.uint8]) -> None:
        """Encode an image `(H, W, 3) uint8`, which becomes the current one."""

    @abstractmethod
    def _reset_image(self) -> None:
        """Drop the features of the current image."""

    @abstractmethod
    def _decode(self, prompts: Prompts) -> DecodedMasks:
        """Decode prompts on the current image."""

    def use_feature_cache(self, cache: FeatureCache | None) -> None:
        """Read image features from a cache and write new ones to it; None for no cache."""
        self._cache = cache

    def encode_image(self, image: NDArray[np.uint8]) -> dict[str, Any]:
        """Compute the features of an image, or read them from the cache.

        Args:
            image: RGB, `(H, W, 3) uint8`.

        Returns:
            Features by name, for `segment_encoded`.
        """
        owner, names = self._feature_attributes()
        key = None if self._cache is None else self._feature_key(image)
        if self._cache is not None and key is not None:
            cached = self._cache.get(key, next(self.model.parameters()).device)
            if cached is not None:
                return cached  # type: ignore[no-any-return]
        self._set_image(image)
        try:
            features = {name: getattr(owner, name) for name in names}
        finally:
            self._reset_image()
        if self._cache is not None and key is not None:
            self._cache.put(key, features)
        return features

    def _feature_key(self, image: NDArray[np.uint8]) -> str:
        """Return the cache key of an image: a digest of its pixels, the class, precision, back end and weights."""
        if self._weights_digest is None:
            self._weights_digest = weights_digest(self.model.state_dict())
        settings = f"{self.options.precision} {self.options.backend}"
        return feature_key(image, f"{type(self).__name__} {settings} {self._weights_digest}")

    def segment(self, image: NDArray[np.uint8], detections: sv.Detections) -> sv.Detections:
        """Segment each detection; see `structures.protocols.Segmenter`.

        An object that is prompted by clicks without a box gets the box of its mask. Without detections the model does
        not run.
        """
        features = self.encode_image(image) if len(detections) else {}
        return self.segment_encoded((image.shape[0], image.shape[1]), detections, features)

    def segment_encoded(
        self, size_hw: tuple[int, int], detections: sv.Detections, features: Mapping[str, Any]
    ) -> sv.Detections:
        """Segment detections of an image that is already encoded.

        Args:
            size_hw: Height and width of the image.
            detections: Detections, or clicks as detections.
            features: Features that `encode_image` returned for the image.

        Returns:
            As many detections in the same order, with `mask (n, H, W) bool` and `data["mask_score"] (n,) float32`. If
            they have a column `prompt_logits`, it holds the logits of the new masks, each `(h, w) float32`.
        """
        n, (height, width) = len(detections), size_hw
        masks, scores = np.zeros((n, height, width), bool), np.zeros(n, np.float32)
        logits = np.full(n, None, dtype=object)
        if n:
            pixels = height * width * (1 if self.options.multimask is False else 3)
            chunk = max(1, min(self.options.chunk, CHUNK_BYTES // (4 * pixels)))
            owner, _ = self._feature_attributes()
            try:
                for name, value in features.items():
                    setattr(owner, name, value)
                for prompts in group_prompts(detections, chunk):
                    boxes = detections.xyxy[prompts.rows].astype(np.float32)
                    masks[prompts.rows], scores[prompts.rows], decoded = self._decode_rounds(prompts, boxes)
                    for row, value in zip(prompts.rows, decoded, strict=True):
                        logits[row] = value
            finally:
                self._reset_image()
        segmented = self._add_masks(detections, masks, scores)
        if "prompt_logits" in detections.data:
            segmented.data["prompt_logits"] = logits
        if "prompt_box" in detections.data:
            without_box = ~np.asarray(detections.data["prompt_box"], bool) & masks.any((1, 2))
            segmented.xyxy = np.where(without_box[:, None], masks_to_xyxy(masks), segmented.xyxy)
        return segmented

    def _add_masks(
        self, detections: sv.Detections, masks: NDArray[np.bool_], scores: NDArray[np.float32]
    ) -> sv.Detections:
        """Clean masks `(n, H, W) bool`, in place, and add them and their scores to detections."""
        if self.options.max_hole_area or self.options.min_region_area:
            for mask in masks:
                clean_mask(mask, self.options.max_hole_area, self.options.min_region_area)
        return with_masks(detections, masks, scores)

    def _wants_three_masks(self, prompts: Prompts) -> bool:
        """Return whether three masks are decoded for each of these prompts; see `SegmenterOptions.multimask`."""
        if self.options.multimask != "auto":
            return self.options.multimask
        is_click = prompts.points is not None and prompts.points.shape[1] == 1
        return is_click and prompts.boxes is None and prompts.masks is None and prompts.logits is None

    def _decode_rounds(
        self, prompts: Prompts, boxes: NDArray[np.float32]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
        """Decode prompts `rounds` times, each round prompted with the masks of the last.

        Returns:
            Masks, scores and logits of the last round.
        """
        has_box = prompts.boxes is not None
        masks, scores, logits = self._decode(prompts).best()
        for _ in range(self.options.rounds - 1):
            # Without a box of its own, a prompt whose mask is empty has no box for another round.
            if not has_box and not all(mask.any() for mask in masks):
                break
            prompts = prompts_from_masks(prompts, masks, logits, boxes)
            masks, scores, logits = self._decode(prompts).best()
        return masks, scores, logits


class SharableSegmenter(PromptedSegmenter):
    """Base of segmenters whose model and image features a tracker can share.

    Args:
        options: See `PromptedSegmenter`.
        identity: What a tracker compares to know whether it has the same model; see `options.model_identity`.

    Attributes:
        identity: As above.
    """

    def __init__(self, options: SegmenterOptions, identity: tuple[Hashable, ...]) -> None:
        super().__init__(options)
        self.identity = identity

    @abstractmethod
    def with_features(self, features: Callable[[NDArray[np.uint8]], Any]) -> SharableSegmenter:
        """Return a copy that takes image features from a tracker, which encodes every frame anyway.

        Args:
            features: Function from an image to its features, in the form in which the model returns them.
        """


def prompts_from_masks(
    prompts: Prompts, masks: NDArray[np.bool_], logits: NDArray[np.float32], xyxy: NDArray[np.float32]
) -> Prompts:
    """Make the prompts of another round: the clicks, and the boxes and logits of the masks.

    Args:
        prompts: Prompts of the previous round.
        masks: Its masks, `(n, H, W) bool`.
        logits: Their logits, `(n, h, w)`.
        xyxy: Boxes to use where a mask is empty, `(n, 4)`.
    """
    empty = np.array([not mask.any() for mask in masks])
    boxes = np.where(empty[:, None], xyxy, masks_to_xyxy(masks)).astype(np.float32)
    return replace(prompts, boxes=boxes, masks=None, logits=logits)


def clean_mask(mask: NDArray[np.bool_], max_hole_area: int, min_region_area: int) -> None:
    """Fill small holes and remove small regions of a mask `(H, W) bool`, in place (8-connected).

    Follows `remove_small_regions` in `segment_anything/utils/amg.py`: if all regions are small, the largest one stays.

    Args:
        mask: The mask.
        max_hole_area: Area in pixels below which holes are filled.
        min_region_area: Area in pixels below which regions are removed.

    >>> mask = np.ones((5, 5), bool)
    >>> mask[2, 2] = False
    >>> clean_mask(mask, 4, 0)
    >>> bool(mask.all())
    True
    """
    import cv2

    for is_region, limit in ((False, max_hole_area), (True, min_region_area)):
        if limit <= 0:
            continue
        count, regions, stats, _ = cv2.connectedComponentsWithStats((mask == is_region).astype(np.uint8), 8)
        areas = stats[1:, cv2.CC_STAT_AREA]
        small = np.flatnonzero(areas < limit) + 1
        if is_region and len(small) == count - 1 > 0:
            small = small[small != areas.argmax() + 1]
        if len(small):
            mask[np.isin(regions, small)] = not is_region


def upsample_masks(logits: Tensor, size_hw: tuple[int, int]) -> Iterator[Tensor]:
    """Convert mask logits to masks of an image, on their device.

    Args:
        logits: `(n, h, w)`, at the decoder's size.
        size_hw: Height and width of the image in pixels.

    Yields:
        Masks of successive logits, `(k, H, W) bool`, as many at once as fit into `CHUNK_BYTES`.

    >>> import torch
    >>> [masks.tolist() for masks in upsample_masks(torch.tensor([[[-1.0, 1.0]]]), (1, 4))]
    [[[[False, False, True, True]]]]
    """
    from torch.nn.functional import interpolate

    for part in logits.split(max(1, CHUNK_BYTES // (4 * size_hw[0] * size_hw[1]))):
        yield interpolate(part[:, None].float(), size_hw, mode="bilinear", align_corners=False)[:, 0] > 0


def prompts_per_call(prompts: Prompts) -> list[slice]:
    """Return the slices of prompts that a mask decoder of transformers can take in one call.

    It takes one dense embedding for all prompts. Mask prompts have one each, so they are decoded one by one.
    """
    if prompts.masks is None and prompts.logits is None:
        return [slice(None)]
    return [slice(i, i + 1) for i in range(len(prompts.rows))]


def masks_to_logits(
    masks: NDArray[np.bool_], resized_hw: tuple[int, int], padded_hw: tuple[int, int], side: int
) -> Any:
    """Convert masks to the logits that the prompt encoder of SAM and SAM-HQ takes.

    Args:
        masks: Masks, `(n, H, W) bool`.
        resized_hw: Height and width in pixels of the image as the model resizes it.
        padded_hw: Height and width in pixels of the padded image.
        side: Height and width of the result.

    Returns:
        A tensor `(n, 1, side, side) float32` with values from -10 to 10.
    """
    import torch

    padded = torch.zeros(len(masks), 1, *padded_hw)
    height, width = resized_hw
    values = torch.from_numpy(masks)[:, None].float()
    padded[..., :height, :width] = torch.nn.functional.interpolate(values, (height, width), mode="area")
    return torch.nn.functional.interpolate(padded, (side, side), mode="area") * 20 - 10
