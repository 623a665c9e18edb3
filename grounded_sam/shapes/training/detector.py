"""Train the small Grounding DINO on scenes: `python -m grounded_sam.shapes.training.detector out=DIR`.

The backbone is trained alone first, on crops of single objects, with trainable batch norms. Inside the detector, where
Grounding DINO freezes them, the backbone learns shapes far too slowly: a Swin backbone reached 25% after 18,000
scenes, this one more than 90% after two minutes of crops. The whole model is trained after that, first with the focal
loss, then with cross-entropy, a proper scoring rule, so that scores are close to probabilities. Finally they
are calibrated on scenes with pairs that training does not use (`scenes.VALIDATION_PAIRS`): a scale and an offset for
each number of tokens in a phrase, which the model's config stores as `phrase_calibration`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou
from transformers import (
    AutoBackbone,
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
)

from grounded_sam.shapes.phrases import Phrase, build_tokenizer, sample_phrases
from grounded_sam.shapes.scenes import (
    COLORS,
    EXTRA_COLORS,
    EXTRA_PAIRS,
    EXTRA_SHAPES,
    SHAPES,
    TRAIN_PAIRS,
    Pair,
    Scene,
    crop_scene,
    draw_scene,
    load_photos,
    make_background,
    make_crowded_scene,
    make_scene,
    sample_object,
)
from grounded_sam.shapes.training.calibration import calibrate
from grounded_sam.shapes.training.loop import fit, load_settings, training_stage

log = logging.getLogger(__name__)

SHORT_SIDE, LONG_SIDE = 160, 320
MAX_TOKENS = 64
ALL_SHAPES, ALL_COLORS = (*SHAPES, *EXTRA_SHAPES), (*COLORS, *EXTRA_COLORS)


def detector_config(vocabulary_size: int) -> GroundingDinoConfig:
    """Return the architecture: Grounding DINO tiny, scaled down, with a ResNet instead of Swin."""
    return GroundingDinoConfig(
        backbone_config={
            "model_type": "resnet",
            "layer_type": "basic",
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128, 192],
            "depths": [1, 2, 2, 1],
            "out_indices": [2, 3, 4],
        },
        text_config={
            "model_type": "bert",
            "vocab_size": vocabulary_size,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 512,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        d_model=64,
        num_queries=40,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_feature_levels=3,
        encoder_n_points=2,
        decoder_n_points=4,
        dropout=0.0,
        fusion_droppath=0.0,
        max_text_len=MAX_TOKENS,
        two_stage=True,
        decoder_bbox_embed_share=False,
    )


def build_detector(vocabulary_size: int) -> GroundingDinoForObjectDetection:
    """Build an untrained detector whose initial logits are near -4.4, as its contrastive head has no bias."""
    model = GroundingDinoForObjectDetection(detector_config(vocabulary_size))
    model.requires_grad_(True)  # transformers freezes parts of a convolutional backbone
    with torch.no_grad():
        for layer in model.model.encoder.layers:
            layer.fusion_layer.vision_param.fill_(0.1)
            layer.fusion_layer.text_param.fill_(0.1)
        text = model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after
        for norm, sign in ((text, -1), (model.model.decoder.layer_norm, 1), (model.model.enc_output_norm, 1)):
            norm.weight.fill_(0.35)
            norm.weight[0] = 0.0
            norm.bias[0] = sign * 2.1
    return model


def build_processor(tokenizer: BertTokenizerFast) -> GroundingDinoProcessor:
    """Build the processor: images are resized to a shorter side of 160 px and a longer side of at most 320 px."""
    images = GroundingDinoImageProcessor(size={"shortest_edge": SHORT_SIDE, "longest_edge": LONG_SIDE})
    return GroundingDinoProcessor(images, tokenizer)


@dataclass(frozen=True)
class DenseTarget:
    """All objects of an image on the feature grid, for the auxiliary dense heads.

    Attributes:
        coverage: Share of each cell that each object covers, `(n, h, w)`.
        labels: Index of each object's shape and color, `(n, 2) int64`.
    """

    coverage: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DetectionBatch:
    """Images with prompts and targets.

    Attributes:
        inputs: Inputs of the model: `pixel_values (b, 3, H, W)`, `input_ids (b, T)` and so on.
        boxes: Per image, boxes of the objects that its prompt names, cxcywh from 0 to 1, `(n, 4)`.
        token_targets: Per image, 1 for the tokens of every phrase that matches the object, else 0, `(n, T)`.
        dense: Per image, all its objects.
    """

    inputs: dict[str, Tensor]
    boxes: list[Tensor]
    token_targets: list[Tensor]
    dense: list[DenseTarget]


def tokenize_phrases(tokenizer: BertTokenizerFast, phrases: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize phrases as the prompt `phrase. phrase. ...`.

    Returns:
        The token ids of the prompt, and the range (start, stop) of tokens of each phrase.

    >>> tokenize_phrases(build_tokenizer(), ["red star", "circles"])[1]
    [(1, 3), (4, 6)]
    """
    ids, ranges = [tokenizer.cls_token_id], []
    separator = tokenizer.convert_tokens_to_ids(".")
    for phrase in phrases:
        pieces = tokenizer(phrase, add_special_tokens=False)["input_ids"]
        ranges.append((len(ids), len(ids) + len(pieces)))
        ids += [*pieces, separator]
    return [*ids, tokenizer.sep_token_id], ranges


