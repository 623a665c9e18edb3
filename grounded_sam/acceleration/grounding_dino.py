"""Patches for transformers' Grounding DINO and MM-Grounding-DINO."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from grounded_sam.acceleration.backends import BackendSettings, convert_backbone
from grounded_sam.acceleration.deformable_attention import sample_maps
from grounded_sam.acceleration.dino_network import DetectorNetwork, network_of
from grounded_sam.acceleration.patching import (
    FeedForward,
    Precision,
    TrialInputs,
    chunk_feed_forwards,
    chunked_feed_forward,
    compile_forward,
    has_bfloat16,
    modules_of_class,
    patch_forward,
    use_bfloat16_linears,
    use_bfloat16_matmul,
    without_tf32,
)
from grounded_sam.acceleration.swin import keep_window_masks

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

#: Queries that are sampled at once, so that their samples stay in the L2 cache of a core.
QUERY_BLOCK = 256


def speed_up(
    model: Any, precision: Precision, compile_: bool, backend: BackendSettings, dtype: str = "float32"
) -> DetectorNetwork:
    """Apply the patches of a precision.

    Args:
        model: A `GroundingDinoForObjectDetection` or `MMGroundingDinoForObjectDetection` in float32.
        precision: `exact`, `balanced` or `fast`.
        compile_: Whether to compile the layers of the encoder.
        backend: What runs the image backbone.
        dtype: Type that weights and activations are converted to.

    Returns:
        The network to run instead of the model.
    """
    import torch

    device = model.device
    fold_text_projections(model)
    use_fused_attention(model)
    if device.type == "cpu":
        use_embedding_bag(model)
        chunk_encoder_feed_forwards(model)
        if backend.backend == "torch":
            chunk_feed_forwards(model.model.backbone)
    else:
        sample_without_transfers(model)
        keep_window_masks(model.model.backbone)
    with without_tf32():
        network = network_of(model)
    if backend.backend != "torch":
        convert_backbone(model.model.backbone.conv_encoder.model, backend, precision)
    if dtype != "float32":
        network.to_dtype(getattr(torch, dtype))
    elif precision != "exact" and not has_bfloat16(device):
        log.warning("precision=%s runs as exact: %s has no fast bfloat16 matmul", precision, device)
    elif precision != "exact" and device.type == "cuda":
        network.to_dtype(torch.bfloat16)
    elif precision != "exact":
        _use_bfloat16(model, precision, backend)
    if compile_:
        for i, layer in enumerate(model.model.encoder.layers):
            compile_forward(layer.fusion_layer, f"fusion {i} of the detector's encoder", dynamic=True)
            compile_forward(layer.deformable_layer, f"layer {i} of the detector's encoder", dynamic=True)
    return network


def _use_bfloat16(model: Any, precision: Precision, backend: BackendSettings) -> None:
    """Apply the patches that compute in bfloat16 on the CPU."""
    if backend.backend == "torch":
        use_bfloat16_linears(model.model.backbone)
        if precision == "fast":
            use_bfloat16_window_attention(model)
    use_bfloat16_encoder_feed_forwards(model)
    if precision == "fast":
        use_bfloat16_projections(model)


# Fusion of image and text


def fold_text_projections(model: nn.Module) -> int:
    """Fold text into the projections of the attention between image and text.

    Replaces `GroundingDinoBiMultiHeadAttention.forward` (and MM-Grounding-DINO's), which projects n image tokens from
    256 to 1024 dimensions to multiply them with the keys of t text tokens. Folded into the projection, the keys of h
    heads are a matrix of 256 by h*t that is multiplied with the image tokens as they are; likewise the values with
    the output projection. Image values are projected after they are summed by attention weight, t vectors instead of n,
    since the weights sum to 1. Equal up to rounding (1e-5 in float32).

    Returns:
        Number of layers that were patched.
    """
    import torch

    count = 0
    names = ("GroundingDinoBiMultiHeadAttention", "MMGroundingDinoBiMultiHeadAttention")
    for module in modules_of_class(model, *names):
        trial = TrialInputs(module.vision_proj.weight)
        inputs = (trial.normal(2, 9, module.vision_dim), trial.normal(2, 3, module.text_dim))
        masks = {  # true where padded
            "vision_attention_mask": torch.arange(9, device=trial.device)[None].expand(2, 9) > 6,
            "text_attention_mask": torch.arange(3, device=trial.device)[None].expand(2, 3) > 1,
        }
        count += patch_forward(module, _folded_bi_attention, inputs, trial.tolerance, "fold_text_projections", **masks)
    return count


def _folded_bi_attention(
    self: Any,
    vision_features: Tensor,
    text_features: Tensor,
    vision_attention_mask: Tensor | None = None,
    text_attention_mask: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Replace `GroundingDinoBiMultiHeadAttention.forward`; see `fold_text_projections`."""
    import torch

    b, n, width = vision_features.shape
    t, heads, size = text_features.shape[1], self.num_heads, self.head_dim
    if heads * t >= self.embed_dim:  # the folded matrices would be larger than the projections
        return type(self).forward(  # type: ignore[no-any-return]
            self, vision_features, text_features, vision_attention_mask, text_attention_mask
        )
    keys = self.text_proj(text_features).view(b, t, heads, size) * self.scale
    folded_keys = torch.einsum("bthd,hdw->bhtw", keys, self.vision_proj.weight.view(heads, size, width))
    bias = torch.einsum("bthd,hd->bht", keys, self.vision_proj.bias.view(heads, size)).reshape(b, heads * t, 1)
    # Image tokens are last, so that the softmax over the few text tokens runs on long contiguous rows.
    logits = torch.baddbmm(bias, folded_keys.reshape(b, heads * t, width), vision_features.transpose(1, 2))
    logits = (logits - logits.max()).clamp_(-50000, 50000)  # (b, heads * t, n)

    to_image = (logits - logits.amax(-1, keepdim=True)).clamp_(-50000, 50000)  # from text to the image
    if vision_attention_mask is not None:
        to_image = to_image.masked_fill(vision_attention_mask[:, None], float("-inf"))
    to_image = to_image.softmax(-1)
    pooled = torch.bmm(to_image, vision_features).view(b, heads, t, width)
    text_out = torch.einsum("bhtw,hdw->bthd", pooled, self.values_vision_proj.weight.view(heads, size, width))
    text_out = self.out_text_proj((text_out + self.values_vision_proj.bias.view(heads, size)).reshape(b, t, -1))

    to_text = logits.view(b, heads, t, n)  # from the image to text
    if text_attention_mask is not None:
        to_text = to_text.masked_fill(text_attention_mask[:, None, :, None], float("-inf"))
    to_text = to_text.softmax(2).view(b, heads * t, n)
    values = self.values_text_proj(text_features).view(b, t, heads, size)
    folded_values = torch.einsum("bthd,whd->bhtw", values, self.out_vision_proj.weight.view(width, heads, size))
    folded_values = folded_values.reshape(b, heads * t, width)
    vision_out = torch.baddbmm(self.out_vision_proj.bias, to_text.transpose(1, 2), folded_values)
    vision_weights = to_text.view(b * heads, t, n).transpose(1, 2)
    return (vision_out, vision_weights), (text_out, to_image.view(b * heads, t, n))


# Deformable attention


def use_embedding_bag(model: nn.Module) -> int:
    """Sample deformable attention with `embedding_bag`.

    Replaces `GroundingDinoMultiscaleDeformableAttention.forward` (and MM-Grounding-DINO's), which samples a map per
    level and head with `grid_sample`, stacks all samples and sums them by attention weight. Here the sum of a query is
    one bag: the four corners around each sampling point are rows of a table of values, and bilinear weight times
    attention weight is the weight of a row, so only the sum is written. Offsets are kept in pixels, which upstream
    divides by the size of a map and multiplies by it again. Equal up to rounding (1e-5), on the CPU. Models in 16 bits
    are sampled in float32 too: PyTorch's own sampling on the CPU returns NaN in bfloat16.

    Returns:
        Number of layers that were patched.
    """
    return _patch_deformable_attention(model, _embedding_bag_attention, "use_embedding_bag")


def sample_without_transfers(model: nn.Module) -> int:
    """Sample deformable attention with `deformable_attention.sample_maps`, in one kernel on CUDA.

    Replaces the same `forward` as `use_embedding_bag`, which also reads the shapes of the maps back from the device.
    Attention weights, which the layers discard, are None. Equal up to rounding (1e-5 in float32).

    Returns:
        Number of layers that were patched.
    """
    return _patch_deformable_attention(model, _sampled_attention, "sample_without_transfers")


def _patch_deformable_attention(model: nn.Module, forward: Callable[..., Any], patch_name: str) -> int:
    """Patch the layers for which a new forward returns the same for points and for boxes as references."""
    count = 0
    names = ("GroundingDinoMultiscaleDeformableAttention", "MMGroundingDinoMultiscaleDeformableAttention")
    for module in modules_of_class(model, *names):
        is_equal = []
        for kwargs, queries in _deformable_trials(module):
            vars(module).pop("forward", None)
            is_equal.append(patch_forward(module, forward, (queries,), 1e-5, patch_name, **kwargs))
        if not all(is_equal):
            vars(module).pop("forward", None)
        count += all(is_equal)
    return count


def _deformable_trials(module: Any) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield trial inputs of deformable attention: as in the encoder, and as in the decoder."""
    import torch

    trial = TrialInputs(module.value_proj.weight)
    sizes = [(5 - i % 4, 3 + i % 2) for i in range(module.n_levels)]
    n = sum(h * w for h, w in sizes)
    queries, features = trial.normal(2, 7, module.d_model), trial.normal(2, n, module.d_model)
    is_image = torch.ones(2, n, dtype=torch.bool, device=trial.device)
    is_image[1, n - 4 :] = False
    kwargs = {
        "attention_mask": is_image,
        "encoder_hidden_states": features,
        "position_embeddings": trial.normal(2, 7, module.d_model),
        "spatial_shapes": torch.tensor(sizes, device=trial.device),
        "spatial_shapes_list": sizes,
    }
    for coordinates in (2, 4):  # points in the encoder, boxes in the decoder
        reference_points = trial.uniform(2, 7, module.n_levels, coordinates) * 1.4 - 0.2  # some are outside the image
        yield {**kwargs, "reference_points": reference_points}, queries


def _sampled_attention(
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
) -> tuple[Tensor, None]:
    """Replace `GroundingDinoMultiscaleDeformableAttention.forward`; see `sample_without_transfers`."""
    if position_embeddings is not None:
        hidden_states = hidden_states + position_embeddings
    value = self.value_proj(encoder_hidden_states)
    if attention_mask is not None:
        value = value.masked_fill(~attention_mask[..., None], 0.0)
    value = value.view(*value.shape[:2], self.n_heads, -1)
    offsets, logits = self.sampling_offsets(hidden_states), self.attention_weights(hidden_states)
    out = sample_maps(value, spatial_shapes_list, spatial_shapes, offsets, logits, reference_points)
    return self.output_proj(out), None


def _embedding_bag_attention(
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
    """Replace `GroundingDinoMultiscaleDeformableAttention.forward`; see `use_embedding_bag`."""
    import torch
    from torch.nn.functional import linear

    if position_embeddings is not None:
        hidden_states = hidden_states + position_embeddings
    b, q, _ = hidden_states.shape
    heads, levels, points = self.n_heads, self.n_levels, self.n_points
    value = self.value_proj(encoder_hidden_states).float()
    if attention_mask is not None and not attention_mask.all():
        value = value.masked_fill(~attention_mask[..., None], 0.0)
    weights = self.attention_weights(hidden_states).float().view(b, q, heads, levels * points).softmax(-1)
    reference_points = reference_points.float()
    # Reorder the projection, so that all x offsets come before all y offsets.
    weight, bias = (
        p.view(-1, 2, *p.shape[1:]).transpose(0, 1).flatten(0, 1) for p in self.sampling_offsets.parameters()
    )
    offsets = list(linear(hidden_states, weight, bias).float().view(b, q, 2, heads, levels * points).unbind(2))
    references = []
    for axis in range(2):
        side = torch.tensor([size[1 - axis] for size in spatial_shapes_list], dtype=value.dtype)
        if reference_points.shape[-1] == 4:
            scale = reference_points[..., 2 + axis] * (side * (0.5 / points))
            offsets[axis] = offsets[axis] * scale.repeat_interleave(points, -1)[:, :, None]
        references.append((reference_points[..., axis] * side - 0.5).repeat_interleave(points, -1))
    value = value.view(b, -1, heads, self.d_model // heads)
    out = sample_with_embedding_bag(value, spatial_shapes_list, offsets, references, weights)
    return self.output_proj(out.to(hidden_states.dtype)), weights.view(b, q, heads, levels, points)


def sample_with_embedding_bag(
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    offsets: Sequence[Tensor],
    references: Sequence[Tensor],
    weights: Tensor,
) -> Tensor:
    """Sample maps bilinearly and sum the samples by weight, in float32 on the CPU.

    Args:
        value: The maps, flattened and concatenated, `(b, n, heads, width)`.
        sizes: Height and width of each map.
        offsets: x and y in pixels of the map, each `(b, q, heads, levels * points)`.
        references: Reference points that the offsets start from, each `(b, q, levels * points)`; the center of the
            first pixel is 0.
        weights: Weights of the samples, with the shape of the offsets.

    Returns:
        `(b, q, heads * width)`.
    """
    from torch.nn.functional import embedding_bag

    b, _, heads, width = value.shape
    q, count = weights.shape[1], weights.shape[3]
    table, starts = _pad_maps(value, sizes)
    rows = table.view(-1, width)
    layout = _TableLayout.of(sizes, starts, heads, count // len(sizes), value.dtype)
    out = value.new_empty(b, q, heads * width)
    for i in range(b):
        for begin in range(0, q, QUERY_BLOCK):
            block = slice(begin, begin + QUERY_BLOCK)
            weight = weights[i, block].reshape(-1, heads * count)
            positions = [
                (offset[i, block] + reference[i, block, None]).view(len(weight), -1)
                for offset, reference in zip(offsets, references, strict=True)
            ]
            index, corner_weights = layout.corners(positions, weight)
            index += i * table.shape[1] * heads
            bags = embedding_bag(
                index.view(len(weight) * heads, -1),
                rows,
                per_sample_weights=corner_weights.view(len(weight) * heads, -1),
                mode="sum",
            )
            out[i, block] = bags.view(len(weight), heads * width)
    return out


def _pad_maps(value: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, list[float]]:
    """Pad each map with a border of zeros, the value of all samples outside of it.

    Returns:
        The maps, flattened and concatenated, `(b, m, heads, width)`, and the position at which each begins.
    """
    b, _, heads, width = value.shape
    spare = max(w for _, w in sizes) + 4  # for the corners below the last map, whose weight is zero
    table = value.new_empty(b, sum((h + 2) * (w + 2) for h, w in sizes) + spare, heads, width)
    starts, begin, end = [], 0, 0
    for h, w in sizes:
        padded = table[:, end : end + (h + 2) * (w + 2)].view(b, h + 2, w + 2, heads, width)
        padded[:, 1:-1, 1:-1] = value[:, begin : begin + h * w].view(b, h, w, heads, width)
        for edge in (padded[:, 0], padded[:, -1], padded[:, :, 0], padded[:, :, -1]):
            edge.zero_()
        starts.append(float(end))
        begin, end = begin + h * w, end + (h + 2) * (w + 2)
    table[:, end:].zero_()
    return table, starts


@dataclass(frozen=True)
class _TableLayout:
    """How sampling points map to rows of the table of padded maps.

    All tensors are `(heads * levels * points,)`, so that PyTorch works on long rows. Rows are computed in float32,
    which holds integers up to 2^24 exactly.

    Attributes:
        sides: Width and height of the map of each point.
        strides: Rows of the table per row of the map.
        origins: Row of the table of pixel (0, 0).
        heads: Number of heads.
    """

    sides: tuple[Tensor, Tensor]
    strides: Tensor
    origins: Tensor
    heads: int

    @classmethod
    def of(
        cls, sizes: Sequence[tuple[int, int]], starts: Sequence[float], heads: int, points: int, dtype: Any
    ) -> _TableLayout:
        """Lay out the maps of `_pad_maps`."""
        import torch

        heights, widths = (
            torch.tensor(sides, dtype=dtype).repeat_interleave(points).repeat(heads)
            for sides in zip(*sizes, strict=True)
        )
        strides = (widths + 2) * heads
        origins = torch.tensor(starts).repeat_interleave(points).repeat(heads) * heads
        origins += torch.arange(float(heads)).repeat_interleave(len(sizes) * points) + strides + heads
        return cls((widths, heights), strides, origins, heads)

    def corners(self, positions: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the four corners of each sampling point.

        Args:
            positions: x and y in pixels, each `(n, heads * levels * points)`; changed in place.
            weight: Attention weights of the same shape.

        Returns:
            Rows of the table, and their weights, both `(n, heads, 4, levels * points)`.
        """
        import torch

        fractions, floors = [], []
        for position, side in zip(positions, self.sides, strict=True):
            clamped = position.clamp_(min=-1)
            clamped = torch.minimum(clamped, side, out=clamped)
            floors.append(clamped.floor())
            fractions.append(clamped.sub_(floors[-1]))
        right, lower = fractions  # weights of the right and of the lower corners
        upper_left = torch.addcmul(self.origins, floors[1], self.strides).add_(floors[0], alpha=self.heads)
        upper_left = upper_left.to(torch.int32)
        lower = lower.mul_(weight)
        upper, left = weight - lower, 1 - right
        n, heads = len(weight), self.heads
        index = upper_left.new_empty(n, heads, 4, weight.shape[1] // heads)
        weights = weight.new_empty(index.shape)
        steps: list[Any] = [0, heads, self.strides.to(torch.int32), (self.strides + heads).to(torch.int32)]
        shares = ((upper, left), (upper, right), (lower, left), (lower, right))
        for corner, (step, (vertical, horizontal)) in enumerate(zip(steps, shares, strict=True)):
            index[:, :, corner] = (upper_left + step).view(n, heads, -1)
            weights[:, :, corner] = (vertical * horizontal).view(n, heads, -1)
        return index, weights


# Attention between queries


def use_fused_attention(model: nn.Module) -> int:
    """Compute the attention between queries, and from queries to text, with `scaled_dot_product_attention`.

    Replaces `GroundingDinoMultiheadAttention.forward` (and MM-Grounding-DINO's). The attention matrix is not
    materialized. Attention weights, which the layers discard, are None. Equal up to rounding (1e-5 in float32).

    Returns:
        Number of layers that were patched.
    """
    import torch

    count = 0
    for module in modules_of_class(model, "GroundingDinoMultiheadAttention", "MMGroundingDinoMultiheadAttention"):
        weight = module.query.weight
        trial = TrialInputs(weight)
        inputs = [trial.normal(2, length, weight.shape[1]) for length in (9, 5, 5)]
        mask = torch.zeros(2, 1, 9, 5, device=trial.device, dtype=trial.dtype)
        mask[1, ..., 3:] = torch.finfo(trial.dtype).min
        count += patch_forward(
            module, _fused_attention, inputs, trial.tolerance, "use_fused_attention", attention_mask=mask
        )
    return count


def _fused_attention(
    self: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
) -> tuple[Any, ...]:
    """Replace `GroundingDinoMultiheadAttention.forward`; see `use_fused_attention`."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (
        projection(x).view(len(x), -1, self.num_attention_heads, self.attention_head_size).transpose(1, 2)
        for projection, x in ((self.query, queries), (self.key, keys), (self.value, values))
    )
    out = scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
    out = self.out_proj(out.transpose(1, 2).flatten(2))
    return (out, None) if output_attentions else (out,)


# Feed-forward networks of the encoder


def chunk_encoder_feed_forwards(model: Any) -> int:
    """Run the feed-forward networks of the encoder on chunks of rows.

    Replaces `GroundingDinoDeformableLayer.forward` (and MM-Grounding-DINO's), whose feed-forward network is not a
    separate module; otherwise as `patching.chunk_feed_forwards`. The result is the same.

    Returns:
        Number of layers that were patched.
    """
    import torch

    count = 0
    for layer in model.model.encoder.layers:
        deformable = layer.deformable_layer
        trial, attention = TrialInputs(deformable.fc1.weight), deformable.self_attn
        sizes = [(3, 2)] * attention.n_levels
        n = sum(h * w for h, w in sizes)
        kwargs = {
            "attention_mask": torch.ones(2, n, dtype=torch.bool, device=trial.device),
            "position_embeddings": trial.normal(2, n, attention.d_model),
            "reference_points": trial.uniform(2, n, attention.n_levels, 2),
            "spatial_shapes": torch.tensor(sizes, device=trial.device),
            "spatial_shapes_list": sizes,
            "level_start_index": torch.arange(attention.n_levels, device=trial.device) * 6,
        }
        x = trial.normal(2, n, attention.d_model)
        count += patch_forward(
            deformable, _chunked_deformable_layer, (x,), trial.tolerance, "chunk_encoder_feed_forwards", **kwargs
        )
    return count


def _chunked_deformable_layer(self: Any, *inputs: Any, **kwargs: Any) -> Any:
    """Replace `GroundingDinoDeformableLayer.forward`; see `chunk_encoder_feed_forwards`.

    The original calls `fc1`, `activation_fn` and `fc2` in turn. For its duration the first two return their input, and
    the third runs the whole network.
    """
    first, activation, second = self.fc1, self.activation_fn, self.fc2
    network = FeedForward(partial(type(first).forward, first), activation, partial(type(second).forward, second))
    dtype = first.weight.dtype
    try:
        first.forward, self.activation_fn = _identity, _identity_module()
        second.forward = lambda x: chunked_feed_forward(x, network, dtype)
        return type(self).forward(self, *inputs, **kwargs)
    finally:
        self.activation_fn = activation
        for layer in (first, second):
            vars(layer).pop("forward", None)


@cache
def _identity_module() -> nn.Module:
    from torch import nn

    return nn.Identity()


def _identity(x: Tensor) -> Tensor:
    return x


# bfloat16


def use_bfloat16_encoder_feed_forwards(model: Any) -> None:
    """Make the feed-forward networks of the encoder's image branch compute in bfloat16, where they run in chunks."""
    import torch

    for layer in model.model.encoder.layers:
        if "forward" in vars(layer.deformable_layer):
            layer.deformable_layer.fc1.to(torch.bfloat16)
            layer.deformable_layer.fc2.to(torch.bfloat16)


def use_bfloat16_window_attention(model: Any) -> int:
    """Compute the window attention of Swin in bfloat16, scores and softmax included.

    Replaces `SwinAttention.forward` of transformers. Outputs differ by about 1% of the largest value; more than 3% is
    rejected.

    Returns:
        Number of layers that were patched.
    """
    import torch

    count = 0
    for module in modules_of_class(model.model.backbone, "SwinAttention"):
        size = module.relative_position_bias().shape[-1]
        generator = torch.Generator().manual_seed(0)  # weights are bfloat16 already, the input is not
        x = torch.randn((4, size, module.q_proj.in_features), generator=generator)
        mask = torch.zeros(2, size, size)
        mask[1, :, size // 2 :] = -100.0
        count += patch_forward(
            module, _bfloat16_swin_attention, (x,), 3e-2, "use_bfloat16_window_attention", attention_mask=mask
        )
    return count


def _bfloat16_swin_attention(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
    """Replace `SwinAttention.forward`; see `use_bfloat16_window_attention`."""
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
        by_image = scores.view(-1, len(attention_mask), *scores.shape[1:])
        by_image += attention_mask[:, None].to(scores.dtype)
    out = torch.matmul(scores.softmax(-1), v).transpose(1, 2).reshape(n, size, width)
    return linear(out, self.o_proj.weight, self.o_proj.bias).to(hidden_states.dtype), None


def use_bfloat16_projections(model: Any) -> None:
    """Make the projections of deformable attention multiply in bfloat16; sampling positions stay in float32."""
    attentions = [layer.deformable_layer.self_attn for layer in model.model.encoder.layers]
    for attention in attentions:
        for linear in (attention.value_proj, attention.output_proj, attention.attention_weights):
            use_bfloat16_matmul(linear)
    for layer in model.model.decoder.layers:  # only values are of the whole image; the rest is of a few queries
        use_bfloat16_matmul(layer.encoder_attn.value_proj)
