"""Options that all accelerated models share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grounded_sam.acceleration.backends import Backend, BackendSettings
from grounded_sam.acceleration.patching import Precision, check_precision
from grounded_sam.weights.loading import pick_device


@dataclass(frozen=True)
class ModelOptions:
    """Where and how a model runs.

    Attributes:
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        precision: `exact` with patches that do not change results; `balanced` and `fast` with more bfloat16.
        compile: Compile the image encoder with `torch.compile`; pays off with many images.
        backend: What runs the image backbone on a CPU: `torch`, `openvino` or `onnxruntime` (extras).
        export_dir: Folder for the exported backbone; None exports it again in every run.

    Raises:
        ConfigError: If a value is not allowed; the message names the key.
    """

    #: Config group, for messages.
    stage: ClassVar[str] = "segmenter"

    device: str = "auto"
    precision: Precision = "exact"
    compile: bool = False
    backend: Backend = "torch"
    export_dir: str | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision, self.compile, self.stage)
        self.backend_settings.validate(pick_device(self.device), self.stage)

    @property
    def torch_device(self) -> str:
        """The device, with `auto` resolved."""
        return pick_device(self.device)

    @property
    def backend_settings(self) -> BackendSettings:
        """Back end and folder of conversions."""
        return BackendSettings(self.backend, self.export_dir)