class DetectionBatches:
    """Make the batch of a step. Its scenes share an aspect ratio, so that images need no padding.

    Args:
        cfg: Settings `seed`, `batch`, `photos`, `short_sides`, `crowded`, `repeated` and `steps`.
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, cfg: DictConfig, tokenizer: BertTokenizerFast) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        self.photos = load_photos(cfg.photos)
        self.processor = GroundingDinoImageProcessor(do_resize=False, do_pad=False)

    def __call__(self, step: int) -> DetectionBatch:
        rng = np.random.default_rng([self.cfg.seed, 1, step])
        short = self._short_side(step)
        ratio = rng.uniform(1, 2)
        is_wide = rng.random() < 0.5
        height, width = (short, round(short * ratio)) if is_wide else (round(short * ratio), short)
        pixels, ids, boxes, token_targets, dense = [], [], [], [], []
        for _ in range(self.cfg.batch):
            scene = self._sample_scene(rng, ratio, is_wide)
            phrases = sample_phrases(rng, scene.pairs, TRAIN_PAIRS + EXTRA_PAIRS)
            phrases = _fitting_phrases(self.tokenizer, phrases)
            tokens, ranges = tokenize_phrases(self.tokenizer, [phrase.text for phrase in phrases])
            targets = _token_targets(scene, phrases, ranges)
            is_prompted = targets.any(1)
            pixels.append(_resize_image(scene.image, height, width))
            ids.append(tokens)
            boxes.append(_normalized_boxes(scene)[is_prompted])
            token_targets.append(targets[is_prompted])
            dense.append(_dense_target(scene, -(-height // 8), -(-width // 8)))
        length = max(map(len, ids))
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        inputs = {
            "pixel_values": self.processor(pixels, return_tensors="pt")["pixel_values"],
            "input_ids": padded,
            "attention_mask": (torch.arange(length) < torch.tensor([len(row) for row in ids])[:, None]).long(),
            "token_type_ids": torch.zeros_like(padded),
        }
        return DetectionBatch(inputs, boxes, [targets[:, :length] for targets in token_targets], dense)

    def _short_side(self, step: int) -> int:
        """Return the shorter side of the images of a step; smaller images come first, to see more of them."""
        sides = self.cfg.short_sides
        return int(sides[min(int(len(sides) * step / self.cfg.steps), len(sides) - 1)])

    def _sample_scene(self, rng: np.random.Generator, ratio: float, is_wide: bool) -> Scene:
        """Sample a scene of an aspect ratio, or a tile of a crowded one."""
        pairs: Sequence[Pair] = TRAIN_PAIRS * 4 + EXTRA_PAIRS
        if rng.random() < self.cfg.repeated:
            pairs = [pairs[i] for i in rng.integers(len(pairs), size=int(rng.integers(1, 4)))]
        if rng.random() < self.cfg.crowded:
            scene = make_crowded_scene(rng, pairs, photos=self.photos)
            height, width = scene.image.shape[:2]
            limit = min(width / ratio, height) if is_wide else min(width, height / ratio)
            side = rng.uniform(min(128, limit), min(limit, 320))
            w, h = (int(side * ratio), int(side)) if is_wide else (int(side), int(side * ratio))
            x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return crop_scene(scene, int(x), int(y), w, h)
        side = int(rng.integers(96, max(97, int(512 / ratio)) + 1))
        size_hw = (side, round(side * ratio)) if is_wide else (round(side * ratio), side)
        return make_scene(rng, pairs, size_hw=size_hw, photos=self.photos, diameter=(0.08, 0.45))


def _fitting_phrases(tokenizer: BertTokenizerFast, phrases: list[Phrase]) -> list[Phrase]:
    """Return the first phrases that fit into a prompt of `MAX_TOKENS` tokens."""
    length, fitting = 2, []
    for phrase in phrases:
        length += len(tokenizer(phrase.text, add_special_tokens=False)["input_ids"]) + 1
        if length > MAX_TOKENS:
            break
        fitting.append(phrase)
    return fitting


def _token_targets(scene: Scene, phrases: list[Phrase], ranges: list[tuple[int, int]]) -> Tensor:
    """Mark the tokens of the phrases that match each object, `(n, MAX_TOKENS)` of 0 and 1."""
    targets = torch.zeros(len(scene.pairs), MAX_TOKENS)
    for row, pair in zip(targets, scene.pairs, strict=True):
        for phrase, (start, stop) in zip(phrases, ranges, strict=True):
            if phrase.matches(pair):
                row[start:stop] = 1
    return targets


def _normalized_boxes(scene: Scene) -> Tensor:
    """Return the boxes of a scene as cxcywh from 0 to 1, `(n, 4)`."""
    height, width = scene.image.shape[:2]
    xyxy = torch.from_numpy(scene.xyxy) / torch.tensor([width, height, width, height])
    return torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], 1)


def _resize_image(image: np.ndarray, height: int, width: int) -> Tensor:
    """Resize an RGB image to `(3, height, width) uint8`."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    tensor = F.interpolate(tensor, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return tensor[0].round().to(torch.uint8)


