"""Frames, masks and points as SAM 2's video models take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

#: ImageNet's, as in sam2's `load_video_frames`.
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def to_pixels(image: NDArray[np.uint8], side: int, device: Any = "cpu", mean: Any = MEAN, std: Any = STD) -> Tensor:
    """A frame `(H, W, 3) uint8` as the square that SAM 2 sees, `(1, 3, side, side) float32`.

    As sam2's `load_video_frames` does it: Pillow's bicubic resize, then mean and deviation, by default ImageNet's.
    """
    import torch
    from PIL import Image

    square = np.array(Image.fromarray(image).resize((side, side)), np.float32) / 255
    pixels = torch.from_numpy((square - mean) / std)
    return pixels.permute(2, 0, 1)[None].to(device)


def to_mask_input(mask: NDArray[np.bool_], side: int, device: Any = "cpu") -> Tensor:
    """A mask `(H, W) bool` at the model's size, `(1, 1, side, side)` of 0 and 1; as `add_new_mask` does it."""
    import torch

    given = torch.from_numpy(np.ascontiguousarray(mask))[None, None].float().to(device)
    if mask.shape != (side, side):
        given = torch.nn.functional.interpolate(given, (side, side), mode="bilinear", antialias=True)
    return (given >= 0.5).float()


def to_points(
    found: sv.Detections, i: int, size_hw: tuple[int, int], side: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Box corners (labels 2 and 3) and clicks (1 and 0) of a detection, in pixels of the model's square."""
    points, labels = np.empty((0, 2), np.float32), np.empty(0, np.int32)
    if "prompt_box" not in found.data or found.data["prompt_box"][i]:
        points, labels = found.xyxy[i].reshape(2, 2).astype(np.float32), np.array([2, 3], np.int32)
    clicks = found.data["points"][i] if "points" in found.data else None
    if clicks is not None:
        points = np.concatenate([points, np.asarray(clicks, np.float32)])
        labels = np.concatenate([labels, np.asarray(found.data["labels"][i], np.int32)])
    height, width = size_hw
    return points * np.array([side / width, side / height], np.float32), labels


def mask_prompt(found: sv.Detections, i: int, default: str) -> NDArray[np.bool_] | None:
    """The mask `(H, W)` that detection `i` is prompted with; None if it is its box or its clicks.

    Clicks (columns of `detectors.clicks`) are taken as they were made; the rest as `default` says.
    """
    if "points" in found.data:
        return found.data["prompt_mask"][i]  # type: ignore[no-any-return]
    return None if found.mask is None or default == "box" else np.asarray(found.mask[i], bool)
