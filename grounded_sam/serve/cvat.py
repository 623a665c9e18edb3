"""Auto-annotation functions for CVAT's SDK and command: `cvat-cli task auto-annotate --function-module`.

    cvat-cli task auto-annotate 7 --function-module grounded_sam.serve.cvat -p preset=str:shapes \\
        -p 'text=str:red circle, green star' --allow-unmatched-labels

The labels of the function are the classes; CVAT matches them by name with those of the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from grounded_sam.config.build import load
from grounded_sam.errors import ConfigError
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.structures.masks import encode_polygons

#: Largest distance in pixels of polygons from the outline of a mask.
TOLERANCE = 0.5


class CvatFunction:
    """A detection function as `cvat_sdk.auto_annotation` describes it.

    Args:
        pipeline: The models, with their classes.

    Raises:
        ConfigError: If there are no classes, or the package cvat-sdk is not installed.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._sdk = _import_sdk()
        if pipeline.vocabulary is None:
            raise ConfigError("a function for CVAT needs classes, such as text='red circle, green star'")
        self.pipeline, self.vocabulary = pipeline, pipeline.vocabulary

    @cached_property
    def spec(self) -> Any:
        """The labels, numbered as the classes."""
        kind = "rectangle" if self.pipeline.segmenter is None else "mask"
        labels = [self._sdk.label_spec(name, i, type=kind) for i, name in enumerate(self.vocabulary.classes)]
        return self._sdk.DetectionFunctionSpec(labels=labels)

    def detect(self, context: Any, image: Any) -> list[Any]:
        """Return the shapes of an image.

        Args:
            context: CVAT's: the lowest confidence, and whether masks are wanted as polygons.
            image: A PIL image.

        Returns:
            A mask for each object; a polygon for each of its parts if polygons are wanted, in one group; or rectangles.
        """
        floor = context.conf_threshold
        options: Any = {}
        if floor is not None:  # the only threshold then
            options = {"score": float(floor), "class_score": dict.fromkeys(self.vocabulary.classes, float(floor))}
        found = self.pipeline.segment(image, **options)
        assert found.class_id is not None
        shapes: list[Any] = []
        for i, class_id in enumerate(found.class_id.tolist()):
            if found.mask is None:
                shapes.append(self._sdk.rectangle(class_id, found.xyxy[i].tolist()))
                continue
            mask = np.asarray(found.mask[i], bool)
            if not mask.any():
                continue
            if context.conv_mask_to_poly:
                parts: Sequence[Any] = encode_polygons(mask, TOLERANCE)
                group = {"group": i + 1} if len(parts) > 1 else {}
                shapes += [self._sdk.polygon(class_id, part, **group) for part in parts]
            else:
                from cvat_sdk.masks import encode_mask

                shapes.append(self._sdk.mask(class_id, encode_mask(mask)))
        return shapes


def create(**settings: Any) -> CvatFunction:
    """Make the function; CVAT calls this with the parameters `-p` of its command.

    Args:
        settings: Choices and keys of the config, as `grounded_sam.load` takes them: `preset`, `text`, `device`...; dots
            of keys are two underscores, as in `select__score`.

    Raises:
        ConfigError: If a key or choice is unknown, or there are no classes.
        CheckpointError: If weights are missing.
    """
    _import_sdk()  # before weights are loaded
    choices = {key: value for key, value in settings.items() if "__" not in key}
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items() if "__" in key]
    return CvatFunction(load(*overrides, **choices))


def _import_sdk() -> Any:
    """Return CVAT's module of auto-annotation."""
    try:
        import cvat_sdk.auto_annotation
    except ImportError as error:
        raise ConfigError("functions for CVAT need its SDK: pip install cvat-sdk") from error
    return cvat_sdk.auto_annotation
