"""Multi-scale deformable attention as one Triton kernel, and the same in plain PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from grounded_sam.acceleration.patching import TrialInputs, max_relative_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

#: Queries of a program, and warps that run it.
QUERY_BLOCK, NUM_WARPS = 32, 4


def sample_maps(
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    shapes: Tensor,
    offsets: Tensor,
    logits: Tensor,
    references: Tensor,
) -> Tensor:
    """Sample maps bilinearly around reference points and sum the samples by attention weight.

    Positions and sums are computed in float32. On CUDA this is one kernel, if `kernel_works`; elsewhere PyTorch.

    Args:
        value: The maps, flattened and concatenated, `(b, n, heads, width)`, in any dtype.
        sizes: Height and width of each map.
        shapes: The same on the device, `(levels, 2)` of int64.
        offsets: Offsets x, y of the sampling points from their reference, as the linear layer returns them,
            `(b, q, heads * levels * points * 2)`: in pixels of a map, or in parts of a box if references are boxes.
        logits: Attention weights before the softmax over levels and points, `(b, q, heads * levels * points)`.
        references: Points x, y or boxes cx, cy, w, h, normalized to 0...1, `(b, q, levels, 2 or 4)` of float32.

    Returns:
        `(b, q, heads * width)` in the dtype of `value`.

    >>> import torch
    >>> value = torch.arange(4.0).view(1, 4, 1, 1)  # a map of 2x2 pixels
    >>> center = torch.full((1, 1, 1, 2), 0.5)
    >>> sample_maps(value, [(2, 2)], torch.tensor([[2, 2]]), torch.zeros(1, 1, 2), torch.zeros(1, 1, 1), center)
    tensor([[[1.5000]]])
    """
    if value.is_cuda and kernel_works(value.device):
        return run_kernel(value, shapes, offsets, logits, references)
    return sample_with_pytorch(value, sizes, offsets, logits, references)


def sample_with_pytorch(
    value: Tensor, sizes: Sequence[tuple[int, int]], offsets: Tensor, logits: Tensor, references: Tensor
) -> Tensor:
    """Do what `sample_maps` does with `grid_sample`, without reading a value back from the device."""
    import torch
    from torch.nn.functional import grid_sample

    b, _, heads, width = value.shape
    q, levels = offsets.shape[1], len(sizes)
    weights = logits.float().view(b, q, heads, -1).softmax(-1).view(b, q, heads, levels, -1)
    points = weights.shape[-1]
    steps = offsets.float().view(b, q, heads, levels, points, 2)
    samples, start = [], 0
    for level, (h, w) in enumerate(sizes):
        reference, step = references[:, :, None, level, None].float(), steps[:, :, :, level]
        if references.shape[-1] == 4:
            grid = reference[..., :2] + step / points * reference[..., 2:] * 0.5
        else:
            grid = torch.stack((reference[..., 0] + step[..., 0] / w, reference[..., 1] + step[..., 1] / h), -1)
        maps = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(b * heads, width, h, w).float()
        grid = (2 * grid - 1).transpose(1, 2).flatten(0, 1)  # (b * heads, q, points, 2)
        samples.append(grid_sample(maps, grid, padding_mode="zeros", align_corners=False))
        start += h * w
    by_head = weights.transpose(1, 2).reshape(b * heads, 1, q, levels * points)
    out = (torch.cat(samples, -1) * by_head).sum(-1)  # (b * heads, width, q)
    return out.view(b, heads * width, q).transpose(1, 2).to(value.dtype)


def run_kernel(value: Tensor, shapes: Tensor, offsets: Tensor, logits: Tensor, references: Tensor) -> Tensor:
    """Do what `sample_maps` does with the Triton kernel, whose results have the dtype of `value`.

    Positions that are infinite or NaN count as outside of the maps.
    """
    import torch
    import triton

    b, n, heads, width = value.shape
    q, levels = offsets.shape[1], len(shapes)
    points = logits.shape[2] // (heads * levels)
    value, offsets, logits = (x.contiguous() for x in (value, offsets, logits))
    if references.stride(-1) != 1:
        references = references.contiguous()
    out = torch.empty(b, q, heads * width, device=value.device, dtype=value.dtype)
    grid = (triton.cdiv(q, QUERY_BLOCK), heads, b)
    with torch.cuda.device_of(value):  # Triton launches on the current device
        deformable_kernel()[grid](
            value,
            shapes,
            offsets,
            logits,
            references,
            out,
            q,
            n,
            *references.stride()[:3],
            heads=heads,
            levels=levels,
            points=points,
            sample_block=triton.next_power_of_2(levels * points),
            channels=width,
            channel_block=triton.next_power_of_2(width),
            boxes=references.shape[-1] == 4,
            block=QUERY_BLOCK,
            num_warps=NUM_WARPS,
        )
    return out


@cache
def deformable_kernel() -> Any:
    """Return the kernel, one program for a block of queries, a head and an image.

    Raises:
        ImportError: If Triton is not installed.
    """
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["num_queries", "num_pixels", "stride_b", "stride_q", "stride_l"])
    def kernel(  # type: ignore[no-untyped-def]
        value, shapes, offsets, logits, references, out, num_queries, num_pixels, stride_b, stride_q, stride_l,
        heads: tl.constexpr, levels: tl.constexpr, points: tl.constexpr, sample_block: tl.constexpr,
        channels: tl.constexpr, channel_block: tl.constexpr, boxes: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        q = tl.program_id(0) * block + tl.arange(0, block)
        head = tl.program_id(1)
        image = tl.program_id(2).to(tl.int64)  # tensors of large batches have more than 2^31 elements
        channel = tl.arange(0, channel_block)
        sample = tl.arange(0, sample_block)
        in_range = q < num_queries
        has_channel = channel < channels
        row = (image * num_queries + q) * heads + head
        at = logits + row[:, None] * (levels * points) + sample[None, :]
        is_sample = in_range[:, None] & (sample < levels * points)[None, :]
        scores = tl.load(at, mask=is_sample, other=float("-inf")).to(tl.float32)
        highest = tl.where(in_range, tl.max(scores, 1), 0.0)
        total = tl.where(in_range, tl.sum(tl.exp(scores - highest[:, None]), 1), 1.0)
        pixels = value + image * num_pixels * (heads * channels) + head * channels
        result = tl.zeros((block, channel_block), tl.float32)
        start = 0
        for level in range(levels):
            height = tl.load(shapes + 2 * level).to(tl.int32)
            width = tl.load(shapes + 2 * level + 1).to(tl.int32)
            center = references + image * stride_b + q * stride_q + level * stride_l
            center_x = tl.load(center, mask=in_range, other=0.0)
            center_y = tl.load(center + 1, mask=in_range, other=0.0)
            if boxes:
                scale_x = tl.load(center + 2, mask=in_range, other=0.0) * (0.5 / points) * width
                scale_y = tl.load(center + 3, mask=in_range, other=0.0) * (0.5 / points) * height
            for point in range(points):
                index = (row * levels + level) * points + point
                x = tl.load(offsets + 2 * index, mask=in_range, other=0.0).to(tl.float32)
                y = tl.load(offsets + 2 * index + 1, mask=in_range, other=0.0).to(tl.float32)
                if boxes:
                    x, y = x * scale_x, y * scale_y
                x += center_x * width - 0.5
                y += center_y * height - 0.5
                score = tl.load(logits + index, mask=in_range, other=0.0).to(tl.float32)
                weight = tl.exp(score - highest) / total
                # Floats beyond the range of int32 have no defined conversion.
                x = tl.minimum(tl.maximum(x, -2.0), width + 1.0)
                y = tl.minimum(tl.maximum(y, -2.0), height + 1.0)
                left, upper = tl.floor(x), tl.floor(y)
                right_part, lower_part = x - left, y - upper
                for corner in tl.static_range(4):
                    column = left.to(tl.int32) + corner % 2
                    line = upper.to(tl.int32) + corner // 2
                    share = weight * (right_part if corner % 2 == 1 else 1.0 - right_part)
                    share *= lower_part if corner // 2 == 1 else 1.0 - lower_part
                    is_inside = in_range & (column >= 0) & (column < width) & (line >= 0) & (line < height)
                    place = (start + line * width + column).to(tl.int64) * (heads * channels)
                    mask = is_inside[:, None] & has_channel[None, :]
                    colors = tl.load(pixels + place[:, None] + channel[None, :], mask=mask, other=0.0)
                    result += share[:, None] * colors.to(tl.float32)
            start += height * width
        mask = in_range[:, None] & has_channel[None, :]
        tl.store(out + row[:, None] * channels + channel[None, :], result.to(out.dtype.element_ty), mask=mask)

    return kernel


@cache
def kernel_works(device: torch.device) -> bool:
    """Return whether Triton is installed and the kernel returns on a device what PyTorch does; log it if not."""
    try:
        errors = [kernel_error(device, dtype, coordinates) for dtype in (None, "bfloat16") for coordinates in (2, 4)]
    except Exception as failure:  # Triton needs a C compiler and a driver, and its compiler fails in many ways
        reason = " ".join(str(failure).split())[:200]
        log.warning("deformable attention runs without its kernel: %s", reason or type(failure).__name__)
        return False
    if not max(errors) <= 1e-2 or not max(errors[:2]) <= 1e-5:
        log.warning("deformable attention runs without its kernel: its error would be %.1e", max(errors))
        return False
    return True


def kernel_error(device: torch.device, dtype: str | None = None, coordinates: int = 2) -> float:
    """Return the largest difference between kernel and PyTorch on random input, relative to the largest value.

    Args:
        device: Where to run them.
        dtype: Dtype of values, offsets and logits: `bfloat16` or `float16`; None for float32.
        coordinates: 2 for points as references, 4 for boxes.
    """
    import torch

    trial = TrialInputs(torch.empty(0, device=device))
    sizes = [(5, 3), (1, 4), (2, 2)]
    b, q, heads, points, width = 2, 37, 2, 3, 32
    shapes = torch.tensor(sizes, device=device)
    value = trial.normal(b, sum(h * w for h, w in sizes), heads, width)
    offsets = 2 * trial.normal(b, q, heads * len(sizes) * points * 2)
    logits = trial.normal(b, q, heads * len(sizes) * points)
    references = trial.uniform(b, q, len(sizes), coordinates) * 1.4 - 0.2
    value, offsets, logits = (x.to(getattr(torch, dtype or "float32")) for x in (value, offsets, logits))
    expected = sample_with_pytorch(value.float(), sizes, offsets, logits, references)
    return max_relative_error([expected], [run_kernel(value, shapes, offsets, logits, references)])
