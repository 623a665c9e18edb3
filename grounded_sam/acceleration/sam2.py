"""Patches for SAM and SAM 2 (segment_anything, sam2, transformers), and for SAM 3's tracker."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grounded_sam.acceleration.backends import BackendSettings, convert_backbone
from grounded_sam.acceleration.mask_decoder import add_positions_once, fold_token_projections
from grounded_sam.acceleration.patching import (
    Precision,
    TrialInputs,
    chunk_feed_forwards,
    compile_forward,
    has_bfloat16,
    modules_of_class,
    patch_forward,
    use_bfloat16_linears,
    use_bfloat16_matmul,
)

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

#: Queries and keys per block of attention in float32, so that their products stay in the CPU cache.
QUERY_BLOCK, KEY_BLOCK = 1024, 512
#: Queries per block of attention in bfloat16.
BFLOAT16_QUERY_BLOCK = 256


def speed_up_encoder(model: Any, precision: Precision, compile_: bool, backend: BackendSettings) -> None:
    """Apply the patches of a precision to image encoder and mask decoder.

    Args:
        model: A `Sam`, a `SAM2Base`, or a model of transformers with a `vision_encoder`.
        precision: `exact`, `balanced` or `fast`.
        compile_: Whether to compile the image encoder.
        backend: What runs the image backbone.
    """
    encoder = model.image_encoder if hasattr(model, "image_encoder") else model.vision_encoder
    cache_position_embeddings(encoder)
    is_cpu = next(model.parameters()).device.type == "cpu"
    if is_cpu:
        fold_token_projections(model)
        add_positions_once(model)
    if backend.backend != "torch":
        backbone = getattr(encoder, "trunk", getattr(encoder, "backbone", encoder))  # SAM's encoder is its own backbone
        convert_backbone(backbone, backend, precision)
        if compile_:
            log.warning("compile=true has no effect on the image encoder, which runs in %s", backend.backend)
        return
    if is_cpu:
        chunk_feed_forwards(encoder)
    if precision != "exact" and _can_use_bfloat16(model, precision):
        if precision == "fast":
            use_bfloat16_hiera_attention(encoder)
        use_bfloat16_linears(encoder)
    if compile_:
        compile_forward(encoder, "the image encoder of the segmenter", dynamic=False)


def speed_up_memory(model: Any, precision: Precision) -> None:
    """Apply the patches of a precision to memory attention.

    Args:
        model: A `SAM2Base`, or a video model of transformers.
        precision: `exact`, `balanced` or `fast`.
    """
    if precision == "fast" and _can_use_bfloat16(model, precision):
        use_bfloat16_memory_attention(model)
    elif next(model.parameters()).device.type == "cpu":
        pool_before_value_projection(model)


def _can_use_bfloat16(model: Any, precision: str) -> bool:
    """Return whether a model has float32 weights and its device is faster in bfloat16; warn if the device is not."""
    weight = next(model.parameters())
    if not has_bfloat16(weight.device):
        log.warning("precision=%s runs as exact: %s has no fast bfloat16 matmul", precision, weight.device)
        return False
    return weight.dtype.itemsize == 4


# Image encoder


def use_bfloat16_hiera_attention(encoder: Any) -> int:
    """Compute the attention of Hiera in bfloat16, scores and softmax included.

    Replaces the `forward` of `MultiScaleAttention` (sam2) and `Sam2MultiScaleAttention` (transformers). On a CPU,
    PyTorch's attention is no faster in bfloat16 than in float32, but matrix products are twice as fast. Outputs differ
    by about 1% of the largest value; more than 3% is rejected.

    Returns:
        Number of layers that were patched.
    """
    import torch

    count = 0
    for module in modules_of_class(encoder, "MultiScaleAttention", "Sam2MultiScaleAttention"):
        x = TrialInputs(module.qkv.weight).normal(1, 36, 32, module.dim)  # more than a block, also after pooling
        use_bfloat16_matmul(module.qkv, torch.bfloat16)
        use_bfloat16_matmul(module.proj, torch.float32)
        if module.qkv.weight.device.type == "cpu":
            count += patch_forward(module, _hiera_attention, (x,), 3e-2, "use_bfloat16_hiera_attention")
    return count


def _hiera_attention(self: Any, hidden_states: Tensor, **_: Any) -> Tensor:
    """Replace `MultiScaleAttention.forward` and its equivalents; see `use_bfloat16_hiera_attention`."""
    import torch

    b, h, w, _channels = hidden_states.shape
    heads = self.num_heads if hasattr(self, "num_heads") else self.num_attention_heads
    stride = self.q_pool if hasattr(self, "q_pool") else self.query_stride
    q, k, v = self.qkv(hidden_states).view(b, h * w, 3, heads, -1).unbind(2)
    if stride:
        q = sys.modules[type(self).__module__].do_pool(q.reshape(b, h, w, -1), stride)
        h, w = q.shape[1:3]
        q = q.reshape(b, h * w, heads, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.shape[2] <= BFLOAT16_QUERY_BLOCK:  # windows
        out = torch.matmul(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(-1), v)
    else:
        out = torch.stack([bfloat16_attention(q[:, head], k[:, head], v[:, head]) for head in range(heads)], 1)
    return self.proj(out.transpose(1, 2).reshape(b, h, w, -1))  # type: ignore[no-any-return]


def cache_position_embeddings(encoder: Any) -> int:
    """Compute the position embedding of Hiera once per image size, instead of once per image.

    Replaces `_get_pos_embed` of `Hiera` (sam2) and `Sam2HieraDetModel` (transformers). The result is the same.

    Returns:
        Number of encoders that were patched.
    """
    import torch

    count = 0
    for module in modules_of_class(encoder, "Hiera", "Sam2HieraDetModel"):
        if not hasattr(module, "_get_pos_embed"):
            continue
        embeddings: dict[Any, Tensor] = {}

        def get_cached(
            hw: Any, _module: Any = module, _original: Any = module._get_pos_embed, _cache: Any = embeddings
        ) -> Tensor:
            key = (int(hw[0]), int(hw[1]), _module.pos_embed.device, _module.pos_embed.dtype)
            if key not in _cache:
                _cache.clear()
                with torch.no_grad():
                    _cache[key] = _original((key[0], key[1])).contiguous()
            return _cache[key]  # type: ignore[no-any-return]

        module._get_pos_embed = get_cached
        count += 1
    return count


# Memory attention


def memory_attention_layers(model: Any, include_self: bool = False) -> list[Any]:
    """Return the attention layers from a frame to memory, whose keys and values are narrower than their queries.

    Args:
        model: A `SAM2Base`, or a video model of transformers.
        include_self: Whether to return the layers of self-attention too.
    """
    names = ("RoPEAttention", "Sam2VideoRoPEAttention", "Sam3TrackerVideoRoPEAttention")
    layers = modules_of_class(model.memory_attention, *names)
    return [layer for layer in layers if include_self or layer.kv_in_dim < layer.internal_dim]


def pool_before_value_projection(model: Any) -> int:
    """Sum memory features by attention weight before they are projected to values.

    Replaces the `forward` of `RoPEAttention` (sam2), `Sam2VideoRoPEAttention` and `Sam3TrackerVideoRoPEAttention`
    (transformers). Attention weights sum to 1, so the projection of the values, from 64 to 256 dimensions, can follow
    the weighted sum: a quarter of the products, and no projection of every memory. Equal up to rounding (1e-5 in
    float32).

    Returns:
        Number of layers that were patched.
    """
    return sum(_patch_memory_attention(layer, use_bfloat16=False) for layer in memory_attention_layers(model))


def use_bfloat16_memory_attention(model: Any) -> int:
    """Compute memory attention in bfloat16; norms and residual sums stay in float32.

    Replaces the same `forward`s as `pool_before_value_projection`, those of self-attention included, and makes the
    linear layers multiply in bfloat16. Outputs differ by less than 2% of the largest value.

    Returns:
        Number of attention layers that were patched.
    """
    from torch import nn

    layers = memory_attention_layers(model, include_self=True)
    count = sum(_patch_memory_attention(layer, use_bfloat16=True) for layer in layers)
    for module in model.memory_attention.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype.itemsize == 4:
            use_bfloat16_matmul(module)
    return count


def _patch_memory_attention(module: Any, use_bfloat16: bool) -> bool:
    """Patch an attention layer of either package.

    Trial inputs are a frame of 3x3 positions and, except for self-attention, three memories of that size and two object
    pointers.
    """
    trial, kv_dim = TrialInputs(module.k_proj.weight), module.kv_in_dim
    tolerance = 2e-2 if use_bfloat16 else trial.tolerance
    is_cross_attention = kv_dim < module.internal_dim
    kwargs: dict[str, Any] = {"num_k_exclude_rope": 2} if is_cross_attention else {}
    length = 29 if is_cross_attention else 9
    name = "use_bfloat16_memory_attention" if use_bfloat16 else "pool_before_value_projection"
    attend = _bfloat16_projected_attention if use_bfloat16 else _pooled_attention
    if hasattr(module, "out_proj"):
        inputs: tuple[Any, ...] = (
            trial.normal(2, 9, module.embedding_dim),
            trial.normal(2, length, kv_dim),
            trial.normal(2, length, kv_dim),
        )
        freqs_cis = module.freqs_cis
        is_patched = patch_forward(module, _sam2_forward(attend), inputs, tolerance, name, **kwargs)
        module.freqs_cis = freqs_cis  # the trial has replaced them with those of its own size
        return is_patched
    angle = trial.normal(9, module.head_dim)
    inputs = (
        trial.normal(1, 2, 9, module.hidden_size),
        trial.normal(1, 2, length, kv_dim),
        trial.normal(1, 2, length, kv_dim),
        (angle.cos(), angle.sin()),
    )
    return patch_forward(module, _transformers_forward(attend), inputs, tolerance, name, **kwargs)


def _sam2_forward(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a replacement of `RoPEAttention.forward` of sam2.

    Args:
        attend: Function of queries, keys, unprojected values and the value projection.
    """

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
        q, k = _rotate_sam2(self, q, k, num_k_exclude_rope)
        return self.out_proj(attend(q[:, 0], k[:, 0], v, self.v_proj))  # type: ignore[no-any-return]

    return forward


