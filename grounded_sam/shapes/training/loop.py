"""Shared training code of the small models: settings, a resumable loop, a schedule, and saving."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from grounded_sam.files import atomic_write

log = logging.getLogger(__name__)

#: Compute the loss of a batch at a step, and metrics to log.
LossFunction = Callable[[Any, int], tuple[Tensor, dict[str, float]]]


def load_settings(name: str) -> DictConfig:
    """Load the settings of a training, seed PyTorch, and set up logging.

    Args:
        name: Name of the YAML file beside this module, without its suffix. `key=value` arguments of the command line
            override its values.

    Raises:
        omegaconf.errors.ConfigKeyError: If an argument names a key that the file does not have.
    """
    base = OmegaConf.load(Path(__file__).with_name(f"{name}.yaml"))
    OmegaConf.set_struct(base, True)
    merged = OmegaConf.merge(base, OmegaConf.from_cli(sys.argv[1:]))
    assert isinstance(merged, DictConfig)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(merged.seed)
    torch.set_num_threads(merged.threads)
    return merged


def learning_rate_factor(step: int, total: int, warmup: int, decay: float) -> float:
    """Return the learning rate at a step as a share of its maximum: warm-up, plateau, linear decay.

    Because of the plateau, a run can be extended: resume from a checkpoint before the decay with more steps.

    Args:
        step: The step, from 0.
        total: Number of steps of the training.
        warmup: Number of steps of the warm-up.
        decay: Share of the steps that decay, 0 to 1.

    Returns:
        A factor from 0 to 1.

    >>> [learning_rate_factor(step, total=10, warmup=2, decay=0.5) for step in (0, 1, 5, 9)]
    [0.5, 1.0, 1.0, 0.2]
    """
    if step < warmup:
        return (step + 1) / warmup
    start = total * (1 - decay)
    return 1.0 if step < start else max((total - step) / (total - start), 0.0)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights in half precision as a safetensors file."""
    with atomic_write(path) as part:
        save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, part)
    log.info("weights in %s", path)


def fit(
    model: nn.Module,
    batches: Callable[[int], Any],
    loss_fn: LossFunction,
    cfg: DictConfig,
    validate: Callable[[], dict[str, float]] | None = None,
    auxiliary_heads: Iterable[nn.Module] = (),
) -> None:
    """Train a model for `cfg.steps` steps, or resume the training in `cfg.out`.

    Args:
        model: The model.
        batches: Makes the batch of a step, so that a resumed run sees the same batches as an uninterrupted one.
        loss_fn: Computes the loss of a batch.
        cfg: Settings `out`, `steps`, `lr`, `weight_decay`, `warmup`, `decay`, `clip`, `log_every`, `save_every_s` and
            `validate_every`.
        validate: Computes metrics on held-out scenes, every `cfg.validate_every` steps and at the end.
        auxiliary_heads: Heads that are trained together with the model and are not part of it.
    """
    optimization = _Optimization(model, nn.ModuleList(auxiliary_heads), cfg)
    first = optimization.resume()
    sums: dict[str, float] = {}
    start = last_saved = time.monotonic()
    for step in range(first, cfg.steps):
        model.train()
        optimization.set_learning_rate(step)
        loss, metrics = loss_fn(batches(step), step)
        optimization.update(loss)
        for key, value in {"loss": loss.item(), **metrics}.items():
            sums[key] = sums.get(key, 0.0) + value
        done = step + 1
        is_last = done == cfg.steps
        if done % cfg.log_every == 0:
            means = _format({key: value / cfg.log_every for key, value in sums.items()})
            steps_per_s = (done - first) / (time.monotonic() - start)
            log.info("step %d/%d  %s  %.2f steps/s", done, cfg.steps, means, steps_per_s)
            sums = {}
        if time.monotonic() - last_saved > cfg.save_every_s or is_last:
            optimization.save(done)
            last_saved = time.monotonic()
        if validate is not None and (done % cfg.validate_every == 0 or is_last):
            model.eval()
            with torch.no_grad():
                log.info("step %d  validation  %s", done, _format(validate()))


class _Optimization:
    """A model, its auxiliary heads and their optimizer, saved together as `training.pt`."""

    def __init__(self, model: nn.Module, heads: nn.ModuleList, cfg: DictConfig) -> None:
        self.model, self.heads, self.cfg = model, heads, cfg
        self.path = Path(cfg.out) / "training.pt"
        self.parameters = [p for p in [*model.parameters(), *heads.parameters()] if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": cfg.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98))

    def resume(self) -> int:
        """Load the checkpoint, if there is one; return the first step to run."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        step: int = state["step"]
        log.info("resumed %s at step %d", self.path, step)
        return step

    def save(self, step: int) -> None:
        """Write the checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": step,
        }
        with atomic_write(self.path) as part:
            torch.save(state, part)

    def set_learning_rate(self, step: int) -> None:
        """Apply the schedule."""
        cfg = self.cfg
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * learning_rate_factor(step, cfg.steps, cfg.warmup, cfg.decay)

    def update(self, loss: Tensor) -> None:
        """Take a step, unless a gradient is infinite or NaN."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.cfg.clip)
        if torch.isfinite(norm):
            self.optimizer.step()


def _format(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {value:.3f}" for key, value in metrics.items())
