"""Levers on transformers' Grounding DINO and MM-Grounding-DINO."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from grounded_sam.acceleration.backends import BackendSettings, convert
from grounded_sam.acceleration.patching import (
    Precision,
    compiled,
    half,
    half_feed_forwards,
    has_bfloat16,
    in_pieces,
    piece_feed_forwards,
    replace_forward,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

#: Queries whose samples are gathered at once: what they take stays in a core's second cache.
QUERIES = 256


def speed_up(model: Any, precision: Precision, compile_: bool, where: BackendSettings) -> None:
    """Pull the levers of a precision on a `GroundingDinoForObjectDetection`, or MM-Grounding-DINO."""
    elsewhere = where.backend != "torch"
    if elsewhere:
        convert(model.model.backbone.conv_encoder.model, where, precision)
    device = model.device
    fold_fusion(model)
    fuse_attention(model)
    if device.type == "cpu":
        if model.dtype.itemsize == 4:  # rows of the table are counted in it
            bag_samples(model)
        piece_layers(model)
        if not elsewhere:
            piece_feed_forwards(model.model.backbone)
    if precision != "exact" and not has_bfloat16(device):
        log.warning("precision=%s is exact here: %s does not multiply in bfloat16", precision, device)
    elif precision != "exact" and model.dtype.itemsize == 4:
        if device.type == "cuda":
            half_everywhere(model)
        else:
            if not elsewhere:
                half_backbone(model)
                if precision == "fast":
                    half_windows(model)
            half_feed_forward(model)
            if precision == "fast":
                half_projections(model)
    if compile_:
        for i, layer in enumerate(model.model.encoder.layers):
            compiled(layer, f"layer {i} of the detector's encoder", dynamic=True)


def fold_fusion(model: nn.Module) -> int:
    """Fold text into the projections of the fusion of image and text; how many layers were changed.

    `GroundingDinoBiMultiHeadAttention` projects n image tokens from 256 to 1024 dimensions to multiply them with the
    keys of t text tokens. Folded into the projection, the keys of h heads are a matrix of 256 by ht; likewise values
    with the projection after them. Image values are projected after they are summed by the text's weights, t of them
    instead of n, as these sum to 1.
    """
    import torch

    count = 0
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module).__name__ not in ("GroundingDinoBiMultiHeadAttention", "MMGroundingDinoBiMultiHeadAttention"):
            continue
        like = module.vision_proj.weight
        noise = torch.Generator(like.device).manual_seed(0)
        vision, text = (
            torch.randn((2, n, module.vision_dim), generator=noise, device=like.device, dtype=like.dtype)
            for n in (9, 3)
        )
        beside = torch.arange(9, device=like.device)[None].expand(2, 9) > 6
        outside = torch.arange(3, device=like.device)[None].expand(2, 3) > 1
        tolerance = 1e-5 if like.dtype == torch.float32 else 2e-2
        masks = {"vision_attention_mask": beside, "text_attention_mask": outside}
        count += replace_forward(module, folded_fusion, (vision, text), tolerance, "fold_fusion", **masks)
    return count


def folded_fusion(
    self: Any,
    vision_features: Tensor,
    text_features: Tensor,
    vision_attention_mask: Tensor | None = None,
    text_attention_mask: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`GroundingDinoBiMultiHeadAttention.forward`, folded; see `fold_fusion`."""
    import torch

    b, n, width = vision_features.shape
    t, heads, size = text_features.shape[1], self.num_heads, self.head_dim
    if heads * t >= self.embed_dim:  # the folded matrices would be the larger ones
        return type(self).forward(  # type: ignore[no-any-return]
            self, vision_features, text_features, vision_attention_mask, text_attention_mask
        )
    keys = self.text_proj(text_features).view(b, t, heads, size) * self.scale
    ask = torch.einsum("bthd,hdw->bhtw", keys, self.vision_proj.weight.view(heads, size, width))
    shift = torch.einsum("bthd,hd->bht", keys, self.vision_proj.bias.view(heads, size)).reshape(b, heads * t, 1)
    # Places last, so that softmax over a few tokens works on rows of them.
    logits = torch.baddbmm(shift, ask.reshape(b, heads * t, width), vision_features.transpose(1, 2))
    logits = (logits - logits.max()).clamp_(-50000, 50000)  # (b, heads * t, n)

    across = (logits - logits.amax(-1, keepdim=True)).clamp_(-50000, 50000)  # text looks at the image
    if vision_attention_mask is not None:
        across = across.masked_fill(vision_attention_mask[:, None], float("-inf"))
    across = across.softmax(-1)
    pooled = torch.bmm(across, vision_features).view(b, heads, t, width)
    text_out = torch.einsum("bhtw,hdw->bthd", pooled, self.values_vision_proj.weight.view(heads, size, width))
    text_out = self.out_text_proj((text_out + self.values_vision_proj.bias.view(heads, size)).reshape(b, t, -1))

    along = logits.view(b, heads, t, n)  # the image looks at text
    if text_attention_mask is not None:
        along = along.masked_fill(text_attention_mask[:, None, :, None], float("-inf"))
    along = along.softmax(2).view(b, heads * t, n)
    values = self.values_text_proj(text_features).view(b, t, heads, size)
    give = torch.einsum("bthd,whd->bhtw", values, self.out_vision_proj.weight.view(width, heads, size))
    give = give.reshape(b, heads * t, width)
    vision_out = torch.baddbmm(self.out_vision_proj.bias, along.transpose(1, 2), give)
    by_head = along.view(b * heads, t, n).transpose(1, 2)
    return (vision_out, by_head), (text_out, across.view(b * heads, t, n))


