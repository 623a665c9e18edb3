"""What an engine is given, and what it must implement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from grounded_sam.output.paths import OutputPath
from grounded_sam.output.sweep import Sweep
from grounded_sam.pipeline.runner import Summary
from grounded_sam.structures.protocols import Sink

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class EngineJob:
    """A run of the command.

    Attributes:
        cfg: Its config.
        output: Its output, which is claimed.
        sweep: The sweep that it belongs to; None for a run of its own.
        reusable: Stages of the previous job of a sweep in this process, see `config.build.build`.
        record: What `run.json` will have; an engine adds counts and costs.
    """

    cfg: DictConfig
    output: OutputPath
    sweep: Sweep | None = None
    reusable: dict[str, tuple[Any, Any]] | None = None
    record: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Engine(Protocol):
    """Runs jobs. The keys of its YAML in `conf/engine/` are the arguments of its class."""

    def run(self, job: EngineJob) -> tuple[Summary, Sequence[Sink]]:
        """Build the stages, process the input, and return what was done, and the sinks.

        Raises:
            GroundedSamError: If settings do not work together, or the run cannot go on.
        """
