"""What SAM and SAM 2 have in common: prompts read from detections, decoded in chunks, cleaned, scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.segmenters.feature_cache import FeatureCache, feature_key
from grounded_sam.structures.detections import with_masks
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.weights.loading import weights_digest

#: Bytes that the logits of one chunk of masks may take at image size.
CHUNK_BYTES = 256 * 2**20


#: Masks, predicted IoU, logits.
Decoded = tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Prompts:
    """Prompts of like shape for n objects, in pixels of the image; None where none was given."""

    rows: NDArray[np.int64]  # (n,) which detections
    boxes: NDArray[np.float32] | None  # (n, 4)
    points: NDArray[np.float32] | None  # (n, p, 2)
    labels: NDArray[np.int64] | None  # (n, p) 1 on the object, 0 beside it
    masks: NDArray[np.bool_] | None  # (n, H, W)
    logits: NDArray[np.float32] | None = None  # (n, h, w), of an earlier round, as the model's decoder gave them


def group_prompts(found: sv.Detections, chunk: int) -> Iterator[Prompts]:
    """Split detections into chunks of like prompts.

    Without clicks every detection is prompted with its box. Clicks come as columns that the `clicks`
    detector makes: `data["points"]`, `data["labels"]`, `data["prompt_mask"]` (objects, None where
    not given) and `data["prompt_box"]` (bool).
    """
    n = len(found)
    nothing = np.full(n, None, dtype=object)
    points, labels = found.data.get("points", nothing), found.data.get("labels", nothing)
    masks = found.data.get("prompt_mask", nothing)
    with_box = np.asarray(found.data.get("prompt_box", np.ones(n, bool)), bool)
    groups: dict[tuple[bool, int, bool], list[int]] = {}
    for i in range(n):
        count = 0 if points[i] is None else len(points[i])
        groups.setdefault((bool(with_box[i]), count, masks[i] is not None), []).append(i)
    for (box, count, mask), members in groups.items():
        for start in range(0, len(members), chunk):
            rows = np.array(members[start : start + chunk])
            yield Prompts(
                rows=rows,
                boxes=found.xyxy[rows].astype(np.float32) if box else None,
                points=np.stack([points[i] for i in rows]).astype(np.float32) if count else None,
                labels=np.stack([labels[i] for i in rows]).astype(np.int64) if count else None,
                masks=np.stack([masks[i] for i in rows]) if mask else None,
            )


class PromptedSegmenter:
    """How SAM and SAM 2 segment: encode the image once, decode the prompts in chunks, keep the best masks.

    A subclass has a `model` and says how its predictor encodes, decodes and forgets, and where it keeps features.

    Args:
        multimask: decode three masks per prompt and keep the best; pays for single clicks.
        chunk: prompts decoded at once; fewer if their masks at image size exceed `CHUNK_BYTES`.
        fill_holes: pixels of the largest hole in a mask to fill; 0 fills none.
        drop_specks: pixels of the largest separate speck to drop; 0 drops none.
        rounds: how often each prompt is decoded; from the second time on with the box and the logits of the mask of the
            round before (and its clicks).
    """

    model: Any
    precision, backend = "exact", "torch"

    def __init__(self, multimask: bool, chunk: int, fill_holes: int, drop_specks: int, rounds: int) -> None:
        numbers = (("chunk", chunk, 1), ("fill_holes", fill_holes, 0), ("drop_specks", drop_specks, 0))
        for key, value, least in (*numbers, ("rounds", rounds, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"segmenter.{key} must be a whole number from {least}, got {value!r}")
        self.multimask, self.chunk = multimask, chunk
        self.fill_holes, self.drop_specks, self.rounds = fill_holes, drop_specks, rounds
        #: Where features of pictures are kept for later runs; see `embeddings`.
        self.embeddings: FeatureCache | None = None
        self._weights: str | None = None

    def _state(self) -> tuple[Any, tuple[str, ...]]:
        """The object that holds what `_encode` makes, and under which names."""
        raise TypeError("a segmenter has to say where the features of an image are")

    def _encode(self, image: NDArray[np.uint8]) -> None:
        raise TypeError("a segmenter has to say how it encodes an image")

    def _decode(self, prompts: Prompts) -> Decoded:
        """A chunk of n prompts to masks `(n, k, H, W) bool`, predicted IoU `(n, k)` and logits `(n, k, h, w)`."""
        raise TypeError("a segmenter has to say how it decodes prompts")

    def _forget(self) -> None:
        raise TypeError("a segmenter has to say how it lets go of an image")

    def encoded(self, image: NDArray[np.uint8]) -> dict[str, Any]:
        """What the model makes of an image before it is prompted, for `cut`; from `embeddings` if it is there."""
        holder, names = self._state()
        key = None
        if self.embeddings is not None:
            if self._weights is None:
                self._weights = weights_digest(self.model.state_dict())
            key = feature_key(image, f"{type(self).__name__} {self.precision} {self.backend} {self._weights}")
            known = self.embeddings.get(key, next(self.model.parameters()).device)
            if known is not None:
                return known  # type: ignore[no-any-return]
        self._encode(image)
        try:
            features = {name: getattr(holder, name) for name in names}
        finally:
            self._forget()
        if self.embeddings is not None and key is not None:
            self.embeddings.put(key, features)
        return features

    def segment(self, image: NDArray[np.uint8], detections: sv.Detections) -> sv.Detections:
        """Fill in `mask (n, H, W) bool` and `data["mask_score"] (n,)`; same number, same order.

        Clicked objects without a box get that of their mask. Nothing runs if there are no detections.
        """
        features = self.encoded(image) if len(detections) else {}
        return self.cut((image.shape[0], image.shape[1]), detections, features)

    def cut(self, size_hw: tuple[int, int], detections: sv.Detections, features: Mapping[str, Any]) -> sv.Detections:
        """`segment` on an image of a size that is encoded already; see `encoded`."""
        n, (height, width) = len(detections), size_hw
        masks = np.zeros((n, height, width), bool)
        scores = np.zeros(n, np.float32)
        if n:
            boxes = detections.xyxy.astype(np.float32)
            pixels = height * width * (3 if self.multimask else 1)
            holder, _ = self._state()
            try:
                for name, value in features.items():
                    setattr(holder, name, value)
                for given in group_prompts(detections, max(1, min(self.chunk, CHUNK_BYTES // (4 * pixels)))):
                    prompts = given
                    for turn in range(self.rounds):
                        several, predicted, logits = self._decode(prompts)
                        best = np.arange(len(predicted)), predicted.argmax(1)
                        masks[prompts.rows] = several[best]
                        scores[prompts.rows] = predicted[best]
                        if turn + 1 < self.rounds:
                            # Of clicks without a mask there is no box to prompt with; such a chunk ends here.
                            if given.boxes is None and not all(mask.any() for mask in several[best]):
                                break
                            prompts = refine_prompts(prompts, several[best], logits[best], boxes[prompts.rows])
            finally:
                self._forget()
        for mask in masks if self.fill_holes or self.drop_specks else ():
            clean_mask(mask, self.fill_holes, self.drop_specks)
        out = with_masks(detections, masks, scores)
        if "prompt_box" in detections.data:
            loose = ~np.asarray(detections.data["prompt_box"], bool) & masks.any((1, 2))
            out.xyxy = np.where(loose[:, None], masks_to_xyxy(masks), out.xyxy)
        return out


def refine_prompts(
    prompts: Prompts, masks: NDArray[np.bool_], logits: NDArray[np.float32], xyxy: NDArray[np.float32]
) -> Prompts:
    """The prompts of another round: the boxes of the masks (where one is empty, `xyxy`) and their logits."""
    empty = [not mask.any() for mask in masks]
    boxes = np.where(np.array(empty)[:, None], xyxy, masks_to_xyxy(masks)).astype(np.float32)
    return replace(prompts, boxes=boxes, masks=None, logits=logits)


def clean_mask(mask: NDArray[np.bool_], fill_holes: int, drop_specks: int) -> None:
    """Fill holes and drop specks of a mask `(H, W) bool` in place, by area in pixels (8-connected).

    As `remove_small_regions` of SAM's `amg.py`: if all pieces are specks, the largest stays.
    """
    import cv2

    for on, limit in ((False, fill_holes), (True, drop_specks)):
        if limit <= 0:
            continue
        count, regions, stats, _ = cv2.connectedComponentsWithStats((mask == on).astype(np.uint8), 8)
        sizes = stats[1:, cv2.CC_STAT_AREA]
        small = np.flatnonzero(sizes < limit) + 1
        if on and len(small) == count - 1 > 0:
            small = small[small != sizes.argmax() + 1]
        if len(small):
            mask[np.isin(regions, small)] = not on