def bag_samples(model: nn.Module) -> int:
    """Sample deformable attention with `embedding_bag`; how many layers were changed.

    `MultiScaleDeformableAttention` samples a map per level and head with `grid_sample`, stacks the samples and sums
    them by weight. A query's sum is one bag: four corners of each point are rows of a table of values, bilinear weight
    times attention are their weights, and nothing is written but the sum. Offsets are pixels, which the original
    divides by the sides of maps and multiplies by them again.
    """
    import torch

    count = 0
    modules: list[Any] = list(model.modules())
    for module in modules:
        if not type(module).__name__.endswith("GroundingDinoMultiscaleDeformableAttention"):
            continue
        noise = torch.Generator().manual_seed(0)
        sizes = [(5 - i % 4, 3 + i % 2) for i in range(module.n_levels)]
        n = sum(h * w for h, w in sizes)
        inputs = [torch.randn((2, rows, module.d_model), generator=noise) for rows in (7, n)]
        told = {
            "attention_mask": torch.arange(n)[None].expand(2, n) < torch.tensor([[n], [n - 4]]),
            "encoder_hidden_states": inputs[1],
            "position_embeddings": torch.randn((2, 7, module.d_model), generator=noise),
            "spatial_shapes": torch.tensor(sizes),
            "spatial_shapes_list": sizes,
        }
        tried = []
        for numbers in (2, 4):  # of the encoder, and of the decoder
            places = torch.rand((2, 7, module.n_levels, numbers), generator=noise) * 1.4 - 0.2  # some are outside
            vars(module).pop("forward", None)
            known = {**told, "reference_points": places}
            tried.append(replace_forward(module, bagged_attention, inputs[:1], 1e-5, "bag_samples", **known))
        if not all(tried):
            vars(module).pop("forward", None)
        count += all(tried)
    return count


