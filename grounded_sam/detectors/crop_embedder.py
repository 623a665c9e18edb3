"""Embed crops of objects with the image encoder of DINOv2, SigLIP or CLIP, with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.checks import check_int
from grounded_sam.detectors.queries import Dtype, check_model_settings
from grounded_sam.structures.examples import GRAY
from grounded_sam.weights.loading import load_checkpoint, pick_device

#: Values of `model_type` of image encoders whose pooled output is used, and of models with an image and a text encoder.
IMAGE_KINDS, IMAGE_TEXT_KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit"), ("clip", "siglip")


class CropEmbedder:
    """Embed crops, padded with gray to squares.

    Args:
        checkpoint: Hub id or local folder of DINOv2, DINOv3, SigLIP (also SigLIP 2 of a fixed size) or CLIP.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        batch_size: Crops per forward pass.

    Raises:
        CheckpointError: If the checkpoint is missing, or of another model family.
    """

    def __init__(
        self,
        checkpoint: str = "facebook/dinov2-base",
        device: str = "auto",
        dtype: Dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        check_model_settings(dtype, stage="detector.embedder")
        check_int("detector.embedder.batch_size", batch_size, 1)
        import torch
        from transformers import AutoImageProcessor, AutoModel

        self.device, self.dtype, self.batch_size = pick_device(device), getattr(torch, dtype), batch_size
        kinds = [*IMAGE_KINDS, *IMAGE_TEXT_KINDS]
        model, self.image_processor = load_checkpoint(checkpoint, kinds, AutoModel, [AutoImageProcessor], self.dtype)
        self.model = model.to(self.device)

    def embed_crops(self, crops: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embed crops.

        Args:
            crops: RGB, `(h, w, 3) uint8`, of any sizes.

        Returns:
            Normalized embeddings, `(n, d) float32`.
        """
        import torch

        parts = [np.zeros((0, 1), np.float32)]
        for start in range(0, len(crops), self.batch_size):
            images = [pad_to_square(crop) for crop in crops[start : start + self.batch_size]]
            inputs = self.image_processor(images=images, input_data_format="channels_last", return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.device, self.dtype)
            with torch.inference_mode():
                if self.model.config.model_type in IMAGE_TEXT_KINDS:
                    output: Any = self.model.get_image_features(pixel_values=pixels)
                else:
                    output = self.model(pixel_values=pixels)
                pooled = output if isinstance(output, torch.Tensor) else output.pooler_output
                parts.append(torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy())
        return np.concatenate(parts[1:]) if len(parts) > 1 else parts[0]


def pad_to_square(crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Center a crop in a gray square.

    >>> pad_to_square(np.zeros((2, 4, 3), np.uint8))[:, 0, 0].tolist()
    [127, 0, 0, 127]
    """
    height, width = crop.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), GRAY, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = crop
    return square
