"""Examples of what to find, or not to find: objects in images, shown instead of named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from grounded_sam.structures.vocabulary import Vocabulary

#: Value of pixels around an object, where its mask is known.
GRAY = 127
#: What is kept around the box of an example, in multiples of its longer side.
CONTEXT = 0.5


@dataclass(frozen=True, eq=False)
class Example:
    """An image of an object.

    Attributes:
        image: RGB, `(H, W, 3) uint8`.
        box: Box of the object, xyxy in pixels, `(4,)`.
        mask: Its mask, `(H, W) bool`; None where it is unknown.
        name: Where it comes from, for messages.
    """

    image: NDArray[np.uint8]
    box: NDArray[np.float64]
    mask: NDArray[np.bool_] | None = None
    name: str = "example"

    def crop(self) -> NDArray[np.uint8]:
        """Return the object, RGB `(h, w, 3) uint8`, with gray around it where its mask is known.

        >>> mask = np.zeros((4, 6), bool)
        >>> mask[1, 1] = True
        >>> example = Example(np.zeros((4, 6, 3), np.uint8), np.array([1, 1, 3, 2]), mask)
        >>> example.crop()[..., 0].tolist()
        [[0, 127]]
        """
        x1, y1, x2, y2 = _pixel_box(self.box, self.image.shape[:2])
        crop = self.image[y1:y2, x1:x2]
        if self.mask is None:
            return np.ascontiguousarray(crop)
        return np.where(self.mask[y1:y2, x1:x2, None], crop, np.uint8(GRAY))

    def with_context(self) -> Example:
        """Return the example with as much of its image as is needed: its box, and half of its longer side around it.

        >>> example = Example(np.zeros((90, 90, 3), np.uint8), np.array([40.0, 40, 50, 60]))
        >>> example.with_context().image.shape, example.with_context().box.tolist()
        ((40, 30, 3), [10.0, 10.0, 20.0, 30.0])
        """
        around = CONTEXT * float(max(self.box[2:] - self.box[:2]))
        x1, y1, x2, y2 = _pixel_box(self.box + np.array([-around, -around, around, around]), self.image.shape[:2])
        mask = None if self.mask is None else self.mask[y1:y2, x1:x2].copy()
        return Example(self.image[y1:y2, x1:x2].copy(), self.box - np.array([x1, y1, x1, y1]), mask, self.name)


@dataclass(frozen=True)
class Examples:
    """The examples of a run.

    Attributes:
        classes: Examples of each class by name, at least one.
        negatives: Examples of look-alikes, which compete with all classes.
    """

    classes: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    negatives: Sequence[Example] = ()

    def unknown_classes(self, vocabulary: Vocabulary) -> list[str]:
        """Return the classes with examples that a vocabulary lacks.

        >>> Examples({"cup": []}).unknown_classes(Vocabulary.parse(["car"]))
        ['cup']
        """
        return [name for name in self.classes if vocabulary.index(name) is None]


def _pixel_box(box: NDArray[np.float64], size_hw: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return whole pixels of a box that overlaps the image, at least one."""
    height, width = size_hw[0], size_hw[1]
    x1 = min(max(math.floor(box[0]), 0), width - 1)
    y1 = min(max(math.floor(box[1]), 0), height - 1)
    return x1, y1, max(x1 + 1, min(math.ceil(box[2]), width)), max(y1 + 1, min(math.ceil(box[3]), height))