def _dense_target(scene: Scene, height: int, width: int) -> DenseTarget:
    coverage = torch.zeros(0, height, width)
    if len(scene.pairs):
        coverage = F.interpolate(torch.from_numpy(scene.masks)[None].float(), (height, width), mode="area")[0]
    labels = [[ALL_SHAPES.index(shape), ALL_COLORS.index(color)] for color, shape in scene.pairs]
    return DenseTarget(coverage, torch.tensor(labels, dtype=torch.long).reshape(-1, 2))


def box_corners(boxes: Tensor) -> Tensor:
    """Convert boxes `(..., 4)` from center and size to corners.

    >>> box_corners(torch.tensor([[2.0, 2.0, 2.0, 4.0]])).tolist()
    [[1.0, 0.0, 3.0, 4.0]]
    """
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the element-wise sigmoid focal loss with alpha 0.25 and gamma 2 (Lin et al., 2017)."""
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = probability * (1 - targets) + (1 - probability) * targets
    return (0.25 * targets + 0.75 * (1 - targets)) * entropy * miss**2


@torch.no_grad()
def match_queries(
    logits: Tensor, boxes: Tensor, token_targets: Tensor, target_boxes: Tensor, repeats: int
) -> tuple[Tensor, Tensor]:
    """Match queries to targets with the Hungarian method and DETR's costs (class 2, L1 5, GIoU 2).

    Args:
        logits: Logits of the queries, `(q, T)`.
        boxes: Boxes of the queries, cxcywh from 0 to 1, `(q, 4)`.
        token_targets: Tokens of each target, `(n, T)` of 0 and 1; the class cost is averaged over them.
        target_boxes: Boxes of the targets, `(n, 4)`.
        repeats: Number of queries per target.

    Returns:
        Indices of the matched queries and of their targets.
    """
    probability = logits.float().sigmoid()
    boxes, token_targets = boxes.float(), token_targets.float()
    positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    weight = token_targets / token_targets.sum(1, keepdim=True)
    cost = 2 * (positive - negative) @ weight.T
    giou = generalized_box_iou(box_corners(boxes), box_corners(target_boxes))
    cost += 5 * torch.cdist(boxes, target_boxes, p=1) - 2 * giou
    rows, columns = linear_sum_assignment(cost.repeat(1, repeats).cpu().numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns) % len(target_boxes)


def set_loss(
    logits: Tensor, boxes: Tensor, batch: DetectionBatch, repeats: int = 1, proper: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the class loss and the box loss of one set of predictions.

    Args:
        logits: Logits of the queries, `(b, q, T)`.
        boxes: Boxes of the queries, cxcywh from 0 to 1, `(b, q, 4)`.
        batch: The batch with its targets.
        repeats: Number of queries that are matched to each target.
        proper: Whether the class loss is cross-entropy, a proper scoring rule, instead of the focal loss.
    """
    logits, boxes = logits.float(), boxes.float()
    mask = batch.inputs["attention_mask"].bool()
    class_targets = torch.zeros_like(logits)
    box_loss = logits.new_zeros(())
    count = max(sum(map(len, batch.boxes)), 1) * repeats
    for i, (target_boxes, token_targets) in enumerate(zip(batch.boxes, batch.token_targets, strict=True)):
        if not len(target_boxes):
            continue
        valid = mask[i]
        rows, columns = match_queries(logits[i][:, valid], boxes[i], token_targets[:, valid], target_boxes, repeats)
        class_targets[i, rows] = token_targets[columns]
        matched, expected = boxes[i, rows], target_boxes[columns]
        giou = torch.diag(generalized_box_iou(box_corners(matched), box_corners(expected)))
        box_loss = box_loss + 5 * (matched - expected).abs().sum()
        box_loss = box_loss + 2 * (1 - giou).sum()
    logits = logits.masked_fill(~mask[:, None], -30.0)
    if proper:
        class_loss = 0.25 * F.binary_cross_entropy_with_logits(logits, class_targets, reduction="none")
    else:
        class_loss = focal_loss(logits, class_targets)
    # Normalized by a typical number of positive tokens per target, which depends on the phrases.
    return 2 * (class_loss * mask[:, None]).sum() / (count * 2.0), box_loss / count