def bagged_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Any = None,
    spatial_shapes_list: Any = None,
    level_start_index: Any = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor]:
    """`GroundingDinoMultiscaleDeformableAttention.forward` with bags; see `bag_samples`."""
    import torch
    from torch.nn.functional import linear

    if position_embeddings is not None:
        hidden_states = hidden_states + position_embeddings
    b, q, _ = hidden_states.shape
    heads, levels, points = self.n_heads, self.n_levels, self.n_points
    value = self.value_proj(encoder_hidden_states)
    if attention_mask is not None and not attention_mask.all():
        value = value.masked_fill(~attention_mask[..., None], 0.0)
    weights = self.attention_weights(hidden_states).view(b, q, heads, levels * points).softmax(-1)
    # Those of x first, then those of y.
    rows, shift = (
        p.view(-1, 2, *p.shape[1:]).transpose(0, 1).flatten(0, 1) for p in self.sampling_offsets.parameters()
    )
    offsets = list(linear(hidden_states, rows, shift).view(b, q, 2, heads, levels * points).unbind(2))
    starts = []
    for axis in range(2):
        side = torch.tensor([size[1 - axis] for size in spatial_shapes_list], dtype=value.dtype)
        if reference_points.shape[-1] == 4:
            scale = reference_points[..., 2 + axis] * (side * (0.5 / points))
            offsets[axis] = offsets[axis] * scale.repeat_interleave(points, -1)[:, :, None]
        starts.append((reference_points[..., axis] * side - 0.5).repeat_interleave(points, -1))
    value = value.view(b, -1, heads, self.d_model // heads)
    out = bagged_samples(value, spatial_shapes_list, offsets, starts, weights)
    return self.output_proj(out), weights.view(b, q, heads, levels, points)


def bagged_samples(
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    offsets: Sequence[Tensor],
    starts: Sequence[Tensor],
    weights: Tensor,
) -> Tensor:
    """Bilinear samples of maps, summed by weight, in 32-bit floats on the CPU.

    Args:
        value: `(b, n, heads, width)`, the maps one after the other.
        sizes: height and width of each.
        offsets: x and y in pixels of the map, each `(b, q, heads, levels * points)`.
        starts: what is added to them, each `(b, q, levels * points)`; the middle of the first pixel is 0.
        weights: of the samples, as `offsets`.

    Returns:
        `(b, q, heads * width)`.
    """
    import torch
    from torch.nn.functional import embedding_bag

    b, _, heads, width = value.shape
    q, count = weights.shape[1], weights.shape[3]
    points = count // len(sizes)
    # Zeros around each map stand for what is outside.
    high, wide = (torch.tensor(sides, dtype=value.dtype) for sides in zip(*sizes, strict=True))
    spare = max(w for _, w in sizes) + 4  # for corners below the last map, of weight zero
    area = sum((h + 2) * (w + 2) for h, w in sizes) + spare
    table = value.new_empty(b, area, heads, width)
    first, begin, end = [], 0, 0
    for h, w in sizes:
        framed = table[:, end : end + (h + 2) * (w + 2)].view(b, h + 2, w + 2, heads, width)
        framed[:, 1:-1, 1:-1] = value[:, begin : begin + h * w].view(b, h, w, heads, width)
        for edge in (framed[:, 0], framed[:, -1], framed[:, :, 0], framed[:, :, -1]):
            edge.zero_()
        first.append(float(end))
        begin, end = begin + h * w, end + (h + 2) * (w + 2)
    table[:, end:].zero_()
    rows = table.view(-1, width)
    # Per head, level and point side by side, so that PyTorch works on rows of all of them.
    wide, high = (side.repeat_interleave(points).repeat(heads) for side in (wide, high))
    # Row of a corner: whole numbers in 32-bit floats, which hold them up to 2^24.
    stride = (wide + 2) * heads
    begins = torch.tensor(first).repeat_interleave(points).repeat(heads) * heads
    begins += torch.arange(float(heads)).repeat_interleave(count) + stride + heads
    steps: list[Any] = [0, heads, stride.to(torch.int32), (stride + heads).to(torch.int32)]
    out = value.new_empty(b, q, heads * width)
    for i in range(b):
        for begin in range(0, q, QUERIES):
            chosen = slice(begin, begin + QUERIES)
            weight = weights[i, chosen].reshape(-1, heads * count)
            n = len(weight)
            shares, corners = [], []
            for offset, start, side in zip(offsets, starts, (wide, high), strict=True):
                at = (offset[i, chosen] + start[i, chosen, None]).view(n, -1).clamp_(min=-1)
                at = torch.minimum(at, side, out=at)
                corners.append(at.floor())
                shares.append(at.sub_(corners[-1]))  # of the right or lower corners
            right, lower = shares
            base = torch.addcmul(begins, corners[1], stride).add_(corners[0], alpha=heads).to(torch.int32)
            lower = lower.mul_(weight)
            upper = weight - lower
            index = base.new_empty(n, heads, 4, count)
            by_corner = weight.new_empty(index.shape)
            left = 1 - right
            for k, (down, across) in enumerate(((upper, left), (upper, right), (lower, left), (lower, right))):
                index[:, :, k] = (base + steps[k]).view(n, heads, -1)
                by_corner[:, :, k] = (down * across).view(n, heads, -1)
            index += i * area * heads
            bags = embedding_bag(
                index.view(n * heads, -1),
                rows,
                per_sample_weights=by_corner.view(n * heads, -1),
                mode="sum",
            )
            out[i, chosen] = bags.view(n, heads * width)
    return out


def fuse_attention(model: nn.Module) -> int:
    """Let PyTorch have the attention between queries, and from them to text, in one call; how many layers were changed.

    Nothing as large as queries by queries is written. The weights of attention, which the layers throw away, are not
    returned.
    """
    import torch

    count = 0
    modules: list[Any] = list(model.modules())
    for module in modules:
        if not type(module).__name__.endswith("GroundingDinoMultiheadAttention"):
            continue
        like = module.query.weight
        noise = torch.Generator(like.device).manual_seed(0)
        inputs = [
            torch.randn((2, n, like.shape[1]), generator=noise, device=like.device, dtype=like.dtype) for n in (9, 5, 5)
        ]
        mask = torch.zeros(2, 1, 9, 5, device=like.device, dtype=like.dtype)
        mask[1, ..., 3:] = torch.finfo(like.dtype).min
        tolerance = 1e-5 if like.dtype == torch.float32 else 2e-2
        count += replace_forward(module, fused_attention, inputs, tolerance, "fuse_attention", attention_mask=mask)
    return count


def fused_attention(
    self: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
) -> tuple[Any, ...]:
    """`GroundingDinoMultiheadAttention.forward` by `scaled_dot_product_attention`; see `fuse_attention`."""
    from torch.nn.functional import scaled_dot_product_attention

    projected = ((self.query, queries), (self.key, keys), (self.value, values))
    q, k, v = (
        layer(x).view(len(x), -1, self.num_attention_heads, self.attention_head_size).transpose(1, 2)
        for layer, x in projected
    )
    out = scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
    out = self.out_proj(out.transpose(1, 2).flatten(2))
    return (out, None) if output_attentions else (out,)


def piece_layers(model: Any) -> int:
    """Run the feed-forward networks of the encoder in pieces; see `levers.piece_feed_forwards`."""
    import torch

    count = 0
    for layer in model.model.encoder.layers:
        deformable = layer.deformable_layer
        like, attention = deformable.fc1.weight, deformable.self_attn
        sizes = [(3, 2)] * attention.n_levels
        n = sum(h * w for h, w in sizes)
        noise = torch.Generator(like.device).manual_seed(0)
        made = {"generator": noise, "device": like.device, "dtype": like.dtype}
        told = {
            "attention_mask": torch.ones(2, n, dtype=torch.bool, device=like.device),
            "position_embeddings": torch.randn((2, n, attention.d_model), **made),
            "reference_points": torch.rand((2, n, attention.n_levels, 2), **made),
            "spatial_shapes": torch.tensor(sizes, device=like.device),
            "spatial_shapes_list": sizes,
            "level_start_index": torch.arange(attention.n_levels, device=like.device) * 6,
        }
        x = torch.randn((2, n, attention.d_model), **made)
        tolerance = 1e-5 if like.dtype == torch.float32 else 2e-2
        count += replace_forward(deformable, pieced_layer, (x,), tolerance, "piece_layers", **told)
    return count


def pieced_layer(self: Any, *inputs: Any, **told: Any) -> Any:
    """`GroundingDinoDeformableLayer.forward`, whose feed-forward network runs in pieces; see `piece_layers`."""
    first, activation, second = self.fc1, self.activation_fn, self.fc2
    before, after = (partial(type(part).forward, part) for part in (first, second))

    def network(x: Tensor) -> Tensor:
        return in_pieces(x, before, activation, after, first.weight.dtype)

    # The layer calls the three one after the other.
    try:
        first.forward, self.activation_fn, second.forward = _same, torch_identity(), network
        return type(self).forward(self, *inputs, **told)
    finally:
        self.activation_fn = activation
        for part in (first, second):
            vars(part).pop("forward", None)


@cache
def torch_identity() -> nn.Module:
    from torch import nn

    return nn.Identity()


def _same(x: Tensor) -> Tensor:
    return x


def half_feed_forward(model: Any) -> None:
    """Feed-forward layers of the image side of the encoder in bfloat16."""
    import torch

    for layer in model.model.encoder.layers:
        if "forward" in vars(layer.deformable_layer):
            layer.deformable_layer.fc1.to(torch.bfloat16)
            layer.deformable_layer.fc2.to(torch.bfloat16)


def half_backbone(model: Any) -> None:
    """Linear layers of the image backbone in bfloat16; norms and sums in 32 bits."""
    import torch
    from torch import nn

    half_feed_forwards(model.model.backbone)
    for module in model.model.backbone.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32:
            half(module)


def half_windows(model: Any) -> int:
    """Attention in the windows of Swin in bfloat16, scores too, as in `sam2.half_attention`; how many layers do."""
    import torch

    count = 0
    modules: list[Any] = list(model.model.backbone.modules())
    for module in modules:
        if type(module).__name__ == "SwinAttention":
            noise = torch.Generator().manual_seed(0)
            size = module.relative_position_bias().shape[-1]
            x = torch.randn((4, size, module.q_proj.in_features), generator=noise)
            mask = torch.zeros(2, size, size)
            mask[1, :, size // 2 :] = -100.0
            count += replace_forward(module, _swin_attention, (x,), 3e-2, "half_windows", attention_mask=mask)
    return count


def _swin_attention(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
    """`SwinAttention.forward` of transformers; see `half_windows`."""
    import torch
    from torch.nn.functional import linear

    n, size, width = hidden_states.shape
    x = hidden_states.to(torch.bfloat16)
    q, k, v = (
        linear(x, layer.weight, layer.bias).view(n, size, -1, self.head_dim).transpose(1, 2)
        for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    scores = torch.matmul(q * self.scaling, k.transpose(-1, -2))
    scores += self.relative_position_bias().to(scores.dtype)
    if attention_mask is not None:
        by_picture = scores.view(-1, len(attention_mask), *scores.shape[1:])
        by_picture += attention_mask[:, None].to(scores.dtype)
    out = torch.matmul(scores.softmax(-1), v).transpose(1, 2).reshape(n, size, width)
    return linear(out, self.o_proj.weight, self.o_proj.bias).to(hidden_states.dtype), None


def half_projections(model: Any) -> None:
    """Projections of deformable attention in bfloat16; places to sample are computed in 32 bits."""
    attentions = [layer.deformable_layer.self_attn for layer in model.model.encoder.layers]
    for attention in attentions:
        for linear in (attention.value_proj, attention.output_proj, attention.attention_weights):
            half(linear)
    for layer in model.model.decoder.layers:  # whose values are of the whole picture, the rest of few queries
        half(layer.encoder_attn.value_proj)


def half_everywhere(model: Any) -> None:
    """The whole model under autocast, on CUDA; what autocast keeps in 32 bits stays."""
    import torch

    plain = model.forward

    def forward(**told: Any) -> Any:
        with torch.autocast(model.device.type, torch.bfloat16):
            return plain(**told)

    model.forward = forward
