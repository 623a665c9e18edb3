"""Train the small SAM or SAM 2 on scenes: `python -m grounded_sam.shapes.training.segmenter model=sam2 out=DIR`.

Mask losses alone stay on a plateau: nothing tells the decoder where a box is. Two throw-away heads
break it. One reads every image cell after the two-way transformer and says how much of it lies in
the prompted box; one reads the mask token and says where the box is. A third, dense one makes the
image features useful from the start.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grounded_sam.shapes.scenes import COLOURS, PAIRS, SHAPES, UNSEEN, Scene, load_photos, make_scene
from grounded_sam.shapes.training.loop import fit, settings

log = logging.getLogger(__name__)

SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN)
MEAN = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1)


def build(name: str) -> nn.Module:
    """A fresh model from `sam2.yaml` or `sam.yaml` in `shapes/`."""
    cfg = OmegaConf.load(Path(__file__).parents[1] / f"{name}.yaml")
    return instantiate(cfg.model if name == "sam2" else cfg)


@dataclass
class Batch:
    """Scenes in the model's own frame, `size` px a side."""

    pixels: Tensor  # (b, 3, size, size), normalised
    owner: Tensor  # (n,) image of each prompted object
    masks: Tensor  # (n, size, size) float, 0 or 1
    boxes: Tensor  # (n, 4) jittered as a detector's would be
    points: Tensor  # (n, p, 2) clicks
    labels: Tensor  # (n, p) 1 on the object, 0 beside it
    kind: str  # box, points or both
    foreground: Tensor  # (b, size, size) any object
    names: list[tuple[str, str]]


