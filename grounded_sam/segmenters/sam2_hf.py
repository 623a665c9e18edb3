"""SAM 2, EdgeTAM and the tracker of SAM 3, with the video models of transformers on single images."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.patching import inference, to_device
from grounded_sam.acceleration.sam2 import speed_up_encoder
from grounded_sam.segmenters.base import DecodedMasks, Prompts, SharableSegmenter, prompts_per_call
from grounded_sam.segmenters.options import SegmenterOptions, model_identity
from grounded_sam.weights.sam2_video import load_image_processor, load_video_model

if TYPE_CHECKING:
    from torch import Tensor


class Sam2Hf(SharableSegmenter):
    """Segment with SAM 2, EdgeTAM or the tracker of SAM 3 of transformers.

    The model is the one for videos, which contains the one for images, so that `trackers.sam2_hf` can share it and its
    image features. Masks equal those of `Sam2Model` with the same weights.

    Args:
        checkpoint: Hub id or local folder of a `Sam2VideoModel`, `EdgeTamVideoModel` or `Sam3TrackerVideoModel`, or
            `builtin:NAME`.
        **options: See `segmenters.options.SegmenterOptions`.

    Raises:
        CheckpointError: If the weights are missing, or of another model.
        ConfigError: If an option is not allowed.
    """

    def __init__(self, checkpoint: str = "facebook/sam2.1-hiera-tiny", **options: Any) -> None:
        parsed = SegmenterOptions(**options)
        super().__init__(parsed, model_identity(parsed, checkpoint))
        self.model: Any = load_video_model(checkpoint).to(self.options.torch_device)
        speed_up_encoder(self.model, self.options.precision, self.options.compile, self.options.backend_settings)
        self.processor = load_image_processor(checkpoint, self.model)
        self._image_features: Callable[[NDArray[np.uint8]], list[Tensor]] = self._compute_features
        self._features: list[Tensor] | None = None
        self._size_hw = (0, 0)

    def with_features(self, features: Callable[[NDArray[np.uint8]], list[Tensor]]) -> Sam2Hf:
        """Return a copy that takes image features from a tracker, which encodes every frame anyway.

        Args:
            features: Function from an image to the `fpn_hidden_states` that `get_image_features` of the model returns
                for it.
        """
        other = copy(self)
        other.use_feature_cache(None)
        other._image_features = features
        return other

    def _compute_features(self, image: NDArray[np.uint8]) -> list[Tensor]:
        pixels = to_device(self.processor(images=image, return_tensors="pt").pixel_values, self.model.device)
        return list(self.model.get_image_features(pixels, return_dict=True).fpn_hidden_states)

    def _set_image(self, image: NDArray[np.uint8]) -> None:

        with inference():
            *fine, coarse = self._image_features(image)
            flat = [*fine, coarse + self.model.no_memory_embedding]
            sizes = self.model.backbone_feature_sizes
            self._features = [f.permute(1, 2, 0).reshape(1, -1, *s) for f, s in zip(flat, sizes, strict=True)]
        self._size_hw = (image.shape[0], image.shape[1])

    def _feature_attributes(self) -> tuple[Any, tuple[str, ...]]:
        return self, ("_features", "_size_hw")

    def _reset_image(self) -> None:
        self._features = None

    def _point_inputs(self, prompts: Prompts) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return boxes and clicks as points of the model's input with labels; box corners come first, as in sam2."""
        n, side = len(prompts.rows), self.model.prompt_encoder.input_image_size
        height, width = self._size_hw
        scale = np.array([side / width, side / height], np.float32)
        points, labels = np.empty((n, 0, 2), np.float32), np.empty((n, 0), np.int64)
        if prompts.boxes is not None:
            points, labels = prompts.boxes.reshape(n, 2, 2) * scale, np.tile(np.array([2, 3]), (n, 1))
        if prompts.points is not None and prompts.labels is not None:
            points = np.concatenate([points, prompts.points * scale], 1)
            labels = np.concatenate([labels, prompts.labels], 1)
        if not points.shape[1]:
            points, labels = np.zeros((n, 1, 2), np.float32), np.full((n, 1), -1)
        return points, labels

    def _mask_inputs(self, prompts: Prompts, rows: slice) -> Tensor | None:
        """Return mask prompts, or the logits of the previous round, as the prompt encoder takes them."""
        import torch

        if prompts.masks is not None:
            values = torch.from_numpy(prompts.masks[rows])[:, None].float().to(self.model.device)
            side = self.model.prompt_encoder.mask_input_size
            return torch.nn.functional.interpolate(values, side, mode="area") * 20 - 10
        if prompts.logits is not None:
            return torch.from_numpy(prompts.logits[rows])[:, None].to(self.model.device)
        return None

    def _decode(self, prompts: Prompts) -> DecodedMasks:
        import torch

        model = self.model
        points, labels = self._point_inputs(prompts)
        parts = []
        with inference():
            for rows in prompts_per_call(prompts):
                sparse, dense = model.prompt_encoder(
                    input_points=torch.from_numpy(points[rows])[None].to(model.device),
                    input_labels=torch.from_numpy(labels[rows])[None].to(model.device),
                    input_boxes=None,
                    input_masks=self._mask_inputs(prompts, rows),
                )
                assert self._features is not None
                logits, scores, _, _ = model.mask_decoder(
                    image_embeddings=self._features[-1],
                    image_positional_embeddings=model.get_image_wide_positional_embeddings(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=self._wants_three_masks(prompts),
                    high_resolution_features=self._features[:-1],
                )  # (1, n, k, h, w), (1, n, k)
                low_res = logits[0].float()
                masks = torch.nn.functional.interpolate(low_res, self._size_hw, mode="bilinear") > 0
                parts.append((masks.cpu().numpy(), scores[0].float().cpu().numpy(), low_res.cpu().numpy()))
        return DecodedMasks(*(np.concatenate(column) for column in zip(*parts, strict=True)))
