"""Levers on SAM 2, of its authors' package and of transformers, and on SAM 3's tracker."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from grounded_sam.acceleration.backends import BackendSettings, convert
from grounded_sam.acceleration.mask_decoder import fold_tokens, place_once
from grounded_sam.acceleration.patching import (
    Precision,
    compiled,
    half,
    half_feed_forwards,
    has_bfloat16,
    piece_feed_forwards,
    replace_forward,
)

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

#: Queries and keys that are multiplied at once in 32 bits, and queries in bfloat16: their products stay in the cache.
QUERIES, KEYS, LOW_QUERIES = 1024, 512, 256


def speed_up_encoder(model: Any, precision: Precision, compile_: bool, where: BackendSettings) -> None:
    """Pull the levers of a precision on image encoder and mask decoder of `Sam`, `SAM2Base` or transformers' models."""
    encoder = model.image_encoder if hasattr(model, "image_encoder") else model.vision_encoder
    keep_positions(encoder)
    if next(model.parameters()).device.type == "cpu":
        fold_tokens(model)
        place_once(model)
    if where.backend != "torch":
        backbone = getattr(encoder, "trunk", getattr(encoder, "backbone", encoder))  # SAM's is all one
        convert(backbone, where, precision)
        if compile_:
            log.warning("compile=true leaves the segmenter alone: %s runs its image encoder", where.backend)
        return
    if next(model.parameters()).device.type == "cpu":
        piece_feed_forwards(encoder)
    if precision != "exact" and _bfloat16(model, precision):
        if precision == "fast":
            half_attention(encoder)
        half_encoder(encoder)
    if compile_:
        compiled(encoder, "the image encoder of the segmenter", dynamic=False)


def speed_up_memory(model: Any, precision: Precision) -> None:
    """Pull the levers of a precision on the memory attention of the same."""
    device = next(model.parameters()).device
    if precision == "fast" and _bfloat16(model, precision):
        half_memory(model)
    elif device.type == "cpu":
        narrow_values(model)


def _bfloat16(model: Any, precision: str) -> bool:
    like = next(model.parameters())
    if not has_bfloat16(like.device):
        log.warning("precision=%s is exact here: %s does not multiply in bfloat16", precision, like.device)
        return False
    return like.dtype.itemsize == 4


def half_encoder(encoder: Any) -> None:
    """Linear layers of the image encoder in bfloat16; attention between them, norms and sums in 32 bits."""
    import torch
    from torch import nn

    half_feed_forwards(encoder)
    for module in encoder.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32:
            half(module)


def half_attention(encoder: Any) -> int:
    """Attention of Hiera in bfloat16, from its queries to its outcome, scores too; how many layers were changed.

    PyTorch's attention on the CPU is as fast in bfloat16 as it is in 32 bits; products of matrices are twice as fast.
    """
    import torch

    count = 0
    for module in encoder.modules():
        if type(module).__name__ in ("MultiScaleAttention", "Sam2MultiScaleAttention"):
            half(module.qkv, torch.bfloat16)
            half(module.proj, torch.float32)
            if module.qkv.weight.device.type == "cpu":
                noise = torch.Generator().manual_seed(0)
                x = torch.randn((1, 36, 32, module.dim), generator=noise)  # more than one block, also if it pools
                count += replace_forward(module, _hiera_attention, (x,), 3e-2, "half_attention")
    return count


def _hiera_attention(self: Any, hidden_states: Tensor, **_: Any) -> Tensor:
    """`MultiScaleAttention.forward` of sam2 or transformers' of SAM 2; see `half_attention`."""
    import sys

    import torch

    b, h, w, _channels = hidden_states.shape
    heads = self.num_heads if hasattr(self, "num_heads") else self.num_attention_heads
    pool = self.q_pool if hasattr(self, "q_pool") else self.query_stride
    q, k, v = self.qkv(hidden_states).view(b, h * w, 3, heads, -1).unbind(2)
    if pool:
        q = sys.modules[type(self).__module__].do_pool(q.reshape(b, h, w, -1), pool)
        h, w = q.shape[1:3]
        q = q.reshape(b, h * w, heads, -1)
    q, k, v = ((t.transpose(1, 2)) for t in (q, k, v))
    if q.shape[2] <= LOW_QUERIES:  # windows
        out = torch.matmul(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(-1), v)
    else:
        out = torch.stack([attend_low(q[:, head], k[:, head], v[:, head]) for head in range(heads)], 1)
    return self.proj(out.transpose(1, 2).reshape(b, h, w, -1))  # type: ignore[no-any-return]


