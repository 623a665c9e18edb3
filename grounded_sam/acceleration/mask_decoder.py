"""Levers on the mask decoder of SAM and SAM 2, of their authors' packages and of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grounded_sam.acceleration.patching import replace_forward

if TYPE_CHECKING:
    from torch import Tensor


def fold_tokens(model: Any) -> int:
    """Fold tokens into the projections of attention between them and the image; how many layers were changed.

    Per prompt, `TwoWayTransformer` projects 4096 places of the image from 256 to 128 dimensions and back, to multiply
    them with some nine tokens of a prompt. Folded into the projections, the tokens of h heads are a matrix of 256 by ht
    that the places are multiplied with as they are, as in `grounding_dino.fold_fusion`.
    """
    import torch

    count = 0
    for name, module in model.named_modules():
        role = name.rpartition(".")[2]
        asks = role in ("cross_attn_token_to_image", "final_attn_token_to_image")
        if not (asks or role == "cross_attn_image_to_token") or not hasattr(module, "q_proj"):
            continue
        like = module.q_proj.weight
        noise = torch.Generator(like.device).manual_seed(0)
        sizes = (3, 21, 21) if asks else (21, 3, 3)
        one = () if hasattr(module, "num_heads") else (1,)  # transformers has a dimension of prompts
        inputs = [
            torch.randn((2, *one, n, like.shape[1]), generator=noise, device=like.device, dtype=like.dtype)
            for n in sizes
        ]
        of_authors, of_transformers = (_ask, _ask_hf) if asks else (_answer, _answer_hf)
        tolerance = 1e-5 if like.dtype == torch.float32 else 2e-2
        forward = of_transformers if one else of_authors
        count += replace_forward(module, forward, inputs, tolerance, "fold_tokens")
    return count


def place_once(model: Any) -> int:
    """Add places to the image once in a layer of the mask decoder, not twice; how many layers were changed.

    With the sum of the image and the answer written over the answer, two in five of the largest writes are left out.
    """
    import torch

    count = 0
    for module in model.modules():
        if type(module).__name__ != "TwoWayAttentionBlock":
            continue
        like = module.norm1.weight
        noise = torch.Generator(like.device).manual_seed(0)
        inputs = [
            torch.randn((2, n, len(like)), generator=noise, device=like.device, dtype=like.dtype)
            for n in (3, 21, 3, 21)
        ]
        count += replace_forward(module, _block, inputs, 1e-5 if like.dtype == torch.float32 else 2e-2, "place_once")
    return count


def _block(self: Any, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
    """`TwoWayAttentionBlock.forward` of sam2 and segment_anything; see `place_once`."""
    if self.skip_first_layer_pe:
        queries = self.norm1(self.self_attn(q=queries, k=queries, v=queries))
    else:
        placed = queries + query_pe
        queries = self.norm1(queries + self.self_attn(q=placed, k=placed, v=queries))
    image = keys + key_pe
    queries = self.norm2(queries + self.cross_attn_token_to_image(q=queries + query_pe, k=image, v=keys))
    queries = self.norm3(queries + self.mlp(queries))
    answered = self.cross_attn_image_to_token(q=image, k=queries + query_pe, v=queries)
    return queries, self.norm4(answered.add_(keys))


def _pays(self: Any, tokens: int, heads: int) -> bool:
    """Whether the folded matrices are smaller than the projections."""
    return tokens * heads < self.q_proj.out_features  # type: ignore[no-any-return]


def _ask(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Attention.forward` of sam2 and segment_anything, from tokens to the image."""
    if not _pays(self, q.shape[1], self.num_heads):
        return type(self).forward(self, q, k, v)  # type: ignore[no-any-return]
    return self.out_proj(ask(self, q, k, v, self.num_heads))  # type: ignore[no-any-return]


