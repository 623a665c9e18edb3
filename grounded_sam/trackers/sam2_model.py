"""The video model of SAM 2 as functions of tensors, each for several objects at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from grounded_sam.acceleration.cuda_graphs import GraphedFunction
from grounded_sam.acceleration.sam2 import attend_to_memory
from grounded_sam.segmenters.sam2 import ImageFeatures

if TYPE_CHECKING:
    from torch import Tensor

#: Logits of the mask of an object that is absent, as in `sam2_base`.
ABSENT = -1024.0


class Memories(NamedTuple):
    """Memories of n objects with equal numbers of maps.

    Attributes:
        maps: Mask memory, `(n * m, D, h, w) bfloat16`, object by object.
        pointers: Object pointers, `(n, p, C)`; objects with fewer have zeros at the end.
        numbers: `(n, m + p) int64`: the index into the temporal encodings of each map, and the age in frames of each
            pointer. Where some objects have fewer pointers, a last column has the number of tokens of maps and
            pointers that each object has.
    """

    maps: Tensor
    pointers: Tensor
    numbers: Tensor


class Propagated(NamedTuple):
    """What the model finds of n objects in a frame.

    Attributes:
        logits: Mask logits `(n, 1, h, w)`, at the decoder's size; `ABSENT` everywhere for absent objects.
        raw_logits: The same as if all objects were present.
        iou: Predicted IoU of the mask, `(n,)`.
        presence: Logit of the object's presence, `(n, 1)`.
        pointers: Object pointers, `(n, C)`.
        maps: Mask memory, `(n, D, h, w) bfloat16`.
    """

    logits: Tensor
    raw_logits: Tensor
    iou: Tensor
    presence: Tensor
    pointers: Tensor
    maps: Tensor


class ObjectModel:
    """What SAM 2.1 computes for the objects of a video; equal to `SAM2Base.track_step`.

    No function reads values back to the CPU.

    Args:
        model: A `SAM2Base`.

    Attributes:
        propagate: `_propagate`, as a CUDA graph where that is possible.
        pointer_tokens: Number of tokens that a pointer is split into.
        map_tokens: Number of tokens of a map.
    """

    def __init__(self, model: Any) -> None:
        import torch

        self.model = model
        self.propagate = GraphedFunction(self._propagate, "the tracker of SAM 2")
        side = model.sam_image_embedding_size
        self.pointer_tokens, self.map_tokens = model.hidden_dim // model.mem_dim, side**2
        with torch.no_grad():
            blank = torch.empty(1, 1, side, side, device=model.device)
            positions = model.image_encoder.neck.position_encoding(blank)
            self._positions = positions.flatten(2).transpose(1, 2).contiguous()  # (1, hw, C)
            positions = model.memory_encoder.position_encoding(blank).flatten(2).transpose(1, 2)
            self._map_positions = positions + model.maskmem_tpos_enc[:, 0]  # (num_maskmem, hw, D)

    def _propagate(
        self, fine: Tensor, middle: Tensor, coarse: Tensor, maps: Tensor, pointers: Tensor, numbers: Tensor
    ) -> tuple[Tensor, ...]:
        """Find n objects in a frame; returns what `Propagated` holds.

        Args:
            fine: Feature map of the frame, `(1, C / 8, 4 h, 4 w)`.
            middle: Feature map, `(1, C / 4, 2 h, 2 w)`.
            coarse: Feature map, `(1, C, h, w)`.
            maps: See `Memories`.
            pointers: See `Memories`.
            numbers: See `Memories`.
        """
        features, multimask = (fine, middle, coarse), self.model._use_multimask(False, None)
        fused = self.attend(coarse, Memories(maps, pointers, numbers))
        logits, raw_logits, iou, presence, pointers = self.decode(features, fused, multimask)
        maps = self.remember(coarse, logits, presence, prompted=False)
        return logits, raw_logits, iou, presence, pointers, maps

    def attend(self, coarse: Tensor, memories: Memories) -> Tensor:
        """Fuse the coarse features of a frame with the memories of n objects, `(n, C, h, w)`."""
        import torch
        from sam2.modeling.sam2_utils import get_1d_sine_pe

        (n, num_pointers, width), model = memories.pointers.shape, self.model
        num_maps = len(memories.maps) // n
        indices, ages, lengths = memories.numbers.tensor_split([num_maps, num_maps + num_pointers], 1)
        bank = memories.maps.view(n, num_maps, model.mem_dim, -1).transpose(2, 3).flatten(1, 2)
        tokens = memories.pointers.reshape(n, -1, model.mem_dim)
        encoding = get_1d_sine_pe(ages / (model.max_obj_ptrs_in_encoder - 1), dim=width)
        times = model.obj_ptr_tpos_proj(encoding).repeat_interleave(self.pointer_tokens, 1)
        fused = attend_to_memory(
            model.memory_attention,
            coarse.flatten(2).transpose(1, 2),
            self._positions,
            torch.cat([bank, tokens], 1),
            torch.cat([self._map_positions[indices].flatten(1, 2), times], 1),
            num_pointers=tokens.shape[1],
            lengths=lengths[:, 0] if lengths.shape[1] else None,
        )
        return fused.transpose(1, 2).reshape(n, *coarse.shape[1:])

    def without_memory(self, coarse: Tensor, n: int) -> Tensor:
        """Return the coarse features of a frame for n objects that are new, `(n, C, h, w)`."""
        fused: Tensor = coarse + self.model.no_mem_embed.view(1, -1, 1, 1)
        return fused.expand(n, -1, -1, -1)

    def decode(
        self,
        features: ImageFeatures,
        fused: Tensor,
        multimask: bool,
        points: tuple[Tensor, Tensor] | None = None,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Decode masks of n objects, of several masks the one with the highest predicted IoU.

        Equals `SAM2Base._forward_sam_heads`.

        Args:
            features: Feature maps of the frame, `(1, C, h, w)`, from fine to coarse.
            fused: Coarse features for each object, `(n, C, h, w)`.
            multimask: Whether to decode three masks.
            points: Points `(n, p, 2)` in pixels of the model's input, and labels `(n, p)`.
            logits: Logits of masks to correct, `(n, 1, h, w)`.

        Returns:
            The first five attributes of `Propagated`.
        """
        import torch

        model, n = self.model, len(fused)
        if points is None:
            points = fused.new_zeros(n, 1, 2), fused.new_full((n, 1), -1, dtype=torch.int32)
        sparse, dense = model.sam_prompt_encoder(points=points, boxes=None, masks=logits)
        masks, ious, tokens, presence = model.sam_mask_decoder(
            image_embeddings=fused,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            repeat_image=False,
            high_res_features=[level.expand(n, -1, -1, -1) for level in features[:-1]],
        )
        best = ious.argmax(1, keepdim=True)
        raw = masks.take_along_dim(best[..., None, None], 1).float()
        token = tokens.take_along_dim(best[..., None], 1) if tokens.shape[1] > 1 else tokens
        present = (presence > 0).float()
        pointers = present * model.obj_ptr_proj(token[:, 0]) + (1 - present) * model.no_obj_ptr
        chosen = torch.where((presence > 0)[..., None, None], raw, ABSENT)
        return chosen, raw, ious.take_along_dim(best, 1)[:, 0], presence, pointers

    def use_masks(self, features: ImageFeatures, masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Take masks `(n, 1, side, side)` of zeros and ones as those of n objects; returns what `decode` does."""
        *fine, coarse = (level.expand(len(masks), -1, -1, -1) for level in features)
        logits, _, iou, _, _, pointers, presence = self.model._use_mask_as_output(coarse, fine, masks)
        return logits, logits, iou[:, 0], presence, pointers

    def remember(self, coarse: Tensor, logits: Tensor, presence: Tensor, prompted: bool) -> Tensor:
        """Encode the masks of n objects as memory, `(n, D, h, w) bfloat16`.

        Args:
            coarse: Coarse features of the frame, `(1, C, h, w)`.
            logits: Mask logits, `(n, 1, h, w)`.
            presence: Logits of presence, `(n, 1)`.
            prompted: Whether the masks were prompted; they are then thresholded.
        """
        import torch

        side = (self.model.image_size,) * 2
        large = torch.nn.functional.interpolate(logits, side, mode="bilinear", align_corners=False)
        flat = coarse.flatten(2).permute(2, 0, 1).expand(-1, len(logits), -1)
        maps, _ = self.model._encode_new_memory([flat], [coarse.shape[-2:]], large, presence, prompted)
        return maps.to(torch.bfloat16)  # type: ignore[no-any-return]


def join_memories(maps: Sequence[Sequence[Tensor]], pointers: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Batch the memories of objects, with zeros in place of pointers that some do not have.

    Args:
        maps: Maps `(1, D, h, w)` of each object, the same number of each.
        pointers: Pointers `(1, C)` of each object.

    Returns:
        Maps and pointers of `Memories`.

    >>> import torch
    >>> one = torch.ones(1, 2)
    >>> join_memories([[one], [one]], [[one, one], [one]])[1][:, :, 0].tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    """
    import torch

    most = max(len(own) for own in pointers)
    blank = torch.zeros_like(pointers[0][0]) if any(len(own) < most for own in pointers) else pointers[0][0]
    padded = [pointer for own in pointers for pointer in (*own, *[blank] * (most - len(own)))]
    joined = torch.cat(padded).view(len(pointers), most, -1)
    return torch.cat([item for own in maps for item in own]), joined
