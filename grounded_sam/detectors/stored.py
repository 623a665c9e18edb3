"""What a source brings along, instead of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import empty_detections, select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary


class StoredDetector:
    """Hands on what `source=stored` or `source=coco` has of a frame.

    Classes keep their names; one that is a phrase of an asked class becomes that class, and one that is
    not asked for is left out.

    Args:
        masks: keep stored masks; false gives boxes alone, for a segmenter to work on.
    """

    def __init__(self, masks: bool = True) -> None:
        self.masks = masks

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        return [self._found(frame, vocabulary) for frame in frames]

    def _found(self, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        if frame.found is None:
            raise ConfigError("detector=stored needs results that exist: source=stored or source=coco")
        named = {phrase: i for i, phrases in enumerate(vocabulary.phrases) for phrase in phrases}
        named |= {name: i for i, name in enumerate(vocabulary.classes)}
        names = [str(name) for name in frame.found.data.get("class_name", [])]
        found = select_rows(frame.found, np.array([name in named for name in names], bool))
        if not len(found):
            return empty_detections(vocabulary)
        ids = np.array([named[name] for name in names if name in named], np.int64)
        data = {**found.data, "class_name": np.array(vocabulary.classes, dtype=str)[ids]}
        if not self.masks:
            data.pop("mask_score", None)
        return sv.Detections(
            xyxy=found.xyxy,
            mask=found.mask if self.masks else None,
            confidence=found.confidence,
            class_id=ids,
            tracker_id=found.tracker_id,
            data=data,
        )
