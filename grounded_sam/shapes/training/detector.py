"""Train the small Grounding DINO on scenes: `python -m grounded_sam.shapes.training.detector out=DIR`.

First the backbone alone, on crops of single objects, with its batch norms alive: in a detector, where
Grounding DINO freezes them, shapes are not learnt within any time worth waiting for (a Swin backbone
was at 25% after 18,000 scenes; this one is above 90% after two minutes of crops). Then the whole model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
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

from grounded_sam.shapes.phrases import ask, matches, tokenizer
from grounded_sam.shapes.scenes import (
    COLOURS,
    EXTRA_COLOURS,
    EXTRA_SHAPES,
    PAIRS,
    SHAPES,
    UNSEEN,
    draw,
    load_photos,
    make_background,
    make_scene,
    make_thing,
)
from grounded_sam.shapes.training.loop import fit, settings

log = logging.getLogger(__name__)

SHORT, LONG = 160, 320
SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN)
ALL_SHAPES, ALL_COLOURS = (*SHAPES, *EXTRA_SHAPES), (*COLOURS, *EXTRA_COLOURS)
EXTRA = tuple(
    (colour, shape)
    for colour in ALL_COLOURS
    for shape in ALL_SHAPES
    if colour in EXTRA_COLOURS or shape in EXTRA_SHAPES
)


def config(vocabulary_size: int) -> GroundingDinoConfig:
    """The architecture of Grounding DINO tiny, small, with a ResNet for its Swin."""
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
        num_queries=24,
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
        max_text_len=64,
        two_stage=True,
        decoder_bbox_embed_share=False,
    )


def build(vocabulary_size: int) -> GroundingDinoForObjectDetection:
    """A fresh model whose first logits are near -4.4, since the contrastive head has no bias."""
    model = GroundingDinoForObjectDetection(config(vocabulary_size))
    model.requires_grad_(True)  # it freezes some of a convolutional backbone
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


def processor(words: BertTokenizerFast) -> GroundingDinoProcessor:
    """Images with a shorter side of 160 px and a longer one of at most 320, as they come."""
    images = GroundingDinoImageProcessor(size={"shortest_edge": SHORT, "longest_edge": LONG})
    return GroundingDinoProcessor(images, words)


@dataclass
class Batch:
    """Images `(b, 3, H, W)`, their prompts, and per image boxes (cxcywh, 0 to 1) and token targets."""

    inputs: dict[str, Tensor]
    boxes: list[Tensor]  # (n, 4)
    tokens: list[Tensor]  # (n, T) 0 or 1: the tokens of every phrase that asks for the object
    dense: list[tuple[Tensor, Tensor]]  # all objects: masks (n, h, w), (n, 2) shape and colour


def spans(words: BertTokenizerFast, phrases: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `phrase. phrase. ...` and the token range of each phrase."""
    ids, ranges = [words.cls_token_id], []
    stop = words.convert_tokens_to_ids(".")
    for phrase in phrases:
        pieces = words(phrase, add_special_tokens=False)["input_ids"]
        ranges.append((len(ids), len(ids) + len(pieces)))
        ids += [*pieces, stop]
    return [*ids, words.sep_token_id], ranges


