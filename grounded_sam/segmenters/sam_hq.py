"""SAM-HQ (Ke et al. 2023), over transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.backends import Backend, BackendSettings
from grounded_sam.acceleration.patching import Precision, check_precision, to_device
from grounded_sam.acceleration.sam2 import speed_up_encoder
from grounded_sam.segmenters.base import Decoded, PromptedSegmenter, Prompts
from grounded_sam.weights.loading import load_checkpoint, pick_device

if TYPE_CHECKING:
    from torch import Tensor


class SamHq(PromptedSegmenter):
    """Boxes, clicks and masks to masks with finer edges than SAM's.

    The image is encoded once, all prompts are decoded in chunks; masks are those of `SamHQModel` with its processor.

    Args:
        checkpoint: a hub id or a local folder of a `SamHQModel`.
        device: `auto`, `cpu`, `cuda`...
        multimask: decode three masks per prompt and keep the best; pays for single clicks.
        hq_only: take the mask of the high-quality token alone; false adds it to SAM's own, as the authors do.
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
        checkpoint: str = "syscv-community/sam-hq-vit-base",
        device: str = "auto",
        multimask: bool = False,
        hq_only: bool = False,
        chunk: int = 64,
        fill_holes: int = 0,
        drop_specks: int = 0,
        rounds: int = 1,
        precision: Precision = "exact",
        compile: bool = False,
        backend: Backend = "torch",
        exports: str | None = None,
    ) -> None:
        super().__init__(multimask, chunk, fill_holes, drop_specks, rounds)
        check_precision(precision, compile, "segmenter")
        self.precision, self.backend = precision, backend
        where = BackendSettings(backend, exports)
        where.check(pick_device(device), "segmenter")
        self.hq_only = hq_only
        from transformers import AutoImageProcessor, SamHQModel

        parts = [AutoImageProcessor]
        model, self.processor = load_checkpoint(checkpoint, ["sam_hq"], SamHQModel, parts, builtin_kind="sam_hq")
        self.model: Any = model.to(pick_device(device))
        speed_up_encoder(self.model, precision, compile, where)
        self._maps: tuple[Tensor, Any] | None = None
        self._sizes: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    def _encode(self, image: NDArray[np.uint8]) -> None:
        import torch

        given = self.processor(images=image, input_data_format="channels_last", return_tensors="pt")
        with torch.inference_mode():
            self._maps = self.model.get_image_embeddings(to_device(given["pixel_values"], self.model.device))
        height, width = (int(side) for side in given["reshaped_input_sizes"][0])
        self._sizes = ((image.shape[0], image.shape[1]), (height, width))

    def _state(self) -> tuple[Any, tuple[str, ...]]:
        return self, ("_maps", "_sizes")

    def _forget(self) -> None:
        self._maps = None

    def _decode(self, prompts: Prompts) -> Decoded:
        import torch

        assert self._maps is not None
        n, place = len(prompts.rows), self.model.device
        (height, width), (seen_height, seen_width) = self._sizes
        scale = np.array([seen_width / width, seen_height / height])
        given: dict[str, Any] = {}
        if prompts.boxes is not None:
            given["input_boxes"] = torch.from_numpy((prompts.boxes.reshape(n, 2, 2) * scale).reshape(n, 4)).float()
        if prompts.points is not None and prompts.labels is not None:
            given["input_points"] = torch.from_numpy(prompts.points * scale).float()
            given["input_labels"] = torch.from_numpy(prompts.labels)
        pad = self.processor.pad_size
        out, predicted, logits = [], [], []
        alike = prompts.masks is None and prompts.logits is None
        # Masks make the dense embeddings differ from prompt to prompt, and the decoder takes one for all.
        for rows in [slice(None)] if alike else [slice(i, i + 1) for i in range(n)]:
            some = {key: value[rows][None].to(place) for key, value in given.items()}
            with torch.inference_mode():
                if prompts.masks is not None:
                    some["input_masks"] = self._low(prompts.masks[rows], (pad["height"], pad["width"])).to(place)
                elif prompts.logits is not None:
                    some["input_masks"] = torch.from_numpy(prompts.logits[rows])[:, None].to(place)
                result = self.model(
                    image_embeddings=self._maps[0],
                    intermediate_embeddings=self._maps[1],
                    multimask_output=self.multimask,
                    hq_token_only=self.hq_only,
                    **some,
                )
            sized = self.processor.post_process_masks(
                result.pred_masks.cpu(), [(height, width)], [(seen_height, seen_width)]
            )
            out.append(sized[0].numpy())
            predicted.append(result.iou_scores[0].float().cpu().numpy())
            logits.append(result.pred_masks[0].float().cpu().numpy())
        return np.concatenate(out), np.concatenate(predicted), np.concatenate(logits)

    def _low(self, masks: NDArray[np.bool_], pad: tuple[int, int]) -> Tensor:
        """Masks `(n, H, W)` as the logits that the prompt encoder takes, `(n, 1, h, w)`."""
        import torch

        frame = torch.zeros(len(masks), 1, *pad)
        height, width = self._sizes[1]
        given = torch.from_numpy(masks)[:, None].float()
        frame[..., :height, :width] = torch.nn.functional.interpolate(given, (height, width), mode="area")
        side = self.model.config.prompt_encoder_config.image_embedding_size * 4
        return torch.nn.functional.interpolate(frame, (side, side), mode="area") * 20 - 10
