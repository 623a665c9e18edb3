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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from grounded_sam.acceleration.patching import Precision, has_bfloat16, max_relative_error
from grounded_sam.checks import check_choice
from grounded_sam.errors import CheckpointError, ConfigError
from grounded_sam.files import home_path
from grounded_sam.weights.loading import weights_digest

if TYPE_CHECKING:
    from torch import Tensor, nn

Backend = Literal["torch", "openvino", "onnxruntime"]

log = logging.getLogger(__name__)

#: Packages that a back end needs. OpenVINO reads ONNX itself; its own converter would send usage data to its makers.
REQUIRED_PACKAGES = {"openvino": ("openvino", "onnx"), "onnxruntime": ("onnxruntime", "onnx")}
#: Largest error of a conversion, relative to the largest absolute value of each output.
TOLERANCE = 1e-3
#: Maximum number of image sizes per backbone whose converted models stay in memory.
MAX_LOADED_SIZES = 4


@dataclass(frozen=True)
class BackendSettings:
    """What runs a backbone, and where its conversions are kept.

    Attributes:
        backend: `torch`, `openvino` or `onnxruntime`.
        export_dir: Folder that conversions are read from and added to; None converts in every run.
    """

    backend: Backend = "torch"
    export_dir: str | None = None

    def validate(self, device: str, stage: str) -> None:
        """Check that the back end exists, is installed, and runs on a device.

        Args:
            device: Device of the stage, with `auto` resolved.
            stage: Config group, for messages.

        Raises:
            ConfigError: If it does not.

        >>> BackendSettings().validate("cuda", "detector")
        """
        check_choice(f"{stage}.backend", self.backend, ("torch", *REQUIRED_PACKAGES))
        if self.backend == "torch":
            return
        if device != "cpu":
            raise ConfigError(f"{stage}.backend={self.backend} runs on the CPU only, not on {device}; set device=cpu")
        for package in REQUIRED_PACKAGES[self.backend]:
            try:
                __import__(package)
            except ImportError as error:
                raise ConfigError(
                    f"{stage}.backend={self.backend} needs {package}: pip install 'grounded_sam[{self.backend}]'"
                ) from error