def keep_positions(encoder: Any) -> int:
    """Compute Hiera's embedding of places once per size, instead of for every picture; how many encoders do."""
    import torch

    count = 0
    for module in encoder.modules():
        if type(module).__name__ not in ("Hiera", "Sam2HieraDetModel") or not hasattr(module, "_get_pos_embed"):
            continue
        kept: dict[Any, Tensor] = {}

        def once(hw: Any, _module: Any = module, _plain: Any = module._get_pos_embed, _kept: Any = kept) -> Tensor:
            key = (int(hw[0]), int(hw[1]), _module.pos_embed.device, _module.pos_embed.dtype)
            if key not in _kept:
                _kept.clear()
                with torch.no_grad():
                    _kept[key] = _plain((key[0], key[1])).contiguous()
            return _kept[key]  # type: ignore[no-any-return]

        module._get_pos_embed = once
        count += 1
    return count


def memory_attentions(model: Any, own: bool = False) -> list[Any]:
    """The modules that look from a frame into memory, whose keys and values are narrower than they are.

    Args:
        model: a `SAM2Base`, or a video model of transformers.
        own: also those that look from the frame at itself.
    """
    names = ("RoPEAttention", "Sam2VideoRoPEAttention", "Sam3TrackerVideoRoPEAttention")
    found = [module for module in model.memory_attention.modules() if type(module).__name__ in names]
    return [m for m in found if own or m.kv_in_dim < m.internal_dim]


def narrow_values(model: Any) -> int:
    """Sum memories before they are projected to values; how many layers were changed.

    Weights of attention sum to 1, so that the values' projection, from 64 to 256 dimensions, may follow the sum: a
    quarter of the products, and no projection of every memory.
    """
    return sum(_swap(module, False) for module in memory_attentions(model))


def half_memory(model: Any) -> int:
    """Memory attention in bfloat16, sums and norms in 32 bits; how many attentions were changed."""
    from torch import nn

    count = sum(_swap(module, True) for module in memory_attentions(model, own=True))
    for module in model.memory_attention.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype.itemsize == 4:
            half(module)
    return count


def _swap(module: Any, low: bool) -> bool:
    """Swap one attention, of either package, after trying it on a frame of 3 by 3 and three memories of the size.

    One that looks from the frame at itself is tried on the frame.
    """
    import torch

    weight = module.k_proj.weight
    noise = torch.Generator(weight.device).manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, device=weight.device, dtype=weight.dtype)

    kv, tolerance = module.kv_in_dim, 2e-2 if low or weight.dtype != torch.float32 else 1e-5
    into_memory = kv < module.internal_dim
    told: dict[str, Any] = {"num_k_exclude_rope": 2} if into_memory else {}
    m = 29 if into_memory else 9
    name = "half_memory" if low else "narrow_values"
    if hasattr(module, "out_proj"):
        inputs: tuple[Any, ...] = (some(2, 9, module.embedding_dim), some(2, m, kv), some(2, m, kv))
        cis = module.freqs_cis
        done = replace_forward(module, _low if low else _narrow, inputs, tolerance, name, **told)
        module.freqs_cis = cis  # of the trial's size now
        return done
    angle = some(9, module.head_dim)
    inputs = (some(1, 2, 9, module.hidden_size), some(1, 2, m, kv), some(1, 2, m, kv), (angle.cos(), angle.sin()))
    return replace_forward(module, _low_hf if low else _narrow_hf, inputs, tolerance, name, **told)


def _turned(self: Any, q: Tensor, k: Tensor, num_k_exclude_rope: int) -> tuple[Tensor, Tensor]:
    """Queries and keys as `RoPEAttention.forward` turns them, `(b, heads, n, c)`."""
    from sam2.modeling.position_encoding import apply_rotary_enc

    q, k = (self._separate_heads(x, self.num_heads) for x in (self.q_proj(q), self.k_proj(k)))
    side = q.shape[-2] ** 0.5
    if self.freqs_cis.shape[0] != q.shape[-2]:
        self.freqs_cis = self.compute_cis(end_x=side, end_y=side)
    self.freqs_cis = self.freqs_cis.to(q.device)
    turned = k.size(-2) - num_k_exclude_rope
    q, k[:, :, :turned] = apply_rotary_enc(
        q, k[:, :, :turned], freqs_cis=self.freqs_cis, repeat_freqs_k=self.rope_k_repeat
    )
    return q, k


