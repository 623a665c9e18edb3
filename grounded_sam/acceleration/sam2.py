"""Patches for SAM and SAM 2 (segment_anything, sam2, transformers), and for SAM 3's tracker."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

from grounded_sam.acceleration.backends import BackendSettings, convert_backbone
from grounded_sam.acceleration.mask_decoder import add_positions_once, fold_token_projections
from grounded_sam.acceleration.patching import (
    Precision,
    TrialInputs,
    chunk_feed_forwards,
    compile_forward,
    has_bfloat16,
    max_relative_error,
    modules_of_class,
    patch_forward,
    run_in_bfloat16,
    use_bfloat16_linears,
    use_bfloat16_matmul,
)

if TYPE_CHECKING:
    import torch
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
    cache_position_encodings(model)
    device = next(model.parameters()).device.type
    is_cpu = device == "cpu"
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
        if device == "cuda" and modules_of_class(encoder, "Hiera"):
            use_bfloat16_model(model)
        else:
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
    device = next(model.parameters()).device.type
    # Elsewhere attention itself is no faster in bfloat16.
    uses_bfloat16 = precision == "fast" or (precision == "balanced" and device == "cuda")
    if uses_bfloat16 and _can_use_bfloat16(model, precision):
        use_bfloat16_memory_attention(model)
    elif device == "cpu":
        pool_before_value_projection(model)
    else:
        fuse_memory_attention(model)


def _can_use_bfloat16(model: Any, precision: str) -> bool:
    """Return whether a model has float32 weights and its device is faster in bfloat16; warn if the device is not."""
    weight = next(model.parameters())
    if not has_bfloat16(weight.device):
        log.warning("precision=%s runs as exact: %s has no fast bfloat16 matmul", precision, weight.device)
        return False
    return weight.dtype.itemsize == 4


# Image encoder


def use_bfloat16_model(model: Any) -> None:
    """Run the image encoder, the mask decoder and, if there is one, the memory encoder of a `SAM2Base` in bfloat16.

    Prompts are encoded in float32, since bfloat16 has no room for the places of points. Masks, scores and what is
    computed from them are float32; image features stay bfloat16.
    """
    import torch

    run_in_bfloat16(model.image_encoder)
    run_in_bfloat16(model.sam_mask_decoder, torch.float32)
    run_in_bfloat16(model.memory_encoder)


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


def cache_position_encodings(model: Any) -> int:
    """Compute the fixed position encodings of SAM and SAM 2 once per size, instead of once per image or prompt.

    Replaces the `forward` of `PositionEmbeddingSine` (sam2), whose result was repeated for every image of a batch, and
    `PromptEncoder.get_dense_pe` (segment_anything, sam2). The result is the same.

    Returns:
        Number of modules that were patched.
    """
    sine, prompts = modules_of_class(model, "PositionEmbeddingSine"), modules_of_class(model, "PromptEncoder")
    for module in sine:
        module.forward = MethodType(_sine_forward(), module)
    for module in prompts:
        module.get_dense_pe = MethodType(_dense_positions(module.get_dense_pe), module)
    return len(sine) + len(prompts)


def _sine_forward() -> Callable[..., Tensor]:
    """Return a replacement of `PositionEmbeddingSine.forward`; see `cache_position_encodings`."""
    import torch

    encodings: dict[Any, Tensor] = {}

    def forward(self: Any, x: Tensor) -> Tensor:
        key = (*x.shape[-2:], x.device, x.dtype)
        if key not in encodings:
            with torch.inference_mode(False):
                encodings[key] = type(self).forward(self, x.new_empty(1, 1, *x.shape[-2:])).to(x.dtype)
        return encodings[key].expand(len(x), -1, -1, -1)

    return forward


def _dense_positions(original: Callable[[], Tensor]) -> Callable[..., Tensor]:
    """Return a replacement of `PromptEncoder.get_dense_pe`; see `cache_position_encodings`."""
    import torch

    encodings: dict[Any, Tensor] = {}

    def get_dense_pe(self: Any) -> Tensor:
        key = self._get_device()
        if key not in encodings:
            with torch.inference_mode(False), torch.no_grad():
                encodings[key] = original()
        return encodings[key]

    return get_dense_pe


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
    layers = memory_attention_layers(model)
    return sum(_patch_memory_attention(layer, _pooled_attention, "pool_before_value_projection") for layer in layers)


def fuse_memory_attention(model: Any) -> int:
    """Compute the attention to memory of a `SAM2Base` with PyTorch's fused kernels, for memories of different lengths.

    Replaces the `forward` of `RoPEAttention` (sam2), which uses these kernels too, but has no `lengths`.

    Returns:
        Number of layers that were patched.
    """
    layers = [layer for layer in memory_attention_layers(model) if type(layer).__name__ == "RoPEAttention"]
    return sum(_patch_memory_attention(layer, _fused_attention, "fuse_memory_attention") for layer in layers)


def use_bfloat16_memory_attention(model: Any) -> int:
    """Compute memory attention in bfloat16.

    Replaces the same `forward`s as `pool_before_value_projection`, those of self-attention included. On a CPU and in
    the models of transformers, linear layers multiply in bfloat16, and norms and residual sums stay in float32; a
    `SAM2Base` on CUDA has all weights in bfloat16. Outputs differ by less than 2% of the largest value.

    Returns:
        Number of attention layers that were patched.
    """
    import torch
    from torch import nn

    layers = memory_attention_layers(model, include_self=True)
    is_cpu = next(model.parameters()).device.type == "cpu"
    attend = _bfloat16_attention if is_cpu else _fused_bfloat16_attention
    count = sum(_patch_memory_attention(layer, attend, "use_bfloat16_memory_attention", 2e-2) for layer in layers)
    if not is_cpu and type(layers[0]).__name__ == "RoPEAttention":
        model.memory_attention.to(torch.bfloat16)
        return count
    for module in model.memory_attention.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype.itemsize == 4:
            use_bfloat16_matmul(module)
    return count


def _patch_memory_attention(
    module: Any, attend: Callable[..., Tensor], patch_name: str, tolerance: float | None = None
) -> bool:
    """Patch an attention layer of either package.

    Trial inputs are a frame of 3x3 positions and, except for self-attention, three memories of that size and two object
    pointers.

    Args:
        module: The layer.
        attend: Function of queries, keys, unprojected values, the value projection, and numbers of keys.
        patch_name: Name of the patch, for the log.
        tolerance: Largest relative error; None for that of another order of summation.
    """
    trial, kv_dim = TrialInputs(module.k_proj.weight), module.kv_in_dim
    tolerance = tolerance or trial.tolerance
    is_cross_attention = kv_dim < module.internal_dim
    kwargs: dict[str, Any] = {"num_k_exclude_rope": 2} if is_cross_attention else {}
    length = 29 if is_cross_attention else 9
    if hasattr(module, "out_proj"):
        inputs: tuple[Any, ...] = (
            trial.normal(2, 9, module.embedding_dim),
            trial.normal(2, length, kv_dim),
            trial.normal(2, length, kv_dim),
        )
        freqs_cis = module.freqs_cis
        is_patched = patch_forward(module, _sam2_forward(attend), inputs, tolerance, patch_name, **kwargs)
        module.freqs_cis = freqs_cis  # the trial has replaced them with those of its own size
        return is_patched
    angle = trial.normal(9, module.head_dim)
    inputs = (
        trial.normal(1, 2, 9, module.hidden_size),
        trial.normal(1, 2, length, kv_dim),
        trial.normal(1, 2, length, kv_dim),
        (angle.cos(), angle.sin()),
    )
    return patch_forward(module, _transformers_forward(attend), inputs, tolerance, patch_name, **kwargs)


def memory_takes_lengths(model: Any) -> bool:
    """Return whether all layers of attention to memory take `lengths`, which is so if they could be patched."""
    return all("forward" in vars(layer) for layer in memory_attention_layers(model))


def attend_to_memory(
    module: Any,
    frame: Tensor,
    frame_positions: Tensor,
    memory: Tensor,
    memory_positions: Tensor,
    num_pointers: int,
    lengths: Tensor | None = None,
) -> Tensor:
    """Compute the memory attention of sam2 for one frame and n objects.

    Equals `MemoryAttention.forward`; up to where objects differ, it computes once for all.

    Args:
        module: `MemoryAttention` of a `SAM2Base`.
        frame: Features of the frame, `(1, hw, C)`.
        frame_positions: Their positional encoding, `(1, hw, C)`.
        memory: Memories of each object, `(n, m, D)`: maps first, tokens of pointers last.
        memory_positions: Their positional encoding, `(n, m, D)`.
        num_pointers: Number of tokens of pointers.
        lengths: Number of tokens that each object has, `(n,) int32`; None if all have m. The others must be finite.

    Returns:
        Features of the frame for each object, `(n, hw, C) float32`.
    """
    dtype = module.norm.weight.dtype
    frame, frame_positions = frame.to(dtype), frame_positions.to(dtype)
    keys, values = (memory + memory_positions).to(dtype), memory.to(dtype)
    kwargs = {} if lengths is None else {"lengths": lengths}
    x = frame + 0.1 * frame_positions if module.pos_enc_at_input else frame
    for i, layer in enumerate(module.layers):
        x = layer._forward_sa(x, frame_positions)
        if i == 0:
            x = x.expand(len(memory), -1, -1)
        query = layer.norm2(x)
        if layer.pos_enc_at_cross_attn_queries:
            query = query + frame_positions
        x = x + layer.cross_attn_image(
            q=query,
            k=keys if layer.pos_enc_at_cross_attn_keys else values,
            v=values,
            num_k_exclude_rope=num_pointers,
            **kwargs,
        )
        x = x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))
    return module.norm(x).float()  # type: ignore[no-any-return]


def _sam2_forward(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a replacement of `RoPEAttention.forward` of sam2, which also takes `lengths`; see `attend_to_memory`.

    Args:
        attend: See `_patch_memory_attention`.
    """

    def forward(
        self: Any, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0, lengths: Tensor | None = None
    ) -> Tensor:
        q, k = _rotate_sam2(self, q, k, num_k_exclude_rope)
        return self.out_proj(attend(q[:, 0], k[:, 0], v, self.v_proj, lengths))  # type: ignore[no-any-return]

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
        out = attend(q[:, 0], k[:, 0], value.flatten(0, 1), self.v_proj, None)
        return self.o_proj(out.view(b, objects, -1, self.internal_dim)), None

    return forward


