"""Train the small SAM or SAM 2 on scenes: `python -m grounded_sam.shapes.training.segmenter model=sam2 out=DIR`.

Mask losses alone reach a plateau, since nothing tells the decoder where a box is. Auxiliary heads, used in training
only, overcome it: one predicts for every image cell after the two-way transformer how much of it lies in the prompted
box, one predicts the box from the mask token, and a dense one makes the image features useful from the start.

Objects are prompted with a box, a click near their middle, or both, and then corrected as in SAM (Kirillov et al.
2023): each further click is in the middle of the largest error, and the logits of the previous mask are a prompt too.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
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

from grounded_sam.shapes.scenes import (
    COLORS,
    SHAPES,
    TRAIN_PAIRS,
    Scene,
    crop_scene,
    load_photos,
    make_crowded_scene,
    make_scene,
)
from grounded_sam.shapes.training.loop import fit, load_settings, move_batch, save_weights

log = logging.getLogger(__name__)

PromptKind = Literal["box", "points", "both"]

_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_STD = np.array([58.395, 57.12, 57.375], np.float32)
#: Side of the masks that losses are computed on, in pixels. Bilinear upsampling from the decoder's masks, and targets
#: that are averages over pixels, keep the boundary exact to a part of a pixel.
LOSS_SIDE = 128


def build_segmenter(name: str) -> nn.Module:
    """Build an untrained model from `shapes/sam2.yaml` or `shapes/sam.yaml`."""
    cfg = OmegaConf.load(Path(__file__).parents[1] / f"{name}.yaml")
    model: nn.Module = instantiate(cfg.model)
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
class PromptBatch:
    """Scenes in the coordinates of the model's input, with prompts; objects are ordered by image.

    Attributes:
        pixels: Normalized images, `(b, 3, size, size)`.
        image_index: Image of each prompted object, `(n,) int64`.
        masks: Mask of each object, averaged over pixels, `(n, LOSS_SIDE, LOSS_SIDE) float32` from 0 to 1.
        boxes: Box prompts, xyxy in pixels of the input, `(n, 4)`.
        points: A click on each object, in pixels of the input, `(n, 1, 2)`.
        kind: Which of the prompts are used.
        foreground: Union of the masks of all objects in each image, `(b, LOSS_SIDE, LOSS_SIDE)`.
        shapes: Index of the shape of each object in `SHAPES`, `(n,) int64`.
        colors: Index of its color in `COLORS`, `(n,) int64`.
    """

    pixels: Tensor
    image_index: Tensor
    masks: Tensor
    boxes: Tensor
    points: Tensor
    kind: PromptKind
    foreground: Tensor
    shapes: Tensor
    colors: Tensor


@dataclass(frozen=True)
class ObjectPrompts:
    """Prompts of one round, in pixels of the model's input.

    Attributes:
        boxes: xyxy, `(n, 4)`.
        points: `(n, p, 2)`.
        labels: 1 for a point on the object, 0 for one beside it, `(n, p)`.
        logits: Mask logits of the previous round, `(n, 1, low, low)`.
    """

    boxes: Tensor | None = None
    points: Tensor | None = None
    labels: Tensor | None = None
    logits: Tensor | None = None

    @classmethod
    def first(cls, batch: PromptBatch) -> ObjectPrompts:
        """Return the prompts of the first round."""
        boxes = batch.boxes if batch.kind != "points" else None
        if batch.kind == "box":
            return cls(boxes)
        return cls(boxes, batch.points, torch.ones_like(batch.points[..., 0], dtype=torch.int64))

    def select(self, rows: slice) -> ObjectPrompts:
        """Return the prompts of some objects."""
        parts = (self.boxes, self.points, self.labels, self.logits)
        return ObjectPrompts(*(None if part is None else part[rows] for part in parts))

    def with_click(self, points: Tensor, labels: Tensor, logits: Tensor) -> ObjectPrompts:
        """Add one click per object, `(n, 2)` and `(n,)`, and the logits of the mask that it corrects."""
        points, labels = points[:, None], labels[:, None]
        if self.points is not None and self.labels is not None:
            points, labels = torch.cat([self.points, points], 1), torch.cat([self.labels, labels], 1)
        return ObjectPrompts(self.boxes, points, labels, logits)


def middle_of(region: NDArray[np.uint8]) -> tuple[float, float]:
    """Return the pixel of a region that is farthest from its border, as (x, y) of the pixel's center.

    >>> middle_of(np.pad(np.ones((3, 3), np.uint8), 2))
    (3.5, 3.5)
    """
    distance = cv2.distanceTransform(np.pad(region, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(x) + 0.5, float(y) + 0.5


def correcting_click(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[float, float, int]:
    """Return the click that an annotator would make next: the middle of the largest connected error.

    Args:
        mask: Predicted mask, `(h, w)`.
        truth: Ground truth of the same size, not empty.

    Returns:
        x and y in pixels of the mask, and 1 if the pixel belongs to the object, else 0. If there is no error, the
        middle of the object.

    >>> truth = np.zeros((8, 8), bool)
    >>> truth[2:7, 2:7] = True
    >>> correcting_click(np.zeros((8, 8), bool), truth)
    (4.5, 4.5, 1)
    """
    best = (0, truth, 1)
    for label, error in ((1, truth & ~mask), (0, mask & ~truth)):
        count, components, statistics, _ = cv2.connectedComponentsWithStats(error.astype(np.uint8), connectivity=4)
        if count > 1:
            largest = 1 + int(statistics[1:, cv2.CC_STAT_AREA].argmax())
            area = int(statistics[largest, cv2.CC_STAT_AREA])
            if area > best[0]:
                best = (area, components == largest, label)
    x, y = middle_of(best[1].astype(np.uint8))
    return x, y, best[2]


def jitter_box(rng: np.random.Generator, box: NDArray[Any], size: int) -> NDArray[np.float64]:
    """Move the sides of a box xyxy as a detector would, within an input of `size` pixels."""
    sides = np.tile(box[2:] - box[:2], 2)
    limit = 0.12 * sides + 1
    jitter = rng.normal(0, 0.035, 4) * sides + rng.normal(0, 0.4, 4)
    return np.clip(box + np.clip(jitter, -limit, limit), 0, size)


def sample_click(rng: np.random.Generator, mask: NDArray[np.float32]) -> tuple[float, float]:
    """Sample a click on an object: mostly near the middle, else anywhere on it; (x, y) in pixels of the mask."""
    distance = cv2.distanceTransform(np.pad((mask > 0).astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    threshold = rng.choice([0.98, 0.6, 0.0], p=[0.5, 0.3, 0.2]) * distance.max()
    ys, xs = np.nonzero((distance > 0) & (distance >= threshold))
    i = int(rng.integers(len(xs)))
    return float(xs[i]) + 0.5, float(ys[i]) + 0.5


class PromptBatches:
    """Make the batch of a step: scenes with simulated prompts.

    Args:
        cfg: Settings `seed`, `batch`, `photos`, `crowded`, `curriculum` and `most_prompts`.
        size: Side of the model's input in pixels.
        keep_aspect: See `resize_scene`.
    """

    def __init__(self, cfg: DictConfig, size: int, keep_aspect: bool) -> None:
        self.cfg, self.size, self.keep_aspect = cfg, size, keep_aspect
        self.photos = load_photos(cfg.photos)

    def __call__(self, step: int, seed: int = 2, kind: PromptKind | None = None) -> PromptBatch:
        rng = np.random.default_rng([self.cfg.seed, seed, step])
        one_object_until, two_objects_until = self.cfg.curriculum
        maximum = 1 if step < one_object_until else 2 if step < two_objects_until else self.cfg.most_prompts
        # Boxes tell the decoder more than clicks, so it learns from them first.
        share_of_boxes = 0.9 if step < two_objects_until else 0.5
        rest = 1 - share_of_boxes
        kind = kind or rng.choice(["box", "points", "both"], p=[share_of_boxes, 0.84 * rest, 0.16 * rest]).item()
        images: list[ResizedScene] = []
        image_index, masks, boxes, points, pairs = [], [], [], [], []
        while len(images) < self.cfg.batch:
            scene = self._sample_scene(rng, few=step < one_object_until)
            resized = resize_scene(scene, self.size, self.keep_aspect)
            large = [i for i in rng.permutation(len(resized.masks)) if resized.masks[i].sum() >= 12]
            if not large:
                continue
            for i in large[:maximum]:
                image_index.append(len(images))
                masks.append(resized.masks[i])
                boxes.append(jitter_box(rng, scene.xyxy[i] * np.tile(resized.scale, 2), self.size))
                points.append(sample_click(rng, resized.masks[i]))
                pairs.append(scene.pairs[i])
            images.append(resized)
        return PromptBatch(
            pixels=torch.from_numpy(np.stack([image.image for image in images])).permute(0, 3, 1, 2),
            image_index=torch.tensor(image_index),
            masks=shrink_masks(np.stack(masks)),
            boxes=torch.from_numpy(np.stack(boxes)).float(),
            points=torch.tensor(points, dtype=torch.float32)[:, None],
            kind=kind,
            foreground=shrink_masks(np.stack([image.masks.max(0) for image in images])),
            shapes=torch.tensor([SHAPES.index(shape) for _, shape in pairs]),
            colors=torch.tensor([list(COLORS).index(color) for color, _ in pairs]),
        )

    def _sample_scene(self, rng: np.random.Generator, few: bool) -> Scene:
        """Sample a scene of one to three or one to eight objects, or a part of a crowded one."""
        if not few and rng.random() < self.cfg.crowded:
            scene = make_crowded_scene(rng, TRAIN_PAIRS, photos=self.photos)
            height, width = scene.image.shape[:2]
            h, w = int(rng.integers(120, height + 1)), int(rng.integers(120, width + 1))
            return crop_scene(scene, int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h)
        return make_scene(rng, TRAIN_PAIRS, count=int(rng.integers(1, 4 if few else 9)), photos=self.photos)


def shrink_masks(masks: NDArray[np.float32]) -> Tensor:
    """Average masks `(n, size, size)` over pixels, to `(n, LOSS_SIDE, LOSS_SIDE)`."""
    return F.interpolate(torch.from_numpy(masks)[None], (LOSS_SIDE, LOSS_SIDE), mode="area")[0]


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

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @abstractmethod
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features of images `(b, 3, size, size)`, from the finest to the image embedding."""

    @abstractmethod
    def decode(
        self, features: tuple[Tensor, Tensor, Tensor], image_index: Tensor, prompts: ObjectPrompts
    ) -> tuple[Tensor, Tensor]:
        """Predict masks for prompts.

        Args:
            features: As `encode` returns them.
            image_index: Image of each object, ascending, `(n,)`.
            prompts: The prompts.

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
        self, features: tuple[Tensor, Tensor, Tensor], image_index: Tensor, prompts: ObjectPrompts
    ) -> tuple[Tensor, Tensor]:
        """Predict all masks at once; see `TrainableSegmenter.decode`."""
        fine, middle, embedding = (level[image_index] for level in features)
        points, labels = [], []
        if prompts.boxes is not None:  # SAM 2 takes boxes as two labeled points
            points.append(prompts.boxes.reshape(-1, 2, 2))
            labels.append(torch.tensor([[2, 3]], device=points[0].device).expand(len(points[0]), -1))
        if prompts.points is not None and prompts.labels is not None:
            points.append(prompts.points)
            labels.append(prompts.labels)
        coordinates = (torch.cat(points, 1), torch.cat(labels, 1))
        sparse, dense = self.prompt_encoder(points=coordinates, boxes=None, masks=prompts.logits)
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
        self, features: tuple[Tensor, Tensor, Tensor], image_index: Tensor, prompts: ObjectPrompts
    ) -> tuple[Tensor, Tensor]:
        """Predict masks image by image; see `TrainableSegmenter.decode`."""
        has_points = prompts.points is not None and prompts.labels is not None
        sparse, dense = self.prompt_encoder(
            points=(prompts.points, prompts.labels) if has_points else None, boxes=prompts.boxes, masks=prompts.logits
        )
        predictions = [
            self.decoder.predict_masks(
                image_embeddings=features[-1][i : i + 1],
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse[image_index == i],
                dense_prompt_embeddings=dense[image_index == i],
            )
            for i in image_index.unique().tolist()
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
        logits: Predicted masks, `(n, k, h, w)`; they are resized to the ground truth.
        masks: Ground truth, `(n, s, s)` from 0 to 1.

    Returns:
        The loss `(n, k)` and the IoU `(n, k)` of each predicted mask.
    """
    logits = F.interpolate(logits.float(), masks.shape[-2:], mode="bilinear", align_corners=False)
    target = masks[:, None]
    area = target.sum((2, 3)).clamp(min=60 * (masks.shape[-1] / 256) ** 2)
    entropy = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none").sum((2, 3))
    probability = logits.sigmoid()
    overlap = (probability * target).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
    return entropy / area + dice, predicted_mask_iou(logits, masks)


