"""Patches for the mask decoders of SAM and SAM 2: segment_anything, sam2 and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grounded_sam.acceleration.patching import TrialInputs, modules_of_class, patch_forward

if TYPE_CHECKING:
    from torch import Tensor


def fold_token_projections(model: Any) -> int:
    """Fold the tokens of a prompt into the projections of attention between tokens and image.

    Replaces the `forward` of `Attention` (segment_anything, sam2) and of `SamAttention`, `Sam2Attention` and the like
    (transformers) where `TwoWayTransformer` uses them between tokens and image. For every prompt these project 4096
    image positions from 256 to 128 dimensions and back, to multiply them with about nine tokens. Folded into the
    projections, the tokens of h heads are a matrix of 256 by h*t that is multiplied with the image features as they
    are, as in `grounding_dino.fold_text_projections`. The matrix products are the same in another order: equal up to
    rounding (1e-5 in float32).

    Returns:
        Number of layers that were patched.
    """
    count = 0
    for name, module in model.named_modules():
        role = name.rpartition(".")[2]
        from_tokens = role in ("cross_attn_token_to_image", "final_attn_token_to_image")
        if not (from_tokens or role == "cross_attn_image_to_token") or not hasattr(module, "q_proj"):
            continue
        weight = module.q_proj.weight
        trial, width = TrialInputs(weight), weight.shape[1]
        lengths = (3, 21, 21) if from_tokens else (21, 3, 3)
        in_transformers = not hasattr(module, "num_heads")  # there inputs have a dimension of prompts
        leading = (2, 1) if in_transformers else (2,)
        inputs = [trial.normal(*leading, length, width) for length in lengths]
        forward = (_transformers_forward if in_transformers else _authors_forward)(from_tokens)
        count += patch_forward(module, forward, inputs, trial.tolerance, "fold_token_projections")
    return count


def add_positions_once(model: Any) -> int:
    """Add positions to the image features once per layer of the mask decoder, instead of twice.

    Replaces `TwoWayAttentionBlock.forward` of segment_anything and sam2. The residual sum also
    overwrites the attention's output, so two of the five largest writes are saved. The result is the same.

    Returns:
        Number of layers that were patched.
    """
    count = 0
    for module in modules_of_class(model, "TwoWayAttentionBlock"):
        weight = module.norm1.weight
        trial = TrialInputs(weight)
        inputs = [trial.normal(2, length, len(weight)) for length in (3, 21, 3, 21)]
        count += patch_forward(module, _two_way_block_forward, inputs, trial.tolerance, "add_positions_once")
    return count


def _two_way_block_forward(
    self: Any, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
) -> tuple[Tensor, Tensor]:
    """Replace `TwoWayAttentionBlock.forward`; see `add_positions_once`."""
    if self.skip_first_layer_pe:
        queries = self.norm1(self.self_attn(q=queries, k=queries, v=queries))
    else:
        positioned = queries + query_pe
        queries = self.norm1(queries + self.self_attn(q=positioned, k=positioned, v=queries))
    image = keys + key_pe
    queries = self.norm2(queries + self.cross_attn_token_to_image(q=queries + query_pe, k=image, v=keys))
    queries = self.norm3(queries + self.mlp(queries))
    attended = self.cross_attn_image_to_token(q=image, k=queries + query_pe, v=queries)
    return queries, self.norm4(attended.add_(keys))


def _authors_forward(from_tokens: bool) -> Callable[..., Tensor]:
    """Return a replacement of `Attention.forward` of segment_anything and sam2, from tokens or from the image."""
    attend = token_to_image_attention if from_tokens else image_to_token_attention

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q if from_tokens else k
        if not _is_smaller_folded(self, tokens, self.num_heads):
            return type(self).forward(self, q, k, v)  # type: ignore[no-any-return]
        return attend(self, q, k, v, self.num_heads, self.out_proj)

    return forward


def _transformers_forward(from_tokens: bool) -> Callable[..., tuple[Tensor, None]]:
    """Return a replacement of `Sam2VideoAttention.forward` and its equivalents, from tokens or from the image."""
    attend = token_to_image_attention if from_tokens else image_to_token_attention

    def forward(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_similarity: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        tokens, heads = query if from_tokens else key, self.num_attention_heads
        if attention_similarity is not None or not _is_smaller_folded(self, tokens, heads):
            return type(self).forward(  # type: ignore[no-any-return]
                self, query, key, value, attention_similarity, **kwargs
            )
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        output_projection = self.o_proj if hasattr(self, "o_proj") else self.out_proj
        return attend(self, q, k, v, heads, output_projection).view(query.shape), None

    return forward


def _is_smaller_folded(self: Any, tokens: Tensor, heads: int) -> bool:
    """Return whether the folded matrices are smaller than the projections, for tokens `(..., t, c)`."""
    return tokens.shape[-2] * heads < self.q_proj.out_features  # type: ignore[no-any-return]


def token_to_image_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, output_projection: Any
) -> Tensor:
    """Compute attention from a few tokens to many image positions.

    Args:
        module: Module with the layers `q_proj`, `k_proj` and `v_proj`.
        q: Tokens, `(b, t, c)`.
        k: Image features with positions, `(b, n, c)`.
        v: Image features, `(b, n, c)`.
        heads: Number of heads.
        output_projection: Last linear layer.

    Returns:
        Tokens, `(b, t, c)`.
    """
    import torch

    b, t, _ = q.shape
    queries = module.q_proj(q).view(b, t, heads, -1)
    size = queries.shape[-1]
    # The bias of the keys adds the same number at all positions, which softmax cancels.
    folded = torch.einsum("bthd,hdc->bhtc", queries * size**-0.5, module.k_proj.weight.view(heads, size, -1))
    weights = torch.bmm(folded.reshape(b, heads * t, -1), k.transpose(1, 2)).softmax(-1)
    pooled = torch.bmm(weights, v).view(b, heads, t, -1)
    values = torch.einsum("bhtc,hdc->bthd", pooled, module.v_proj.weight.view(heads, size, -1))
    # Weights sum to 1, so the bias of the values is added once.
    return output_projection(values.reshape(b, t, -1) + module.v_proj.bias)  # type: ignore[no-any-return]


def image_to_token_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, output_projection: Any
) -> Tensor:
    """Compute attention from many image positions to a few tokens.

    Args:
        module: Module with the layers `q_proj`, `k_proj` and `v_proj`.
        q: Image features with positions, `(b, n, c)`.
        k: Tokens with positions, `(b, t, c)`.
        v: Tokens, `(b, t, c)`.
        heads: Number of heads.
        output_projection: Last linear layer.

    Returns:
        Image features, `(b, n, c)`.
    """
    import torch

    b, t, _ = k.shape
    keys, values = (projection(x).view(b, t, heads, -1) for projection, x in ((module.k_proj, k), (module.v_proj, v)))
    size = keys.shape[-1]
    keys = keys * size**-0.5
    folded = torch.einsum("bthd,hdc->bhtc", keys, module.q_proj.weight.view(heads, size, -1))
    bias = torch.einsum("bthd,hd->bht", keys, module.q_proj.bias.view(heads, size)).reshape(b, heads * t, 1)
    logits = torch.baddbmm(bias, folded.reshape(b, heads * t, -1), q.transpose(1, 2)).view(b, heads, t, -1)
    weights = logits.softmax(2).view(b, heads * t, -1)
    folded_values = torch.einsum("bthd,chd->bhtc", values, output_projection.weight.view(-1, heads, size))
    return torch.baddbmm(output_projection.bias, weights.transpose(1, 2), folded_values.reshape(b, heads * t, -1))
