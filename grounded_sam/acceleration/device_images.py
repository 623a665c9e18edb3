"""Prepare images for models on the device that runs them, with the results of the models' own processors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.patching import to_device
from grounded_sam.acceleration.resizing import equals_torchvision, resize_like_pillow, resize_like_torchvision
from grounded_sam.acceleration.uploads import DeviceCopy, copy_to_device, upload

if TYPE_CHECKING:
    from torch import Tensor

#: Mean and standard deviation of ImageNet, for values from 0 to 1.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalization_table(mean: Any, std: Any) -> NDArray[np.floating[Any]]:
    """Return what each value of each channel is normalized to, `(256, 3)`.

    Args:
        mean: Mean of each channel, for values from 0 to 1.
        std: Standard deviation of each channel.

    >>> normalization_table(np.zeros(3, np.float32), np.ones(3, np.float32))[255].tolist()
    [1.0, 1.0, 1.0]
    """
    values = np.arange(256, dtype=np.float32)[:, None].repeat(3, axis=1) / 255
    return np.asarray((values - mean) / std)


def normalize(image: Tensor, table: Tensor) -> Tensor:
    """Look up all pixels in a table, since devices divide in other ways than the CPU.

    Args:
        image: `(..., 3) uint8`.
        table: Result of each value of each channel, `(256, 3)`, on the same device.

    Returns:
        A tensor `(..., 3)` of the type of the table.

    >>> import torch
    >>> normalize(torch.tensor([[0, 1, 2]], dtype=torch.uint8), torch.arange(768.0).view(256, 3)).tolist()
    [[0.0, 4.0, 8.0]]
    """
    import torch

    places = image.to(torch.int32) * 3 + torch.arange(3, dtype=torch.int32, device=image.device)
    return table.flatten().index_select(0, places.flatten()).view(image.shape)


def square_input(image: NDArray[np.uint8], side: int, device: Any, mean: Any, std: Any) -> Tensor:
    """Resize an image with the bicubic filter of Pillow and normalize it, on a device.

    Bits and strides equal those of `trackers.prompting.to_pixels` on the CPU.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        side: Height and width of the result in pixels.
        device: A `torch.device` or its name.
        mean: Mean of each channel, for values from 0 to 1.
        std: Standard deviation of each channel.

    Returns:
        A tensor `(1, 3, side, side)`.
    """
    square = resize_like_pillow(upload(image, device), (side, side), "bicubic")
    return normalize(square, _table_on(normalization_table(mean, std), square.device)).permute(2, 0, 1)[None]


def sam2_image_input(image: NDArray[np.uint8], side: int, device: Any) -> Tensor:
    """Resize an image in float32 and normalize it, as `SAM2Transforms` of sam2 does, on a device.

    Bits equal those of sam2 on the CPU; elsewhere sums are rounded in another order.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        side: Height and width of the model's input in pixels.
        device: A `torch.device` or its name.

    Returns:
        A tensor `(1, 3, side, side) float32`.

    >>> sam2_image_input(np.zeros((4, 6, 3), np.uint8), 8, "cpu").shape
    torch.Size([1, 3, 8, 8])
    """
    import torch

    pixels = upload(image, device).permute(2, 0, 1)[None].contiguous().float()
    pixels /= torch.full((), 255.0, device=pixels.device)  # CUDA would multiply by the reciprocal of a number
    if pixels.shape[-2:] != (side, side):
        pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    mean, std = _table_on(np.stack([IMAGENET_MEAN, IMAGENET_STD])[..., None, None], pixels.device)
    return pixels.sub_(mean).div_(std)


def grounding_dino_size(processor: Any, size_hw: tuple[int, int]) -> tuple[int, int] | None:
    """Return the height and width in pixels that an image processor of transformers resizes an image to.

    Args:
        processor: A `GroundingDinoImageProcessor`.
        size_hw: Height and width of the image.

    Returns:
        The size without padding; None where `grounding_dino_input` leaves the image to the processor.
    """
    from transformers import GroundingDinoImageProcessor
    from transformers.image_transforms import get_size_with_aspect_ratio

    steps = (processor.do_resize, processor.do_rescale, processor.do_normalize, processor.do_pad)
    size = dict(processor.size)
    usual = type(processor) is GroundingDinoImageProcessor and all(steps)
    usual = usual and processor.resample == 2 and getattr(processor, "pad_size", None) is None  # 2: bilinear
    if not usual or set(size) != {"shortest_edge", "longest_edge"} or not all(size.values()):
        return None
    height, width = get_size_with_aspect_ratio(size_hw, size["shortest_edge"], size["longest_edge"])
    return (height, width) if height and width else None


def grounding_dino_input(images: Sequence[NDArray[np.uint8]], processor: Any, device: Any) -> Tensor:
    """Resize and normalize images as an image processor of Grounding DINO does on the CPU, on a device.

    Images are padded with zeros at the right and bottom to the size of the largest; see `grounding_dino_size`. What the
    processor would do in an unusual way is left to it. Copies of the images on a CUDA device are kept, see `upload`.

    Args:
        images: RGB, `(H, W, 3) uint8` each.
        processor: A `GroundingDinoImageProcessor`.
        device: A `torch.device` or its name.

    Returns:
        `pixel_values`, `(N, 3, h, w) float32`, with the bits of the processor.
    """
    import torch

    device = torch.device(device)
    sizes = [grounding_dino_size(processor, (image.shape[0], image.shape[1])) for image in images]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or (device.type == "cuda" and not equals_torchvision()):
        inputs = processor(list(images), input_data_format="channels_last", return_tensors="pt")
        return to_device(inputs["pixel_values"], device)
    prepare = dino_image_on_device if device.type == "cuda" else dino_image_on_cpu
    parts = [prepare(image, size, processor, device) for image, size in zip(images, known, strict=True)]
    if len(parts) == 1:
        return parts[0][None].to(device)
    height, width = (max(side) for side in zip(*known, strict=True))
    batch = torch.zeros((len(parts), 3, height, width), device=parts[0].device)
    for part, padded in zip(parts, batch, strict=True):
        padded[:, : part.shape[1], : part.shape[2]] = part
    return batch.to(device)


def dino_image_on_cpu(image: NDArray[np.uint8], size_hw: tuple[int, int], processor: Any, _device: Any) -> Tensor:
    """Return an image `(3, h, w) float32` as the processor prepares it, with its own functions.

    It is faster because the image is not rearranged into planes before it is resized.
    """
    from torchvision.transforms.v2.functional import resize_image

    resized = resize_image(upload(image, "cpu").permute(2, 0, 1), list(size_hw), antialias=True)
    return _rescale_and_normalize(processor, resized.contiguous())


def dino_image_on_device(image: NDArray[np.uint8], size_hw: tuple[int, int], processor: Any, device: Any) -> Tensor:
    """Return an image `(3, h, w) float32` as the processor prepares it on the CPU, computed on a device."""
    resized = resize_like_torchvision(upload(image, device, keep=True), size_hw)
    table = _table_on(_processor_table(processor), resized.device)
    return normalize(resized, table).permute(2, 0, 1).contiguous()


def _rescale_and_normalize(processor: Any, planes: Tensor) -> Tensor:
    """Convert `(3, h, w) uint8` to float32 as an image processor of transformers does."""
    mean, std = processor.image_mean, processor.image_std
    return processor.rescale_and_normalize(planes, True, processor.rescale_factor, True, mean, std)  # type: ignore[no-any-return]


@lru_cache(maxsize=4)
def _processor_table(processor: Any) -> NDArray[np.float32]:
    """Return what an image processor normalizes each value of each channel to, `(256, 3)`."""
    import torch

    values = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256).contiguous()
    return _rescale_and_normalize(processor, values)[:, 0].T.numpy()  # type: ignore[no-any-return]


def _table_on(table: NDArray[np.floating[Any]], device: Any) -> Tensor:
    """Return an array on a device, copied there once."""
    return _copied_once(table.tobytes(), table.dtype.str, table.shape, str(device)).get()


@lru_cache(maxsize=16)
def _copied_once(data: bytes, dtype: str, shape: tuple[int, ...], device: str) -> DeviceCopy:
    return copy_to_device(np.frombuffer(data, dtype).reshape(shape), device)
