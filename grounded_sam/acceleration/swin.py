"""Window attention of Swin whose masks are made once, not in every forward pass; for GPUs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from grounded_sam.acceleration.patching import TrialInputs, max_relative_error, modules_of_class

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

#: Masks are stored with rows of a multiple of this, which the memory-efficient attention of PyTorch asks for.
ROW_MULTIPLE = 8


def keep_window_masks(backbone: Any) -> int:
    """Make the masks of Swin's shifted windows, with the relative position bias added, once for all images.

    Replaces `forward` of `SwinAttention` and `get_attn_mask` of `SwinLayer` (transformers), which build the mask of
    every window from its coordinates and expand it to all images. There are only four different ones: inside, in the
    last column, in the last row, and in the corner. The result is the same.

    Returns:
        Number of layers that were patched.
    """
    return sum(_patch_layer(layer) for layer in modules_of_class(backbone, "SwinLayer"))


def _patch_layer(layer: Any) -> bool:
    """Patch a layer if its output on a map of 2x3 windows, the last ones incomplete, stays the same."""
    import torch

    side = layer.window_size
    trial = TrialInputs(layer.layernorm_before.weight)
    height, width = 2 * side - 1, 3 * side - 1
    inputs = (trial.normal(2, height * width, layer.layernorm_before.weight.shape[0]), (height, width))
    masks = _WindowMasks(layer)
    with torch.no_grad():
        try:
            expected = layer(*inputs, always_partition=True)[0]
            layer.get_attn_mask, layer.attention.forward = masks.window_kinds, masks.attend
            error = max_relative_error([expected], [layer(*inputs, always_partition=True)[0]])
            failure = f"its error would be {error:.1e}"
        except Exception as exception:  # another version of the package may have changed the layer in any way
            error, failure = float("nan"), " ".join(str(exception).split())[:200]
    if error <= trial.tolerance:
        return True
    vars(layer).pop("get_attn_mask", None)
    vars(layer.attention).pop("forward", None)
    log.warning("keep_window_masks is not applied to %s: %s", type(layer).__name__, failure)
    return False


class _WindowMasks:
    """The methods that replace those of a layer of Swin, and the masks that they keep."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.attention = layer, layer.attention
        self._kinds: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[Any, Tensor] = {}

    def window_kinds(self, height: int, width: int, dtype: Any, device: torch.device) -> Tensor | None:
        """Replace `SwinLayer.get_attn_mask`: return for each window which of the four masks it has, `(windows,)`."""
        import torch

        if self.layer.shift_size <= 0:
            return None
        rows, columns = height // self.layer.window_size, width // self.layer.window_size
        if (rows, columns) not in self._kinds:
            kinds = torch.zeros(rows, columns, dtype=torch.long, device=device)
            kinds[-1] += 2
            kinds[:, -1] += 1
            self._kinds[rows, columns] = kinds.flatten()
        return self._kinds[rows, columns]

    def masks(self, dtype: Any) -> Tensor:
        """Return the relative position bias plus each of the four masks, `(4, heads, n, n)`, or the bias alone."""
        import torch

        if dtype not in self._masks:
            bias, side = self.attention.relative_position_bias().float(), self.layer.window_size
            shift = type(self.layer).get_attn_mask(self.layer, 2 * side, 2 * side, torch.float32, bias.device)
            masks = bias if shift is None else bias + shift[:, None]
            length = masks.shape[-1]
            stored = masks.new_zeros(*masks.shape[:-1], -(-length // ROW_MULTIPLE) * ROW_MULTIPLE, dtype=dtype)
            stored[..., :length] = masks
            self._masks[dtype] = stored
        return self._masks[dtype]

    def attend(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """Replace `SwinAttention.forward`.

        Args:
            hidden_states: Windows of all images, `(b * windows, n, c)`.
            attention_mask: What `window_kinds` returned.
            **_: Ignored.
        """
        from torch.nn.functional import scaled_dot_product_attention

        attention = self.attention
        n, size, width = hidden_states.shape
        q, k, v = (
            layer(hidden_states).view(n, size, -1, attention.head_dim).transpose(1, 2)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        masks = self.masks(q.dtype)
        if attention_mask is not None:  # windows become heads, so that all images share the masks
            masks = masks[attention_mask].flatten(0, 1)[None]
            q, k, v = (x.reshape(-1, masks.shape[1], size, attention.head_dim) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=masks[..., :size], scale=attention.scaling)
        out = out.view(n, -1, size, attention.head_dim).transpose(1, 2).reshape(n, size, width)
        return attention.o_proj(out), None
