"""Embed crops and texts with SigLIP (Zhai et al. 2023), SigLIP 2 (Tschannen et al. 2025) or CLIP (Radford et al. 2021).

What the models of transformers expect, and do not check:

- SigLIP pools the last position of the text, so texts are padded to the full length, and without an attention mask:
  padding to the longest text changes the embeddings. SigLIP 2 was trained on lower-case text.
- `get_text_features` and `get_image_features` return an output object whose `pooler_output` is not normalized.
- The image processor squeezes images into a square, so crops are square already.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.patching import inference
from grounded_sam.checks import check_choice, check_int
from grounded_sam.errors import CheckpointError
from grounded_sam.weights.loading import find_folder, load_checkpoint, pick_device

if TYPE_CHECKING:
    from torch import Tensor

#: Kinds of checkpoints. SigLIP 2 of a fixed resolution is a `siglip`; `siglip2` is the one with any aspect ratio.
KINDS = ("siglip", "siglip2", "clip")


class ImageTextModel:
    """A model that embeds images and texts into one space.

    Args:
        checkpoint: Hub id, local folder, or `builtin:NAME`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        batch_size: Crops per forward pass.

    Attributes:
        model: The model of transformers.
        size: Side of the crops in pixels.
        kind: One of `KINDS`.
        folder: Local folder of the checkpoint; None where it came from the hub.
        scale: Factor that turns cosines into logits.
        bias: What is added to them; 0 for CLIP.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged or of another model.
        ConfigError: If a setting is out of range.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 64,
    ) -> None:
        check_choice("verify.dtype", dtype, ("float32", "bfloat16", "float16"))
        check_int("verify.batch_size", batch_size, 1)
        import torch
        from transformers import AutoModel, AutoProcessor

        self.device, self.dtype, self.batch_size = pick_device(device), getattr(torch, dtype), batch_size
        loaded = load_checkpoint(checkpoint, KINDS, AutoModel, [AutoProcessor], self.dtype, builtin_kind="siglip")
        self.model, processor = loaded[0].to(self.device), loaded[1]
        config = self.model.config
        self.kind: str = config.model_type
        self.image_processor, self.tokenizer = processor.image_processor, processor.tokenizer
        folder = Path(find_folder(checkpoint, "siglip"))
        self.folder = folder if folder.is_dir() else None
        self.text_length = int(config.text_config.max_position_embeddings)
        self.size = self._crop_size()
        self.scale = float(self.model.logit_scale.detach().float().exp())
        self.bias = 0.0 if self.kind == "clip" else float(self.model.logit_bias.detach().float())
        mean, std = (torch.tensor(getattr(self.image_processor, f"image_{name}")) for name in ("mean", "std"))
        self._mean, self._std = mean.view(3, 1, 1).to(self.device), std.view(3, 1, 1).to(self.device)
        self._cut: set[str] = set()  # texts that a warning has named

    def _crop_size(self) -> int:
        config = self.model.config.vision_config
        if self.kind == "siglip2":
            return round(self.image_processor.max_num_patches**0.5) * int(config.patch_size)
        if not isinstance(config.image_size, int):
            raise CheckpointError(f"expected a model of square images, got {config.image_size}")
        return config.image_size

    def embed_crops(self, crops: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embed square crops.

        Args:
            crops: RGB, each `(size, size, 3) uint8`.

        Returns:
            Normalized embeddings, `(n, d) float32`.
        """
        import torch
        import torch.nn.functional as F

        parts = [torch.zeros(0, self.embedding_size)]
        for start in range(0, len(crops), self.batch_size):
            batch = np.stack(crops[start : start + self.batch_size])
            with inference():
                output = self.model.get_image_features(**self._image_inputs(batch))
                parts.append(F.normalize(output.pooler_output.float(), dim=1).cpu())
        return torch.cat(parts).numpy()

    @property
    def embedding_size(self) -> int:
        """Length of an embedding."""
        config = self.model.config
        return int(config.projection_dim if self.kind == "clip" else config.vision_config.hidden_size)

    def _image_inputs(self, crops: NDArray[np.uint8]) -> dict[str, Tensor]:
        """Normalize crops as the image processor does, which takes longer for small ones than the small model."""
        import torch

        if self.kind == "siglip2":
            inputs = self.image_processor(images=list(crops), return_tensors="pt")
            pixels = {"pixel_values": inputs["pixel_values"].to(self.device, self.dtype)}
            others = {name: inputs[name].to(self.device) for name in ("pixel_attention_mask", "spatial_shapes")}
            return pixels | others
        pixels_ = torch.from_numpy(crops).to(self.device).permute(0, 3, 1, 2).float() / 255
        return {"pixel_values": ((pixels_ - self._mean) / self._std).to(self.dtype)}

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: The texts; those that are longer than the model takes are cut.

        Returns:
            Normalized embeddings, `(n, d) float32`.

        Warns:
            UserWarning: For every text that is cut, once.
        """
        import torch
        import torch.nn.functional as F

        parts = [torch.zeros(0, self.embedding_size)]
        for start in range(0, len(texts), self.batch_size):
            inputs = self._text_inputs(texts[start : start + self.batch_size])
            with inference():
                output = self.model.get_text_features(**inputs)
                parts.append(F.normalize(output.pooler_output.float(), dim=1).cpu())
        return torch.cat(parts).numpy()

    def _text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize texts; see the module."""
        is_siglip = self.kind != "clip"
        lowered = [text.lower() for text in texts] if is_siglip else list(texts)
        for text, ids in zip(texts, self.tokenizer(lowered)["input_ids"], strict=True):
            if len(ids) > self.text_length and text not in self._cut:
                self._cut.add(text)
                warnings.warn(f"verify reads only the first {self.text_length} tokens of {text!r}", stacklevel=2)
        settings: Any = {"max_length": self.text_length, "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(lowered, padding="max_length" if is_siglip else True, **settings)
        names = ("input_ids",) if is_siglip else ("input_ids", "attention_mask")
        return {name: tokens[name].to(self.device) for name in names}