def _rotate_sam2(self: Any, q: Tensor, k: Tensor, num_k_exclude_rope: int) -> tuple[Tensor, Tensor]:
    """Project queries and keys and apply rotary embeddings, as in `RoPEAttention.forward`; `(b, heads, n, c)`."""
    q, k = (self._separate_heads(x, self.num_heads) for x in (self.q_proj(q), self.k_proj(k)))
    side = q.shape[-2] ** 0.5
    if self.freqs_cis.shape[0] != q.shape[-2]:
        self.freqs_cis = self.compute_cis(end_x=side, end_y=side)
    self.freqs_cis = self.freqs_cis.to(q.device)
    rotated = k[:, :, : k.size(-2) - num_k_exclude_rope]
    rotated.copy_(_rotate(rotated, self.freqs_cis))
    return _rotate(q, self.freqs_cis).to(q.dtype), k


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn pairs of features as `apply_rotary_enc` of sam2 does, without a copy of the angles for every memory.

    Args:
        x: `(b, heads, r * n, c)`.
        turns: Unit complex numbers, `(n, c / 2)`.

    Returns:
        A tensor of the shape of `x`, float32.
    """
    import torch

    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:2], -1, *turns.shape, 2))
    return torch.view_as_real(pairs * turns).reshape(x.shape)


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


# Attention of one head: q is (b, n, c), k is (b, m, c), v is (b, m, d); the first `lengths` (b,) of m count


def _pooled_attention(q: Tensor, k: Tensor, v: Tensor, value_projection: Any, lengths: Tensor | None) -> Tensor:
    """Attend to unprojected values and project the result."""
    return value_projection(blockwise_attention(q, k, v, lengths))  # type: ignore[no-any-return]


def _bfloat16_attention(q: Tensor, k: Tensor, v: Tensor, value_projection: Any, lengths: Tensor | None) -> Tensor:
    """Attend to unprojected values in bfloat16 and project the result; the output has the dtype of `q`."""
    import torch

    query, key, value = (x.to(torch.bfloat16) for x in (q, k, v))
    pooled = bfloat16_attention(query, key, value, lengths)
    return value_projection(pooled.to(q.dtype))  # type: ignore[no-any-return]


def _fused_bfloat16_attention(q: Tensor, k: Tensor, v: Tensor, value_projection: Any, lengths: Tensor | None) -> Tensor:
    """Attend to projected values in bfloat16; the output has the dtype of `q`."""
    import torch

    query, key, value = (x.to(torch.bfloat16) for x in (q, k, value_projection(v)))
    if lengths is not None and _has_varlen(query.device, query.shape[-1]):
        return varlen_attention(query, key, value, lengths).to(q.dtype)
    return masked_attention(query, key, value, lengths).to(q.dtype)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, value_projection: Any, lengths: Tensor | None) -> Tensor:
    """Attend to projected values."""
    return masked_attention(q, k, value_projection(v), lengths)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Compute attention of one head with PyTorch's fused kernels, in one call for all rows.

    Arguments and result have the shapes of `blockwise_attention`, with values as wide as keys. Keys and values that do
    not count must be finite.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    mask = None
    if lengths is not None:
        mask = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, None, None]
    return scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)[:, 0]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Compute attention of one head with a kernel that skips what does not count; 16 bits, on CUDA.

    Arguments and result have the shapes of `masked_attention`.
    """
    import torch
    from torch.nn.attention.varlen import varlen_attn

    (b, n, _), m = q.shape, k.shape[1]
    of_queries, of_keys = (torch.arange(0, b * size + 1, size, dtype=torch.int32, device=q.device) for size in (n, m))
    query, key, value = (x.reshape(-1, 1, x.shape[-1]) for x in (q, k, v))
    out = varlen_attn(query, key, value, of_queries, of_keys, n, m, seqused_k=lengths.to(torch.int32))
    return out.view(b, n, -1)  # type: ignore[union-attr]


