"""Resize images on any device with the results of Pillow and torchvision on the CPU, bit for bit.

Both filter rows and columns one after the other, in integers: pixels are multiplied by weights in fixed point, and each
sum is rounded and clipped to 8 bits. Sums of integers do not depend on their order, so a device can compute the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.uploads import DeviceCopy, copy_to_device

if TYPE_CHECKING:
    from torch import Tensor

Filter = Literal["bilinear", "bicubic"]

log = logging.getLogger(__name__)

#: Bits after the binary point of a weight: in Pillow, and the most in torchvision, whose weights have 16 bits.
BITS = 22
#: Pixels on either side that a filter reaches to.
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
#: Values that one program of the Triton kernel computes.
BLOCK = 1024


class Taps(NamedTuple):
    """What each pixel of a resized row is the weighted sum of.

    Attributes:
        indices: `(k, n_out) int32`, pixels of the row that is resized.
        weights: `(k, n_out) int32`, zero where a pixel has fewer than k taps.
        bits: Bits after the binary point of the weights.
    """

    indices: NDArray[np.int32]
    weights: NDArray[np.int32]
    bits: int


def filter_taps(n_in: int, n_out: int, kind: Filter, int16: bool = False) -> Taps:
    """Compute the taps that a row is resized with.

    Args:
        n_in: Pixels of the row.
        n_out: Pixels of the resized row.
        kind: Filter, widened by the scale if the row becomes shorter.
        int16: Weights of torchvision, with as many bits as fit into 16; else those of Pillow.

    >>> taps = filter_taps(2, 4, "bilinear")
    >>> (taps.weights / 2**taps.bits).T.tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [1.0, 0.0]]
    """
    scale = n_in / n_out
    widening = max(scale, 1.0)
    support = SUPPORT[kind] * widening
    centers = (np.arange(n_out) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), n_in)  # exclusive
    offsets = np.arange((last - first).max())[:, None]
    values = _filter((offsets + first - centers + 0.5) * (1 / widening), kind)
    values[offsets >= last - first] = 0
    values /= values.cumsum(0)[-1]  # a cumulative sum adds one after the other, as the two libraries do
    bits = BITS
    if int16:
        bits = next((b for b in range(BITS) if int(0.5 + values.max() * (1 << (b + 1))) >= 1 << 15), BITS)
    fixed = values * (1 << bits)
    weights = np.trunc(np.where(fixed < 0, fixed - 0.5, fixed + 0.5)).astype(np.int32)
    return Taps(np.minimum(offsets + first, n_in - 1).astype(np.int32), weights, bits)


def _filter(x: NDArray[np.float64], kind: Filter) -> NDArray[np.float64]:
    """Evaluate a filter at distances from its center."""
    x = np.abs(x)
    if kind == "bilinear":
        return np.maximum(1 - x, 0)
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    return np.where(x < 1, near, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0))


def resize_like_pillow(image: Tensor, size_hw: tuple[int, int], kind: Filter) -> Tensor:
    """Resize images as `PIL.Image.Image.resize` does.

    Args:
        image: `(H, W, C) uint8` or `(N, H, W, C) uint8`, on any device.
        size_hw: Height and width of the result in pixels.
        kind: `bilinear` or `bicubic`.

    Returns:
        A tensor `(h, w, C) uint8` or `(N, h, w, C) uint8` on the same device.

    >>> import torch
    >>> resize_like_pillow(torch.tensor([[[0], [255]]], dtype=torch.uint8), (1, 4), "bilinear").flatten().tolist()
    [0, 64, 191, 255]
    """
    import PIL

    height, width = image.shape[-3:-1]
    # Since 13.0, Pillow resizes columns first if that leaves much fewer rows.
    fewer_rows = height - size_hw[0] > max(2 * (width - size_hw[1]), 0)
    columns_first = fewer_rows and int(PIL.__version__.split(".")[0]) >= 13
    return _resize(image, size_hw, kind, int16=False, columns_first=columns_first)


@lru_cache(maxsize=1)
def equals_pillow() -> bool:
    """Return whether `resize_like_pillow` and the installed Pillow agree; if not, log a warning."""
    import torch
    from PIL import Image

    def resize(image: NDArray[np.uint8], size_hw: tuple[int, int]) -> bool:
        expected = np.asarray(Image.fromarray(image).resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC))
        return np.array_equal(resize_like_pillow(torch.from_numpy(image), size_hw, "bicubic").numpy(), expected)

    return _agree(resize, "Pillow")


@lru_cache(maxsize=1)
def equals_torchvision() -> bool:
    """Return whether `resize_like_torchvision` and the installed torchvision agree; if not, log a warning."""
    import torch
    from torchvision.transforms.v2.functional import resize_image

    def resize(image: NDArray[np.uint8], size_hw: tuple[int, int]) -> bool:
        pixels = torch.from_numpy(image)
        expected = resize_image(pixels.permute(2, 0, 1), list(size_hw), antialias=True).permute(1, 2, 0)
        return torch.equal(resize_like_torchvision(pixels, size_hw), expected)

    return _agree(resize, "torchvision")


def _agree(same: Callable[[NDArray[np.uint8], tuple[int, int]], bool], library: str) -> bool:
    """Compare on noise of several sizes with the library of which a resize is a copy."""
    noise = np.random.default_rng(0)
    for size_hw, new_hw in (((40, 50), (30, 60)), ((50, 40), (20, 30)), ((9, 70), (21, 33)), ((30, 20), (40, 50))):
        if not same(noise.integers(0, 256, (*size_hw, 3), np.uint8), new_hw):
            log.warning("images are resized on the CPU: this version of %s computes something else", library)
            return False
    return True


def resize_like_torchvision(image: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Resize images as torchvision does on a CPU with AVX2: bilinear, with antialiasing.

    Args:
        image: `(H, W, C) uint8` or `(N, H, W, C) uint8`, on any device.
        size_hw: Height and width of the result in pixels.

    Returns:
        A tensor `(h, w, C) uint8` or `(N, h, w, C) uint8` on the same device.
    """
    return _resize(image, size_hw, "bilinear", int16=True, columns_first=False)


