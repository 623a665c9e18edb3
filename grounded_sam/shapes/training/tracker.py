"""Train the memory of the small SAM 2 on clips.

`python -m grounded_sam.shapes.training.tracker start_from=FILE out=DIR`

The image encoder of the still training is kept as it is. Clips go through the model as in
`SAM2VideoPredictor`: a prompt on the first frame, memories and object pointers after that. Every
second step is a still one, so that the decoder stays good on images.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from grounded_sam.shapes.scenes import make_clip
from grounded_sam.shapes.training.loop import fit, settings
from grounded_sam.shapes.training.segmenter import SEEN, Sam2, Scenes, build, fit_frame, mask_loss

log = logging.getLogger(__name__)


class Clips(Scenes):
    """Batches of clips with objects to follow from the first frame."""

    def clip(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Frames `(t, 3, s, s)` and masks `(t, n, s, s)` of objects that are well seen at first."""
        low, high = self.cfg.frames
        while True:
            frames = int(rng.integers(low, high + 1))
            speed = float(rng.uniform(0.004, 0.05)) * min(1.0, 8 / frames)
            pairs = SEEN
            if rng.random() < 0.5:  # look-alikes, which share a colour or a shape
                colour, shape = SEEN[rng.integers(len(SEEN))]
                pairs = tuple(p for p in SEEN if p[0] == colour or p[1] == shape)
            scenes = make_clip(rng, frames, pairs, photos=self.photos, speed=speed, away=self.cfg.away)
            placed = [fit_frame(scene, self.size, self.squeeze) for scene in scenes]
            seen = [i for i, mask in zip(scenes[0].ids, placed[0][1], strict=True) if mask.sum() > 100]
            if seen:
                break
        chosen = rng.permutation(seen)[: self.cfg.objects]
        masks = np.zeros((frames, len(chosen), self.size, self.size), np.float32)
        for t, scene in enumerate(scenes):
            for k, i in enumerate(chosen):
                for place in np.flatnonzero(scene.ids == i):
                    masks[t, k] = placed[t][1][place]
        pixels = np.stack([image for image, _, _ in placed])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(masks)


def follow(model: Any, pixels: Tensor, masks: Tensor, prompt: str, rng: np.random.Generator, scenes: Scenes) -> list:
    """Run a clip with `masks[0]` prompted; the outputs of each frame as `_forward_sam_heads` gives them."""
    frames, objects = masks.shape[:2]
    with torch.no_grad():
        backbone = model.forward_image(pixels)
    memory: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    outputs = []
    for t in range(frames):
        one = {
            "backbone_fpn": [f[t : t + 1].expand(objects, -1, -1, -1) for f in backbone["backbone_fpn"]],
            "vision_pos_enc": [f[t : t + 1].expand(objects, -1, -1, -1) for f in backbone["vision_pos_enc"]],
        }
        _, features, positions, sizes = model._prepare_backbone_features(one)
        mask_inputs = point_inputs = None
        if t == 0 and prompt == "mask":
            mask_inputs = masks[0][:, None]
        elif t == 0:
            coords, labels = [], []
            for mask in masks[0].numpy():
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
                noisy, clicked, signs = scenes.prompts(rng, mask, box, 1)
                coords.append(np.reshape(noisy, (2, 2)) if prompt == "box" else np.array(clicked))
                labels.append([2, 3] if prompt == "box" else signs)
            point_inputs = {
                "point_coords": torch.from_numpy(np.stack(coords)).float(),
                "point_labels": torch.tensor(labels, dtype=torch.int32),
            }
        # Only the last frames are learnt from; the ones before fill the memory.
        with torch.set_grad_enabled(torch.is_grad_enabled() and (t == 0 or t >= frames - scenes.cfg.learnt)):
            current, heads, _, _ = model._track_step(
                t, t == 0, features, positions, sizes, point_inputs, mask_inputs, memory, 16, False, None
            )
            current["obj_ptr"] = heads[5]
            model._encode_memory_in_output(features, sizes, point_inputs, True, heads[4], heads[6], current)
        memory["cond_frame_outputs" if t == 0 else "non_cond_frame_outputs"][t] = current
        outputs.append(heads)
    return outputs


def main() -> None:
    cfg = settings("tracker")
    model: Any = build("sam2")
    model.load_state_dict({k: v.float() for k, v in load_file(cfg.start_from).items()})
    model.image_encoder.requires_grad_(False)
    with torch.no_grad():  # a mask is only learnt from while its object is held to be there
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].weight.mul_(0.1)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(4.0)
    runner = Sam2(model)
    clips = Clips(cfg, runner.size, runner.squeeze)

    def clip_loss(step: int, seed: int = 4) -> tuple[Tensor, list[float], list[float]]:
        rng = np.random.default_rng([cfg.seed, seed, step])
        total, count = torch.zeros(()), 0
        overlaps: list[float] = []
        there: list[float] = []
        for _ in range(cfg.clips):
            pixels, masks = clips.clip(rng)
            prompt = str(rng.choice(["mask", "box", "point"], p=[0.6, 0.3, 0.1]))
            for t, heads in enumerate(follow(model, pixels, masks, prompt, rng, clips)):
                if t == 0 and prompt == "mask":
                    continue
                several, ious, score = heads[1], heads[2], heads[6]
                present = masks[t].flatten(1).any(1)
                total = total + F.binary_cross_entropy_with_logits(score[:, 0], present.float())
                there += ((score[:, 0] > 0) == present).float().tolist()
                count += 1
                alive = present & (score[:, 0] > 0)
                if alive.any():
                    losses, got = mask_loss(several[alive].clamp(-60, 60), masks[t][alive])
                    total = total + losses.min(1).values.mean() + 0.1 * losses.mean()
                    total = total + F.mse_loss(ious[alive], got)
                    overlaps += got[torch.arange(len(got)), ious[alive].argmax(1)].tolist()
                overlaps += [0.0] * int((present & ~alive).sum())
        return total / max(count, 1), overlaps, there

    def loss_of(step: int, _again: int) -> tuple[Tensor, dict[str, float]]:
        if step % 2:
            batch = clips(step)
            with torch.no_grad():
                features = runner.encode(batch.pixels)
            low, iou, _ = runner.decode(features, batch)
            losses, got = mask_loss(
                F.interpolate(low, (runner.size, runner.size), mode="bilinear", align_corners=False), batch.masks
            )
            total = losses[:, 0].mean() + losses[:, 1:].min(1).values.mean() + 0.1 * losses.mean()
            return total + F.mse_loss(iou, got), {
                "still_iou": 2 * got[:, 0].mean().item(),
                "clip_iou": 0.0,
                "there": 0.0,
            }
        total, overlaps, there = clip_loss(step)
        return total, {
            "still_iou": 0.0,
            "clip_iou": 2 * float(np.mean(overlaps or [0.0])),
            "there": 2 * float(np.mean(there)),
        }

    def validate() -> dict[str, float]:
        overlaps, there = [], []
        for i in range(cfg.validation_scenes // cfg.clips):
            _, a, b = clip_loss(10**6 + i, seed=11)
            overlaps += a
            there += b
        return {"clip_iou": float(np.mean(overlaps)), "there": float(np.mean(there))}

    try:
        fit(model, lambda step: step, loss_of, cfg, validate)
    finally:
        path = Path(cfg.out) / "sam2.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, path)
        log.info("weights in %s", path)


if __name__ == "__main__":
    main()