@cache
def _has_varlen(device: torch.device, width: int) -> bool:
    """Return whether `varlen_attention` runs on a device and is right."""
    import torch

    if device.type != "cuda":
        return False
    noise = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(2, n, width, generator=noise, device=device, dtype=torch.bfloat16) for n in (256, 384, 384))
    lengths = torch.tensor([384, 301], dtype=torch.int32, device=device)
    try:
        error = max_relative_error([masked_attention(q, k, v, lengths)], [varlen_attention(q, k, v, lengths)])
    except Exception as failure:  # it depends on the version of torch, its libraries and the device
        log.info("attention to memories of different lengths is masked: %s", " ".join(str(failure).split())[:200])
        return False
    return error < 2e-2


def bfloat16_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Compute attention of one head as products of bfloat16 matrices on the CPU, scores included.

    Arguments and result have the shapes of `blockwise_attention`.
    """
    import torch

    b, n, width = q.shape
    out = q.new_empty(b, n, v.shape[-1])
    q = q * width**-0.5
    for i, end in enumerate(_ends(k, lengths)):
        keys, values = k[i, :end].T, v[i, :end]
        for begin in range(0, n, BFLOAT16_QUERY_BLOCK):
            block = slice(begin, begin + BFLOAT16_QUERY_BLOCK)
            out[i, block] = torch.mm(torch.mm(q[i, block], keys).softmax(-1), values)
    return out


def _ends(k: Tensor, lengths: Tensor | None) -> list[int]:
    """Return the number of keys of each row that count."""
    return [k.shape[1]] * len(k) if lengths is None else lengths.tolist()  # type: ignore[no-any-return]


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Compute attention of one head block by block, with an online softmax.

    This is the algorithm of FlashAttention (Dao et al. 2022). PyTorch has it for the CPU too, but only for values as
    wide as keys.

    Args:
        q: Queries, `(b, n, c)`.
        k: Keys, `(b, m, c)`.
        v: Values, `(b, m, d)`.
        lengths: Number of keys of each row that count, the first ones, `(b,)`; None for all.

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
    for i, end in enumerate(_ends(k, lengths)):
        keys, values = k[i, :end].T, v[i, :end]
        for begin in range(0, n, QUERY_BLOCK):
            queries = q[i, begin : begin + QUERY_BLOCK]
            running_max = queries.new_full((len(queries), 1), float("-inf"))
            weight_sum = queries.new_zeros(len(queries), 1)
            value_sum = queries.new_zeros(len(queries), v.shape[-1])
            for first in range(0, end, KEY_BLOCK):
                block = keys[:, first : first + KEY_BLOCK]
                logits = torch.mm(queries, block, out=buffer[: len(queries), : block.shape[1]].contiguous())
                new_max = torch.maximum(running_max, logits.amax(1, keepdim=True))
                logits.sub_(new_max).exp_()
                rescale = (running_max - new_max).exp_()
                weight_sum.mul_(rescale).add_(logits.sum(1, keepdim=True))
                value_sum.mul_(rescale).addmm_(logits, values[first : first + KEY_BLOCK])
                running_max = new_max
            torch.div(value_sum, weight_sum, out=out[i, begin : begin + QUERY_BLOCK])
    return out