def _resize(image: Tensor, size_hw: tuple[int, int], kind: Filter, int16: bool, columns_first: bool) -> Tensor:
    """Resize rows and columns; what has the right size already is left as it is."""
    for axis in (-3, -2) if columns_first else (-2, -3):
        n_in, n_out = image.shape[axis], size_hw[axis + 3]
        if n_in != n_out:
            before, after = image.shape[:axis], image.shape[axis + 1 :]
            taps, bits = _taps_on(n_in, n_out, kind, int16, str(image.device))
            resized = _resample(image.reshape(-1, n_in, after.numel()), taps, bits)
            image = resized.reshape(*before, n_out, *after)
    return image


@lru_cache(maxsize=128)
def _taps_on(n_in: int, n_out: int, kind: Filter, int16: bool, device: str) -> tuple[DeviceCopy, int]:
    """Return indices and weights on a device, `(2, k, n_out) int32`, and the bits of the weights."""
    taps = filter_taps(n_in, n_out, kind, int16)
    return copy_to_device(np.stack([taps.indices, taps.weights]), device), taps.bits


def _resample(image: Tensor, taps: DeviceCopy, bits: int) -> Tensor:
    """Resize the middle dimension of `(a, n_in, b) uint8`."""
    indices_weights = taps.get()
    if image.is_cuda and _triton_works(str(image.device)):
        return resample_with_triton(image, indices_weights, bits)
    return resample_with_torch(image, indices_weights, bits)


def resample_with_torch(image: Tensor, taps: Tensor, bits: int) -> Tensor:
    """Resize the middle dimension of a tensor, one tap at a time.

    Args:
        image: `(a, n_in, b) uint8`.
        taps: Indices and weights, `(2, k, n_out) int32`; see `Taps`.
        bits: Bits after the binary point of the weights.

    Returns:
        A tensor `(a, n_out, b) uint8`.
    """
    import torch

    size = image.shape[0], taps.shape[2], image.shape[2]
    total = torch.full(size, 1 << (bits - 1), dtype=torch.int32, device=image.device)  # one half, to round
    for indices, weights in zip(*taps, strict=True):
        total.addcmul_(image.index_select(1, indices), weights[:, None])
    return (total >> bits).clamp_(0, 255).to(torch.uint8)


def resample_with_triton(image: Tensor, taps: Tensor, bits: int) -> Tensor:
    """Resize the middle dimension of a tensor in one kernel; see `resample_with_torch`."""
    import torch
    import triton

    image = image.contiguous()
    rows, n_in, inner = image.shape
    _, count, n_out = taps.shape
    resized = image.new_empty((rows, n_out, inner))
    grid = (rows, triton.cdiv(n_out * inner, BLOCK))
    with torch.cuda.device_of(image):
        resample_kernel()[grid](image, taps, resized, n_in, n_out, inner, count, bits, BLOCK=BLOCK)
    return resized


@lru_cache(maxsize=1)
def resample_kernel() -> Any:
    """Return the Triton kernel of `resample_with_triton`."""
    import triton
    import triton.language as tl

    # Compiled once, not for every kind of number that a size can be.
    @triton.jit(do_not_specialize=["n_in", "n_out", "inner", "count", "bits"])  # type: ignore[untyped-decorator]
    def resample(image, taps, resized, n_in, n_out, inner, count, bits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        row = tl.program_id(0).to(tl.int64)  # a batch of images may have more than 2^31 values
        value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = value < n_out * inner
        pixel, channel = value // inner, value % inner
        total = tl.full((BLOCK,), 1, tl.int32) << (bits - 1)
        for k in range(count):
            index = tl.load(taps + k * n_out + pixel, mask=inside, other=0)
            weight = tl.load(taps + (count + k) * n_out + pixel, mask=inside, other=0)
            source = image + row * n_in * inner + index * inner + channel
            total += weight * tl.load(source, mask=inside, other=0).to(tl.int32)
        rounded = tl.minimum(tl.maximum(total >> bits, 0), 255).to(tl.uint8)
        tl.store(resized + row * n_out * inner + value, rounded, mask=inside)

    return resample


@lru_cache(maxsize=8)
def _triton_works(device: str) -> bool:
    """Return whether the Triton kernel runs on a device and computes the same as PyTorch; if not, log a warning."""
    import torch

    image = (torch.arange(7 * 50 * 3, device=device) * 97 % 256).to(torch.uint8).view(7, 50, 3)
    taps, bits = _taps_on(50, 21, "bicubic", False, device)
    expected = resample_with_torch(image, taps.get(), bits)
    try:
        same = torch.equal(resample_with_triton(image, taps.get(), bits), expected)
    except Exception as failure:  # Triton needs a C compiler, and a driver that it knows
        log.warning("images are resized without Triton: %s", " ".join(str(failure).split())[:200])
        return False
    if not same:
        log.warning("images are resized without Triton: its kernel computes something else")
    return same