def _transformers_forward(attend: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Return a replacement of `Sam2VideoRoPEAttention.forward` of transformers; see `_sam2_forward`."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_embeddings: Any,
        num_k_exclude_rope: int = 0,
        **_: Any,
    ) -> tuple[Tensor, None]:
        b, objects = query.shape[:2]
        q, k = _rotate_transformers(self, query, key, position_embeddings, num_k_exclude_rope)
        out = attend(q[:, 0], k[:, 0], value.flatten(0, 1), self.v_proj)
        return self.o_proj(out.view(b, objects, -1, self.internal_dim)), None

    return forward


def _rotate_sam2(self: Any, q: Tensor, k: Tensor, num_k_exclude_rope: int) -> tuple[Tensor, Tensor]:
    """Project queries and keys and apply rotary embeddings, as in `RoPEAttention.forward`; `(b, heads, n, c)`."""
    from sam2.modeling.position_encoding import apply_rotary_enc

    q, k = (self._separate_heads(x, self.num_heads) for x in (self.q_proj(q), self.k_proj(k)))
    side = q.shape[-2] ** 0.5
    if self.freqs_cis.shape[0] != q.shape[-2]:
        self.freqs_cis = self.compute_cis(end_x=side, end_y=side)
    self.freqs_cis = self.freqs_cis.to(q.device)
    num_rotated = k.size(-2) - num_k_exclude_rope
    q, k[:, :, :num_rotated] = apply_rotary_enc(
        q, k[:, :, :num_rotated], freqs_cis=self.freqs_cis, repeat_freqs_k=self.rope_k_repeat
    )
    return q, k


