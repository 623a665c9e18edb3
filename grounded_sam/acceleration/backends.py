"""Image backbones in OpenVINO or ONNX Runtime instead of PyTorch, on the CPU (extras `openvino`, `onnxruntime`)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from grounded_sam.acceleration.patching import Precision, furthest, has_bfloat16
from grounded_sam.errors import CheckpointError, ConfigError
from grounded_sam.weights.loading import weights_digest

if TYPE_CHECKING:
    from torch import Tensor, nn

Backend = Literal["torch", "openvino", "onnxruntime"]

log = logging.getLogger(__name__)

#: Packages that a back end needs. OpenVINO reads ONNX by itself; its own converter would report to its makers.
NEEDED = {"openvino": ("openvino", "onnx"), "onnxruntime": ("onnxruntime", "onnx")}
#: How far a conversion may be off when it is written, as a share of the largest value of each output.
TOLERANCE = 1e-3
#: Sizes of pictures whose conversions are kept in memory, for each backbone.
SIZES = 4


@dataclass(frozen=True)
class BackendSettings:
    """What runs a backbone, and where its conversions are kept.

    Attributes:
        backend: `torch`, `openvino` or `onnxruntime`.
        exports: a folder of conversions, read and added to; None: made anew in each run.
    """

    backend: Backend = "torch"
    exports: str | None = None

    def check(self, device: str, stage: str) -> None:
        """Raises ConfigError for a back end that there is not, is not installed, or does not run on that device."""
        if self.backend not in ("torch", *NEEDED):
            raise ConfigError(f"{stage}.backend must be torch, openvino or onnxruntime, got {self.backend!r}")
        if self.backend == "torch":
            return
        if device != "cpu":
            raise ConfigError(f"{stage}.backend={self.backend} is for the CPU, not for {device}; say device=cpu")
        for package in NEEDED[self.backend]:
            try:
                __import__(package)
            except ImportError as error:
                raise ConfigError(
                    f"{stage}.backend={self.backend} needs {package}: pip install 'grounded_sam[{self.backend}]'"
                ) from error


def convert(backbone: nn.Module, where: BackendSettings, precision: Precision) -> None:
    """Let another back end run a backbone whose one input is a batch of pictures.

    It is converted when pictures of a size first come, and again for other sizes, the last `SIZES` of which stay, and
    checked against PyTorch. In OpenVINO it computes in bfloat16 unless `precision` is `exact`; ONNX Runtime computes in
    32 bits.

    Args:
        backbone: of 32-bit weights on the CPU, whose outputs are tensors in lists, tuples, mappings or outputs of
            transformers.
        where: what is to run it; `torch` leaves it alone.
        precision: of the stage.
    """
    if where.backend == "torch":
        return
    device = next(backbone.parameters()).device
    if precision != "exact" and not has_bfloat16(device):
        log.warning("precision=%s is exact in %s: %s does not multiply in bfloat16", precision, where.backend, device)
        precision = "exact"
    plain = backbone.forward
    # What the graph depends on: the code that makes it, and the weights.
    made_by = [f"{package} {version(package)}" for package in ("torch", "transformers", "sam2", "segment_anything")]
    told_by = f"{type(backbone).__name__} {weights_digest(backbone.state_dict())} {made_by}"
    known: OrderedDict[str, Callable[[Tensor], Any]] = OrderedDict()

    def forward(_self: Any, *pictures: Tensor, **told: Any) -> Any:
        (pixels,) = pictures or (told.pop("pixel_values"),)  # as transformers calls them
        key = f"{tuple(pixels.shape)} {sorted(told.items())}"
        if key not in known:
            network = _Network(backbone, plain, told)
            name = hashlib.sha256(f"{told_by} {sorted(told.items())}".encode()).hexdigest()
            known[key] = _runner(network, pixels, name, where, precision)
            if len(known) > SIZES:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key](pixels)

    backbone.forward = MethodType(forward, backbone)  # type: ignore[method-assign]


@dataclass
class _Network:
    """A backbone with its own forward, and what its caller tells it."""

    backbone: nn.Module
    forward: Callable[..., Any]
    told: dict[str, Any]

    @property
    def kind(self) -> str:
        return type(self.backbone).__name__

    def flat(self, pixels: Tensor) -> tuple[list[Tensor], Any]:
        """Its tensors in a row, and how they belong together."""
        from torch.utils import _pytree as pytree

        leaves, tree = pytree.tree_flatten(self.forward(pixels, **self.told))
        return leaves, tree


def _runner(
    network: _Network, pixels: Tensor, name: str, where: BackendSettings, precision: Precision
) -> Callable[[Tensor], Any]:
    """A function from pictures of that size to outputs of the backbone, read from `exports` or converted now."""
    from torch.utils import _pytree as pytree

    size = "x".join(str(side) for side in pixels.shape)
    with tempfile.TemporaryDirectory() as spare:
        folder = Path(spare) / "conversion"
        if where.exports is not None:
            folder = Path(where.exports).expanduser() / f"{network.kind}-{size}-{name[:16]}"
        if not (folder / "about.json").is_file():
            _write(network, pixels, name, where, folder)
        tree = _read(folder, name)
        run = _opened(folder / "backbone.onnx", where.backend, precision)
    return lambda given: pytree.tree_unflatten(run(given), tree)


def _read(folder: Path, name: str) -> Any:
    """How the outputs of a conversion belong together."""
    from torch.utils import _pytree as pytree

    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if about["name"] != name:
            raise ValueError("it was made from other weights")
        return pytree.treespec_loads(about["outputs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise CheckpointError(f"{folder} holds no conversion that can be read ({error}); delete it") from error


def _write(network: _Network, pixels: Tensor, name: str, where: BackendSettings, folder: Path) -> None:
    """Convert a backbone into a folder, after a check against PyTorch."""
    import torch
    from torch import nn
    from torch.utils import _pytree as pytree

    class Flat(nn.Module):
        """For exporters, which want a module and tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = network.backbone

        def forward(self, given: Tensor) -> tuple[Tensor, ...]:
            return tuple(network.flat(given)[0])

    backend = where.backend
    with torch.inference_mode(False), torch.no_grad():
        pixels = torch.from_numpy(_array(pixels).copy())  # without what inference mode notes of it
        expected, tree = network.flat(pixels)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as spare:
            part = Path(spare) / "part"
            part.mkdir()
            path = part / "backbone.onnx"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.onnx.export(Flat().eval(), (pixels,), str(path), dynamo=False, opset_version=17)
            except Exception as error:  # exporters fail in many ways
                raise CheckpointError(
                    f"{network.kind} cannot be converted: {' '.join(str(error).split())[:300]}; say backend=torch"
                ) from error
            got = _opened(path, backend, "exact")(pixels)
            off = furthest(expected, got)
            if not off <= TOLERANCE:
                raise CheckpointError(
                    f"{network.kind} would be off by {off:.1e} of the largest value in {backend}; say backend=torch"
                )
            about = {"name": name, "outputs": pytree.treespec_dumps(tree), "off": off}
            (part / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            log.info("%s in %s is off by %.1e of the largest value", network.kind, backend, off)
            try:
                os.replace(part, folder)
            except OSError:
                if not (folder / "about.json").is_file():  # or another process was faster, and its is as good
                    raise


def _opened(path: Path, backend: str, precision: Precision) -> Callable[[Tensor], list[Tensor]]:
    """A function from pictures to the tensors of a conversion."""
    import torch

    threads = torch.get_num_threads()
    try:
        if backend == "openvino":
            import openvino

            hints = {
                "INFERENCE_PRECISION_HINT": "f32" if precision == "exact" else "bf16",
                "INFERENCE_NUM_THREADS": threads,
            }
            request = openvino.Core().compile_model(str(path), "CPU", hints).create_infer_request()
            # What comes out is copied, since the next picture is written over it.
            return lambda pixels: [torch.from_numpy(x) for x in request.infer([_array(pixels)]).to_tuple()]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda pixels: [torch.from_numpy(x) for x in session.run(None, {name: _array(pixels)})]
    except Exception as error:  # damaged files make both raise all sorts
        raise CheckpointError(f"{backend} cannot run {path}: {' '.join(str(error).split())[:300]}") from error


def _array(pixels: Tensor) -> Any:
    return pixels.contiguous().numpy()