class DenseHead(nn.Module):
    """Auxiliary head that classifies every cell of the feature map, so that features become useful early.

    It predicts whether a cell contains an object, and the object's shape and color. It is used in training only.

    Args:
        channels: Number of channels of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 1 + len(ALL_SHAPES) + len(ALL_COLORS))

    def forward(self, features: Tensor, batch: DetectionBatch, height: int, width: int) -> Tensor:
        """Compute the loss for features `(b, cells, channels)` whose first `height * width` cells are used."""
        logits = self.linear(features[:, : height * width])
        total = logits.new_zeros(())
        for i, target in enumerate(batch.dense):
            coverage = target.coverage.flatten(1)
            objectness = coverage.sum(0) if len(coverage) else logits.new_zeros(height * width)
            total = total + F.binary_cross_entropy_with_logits(logits[i, :, 0], objectness.clamp(0, 1))
            if not len(target.labels):
                continue
            largest, owner = coverage.max(0)
            is_covered = largest > 0.4
            if is_covered.any():
                cells = logits[i, is_covered]
                labels = target.labels[owner[is_covered]]
                total = total + F.cross_entropy(cells[:, 1 : 1 + len(ALL_SHAPES)], labels[:, 0])
                total = total + F.cross_entropy(cells[:, 1 + len(ALL_SHAPES) :], labels[:, 1])
        return total / len(batch.dense)


_CROP_PAIRS = TRAIN_PAIRS + EXTRA_PAIRS


@dataclass(frozen=True)
class CropBatch:
    """Images of single objects.

    Attributes:
        pixels: Normalized images, `(b, 3, 64, 64)`.
        coverage: Share of each pixel that the object covers, `(b, 1, 64, 64)`.
        labels: Index of the object's shape and color, `(b, 2) int64`.
    """

    pixels: Tensor
    coverage: Tensor
    labels: Tensor


class CropBatches:
    """Make the batch of a step: single objects, 14 to 60 px wide, on canvases of 64 px.

    Args:
        cfg: Settings `seed`, `batch` and `photos`.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.photos = load_photos(cfg.photos)
        self.processor = GroundingDinoImageProcessor(do_resize=False, do_pad=False)

    def __call__(self, step: int) -> CropBatch:
        rng = np.random.default_rng([self.cfg.seed, 3, step])
        pixels, coverage, labels = [], [], []
        for _ in range(self.cfg.batch):
            side = int(64 * np.exp(rng.uniform(np.log(0.6), np.log(2.5))))
            pair = _CROP_PAIRS[rng.integers(len(_CROP_PAIRS))]
            item = sample_object(rng, pair, side, side, (0.22, 0.94))
            background = make_background(rng, side, side, self.photos)
            scene = draw_scene(background, [item], rng, noise=int(rng.integers(0, 9)))
            pixels.append(_resize_image(scene.image, 64, 64))
            coverage.append(F.interpolate(torch.from_numpy(scene.masks[:1])[None].float(), (64, 64), mode="area")[0])
            labels.append([ALL_SHAPES.index(item.shape), ALL_COLORS.index(item.color)])
        normalized = self.processor(pixels, return_tensors="pt")["pixel_values"]
        return CropBatch(normalized, torch.stack(coverage), torch.tensor(labels))