@torch.no_grad()
def predicted_mask_iou(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the IoU `(n, k)` of predicted masks `(n, k, s, s)` with the ground truth `(n, s, s)`."""
    predicted, truth = (logits > 0).float(), (masks[:, None] >= 0.5).float()
    intersection = (predicted * truth).sum((2, 3))
    return intersection / (predicted.sum((2, 3)) + truth.sum((2, 3)) - intersection).clamp(min=1)


def correct(prompts: ObjectPrompts, logits: Tensor, masks: Tensor, size: int) -> ObjectPrompts:
    """Add the click that corrects each mask most, and the mask itself, to prompts.

    Args:
        prompts: Prompts of the round.
        logits: Logits of the mask that the round predicted, `(n, low, low)`.
        masks: Ground truth, `(n, s, s)` from 0 to 1.
        size: Side of the model's input in pixels.
    """
    side = masks.shape[-1]
    resized = F.interpolate(logits[:, None].float(), (side, side), mode="bilinear", align_corners=False)[:, 0]
    predicted, truth = (resized > 0).cpu().numpy(), (masks >= 0.5).cpu().numpy()
    clicks = [correcting_click(*pair) for pair in zip(predicted, truth, strict=True)]
    points = torch.tensor([click[:2] for click in clicks], dtype=torch.float32) * (size / side)
    labels = torch.tensor([click[2] for click in clicks])
    device = logits.device
    return prompts.with_click(points.to(device), labels.to(device), logits[:, None].detach().clamp(-32, 32))


def prompted_rounds(
    segmenter: TrainableSegmenter,
    features: tuple[Tensor, Tensor, Tensor],
    batch: PromptBatch,
    rounds: int,
    corrected: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Prompt objects, and correct the masks with clicks as an annotator would.

    Args:
        segmenter: The segmenter.
        features: Features of the images.
        batch: The objects and the prompts of the first round.
        rounds: Number of rounds.
        corrected: Which objects are prompted again after the first round.

    Yields:
        Mask logits `(n, k, low, low)`, predicted IoU `(n, k)` and ground truth `(n, s, s)` of each round. Of the first
        round after a click, the mask with the highest predicted IoU is corrected, otherwise the single-mask output.
    """
    prompts, image_index, masks = ObjectPrompts.first(batch), batch.image_index, batch.masks
    for i in range(rounds):
        logits, predicted_iou = segmenter.decode(features, image_index, prompts)
        yield logits, predicted_iou, masks
        if i + 1 == rounds:
            break
        several = batch.kind == "points" and i == 0
        best = 1 + predicted_iou[:, 1:].argmax(1) if several else torch.zeros_like(image_index)
        chosen = logits[torch.arange(len(logits), device=logits.device), best]
        if i == 0:
            image_index, masks, chosen = image_index[corrected], masks[corrected], chosen[corrected]
            prompts = prompts.select(corrected)
        prompts = correct(prompts, chosen, masks, segmenter.size)


class SegmentationLoss:
    """Compute the loss of a segmenter: masks, predicted IoU, and auxiliary heads.

    Args:
        segmenter: The segmenter.
        heads: The auxiliary heads.
        refine_from: First step at which masks are corrected with clicks.
    """

    def __init__(self, segmenter: TrainableSegmenter, heads: AuxiliaryHeads, refine_from: int) -> None:
        self.segmenter, self.heads, self.refine_from = segmenter, heads, refine_from
        self._transformer_outputs: list[tuple[Tensor, Tensor]] = []  # tokens and cells, of each call
        segmenter.decoder.transformer.register_forward_hook(self._keep_output)

    def _keep_output(self, _module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._transformer_outputs.append(output)

    def __call__(self, batch: PromptBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        features = self.segmenter.encode(batch.pixels)
        total, metrics = torch.zeros((), device=batch.pixels.device), {}
        auxiliary = sum(self._feature_losses(features, batch), start=torch.zeros_like(total))
        self._transformer_outputs.clear()
        rounds = 1 if step < self.refine_from else (1, 2, 1, 3, 2, 4)[step % 6]
        half = slice(step % 2, None, 2) if len(batch.masks) > 1 else slice(None)  # to save time
        predictions = prompted_rounds(self.segmenter, features, batch, rounds, corrected=half)
        for i, (logits, predicted_iou, masks) in enumerate(predictions):
            if i == 0:
                auxiliary = sum(self._prompt_losses(batch), start=auxiliary)
            loss, iou = round_loss(logits, predicted_iou, masks)
            total = total + loss / rounds
            if i == 0:
                metrics = {"iou": iou[:, 0].mean().item(), "iou_multi": iou[:, 1:].max(1).values.mean().item()}
        metrics["auxiliary"] = auxiliary.item()
        return total + max(0.05, 1 - step / 4000) * auxiliary, metrics

    def _prompt_losses(self, batch: PromptBatch) -> Iterator[Tensor]:
        """Compute the losses of the heads that predict where the prompted box is."""
        tokens, cells = (torch.cat(part) for part in zip(*self._transformer_outputs, strict=True))
        side = round(cells.shape[1] ** 0.5)
        covered = _box_coverage(batch.boxes, side, self.segmenter.size).flatten(1)
        yield F.binary_cross_entropy_with_logits(self.heads.inside(cells)[..., 0].float(), covered)
        if batch.kind != "points":
            predicted = self.heads.box(tokens[:, self.segmenter.mask_token])
            yield 3 * F.l1_loss(predicted.float(), batch.boxes / self.segmenter.size)

    def _feature_losses(self, features: tuple[Tensor, Tensor, Tensor], batch: PromptBatch) -> Iterator[Tensor]:
        """Compute the losses of the dense heads on the image features."""
        side = features[-1].shape[-1]
        cells = self.heads.cell(features[-1]).float()
        fine = self.heads.fine(features[0]).float()
        for predicted in (cells, fine):
            foreground = F.interpolate(batch.foreground[:, None], predicted.shape[-2:], mode="area")
            yield F.binary_cross_entropy_with_logits(predicted[:, :1], foreground)
        coverage = F.interpolate(batch.masks[:, None], (side, side), mode="area")[:, 0]
        index, ys, xs = (coverage > 0.5).nonzero(as_tuple=True)  # object, row and column of the cells it covers
        if not len(index):
            return
        predicted = cells[batch.image_index[index], :, ys, xs]
        centers = _cell_centers(side, self.segmenter.size).to(cells.device)
        box_centers = (batch.boxes[:, :2] + batch.boxes[:, 2:])[index] / 2
        offsets = (box_centers - torch.stack([centers[xs], centers[ys]], 1)) / (self.segmenter.size / 8)
        yield F.l1_loss(predicted[:, 1:3], offsets)
        yield F.cross_entropy(predicted[:, 3 : 3 + len(SHAPES)], batch.shapes[index])
        yield F.cross_entropy(predicted[:, 3 + len(SHAPES) :], batch.colors[index])


def round_loss(logits: Tensor, predicted_iou: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of one round, and the IoU `(n, k)` of its masks.

    Of the multi-mask outputs, mainly the best one is trained.
    """
    losses, iou = mask_loss(logits, masks)
    total = losses[:, 0].mean() + losses[:, 1:].min(1).values.mean() + 0.1 * losses[:, 1:].mean()
    return total + 2 * F.mse_loss(predicted_iou.float(), iou), iou


def _cell_centers(side: int, size: int) -> Tensor:
    """Return the centers of the cells along one side of the feature grid, in pixels of the input."""
    return (torch.arange(side) + 0.5) * (size / side)


def _box_coverage(boxes: Tensor, side: int, size: int) -> Tensor:
    """Return the fraction of each cell that lies in each box, `(n, side, side)`."""
    centers, step = _cell_centers(side, size).to(boxes.device), size / side
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


def validate_clicks(segmenter: TrainableSegmenter, batches: PromptBatches, count: int) -> dict[str, float]:
    """Return the mean IoU for boxes, one click, one correction and three corrections, on `count` held-out scenes.

    After one click, the mask is the one with the highest predicted IoU of three.
    """
    ious: dict[str, list[float]] = {"box": [], "click": [], "click_2": [], "click_4": []}
    for i in range(max(count // batches.cfg.batch, 1)):
        batch = move_batch(batches(10**6 + i, seed=9, kind="box"), segmenter.device)
        features = segmenter.encode(batch.pixels)
        logits, _, _ = next(prompted_rounds(segmenter, features, batch, 1))
        ious["box"] += _upsampled_iou(logits, batch.masks)[:, 0].tolist()
        middles = [middle_of((mask >= 0.5).astype(np.uint8)) for mask in batch.masks.cpu().numpy()]
        points = torch.tensor(middles, device=segmenter.device)[:, None] * (segmenter.size / LOSS_SIDE)
        rounds = prompted_rounds(segmenter, features, replace(batch, kind="points", points=points), 4)
        for number, (logits, predicted_iou, masks) in enumerate(rounds, 1):
            iou = _upsampled_iou(logits, masks)
            if number == 1:
                best = 1 + predicted_iou[:, 1:].argmax(1, keepdim=True)
                ious["click"] += iou.gather(1, best)[:, 0].tolist()
            elif number in (2, 4):
                ious[f"click_{number}"] += iou[:, 0].tolist()
    return {kind: float(np.mean(values)) for kind, values in ious.items()}


def _upsampled_iou(logits: Tensor, masks: Tensor) -> Tensor:
    return predicted_mask_iou(F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False), masks)


def main() -> None:
    """Train the segmenter and write its weights to `out`."""
    cfg = load_settings("segmenter")
    model = build_segmenter(cfg.model)
    if cfg.start_from:
        model.load_state_dict({name: value.float() for name, value in load_file(cfg.start_from).items()})
    elif cfg.decoder_from:
        load_decoder(model, cfg.decoder_from)
    segmenter: TrainableSegmenter = TrainableSam2(model) if cfg.model == "sam2" else TrainableSam(model)
    batches = PromptBatches(cfg, segmenter.size, segmenter.keep_aspect)
    heads = AuxiliaryHeads(segmenter.decoder.transformer_dim, segmenter.fine_channels)
    loss_fn = SegmentationLoss(segmenter, heads, cfg.refine_from)
    log.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)

    def validate() -> dict[str, float]:
        return validate_clicks(segmenter, batches, cfg.validation_scenes)

    try:
        fit(model, batches, loss_fn, cfg, validate, auxiliary_heads=[heads])
    finally:  # also when interrupted
        save_weights(model, Path(cfg.out) / f"{cfg.model}.safetensors")


if __name__ == "__main__":
    main()
