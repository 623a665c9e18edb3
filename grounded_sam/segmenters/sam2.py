"""SAM 2 (Ravi et al. 2024), with the package `sam2` of its authors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.sam2 import speed_up_encoder
from grounded_sam.checks import check_choice
from grounded_sam.errors import ConfigError
from grounded_sam.hydra_state import preserve_hydra_state
from grounded_sam.segmenters.base import DecodedMasks, Prompts, SharableSegmenter
from grounded_sam.segmenters.options import SegmenterOptions, model_identity
from grounded_sam.weights.hub import HubFile
from grounded_sam.weights.loading import BUILTIN_DIR, find_file, load_into

#: By size of SAM 2.1: hub repository, file in it, SHA-256 of the file, and config in the sam2 package.
SIZES = {
    "tiny": (
        "facebook/sam2.1-hiera-tiny",
        "sam2.1_hiera_tiny.pt",
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        "sam2.1_hiera_t.yaml",
    ),
    "small": (
        "facebook/sam2.1-hiera-small",
        "sam2.1_hiera_small.pt",
        "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
        "sam2.1_hiera_s.yaml",
    ),
    "base_plus": (
        "facebook/sam2.1-hiera-base-plus",
        "sam2.1_hiera_base_plus.pt",
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
        "sam2.1_hiera_b+.yaml",
    ),
    "large": (
        "facebook/sam2.1-hiera-large",
        "sam2.1_hiera_large.pt",
        "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
        "sam2.1_hiera_l.yaml",
    ),
}
Size = Literal["tiny", "small", "base_plus", "large"]
#: Features of an image, as `SAM2Base.forward_image` returns them.
ImageFeatures = dict[str, list[Any]]


def sam2_hub_file(settings: Mapping[str, Any]) -> HubFile:
    """Return the file on the hub that settings of SAM 2 name, with its SHA-256 if that is known.

    Args:
        settings: Settings with `checkpoint`, None for the official repository of the size, and `size`.

    Raises:
        ConfigError: If the size is unknown, or the checkpoint is the official repository of another size.
    """
    checkpoint, size = settings.get("checkpoint"), settings.get("size", "tiny")
    check_choice("segmenter.size", size, tuple(SIZES))
    repo, name, sha256, _ = SIZES[size]
    size_of_repo = {entry[0]: name for name, entry in SIZES.items()}
    if size_of_repo.get(str(checkpoint), size) != size:
        raise ConfigError(f"{checkpoint} has size {size_of_repo[str(checkpoint)]}, but segmenter.size is {size}")
    return HubFile(checkpoint or repo, name, sha256 if checkpoint in (None, repo) else None, "sam2")


def build_sam2(architecture: Path, path: Path, name: str) -> Any:
    """Build a `SAM2Base` from its YAML, with the post-processing that `sam2.build_sam.build_sam2` adds.

    Args:
        architecture: YAML file of the sam2 package, or of the `builtin:` models.
        path: File of weights.
        name: Name of the model, for messages.

    Raises:
        CheckpointError: If the weights do not fit the architecture.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    cfg = OmegaConf.load(architecture)
    extra = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    OmegaConf.update(cfg, "model.sam_mask_decoder_extra_args", extra, force_add=True)
    model = instantiate(cfg.model)
    load_into(model, path, name)
    return model.eval()


def new_predictor(model: Any) -> Any:
    """Make a `SAM2ImagePredictor` whose feature sizes, which sam2 fixes for inputs of 1024 px, fit the model."""
    with preserve_hydra_state():
        from sam2.sam2_image_predictor import SAM2ImagePredictor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # sam2 scripts its transforms, which torch deprecates
        return fit_predictor(SAM2ImagePredictor(model), model)


