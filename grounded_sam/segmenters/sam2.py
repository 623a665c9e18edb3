"""Segment Anything 2 (Ravi et al. 2024), over its authors' package."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grounded_sam.acceleration.backends import Backend, BackendSettings
from grounded_sam.acceleration.patching import Precision, check_precision
from grounded_sam.acceleration.sam2 import speed_up_encoder
from grounded_sam.errors import ConfigError
from grounded_sam.hydra_state import preserve_hydra_state
from grounded_sam.segmenters.base import Decoded, PromptedSegmenter, Prompts
from grounded_sam.weights.loading import BUILTIN_DIR, find_file, load_into, pick_device

#: Hub repository of each size of SAM 2.1, file in it, its SHA-256, and config in the sam2 package.
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


def hub_file(checkpoint: str | None, size: str = "tiny") -> tuple[str, str, str | None]:
    """Where the weights of a size lie on the hub: repository, file in it, and its SHA-256 if known.

    Args:
        checkpoint: null for the official repository of `size`.
        size: one of `SIZES`.

    Raises:
        ConfigError: for an unknown size, or an official repository of another one.
    """
    if size not in SIZES:
        raise ConfigError(f"segmenter.size must be one of {', '.join(SIZES)}, got {size!r}")
    repo, file, known, _ = SIZES[size]
    sizes = {entry[0]: name for name, entry in SIZES.items()}
    if sizes.get(str(checkpoint), size) != size:
        raise ConfigError(f"{checkpoint} holds segmenter.size={sizes[str(checkpoint)]}, but the size is {size}")
    return checkpoint or repo, file, known if checkpoint in (None, repo) else None


def build_model(architecture: Path, path: Path, what: str) -> Any:
    """A `SAM2Base` from its YAML, with the post-processing that `sam2.build_sam.build_sam2` adds."""
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
    load_into(model, path, what)
    return model.eval()


def fit_predictor(predictor: Any, model: Any) -> Any:
    """Tell a `SAM2ImagePredictor` the feature sizes of a model that is not 1024 px: it has them fixed."""
    predictor._bb_feat_sizes = [(model.image_size // s, model.image_size // s) for s in (4, 8, 16)]
    return predictor


class Sam2(PromptedSegmenter):
    """Boxes, clicks and masks to masks with SAM 2.1.

    The image is encoded once, all prompts are decoded in chunks. With one mask per prompt these are
    `SAM2ImagePredictor`'s masks; with several, the one of highest predicted IoU is kept.

    Args:
        checkpoint: a hub id, a local file, a folder with one, or `builtin:NAME`; by default the
            official file of `size` on the hub.
        size: `tiny`, `small`, `base_plus` or `large`; `builtin:` models have a size of their own.
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
        checkpoint: str | None = None,
        size: Literal["tiny", "small", "base_plus", "large"] = "tiny",
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
        repo, file, known = hub_file(checkpoint, size)
        #: Which weights these are and where, for a tracker that may share them.
        self.source = (checkpoint, size, pick_device(device), precision, backend)
        path = find_file(repo, "sam2", file, sha256 or known)
        with preserve_hydra_state():
            import sam2
            from sam2.sam2_image_predictor import SAM2ImagePredictor

            architecture = Path(sam2.__file__).parent / "configs" / "sam2.1" / SIZES[size][3]
            if path.is_relative_to(BUILTIN_DIR):
                architecture = BUILTIN_DIR.parent / "sam2.yaml"
            self.model = build_model(architecture, path, f"SAM 2.1 {size}").to(self.source[2])
        speed_up_encoder(self.model, precision, compile, where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # upstream scripts its transforms; torch has deprecated that
            self.predictor = fit_predictor(SAM2ImagePredictor(self.model), self.model)

        self._maps: Callable[[NDArray[np.uint8]], dict[str, list[Any]]] | None = None

    def over(self, maps: Callable[[NDArray[np.uint8]], dict[str, list[Any]]]) -> Sam2:
        """This segmenter on images that someone else encodes; for a tracker, which has to see every frame.

        Args:
            maps: an image to what `SAM2Base.forward_image` gives for it.
        """
        from sam2.sam2_image_predictor import SAM2ImagePredictor

        other = copy(self)
        other.embeddings = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            other.predictor = fit_predictor(SAM2ImagePredictor(self.model), self.model)
        other._maps = maps
        return other

    def _encode(self, image: NDArray[np.uint8]) -> None:
        if self._maps is None:
            self.predictor.set_image(image)
            return
        maps = self._maps(image)["backbone_fpn"]
        self.predictor.reset_predictor()
        empty = self.model.no_mem_embed.view(1, -1, 1, 1)  # as `set_image` does
        self.predictor._features = {"image_embed": maps[-1] + empty, "high_res_feats": maps[-3:-1]}
        self.predictor._orig_hw = [image.shape[:2]]
        self.predictor._is_image_set = True

    def _state(self) -> tuple[Any, tuple[str, ...]]:
        return self.predictor, ("_features", "_orig_hw", "_is_image_set")

    def _forget(self) -> None:
        self.predictor.reset_predictor()

    def _decode(self, prompts: Prompts) -> Decoded:
        import torch

        masks = None
        if prompts.masks is not None:
            side = self.model.sam_prompt_encoder.mask_input_size
            given = torch.from_numpy(prompts.masks)[:, None].float()
            masks = torch.nn.functional.interpolate(given, side, mode="area") * 20 - 10
        if prompts.logits is not None:
            masks = torch.from_numpy(prompts.logits)[:, None]
        n, count = len(prompts.rows), 3 if self.multimask else 1
        if masks is not None and prompts.points is None and prompts.boxes is None:
            # Upstream tells a batch by its points and boxes; masks alone go one by one.
            parts = [self.predictor.predict(mask_input=mask[None], multimask_output=self.multimask) for mask in masks]
            out, predicted, low = (np.stack([part[i] for part in parts]) for i in range(3))
        else:
            out, predicted, low = self.predictor.predict(
                point_coords=prompts.points,
                point_labels=prompts.labels,
                box=prompts.boxes,
                mask_input=masks,
                multimask_output=self.multimask,
            )
        return (
            out.reshape(n, count, *out.shape[-2:]) > 0,
            predicted.reshape(n, count),
            low.reshape(n, count, *low.shape[-2:]),
        )

    def mask_generator(self, **settings: Any) -> Any:
        """The authors' `SAM2AutomaticMaskGenerator` over this model."""
        with preserve_hydra_state():
            from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            generator = SAM2AutomaticMaskGenerator(self.model, **settings)
        fit_predictor(generator.predictor, self.model)
        return generator
