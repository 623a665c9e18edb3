"""Text-prompted segmentation with Grounding DINO and SAM / SAM 2, as interchangeable stages.

>>> from grounded_sam import load
>>> model = load(detector="grounding_dino", segmenter="sam2")     # doctest: +SKIP
>>> detections = model.segment("street.jpg", ["car", "wheel"])    # doctest: +SKIP

Importing the package imports neither torch nor Hydra; `load` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grounded_sam.errors import CheckpointError, ConfigError, GroundedSamError, ImageError, VocabularyError
from grounded_sam.structures.vocabulary import Vocabulary

if TYPE_CHECKING:
    from grounded_sam.config.build import load
    from grounded_sam.media.images import read_image
    from grounded_sam.pipeline.pipeline import Pipeline
    from grounded_sam.pipeline.select import Select
    from grounded_sam.structures.frame import Frame

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Frame",
    "GroundedSamError",
    "ImageError",
    "Pipeline",
    "Select",
    "Vocabulary",
    "VocabularyError",
    "load",
    "read_image",
]

_LAZY = {
    "load": "config.build",
    "Frame": "structures.frame",
    "read_image": "media.images",
    "Pipeline": "pipeline.pipeline",
    "Select": "pipeline.select",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
