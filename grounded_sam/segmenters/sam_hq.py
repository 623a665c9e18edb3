"""SAM-HQ (Ke et al. 2023), with transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.patching import inference, to_device
from grounded_sam.acceleration.sam2 import speed_up_encoder
from grounded_sam.checks import check_bool
from grounded_sam.segmenters.base import DecodedMasks, PromptedSegmenter, Prompts, masks_to_logits, prompts_per_call
from grounded_sam.segmenters.options import SegmenterOptions
from grounded_sam.weights.loading import load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


class SamHq(PromptedSegmenter):
    """Segment with SAM-HQ, whose masks have finer edges than those of SAM.

    Masks equal those of `SamHQModel`; with `multimask`, the one with the highest predicted IoU.

    Args:
        checkpoint: Hub id or local folder of a `SamHQModel`.
        hq_only: Whether to take the mask of the high-quality token alone; False adds its logits to those of SAM's mask,
            as the authors do.
        **options: See `segmenters.options.SegmenterOptions`.

    Raises:
        CheckpointError: If the weights are missing, or of another model.
        ConfigError: If an option is not allowed.
    """

    def __init__(
        self, checkpoint: str = "syscv-community/sam-hq-vit-base", hq_only: bool = False, **options: Any
    ) -> None:
        super().__init__(SegmenterOptions(**options))
        check_bool("segmenter.hq_only", hq_only)
        self.hq_only = hq_only
        from transformers import AutoImageProcessor, SamHQModel

        model, self.processor = load_checkpoint(
            checkpoint, ["sam_hq"], SamHQModel, [AutoImageProcessor], builtin_kind="sam_hq"
        )
        self.model: Any = model.to(self.options.torch_device)
        speed_up_encoder(self.model, self.options.precision, self.options.compile, self.options.backend_settings)
        self._features: tuple[Tensor, Any] | None = None
        self._sizes: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))  # of the image and of the resized image

    def _set_image(self, image: NDArray[np.uint8]) -> None:

        inputs = self.processor(images=image, input_data_format="channels_last", return_tensors="pt")
        with inference():
            self._features = self.model.get_image_embeddings(to_device(inputs["pixel_values"], self.model.device))
        height, width = (int(side) for side in inputs["reshaped_input_sizes"][0])
        self._sizes = ((image.shape[0], image.shape[1]), (height, width))

    def _feature_attributes(self) -> tuple[Any, tuple[str, ...]]:
        return self, ("_features", "_sizes")

    def _reset_image(self) -> None:
        self._features = None

    def _decode(self, prompts: Prompts) -> DecodedMasks:
        import torch

        assert self._features is not None
        n, device = len(prompts.rows), self.model.device
        (height, width), (resized_height, resized_width) = self._sizes
        scale = np.array([resized_width / width, resized_height / height])
        inputs: dict[str, Any] = {}
        if prompts.boxes is not None:
            inputs["input_boxes"] = torch.from_numpy((prompts.boxes.reshape(n, 2, 2) * scale).reshape(n, 4)).float()
        if prompts.points is not None and prompts.labels is not None:
            inputs["input_points"] = torch.from_numpy(prompts.points * scale).float()
            inputs["input_labels"] = torch.from_numpy(prompts.labels)
        parts = []
        for rows in prompts_per_call(prompts):
            chunk = {key: value[rows][None].to(device) for key, value in inputs.items()}
            with inference():
                if prompts.masks is not None:
                    chunk["input_masks"] = self._mask_inputs(prompts.masks[rows]).to(device)
                elif prompts.logits is not None:
                    chunk["input_masks"] = torch.from_numpy(prompts.logits[rows])[:, None].to(device)
                output = self.model(
                    image_embeddings=self._features[0],
                    intermediate_embeddings=self._features[1],
                    multimask_output=self._wants_three_masks(prompts),
                    hq_token_only=self.hq_only,
                    **chunk,
                )
            masks = self.processor.post_process_masks(
                output.pred_masks.cpu(), [(height, width)], [(resized_height, resized_width)]
            )
            scores, logits = output.iou_scores[0].float().cpu().numpy(), output.pred_masks[0].float().cpu().numpy()
            parts.append((masks[0].numpy(), scores, logits))
        return DecodedMasks(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _mask_inputs(self, masks: NDArray[np.bool_]) -> Tensor:
        """Return mask prompts as the prompt encoder takes them."""
        pad, config = self.processor.pad_size, self.model.config.prompt_encoder_config
        side = config.image_embedding_size * 4
        return masks_to_logits(masks, self._sizes[1], (pad["height"], pad["width"]), side)  # type: ignore[no-any-return]
