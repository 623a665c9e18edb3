"""Options of the trackers that use the memory of SAM 2's video models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from grounded_sam.acceleration.options import ModelOptions
from grounded_sam.checks import check_choice, check_int


@dataclass(frozen=True)
class TrackerOptions(ModelOptions):
    """How objects are prompted and remembered, and where and how the model runs.

    Attributes:
        prompt: What a new object is prompted with: its `mask`, its `box`, or `auto`, its mask if it has one.
        max_prompts: Number of prompted frames remembered per object: the first one and the latest.

    Raises:
        ConfigError: If a value is not allowed; the message names the key.
    """

    stage: ClassVar[str] = "tracker"

    prompt: Literal["auto", "mask", "box"] = "auto"
    max_prompts: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tracker.prompt", self.prompt, ("auto", "mask", "box"))
        check_int("tracker.max_prompts", self.max_prompts, 1)
