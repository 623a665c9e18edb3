"""Options of all SAM-like segmenters."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from grounded_sam.acceleration.options import ModelOptions
from grounded_sam.checks import check_int
from grounded_sam.errors import ConfigError, shorten


@dataclass(frozen=True)
class SegmenterOptions(ModelOptions):
    """How prompts are decoded, and where and how the model runs.

    Attributes:
        multimask: Whether to decode three masks per prompt and keep the one with the highest predicted IoU; `auto`
            does so for prompts of a single click, which may mean a part or the whole.
        chunk: Maximum number of prompts decoded at once; fewer if their masks at image size exceed 256 MiB.
        max_hole_area: Area in pixels below which holes in masks are filled; 0 fills none.
        min_region_area: Area in pixels below which separate regions are removed; 0 removes none.
        rounds: Number of times that each prompt is decoded; each round after the first is prompted with the box and
            the logits of the previous mask, in addition to the clicks.

    Raises:
        ConfigError: If a value is not allowed; the message names the key.

    >>> SegmenterOptions(multimask=True).chunk
    64
    """

    multimask: bool | Literal["auto"] = "auto"
    chunk: int = 64
    max_hole_area: int = 0
    min_region_area: int = 0
    rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.multimask, bool) and self.multimask != "auto":
            raise ConfigError(f"segmenter.multimask must be true, false or auto, got {shorten(self.multimask)}")
        check_int("segmenter.chunk", self.chunk, 1)
        check_int("segmenter.max_hole_area", self.max_hole_area, 0)
        check_int("segmenter.min_region_area", self.min_region_area, 0)
        check_int("segmenter.rounds", self.rounds, 1)


def model_identity(options: ModelOptions, *weights: Hashable) -> tuple[Hashable, ...]:
    """Return what must be equal for a segmenter and a tracker to share a model.

    Args:
        options: Options of the stage.
        *weights: Settings that name the weights, such as `checkpoint`.

    >>> model_identity(ModelOptions(device="cpu"), "weights.pt")
    ('weights.pt', 'cpu', 'exact', 'torch')
    """
    return (*weights, options.torch_device, options.precision, options.backend)