def _answer(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Attention.forward` of sam2 and segment_anything, from the image to tokens."""
    if not _pays(self, k.shape[1], self.num_heads):
        return type(self).forward(self, q, k, v)  # type: ignore[no-any-return]
    return answer(self, q, k, v, self.num_heads, self.out_proj)


def _ask_hf(
    self: Any, query: Tensor, key: Tensor, value: Tensor, attention_similarity: Any = None, **told: Any
) -> tuple[Tensor, None]:
    """`Sam2VideoAttention.forward` of transformers and its kin, from tokens to the image."""
    if attention_similarity is not None or not _pays(self, query.shape[2], self.num_attention_heads):
        return type(self).forward(self, query, key, value, attention_similarity, **told)  # type: ignore[no-any-return]
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    out = ask(self, q, k, v, self.num_attention_heads)
    return _projection(self)(out.view(*query.shape[:3], -1)), None


def _answer_hf(
    self: Any, query: Tensor, key: Tensor, value: Tensor, attention_similarity: Any = None, **told: Any
) -> tuple[Tensor, None]:
    """`Sam2VideoAttention.forward` of transformers and its kin, from the image to tokens."""
    if attention_similarity is not None or not _pays(self, key.shape[2], self.num_attention_heads):
        return type(self).forward(self, query, key, value, attention_similarity, **told)  # type: ignore[no-any-return]
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    return answer(self, q, k, v, self.num_attention_heads, _projection(self)).view(query.shape), None


def _projection(self: Any) -> Any:
    return self.o_proj if hasattr(self, "o_proj") else self.out_proj


def ask(self: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention from few tokens to many places, before its last projection.

    Args:
        self: a module with `q_proj`, `k_proj` and `v_proj`.
        q: `(b, t, c)`.
        k: `(b, n, c)`.
        v: `(b, n, c)`.
        heads: of the attention.

    Returns:
        `(b, t, c')`.
    """
    import torch

    b, t, _ = q.shape
    asked = self.q_proj(q).view(b, t, heads, -1)
    size = asked.shape[-1]
    # The bias of keys adds the same for all places, which softmax does not see.
    rows = torch.einsum("bthd,hdc->bhtc", asked * size**-0.5, self.k_proj.weight.view(heads, size, -1))
    weights = torch.bmm(rows.reshape(b, heads * t, -1), k.transpose(1, 2)).softmax(-1)
    pooled = torch.bmm(weights, v).view(b, heads, t, -1)
    out = torch.einsum("bhtc,hdc->bthd", pooled, self.v_proj.weight.view(heads, size, -1))
    return out.reshape(b, t, -1) + self.v_proj.bias  # once, as weights sum to 1


def answer(self: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, projection: Any) -> Tensor:
    """Attention from many places to few tokens.

    Args:
        self: a module with `q_proj`, `k_proj` and `v_proj`.
        q: `(b, n, c)`.
        k: `(b, t, c)`.
        v: `(b, t, c)`.
        heads: of the attention.
        projection: its last.

    Returns:
        `(b, n, c)`.
    """
    import torch

    b, t, _ = k.shape
    keys, values = (project(x).view(b, t, heads, -1) for project, x in ((self.k_proj, k), (self.v_proj, v)))
    size = keys.shape[-1]
    keys = keys * size**-0.5
    rows = torch.einsum("bthd,hdc->bhtc", keys, self.q_proj.weight.view(heads, size, -1)).reshape(b, heads * t, -1)
    shift = torch.einsum("bthd,hd->bht", keys, self.q_proj.bias.view(heads, size)).reshape(b, heads * t, 1)
    logits = torch.baddbmm(shift, rows, q.transpose(1, 2)).view(b, heads, t, -1)
    weights = logits.softmax(2).view(b, heads * t, -1)
    give = torch.einsum("bthd,chd->bhtc", values, projection.weight.view(-1, heads, size)).reshape(b, heads * t, -1)
    return torch.baddbmm(projection.bias, weights.transpose(1, 2), give)
