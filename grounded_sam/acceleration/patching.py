"""What levers have in common: trying out, computing in bfloat16, compiling."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from grounded_sam.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Precision = Literal["exact", "balanced", "fast"]

log = logging.getLogger(__name__)

#: Of a feed-forward network at once.
ROWS = 512


def check_precision(precision: str, compile_: object, stage: str) -> None:
    """Raises ConfigError for a precision that there is not."""
    if precision not in ("exact", "balanced", "fast"):
        raise ConfigError(f"{stage}.precision must be exact, balanced or fast, got {precision!r}")
    if not isinstance(compile_, bool):
        raise ConfigError(f"{stage}.compile must be true or false, got {compile_!r}")


def replace_forward(
    module: nn.Module, forward: Callable[..., Any], inputs: Sequence[Any], tolerance: float, name: str, **told: Any
) -> bool:
    """Give a module another `forward`, if that gives the same.

    Args:
        module: whose forward it is for.
        forward: function of the module and its inputs.
        inputs: to try both out on.
        tolerance: largest difference, as a share of the largest value of each output.
        name: of the lever, for the log.
        told: more arguments of both.
    """
    import torch

    with torch.no_grad():
        try:
            before, after = module(*inputs, **told), forward(module, *inputs, **told)
            error = furthest(_tensors(before), _tensors(after))
        except Exception as failure:  # of code that someone else has changed
            log.warning("%s leaves %s alone: %s", name, type(module).__name__, " ".join(str(failure).split())[:200])
            return False
    if not error <= tolerance:
        log.warning("%s leaves %s alone: it would be off by %.1e", name, type(module).__name__, error)
        return False
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return True


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, tuple | list):
        for part in out:
            yield from _tensors(part)
    elif out is not None:
        yield out


def furthest(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    """The largest difference of tensors, as a share of the largest value of each; NaN if there is one.

    Raises:
        ValueError: if they are not as many, or of other shapes.
    """
    errors = [_apart(a, b) for a, b in zip(before, after, strict=True)]
    return max(errors, key=lambda error: (math.isnan(error), error), default=0.0)  # max alone passes over NaN


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    if a.shape != b.shape:
        raise ValueError(f"expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
    return float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1e-6))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 faster than in 32 bits."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # PyTorch without oneDNN
        return False


def half(linear: nn.Module, out: torch.dtype | None = None) -> None:
    """Let a linear layer or a convolution multiply in bfloat16; sums are in 32 bits, as oneDNN has them.

    Args:
        linear: its weights become bfloat16, which takes half the memory.
        out: dtype of what comes out; by default that of what goes in.
    """
    import torch

    linear.to(torch.bfloat16)
    plain = type(linear).forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return plain(self, x.to(torch.bfloat16)).to(out or x.dtype)  # type: ignore[no-any-return]

    linear.forward = MethodType(forward, linear)  # type: ignore[method-assign]


def piece_feed_forwards(root: nn.Module) -> int:
    """Run feed-forward networks some rows after the others, what lies between stays in the cache; how many do.

    A network of two layers writes its inner features, four or eight times as wide as the others, to memory and reads
    them again, for the bias, the activation and the second layer each.

    Args:
        root: a model of transformers' Swin or SAM 2, or of the package sam2.
    """
    import torch

    count = 0
    modules: list[Any] = list(root.modules())
    for module in modules:
        found = _feed_forward(module)
        if found is not None:
            like = found[0].weight
            noise = torch.Generator(like.device).manual_seed(0)
            x = torch.randn((2, ROWS // 2 + 3, found[0].in_features), generator=noise, device=like.device)
            count += replace_forward(module, _pieced, (x.to(like.dtype),), 1e-5, "piece_feed_forwards")
    return count


def _feed_forward(module: Any) -> tuple[Any, Callable[[Tensor], Tensor], Any] | None:
    """The two layers of a feed-forward network and what is between them; None if it is no such."""
    kind = type(module).__name__
    if kind == "SwinMLP":
        return module.fc1, module.activation_fn, module.fc2
    if kind == "MLP" and getattr(module, "num_layers", 0) == 2 and not module.sigmoid_output:
        return module.layers[0], module.act, module.layers[1]
    if kind == "Sam2FeedForward" and module.num_layers == 2 and not module.sigmoid_output:
        return module.proj_in, module.activation, module.proj_out
    return None


def _pieced(self: Any, x: Tensor) -> Tensor:
    """`forward` of a feed-forward network; see `piece_feed_forwards`."""
    found = _feed_forward(self)
    assert found is not None
    first, activation, second = found
    return in_pieces(x, first, activation, second, first.weight.dtype)


def in_pieces(
    x: Tensor,
    first: Callable[[Tensor], Tensor],
    activation: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """A feed-forward network of two layers on x `(..., c)`, which is cast to `dtype`, and the outcome back."""
    import torch

    rows = x.reshape(-1, x.shape[-1])
    pieces = (second(activation(first(piece.to(dtype)))) for piece in rows.split(ROWS))
    return torch.cat([piece.to(x.dtype) for piece in pieces]).view(*x.shape[:-1], -1)


def half_feed_forwards(root: nn.Module) -> None:
    """Those that run in pieces compute in bfloat16 from now on; their weights take half the memory."""
    import torch

    for module in root.modules():
        if "forward" in vars(module) and (found := _feed_forward(module)) is not None:
            found[0].to(torch.bfloat16)
            found[2].to(torch.bfloat16)


def to_device(pixels: Tensor, device: Any) -> Tensor:
    """Pictures on a device; to CUDA from page-locked memory, so that the next steps are not waited with."""
    import torch

    if torch.device(device).type == "cuda" and pixels.device.type == "cpu":
        return pixels.pin_memory().to(device, non_blocking=True)
    return pixels.to(device)


def compiled(module: nn.Module, name: str, dynamic: bool) -> None:
    """Let `torch.compile` have a module's forward; where that fails it goes on as it was, with a line in the log.

    Args:
        module: to compile when it first runs.
        name: for the log.
        dynamic: false if what goes in always has one shape.
    """
    import torch

    plain = module.forward
    state = {"run": torch.compile(plain, dynamic=dynamic)}

    def forward(_self: nn.Module, *inputs: Any, **told: Any) -> Any:
        if state["run"] is plain:
            return plain(*inputs, **told)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return state["run"](*inputs, **told)
        except Exception as failure:  # compilers fail in many ways; a fault of the module itself comes again below
            log.warning("%s is not compiled: %s", name, " ".join(str(failure).split())[:200])
            state["run"] = plain
            return plain(*inputs, **told)

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
