"""Convert frames, masks and points to the inputs of SAM 2's video models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.acceleration.device_images import IMAGENET_MEAN, IMAGENET_STD, normalization_table, square_input
from grounded_sam.acceleration.patching import to_device
from grounded_sam.acceleration.resizing import equals_pillow

if TYPE_CHECKING:
    from torch import Tensor


def to_pixels(
    image: NDArray[np.uint8], side: int, device: Any = "cpu", mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD
) -> Tensor:
    """Resize and normalize a frame, as `load_video_frames` of sam2 does (bicubic filter of Pillow).

    On CUDA, the device resizes and normalizes, with the same result.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        side: Height and width of the model's input in pixels.
        device: Device of the result.
        mean: Mean of each channel, for values from 0 to 1.
        std: Standard deviation of each channel.

    Returns:
        A tensor `(1, 3, side, side) float32`.

    >>> to_pixels(np.zeros((4, 6, 3), np.uint8), 8).shape
    torch.Size([1, 3, 8, 8])
    """
    import cv2
    import torch
    from PIL import Image

    if torch.device(device).type == "cuda" and equals_pillow():
        return square_input(image, side, device, mean, std)
    square = np.asarray(Image.fromarray(image).resize((side, side)))
    pixels = torch.from_numpy(cv2.LUT(square, normalization_table(mean, std)[None]))
    return to_device(pixels.permute(2, 0, 1)[None], device)


def to_mask_input(masks: NDArray[np.bool_], side: int, device: Any = "cpu") -> Tensor:
    """Resize masks, as `add_new_mask` of sam2 does.

    Args:
        masks: Masks, `(n, H, W) bool`.
        side: Height and width of the model's input in pixels.
        device: Device of the result.

    Returns:
        A tensor `(n, 1, side, side) float32` of zeros and ones.
    """
    import torch

    values = to_device(torch.from_numpy(np.ascontiguousarray(masks)), device)[:, None].float()
    if masks.shape[1:] != (side, side):
        values = torch.nn.functional.interpolate(values, (side, side), mode="bilinear", antialias=True)
    return (values >= 0.5).float()


def to_points(
    detections: sv.Detections, i: int, size_hw: tuple[int, int], side: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return the point prompts of detection `i`: box corners (labels 2 and 3), then clicks (1 and 0).

    Args:
        detections: Prompts; see `structures.clicks.Clicks.to_detections`.
        i: Index of the detection.
        size_hw: Height and width of the frame in pixels.
        side: Height and width of the model's input in pixels.

    Returns:
        Points `(p, 2)` in pixels of the model's input, and labels `(p,)`.

    >>> to_points(sv.Detections(xyxy=np.array([[0.0, 0, 50, 100]])), 0, size_hw=(100, 100), side=10)[0].tolist()
    [[0.0, 0.0], [5.0, 10.0]]
    """
    points, labels = np.empty((0, 2), np.float32), np.empty(0, np.int32)
    if "prompt_box" not in detections.data or detections.data["prompt_box"][i]:
        points, labels = detections.xyxy[i].reshape(2, 2).astype(np.float32), np.array([2, 3], np.int32)
    clicks = detections.data["points"][i] if "points" in detections.data else None
    if clicks is not None:
        points = np.concatenate([points, np.asarray(clicks, np.float32)])
        labels = np.concatenate([labels, np.asarray(detections.data["labels"][i], np.int32)])
    height, width = size_hw
    return points * np.array([side / width, side / height], np.float32), labels


def mask_prompt(detections: sv.Detections, i: int, prompt: str) -> NDArray[np.bool_] | None:
    """Return the mask `(H, W) bool` that detection `i` is prompted with; None if it is prompted with a box or clicks.

    Args:
        detections: Detections or manual prompts; see `structures.clicks.Clicks.to_detections`.
        i: Index of the detection.
        prompt: Setting `prompt` of the tracker; has no effect on manual prompts.
    """
    if "points" in detections.data:
        return detections.data["prompt_mask"][i]  # type: ignore[no-any-return]
    return None if detections.mask is None or prompt == "box" else np.asarray(detections.mask[i], bool)


def oldest_dispensable(prompted: list[int], max_prompts: int) -> int:
    """Return the prompted frame to drop when there are too many: the oldest one except the first.

    Args:
        prompted: Numbers of the prompted frames.
        max_prompts: Largest number of prompted frames; with 1, the first one is dropped.

    >>> oldest_dispensable([0, 10, 20], 2)
    10
    """
    return sorted(prompted)[1 if max_prompts > 1 else 0]
