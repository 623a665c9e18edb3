"""SAM 2, EdgeTAM and the SAM 3 tracker over transformers' video models, used on single pictures."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.backends import Backend, BackendSettings
from grounded_sam.acceleration.patching import Precision, check_precision, to_device
from grounded_sam.acceleration.sam2 import speed_up_encoder
from grounded_sam.segmenters.base import Decoded, PromptedSegmenter, Prompts
from grounded_sam.weights.loading import (
    pick_device,
)
from grounded_sam.weights.sam2_video import load_image_processor, load_video_model

if TYPE_CHECKING:
    from torch import Tensor


class Sam2Hf(PromptedSegmenter):
    """Boxes, clicks and masks to masks with SAM 2, EdgeTAM or the SAM 3 tracker of transformers.

    The model is the one for videos, which has all that pictures need, so that `trackers.sam2_hf` can share
    it and the image features. Masks are those of `Sam2Model` on the same weights.

    Args:
        checkpoint: a hub id or folder of a `Sam2VideoModel`, `EdgeTamVideoModel` or `Sam3TrackerVideoModel`,
            or `builtin:NAME`.
        device: `auto`, `cpu`, `cuda`...
        multimask: decode three masks per prompt and keep the best; pays for single clicks.
        chunk: prompts decoded at once, fewer on large images.
        fill_holes: pixels of the largest hole in a mask to fill; 0 fills none.
        drop_specks: pixels of the largest separate speck to drop; 0 drops none.
        rounds: how often each prompt is decoded; from the second time on with the box and logits of its mask.
        precision: `exact` with levers that change no result, `balanced` and `fast` with more bfloat16; see `speed`.
        compile: let `torch.compile` have the image encoder; pays for many pictures.
        backend: what runs the image backbone on the CPU: `torch`, or `openvino`, `onnxruntime` (extras).
        exports: a folder of conversions for such a back end; null: converted anew in each run.

    Raises:
        CheckpointError: if the weights cannot be had, or are of another model.
    """

    def __init__(
        self,
        checkpoint: str = "facebook/sam2.1-hiera-tiny",
        device: str = "auto",
        multimask: bool = False,
        chunk: int = 64,
        fill_holes: int = 0,
        drop_specks: int = 0,
        rounds: int = 1,
        precision: Precision = "exact",
        compile: bool = False,
        backend: Backend = "torch",
        exports: str | None = None,
    ) -> None:
        check_precision(precision, compile, "segmenter")
        super().__init__(multimask, chunk, fill_holes, drop_specks, rounds)
        self.precision, self.backend = precision, backend
        where = BackendSettings(backend, exports)
        where.check(pick_device(device), "segmenter")
        #: Which weights these are and where, for a tracker that may share them.
        self.source = (checkpoint, pick_device(device), precision, backend)
        self.model = load_video_model(checkpoint).to(self.source[1])
        speed_up_encoder(self.model, precision, compile, where)
        self.processor = load_image_processor(checkpoint, self.model)
        self._features: Callable[[NDArray[np.uint8]], list[Tensor]] = self._own
        self._maps: list[Tensor] | None = None
        self._size_hw = (0, 0)

    def over(self, features: Callable[[NDArray[np.uint8]], list[Tensor]]) -> Sam2Hf:
        """This segmenter on images that someone else encodes; for a tracker, which has to see every frame.

        Args:
            features: an image to the `fpn_hidden_states` of the model's `get_image_features` for it.
        """
        other = copy(self)
        other.embeddings = None
        other._features = features
        return other

    def _own(self, image: NDArray[np.uint8]) -> list[Tensor]:
        pixels = to_device(self.processor(images=image, return_tensors="pt").pixel_values, self.model.device)
        return list(self.model.get_image_features(pixels, return_dict=True).fpn_hidden_states)

    def _encode(self, image: NDArray[np.uint8]) -> None:
        import torch

        with torch.inference_mode():
            *fine, last = self._features(image)
            flat = [*fine, last + self.model.no_memory_embedding]
            sizes = self.model.backbone_feature_sizes
            self._maps = [f.permute(1, 2, 0).reshape(1, -1, *s) for f, s in zip(flat, sizes, strict=True)]
        self._size_hw = (image.shape[0], image.shape[1])

    def _state(self) -> tuple[Any, tuple[str, ...]]:
        return self, ("_maps", "_size_hw")

    def _forget(self) -> None:
        self._maps = None

    def _decode(self, prompts: Prompts) -> Decoded:
        import torch

        model, n = self.model, len(prompts.rows)
        side, place = model.prompt_encoder.input_image_size, model.device
        height, width = self._size_hw
        scale = np.array([side / width, side / height], np.float32)
        points, labels = np.empty((n, 0, 2), np.float32), np.empty((n, 0), np.int64)
        if prompts.boxes is not None:  # as corners, in front of the clicks, as sam2 does it
            points, labels = prompts.boxes.reshape(n, 2, 2) * scale, np.tile(np.array([2, 3]), (n, 1))
        if prompts.points is not None and prompts.labels is not None:
            points = np.concatenate([points, prompts.points * scale], 1)
            labels = np.concatenate([labels, prompts.labels], 1)
        if not points.shape[1]:
            points, labels = np.zeros((n, 1, 2), np.float32), np.full((n, 1), -1)
        out, predicted, low_logits = [], [], []
        alike = prompts.masks is None and prompts.logits is None
        with torch.inference_mode():
            # Masks make the dense embeddings differ from prompt to prompt, and the decoder takes one for all.
            for rows in [slice(None)] if alike else [slice(i, i + 1) for i in range(n)]:
                masks = None
                if prompts.masks is not None:
                    given = torch.from_numpy(prompts.masks[rows])[:, None].float().to(place)
                    low = model.prompt_encoder.mask_input_size
                    masks = torch.nn.functional.interpolate(given, low, mode="area") * 20 - 10
                elif prompts.logits is not None:
                    masks = torch.from_numpy(prompts.logits[rows])[:, None].to(place)
                sparse, dense = model.prompt_encoder(
                    input_points=torch.from_numpy(points[rows])[None].to(place),
                    input_labels=torch.from_numpy(labels[rows])[None].to(place),
                    input_boxes=None,
                    input_masks=masks,
                )
                assert self._maps is not None
                logits, ious, _, _ = model.mask_decoder(
                    image_embeddings=self._maps[-1],
                    image_positional_embeddings=model.get_image_wide_positional_embeddings(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=self.multimask,
                    high_resolution_features=self._maps[:-1],
                )  # (1, n, k, h, w), (1, n, k)
                sized = torch.nn.functional.interpolate(logits[0].float(), self._size_hw, mode="bilinear")
                out.append((sized > 0).cpu().numpy())
                predicted.append(ious[0].float().cpu().numpy())
                low_logits.append(logits[0].float().cpu().numpy())
        return np.concatenate(out), np.concatenate(predicted), np.concatenate(low_logits)