def pretrain_backbone(cfg: DictConfig, backbone: Any) -> None:
    """Train the backbone to classify shapes and colors from features pooled over the object."""
    heads = [nn.Sequential(nn.LayerNorm(c), nn.Linear(c, len(ALL_SHAPES) + len(ALL_COLORS))) for c in backbone.channels]

    def loss_fn(batch: CropBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        total, accuracy = batch.pixels.new_zeros(()), 0.0
        for features, head in zip(backbone(batch.pixels).feature_maps, heads, strict=True):
            weight = F.interpolate(batch.coverage, features.shape[-2:], mode="area")
            weight = weight + 0.3 * F.max_pool2d(weight, 3, 1, 1) + 1e-4
            logits = head((features * weight).sum((2, 3)) / weight.sum((2, 3)))
            shapes, colors = logits[:, : len(ALL_SHAPES)], logits[:, len(ALL_SHAPES) :]
            total = total + F.cross_entropy(shapes, batch.labels[:, 0])
            total = total + 0.3 * F.cross_entropy(colors, batch.labels[:, 1])
            accuracy += (shapes.argmax(1) == batch.labels[:, 0]).float().mean().item() / len(heads)
        return total, {"shape_accuracy": accuracy}

    fit(backbone, CropBatches(cfg), loss_fn, cfg, auxiliary_heads=heads, stage="crops")


class DetectionLoss:
    """Compute the loss of the detector: decoder layers, first stage, and auxiliary dense heads.

    Args:
        model: The detector.
        heads: One dense head for the projected backbone features, and one for the encoder's output.
        proper_from: First step with cross-entropy instead of the focal loss.
    """

    def __init__(self, model: GroundingDinoForObjectDetection, heads: list[DenseHead], proper_from: int) -> None:
        self.model, self.heads, self.proper_from = model, heads, proper_from
        self._projected: Tensor
        model.model.input_proj_vision[0].register_forward_hook(self._keep_projected)

    def _keep_projected(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._projected = output

    def __call__(self, batch: DetectionBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        out = self.model.model(**batch.inputs, return_dict=True)
        proper = step >= self.proper_from
        total, metrics = self._decoder_loss(out, batch, proper)
        length = batch.inputs["input_ids"].shape[1]
        boxes = out.enc_outputs_coord_logits.sigmoid()
        class_loss, box_loss = set_loss(out.enc_outputs_class[..., :length], boxes, batch, 3, proper)
        height, width = self._projected.shape[-2:]
        dense = [
            self.heads[0](self._projected.flatten(2).transpose(1, 2), batch, height, width),
            self.heads[1](out.encoder_last_hidden_state_vision, batch, height, width),
        ]
        metrics |= {"first_stage": (class_loss + box_loss).item(), "dense": dense[1].item()}
        dense_weight = max(0.1, 1 - step / 3000)
        return total + class_loss + box_loss + dense_weight * (dense[0] + dense[1]), metrics

    def _decoder_loss(self, out: Any, batch: DetectionBatch, proper: bool) -> tuple[Tensor, dict[str, float]]:
        """Sum the losses of all decoder layers; the metrics are those of the last layer."""
        text, mask = out.encoder_last_hidden_state_text, batch.inputs["attention_mask"].bool()
        length = batch.inputs["input_ids"].shape[1]
        total = text.new_zeros(())
        metrics = {}
        reference = out.init_reference_points
        for level in range(out.intermediate_hidden_states.shape[1]):
            hidden = out.intermediate_hidden_states[:, level]
            logits = self.model.class_embed[level](hidden, text, mask)[..., :length]
            boxes = (self.model.bbox_embed[level](hidden) + torch.special.logit(reference, eps=1e-5)).sigmoid()
            class_loss, box_loss = set_loss(logits, boxes, batch, proper=proper)
            total = total + class_loss + box_loss
            metrics = {"class": class_loss.item(), "box": box_loss.item()}
            reference = out.intermediate_reference_points[:, level]
        return total, metrics


def main() -> None:
    """Train the detector, calibrate it, and write it to the folder `model` in `out`."""
    cfg = load_settings("detector")
    tokenizer = build_tokenizer()
    model = build_detector(len(tokenizer))
    heads = [DenseHead(64), DenseHead(64)]
    batches = DetectionBatches(cfg, tokenizer)
    if cfg.crops.steps and training_stage(cfg.out) in (None, "crops"):
        backbone = AutoBackbone.from_config(model.config.backbone_config)
        crops_cfg = OmegaConf.merge(cfg, cfg.crops)
        assert isinstance(crops_cfg, DictConfig)
        pretrain_backbone(crops_cfg, backbone)
        # The frozen batch norms of the detector take over the statistics of these.
        model.model.backbone.conv_encoder.model.load_state_dict(backbone.state_dict(), strict=False)
    log.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    loss_fn = DetectionLoss(model, heads, proper_from=round(cfg.steps * (1 - cfg.proper)))
    try:
        fit(model, batches, loss_fn, cfg, auxiliary_heads=heads, stage="scenes")
    finally:  # also when interrupted
        folder = Path(cfg.out) / "model"
        model.cpu().half().save_pretrained(folder)
        build_processor(tokenizer).save_pretrained(folder)
        log.info("model in %s", folder)
    calibrate(folder, batches.photos, cfg.calibration_scenes)


if __name__ == "__main__":
    main()
