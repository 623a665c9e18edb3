"""Which classes the labels of an image decide on, with the names that LVIS has for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from grounded_sam.errors import shorten
from grounded_sam.structures.results import Skipped

#: Lists of category ids of an image: classes that it does not show, and those of which not all objects are labeled.
ABSENT, INCOMPLETE = "neg_category_ids", "not_exhaustive_category_ids"


@dataclass(frozen=True)
class KnownPhrases:
    """What is known about the classes of an image.

    Attributes:
        listed: Indices of the classes that labels decide on; None for all.
        incomplete: Indices of classes of which not all objects are labeled.
        crowds: Indices of classes of which several objects share a label, or one is ignored.

    >>> known = KnownPhrases(frozenset({1, 2}), crowds=frozenset({2}))
    >>> known.measures(2), known.decides(2), known.measures(0)
    (True, False, False)
    """

    listed: frozenset[int] | None = None
    incomplete: frozenset[int] = frozenset()
    crowds: frozenset[int] = frozenset()

    def measures(self, class_id: int) -> bool:
        """Return whether a detection of a class without a label, or in no crowd, is known to be false."""
        return (self.listed is None or class_id in self.listed) and class_id not in self.incomplete

    def decides(self, class_id: int) -> bool:
        """Return whether each object of a class has its own label, or the class is known to be absent."""
        return self.measures(class_id) and class_id not in self.crowds


def read_known_phrases(
    image: Mapping[str, Any],
    labeled: Collection[int],
    crowds: Collection[int],
    index: Callable[[Any], int | None],
) -> tuple[KnownPhrases, list[Skipped]]:
    """Read the lists of an image.

    Without `neg_category_ids` all classes without a label are absent. With it, the classes in it are absent, and
    nothing is known about classes that have neither a label nor are in it.

    Args:
        image: Entry of `images`.
        labeled: Indices of the classes of its annotations.
        crowds: Indices of the classes of which it has an annotation of a crowd, or one that is ignored.
        index: Finds the index of a category id, None if there is none.

    Returns:
        What is known, and which entries of the lists cannot be used.
    """
    notes: list[Skipped] = []
    lists: dict[str, set[int]] = {}
    for key in (ABSENT, INCOMPLETE):
        entries = image.get(key)
        if not isinstance(entries, list):
            if entries is not None:
                notes.append(_note(image, f"{key} must be a list of category ids, got {shorten(entries)}"))
            entries = []
        indices = {shorten(entry): index(entry) for entry in entries}
        if unknown := [name for name, number in indices.items() if number is None]:
            notes.append(_note(image, f"{key} names categories that do not exist: {', '.join(unknown[:5])}"))
        lists[key] = {number for number in indices.values() if number is not None}
    both = lists[ABSENT] & set(labeled)
    if both:
        notes.append(_note(image, f"{ABSENT} has {len(both)} of the categories that are labeled; they are left out"))
    listed = None
    if isinstance(image.get(ABSENT), list):
        listed = frozenset(lists[ABSENT] | lists[INCOMPLETE] | set(labeled))
    return KnownPhrases(listed, frozenset(lists[INCOMPLETE] | both), frozenset(crowds)), notes


def _note(image: Mapping[str, Any], reason: str) -> Skipped:
    return Skipped(f"image {shorten(image['id'])}", reason)
