"""SAM (Kirillov et al. 2023), with the package `segment_anything` of its authors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.sam2 import speed_up_encoder
from grounded_sam.checks import check_choice
from grounded_sam.errors import ConfigError
from grounded_sam.segmenters.base import DecodedMasks, PromptedSegmenter, Prompts, masks_to_logits
from grounded_sam.segmenters.options import SegmenterOptions
from grounded_sam.weights.hub import HubFile
from grounded_sam.weights.loading import builtin_settings, find_file, load_into
from grounded_sam.weights.packages import import_package

if TYPE_CHECKING:
    from torch import Tensor

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
#: Hub repository of these files.
REPO = "ybelkada/segment-anything"


class Sam(PromptedSegmenter):
    """Segment with SAM.

    Masks equal those of `SamPredictor`; with `multimask`, the one of its three with the highest predicted IoU.

    Args:
        checkpoint: Hub id, local file, folder with one file, or `builtin:NAME`.
        size: `vit_b`, `vit_l` or `vit_h`; has no effect on `builtin:` models.
        sha256: Expected SHA-256 of the file; None for the known one of an official file.
        **options: See `segmenters.options.SegmenterOptions`.

    Raises:
        CheckpointError: If the weights are missing, damaged, or of another model.
        ConfigError: If an option is not allowed, or the package `segment_anything` is not installed.
    """

    def __init__(
        self,
        checkpoint: str = REPO,
        size: Literal["vit_b", "vit_l", "vit_h"] = "vit_b",
        sha256: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(SegmenterOptions(**options))
        file = self.hub_file({"checkpoint": checkpoint, "size": size})
        instead = "segmenter=sam_hq or segmenter=sam2_hf, which run with transformers"
        package: Any = import_package("segment_anything", "segmenter=sam", instead, install="segment-anything")
        path = find_file(checkpoint, "sam", file.name, sha256 or file.sha256)

        self.mask_generator_settings: Mapping[str, Any] = {}
        settings = builtin_settings(path, "sam")
        if settings is not None:
            from hydra.utils import instantiate

            model = instantiate(settings["model"], _convert_="all")
            self.mask_generator_settings = settings["mask_generator"]
        else:
            model = package.sam_model_registry[size]()
        load_into(model, path, f"SAM {size}")
        self.model: Any = model.to(self.options.torch_device).eval()
        speed_up_encoder(self.model, self.options.precision, self.options.compile, self.options.backend_settings)
        self.predictor = package.SamPredictor(self.model)

    @classmethod
    def hub_file(cls, settings: Mapping[str, Any]) -> HubFile:
        """Return the file of a size on the hub, with its SHA-256 if that is known.

        Args:
            settings: Settings with `checkpoint` and, if not the default, `size`.

        Raises:
            ConfigError: If the size is unknown.
        """
        size, checkpoint = settings.get("size", "vit_b"), settings["checkpoint"]
        check_choice("segmenter.size", size, tuple(FILES))
        name, sha256 = FILES[size]
        return HubFile(str(checkpoint), name, sha256 if checkpoint == REPO else None, "sam")

    def _set_image(self, image: NDArray[np.uint8]) -> None:
        self.predictor.set_image(image)

    def _feature_attributes(self) -> tuple[Any, tuple[str, ...]]:
        return self.predictor, ("features", "original_size", "input_size", "is_image_set")

    def _reset_image(self) -> None:
        self.predictor.reset_image()

    def _decode(self, prompts: Prompts) -> DecodedMasks:
        import torch

        predictor = self.predictor
        device, size = predictor.device, predictor.original_size
        points = labels = boxes = masks = None
        if prompts.points is not None and prompts.labels is not None:
            points = _to_tensor(predictor.transform.apply_coords(prompts.points, size), device)
            labels = torch.as_tensor(prompts.labels, device=device)
        if prompts.boxes is not None:
            boxes = _to_tensor(predictor.transform.apply_boxes(prompts.boxes, size), device)
        if prompts.masks is not None:
            side = self.model.prompt_encoder.mask_input_size[0]
            padded = self.model.image_encoder.img_size
            masks = masks_to_logits(prompts.masks, predictor.input_size, (padded, padded), side).to(device)
        if prompts.logits is not None:
            masks = torch.from_numpy(prompts.logits)[:, None].to(device)
        three = self._wants_three_masks(prompts)
        decoded, scores, logits = predictor.predict_torch(points, labels, boxes, masks, three)
        return DecodedMasks(decoded.cpu().numpy(), scores.float().cpu().numpy(), logits.float().cpu().numpy())

    def mask_generator(self, **settings: Any) -> Any:
        """Return a `SamAutomaticMaskGenerator` of `segment_anything` with this model; settings are its arguments.

        Raises:
            ConfigError: On an Apple GPU, which lacks the float64 that it computes with.
        """
        from segment_anything import SamAutomaticMaskGenerator

        if self.predictor.device.type == "mps":
            raise ConfigError(
                "segmenter=sam cannot segment everything on device=mps; use segmenter.device=cpu, or segmenter=sam2"
            )
        return SamAutomaticMaskGenerator(self.model, **settings)


def _to_tensor(coordinates: NDArray[Any], device: Any) -> Tensor:
    """Convert coordinates to float32 before they are moved: Apple GPUs have no float64."""
    import torch

    return torch.from_numpy(np.asarray(coordinates, np.float32)).to(device)