class Scenes:
    """Batches of scenes of one aspect each, so that nothing is padded (but sometimes on purpose)."""

    def __init__(self, cfg: Any, words: BertTokenizerFast) -> None:
        self.cfg, self.words = cfg, words
        self.photos = load_photos(cfg.photos)
        self.images = GroundingDinoImageProcessor(do_resize=False, do_pad=False)

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.cfg.seed, 1, step])
        ratio = rng.uniform(1, 2)
        wide = rng.random() < 0.5
        short, long = SHORT, round(SHORT * ratio)
        height, width = (short, long) if wide else (long, short)
        pixels, ids, boxes, targets, dense = [], [], [], [], []
        for _ in range(self.cfg.batch):
            side = int(rng.integers(96, max(97, int(512 / ratio)) + 1))
            size = (side, round(side * ratio)) if wide else (round(side * ratio), side)
            scene = make_scene(rng, SEEN * 3 + EXTRA, size_hw=size, photos=self.photos)
            phrases = ask(rng, scene.pairs, SEEN + EXTRA)
            tokens, ranges = spans(self.words, [p[2] for p in phrases])
            target = torch.zeros(len(scene.pairs), 64)
            for row, pair in zip(target, scene.pairs, strict=True):
                for phrase, (start, stop) in zip(phrases, ranges, strict=True):
                    if matches(phrase[:2], pair):
                        row[start:stop] = 1
            asked = target.any(1)
            scale = torch.tensor([size[1], size[0], size[1], size[0]])
            corners = torch.from_numpy(scene.xyxy) / scale
            centres = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
            image = torch.from_numpy(scene.image).permute(2, 0, 1)[None].float()
            image = F.interpolate(image, (height, width), mode="bilinear", antialias=True, align_corners=False)
            pixels.append(image[0].round().to(torch.uint8))
            ids.append(tokens)
            boxes.append(centres[asked])
            targets.append(target[asked])
            cells = torch.from_numpy(scene.masks)[None].float()
            if len(scene.pairs):
                cells = F.interpolate(cells, (-(-height // 8), -(-width // 8)), mode="area")[0]
            else:
                cells = torch.zeros(0, -(-height // 8), -(-width // 8))
            names = [[ALL_SHAPES.index(s), ALL_COLOURS.index(c)] for c, s in scene.pairs]
            dense.append((cells, torch.tensor(names, dtype=torch.long).reshape(-1, 2)))
        length = max(map(len, ids))
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        inputs = {
            "pixel_values": self.images(pixels, return_tensors="pt")["pixel_values"],
            "input_ids": padded,
            "attention_mask": (torch.arange(length) < torch.tensor([len(r) for r in ids])[:, None]).long(),
            "token_type_ids": torch.zeros_like(padded),
        }
        return Batch(inputs, boxes, [t[:, :length] for t in targets], dense)


def corners(boxes: Tensor) -> Tensor:
    """cxcywh to xyxy."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid focal loss, element-wise (alpha 0.25, gamma 2; Lin et al. 2017)."""
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = probability * (1 - targets) + (1 - probability) * targets
    return (0.25 * targets + 0.75 * (1 - targets)) * entropy * miss**2


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Tensor, truth: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Pair queries and truths (DETR's costs 2, 5, 2, per phrase token), each truth `times` times."""
    probability = logits.sigmoid()
    positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    weight = targets / targets.sum(1, keepdim=True)
    cost = 2 * (positive - negative) @ weight.T
    cost += 5 * torch.cdist(boxes, truth, p=1) - 2 * generalized_box_iou(corners(boxes), corners(truth))
    rows, columns = linear_sum_assignment(cost.repeat(1, times).numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns) % len(truth)


def set_loss(logits: Tensor, boxes: Tensor, batch: Batch, times: int = 1) -> tuple[Tensor, Tensor]:
    """Class and box loss of one set of predictions: logits `(b, q, T)`, boxes `(b, q, 4)`."""
    mask = batch.inputs["attention_mask"].bool()
    aim = torch.zeros_like(logits)
    box_loss = logits.new_zeros(())
    count = max(sum(map(len, batch.boxes)), 1) * times
    for i, (truth, targets) in enumerate(zip(batch.boxes, batch.tokens, strict=True)):
        if not len(truth):
            continue
        valid = mask[i]
        rows, columns = match(logits[i][:, valid], boxes[i], targets[:, valid], truth, times)
        aim[i, rows] = targets[columns]
        got, want = boxes[i, rows], truth[columns]
        box_loss = box_loss + 5 * (got - want).abs().sum()
        box_loss = box_loss + 2 * (1 - torch.diag(generalized_box_iou(corners(got), corners(want)))).sum()
    class_loss = focal(logits.masked_fill(~mask[:, None], -30.0), aim)
    # A truth has as many positive tokens as its phrases have: 2.5 on average.
    return 2 * (class_loss * mask[:, None]).sum() / (count * 2.0), box_loss / count


class DenseHead(nn.Module):
    """Thrown away after training: shape, colour and extent at every cell, so that features come early."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1 + len(ALL_SHAPES) + len(ALL_COLOURS))

    def forward(self, features: Tensor, batch: Batch, height: int, width: int) -> Tensor:
        out = self.linear(features[:, : height * width])
        total, count = out.new_zeros(()), 0
        for i, (cells, names) in enumerate(batch.dense):
            cover = cells.flatten(1)
            solid = (cover.sum(0) if len(cover) else out.new_zeros(height * width)).clamp(0, 1)
            total = total + F.binary_cross_entropy_with_logits(out[i, :, 0], solid)
            if not len(names):
                continue
            best, owner = cover.max(0)
            here = best > 0.4
            if here.any():
                got = out[i, here]
                want = names[owner[here]]
                total = total + F.cross_entropy(got[:, 1 : 1 + len(ALL_SHAPES)], want[:, 0])
                total = total + F.cross_entropy(got[:, 1 + len(ALL_SHAPES) :], want[:, 1])
            count += 1
        return total / len(batch.dense)


class Crops:
    """Batches of single objects, 14 to 60 px wide, on canvases of 64 px: `(pixels, cover, names)`."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.photos = load_photos(cfg.photos)
        self.images = GroundingDinoImageProcessor(do_resize=False, do_pad=False)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.cfg.seed, 3, step])
        pixels, covers, names = [], [], []
        for _ in range(self.cfg.batch):
            side = int(64 * np.exp(rng.uniform(np.log(0.6), np.log(2.5))))
            thing = make_thing(rng, SEEN[rng.integers(len(SEEN))], side, side, (0.22, 0.94))
            scene = draw(make_background(rng, side, side, self.photos), [thing], rng, noise=int(rng.integers(0, 9)))
            image = torch.from_numpy(scene.image).permute(2, 0, 1)[None].float()
            image = F.interpolate(image, (64, 64), mode="bilinear", antialias=True, align_corners=False)
            pixels.append(image[0].round().to(torch.uint8))
            covers.append(F.interpolate(torch.from_numpy(scene.masks[:1])[None].float(), (64, 64), mode="area")[0])
            names.append([SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)])
        return self.images(pixels, return_tensors="pt")["pixel_values"], torch.stack(covers), torch.tensor(names)


def pretrain(cfg: Any, backbone: Any) -> None:
    """Train the backbone to tell shapes and colours apart, from features pooled over the object."""
    heads = [nn.Sequential(nn.LayerNorm(c), nn.Linear(c, len(SHAPES) + len(COLOURS))) for c in backbone.channels]

    def loss_of(batch: tuple[Tensor, Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, cover, names = batch
        total, right = pixels.new_zeros(()), 0.0
        for features, head in zip(backbone(pixels).feature_maps, heads, strict=True):
            weight = F.interpolate(cover, features.shape[-2:], mode="area")
            weight = weight + 0.3 * F.max_pool2d(weight, 3, 1, 1) + 1e-4
            logits = head((features * weight).sum((2, 3)) / weight.sum((2, 3)))
            total = total + F.cross_entropy(logits[:, : len(SHAPES)], names[:, 0])
            total = total + 0.3 * F.cross_entropy(logits[:, len(SHAPES) :], names[:, 1])
            right += (logits[:, : len(SHAPES)].argmax(1) == names[:, 0]).float().mean().item() / len(heads)
        return total, {"shapes": right}

    fit(backbone, Crops(cfg), loss_of, cfg, extra=heads)


def main() -> None:
    cfg = settings("detector")
    words = tokenizer()
    model = build(len(words))
    heads = [DenseHead(64), DenseHead(64)]
    scenes = Scenes(cfg, words)
    if cfg.crops.steps and not (Path(cfg.out) / "training.pt").exists():
        backbone = AutoBackbone.from_config(model.config.backbone_config)
        pretrain(OmegaConf.merge(cfg, cfg.crops, {"out": f"{cfg.out}/backbone"}), backbone)
        # The detector's frozen batch norms take the statistics that these have now.
        model.model.backbone.conv_encoder.model.load_state_dict(backbone.state_dict(), strict=False)
    if cfg.start_from:
        start = torch.load(cfg.start_from, map_location="cpu", weights_only=True)["model"]
        start = {k: v for k, v in start.items() if ".backbone." not in k and "input_proj_vision" not in k}
        model.load_state_dict(start, strict=False)
    log.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    early: dict[str, Tensor] = {}
    model.model.input_proj_vision[0].register_forward_hook(lambda _m, _i, out: early.update(map=out))

    def loss_of(batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        out = model.model(**batch.inputs, return_dict=True)
        length = batch.inputs["input_ids"].shape[1]
        text, mask = out.encoder_last_hidden_state_text, batch.inputs["attention_mask"].bool()
        total = text.new_zeros(())
        figures = {}
        reference = out.init_reference_points
        for level in range(out.intermediate_hidden_states.shape[1]):
            hidden = out.intermediate_hidden_states[:, level]
            logits = model.class_embed[level](hidden, text, mask)[..., :length]
            boxes = (model.bbox_embed[level](hidden) + torch.special.logit(reference, eps=1e-5)).sigmoid()
            classes, places = set_loss(logits, boxes, batch)
            total = total + classes + places
            figures = {"class": classes.item(), "box": places.item()}
            reference = out.intermediate_reference_points[:, level]
        logits = out.enc_outputs_class[..., :length]
        boxes = out.enc_outputs_coord_logits.sigmoid()
        classes, places = set_loss(logits, boxes, batch, times=3)
        height, width = early["map"].shape[-2:]
        share = max(0.1, 1 - step / 3000)
        dense = [
            heads[0](early["map"].flatten(2).transpose(1, 2), batch, height, width),
            heads[1](out.encoder_last_hidden_state_vision, batch, height, width),
        ]
        figures |= {"first": (classes + places).item(), "dense": dense[1].item()}
        return total + classes + places + share * (dense[0] + dense[1]), figures

    try:
        fit(model, scenes, loss_of, cfg, extra=heads)
    finally:
        folder = Path(cfg.out) / "model"
        model.half().save_pretrained(folder)
        processor(words).save_pretrained(folder)
        log.info("model in %s", folder)


if __name__ == "__main__":
    main()
