"""Train the small SigLIP that verifies detections: `python -m grounded_sam.shapes.training.verifier out=DIR`.

A vision transformer learns shapes slowly from a few thousand crops. A convolutional teacher learns them in minutes: the
detector's own backbone with trainable batch norms. Together with it the text tower is trained, with the sigmoid loss of
SigLIP (Zhai et al. 2023) over phrases of which several may be right for a crop. The image tower of SigLIP is trained
after that, to compute the embeddings of the teacher.

Random outlines, whose words are unknown, are told apart by a supervised contrastive loss (Khosla et al. 2020), and all
names of shapes are wrong for them, so that examples can stand for shapes that have no name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    BertTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from grounded_sam.detectors.grounding_dino import GroundingDino
from grounded_sam.shapes.phrases import DISTRACTORS, build_tokenizer, sample_text
from grounded_sam.shapes.scenes import EXTRA_PAIRS, TRAIN_PAIRS, VALIDATION_PAIRS, load_photos
from grounded_sam.shapes.training.loop import fit, load_settings, save_weights, training_stage
from grounded_sam.shapes.training.verifier_crops import (
    ALL_COLORS,
    ALL_SHAPES,
    FIRST_OUTLINE,
    NOTHING,
    SIZE,
    Crops,
    draw_objects,
    load_or_draw,
)

log = logging.getLogger(__name__)

TEXT_LENGTH = 16
PATCH = 8
DIM = 128
#: Label of a phrase that leaves the color or the shape open, and of one that nothing matches.
ANY, NO_MATCH = -2, -3


def verifier_config(tokenizer: BertTokenizerFast) -> SiglipConfig:
    """Return the architecture: SigLIP base, scaled down."""
    common = {"hidden_size": DIM, "intermediate_size": 2 * DIM, "num_attention_heads": 4}
    return SiglipConfig(
        text_config={
            **common,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": TEXT_LENGTH,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
        },
        # ReLU takes half the time of the default, an approximated GELU.
        vision_config={
            **common,
            "num_hidden_layers": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "hidden_act": "relu",
        },
    )


def build_verifier(tokenizer: BertTokenizerFast) -> SiglipModel:
    """Build an untrained model that starts from what vision transformers learn slowly.

    Positions are sines and cosines, patches are encoded by a cosine transform, and attention starts near the pattern of
    trained transformers (Trockman and Kolter 2023): queries resemble keys, and values are subtracted.
    """
    model = SiglipModel(verifier_config(tokenizer))
    vision = model.vision_model
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-5)
        vision.embeddings.position_embedding.weight.copy_(_positions(SIZE // PATCH, DIM))
        vision.embeddings.patch_embedding.weight.copy_(_cosine_filters(PATCH, DIM))
        for layer in vision.encoder.layers:
            attention = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight + 0.3 * attention.k_proj.weight)
            rotation = torch.linalg.qr(torch.randn(DIM, DIM))[0]
            attention.v_proj.weight.copy_(rotation)
            attention.out_proj.weight.copy_(-0.3 * rotation.T + 0.1 * attention.out_proj.weight)
    return model


def _positions(side: int, dim: int) -> Tensor:
    """Compute two-dimensional sine-cosine positions, `(side * side, dim)`."""
    frequencies = 1 / 20 ** (torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], 2).reshape(side * side, dim)


def _cosine_filters(side: int, count: int) -> Tensor:
    """Return filters of a discrete cosine transform: all of brightness, then the coarse ones of color."""
    k, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    basis = torch.cos(math.pi * (x + 0.5) * k / side) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    planes = torch.einsum("ux,vy->uvxy", basis, basis).reshape(side * side, side, side)
    order = sorted(range(side * side), key=lambda i: i // side + i % side)
    channels = torch.tensor([[1.0, 1, 1], [1, -1, 0], [0.5, 0.5, -1]])
    channels /= channels.norm(dim=1, keepdim=True)
    colors = (count - side * side) // 2
    filters = [channels[0][:, None, None] * planes[i] for i in order]
    filters += [channels[c][:, None, None] * planes[i] for i in order[:colors] for c in (1, 2)]
    return 0.5 * torch.stack(filters[:count])


def build_siglip_processor(tokenizer: BertTokenizerFast) -> SiglipProcessor:
    """Build the processor of the model."""
    return SiglipProcessor(SiglipImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer)


@dataclass(frozen=True)
class VerifierBatch:
    """Crops and phrases.

    Attributes:
        pixels: Crops from -1 to 1, `(b, 3, 48, 48)`.
        labels: What they show, as in `Crops`, `(b, 2)`.
        ids: Tokens of the phrases, `(p, 16)`.
        named: Color and shape that each phrase names, `(p, 2)`; see `ANY` and `NO_MATCH`.
    """

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    named: Tensor


def match_phrases(labels: Tensor, named: Tensor) -> tuple[Tensor, Tensor]:
    """Compare crops with phrases.

    Returns:
        Which phrases are right for each crop, and which are wrong but name its color or its shape, both `(b, p) bool`.

    >>> right, alike = match_phrases(torch.tensor([[0, 1]]), torch.tensor([[0, 1], [0, 2], [ANY, 1], [3, 4]]))
    >>> right.tolist(), alike.tolist()
    ([[True, False, True, False]], [[False, True, False, False]])
    """
    equal = labels[:, None] == named[None]
    fits = equal | (named[None] == ANY)
    right = fits.all(2) & (labels[:, None, 0] != NOTHING)
    return right, equal.any(2) & ~right


class VerifierBatches:
    """Make the batch of a step: crops with varied surroundings, masks and orientation, and phrases.

    Args:
        cfg: Settings of the training, with those of its stage.
        crops: Crops to choose from.
        tokenizer: Tokenizer of the model.
        stage: Number of the stage, for the seed.
    """

    def __init__(self, cfg: DictConfig, crops: Crops, tokenizer: BertTokenizerFast, stage: int) -> None:
        self.cfg, self.crops, self.tokenizer, self.stage = cfg, crops, tokenizer, stage
        self.objects = np.flatnonzero(crops.labels[:, 1] < FIRST_OUTLINE)
        outlines = np.flatnonzero(crops.labels[:, 1] >= FIRST_OUTLINE)
        numbers = crops.labels[outlines, 1]
        self.outlines = [outlines[numbers == number] for number in np.unique(numbers)]
        self.pairs = TRAIN_PAIRS * 2 + EXTRA_PAIRS

    def __call__(self, step: int) -> VerifierBatch:
        cfg = self.cfg
        rng = np.random.default_rng([cfg.seed, 20 + self.stage, step])
        chosen = [rng.choice(self.objects, cfg.batch)]
        for i in rng.permutation(len(self.outlines))[: cfg.groups]:
            chosen.append(rng.permutation(self.outlines[i])[: cfg.views])
        index = np.concatenate(chosen)
        labels = self.crops.labels[index]
        ids, named = self._phrases(rng, labels[: cfg.batch])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        pixels = vary(self.crops.pixels[index], self.crops.masks[index], cfg, generator)
        return VerifierBatch(pixels, torch.from_numpy(labels), ids, named)

    def _phrases(self, rng: np.random.Generator, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Sample phrases: pairs of the batch, others, shapes, colors, and some that match nothing."""
        count = self.cfg.phrases
        shown = labels[(labels[:, 1] != NOTHING)]
        names: list[tuple[int, int]] = [tuple(row) for row in rng.permutation(shown)[: count * 3 // 8].tolist()]
        shapes, colors = list(range(len(ALL_SHAPES))), list(range(len(ALL_COLORS)))
        names += [(ANY, int(shape)) for shape in rng.choice(shapes, count // 8, replace=False)]
        names += [(int(color), ANY) for color in rng.choice(colors, count // 10, replace=False)]
        names += [(ANY, ANY)] + [(NO_MATCH, NO_MATCH)] * (count // 20)
        while len(names) < count:
            color, shape = self.pairs[int(rng.integers(len(self.pairs)))]
            names.append((ALL_COLORS.index(color), ALL_SHAPES.index(shape)))
        texts = [phrase_text(rng, color, shape) for color, shape in names]
        return tokenize(self.tokenizer, texts), torch.tensor(names)


def phrase_text(rng: np.random.Generator, color: int, shape: int) -> str:
    """Write a phrase for indices of a color and a shape."""
    if NO_MATCH in (color, shape):
        return str(rng.choice(DISTRACTORS))
    return sample_text(rng, None if color == ANY else ALL_COLORS[color], None if shape == ANY else ALL_SHAPES[shape])


def tokenize(tokenizer: BertTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Tokenize phrases as SigLIP expects them: padded to the full length, since the last position is pooled."""
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    ids: Tensor = tokens["input_ids"]
    return ids


def vary(pixels: np.ndarray, masks: np.ndarray, cfg: DictConfig, generator: torch.Generator) -> Tensor:
    """Rotate and mirror crops, displace the edges of their masks, and dim what lies outside.

    Returns:
        Pixels from -1 to 1, `(b, 3, 48, 48)`.
    """
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    mask = torch.from_numpy(masks)[:, None].float() / 255
    count = len(image)
    coarse = torch.randn(count, 1, 7, 7, generator=generator)
    noise = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic") * cfg.mask_noise
    bias = (torch.rand(count, 1, 1, 1, generator=generator) - 0.5) * 0.5
    soft = F.avg_pool2d(mask, 5, 1, 2, count_include_pad=False)
    noisy = ((soft + noise + bias * 0.6 - 0.5) * 8 + 0.5).clamp(0, 1)
    is_noisy = torch.rand(count, 1, 1, 1, generator=generator) < 0.7
    mask = torch.where(is_noisy, noisy, mask)
    kind = torch.rand(count, 1, 1, 1, generator=generator)
    strength = 0.4 + 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    strength = torch.where(kind < cfg.gray, torch.ones_like(strength), strength)
    strength = torch.where(kind > cfg.gray + cfg.dimmed, torch.zeros_like(strength), strength)
    image = image * (1 - strength * (1 - mask))
    turned: list[Tensor] = []
    for part in image.split(-(-count // 8)):
        turns, is_mirrored = torch.randint(8, (1,), generator=generator).item() % 4, len(turned) % 2
        rotated = torch.rot90(part, int(turns), (2, 3))
        turned.append(rotated.flip(3) if is_mirrored else rotated)
    return torch.cat(turned)


class Teacher(nn.Module):
    """The detector's backbone, pooled and projected, with the text tower of SigLIP.

    Args:
        backbone: A ResNet of three stages of features.
        siglip: The model whose text tower, scale and bias are trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Any, siglip: SiglipModel) -> None:
        super().__init__()
        self.backbone, self.siglip = backbone, siglip
        self.project = nn.Linear(2 * sum(backbone.channels), DIM)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the normalized embeddings of crops and the feature maps."""
        pixels = F.interpolate(pixels, (64, 64), mode="bilinear", align_corners=False)
        maps = list(self.backbone((pixels * 0.5 + 0.5 - self.mean) / self.std).feature_maps)
        pooled = torch.cat([torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1) for x in maps], 1)
        return F.normalize(self.project(pooled), dim=1), maps


def compare(siglip: SiglipModel, images: Tensor, ids: Tensor) -> Tensor:
    """Compute SigLIP's logits of normalized image embeddings and phrases, `(b, p)`."""
    texts = F.normalize(siglip.text_model(input_ids=ids).pooler_output, dim=1)
    return images @ texts.T * siglip.logit_scale.exp() + siglip.logit_bias


def phrase_loss(logits: Tensor, batch: VerifierBatch) -> Tensor:
    """Compute the sigmoid loss per crop; right phrases and look-alikes count three times."""
    right, alike = match_phrases(batch.labels, batch.named)
    weight = 1 + 2 * (right | alike).float()
    losses = F.binary_cross_entropy_with_logits(logits, right.float(), reduction="none")
    return (weight * losses).sum() / len(logits)


class Composition:
    """Compute how far phrases of a color and a shape are from the sum of those of the color and of the shape.

    Without this term, phrases of pairs that training does not use score lower than others.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: BertTokenizerFast) -> None:
        texts = [*(f"{color} object" for color in ALL_COLORS), *ALL_SHAPES]
        self.ids = tokenize(tokenizer, texts)

    def __call__(self, siglip: SiglipModel, batch: VerifierBatch) -> Tensor:
        """Return the mean cosine distance of the phrases of a batch that name both."""
        is_pair = (batch.named >= 0).all(1)
        ids = torch.cat([batch.ids[is_pair], self.ids.to(batch.ids.device)])
        texts = F.normalize(siglip.text_model(input_ids=ids).pooler_output, dim=1)
        pairs, colors, shapes = texts.split([int(is_pair.sum()), len(ALL_COLORS), len(ALL_SHAPES)])
        named = batch.named[is_pair]
        sums = F.normalize(colors[named[:, 0]] + shapes[named[:, 1]], dim=1)
        return (1 - (pairs * sums).sum(1)).mean()


def outline_loss(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Compute the supervised contrastive loss among the crops of outlines."""
    rows = labels[:, 1] >= FIRST_OUTLINE
    embeddings, numbers = F.normalize(embeddings[rows], dim=1), labels[rows, 1]
    same = (numbers[:, None] == numbers[None]).fill_diagonal_(False)
    similarity = embeddings @ embeddings.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(numbers), dtype=torch.bool, device=labels.device), -1e4)
    log_probability = similarity.log_softmax(1)
    return -(log_probability * same).sum(1).div(same.sum(1).clamp(min=1)).mean()


def name_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Compute the cross-entropy of colors and shapes from auxiliary logits, and the accuracy of shapes."""
    is_object, has_name = labels[:, 0] != NOTHING, (labels[:, 1] >= 0) & (labels[:, 1] < FIRST_OUTLINE)
    colors, shapes = logits[:, : len(ALL_COLORS)], logits[:, len(ALL_COLORS) :]
    loss = F.cross_entropy(colors[is_object], labels[is_object, 0])
    loss = loss + F.cross_entropy(shapes[has_name], labels[has_name, 1])
    accuracy = (shapes[has_name].argmax(1) == labels[has_name, 1]).float().mean().item()
    return loss, accuracy


class Validation:
    """Measure a model on crops of pairs that training does not use, and of others.

    Args:
        cfg: Settings of the training.
        tokenizer: Tokenizer of the model.
        photos: RGB arrays for backgrounds.
    """

    def __init__(self, cfg: DictConfig, tokenizer: BertTokenizerFast, photos: list) -> None:
        crops = draw_objects(cfg.seed + 1000, cfg.validation, TRAIN_PAIRS * 2 + VALIDATION_PAIRS * 4, photos)
        gray = OmegaConf.merge(cfg, {"gray": 1.0})
        assert isinstance(gray, DictConfig)
        self.pixels = vary(crops.pixels, crops.masks, gray, torch.Generator().manual_seed(1))
        self.labels = torch.from_numpy(crops.labels)
        pairs = [*TRAIN_PAIRS, *VALIDATION_PAIRS]
        self.named = torch.tensor([(ALL_COLORS.index(color), ALL_SHAPES.index(shape)) for color, shape in pairs])
        self.ids = tokenize(tokenizer, [f"{color} {shape}" for color, shape in pairs])
        self.is_unseen = torch.tensor([pair in VALIDATION_PAIRS for pair in pairs])

    def __call__(self, siglip: SiglipModel, embed: Any) -> dict[str, float]:
        """Return the mean accuracy on right phrases and on look-alikes, of trained pairs and of others."""
        device = siglip.device
        images = torch.cat([embed(part.to(device)) for part in self.pixels.split(200)])
        accepted = (compare(siglip, images, self.ids.to(device)) > 0).cpu()
        right, alike = match_phrases(self.labels, self.named)
        result: dict[str, float] = {}
        for name, columns in (("seen", ~self.is_unseen), ("unseen", self.is_unseen)):
            hits = accepted[:, columns][right[:, columns]].float().mean()
            rejected = (~accepted[:, columns][alike[:, columns]]).float().mean()
            result |= {f"{name}_hits": hits.item(), f"{name}_rejected": rejected.item()}
        return result


def load_backbone(checkpoint: str) -> Any:
    """Load the detector's backbone, with batch norms that can be trained."""
    detector = GroundingDino(checkpoint).model
    backbone = AutoBackbone.from_config(detector.config.backbone_config)
    backbone.load_state_dict(detector.model.backbone.conv_encoder.model.state_dict(), strict=False)
    return backbone.requires_grad_(True)


def train_teacher(cfg: DictConfig, teacher: Teacher, batches: VerifierBatches, validation: Validation) -> None:
    """Train the teacher and the text tower."""
    composition = Composition(batches.tokenizer)
    names = nn.Linear(DIM, len(ALL_COLORS) + len(ALL_SHAPES))
    outlines = nn.Linear(DIM, 64)
    teacher.siglip.vision_model.requires_grad_(False)

    def loss_fn(batch: VerifierBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        embeddings, _ = teacher(batch.pixels)
        phrases = phrase_loss(compare(teacher.siglip, embeddings, batch.ids), batch)
        contrast = outline_loss(outlines(embeddings), batch.labels)
        named, accuracy = name_loss(names(embeddings * 10), batch.labels)
        apart = composition(teacher.siglip, batch)
        total = phrases + 0.5 * contrast + 0.5 * named + 10 * apart
        metrics = {"phrases": phrases.item(), "outlines": contrast.item(), "composition": apart.item()}
        return total, {**metrics, "shape_accuracy": accuracy}

    fit(
        teacher,
        batches,
        loss_fn,
        cfg,
        validate=lambda: validation(teacher.siglip, lambda pixels: teacher(pixels)[0]),
        auxiliary_heads=[names, outlines],
        stage="teacher",
    )


class Distillation:
    """Compute the loss of the student: the teacher's embeddings, its probabilities and its feature map, and the truth.

    Args:
        teacher: The trained teacher.
        siglip: The model whose image tower is trained.
        crops: Crops to measure the range of the teacher's features on, as the network receives them.
    """

    def __init__(self, teacher: Teacher, siglip: SiglipModel, crops: Tensor) -> None:
        self.teacher, self.siglip = teacher, siglip
        with torch.no_grad():
            features = self._features(teacher(crops)[1])
        deviation = features.std((0, 1))
        # Channels that are nearly dead would be blown up by the normalization.
        self.alive = deviation > 0.05 * deviation.median()
        self.center, self.deviation = features.mean((0, 1))[self.alive], deviation[self.alive]
        self.head = nn.Linear(DIM, int(self.alive.sum()))

    @staticmethod
    def _features(maps: list[Tensor]) -> Tensor:
        """Return the finest two maps on the grid of the student's patches, `(b, patches, channels)`."""
        side = SIZE // PATCH
        resized = [F.interpolate(x, (side, side), mode="bilinear", align_corners=False) for x in maps[:2]]
        return torch.cat(resized, 1).flatten(2).transpose(1, 2)

    def __call__(self, batch: VerifierBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        device = batch.pixels.device
        with torch.no_grad():
            target, maps = self.teacher(batch.pixels)
            features = self._features(maps)[..., self.alive.to(device)]
            features = ((features - self.center.to(device)) / self.deviation.to(device)).clamp(-3, 3)
            judged = compare(self.siglip, target, batch.ids).sigmoid()
        output = self.siglip.vision_model(pixel_values=batch.pixels)
        embeddings = F.normalize(output.pooler_output, dim=1)
        logits = compare(self.siglip, embeddings, batch.ids)
        distance = 10 * (1 - (embeddings * target).sum(1)).mean()
        right, alike = match_phrases(batch.labels, batch.named)
        weight = 1 + 2 * (right | alike).float()
        agreement = F.binary_cross_entropy_with_logits(logits, judged, reduction="none")
        agreement = (weight * agreement).sum() / len(logits)
        truth = phrase_loss(logits, batch)
        dense = F.smooth_l1_loss(self.head(output.last_hidden_state), features)
        total = distance + 0.5 * agreement + 0.5 * truth + dense
        return total, {"distance": distance.item(), "phrases": truth.item(), "dense": dense.item()}


def train_student(
    cfg: DictConfig, teacher: Teacher, siglip: SiglipModel, batches: VerifierBatches, validation: Validation
) -> None:
    """Train the image tower."""
    teacher.to(cfg.device).eval().requires_grad_(False)  # with the text tower, which is part of both
    siglip.vision_model.requires_grad_(True)
    measured = torch.cat([batches(step).pixels for step in range(4)]).to(cfg.device)
    loss = Distillation(teacher, siglip, measured)

    def embed(pixels: Tensor) -> Tensor:
        return F.normalize(siglip.vision_model(pixel_values=pixels).pooler_output, dim=1)

    fit(
        siglip,
        batches,
        loss,
        cfg,
        validate=lambda: validation(siglip, embed),
        auxiliary_heads=[loss.head],
        stage="student",
    )


def stage_settings(cfg: DictConfig, stage: str) -> DictConfig:
    """Return the settings with those of a stage in place of the general ones."""
    merged = OmegaConf.merge(cfg, {key: value for key, value in cfg[stage].items() if key in cfg})
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, False)
    for key, value in cfg[stage].items():
        merged[key] = value
    return merged


def main() -> None:
    """Train the teacher, then the model, and write the model to the folder `model` in `out`."""
    cfg = load_settings("verifier")
    out = Path(cfg.out)
    tokenizer = build_tokenizer()
    photos = load_photos(cfg.photos)
    draw = [("objects", cfg.objects), ("outlines", cfg.outlines)]
    crops = load_or_draw(out / "crops.npz", draw, cfg.seed, TRAIN_PAIRS * 4 + EXTRA_PAIRS, photos)
    validation = Validation(cfg, tokenizer, photos)
    siglip = build_verifier(tokenizer)
    teacher = Teacher(load_backbone(cfg.detector), siglip)
    log.info("%.2f M parameters", sum(p.numel() for p in siglip.parameters()) / 1e6)
    if training_stage(out) in (None, "teacher"):
        settings = stage_settings(cfg, "teacher")
        train_teacher(settings, teacher, VerifierBatches(settings, crops, tokenizer, 0), validation)
        save_weights(teacher, out / "teacher.safetensors")
    teacher.load_state_dict(load_file(out / "teacher.safetensors"))
    settings = stage_settings(cfg, "student")
    try:
        train_student(settings, teacher, siglip, VerifierBatches(settings, crops, tokenizer, 1), validation)
    finally:  # also when interrupted
        folder = out / "model"
        siglip.cpu().half().save_pretrained(folder)
        build_siglip_processor(tokenizer).save_pretrained(folder)
        log.info("model in %s", folder)


if __name__ == "__main__":
    main()
