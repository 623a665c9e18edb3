"""SAM 2 (Ravi et al. 2024), with the package `sam2` of its authors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.acceleration.cuda_graphs import GraphedFunction
from grounded_sam.acceleration.device_images import sam2_image_input
from grounded_sam.acceleration.patching import inference, to_device
from grounded_sam.acceleration.sam2 import speed_up_encoder
from grounded_sam.acceleration.transfer import Download
from grounded_sam.checks import check_choice, check_int
from grounded_sam.errors import ConfigError
from grounded_sam.hydra_state import preserve_hydra_state
from grounded_sam.segmenters.base import DecodedMasks, Prompts, SharableSegmenter, upsample_masks
from grounded_sam.segmenters.options import SegmenterOptions, model_identity
from grounded_sam.weights.hub import HubFile
from grounded_sam.weights.loading import BUILTIN_DIR, builtin_settings, find_file, load_into
from grounded_sam.weights.packages import import_package

if TYPE_CHECKING:
    from torch import Tensor

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
#: What to choose where the package `sam2` cannot be installed.
INSTEAD = "segmenter=sam2_hf and tracker=sam2_hf, which run the same weights with transformers"
#: Feature maps `(b, C, h, w)` of images, from fine to coarse: `backbone_fpn` of `SAM2Base.forward_image`.
ImageFeatures = tuple[Any, Any, Any]
#: Columns of detections that are prompted with more than their boxes; see `segmenters.base.group_prompts`.
PROMPT_COLUMNS = {"points", "labels", "prompt_mask", "prompt_box", "prompt_logits"}


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


def input_points(
    side: int, sizes_hw: NDArray[Any], boxes: NDArray[Any] | None, clicks: Prompts | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return corners of boxes (labels 2 and 3), then clicks (1 and 0), in pixels of the model's input.

    Args:
        side: Height and width of the model's input in pixels.
        sizes_hw: Height and width of the image of each prompt, `(n, 2)`, or of all of them, `(1, 2)`.
        boxes: `(n, 4)`, xyxy in pixels of the image.
        clicks: Prompts with clicks in pixels of the image.

    Returns:
        Points `(n, p, 2)`, and labels `(n, p)`.

    >>> input_points(8, np.array([[4, 2]]), np.array([[0, 1, 2, 4]]))[0].tolist()
    [[[0.0, 2.0], [8.0, 8.0]]]
    """
    points, labels = [], []
    if boxes is not None:
        points.append(boxes.astype(np.float32).reshape(-1, 2, 2))
        labels.append(np.tile(np.array([2, 3], np.int32), (len(boxes), 1)))
    if clicks is not None and clicks.points is not None and clicks.labels is not None:
        points.append(clicks.points)
        labels.append(clicks.labels.astype(np.int32))
    size_wh = sizes_hw[:, None, ::-1].astype(np.float32)
    return np.concatenate(points, 1) / size_wh * np.float32(side), np.concatenate(labels, 1)


def mask_inputs(prompts: Prompts, side: tuple[int, int]) -> Tensor | None:
    """Return mask prompts, or the logits of the previous round, as logits `(n, 1, h, w)`; None without either.

    Args:
        prompts: The prompts.
        side: Height and width of the logits of mask prompts.
    """
    import torch

    if prompts.logits is not None:
        return torch.from_numpy(prompts.logits)[:, None]
    if prompts.masks is None:
        return None
    values = torch.from_numpy(prompts.masks)[:, None].float()
    return torch.nn.functional.interpolate(values, side, mode="area") * 20 - 10


