"""Segment Anything (Kirillov et al. 2023), over its authors' package."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.backends import Backend, BackendSettings
from grounded_sam.acceleration.patching import Precision, check_precision
from grounded_sam.acceleration.sam2 import speed_up_encoder
from grounded_sam.errors import ConfigError
from grounded_sam.segmenters.base import Decoded, PromptedSegmenter, Prompts
from grounded_sam.weights.loading import BUILTIN_DIR, find_file, load_into, pick_device

#: File of each size in the hub repository, and its SHA-256.
FILES = {
    "vit_b": (
        "checkpoints/sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": (
        "checkpoints/sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": (
        "checkpoints/sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}


def hub_file(checkpoint: str, size: str = "vit_b") -> tuple[str, str, str | None]:
    """Where the weights of a size lie on the hub: repository, file in it, and its SHA-256 if known.

    Raises:
        ConfigError: for an unknown size.
    """
    if size not in FILES:
        raise ConfigError(f"segmenter.size must be one of {', '.join(FILES)}, got {size!r}")
    file, known = FILES[size]
    return checkpoint, file, known if checkpoint == "ybelkada/segment-anything" else None


class Sam(PromptedSegmenter):
    """Boxes, clicks and masks to masks with SAM.

    The image is encoded once, all prompts are decoded in chunks. With one mask per prompt these are
    `SamPredictor`'s masks; with several, the one of highest predicted IoU is kept.

    Args:
        checkpoint: a hub id, a local file, a folder with one, or `builtin:NAME`.
        size: `vit_b`, `vit_l` or `vit_h`; `builtin:` models have a size of their own.
        device: `auto`, `cpu`, `cuda`...
        multimask: decode three masks per prompt and keep the best; pays for single clicks.
        chunk: prompts decoded at once, fewer on large images.
        fill_holes: pixels of the largest hole in a mask to fill; 0 fills none.
        drop_specks: pixels of the largest separate speck to drop; 0 drops none.
        rounds: how often each prompt is decoded; from the second time on with the box and logits of its mask.
        sha256: checksum that the file must have; the official files' are known.
        precision: `exact` with levers that change no result, `balanced` and `fast` with more bfloat16; see `speed`.
        compile: let `torch.compile` have the image encoder; pays for many pictures.
        backend: what runs the image backbone on the CPU: `torch`, or `openvino`, `onnxruntime` (extras).
        exports: a folder of conversions for such a back end; null: converted anew in each run.

    Raises:
        CheckpointError: if the weights cannot be had, are damaged, or are of another model.
    """

    def __init__(
        self,
        checkpoint: str = "ybelkada/segment-anything",
        size: Literal["vit_b", "vit_l", "vit_h"] = "vit_b",
        device: str = "auto",
        multimask: bool = False,
        chunk: int = 64,
        fill_holes: int = 0,
        drop_specks: int = 0,
        rounds: int = 1,
        sha256: str | None = None,
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
        checkpoint, file, known = hub_file(checkpoint, size)
        path = find_file(checkpoint, "sam", file, sha256 or known)
        from segment_anything import SamPredictor, sam_model_registry

        if path.is_relative_to(BUILTIN_DIR):
            from hydra.utils import instantiate
            from omegaconf import OmegaConf

            model = instantiate(OmegaConf.load(BUILTIN_DIR.parent / "sam.yaml"), _convert_="all")
        else:
            model = sam_model_registry[size]()
        load_into(model, path, f"SAM {size}")
        self.model: Any = model.to(pick_device(device)).eval()
        speed_up_encoder(self.model, precision, compile, where)
        self.predictor = SamPredictor(self.model)

    def _encode(self, image: NDArray[np.uint8]) -> None:
        self.predictor.set_image(image)

    def _state(self) -> tuple[Any, tuple[str, ...]]:
        return self.predictor, ("features", "original_size", "input_size", "is_image_set")

    def _forget(self) -> None:
        self.predictor.reset_image()

    def _decode(self, prompts: Prompts) -> Decoded:
        import torch

        predictor = self.predictor
        device, size = predictor.device, predictor.original_size
        points = labels = boxes = masks = None
        if prompts.points is not None and prompts.labels is not None:
            points = torch.as_tensor(predictor.transform.apply_coords(prompts.points, size), device=device).float()
            labels = torch.as_tensor(prompts.labels, device=device)
        if prompts.boxes is not None:
            boxes = torch.as_tensor(predictor.transform.apply_boxes(prompts.boxes, size), device=device).float()
        if prompts.masks is not None:
            side = self.model.prompt_encoder.mask_input_size[0]
            frame = torch.zeros(
                len(prompts.masks), 1, self.model.image_encoder.img_size, self.model.image_encoder.img_size
            )
            height, width = predictor.input_size
            given = torch.from_numpy(prompts.masks)[:, None].float()
            frame[..., :height, :width] = torch.nn.functional.interpolate(given, (height, width), mode="area")
            small = torch.nn.functional.interpolate(frame, (side, side), mode="area")
            masks = (small * 20 - 10).to(device)
        if prompts.logits is not None:
            masks = torch.from_numpy(prompts.logits)[:, None].to(device)
        out, predicted, low = predictor.predict_torch(points, labels, boxes, masks, self.multimask)
        return out.cpu().numpy(), predicted.float().cpu().numpy(), low.float().cpu().numpy()

    def mask_generator(self, **settings: Any) -> Any:
        """The authors' `SamAutomaticMaskGenerator` over this model."""
        from segment_anything import SamAutomaticMaskGenerator

        return SamAutomaticMaskGenerator(self.model, **settings)
