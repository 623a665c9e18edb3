"""Levers on transformers' Grounding DINO and MM-Grounding-DINO."""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from grounded_sam.speed.backends import Where, convert
from grounded_sam.speed.levers import (
    Precision,
    compiled,
    half,
    half_feed_forwards,
    has_bfloat16,
    in_pieces,
    piece_feed_forwards,
    swap,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

#: Queries whose samples are gathered at once: what they take stays in a core's second cache.
QUERIES = 256


def speed_up(model: Any, precision: Precision, compile_: bool, where: Where) -> None:
    """Pull the levers of a precision on a `GroundingDinoForObjectDetection`, or MM-Grounding-DINO."""
    elsewhere = where.backend != "torch"
    if elsewhere:
        convert(model.model.backbone.conv_encoder.model, where, precision)
    device = model.device
    fold_fusion(model)
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
            half_feed_forward(model)
            if precision == "fast":
                half_projections(model)
    if compile_:
        for i, layer in enumerate(model.model.encoder.layers):
            compiled(layer, f"layer {i} of the detector's encoder")


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
        count += swap(module, folded_fusion, (vision, text), tolerance, "fold_fusion", **masks)
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
    shift = torch.einsum("bthd,hd->bht", keys, self.vision_proj.bias.view(heads, size))
    ask, shift = ask.reshape(b, heads * t, width), shift.reshape(b, 1, heads * t)
    logits = torch.baddbmm(shift, vision_features, ask.transpose(1, 2))  # (b, n, heads * t)
    logits = (logits - logits.max()).clamp(-50000, 50000)

    across = logits.transpose(1, 2)  # text looks at the image
    across = (across - across.amax(-1, keepdim=True)).clamp(-50000, 50000)
    if vision_attention_mask is not None:
        across = across.masked_fill(vision_attention_mask[:, None], float("-inf"))
    across = across.softmax(-1)
    pooled = torch.bmm(across, vision_features).view(b, heads, t, width)
    text_out = torch.einsum("bhtw,hdw->bthd", pooled, self.values_vision_proj.weight.view(heads, size, width))
    text_out = self.out_text_proj((text_out + self.values_vision_proj.bias.view(heads, size)).reshape(b, t, -1))

    along = logits.view(b, n, heads, t)  # the image looks at text
    if text_attention_mask is not None:
        along = along.masked_fill(text_attention_mask[:, None, None], float("-inf"))
    along = along.softmax(-1)
    values = self.values_text_proj(text_features).view(b, t, heads, size)
    give = torch.einsum("bthd,whd->bhtw", values, self.out_vision_proj.weight.view(width, heads, size))
    vision_out = torch.baddbmm(self.out_vision_proj.bias, along.view(b, n, -1), give.reshape(b, heads * t, width))
    by_head = along.permute(0, 2, 1, 3).reshape(b * heads, n, t)
    return (vision_out, by_head), (text_out, across.view(b * heads, t, n))


def bag_samples(model: nn.Module) -> int:
    """Sample deformable attention with `embedding_bag`; how many layers were changed.

    `MultiScaleDeformableAttention` samples a map per level and head with `grid_sample`, stacks the samples and sums
    them by weight. A query's sum is one bag: four corners of each point are rows of a table of values, bilinear weight
    times attention are their weights, and nothing is written but the sum.
    """
    import torch

    count = 0
    for module in model.modules():
        if type(module).__name__ != "MultiScaleDeformableAttention":
            continue
        noise = torch.Generator().manual_seed(0)
        sizes = [(5, 7), (3, 4)]
        value = torch.randn((2, 47, 2, 8), generator=noise)
        places = torch.rand((2, 6, 2, 2, 3, 2), generator=noise) * 1.4 - 0.2  # some are outside
        weights = torch.rand((2, 6, 2, 2, 3), generator=noise)
        inputs = (value, torch.tensor(sizes), sizes, torch.tensor([0, 35]), places, weights, 64)
        count += swap(module, bagged_samples, inputs, 1e-5, "bag_samples")
    return count


def bagged_samples(
    self: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """`MultiScaleDeformableAttention.forward` with bags; see `bag_samples`."""
    import torch
    from torch.nn.functional import embedding_bag

    b, _, heads, width = value.shape
    q, points = sampling_locations.shape[1], sampling_locations.shape[4]
    # Zeros around each map stand for what is outside.
    high, wide = (
        torch.tensor(sides, dtype=value.dtype)[:, None] for sides in zip(*value_spatial_shapes_list, strict=True)
    )
    spare = max(w for _, w in value_spatial_shapes_list) + 4  # for corners below the last map, of weight zero
    area = sum((h + 2) * (w + 2) for h, w in value_spatial_shapes_list) + spare
    table = value.new_zeros(b, area, heads, width)
    starts, begin, end = [], 0, 0
    for h, w in value_spatial_shapes_list:
        framed = table[:, end : end + (h + 2) * (w + 2)].view(b, h + 2, w + 2, heads, width)
        framed[:, 1:-1, 1:-1] = value[:, begin : begin + h * w].view(b, h, w, heads, width)
        starts.append(float(end))
        begin, end = begin + h * w, end + (h + 2) * (w + 2)
    rows = table.view(-1, width)
    # Per head, level and point side by side, so that PyTorch works on rows of all of them.
    full = (heads, len(starts), points)
    wide, high = (side.expand(full).reshape(-1) for side in (wide, high))
    # Row of a corner: whole numbers in 32-bit floats, which hold them up to 2^24.
    stride = (wide + 2) * heads
    first = (torch.tensor(starts)[:, None] * heads + torch.arange(float(heads)).view(heads, 1, 1)).expand(full)
    first = first.reshape(-1) + stride + heads
    steps: list[Any] = [0, heads, stride.to(torch.int32), (stride + heads).to(torch.int32)]
    out = value.new_empty(b, q, heads * width)
    for i in range(b):
        for begin in range(0, q, QUERIES):
            chosen = slice(begin, begin + QUERIES)
            place = sampling_locations[i, chosen]
            n = len(place)
            weight = attention_weights[i, chosen].reshape(n, -1)
            shares, corners = [], []
            for axis, side in enumerate((wide, high)):
                at = (place[..., axis].reshape(n, -1) * side).sub_(0.5).clamp_(min=-1)
                at = torch.minimum(at, side, out=at)
                corners.append(at.floor())
                shares.append(at.sub_(corners[-1]))  # of the right or lower corners
            right, lower = shares
            base = torch.addcmul(first, corners[1], stride).add_(corners[0], alpha=heads).to(torch.int32)
            lower = lower.mul_(weight)
            upper = weight - lower
            index = base.new_empty(n, heads, 4, base.shape[1] // heads)
            weights = weight.new_empty(index.shape)
            left = 1 - right
            for k, (down, across) in enumerate(((upper, left), (upper, right), (lower, left), (lower, right))):
                index[:, :, k] = (base + steps[k]).view(n, heads, -1)
                weights[:, :, k] = (down * across).view(n, heads, -1)
            index += i * area * heads
            bags = embedding_bag(
                index.view(n * heads, -1),
                rows,
                per_sample_weights=weights.view(n * heads, -1).to(rows.dtype),
                mode="sum",
            )
            out[i, chosen] = bags.view(n, heads * width)
    return out


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
        count += swap(deformable, pieced_layer, (x,), tolerance, "piece_layers", **told)
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


def half_projections(model: Any) -> None:
    """Projections of deformable attention in the encoder in bfloat16; places to sample are computed in 32 bits."""
    for layer in model.model.encoder.layers:
        attention = layer.deformable_layer.self_attn
        for linear in (attention.value_proj, attention.output_proj, attention.attention_weights):
            half(linear)


def half_everywhere(model: Any) -> None:
    """The whole model under autocast, on CUDA; what autocast keeps in 32 bits stays."""
    import torch

    plain = model.forward

    def forward(**told: Any) -> Any:
        with torch.autocast(model.device.type, torch.bfloat16):
            return plain(**told)

    model.forward = forward