class Sam2(SharableSegmenter):
    """Segment with SAM 2.1.

    Masks equal those of `SAM2ImagePredictor`; with `multimask`, the one of its three with the highest predicted IoU.

    Args:
        checkpoint: Hub id, local file, folder with one file, or `builtin:NAME`; None for the official file of `size`.
        size: `tiny`, `small`, `base_plus` or `large`; has no effect on `builtin:` models.
        sha256: Expected SHA-256 of the file; None for the known one of an official file.
        batch_size: Images that are encoded at once; None for 8 on CUDA and 1 elsewhere.
        **options: See `segmenters.options.SegmenterOptions`.

    Attributes:
        batch_size: As above.
        mask_generator_settings: See `structures.protocols.GeneratesMasks`.
        encode: Function of pixels `(b, 3, side, side)` on the device to `ImageFeatures`.

    Raises:
        CheckpointError: If the weights are missing, damaged, or of another model.
        ConfigError: If an option is not allowed, or the package `sam2` is not installed.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        size: Size = "tiny",
        sha256: str | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        check_int("segmenter.batch_size", batch_size, 1, optional=True)
        parsed = SegmenterOptions(**options)
        super().__init__(parsed, model_identity(parsed, checkpoint, size))
        file = sam2_hub_file({"checkpoint": checkpoint, "size": size})
        package = import_package("sam2", "segmenter=sam2", INSTEAD)  # before anything is downloaded
        path = find_file(file.repo, "sam2", file.name, sha256 or file.sha256)
        with preserve_hydra_state():
            architecture = Path(str(package.__file__)).parent / "configs" / "sam2.1" / SIZES[size][3]
            self.mask_generator_settings: Mapping[str, Any] = {}
            settings = builtin_settings(path, "sam2")
            if settings is not None:
                architecture = BUILTIN_DIR.parent / "sam2.yaml"
                self.mask_generator_settings = settings["mask_generator"]
            self.model: Any = build_sam2(architecture, path, f"SAM 2.1 {size}").to(self.options.torch_device)
        speed_up_encoder(self.model, self.options.precision, self.options.compile, self.options.backend_settings)
        self.batch_size = batch_size or (8 if self.model.device.type == "cuda" else 1)
        self.encode = GraphedFunction(self._forward_image, "the image encoder of SAM 2")
        self.predictor = new_predictor(self.model)
        self._shared_features: Callable[[NDArray[np.uint8]], ImageFeatures] | None = None

    @classmethod
    def hub_file(cls, settings: Mapping[str, Any]) -> HubFile:
        """Return the file on the hub that settings name; see `sam2_hub_file`."""
        return sam2_hub_file(settings)

    def with_features(self, features: Callable[[NDArray[np.uint8]], ImageFeatures]) -> Sam2:
        """Return a copy that takes image features from a tracker, which encodes every frame anyway.

        Args:
            features: Function from an image to its features.
        """
        other = copy(self)
        other.use_feature_cache(None)
        other.predictor = new_predictor(self.model)
        other._shared_features = features
        return other

    def segment(self, image: NDArray[np.uint8], detections: sv.Detections) -> sv.Detections:
        """Segment each detection; see `structures.protocols.Segmenter`."""
        return self.segment_batch([image], [detections])[0]

    def segment_batch(
        self, images: Sequence[NDArray[np.uint8]], detections: Sequence[sv.Detections]
    ) -> list[sv.Detections]:
        """Segment the detections of several images; see `structures.protocols.BatchSegmenter`.

        Boxes of all images are decoded together. Images with other prompts come one by one, and all of them if there
        is more than one round.
        """
        results = list(detections)
        together = []
        for i, (image, found) in enumerate(zip(images, detections, strict=True)):
            if len(found) and self.options.rounds == 1 and not PROMPT_COLUMNS & found.data.keys():
                together.append(i)
            else:
                results[i] = super().segment(image, found)
        for start in range(0, len(together), self.batch_size):
            rows = together[start : start + self.batch_size]
            segmented = self._segment_boxes([images[i] for i in rows], [detections[i] for i in rows])
            for i, (masks, scores) in zip(rows, segmented, strict=True):
                results[i] = self._add_masks(detections[i], masks, scores)
        return results

    def _segment_boxes(
        self, images: Sequence[NDArray[np.uint8]], detections: Sequence[sv.Detections]
    ) -> list[tuple[NDArray[np.bool_], NDArray[np.float32]]]:
        """Return masks and scores of boxes; each image has at least one."""
        import torch

        sizes = [(image.shape[0], image.shape[1]) for image in images]
        counts = [len(found) for found in detections]
        image_of, boxes = np.repeat(np.arange(len(images)), counts), np.concatenate([d.xyxy for d in detections])
        download, owners = Download(), []  # the image of each part of the masks
        with inference():
            maps, scores = self._encode_batch(images), []
            for start in range(0, len(boxes), self.options.chunk):
                rows = slice(start, start + self.options.chunk)
                points, labels = input_points(self.model.image_size, np.array(sizes)[image_of[rows]], boxes[rows])
                logits, best = self._decode_best(
                    maps, image_of[rows], points, labels, None, self.options.multimask is True
                )
                scores.append(best)
                first, last = image_of[rows][[0, -1]]
                ends = np.searchsorted(image_of[rows], np.arange(first, last + 2))
                for i, begin, end in zip(range(first, last + 1), ends[:-1], ends[1:], strict=True):
                    for masks in upsample_masks(logits[begin:end], sizes[i]):
                        download.add(masks)
                        owners.append(i)
            download.add(torch.cat(scores))
        *parts, values = download.wait()
        masks_of: list[list[NDArray[np.bool_]]] = [[] for _ in images]
        for i, part in zip(owners, parts, strict=True):
            masks_of[i].append(part)
        joined = [own[0] if len(own) == 1 else np.concatenate(own) for own in masks_of]
        return list(zip(joined, np.split(values, np.cumsum(counts)[:-1]), strict=True))

    def _to_pixels(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Resize and normalize images as `SAM2ImagePredictor` does; `(b, 3, side, side)` on the model's device."""
        import torch

        pixels = [sam2_image_input(image, self.model.image_size, self.model.device) for image in images]
        return torch.cat(pixels) if len(pixels) > 1 else pixels[0]

    def _forward_image(self, pixels: Tensor) -> ImageFeatures:
        """Encode images, `(b, 3, side, side)`; without what does not depend on them."""
        fine, middle, coarse = self.model.forward_image(pixels)["backbone_fpn"][-3:]
        return fine, middle, coarse

    def _without_memory(self, features: ImageFeatures) -> list[Tensor]:
        """Return feature maps for the decoder, as `SAM2ImagePredictor.set_image` does: without memory of a video."""
        *fine, coarse = features
        return [*fine, coarse + self.model.no_mem_embed.view(1, -1, 1, 1)]

    def _encode_batch(self, images: Sequence[NDArray[np.uint8]]) -> list[Tensor]:
        """Return the feature maps of images for the decoder, `(b, C, h, w)`, from fine to coarse."""
        import torch

        if self._cache is None and self._shared_features is None:
            return self._without_memory(self.encode(self._to_pixels(images)))
        each = [self.encode_image(image)["_features"] for image in images]
        levels = zip(*([*features["high_res_feats"], features["image_embed"]] for features in each), strict=True)
        return [torch.cat(level) for level in levels]

    def _set_image(self, image: NDArray[np.uint8]) -> None:

        with inference():
            if self._shared_features is None:
                features = self.encode(self._to_pixels([image]))
            else:
                features = self._shared_features(image)
            *fine, coarse = self._without_memory(features)
        self.predictor.reset_predictor()
        self.predictor._features = {"image_embed": coarse, "high_res_feats": fine}
        self.predictor._orig_hw = [image.shape[:2]]
        self.predictor._is_image_set = True

    def _feature_attributes(self) -> tuple[Any, tuple[str, ...]]:
        return self.predictor, ("_features", "_orig_hw", "_is_image_set")

    def _reset_image(self) -> None:
        self.predictor.reset_predictor()

    def _decode_best(
        self,
        maps: Sequence[Tensor],
        image_of: NDArray[Any],
        points: NDArray[np.float32] | None,
        labels: NDArray[np.int32] | None,
        masks: Tensor | None,
        multimask: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decode prompts, and choose the mask with the highest predicted IoU of each.

        Args:
            maps: Feature maps of images, `(b, C, h, w)`, from fine to coarse.
            image_of: Index of the image of each prompt, `(n,)`.
            points: `(n, p, 2)` in pixels of the model's input; None for masks alone.
            labels: `(n, p)`; see `input_points`.
            masks: Logits, `(n, 1, h, w)`.
            multimask: Whether to decode three masks.

        Returns:
            Logits `(n, h, w)`, and predicted IoU `(n,)`.
        """
        import torch

        device, n = self.model.device, len(image_of)
        if (image_of == image_of[0]).all():
            *fine, coarse = (level[image_of[0], None].expand(n, -1, -1, -1) for level in maps)
        else:
            index = to_device(torch.from_numpy(image_of), device)
            *fine, coarse = (level[index] for level in maps)
        inputs = None
        if points is not None and labels is not None:
            inputs = to_device(torch.from_numpy(points), device), to_device(torch.from_numpy(labels), device)
        encoder = self.model.sam_prompt_encoder
        sparse, dense = encoder(points=inputs, boxes=None, masks=None if masks is None else to_device(masks, device))
        logits, scores, _, _ = self.model.sam_mask_decoder(
            image_embeddings=coarse,
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            repeat_image=False,  # they are already
            high_res_features=fine,
        )
        best = scores.argmax(1, keepdim=True)
        chosen = logits.take_along_dim(best[..., None, None], 1)[:, 0]
        return chosen, scores.take_along_dim(best, 1)[:, 0].float()

    def _decode(self, prompts: Prompts) -> DecodedMasks:
        """Decode prompts on the current image; of each, the best mask alone is returned."""
        masks = mask_inputs(prompts, self.model.sam_prompt_encoder.mask_input_size)
        size_hw, points, labels = self.predictor._orig_hw[0], None, None
        if prompts.boxes is not None or prompts.points is not None:
            points, labels = input_points(self.model.image_size, np.array([size_hw]), prompts.boxes, prompts)
        features, image_of, download = self.predictor._features, np.zeros(len(prompts.rows), int), Download()
        with inference():
            maps = [*features["high_res_feats"], features["image_embed"]]
            logits, scores = self._decode_best(maps, image_of, points, labels, masks, self._wants_three_masks(prompts))
            download.add(scores[:, None])
            download.add(logits[:, None].float().clamp(-32, 32))  # as the predictor returns them
            for part in upsample_masks(logits, size_hw):
                download.add(part[:, None])
        score, low_res, *parts = download.wait()
        return DecodedMasks(parts[0] if len(parts) == 1 else np.concatenate(parts), score, low_res)

    def mask_generator(self, **settings: Any) -> Any:
        """Return a `SAM2AutomaticMaskGenerator` of `sam2` with this model; settings are its arguments."""
        with preserve_hydra_state():
            from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # Given here, the area would also go to the predictor, whose CUDA extension is rarely built.
            generator = SAM2AutomaticMaskGenerator(self.model, **{**settings, "min_mask_region_area": 0})
        generator.min_mask_region_area = settings.get("min_mask_region_area", 0)
        fit_predictor(generator.predictor, self.model)
        return generator