def _version(package: str) -> str:
    """Return the version of a package; `none` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def convert_backbone(backbone: nn.Module, settings: BackendSettings, precision: Precision) -> None:
    """Run the `forward` of a backbone, whose only input is a batch of images, in another back end.

    The backbone is converted when images of a size first arrive, and compared with PyTorch on them. The conversions for
    the last `MAX_LOADED_SIZES` sizes stay loaded. OpenVINO computes in bfloat16 unless `precision` is `exact`; ONNX
    Runtime computes in float32.

    Args:
        backbone: Module with float32 weights on the CPU, whose outputs are tensors in lists, tuples, mappings or output
            classes of transformers.
        settings: Back end, and folder of conversions; nothing is changed for `torch`.
        precision: Precision of the stage.
    """
    if settings.backend == "torch":
        return
    device = next(backbone.parameters()).device
    if precision != "exact" and not has_bfloat16(device):
        log.warning(
            "precision=%s runs as exact in %s: %s has no fast bfloat16 matmul", precision, settings.backend, device
        )
        precision = "exact"
    original = backbone.forward
    # The graph depends on the weights and on the code that produces it.
    versions = [f"{package} {_version(package)}" for package in ("torch", "transformers", "sam2", "segment_anything")]
    origin = f"{type(backbone).__name__} {weights_digest(backbone.state_dict())} {versions}"
    loaded: OrderedDict[str, Callable[[Tensor], Any]] = OrderedDict()

    def forward(_self: Any, *images: Tensor, **kwargs: Any) -> Any:
        (pixels,) = images or (kwargs.pop("pixel_values"),)  # transformers passes it by keyword
        key = f"{tuple(pixels.shape)} {sorted(kwargs.items())}"
        if key not in loaded:
            network = _Network(backbone, original, kwargs)
            fingerprint = hashlib.sha256(f"{origin} {sorted(kwargs.items())}".encode()).hexdigest()
            loaded[key] = _load_or_convert(network, pixels, fingerprint, settings, precision)
            if len(loaded) > MAX_LOADED_SIZES:
                loaded.popitem(last=False)
        loaded.move_to_end(key)
        return loaded[key](pixels)

    backbone.forward = MethodType(forward, backbone)  # type: ignore[method-assign]


@dataclass
class _Network:
    """A backbone with its original forward and the keyword arguments of its caller."""

    backbone: nn.Module
    forward: Callable[..., Any]
    kwargs: dict[str, Any]

    @property
    def class_name(self) -> str:
        return type(self.backbone).__name__

    def flat_forward(self, pixels: Tensor) -> tuple[list[Tensor], Any]:
        """Return the output as a flat list of tensors, and the tree that they belong to."""
        from torch.utils import _pytree as pytree

        leaves, tree = pytree.tree_flatten(self.forward(pixels, **self.kwargs))
        return leaves, tree

    def flat_module(self) -> nn.Module:
        """Return a module whose outputs are a flat tuple of tensors, as exporters need it."""
        from torch import nn

        network = self

        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.backbone = network.backbone

            def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
                return tuple(network.flat_forward(pixels)[0])

        return Flat().eval()


def _load_or_convert(
    network: _Network, pixels: Tensor, fingerprint: str, settings: BackendSettings, precision: Precision
) -> Callable[[Tensor], Any]:
    """Return a function from images of the size of `pixels` to the backbone's outputs.

    Args:
        network: The backbone.
        pixels: Images, `(b, 3, h, w)`.
        fingerprint: Identifies weights and code.
        settings: Back end, and folder of conversions.
        precision: Precision of the stage.
    """
    from torch.utils import _pytree as pytree

    size = "x".join(str(side) for side in pixels.shape)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "conversion"
        if settings.export_dir is not None:
            folder = home_path(settings.export_dir) / f"{network.class_name}-{size}-{fingerprint[:16]}"
        if not (folder / "about.json").is_file():
            _write_conversion(network, pixels, fingerprint, settings.backend, folder)
        tree = _read_output_tree(folder, fingerprint)
        run = _start_session(folder / "backbone.onnx", settings.backend, precision)
    return lambda images: pytree.tree_unflatten(run(images), tree)


def _read_output_tree(folder: Path, fingerprint: str) -> Any:
    """Read the tree that the outputs of a conversion belong to.

    Raises:
        CheckpointError: If the conversion cannot be read, or is of other weights.
    """
    from torch.utils import _pytree as pytree

    try:
        metadata = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if metadata["name"] != fingerprint:
            raise ValueError("it was made from other weights")
        return pytree.treespec_loads(metadata["outputs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise CheckpointError(f"cannot read the conversion in {folder} ({error}); delete it") from error


def _write_conversion(network: _Network, pixels: Tensor, fingerprint: str, backend: str, folder: Path) -> None:
    """Convert a backbone to ONNX, compare it with PyTorch, and rename it to its folder.

    Raises:
        CheckpointError: If it cannot be converted, or the results differ.
    """
    import torch
    from torch.utils import _pytree as pytree

    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary,
    ):
        pixels = torch.from_numpy(_to_numpy(pixels).copy())  # tensors of inference mode cannot be exported
        expected, tree = network.flat_forward(pixels)
        pending = Path(temporary) / "part"
        pending.mkdir()
        path = pending / "backbone.onnx"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(network.flat_module(), (pixels,), str(path), dynamo=False, opset_version=17)
        except Exception as error:  # exporters fail in many ways
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"cannot convert {network.class_name}: {reason}; use backend=torch") from error
        deviation = max_relative_error(expected, _start_session(path, backend, "exact")(pixels))
        if not deviation <= TOLERANCE:
            raise CheckpointError(
                f"{network.class_name} in {backend} differs from PyTorch by {deviation:.1e} of the largest value; "
                "use backend=torch"
            )
        metadata = {"name": fingerprint, "outputs": pytree.treespec_dumps(tree), "off": deviation}
        (pending / "about.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
        log.info("%s in %s differs from PyTorch by %.1e of the largest value", network.class_name, backend, deviation)
        try:
            os.replace(pending, folder)
        except OSError:
            if not (folder / "about.json").is_file():  # else another process has written the same conversion
                raise


def _start_session(path: Path, backend: str, precision: Precision) -> Callable[[Tensor], list[Tensor]]:
    """Load a conversion and return a function from images to its output tensors.

    Raises:
        CheckpointError: If the back end cannot load the file.
    """
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
            # `to_tuple` copies the outputs, which the next image would overwrite.
            return lambda pixels: [torch.from_numpy(x) for x in request.infer([_to_numpy(pixels)]).to_tuple()]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda pixels: [torch.from_numpy(x) for x in session.run(None, {name: _to_numpy(pixels)})]
    except Exception as error:  # damaged files make both raise many kinds of error
        raise CheckpointError(f"{backend} cannot load {path}: {' '.join(str(error).split())[:300]}") from error


def _to_numpy(pixels: Tensor) -> Any:
    return pixels.contiguous().numpy()
