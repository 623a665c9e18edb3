"""Detections provided by the source, in place of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import empty_detections, select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import DetectorTraits
from grounded_sam.structures.vocabulary import Vocabulary, name_key


class StoredDetector:
    """Return the annotations of each frame, as `source=stored`, `source=coco` and `source=tracks` provide them.

    Classes are matched by name; where none has the same, without case and spacing. A class that is a phrase of a
    requested class becomes that class, and one that is not requested is dropped.

    Args:
        masks: Whether to keep stored masks; False returns boxes, for a segmenter.
    """

    def __init__(self, masks: bool = True) -> None:
        self.masks = masks

    @classmethod
    def traits(cls, settings: Mapping[str, Any]) -> DetectorTraits:
        """Declare masks, unless `masks` is false."""
        return DetectorTraits(masks=settings.get("masks", True) is True)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return the annotations of each frame.

        Raises:
            ConfigError: If a frame has none.
        """
        return [self._read(frame, vocabulary) for frame in frames]

    def _read(self, frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        if frame.annotations is None:
            raise ConfigError("detector=stored needs existing detections: source=stored, source=coco or source=tracks")
        class_ids = {phrase: i for i, phrases in enumerate(vocabulary.phrases) for phrase in phrases}
        class_ids |= {name: i for i, name in enumerate(vocabulary.classes)}
        by_key = {name_key(name): i for name, i in class_ids.items()}
        names = [str(name) for name in frame.annotations.data.get("class_name", [])]
        found = [class_ids.get(name, by_key.get(name_key(name), -1)) for name in names]
        detections = select_rows(frame.annotations, np.array([i >= 0 for i in found], bool))
        if not len(detections):
            empty = empty_detections(vocabulary)
            empty.metadata.update(frame.annotations.metadata)
            return empty
        ids = np.array([i for i in found if i >= 0], np.int64)
        data = {**detections.data, "class_name": np.array(vocabulary.classes, dtype=str)[ids]}
        if not self.masks:
            data.pop("mask_score", None)
        return sv.Detections(
            xyxy=detections.xyxy,
            mask=detections.mask if self.masks else None,
            confidence=detections.confidence,
            class_id=ids,
            tracker_id=detections.tracker_id,
            data=data,
            metadata=dict(detections.metadata),
        )
