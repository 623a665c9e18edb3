"""Helpers of all patches: verify a new forward, compute in bfloat16, chunk and compile."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from grounded_sam.checks import check_bool, check_choice

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Precision = Literal["exact", "balanced", "fast"]

log = logging.getLogger(__name__)

#: Rows per chunk of a feed-forward network, so that its hidden features stay in the CPU cache.
CHUNK_ROWS = 512


def check_precision(precision: str, compile_: object, stage: str) -> None:
    """Check the settings `precision` and `compile` of a stage.

    Raises:
        ConfigError: If one of them is not allowed.

    >>> check_precision("exact", False, "detector")
    """
    check_choice(f"{stage}.precision", precision, ("exact", "balanced", "fast"))
    check_bool(f"{stage}.compile", compile_)


def patch_forward(
    module: nn.Module,
    forward: Callable[..., Any],
    inputs: Sequence[Any],
    tolerance: float,
    patch_name: str,
    **kwargs: Any,
) -> bool:
    """Replace the `forward` of a module if the new one returns the same on trial inputs.

    Args:
        module: Module to patch.
        forward: New forward; called with the module and its inputs. It may return None for outputs that nobody reads.
        inputs: Trial inputs.
        tolerance: Largest difference allowed, relative to the largest absolute value of each output.
        patch_name: Name of the patch, for the log.
        **kwargs: Further trial inputs, by keyword.

    Returns:
        Whether the module was patched. If not, a warning has been logged.
    """
    import torch

    with torch.no_grad():
        try:
            expected, actual = _leaves(module(*inputs, **kwargs)), _leaves(forward(module, *inputs, **kwargs))
            read = [(a, b) for a, b in zip(expected, actual, strict=True) if a is not None and b is not None]
            error = max_relative_error(*zip(*read, strict=True))
        except Exception as failure:  # another version of the package may have changed the module in any way
            reason = " ".join(str(failure).split())[:200]
            log.warning("%s is not applied to %s: %s", patch_name, type(module).__name__, reason)
            return False
    if not error <= tolerance:
        log.warning("%s is not applied to %s: its error would be %.1e", patch_name, type(module).__name__, error)
        return False
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return True


def modules_of_class(root: Any, *class_names: str) -> list[Any]:
    """Return all modules in a module, itself included, whose class has one of the given names.

    Args:
        root: A `torch.nn.Module`.
        *class_names: Names of classes, without their module; subclasses do not count.

    >>> from torch import nn
    >>> modules_of_class(nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), "Linear")
    [Linear(in_features=2, out_features=3, bias=True)]
    """
    return [module for module in root.modules() if type(module).__name__ in class_names]


def _leaves(output: Any) -> Iterator[Tensor | None]:
    """Yield what is in nested tuples and lists: tensors, and None."""
    if isinstance(output, tuple | list):
        for part in output:
            yield from _leaves(part)
    else:
        yield output


def max_relative_error(expected: Iterable[Tensor], actual: Iterable[Tensor]) -> float:
    """Return the largest difference between tensors, relative to the largest absolute value of each.

    Returns:
        The error; NaN if any difference is NaN.

    Raises:
        ValueError: If numbers or shapes of the tensors differ.

    >>> import torch
    >>> max_relative_error([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 3.0])])
    0.25
    """
    errors = [_relative_error(a, b) for a, b in zip(expected, actual, strict=True)]
    return max(errors, key=lambda error: (math.isnan(error), error), default=0.0)  # `max` alone would ignore NaN


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape:
        raise ValueError(f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    expected, actual = expected.float(), actual.float()
    return float((expected - actual).abs().max() / expected.abs().max().clamp(min=1e-6))


class TrialInputs:
    """Random inputs for verifying a patch, the same in every run, with the device and dtype of a weight.

    Args:
        weight: A weight of the module.

    Attributes:
        tolerance: Largest relative error of a patch that only changes the order of summation.

    >>> import torch
    >>> TrialInputs(torch.zeros(2)).normal(3, 4).shape
    torch.Size([3, 4])
    """

    def __init__(self, weight: Tensor) -> None:
        import torch

        self.device, self.dtype = weight.device, weight.dtype
        self.tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
        self._generator = torch.Generator(weight.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Draw from a standard normal distribution."""
        import torch

        return torch.randn(shape, generator=self._generator, device=self.device, dtype=self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniformly from 0 to 1."""
        import torch

        return torch.rand(shape, generator=self._generator, device=self.device, dtype=self.dtype)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices in bfloat16 faster than in float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # PyTorch without oneDNN
        return False


def use_bfloat16_matmul(layer: nn.Module, output_dtype: torch.dtype | None = None) -> None:
    """Make a linear layer or a convolution multiply in bfloat16; oneDNN and cuBLAS accumulate in float32.

    Args:
        layer: The layer. Its weights become bfloat16, half the memory.
        output_dtype: Dtype of the output; None for that of the input.
    """
    import torch

    layer.to(torch.bfloat16)
    original = type(layer).forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return original(self, x.to(torch.bfloat16)).to(output_dtype or x.dtype)  # type: ignore[no-any-return]

    layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


def use_bfloat16_linears(root: nn.Module) -> None:
    """Make all float32 linear layers of a module multiply in bfloat16; norms and residual sums stay in float32."""
    import torch
    from torch import nn

    use_bfloat16_feed_forwards(root)
    for module in root.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32:
            use_bfloat16_matmul(module)


def run_in_bfloat16(module: nn.Module, output_dtype: torch.dtype | None = None) -> None:
    """Compute all of a module in bfloat16: weights are cast once, tensors when they enter and leave it.

    Args:
        module: The module. Its inputs are tensors, also in lists, and values of other types.
        output_dtype: Dtype of the floating-point tensors that it returns; None for bfloat16.
    """
    import torch

    module.to(torch.bfloat16)
    original = module.forward

    def forward(_self: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
        inputs, kwargs = _cast((inputs, kwargs), torch.bfloat16)
        outputs = original(*inputs, **kwargs)
        return outputs if output_dtype is None else _cast(outputs, output_dtype)

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors in nested tuples, lists and dicts."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


class FeedForward(NamedTuple):
    """The parts of a feed-forward network: linear layer, activation, linear layer."""

    first: Any
    activation: Callable[[Tensor], Tensor]
    second: Any


def feed_forward_of(module: Any) -> FeedForward | None:
    """Return the parts of a module if it is a feed-forward network of Swin, SAM, SAM 2 or transformers' SAM 2."""
    class_name = type(module).__name__
    if class_name == "SwinMLP":
        return FeedForward(module.fc1, module.activation_fn, module.fc2)
    if class_name == "MLP" and getattr(module, "num_layers", 0) == 2 and not module.sigmoid_output:
        return FeedForward(module.layers[0], module.act, module.layers[1])
    if class_name == "Sam2FeedForward" and module.num_layers == 2 and not module.sigmoid_output:
        return FeedForward(module.proj_in, module.activation, module.proj_out)
    return None


def chunk_feed_forwards(root: nn.Module) -> int:
    """Run the feed-forward networks below a module on chunks of rows.

    Replaces the `forward` of `SwinMLP` and `Sam2FeedForward` (transformers) and of `MLP` (sam2), which write hidden
    features, four or eight times as wide as their input, to memory and read them again for bias, activation and second
    layer. Chunks of `CHUNK_ROWS` rows stay in the CPU cache. The result is the same, since rows do not depend on each
    other.

    Returns:
        Number of networks that were patched.
    """
    count = 0
    for module in list(root.modules()):
        network = feed_forward_of(module)
        if network is not None:
            x = TrialInputs(network.first.weight).normal(2, CHUNK_ROWS // 2 + 3, network.first.in_features)
            count += patch_forward(module, _chunked_forward, (x,), 1e-5, "chunk_feed_forwards")
    return count


def _chunked_forward(self: Any, x: Tensor) -> Tensor:
    """Replace the forward of a feed-forward network; see `chunk_feed_forwards`."""
    network = feed_forward_of(self)
    assert network is not None
    return chunked_feed_forward(x, network, network.first.weight.dtype)


def chunked_feed_forward(x: Tensor, network: FeedForward, dtype: torch.dtype) -> Tensor:
    """Run a feed-forward network on chunks of rows.

    Args:
        x: Features, `(..., c)`.
        network: Its parts.
        dtype: Dtype that chunks are cast to, that of the network's weights.

    Returns:
        Features `(..., d)` with the dtype of `x`.
    """
    import torch

    rows = x.reshape(-1, x.shape[-1])
    chunks = (network.second(network.activation(network.first(chunk.to(dtype)))) for chunk in rows.split(CHUNK_ROWS))
    return torch.cat([chunk.to(x.dtype) for chunk in chunks]).view(*x.shape[:-1], -1)


def use_bfloat16_feed_forwards(root: nn.Module) -> None:
    """Make the feed-forward networks that `chunk_feed_forwards` has patched compute in bfloat16."""
    import torch

    for module in root.modules():
        if "forward" in vars(module) and (network := feed_forward_of(module)) is not None:
            network.first.to(torch.bfloat16)
            network.second.to(torch.bfloat16)


class _Tf32:
    """The switches of TF32, which all threads share.

    Attributes:
        users: Number of blocks that need them off.
        before: The switches as they were before the first of these.
    """

    def __init__(self) -> None:
        self.lock, self.users = Lock(), 0
        self.before: list[bool] = []


_TF32 = _Tf32()


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let CUDA compute float32 products and convolutions in float32, not in TF32, whose mantissa has 10 bits.

    Several threads may be in such a block; the last one to leave switches back.
    """
    import torch

    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    with _TF32.lock:
        if not _TF32.users:
            _TF32.before = [switch.allow_tf32 for switch in switches]
            for switch in switches:
                switch.allow_tf32 = False
        _TF32.users += 1
    try:
        yield
    finally:
        with _TF32.lock:
            _TF32.users -= 1
            if not _TF32.users:
                for switch, allowed in zip(switches, _TF32.before, strict=True):
                    switch.allow_tf32 = allowed


@contextmanager
def inference() -> Iterator[None]:
    """Run a model: without gradients, and with float32 as it is."""
    import torch

    with torch.inference_mode(), without_tf32():
        yield


def to_device(pixels: Tensor, device: Any) -> Tensor:
    """Move pixels to a device; to CUDA from page-locked memory, so that the copy does not block later steps."""
    import torch

    if torch.device(device).type == "cuda" and pixels.device.type == "cpu":
        return pixels.pin_memory().to(device, non_blocking=True)
    return pixels.to(device)


def compile_forward(module: nn.Module, name: str, dynamic: bool) -> None:
    """Compile the `forward` of a module with `torch.compile` when it first runs; fall back to eager if that fails.

    Args:
        module: Module to compile.
        name: Name of the module, for the log.
        dynamic: Whether the shapes of its inputs vary.
    """
    import torch

    eager = module.forward
    state = {"forward": torch.compile(eager, dynamic=dynamic)}

    def forward(_self: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
        if state["forward"] is eager:
            return eager(*inputs, **kwargs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return state["forward"](*inputs, **kwargs)
        except Exception as failure:  # compilers fail in many ways; an error of the module itself is raised again below
            log.warning("%s is not compiled: %s", name, " ".join(str(failure).split())[:200])
            state["forward"] = eager
            return eager(*inputs, **kwargs)

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
