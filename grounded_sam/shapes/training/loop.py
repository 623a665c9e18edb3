"""Shared training code of the small models: settings, a resumable loop, a schedule, and saving."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from grounded_sam.acceleration.allocator import keep_freed_memory
from grounded_sam.files import atomic_write

log = logging.getLogger(__name__)

#: Compute the loss of a batch at a step, and metrics to log.
LossFunction = Callable[[Any, int], tuple[Tensor, dict[str, float]]]


def load_settings(name: str) -> DictConfig:
    """Load the settings of a training, seed PyTorch, and set up logging.

    Args:
        name: Name of the YAML file beside this module, without its suffix. Two sections override the other values: the
            one named after the setting `model`, and then, on a CUDA device, `cuda`. `key=value` arguments of the
            command line override both.

    Raises:
        omegaconf.errors.ConfigKeyError: If an argument names a key that the file does not have.
    """
    base = OmegaConf.load(Path(__file__).with_name(f"{name}.yaml"))
    OmegaConf.set_struct(base, True)
    arguments = OmegaConf.from_cli(sys.argv[1:])
    merged = OmegaConf.merge(base, arguments)
    assert isinstance(merged, DictConfig)
    if merged.device == "auto":
        merged.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = merged.device
    for section in (str(merged.get("model")), device.partition(":")[0]):
        if isinstance(merged.get(section), DictConfig):
            merged = OmegaConf.merge(merged, merged[section], arguments, {"device": device})
            assert isinstance(merged, DictConfig)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(merged.seed)
    torch.set_num_threads(merged.threads)
    keep_freed_memory()
    return merged


def learning_rate_factor(step: int, total: int, warmup: int, decay: float) -> float:
    """Return the learning rate at a step as a fraction of its maximum: warm-up, plateau, linear decay.

    Because of the plateau, a run can be extended: resume from a checkpoint before the decay with more steps.

    Args:
        step: The step, from 0.
        total: Number of steps of the training.
        warmup: Number of steps of the warm-up.
        decay: Fraction of the steps that decay, 0 to 1.

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


def move_batch(value: Any, device: str | torch.device) -> Any:
    """Move the tensors in a batch of dataclasses, mappings and sequences to a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = {f.name: move_batch(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **moved)
    if isinstance(value, dict):
        return {key: move_batch(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [move_batch(item, device) for item in value]
    return value


class _Batches(Dataset[Any]):
    """The batches of the steps from `first` to before `stop`, for a `DataLoader`."""

    def __init__(self, make_batch: Callable[[int], Any], first: int, stop: int) -> None:
        self.make_batch, self.first, self.stop = make_batch, first, stop

    def __len__(self) -> int:
        return max(self.stop - self.first, 0)

    def __getitem__(self, index: int) -> Any:
        return self.make_batch(self.first + index)


def _load_batches(make_batch: Callable[[int], Any], first: int, stop: int, cfg: DictConfig) -> Iterator[Any]:
    """Yield the batches of steps on the device, made in `cfg.workers` processes."""
    cv2.setNumThreads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")  # many small tensors exceed the limit of open files
    loader = DataLoader(
        _Batches(make_batch, first, stop),
        batch_size=None,
        num_workers=cfg.workers,
        prefetch_factor=6 if cfg.workers else None,
        pin_memory=False,
    )
    for batch in loader:
        yield move_batch(batch, cfg.device)


def training_stage(out: str | Path) -> str | None:
    """Return the stage that the checkpoint in a folder belongs to; None if there is no checkpoint."""
    path = Path(out) / "training.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["stage"] if path.exists() else None


def fit(
    model: nn.Module,
    make_batch: Callable[[int], Any],
    loss_fn: LossFunction,
    cfg: DictConfig,
    validate: Callable[[], dict[str, float]] | None = None,
    auxiliary_heads: Iterable[nn.Module] = (),
    stage: str = "main",
) -> None:
    """Train a model for `cfg.steps` steps, or resume the training in `cfg.out`.

    The model has the averaged weights at the end, also after an interruption.

    Args:
        model: The model.
        make_batch: Makes the batch of a step, so that a resumed run sees the same batches as an uninterrupted one.
        loss_fn: Computes the loss of a batch.
        cfg: Settings `out`, `device`, `workers`, `steps`, `lr`, `weight_decay`, `warmup`, `decay`, `clip`, `average`,
            `log_every`, `save_every_s` and `validate_every`.
        validate: Computes metrics on held-out scenes, every `cfg.validate_every` steps and at the end, with the
            averaged weights.
        auxiliary_heads: Heads that are trained together with the model and are not part of it.
        stage: Name of this part of the training. A checkpoint of another stage is ignored and replaced.
    """
    heads = nn.ModuleList(auxiliary_heads)
    model.to(cfg.device)
    heads.to(cfg.device)
    optimization = _Optimization(model, heads, cfg, stage)
    first = optimization.resume()
    sums: dict[str, float] = {}
    start = last_saved = time.monotonic()
    try:
        for step, batch in enumerate(_load_batches(make_batch, first, cfg.steps, cfg), first):
            model.train()
            optimization.set_learning_rate(step)
            with torch.autocast("cuda", torch.bfloat16, enabled=cfg.device.startswith("cuda")):
                loss, metrics = loss_fn(batch, step)
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
                with torch.no_grad(), optimization.averaged():
                    log.info("step %d  validation  %s", done, _format(validate()))
    finally:
        optimization.use_average()


class _Optimization:
    """A model, its auxiliary heads, their optimizer and the average of the weights, saved together as `training.pt`.

    The exponential moving average of the weights is more accurate than the weights of any single step.
    """

    def __init__(self, model: nn.Module, heads: nn.ModuleList, cfg: DictConfig, stage: str) -> None:
        self.model, self.heads, self.cfg, self.stage = model, heads, cfg, stage
        self.path = Path(cfg.out) / "training.pt"
        self.parameters = [p for p in [*model.parameters(), *heads.parameters()] if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": cfg.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98))
        self.trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.trained]
        self.updates = 0

    def resume(self) -> int:
        """Load the checkpoint, if there is one of this stage; return the first step to run."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location=self.cfg.device, weights_only=True)
        if state["stage"] != self.stage:
            return 0
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.updates = step = int(state["step"])
        log.info("resumed %s at step %d of stage %s", self.path, step, self.stage)
        return step

    def save(self, step: int) -> None:
        """Write the checkpoint."""
        state = {
            "stage": self.stage,
            "step": step,
            "steps": self.cfg.steps,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
        }
        with atomic_write(self.path) as part:
            torch.save(state, part)

    def set_learning_rate(self, step: int) -> None:
        """Apply the schedule."""
        cfg = self.cfg
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * learning_rate_factor(step, cfg.steps, cfg.warmup, cfg.decay)

    def update(self, loss: Tensor) -> None:
        """Take a step, unless a gradient is infinite or NaN, and update the average."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.cfg.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.updates += 1
        # In the first steps, as in torch.optim.swa_utils, a short average is better than the initial weights.
        decay = min(self.cfg.average, self.updates / (self.updates + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.trained, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model its averaged weights for a while."""
        current = [p.detach().clone() for p in self.trained]
        self.use_average()
        try:
            yield
        finally:
            self._set(current)

    def use_average(self) -> None:
        """Give the model its averaged weights."""
        self._set(self.average)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.copy_(value)


def _format(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {value:.3f}" for key, value in metrics.items())