def _narrow(self: Any, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
    """`RoPEAttention.forward` of sam2; see `narrow_values`."""
    q, k = _turned(self, q, k, num_k_exclude_rope)
    summed = self.v_proj(attend(q[:, 0], k[:, 0], v))
    return self.out_proj(summed)  # type: ignore[no-any-return]


def _low(self: Any, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
    """`RoPEAttention.forward` of sam2; see `half_memory`."""
    q, k = _turned(self, q, k, num_k_exclude_rope)
    return self.out_proj(_in_bfloat16(q[:, 0], k[:, 0], v, self.v_proj))  # type: ignore[no-any-return]


def _turned_hf(self: Any, query: Tensor, key: Tensor, places: Any, excluded: int) -> tuple[Tensor, Tensor]:
    """Queries and keys as `Sam2VideoRoPEAttention.forward` turns them, `(b, heads, n, c)`."""
    import sys

    shape = (query.shape[0] * query.shape[1], -1, self.num_attention_heads, self.head_dim)
    query = self.q_proj(query).view(*shape).transpose(1, 2)
    key = self.k_proj(key).view(*shape).transpose(1, 2)
    turn = sys.modules[type(self).__module__].apply_rotary_pos_emb_2d
    return turn(  # type: ignore[no-any-return]
        query, key, *places, repeat_freqs_k=self.rope_k_repeat, num_k_exclude_rope=excluded
    )


def _narrow_hf(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_embeddings: Any,
    num_k_exclude_rope: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """`Sam2VideoRoPEAttention.forward` of transformers; see `narrow_values`."""
    b, objects = query.shape[:2]
    q, k = _turned_hf(self, query, key, position_embeddings, num_k_exclude_rope)
    summed = self.v_proj(attend(q[:, 0], k[:, 0], value.flatten(0, 1)))
    return self.o_proj(summed.view(b, objects, -1, self.internal_dim)), None


def _low_hf(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_embeddings: Any,
    num_k_exclude_rope: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """`Sam2VideoRoPEAttention.forward` of transformers; see `half_memory`."""
    b, objects = query.shape[:2]
    q, k = _turned_hf(self, query, key, position_embeddings, num_k_exclude_rope)
    summed = _in_bfloat16(q[:, 0], k[:, 0], value.flatten(0, 1), self.v_proj)
    return self.o_proj(summed.view(b, objects, -1, self.internal_dim)), None


def _in_bfloat16(q: Tensor, k: Tensor, v: Tensor, project: Any) -> Tensor:
    """Attention of one head with values that are projected, cast for it and back; shapes as in `attend`."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    low = torch.bfloat16
    if q.device.type == "cpu":
        return project(attend_low(q.to(low), k.to(low), v.to(low)).to(q.dtype))  # type: ignore[no-any-return]
    # Fused kernels want four dimensions, and values as wide as keys.
    ask, key, value = (x[:, None].to(low) for x in (q, k, project(v)))
    return scaled_dot_product_attention(ask, key, value)[:, 0].to(q.dtype)


def attend_low(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head as products of bfloat16 matrices on the CPU, scores too; shapes as in `attend`."""
    import torch

    b, n, width = q.shape
    out = q.new_empty(b, n, v.shape[-1])
    q = q * width**-0.5
    for i in range(b):
        across = k[i].T
        for begin in range(0, n, LOW_QUERIES):
            some = slice(begin, begin + LOW_QUERIES)
            out[i, some] = torch.mm(torch.mm(q[i, some], across).softmax(-1), v[i])
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head whose values have another width than its keys, block by block.

    As FlashAttention (Dao et al. 2022) has it, which PyTorch's for the CPU does only for equal widths.

    Args:
        q: `(b, n, c)`.
        k: `(b, m, c)`.
        v: `(b, m, d)`.

    Returns:
        `(b, n, d)`.
    """
    import torch

    b, n, width = q.shape
    out = q.new_empty(b, n, v.shape[-1])
    q = q * width**-0.5
    room = q.new_empty(QUERIES, KEYS)
    for i in range(b):
        across = k[i].T
        for begin in range(0, n, QUERIES):
            some = q[i, begin : begin + QUERIES]
            top = some.new_full((len(some), 1), float("-inf"))
            total = some.new_zeros(len(some), 1)
            summed = some.new_zeros(len(some), v.shape[-1])
            for first in range(0, k.shape[1], KEYS):
                block = across[:, first : first + KEYS]
                logits = torch.mm(some, block, out=room[: len(some), : block.shape[1]].contiguous())
                higher = torch.maximum(top, logits.amax(1, keepdim=True))
                logits.sub_(higher).exp_()
                fade = (top - higher).exp_()
                total.mul_(fade).add_(logits.sum(1, keepdim=True))
                summed.mul_(fade).addmm_(logits, v[i, first : first + KEYS])
                top = higher
            torch.div(summed, total, out=out[i, begin : begin + QUERIES])
    return out