def fit_frame(scene: Scene, size: int, squeeze: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, masks and scale (x, y): squeezed to a square (SAM 2) or long side to `size`, padded (SAM)."""
    height, width = scene.image.shape[:2]
    scale = np.array([size / width, size / height]) if squeeze else np.repeat(size / max(height, width), 2)
    new_w, new_h = (max(1, int(v + 0.5)) for v in np.array([width, height]) * scale)
    method = cv2.INTER_AREA if scale.min() < 1 else cv2.INTER_LINEAR
    image = np.zeros((size, size, 3), np.float32)
    image[:new_h, :new_w] = (
        cv2.resize(scene.image, (new_w, new_h), interpolation=method) - MEAN.numpy().T
    ) / STD.numpy().T
    masks = np.zeros((len(scene.masks), size, size), np.float32)
    for small, mask in zip(masks, scene.masks, strict=True):
        small[:new_h, :new_w] = cv2.resize(mask.astype(np.float32), (new_w, new_h), interpolation=method) >= 0.5
    return image, masks, scale.astype(np.float32)


class Scenes:
    """Batches of scenes with simulated prompts."""

    def __init__(self, cfg: Any, size: int, squeeze: bool) -> None:
        self.cfg, self.size, self.squeeze = cfg, size, squeeze
        self.photos = load_photos(cfg.photos)

    def prompts(self, rng: np.random.Generator, mask: np.ndarray, box: np.ndarray, count: int) -> tuple:
        side = box[2:] - box[:2]
        jitter = rng.normal(0, 0.035, 4) * np.tile(side, 2) + rng.normal(0, 0.4, 4)
        noisy = np.clip(box + np.clip(jitter, -0.12 * np.tile(side, 2) - 1, 0.12 * np.tile(side, 2) + 1), 0, self.size)
        points, labels = [], []
        inside = np.argwhere(mask)
        for i in range(count):
            positive = i == 0 or rng.random() < 0.5
            if positive:
                y, x = inside[rng.integers(len(inside))] + 0.5
            else:
                low, high = box[:2] - 0.3 * side - 2, box[2:] + 0.3 * side + 2
                for _ in range(8):
                    x, y = np.clip(rng.uniform(low, high), 0, self.size - 1)
                    if not mask[int(y), int(x)]:
                        break
                else:
                    positive = True
            points.append((x, y))
            labels.append(int(positive))
        return noisy, points, labels

    def __call__(self, step: int, seed: int = 2, kind: str | None = None) -> Batch:
        rng = np.random.default_rng([self.cfg.seed, seed, step])
        one, two = self.cfg.curriculum
        most = 1 if step < one else 2 if step < two else self.cfg.most_prompts
        kind = kind or str(rng.choice(["box", "points", "both"], p=[0.65, 0.27, 0.08]))
        clicks = int(rng.choice([1, 1, 2, 3])) if kind != "box" else 1
        pixels: list[np.ndarray] = []
        owner, masks, boxes, points, labels, foreground, names = [], [], [], [], [], [], []
        while len(pixels) < self.cfg.batch:
            count = int(rng.integers(1, 4)) if step < one else int(rng.integers(1, 9))
            scene = make_scene(rng, SEEN, count=count, photos=self.photos)
            image, small, scale = fit_frame(scene, self.size, self.squeeze)
            seen = [i for i in rng.permutation(len(small)) if small[i].sum() >= 12][:most]
            if not seen:
                continue
            for i in seen:
                noisy, clicked, signs = self.prompts(rng, small[i], scene.xyxy[i] * np.tile(scale, 2), clicks)
                owner.append(len(pixels))
                masks.append(small[i])
                boxes.append(noisy)
                points.append(clicked)
                labels.append(signs)
                names.append(scene.pairs[i])
            pixels.append(image)
            foreground.append(small.any(0))
        return Batch(
            pixels=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2),
            owner=torch.tensor(owner),
            masks=torch.from_numpy(np.stack(masks)),
            boxes=torch.from_numpy(np.stack(boxes)).float(),
            points=torch.tensor(points, dtype=torch.float32),
            labels=torch.tensor(labels),
            kind=kind,
            foreground=torch.from_numpy(np.stack(foreground)).float(),
            names=names,
        )


class Sam2:
    """How SAM 2 is run in training: as `SAM2ImagePredictor` does, with gradients and all mask tokens."""

    squeeze = True

    def __init__(self, model: Any) -> None:
        self.model, self.size = model, model.image_size
        self.decoder = model.sam_mask_decoder
        self.encoder = model.sam_prompt_encoder

    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        out = self.model.forward_image(pixels)["backbone_fpn"]
        embedding = out[2] + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return out[0], out[1], embedding

    def decode(
        self, features: tuple[Tensor, ...], batch: Batch, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, embedding = (f[batch.owner] for f in features)
        corners = batch.boxes.reshape(-1, 2, 2)
        signs = torch.tensor([[2, 3]]).expand(len(corners), -1)
        parts = {"box": [(corners, signs)], "points": [(batch.points, batch.labels)]}
        parts["both"] = parts["box"] + parts["points"]
        points = torch.cat([p for p, _ in parts[batch.kind]], 1)
        labels = torch.cat([s for _, s in parts[batch.kind]], 1)
        sparse, dense = self.encoder(points=(points, labels), boxes=None, masks=mask)
        masks, iou, _tokens, score = self.decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=self.encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=[fine, middle],
        )
        return masks, iou, score


class Sam:
    """How SAM is run in training: as `SamPredictor` does, with gradients and all mask tokens."""

    squeeze = False

    def __init__(self, model: Any) -> None:
        self.model, self.size = model, model.image_encoder.img_size
        self.decoder = model.mask_decoder
        self.encoder = model.prompt_encoder

    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        embedding = self.model.image_encoder(pixels)
        return embedding, embedding, embedding

    def decode(
        self, features: tuple[Tensor, ...], batch: Batch, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        sparse, dense = self.encoder(
            points=(batch.points, batch.labels) if batch.kind != "box" else None,
            boxes=batch.boxes if batch.kind != "points" else None,
            masks=mask,
        )
        out = [
            self.decoder.predict_masks(
                image_embeddings=features[-1][i : i + 1],
                image_pe=self.encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse[batch.owner == i],
                dense_prompt_embeddings=dense[batch.owner == i],
            )
            for i in range(len(features[-1]))  # objects stand in the order of their images
        ]
        masks, iou = (torch.cat(part) for part in zip(*out, strict=True))
        return masks, iou, masks.new_full((len(masks), 1), 10.0)


class Hints(nn.Module):
    """The heads that are thrown away after training."""

    def __init__(self, width: int, fine: int) -> None:
        super().__init__()
        self.inside = nn.Linear(width, 1)
        self.box = nn.Linear(width, 4)
        self.cell = nn.Conv2d(width, 1 + 2 + len(SHAPES) + len(COLOURS), 1)
        self.fine = nn.Conv2d(fine, 1 + len(COLOURS), 1)


def mask_loss(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Per mask: cross-entropy by object size plus dice, and the IoU. Logits `(n, k, s, s)`, masks `(n, s, s)`."""
    want = masks[:, None]
    area = want.sum((2, 3)).clamp(min=60)
    entropy = F.binary_cross_entropy_with_logits(logits, want.expand_as(logits), reduction="none").sum((2, 3))
    soft = logits.sigmoid()
    dice = 1 - (2 * (soft * want).sum((2, 3)) + 1) / (soft.sum((2, 3)) + want.sum((2, 3)) + 1)
    hard = (logits > 0).float()
    both = (hard * want).sum((2, 3))
    iou = both / (hard.sum((2, 3)) + want.sum((2, 3)) - both).clamp(min=1)
    return entropy / area + dice, iou.detach()


def main() -> None:
    cfg = settings("segmenter")
    model = build(cfg.model)
    if cfg.decoder_from:
        weights = load_file(cfg.decoder_from)
        names = {"sam_prompt_encoder.": "prompt_encoder.", "sam_mask_decoder.": "mask_decoder."}
        start = {new + k[len(old) :]: v for k, v in weights.items() for old, new in names.items() if k.startswith(old)}
        own = model.state_dict()
        start = {k: v.float() for k, v in start.items() if k in own and own[k].shape == v.shape}
        model.load_state_dict(start, strict=False)
        log.info("%d tensors of %d from %s", len(start), len(own), cfg.decoder_from)
    runner: Any = Sam2(model) if cfg.model == "sam2" else Sam(model)
    scenes = Scenes(cfg, runner.size, runner.squeeze)
    seen: list[tuple[Tensor, Tensor]] = []  # tokens and cells after the two-way transformer
    runner.decoder.transformer.register_forward_hook(lambda _module, _input, out: seen.append(out))
    width = runner.decoder.transformer_dim
    hints = Hints(width, width // 8 if cfg.model == "sam2" else width)
    token = 2 if cfg.model == "sam2" else 1  # the first mask token
    log.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)

    def enlarge(logits: Tensor) -> Tensor:
        return F.interpolate(logits, (runner.size, runner.size), mode="bilinear", align_corners=False)

    def hint_loss(features: tuple[Tensor, ...], batch: Batch) -> Tensor:
        side = features[-1].shape[-1]
        step = runner.size / side
        centres = (torch.arange(side) + 0.5) * step
        x0, y0, x1, y1 = batch.boxes.T[..., None]
        in_x = ((torch.minimum(x1, centres + step / 2) - torch.maximum(x0, centres - step / 2)) / step).clamp(0, 1)
        in_y = ((torch.minimum(y1, centres + step / 2) - torch.maximum(y0, centres - step / 2)) / step).clamp(0, 1)
        inside = (in_y[:, :, None] * in_x[:, None, :]).flatten(1)
        tokens, cells_out = (torch.cat(part) for part in zip(*seen, strict=True))
        total = F.binary_cross_entropy_with_logits(hints.inside(cells_out)[..., 0], inside)
        if batch.kind != "points":
            total = total + 3 * F.l1_loss(hints.box(tokens[:, token]), batch.boxes / runner.size)
        cells = hints.cell(features[-1])
        cover = F.interpolate(batch.foreground[:, None], (side, side), mode="area")
        total = total + F.binary_cross_entropy_with_logits(cells[:, :1], cover)
        fine = hints.fine(features[0])
        fine_cover = F.interpolate(batch.foreground[:, None], fine.shape[-2:], mode="area")
        total = total + F.binary_cross_entropy_with_logits(fine[:, :1], fine_cover)
        own = F.interpolate(batch.masks[:, None], (side, side), mode="area")[:, 0]
        image, ys, xs = (own > 0.5).nonzero(as_tuple=True)
        if len(image):
            got = cells[batch.owner[image], :, ys, xs]
            middle = (batch.boxes[:, :2] + batch.boxes[:, 2:])[image] / 2
            offset = (middle - torch.stack([centres[xs], centres[ys]], 1)) / (runner.size / 8)
            total = total + F.l1_loss(got[:, 1:3], offset)
            shape = torch.tensor([SHAPES.index(s) for _, s in batch.names])[image]
            colour = torch.tensor([list(COLOURS).index(c) for c, _ in batch.names])[image]
            total = total + F.cross_entropy(got[:, 3 : 3 + len(SHAPES)], shape)
            total = total + F.cross_entropy(got[:, 3 + len(SHAPES) :], colour)
        return total

    def loss_of(batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        features = runner.encode(batch.pixels)
        seen.clear()
        low, iou, _ = runner.decode(features, batch)
        hint = hint_loss(features, batch)
        losses, got = mask_loss(enlarge(low), batch.masks)
        total = losses[:, 0].mean() + losses[:, 1:].min(1).values.mean() + 0.1 * losses[:, 1:].mean()
        total = total + F.mse_loss(iou, got)
        if step > 1500 and step % 4 == 0:  # refine a first mask, as with a mask prompt
            best = low[torch.arange(len(low)), iou.argmax(1)][:, None].detach().clamp(-32, 32)
            low, iou, _ = runner.decode(features, batch, best)
            losses, got = mask_loss(enlarge(low), batch.masks)
            total = total + losses[:, 0].mean() + 0.3 * losses[:, 1:].mean() + F.mse_loss(iou, got)
        share = max(0.05, 1 - step / 4000)
        figures = {
            "iou": got[:, 0].mean().item(),
            "iou_multi": got[:, 1:].max(1).values.mean().item(),
            "hint": hint.item(),
        }
        return total + share * hint, figures

    def validate() -> dict[str, float]:
        figures: dict[str, list[float]] = {"box": [], "points": []}
        for kind in figures:
            for i in range(cfg.validation_scenes // cfg.batch):
                batch = scenes(10**6 + i, seed=9, kind=kind)
                low, _, _ = runner.decode(runner.encode(batch.pixels), batch)
                figures[kind] += mask_loss(enlarge(low[:, :1]), batch.masks)[1][:, 0].tolist()
        return {kind: float(np.mean(values)) for kind, values in figures.items()}

    try:
        fit(model, scenes, loss_of, cfg, validate, extra=[hints])
    finally:
        path = Path(cfg.out) / f"{cfg.model}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, path)
        log.info("weights in %s", path)


if __name__ == "__main__":
    main()