def _rotate_transformers(
    self: Any, query: Tensor, key: Tensor, position_embeddings: Any, num_k_exclude_rope: int
) -> tuple[Tensor, Tensor]:
    """Project queries and keys and apply rotary embeddings, as in `Sam2VideoRoPEAttention.forward`."""
    shape = (query.shape[0] * query.shape[1], -1, self.num_attention_heads, self.head_dim)
    query = self.q_proj(query).view(*shape).transpose(1, 2)
    key = self.k_proj(key).view(*shape).transpose(1, 2)
    apply_rotary = sys.modules[type(self).__module__].apply_rotary_pos_emb_2d
    return apply_rotary(  # type: ignore[no-any-return]
        query, key, *position_embeddings, repeat_freqs_k=self.rope_k_repeat, num_k_exclude_rope=num_k_exclude_rope
    )


# Attention of one head: q is (b, n, c), k is (b, m, c), v is (b, m, d)


def _pooled_attention(q: Tensor, k: Tensor, v: Tensor, value_projection: Any) -> Tensor:
    """Attend to unprojected values and project the result."""
    return value_projection(blockwise_attention(q, k, v))  # type: ignore[no-any-return]


def _bfloat16_projected_attention(q: Tensor, k: Tensor, v: Tensor, value_projection: Any) -> Tensor:
    """Attend in bfloat16, and project values before or after; the output has the dtype of `q`."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    dtype = torch.bfloat16
    if q.device.type == "cpu":
        pooled = bfloat16_attention(q.to(dtype), k.to(dtype), v.to(dtype))
        return value_projection(pooled.to(q.dtype))  # type: ignore[no-any-return]
    # Fused kernels need four dimensions, and values as wide as keys.
    query, key, value = (x[:, None].to(dtype) for x in (q, k, value_projection(v)))
    return scaled_dot_product_attention(query, key, value)[:, 0].to(q.dtype)


def bfloat16_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of one head as products of bfloat16 matrices on the CPU, scores included.

    Arguments and result have the shapes of `blockwise_attention`.
    """
    import torch

    b, n, width = q.shape
    out = q.new_empty(b, n, v.shape[-1])
    q = q * width**-0.5
    for i in range(b):
        keys = k[i].T
        for begin in range(0, n, BFLOAT16_QUERY_BLOCK):
            block = slice(begin, begin + BFLOAT16_QUERY_BLOCK)
            out[i, block] = torch.mm(torch.mm(q[i, block], keys).softmax(-1), v[i])
    return out


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of one head block by block, with an online softmax.

    This is the algorithm of FlashAttention (Dao et al. 2022). PyTorch has it for the CPU too, but only for values as
    wide as keys.

    Args:
        q: Queries, `(b, n, c)`.
        k: Keys, `(b, m, c)`.
        v: Values, `(b, m, d)`.

    Returns:
        `(b, n, d)`.

    >>> import torch
    >>> blockwise_attention(torch.ones(1, 2, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 1)).flatten().tolist()
    [1.0, 1.0]
    """
    import torch

    b, n, width = q.shape
    out = q.new_empty(b, n, v.shape[-1])
    q = q * width**-0.5
    buffer = q.new_empty(QUERY_BLOCK, KEY_BLOCK)
    for i in range(b):
        keys = k[i].T
        for begin in range(0, n, QUERY_BLOCK):
            queries = q[i, begin : begin + QUERY_BLOCK]
            running_max = queries.new_full((len(queries), 1), float("-inf"))
            weight_sum = queries.new_zeros(len(queries), 1)
            value_sum = queries.new_zeros(len(queries), v.shape[-1])
            for first in range(0, k.shape[1], KEY_BLOCK):
                block = keys[:, first : first + KEY_BLOCK]
                logits = torch.mm(queries, block, out=buffer[: len(queries), : block.shape[1]].contiguous())
                new_max = torch.maximum(running_max, logits.amax(1, keepdim=True))
                logits.sub_(new_max).exp_()
                rescale = (running_max - new_max).exp_()
                weight_sum.mul_(rescale).add_(logits.sum(1, keepdim=True))
                value_sum.mul_(rescale).addmm_(logits, v[i, first : first + KEY_BLOCK])
                running_max = new_max
            torch.div(value_sum, weight_sum, out=out[i, begin : begin + QUERY_BLOCK])
    return out
