"""What the trainings of the small models share: settings, a resumable loop and its schedule."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

log = logging.getLogger(__name__)


def settings(name: str) -> DictConfig:
    """Settings of one training: `<name>.yaml` beside this file, then `key=value` from the command line."""
    base = OmegaConf.load(Path(__file__).with_name(f"{name}.yaml"))
    OmegaConf.set_struct(base, True)
    merged = OmegaConf.merge(base, OmegaConf.from_cli(sys.argv[1:]))
    assert isinstance(merged, DictConfig)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(merged.seed)
    torch.set_num_threads(merged.threads)
    return merged


def rate(step: int, total: int, warmup: int, decay: float) -> float:
    """Warm-up, plateau, linear decay over the last share `decay` of `total`: 0 to 1.

    The plateau makes a training extendable: resume a checkpoint from before the decay with a
    larger `steps`.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = total * (1 - decay)
    return 1.0 if step < start else max((total - step) / (total - start), 0.0)


def save(path: Path, state: Any) -> None:
    """Write a checkpoint beside its place and rename it into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def fit(
    model: nn.Module,
    batches: Callable[[int], Any],
    loss_of: Callable[[Any, int], tuple[torch.Tensor, dict[str, float]]],
    cfg: DictConfig,
    validate: Callable[[], dict[str, float]] | None = None,
    extra: Iterable[nn.Module] = (),
) -> None:
    """Train `model` (and throw-away `extra` heads) for `cfg.steps` steps; resume from `cfg.out`.

    Args:
        model: what is trained and kept.
        batches: step to batch, so that a resumed run sees what an undisturbed one would have.
        loss_of: batch and step to (loss, figures to log).
        cfg: `out, steps, lr, weight_decay, warmup, decay, clip, log_every, save_every_s, validate_every`.
        validate: figures on held-out scenes; runs every `validate_every` steps and at the end.
        extra: heads that are trained along and thrown away.
    """
    heads = nn.ModuleList(extra)
    parameters = [p for p in [*model.parameters(), *heads.parameters()] if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98))
    path = Path(cfg.out) / "training.pt"
    first = 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
        log.info("resumed %s at step %d", path, first)

    def checkpoint(step: int) -> None:
        save(
            path,
            {
                "model": model.state_dict(),
                "heads": heads.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
            },
        )

    sums: dict[str, float] = {}
    begun = saved = time.monotonic()
    for step in range(first, cfg.steps):
        model.train()
        scale = rate(step, cfg.steps, cfg.warmup, cfg.decay)
        for group in optimiser.param_groups:
            group["lr"] = cfg.lr * scale
        loss, figures = loss_of(batches(step), step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, cfg.clip)
        if torch.isfinite(norm):
            optimiser.step()
        for key, value in {"loss": loss.item(), **figures}.items():
            sums[key] = sums.get(key, 0.0) + value
        done = step + 1
        if done % cfg.log_every == 0:
            mean = "  ".join(f"{key} {value / cfg.log_every:.3f}" for key, value in sums.items())
            per_s = (done - first) / (time.monotonic() - begun)
            log.info("step %d/%d  %s  %.2f steps/s", done, cfg.steps, mean, per_s)
            sums = {}
        if time.monotonic() - saved > cfg.save_every_s or done == cfg.steps:
            checkpoint(done)
            saved = time.monotonic()
        if validate is not None and (done % cfg.validate_every == 0 or done == cfg.steps):
            model.eval()
            with torch.no_grad():
                result = validate()
            log.info("step %d  validation  %s", done, "  ".join(f"{k} {v:.3f}" for k, v in result.items()))
