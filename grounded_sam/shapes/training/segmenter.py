"""Train the small SAM or SAM 2 on scenes: `python -m grounded_sam.shapes.training.segmenter model=sam2 out=DIR`.

Mask losses alone reach a plateau, since nothing tells the decoder where a box is. Auxiliary heads, used in training
only, overcome it: one predicts for every image cell after the two-way transformer how much of it lies in the prompted
box, one predicts the box from the mask token, and a dense one makes the image features useful from the start.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from grounded_sam.shapes.scenes import COLORS, SHAPES, TRAIN_PAIRS, Pair, Scene, load_photos, make_scene
from grounded_sam.shapes.training.loop import fit, load_settings, save_weights

log = logging.getLogger(__name__)

PromptKind = Literal["box", "points", "both"]

_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_STD = np.array([58.395, 57.12, 57.375], np.float32)
#: First step at which masks are refined with a mask prompt.
_REFINE_FROM = 1500


def build_segmenter(name: str) -> nn.Module:
    """Build an untrained model from `shapes/sam2.yaml` or `shapes/sam.yaml`."""
    cfg = OmegaConf.load(Path(__file__).parents[1] / f"{name}.yaml")
    model: nn.Module = instantiate(cfg.model if name == "sam2" else cfg)
    return model


@dataclass(frozen=True)
class ResizedScene:
    """A scene in the coordinates of a model's square input.

    Attributes:
        image: Normalized image, `(size, size, 3) float32`.
        masks: Visible part of each object, `(n, size, size) float32` of 0 and 1.
        scale: Factors of x and y, `(2,) float32`.
    """

    image: NDArray[np.float32]
    masks: NDArray[np.float32]
    scale: NDArray[np.float32]


def resize_scene(scene: Scene, size: int, keep_aspect: bool) -> ResizedScene:
    """Resize a scene to the input of a model.

    Args:
        scene: The scene.
        size: Side of the input in pixels.
        keep_aspect: Whether the longer side is resized to `size` and the rest padded, as for SAM; otherwise both
            sides are, as for SAM 2.
    """
    height, width = scene.image.shape[:2]
    scale = np.repeat(size / max(height, width), 2) if keep_aspect else np.array([size / width, size / height])
    new_w, new_h = (max(1, int(v + 0.5)) for v in np.array([width, height]) * scale)
    method = cv2.INTER_AREA if scale.min() < 1 else cv2.INTER_LINEAR
    image = np.zeros((size, size, 3), np.float32)
    image[:new_h, :new_w] = (cv2.resize(scene.image, (new_w, new_h), interpolation=method) - _MEAN) / _STD
    masks = np.zeros((len(scene.masks), size, size), np.float32)
    for resized, mask in zip(masks, scene.masks, strict=True):
        resized[:new_h, :new_w] = cv2.resize(mask.astype(np.float32), (new_w, new_h), interpolation=method) >= 0.5
    return ResizedScene(image, masks, scale.astype(np.float32))


@dataclass(frozen=True)
class SimulatedPrompt:
    """A prompt for one object, as a detector or a person would give it.

    Attributes:
        box: Jittered box, xyxy in pixels of the input, `(4,)`.
        points: Clicks (x, y) in pixels of the input.
        labels: 1 for each click on the object, 0 for each beside it.
    """

    box: NDArray[np.float64]
    points: list[tuple[float, float]]
    labels: list[int]


@dataclass(frozen=True)
class PromptBatch:
    """Scenes in the coordinates of the model's input, with prompts; objects are ordered by image.

    Attributes:
        pixels: Normalized images, `(b, 3, size, size)`.
        image_index: Image of each prompted object, `(n,) int64`.
        masks: Mask of each object, `(n, size, size) float32` of 0 and 1.
        boxes: Box prompts, xyxy in pixels, `(n, 4)`.
        points: Point prompts in pixels, `(n, p, 2)`.
        labels: 1 for a point on the object, 0 for one beside it, `(n, p)`.
        kind: Which of the prompts are used.
        foreground: Union of the masks of all objects in each image, `(b, size, size)`.
        pairs: Color and shape of each prompted object.
    """

    pixels: Tensor
    image_index: Tensor
    masks: Tensor
    boxes: Tensor
    points: Tensor
    labels: Tensor
    kind: PromptKind
    foreground: Tensor
    pairs: list[Pair]


@dataclass
class _BatchColumns:
    """Parts of a `PromptBatch` that is being made."""

    pixels: list[NDArray[np.float32]] = field(default_factory=list)
    foreground: list[NDArray[np.bool_]] = field(default_factory=list)
    image_index: list[int] = field(default_factory=list)
    masks: list[NDArray[np.float32]] = field(default_factory=list)
    prompts: list[SimulatedPrompt] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    def to_batch(self, kind: PromptKind) -> PromptBatch:
        return PromptBatch(
            pixels=torch.from_numpy(np.stack(self.pixels)).permute(0, 3, 1, 2),
            image_index=torch.tensor(self.image_index),
            masks=torch.from_numpy(np.stack(self.masks)),
            boxes=torch.from_numpy(np.stack([prompt.box for prompt in self.prompts])).float(),
            points=torch.tensor([prompt.points for prompt in self.prompts], dtype=torch.float32),
            labels=torch.tensor([prompt.labels for prompt in self.prompts]),
            kind=kind,
            foreground=torch.from_numpy(np.stack(self.foreground)).float(),
            pairs=self.pairs,
        )


class PromptBatches:
    """Make the batch of a step: scenes with simulated prompts.

    Args:
        cfg: Settings `seed`, `batch`, `photos`, `curriculum` and `most_prompts`.
        size: Side of the model's input in pixels.
        keep_aspect: See `resize_scene`.
    """

    def __init__(self, cfg: DictConfig, size: int, keep_aspect: bool) -> None:
        self.cfg, self.size, self.keep_aspect = cfg, size, keep_aspect
        self.photos = load_photos(cfg.photos)

    def simulate_prompt(
        self, rng: np.random.Generator, mask: NDArray[np.float32], box: NDArray[Any], num_points: int
    ) -> SimulatedPrompt:
        """Simulate a box and clicks for an object.

        Args:
            rng: Source of randomness.
            mask: Its mask, `(size, size)`, not empty.
            box: Its box, xyxy in pixels of the input.
            num_points: Number of clicks; the first one is on the object.
        """
        sides = box[2:] - box[:2]
        limit = 0.12 * np.tile(sides, 2) + 1
        jitter = rng.normal(0, 0.035, 4) * np.tile(sides, 2) + rng.normal(0, 0.4, 4)
        noisy_box = np.clip(box + np.clip(jitter, -limit, limit), 0, self.size)
        points, labels = [], []
        inside = np.argwhere(mask)
        for i in range(num_points):
            is_positive = i == 0 or rng.random() < 0.5
            if is_positive:
                y, x = inside[rng.integers(len(inside))] + 0.5
            else:
                low, high = box[:2] - 0.3 * sides - 2, box[2:] + 0.3 * sides + 2
                for _ in range(8):
                    x, y = np.clip(rng.uniform(low, high), 0, self.size - 1)
                    if not mask[int(y), int(x)]:
                        break
                else:
                    is_positive = True
            points.append((x, y))
            labels.append(int(is_positive))
        return SimulatedPrompt(noisy_box, points, labels)

    def __call__(self, step: int, seed: int = 2, kind: PromptKind | None = None) -> PromptBatch:
        rng = np.random.default_rng([self.cfg.seed, seed, step])
        one_object_until, two_objects_until = self.cfg.curriculum
        maximum = 1 if step < one_object_until else 2 if step < two_objects_until else self.cfg.most_prompts
        kind = kind or rng.choice(["box", "points", "both"], p=[0.65, 0.27, 0.08]).item()
        num_points = int(rng.choice([1, 1, 2, 3])) if kind != "box" else 1
        columns = _BatchColumns()
        while len(columns.pixels) < self.cfg.batch:
            count = int(rng.integers(1, 4)) if step < one_object_until else int(rng.integers(1, 9))
            scene = make_scene(rng, TRAIN_PAIRS, count=count, photos=self.photos)
            resized = resize_scene(scene, self.size, self.keep_aspect)
            large = [i for i in rng.permutation(len(resized.masks)) if resized.masks[i].sum() >= 12]
            if not large:
                continue
            for i in large[:maximum]:
                mask, box = resized.masks[i], scene.xyxy[i] * np.tile(resized.scale, 2)
                columns.prompts.append(self.simulate_prompt(rng, mask, box, num_points))
                columns.image_index.append(len(columns.pixels))
                columns.masks.append(mask)
                columns.pairs.append(scene.pairs[i])
            columns.pixels.append(resized.image)
            columns.foreground.append(np.any(resized.masks, axis=0))
        return columns.to_batch(kind)


class TrainableSegmenter(ABC):
    """Run a segmentation model with gradients and with all mask tokens.

    Args:
        model: The model.

    Attributes:
        model: As above.
        size: Side of the model's input in pixels.
        keep_aspect: See `resize_scene`.
        prompt_encoder: Its prompt encoder.
        decoder: Its mask decoder.
        mask_token: Index of the first mask token among the decoder's output tokens.
        fine_channels: Number of channels of the finest features.
    """

    model: Any
    size: int
    keep_aspect: bool
    mask_token: int
    prompt_encoder: Any
    decoder: Any
    fine_channels: int

    @abstractmethod
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features of images `(b, 3, size, size)`, from the finest to the image embedding."""

    @abstractmethod
    def decode(
        self, features: tuple[Tensor, Tensor, Tensor], batch: PromptBatch, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict masks for the prompts of a batch.

        Args:
            features: As `encode` returns them.
            batch: The prompts.
            mask: Mask prompts, logits `(n, 1, low, low)`.

        Returns:
            Mask logits `(n, k, low, low)` and predicted IoU `(n, k)`; the first of the k masks is the single-mask
            output.
        """


class TrainableSam2(TrainableSegmenter):
    """SAM 2, run as `SAM2ImagePredictor` does."""

    keep_aspect = False
    mask_token = 2

    def __init__(self, model: Any) -> None:
        self.model, self.size = model, model.image_size
        self.decoder = model.sam_mask_decoder
        self.prompt_encoder = model.sam_prompt_encoder
        self.fine_channels = self.decoder.transformer_dim // 8

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features at a quarter, an eighth and a sixteenth of the input's resolution."""
        out = self.model.forward_image(pixels)["backbone_fpn"]
        embedding = out[2] + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return out[0], out[1], embedding

    def decode(
        self, features: tuple[Tensor, Tensor, Tensor], batch: PromptBatch, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict all masks at once; see `TrainableSegmenter.decode`."""
        fine, middle, embedding = (level[batch.image_index] for level in features)
        corners = batch.boxes.reshape(-1, 2, 2)
        corner_labels = torch.tensor([[2, 3]]).expand(len(corners), -1)  # SAM 2 takes boxes as two labeled points
        prompts = {"box": [(corners, corner_labels)], "points": [(batch.points, batch.labels)]}
        prompts["both"] = prompts["box"] + prompts["points"]
        points = torch.cat([points for points, _ in prompts[batch.kind]], 1)
        labels = torch.cat([labels for _, labels in prompts[batch.kind]], 1)
        sparse, dense = self.prompt_encoder(points=(points, labels), boxes=None, masks=mask)
        masks, iou, _tokens, _object_score = self.decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=[fine, middle],
        )
        return masks, iou


class TrainableSam(TrainableSegmenter):
    """SAM, run as `SamPredictor` does."""

    keep_aspect = True
    mask_token = 1

    def __init__(self, model: Any) -> None:
        self.model, self.size = model, model.image_encoder.img_size
        self.decoder = model.mask_decoder
        self.prompt_encoder = model.prompt_encoder
        self.fine_channels = self.decoder.transformer_dim

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image embedding, three times, as there are no finer features."""
        embedding = self.model.image_encoder(pixels)
        return embedding, embedding, embedding

    def decode(
        self, features: tuple[Tensor, Tensor, Tensor], batch: PromptBatch, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict masks image by image; see `TrainableSegmenter.decode`."""
        sparse, dense = self.prompt_encoder(
            points=(batch.points, batch.labels) if batch.kind != "box" else None,
            boxes=batch.boxes if batch.kind != "points" else None,
            masks=mask,
        )
        predictions = [
            self.decoder.predict_masks(
                image_embeddings=features[-1][i : i + 1],
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse[batch.image_index == i],
                dense_prompt_embeddings=dense[batch.image_index == i],
            )
            for i in range(len(features[-1]))
        ]
        masks, iou = (torch.cat(part) for part in zip(*predictions, strict=True))
        return masks, iou


class AuxiliaryHeads(nn.Module):
    """Heads that are used in training only.

    Args:
        channels: Number of channels of the decoder's transformer.
        fine_channels: Number of channels of the finest features.

    Attributes:
        inside: Predicts from a cell after the transformer how much of it lies in the prompted box.
        box: Predicts the box from the mask token.
        cell: Predicts from a cell of the image embedding whether it is foreground, the offset to the center of its
            object, and the object's shape and color.
        fine: Predicts foreground from the finest features.
    """

    def __init__(self, channels: int, fine_channels: int) -> None:
        super().__init__()
        self.inside = nn.Linear(channels, 1)
        self.box = nn.Linear(channels, 4)
        self.cell = nn.Conv2d(channels, 1 + 2 + len(SHAPES) + len(COLORS), 1)
        self.fine = nn.Conv2d(fine_channels, 1 + len(COLORS), 1)


def mask_loss(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the loss of predicted masks: cross-entropy normalized by object area, plus Dice loss.

    Args:
        logits: Predicted masks, `(n, k, s, s)`.
        masks: Ground truth, `(n, s, s)` of 0 and 1.

    Returns:
        The loss `(n, k)` and the IoU `(n, k)` of each predicted mask.
    """
    target = masks[:, None]
    area = target.sum((2, 3)).clamp(min=60)
    entropy = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none").sum((2, 3))
    probability = logits.sigmoid()
    overlap = (probability * target).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
    predicted = (logits > 0).float()
    intersection = (predicted * target).sum((2, 3))
    iou = intersection / (predicted.sum((2, 3)) + target.sum((2, 3)) - intersection).clamp(min=1)
    return entropy / area + dice, iou.detach()


class SegmentationLoss:
    """Compute the loss of a segmenter: masks, predicted IoU, and auxiliary heads.

    Args:
        segmenter: The segmenter.
        heads: The auxiliary heads.
    """

    def __init__(self, segmenter: TrainableSegmenter, heads: AuxiliaryHeads) -> None:
        self.segmenter, self.heads = segmenter, heads
        self._transformer_outputs: list[tuple[Tensor, Tensor]] = []  # tokens and cells, of each call
        segmenter.decoder.transformer.register_forward_hook(self._keep_output)

    def _keep_output(self, _module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._transformer_outputs.append(output)

    def __call__(self, batch: PromptBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        features = self.segmenter.encode(batch.pixels)
        self._transformer_outputs.clear()
        logits, predicted_iou = self.segmenter.decode(features, batch)
        auxiliary: Tensor = sum([*self._prompt_losses(batch), *self._feature_losses(features, batch)])  # type: ignore[assignment]
        losses, iou = mask_loss(self.upsample(logits), batch.masks)
        # Of the multi-mask outputs, mainly the best one is trained.
        total = losses[:, 0].mean() + losses[:, 1:].min(1).values.mean() + 0.1 * losses[:, 1:].mean()
        total = total + F.mse_loss(predicted_iou, iou)
        if step > _REFINE_FROM and step % 4 == 0:  # refine the masks, as with a mask prompt
            best = logits[torch.arange(len(logits)), predicted_iou.argmax(1)][:, None].detach().clamp(-32, 32)
            logits, predicted_iou = self.segmenter.decode(features, batch, best)
            losses, iou = mask_loss(self.upsample(logits), batch.masks)
            total = total + losses[:, 0].mean() + 0.3 * losses[:, 1:].mean() + F.mse_loss(predicted_iou, iou)
        metrics = {
            "iou": iou[:, 0].mean().item(),
            "iou_multi": iou[:, 1:].max(1).values.mean().item(),
            "auxiliary": auxiliary.item(),
        }
        return total + max(0.05, 1 - step / 4000) * auxiliary, metrics

    def upsample(self, logits: Tensor) -> Tensor:
        """Resize mask logits to the input's resolution."""
        size = self.segmenter.size
        return F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)

    def _prompt_losses(self, batch: PromptBatch) -> Iterator[Tensor]:
        """Compute the losses of the heads that predict where the prompted box is."""
        tokens, cells = (torch.cat(part) for part in zip(*self._transformer_outputs, strict=True))
        side = round(cells.shape[1] ** 0.5)
        covered = _box_coverage(batch.boxes, side, self.segmenter.size).flatten(1)
        yield F.binary_cross_entropy_with_logits(self.heads.inside(cells)[..., 0], covered)
        if batch.kind != "points":
            predicted = self.heads.box(tokens[:, self.segmenter.mask_token])
            yield 3 * F.l1_loss(predicted, batch.boxes / self.segmenter.size)

    def _feature_losses(self, features: tuple[Tensor, Tensor, Tensor], batch: PromptBatch) -> Iterator[Tensor]:
        """Compute the losses of the dense heads on the image features."""
        side = features[-1].shape[-1]
        cells = self.heads.cell(features[-1])
        fine = self.heads.fine(features[0])
        for predicted in (cells, fine):
            foreground = F.interpolate(batch.foreground[:, None], predicted.shape[-2:], mode="area")
            yield F.binary_cross_entropy_with_logits(predicted[:, :1], foreground)
        coverage = F.interpolate(batch.masks[:, None], (side, side), mode="area")[:, 0]
        index, ys, xs = (coverage > 0.5).nonzero(as_tuple=True)  # object, row and column of the cells it covers
        if not len(index):
            return
        predicted = cells[batch.image_index[index], :, ys, xs]
        centers = _cell_centers(side, self.segmenter.size)
        box_centers = (batch.boxes[:, :2] + batch.boxes[:, 2:])[index] / 2
        offsets = (box_centers - torch.stack([centers[xs], centers[ys]], 1)) / (self.segmenter.size / 8)
        yield F.l1_loss(predicted[:, 1:3], offsets)
        shapes = torch.tensor([SHAPES.index(shape) for _, shape in batch.pairs])[index]
        colors = torch.tensor([list(COLORS).index(color) for color, _ in batch.pairs])[index]
        yield F.cross_entropy(predicted[:, 3 : 3 + len(SHAPES)], shapes)
        yield F.cross_entropy(predicted[:, 3 + len(SHAPES) :], colors)


def _cell_centers(side: int, size: int) -> Tensor:
    """Return the centers of the cells along one side of the feature grid, in pixels of the input."""
    return (torch.arange(side) + 0.5) * (size / side)


def _box_coverage(boxes: Tensor, side: int, size: int) -> Tensor:
    """Return the share of each cell that lies in each box, `(n, side, side)`."""
    centers, step = _cell_centers(side, size), size / side
    x0, y0, x1, y1 = boxes.T[..., None]
    in_x = ((torch.minimum(x1, centers + step / 2) - torch.maximum(x0, centers - step / 2)) / step).clamp(0, 1)
    in_y = ((torch.minimum(y1, centers + step / 2) - torch.maximum(y0, centers - step / 2)) / step).clamp(0, 1)
    return in_y[:, :, None] * in_x[:, None, :]


def load_decoder(model: nn.Module, path: str) -> None:
    """Load prompt encoder and mask decoder of a trained SAM 2 into a SAM, where shapes agree."""
    prefixes = {"sam_prompt_encoder.": "prompt_encoder.", "sam_mask_decoder.": "mask_decoder."}
    renamed = {
        new + name[len(old) :]: value
        for name, value in load_file(path).items()
        for old, new in prefixes.items()
        if name.startswith(old)
    }
    own = model.state_dict()
    fitting = {k: v.float() for k, v in renamed.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)
    log.info("%d tensors of %d from %s", len(fitting), len(own), path)


def main() -> None:
    """Train the segmenter and write its weights to `out`."""
    cfg = load_settings("segmenter")
    model = build_segmenter(cfg.model)
    if cfg.decoder_from:
        load_decoder(model, cfg.decoder_from)
    segmenter: TrainableSegmenter = TrainableSam2(model) if cfg.model == "sam2" else TrainableSam(model)
    batches = PromptBatches(cfg, segmenter.size, segmenter.keep_aspect)
    heads = AuxiliaryHeads(segmenter.decoder.transformer_dim, segmenter.fine_channels)
    loss_fn = SegmentationLoss(segmenter, heads)
    log.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)

    def validate() -> dict[str, float]:
        ious: dict[PromptKind, list[float]] = {"box": [], "points": []}
        for kind, values in ious.items():
            for i in range(cfg.validation_scenes // cfg.batch):
                batch = batches(10**6 + i, seed=9, kind=kind)
                logits, _ = segmenter.decode(segmenter.encode(batch.pixels), batch)
                _, iou = mask_loss(loss_fn.upsample(logits[:, :1]), batch.masks)
                values.extend(iou[:, 0].tolist())
        return {kind: float(np.mean(values)) for kind, values in ious.items()}

    try:
        fit(model, batches, loss_fn, cfg, validate, auxiliary_heads=[heads])
    finally:  # also when interrupted
        save_weights(model, Path(cfg.out) / f"{cfg.model}.safetensors")


if __name__ == "__main__":
    main()
