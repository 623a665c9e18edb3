"""What a run is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from grounded_sam.structures.clicks import Clicks
from grounded_sam.structures.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Request:
    """Classes to look for, manual prompts, and the classes that results refer to.

    Attributes:
        classes: Classes of the results; `class_id` is an index into `classes.classes`.
        vocabulary: What the detector is asked for in a video; None where clicks are the only prompts.
        clicks: Manual points, boxes and masks in a video; None without any.

    >>> request = Request.for_classes(Vocabulary.parse(["car"]))
    >>> request.vocabulary is request.classes
    True
    """

    classes: Vocabulary
    vocabulary: Vocabulary | None = None
    clicks: Clicks | None = None

    @classmethod
    def for_classes(cls, classes: Vocabulary) -> Request:
        """Ask the detector for all classes of the results, without clicks."""
        return cls(classes=classes, vocabulary=classes)
