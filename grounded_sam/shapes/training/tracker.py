"""Train the memory of the small SAM 2 on clips.

`python -m grounded_sam.shapes.training.tracker start_from=FILE out=DIR`

The image encoder keeps the weights of the image training. Clips run through the model as in `SAM2VideoPredictor`: a
prompt on the first frame, memories and object pointers after that. Half of the clips have full occlusions, look-alikes
and a moving camera. Every second step trains on images, so that the decoder stays accurate on them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from grounded_sam.shapes.scenes import TRAIN_PAIRS, Scene, make_clip, make_occluded_clip
from grounded_sam.shapes.training.loop import fit, load_settings, move_batch, save_weights
from grounded_sam.shapes.training.segmenter import (
    LOSS_SIDE,
    PromptBatch,
    PromptBatches,
    TrainableSam2,
    build_segmenter,
    jitter_box,
    mask_loss,
    prompted_rounds,
    resize_scene,
    round_loss,
    sample_click,
    validate_clicks,
)

log = logging.getLogger(__name__)

ClipPrompt = Literal["mask", "box", "point"]


@dataclass(frozen=True)
class TrainingClip:
    """A clip in the coordinates of the model's input.

    Attributes:
        pixels: Normalized frames, `(t, 3, size, size)`.
        masks: Masks of the objects to track, `(t, n, size, size) float32` of 0 and 1; empty where not visible.
        prompt: What the objects are prompted with on the first frame.
        point_coords: Prompt points in pixels, `(n, p, 2)`; the corners of boxes; unused for masks.
        point_labels: Labels of these points as SAM 2 takes them, `(n, p) int32`.
    """

    pixels: Tensor
    masks: Tensor
    prompt: ClipPrompt
    point_coords: Tensor
    point_labels: Tensor


@dataclass(frozen=True)
class FramePrediction:
    """What the mask decoder predicts for the objects on a frame.

    Attributes:
        mask_logits: Multi-mask output, `(n, k, size, size)`.
        iou: Predicted IoU, `(n, k)`.
        object_score: Logit of whether the object is visible, `(n, 1)`.
    """

    mask_logits: Tensor
    iou: Tensor
    object_score: Tensor


class TrackingBatches:
    """Make the batch of a step: clips at even steps, images at odd ones.

    Args:
        cfg: Settings of `PromptBatches`, and `clips`, `frames`, `objects`, `away` and `occluded`.
        size: Side of the model's input in pixels.
    """

    def __init__(self, cfg: DictConfig, size: int) -> None:
        self.cfg, self.size = cfg, size
        self.images = PromptBatches(cfg, size, TrainableSam2.keep_aspect)

    def __call__(self, step: int) -> PromptBatch | list[TrainingClip]:
        return self.images(step) if step % 2 else self.sample_clips(step)

    def sample_clips(self, step: int, seed: int = 4) -> list[TrainingClip]:
        """Sample the clips of a step."""
        rng = np.random.default_rng([self.cfg.seed, seed, step])
        return [self._sample_clip(rng) for _ in range(self.cfg.clips)]

    def _sample_clip(self, rng: np.random.Generator) -> TrainingClip:
        """Sample a clip, with objects that are visible on its first frame, and their prompts."""
        minimum, maximum = self.cfg.frames
        while True:
            frames = int(rng.integers(minimum, maximum + 1))
            scenes = self._sample_scenes(rng, frames)
            resized = [resize_scene(scene, self.size, TrainableSam2.keep_aspect) for scene in scenes]
            large = [i for i, mask in zip(scenes[0].ids, resized[0].masks, strict=True) if mask.sum() > 100]
            if large:
                break
        tracked = rng.permutation(large)[: self.cfg.objects]
        masks = np.zeros((frames, len(tracked), self.size, self.size), np.float32)
        for t, scene in enumerate(scenes):
            for k, object_id in enumerate(tracked):
                for row in np.flatnonzero(scene.ids == object_id):
                    masks[t, k] = resized[t].masks[row]
        pixels = np.stack([frame.image for frame in resized])
        prompt: ClipPrompt = rng.choice(["mask", "box", "point"], p=[0.6, 0.3, 0.1]).item()
        coords, labels = self._sample_points(rng, masks[0], prompt)
        return TrainingClip(
            torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(masks), prompt, coords, labels
        )

    def _sample_scenes(self, rng: np.random.Generator, frames: int) -> list[Scene]:
        photos = self.images.photos
        if rng.random() < self.cfg.occluded:
            return make_occluded_clip(rng, frames, TRAIN_PAIRS, photos=photos)
        speed = float(rng.uniform(0.004, 0.05)) * min(1.0, 8 / frames)
        pairs = TRAIN_PAIRS
        if rng.random() < 0.5:  # objects that look alike, since they share a color or a shape
            color, shape = TRAIN_PAIRS[rng.integers(len(TRAIN_PAIRS))]
            pairs = tuple(pair for pair in TRAIN_PAIRS if pair[0] == color or pair[1] == shape)
        return make_clip(rng, frames, pairs, photos=photos, speed=speed, away=self.cfg.away)

    def _sample_points(
        self, rng: np.random.Generator, masks: NDArray[np.float32], prompt: ClipPrompt
    ) -> tuple[Tensor, Tensor]:
        """Sample boxes or clicks for masks `(n, size, size)`, in the form that SAM 2 takes."""
        coords, labels = [], []
        for mask in masks:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
            if prompt == "point":
                coords.append(np.array([sample_click(rng, mask)]))
            else:
                coords.append(jitter_box(rng, box, self.size).reshape(2, 2))
            labels.append([1] if prompt == "point" else [2, 3])
        return torch.from_numpy(np.stack(coords)).float(), torch.tensor(labels, dtype=torch.int32)


def track_clip(model: Any, clip: TrainingClip, learnt: int) -> list[FramePrediction]:
    """Track the objects of a clip from the prompts on its first frame.

    Args:
        model: A `SAM2Base`.
        clip: The clip.
        learnt: Number of frames at the end that gradients are computed for, besides the first one.
    """
    frames, objects = clip.masks.shape[:2]
    with torch.no_grad():
        backbone = model.forward_image(clip.pixels)
    memory: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    predictions = []
    for t in range(frames):
        expanded = {
            key: [level[t : t + 1].expand(objects, -1, -1, -1) for level in backbone[key]]
            for key in ("backbone_fpn", "vision_pos_enc")
        }
        _, features, positions, sizes = model._prepare_backbone_features(expanded)
        mask_inputs, point_inputs = None, None
        if t == 0 and clip.prompt == "mask":
            mask_inputs = clip.masks[0][:, None]
        elif t == 0:
            point_inputs = {"point_coords": clip.point_coords, "point_labels": clip.point_labels}
        # Earlier frames only fill the memory, to save time.
        with torch.set_grad_enabled(torch.is_grad_enabled() and (t == 0 or t >= frames - learnt)):
            current, outputs, _, _ = model._track_step(
                t, t == 0, features, positions, sizes, point_inputs, mask_inputs, memory, 16, False, None
            )
            # Outputs of `SAM2Base._forward_sam_heads`: the masks and IoUs of all mask tokens are the second and the
            # third, the best high-resolution mask, the object pointer and the object score the last three.
            _, mask_logits, iou, _, best_mask, pointer, object_score = outputs
            current["obj_ptr"] = pointer
            model._encode_memory_in_output(features, sizes, point_inputs, True, best_mask, object_score, current)
        memory["cond_frame_outputs" if t == 0 else "non_cond_frame_outputs"][t] = current
        predictions.append(FramePrediction(mask_logits, iou, object_score))
    return predictions


@dataclass
class ClipMetrics:
    """Accuracy over objects and frames.

    Attributes:
        ious: IoU of the best mask of each visible object; 0 where the object is predicted to be absent.
        presence_correct: 1 where the visibility of an object is predicted correctly, else 0.
    """

    ious: list[float] = field(default_factory=list)
    presence_correct: list[float] = field(default_factory=list)


class TrackingLoss:
    """Compute the loss of a step, on clips or on images.

    Args:
        segmenter: The model.
        learnt: See `track_clip`.
    """

    def __init__(self, segmenter: TrainableSam2, learnt: int) -> None:
        self.segmenter, self.learnt = segmenter, learnt

    def __call__(self, batch: PromptBatch | list[TrainingClip], step: int) -> tuple[Tensor, dict[str, float]]:
        # Metrics are doubled, because the log averages them over all steps, of which they occur in every second one.
        if isinstance(batch, PromptBatch):
            loss, iou = self.image_loss(batch, step)
            return loss, {"image_iou": 2 * iou, "clip_iou": 0.0, "presence": 0.0}
        metrics = ClipMetrics()
        loss = self.clip_loss(batch, metrics)
        clip_iou, presence = np.mean(metrics.ious or [0.0]), np.mean(metrics.presence_correct)
        return loss, {"image_iou": 0.0, "clip_iou": 2 * float(clip_iou), "presence": 2 * float(presence)}

    def image_loss(self, batch: PromptBatch, step: int) -> tuple[Tensor, float]:
        """Return the loss on images, with corrections by clicks as in the image training, and the mean IoU."""
        with torch.no_grad():
            features = self.segmenter.encode(batch.pixels)
        rounds = (1, 2, 3)[step // 2 % 3]
        total, first_iou = torch.zeros((), device=batch.pixels.device), 0.0
        predictions = prompted_rounds(self.segmenter, features, batch, rounds)
        for i, (logits, predicted_iou, masks) in enumerate(predictions):
            loss, iou = round_loss(logits, predicted_iou, masks)
            total = total + loss / rounds
            if i == 0:
                first_iou = iou[:, 0].mean().item()
        return total, first_iou

    def clip_loss(self, clips: list[TrainingClip], metrics: ClipMetrics) -> Tensor:
        """Return the mean loss per frame on clips, and add to `metrics`."""
        total, num_frames = torch.zeros((), device=clips[0].pixels.device), 0
        for clip in clips:
            for t, predicted in enumerate(track_clip(self.segmenter.model, clip, self.learnt)):
                if t == 0 and clip.prompt == "mask":
                    continue
                masks = F.interpolate(clip.masks[t][None], (LOSS_SIDE, LOSS_SIDE), mode="area")[0]
                for loss in _frame_losses(predicted, masks, metrics):
                    total = total + loss
                num_frames += 1
        return total / max(num_frames, 1)


def _frame_losses(predicted: FramePrediction, masks: Tensor, metrics: ClipMetrics) -> list[Tensor]:
    """Return the losses on a frame with ground-truth masks `(n, s, s)` from 0 to 1, and add to `metrics`."""
    is_present = masks.flatten(1).any(1)
    score = predicted.object_score[:, 0]
    losses = [F.binary_cross_entropy_with_logits(score, is_present.float())]
    metrics.presence_correct += ((score > 0) == is_present).float().tolist()
    # SAM 2 removes the masks of objects that it takes to be absent, so that they have no gradient.
    is_kept = is_present & (score > 0)
    if is_kept.any():
        per_mask, iou = mask_loss(predicted.mask_logits[is_kept].clamp(-60, 60), masks[is_kept])
        losses.append(per_mask.min(1).values.mean())
        losses.append(0.1 * per_mask.mean())
        losses.append(F.mse_loss(predicted.iou[is_kept], iou))
        best = predicted.iou[is_kept].argmax(1, keepdim=True)
        metrics.ious += iou.gather(1, best)[:, 0].tolist()
    metrics.ious += [0.0] * int((is_present & ~is_kept).sum())
    return losses


def main() -> None:
    """Train the memory and write the weights to `out`."""
    cfg = load_settings("tracker")
    model: Any = build_segmenter("sam2")
    model.load_state_dict({name: value.float() for name, value in load_file(cfg.start_from).items()})
    model.image_encoder.requires_grad_(False)
    with torch.no_grad():  # start with objects predicted to be present, since masks are only learned then
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].weight.mul_(0.1)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(4.0)
    segmenter = TrainableSam2(model)
    batches = TrackingBatches(cfg, segmenter.size)
    loss_fn = TrackingLoss(segmenter, cfg.learnt)

    def validate() -> dict[str, float]:
        metrics = ClipMetrics()
        for i in range(cfg.validation_clips // cfg.clips):
            loss_fn.clip_loss(move_batch(batches.sample_clips(10**6 + i, seed=11), segmenter.device), metrics)
        clips = {"clip_iou": float(np.mean(metrics.ious)), "presence": float(np.mean(metrics.presence_correct))}
        return clips | validate_clicks(segmenter, batches.images, cfg.validation_scenes)

    try:
        fit(model, batches, loss_fn, cfg, validate)
    finally:  # also when interrupted
        save_weights(model, Path(cfg.out) / "sam2.safetensors")


if __name__ == "__main__":
    main()