def fit_predictor(predictor: Any, model: Any) -> Any:
    """Set the feature sizes of a `SAM2ImagePredictor` to those of its model."""
    predictor._bb_feat_sizes = [(model.image_size // stride, model.image_size // stride) for stride in (4, 8, 16)]
    return predictor


class Sam2(SharableSegmenter):
    """Segment with SAM 2.1.

    Masks equal those of `SAM2ImagePredictor`; with `multimask`, the one of its three with the highest predicted IoU.

    Args:
        checkpoint: Hub id, local file, folder with one file, or `builtin:NAME`; None for the official file of `size`.
        size: `tiny`, `small`, `base_plus` or `large`; has no effect on `builtin:` models.
        sha256: Expected SHA-256 of the file; None for the known one of an official file.
        **options: See `segmenters.options.SegmenterOptions`.

    Raises:
        CheckpointError: If the weights are missing, damaged, or of another model.
        ConfigError: If an option is not allowed.
    """

    def __init__(
        self, checkpoint: str | None = None, size: Size = "tiny", sha256: str | None = None, **options: Any
    ) -> None:
        parsed = SegmenterOptions(**options)
        super().__init__(parsed, model_identity(parsed, checkpoint, size))
        file = sam2_hub_file({"checkpoint": checkpoint, "size": size})
        path = find_file(file.repo, "sam2", file.name, sha256 or file.sha256)
        with preserve_hydra_state():
            import sam2

            architecture = Path(sam2.__file__).parent / "configs" / "sam2.1" / SIZES[size][3]
            if path.is_relative_to(BUILTIN_DIR):
                architecture = BUILTIN_DIR.parent / "sam2.yaml"
            self.model: Any = build_sam2(architecture, path, f"SAM 2.1 {size}").to(self.options.torch_device)
        speed_up_encoder(self.model, self.options.precision, self.options.compile, self.options.backend_settings)
        self.predictor = new_predictor(self.model)
        self._shared_features: Callable[[NDArray[np.uint8]], ImageFeatures] | None = None

    @classmethod
    def hub_file(cls, settings: Mapping[str, Any]) -> HubFile:
        """Return the file on the hub that settings name; see `sam2_hub_file`."""
        return sam2_hub_file(settings)

    def with_features(self, features: Callable[[NDArray[np.uint8]], ImageFeatures]) -> Sam2:
        """Return a copy that takes image features from a tracker, which encodes every frame anyway.

        Args:
            features: Function from an image to the output of `SAM2Base.forward_image` for it.
        """
        other = copy(self)
        other.use_feature_cache(None)
        other.predictor = new_predictor(self.model)
        other._shared_features = features
        return other

    def _set_image(self, image: NDArray[np.uint8]) -> None:
        if self._shared_features is None:
            self.predictor.set_image(image)
            return
        maps = self._shared_features(image)["backbone_fpn"]
        self.predictor.reset_predictor()
        no_memory = self.model.no_mem_embed.view(1, -1, 1, 1)  # added as in `SAM2ImagePredictor.set_image`
        self.predictor._features = {"image_embed": maps[-1] + no_memory, "high_res_feats": maps[-3:-1]}
        self.predictor._orig_hw = [image.shape[:2]]
        self.predictor._is_image_set = True

    def _feature_attributes(self) -> tuple[Any, tuple[str, ...]]:
        return self.predictor, ("_features", "_orig_hw", "_is_image_set")

    def _reset_image(self) -> None:
        self.predictor.reset_predictor()

    def _decode(self, prompts: Prompts) -> DecodedMasks:
        import torch

        masks, multimask = None, self.options.multimask
        if prompts.masks is not None:
            side = self.model.sam_prompt_encoder.mask_input_size
            values = torch.from_numpy(prompts.masks)[:, None].float()
            masks = torch.nn.functional.interpolate(values, side, mode="area") * 20 - 10
        if prompts.logits is not None:
            masks = torch.from_numpy(prompts.logits)[:, None]
        n, count = len(prompts.rows), 3 if multimask else 1
        if masks is not None and prompts.points is None and prompts.boxes is None:
            # The predictor infers the batch size from points and boxes, so masks alone are decoded one by one.
            parts = [self.predictor.predict(mask_input=mask[None], multimask_output=multimask) for mask in masks]
            decoded, scores, logits = (np.stack([part[i] for part in parts]) for i in range(3))
        else:
            decoded, scores, logits = self.predictor.predict(
                point_coords=prompts.points,
                point_labels=prompts.labels,
                box=prompts.boxes,
                mask_input=masks,
                multimask_output=multimask,
            )
        # The predictor returns (1, H, W) for one box and (n, 1, H, W) for more.
        return DecodedMasks(
            decoded.reshape(n, count, *decoded.shape[-2:]) > 0,
            scores.reshape(n, count),
            logits.reshape(n, count, *logits.shape[-2:]),
        )

    def mask_generator(self, **settings: Any) -> Any:
        """Return a `SAM2AutomaticMaskGenerator` of `sam2` with this model; settings are its arguments."""
        with preserve_hydra_state():
            from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            generator = SAM2AutomaticMaskGenerator(self.model, **settings)
        fit_predictor(generator.predictor, self.model)
        return generator
