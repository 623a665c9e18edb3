"""The classes of a run, the phrases that a detector is queried with, and look-alikes to leave out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from grounded_sam.errors import VocabularyError
from grounded_sam.files import home_path
from grounded_sam.structures.ontology import (
    Ontology,
    coco_categories,
    numbered_classes,
    parse_phrases,
    parse_text,
    read_ontology,
)

T = TypeVar("T")

#: Colors in which classes are drawn whose names contain one of these words.
NAMED_COLORS = {
    "red": "#dc2828",
    "green": "#28aa3c",
    "blue": "#3250dc",
    "yellow": "#f0d728",
    "orange": "#f58c1e",
    "purple": "#963cbe",
    "pink": "#f582be",
    "brown": "#7d502d",
    "cyan": "#28c8d2",
    "gray": "#8c8c8c",
    "grey": "#8c8c8c",
    "black": "#191919",
    "white": "#f0f0f0",
}


@dataclass(frozen=True)
class Vocabulary:
    """Classes in the user's order; the index of a class is its `class_id`.

    Attributes:
        classes: Class names as the user wrote them, no two the same.
        phrases: Phrases of each class, at least one.
        negatives: Phrases that compete with the classes, whose detections are dropped.
        ids: Id of each class in the user's own taxonomy, which COCO files use; empty for 1, 2, 3...
        scores: Lowest confidence of each class, None for `select.score`; or empty.
        colors: Color of each class, `#rrggbb` or None; or empty.
        supercategories: COCO supercategory of each class, or None; or empty.
        exclusive: Groups of class names; an object can be of only one class of a group. All other classes may overlap.
        queried: Whether a detector is queried with the phrases, which must then be distinct. The classes of labels and
            of results may share phrases.

    Raises:
        VocabularyError: If there are no classes, a phrase has no letters, two classes have the same name or id, or a
            phrase (compared without case and punctuation) belongs to two classes, or to a class and a negative, or a
            group of exclusive classes names others or fewer than two.

    >>> Vocabulary(("vehicle", "dog"), (("car", "truck"), ("dog",))).category_ids
    (1, 2)
    """

    classes: tuple[str, ...]
    phrases: tuple[tuple[str, ...], ...]
    negatives: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    scores: tuple[float | None, ...] = ()
    colors: tuple[str | None, ...] = ()
    supercategories: tuple[str | None, ...] = ()
    exclusive: tuple[tuple[str, ...], ...] = ()
    queried: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.classes:
            raise VocabularyError("text names no class; give at least one, e.g. text=[car, wheel]")
        if len(self.classes) != len(self.phrases):
            raise VocabularyError(f"expected phrases for each of {len(self.classes)} classes, got {len(self.phrases)}")
        if len(set(self.classes)) < len(self.classes):
            duplicate = next(name for name in self.classes if self.classes.count(name) > 1)
            raise VocabularyError(f"class {duplicate!r} is named twice")
        class_of_id: dict[int, str] = {}
        for name, number in zip(self.classes, self.ids, strict=False):
            if class_of_id.setdefault(number, name) != name:
                raise VocabularyError(f"classes {class_of_id[number]!r} and {name!r} have the same id {number}")
        for text in (*self.classes, *(phrase for phrases in self.phrases for phrase in phrases), *self.negatives):
            if any("\ud800" <= char <= "\udfff" for char in text):  # bytes of a command line, or an escape in JSON
                raise VocabularyError(f"{text!r} has bytes that are not UTF-8; write it as text in UTF-8")
        _check_groups(self.exclusive, self.classes)
        _check_phrases(self)

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Id of each class in files with categories."""
        return self.ids or tuple(range(1, len(self.classes) + 1))

    @property
    def class_score(self) -> dict[str, float]:
        """Lowest confidence by class name, of the classes that have their own."""
        return {name: score for name, score in zip(self.classes, self.scores, strict=False) if score is not None}

    @cached_property
    def overlapping(self) -> Vocabulary:
        """The same vocabulary without groups of exclusive classes."""
        return replace(self, exclusive=()) if self.exclusive else self

    def index(self, name: str) -> int | None:
        """Return the index of a class; of one that differs only in case and spacing if none has just this name."""
        return self._indices.get(name, self._indices.get(name_key(name)))

    @cached_property
    def _indices(self) -> dict[str, int]:
        exact = {name: i for i, name in enumerate(self.classes)}
        return {name_key(name): i for name, i in exact.items()} | exact

    def categories(self) -> list[dict[str, Any]]:
        """Return the classes as `categories` of a COCO file.

        >>> Vocabulary.parse(["car"]).categories()
        [{'id': 1, 'name': 'car'}]
        """
        supercategories = self.supercategories or (None,) * len(self)
        return [
            {"id": number, "name": name} | ({} if group is None else {"supercategory": group})
            for number, name, group in zip(self.category_ids, self.classes, supercategories, strict=True)
        ]

    def palette(self) -> list[str]:
        """Return a color for each class, `#rrggbb`.

        It is the class's own; else the one that its name contains, as in `red car`; else one of supervision's default
        palette.

        >>> Vocabulary.parse(["red car"]).palette()
        ['#dc2828']
        """
        default = default_colors()
        return [color or default[i % len(default)] for i, color in enumerate(self._own_colors())]

    @property
    def has_own_colors(self) -> bool:
        """Whether every class has a color of its own, or one in its name, so that no class needs another."""
        return all(self._own_colors())

    def _own_colors(self) -> list[str | None]:
        own = self.colors or (None,) * len(self)
        return [color or _color_in(name) for name, color in zip(self.classes, own, strict=True)]

    def with_classes(self, names: Sequence[str]) -> Vocabulary:
        """Append classes, for naming results; those that exist already are ignored.

        >>> Vocabulary.parse(["car"]).with_classes(["wheel", "car"]).classes
        ('car', 'wheel')
        """
        if not names:
            return self
        return self.merged_with(Vocabulary(tuple(names), tuple((name,) for name in names), queried=False))

    def merged_with(self, other: Vocabulary) -> Vocabulary:
        """Append the classes of another vocabulary, for naming results.

        Properties of a class that both have, if only with other case and spacing, are taken from `self`. Ids are kept;
        where only one of the two has ids, or one id stands for two classes, the other class gets a free one.

        >>> Vocabulary.parse(["car"]).merged_with(Vocabulary.parse(["wheel", "car"])).classes
        ('car', 'wheel')
        """
        new = _new_classes(self, other)
        if not new:
            return self
        ids = list(self.ids or (self.category_ids if other.ids else ()))
        for i in new if ids else ():
            number = other.ids[i] if other.ids else None
            ids.append(number if number is not None and number not in ids else max(ids) + 1)

        def merged(own: tuple[T | None, ...], others: tuple[T | None, ...]) -> tuple[T | None, ...]:
            return _column([*(own or [None] * len(self)), *((others[i] if others else None) for i in new)])

        return replace(
            self,
            classes=(*self.classes, *(other.classes[i] for i in new)),
            phrases=(*self.phrases, *(other.phrases[i] for i in new)),
            ids=tuple(ids),
            scores=merged(self.scores, other.scores),
            colors=merged(self.colors, other.colors),
            supercategories=merged(self.supercategories, other.supercategories),
            exclusive=_merged_groups(self, other, [other.classes[i] for i in new]),
            queried=False,
        )

    def with_prompt_template(self, template: str) -> Vocabulary:
        """Put every phrase into a template, such as `a photo of a {}`; class names stay.

        Raises:
            VocabularyError: If the template does not have exactly one `{}`.

        >>> Vocabulary.parse(["car"]).with_prompt_template("a photo of a {}").phrases
        (('a photo of a car',),)
        """
        if template.count("{}") != 1:
            raise VocabularyError(f"prompt_template must have one {{}} where the phrase goes, got {template!r}")
        if template == "{}":
            return self
        return replace(
            self,
            phrases=tuple(tuple(template.replace("{}", phrase) for phrase in phrases) for phrases in self.phrases),
            negatives=tuple(template.replace("{}", phrase) for phrase in self.negatives),
        )

    @classmethod
    def from_categories(cls, categories: Sequence[Any], where: str) -> Vocabulary:
        """Make a vocabulary of COCO `categories`, for naming labels.

        Args:
            categories: The categories; only id, name and supercategory are used.
            where: Name of the file, for messages.

        Raises:
            VocabularyError: If one has no id or name, or two have the same.
        """
        classes = coco_categories(categories, where)["classes"]
        try:
            return cls(
                classes=tuple(str(item["name"]) for item in classes),
                phrases=tuple((str(item["name"]),) for item in classes),
                ids=tuple(item["id"] for item in classes),
                supercategories=_column([item.get("supercategory") for item in classes]),
                queried=False,
            )
        except VocabularyError as error:
            raise VocabularyError(f"{where}: {error}") from error

    @classmethod
    def parse(cls, text: Any, negative: Any = ()) -> Vocabulary:
        """Read a vocabulary in any form that a user may write.

        Args:
            text: A list of classes; a mapping from class to phrase or phrases; one string, where commas, semicolons,
                line ends or full stops separate the classes; an ontology, which is a mapping with `classes` and
                optionally `negatives` (see `ontology.schema.json`); the path of a YAML, JSON, CSV, TXT or Darknet
                `.names` file (one class per line) that holds one of these, or of a COCO file, whose categories are
                taken with their ids; classes with numbers as in YOLO's data.yaml or a transformers config, see
                `ontology.numbered_classes`; or a `Vocabulary`.
            negative: Phrases for look-alikes, in any of the list forms.

        Raises:
            VocabularyError: If there is no class, two have the same name or phrase, or the file cannot be read.

        >>> Vocabulary.parse({"vehicle": ["car", "truck"], "dog": None}).phrases
        (('car', 'truck'), ('dog',))
        """
        if isinstance(text, Vocabulary):
            return text
        if not isinstance(text, str | Path):
            return _read_classes(text, negative, "text")
        where = str(text)
        content = parse_text(where)
        try:
            return _read_classes(content, negative, where)
        except VocabularyError as error:
            if where in str(error) or not os.path.isfile(home_path(where)):
                raise
            raise VocabularyError(f"{where}: {error}") from error

    @classmethod
    def _from_ontology(cls, ontology: Ontology, negatives: Sequence[str]) -> Vocabulary:
        """Make a vocabulary of an ontology and more negatives."""
        classes = ontology.classes
        return cls(
            classes=tuple(item.name for item in classes),
            phrases=tuple(item.phrases for item in classes),
            negatives=tuple(dict.fromkeys([*ontology.negatives, *negatives])),
            ids=tuple(item.id for item in classes if item.id is not None),
            scores=_column([item.score for item in classes]),
            colors=_column([item.color for item in classes]),
            supercategories=_column([item.supercategory for item in classes]),
            exclusive=ontology.exclusive,
        )


def _read_classes(text: Any, negative: Any, where: str) -> Vocabulary:
    """Read a list or mapping of classes; see `Vocabulary.parse`.

    Args:
        text: The list or mapping.
        negative: Phrases for look-alikes.
        where: Name of the file or setting, for messages.
    """
    if isinstance(text, Mapping) and isinstance(text.get("categories"), Sequence) and "classes" not in text:
        text = coco_categories(text["categories"], where)
    if isinstance(text, list) and text and all(isinstance(item, Mapping) and "name" in item for item in text):
        text = coco_categories(text, where) if all("id" in item for item in text) else {"classes": text}
    if isinstance(text, Mapping) and "classes" not in text:
        text = numbered_classes(text, where) or text
    negatives = parse_phrases(parse_text(negative) if isinstance(negative, str) else negative, "negative")
    if isinstance(text, Mapping) and "classes" in text:
        return Vocabulary._from_ontology(read_ontology(text, where), negatives)
    if isinstance(text, Mapping):
        names = [str(name).strip() for name in text]
        if not all(names):
            raise VocabularyError(f"{where}: a class has an empty name")
        phrases = zip(names, text.values(), strict=True)
        classes = [(name, parse_phrases(value, name) or [name]) for name, value in phrases]
    elif isinstance(text, Iterable):
        classes = [(name, [name]) for name in dict.fromkeys(parse_phrases(text, "text"))]
    else:
        raise VocabularyError(
            "text must be a list of classes, a string, a mapping from class to phrases or a file; "
            f"got {type(text).__name__}: {text!r}"
        )
    return Vocabulary(
        classes=tuple(name for name, _ in classes),
        phrases=tuple(tuple(dict.fromkeys(phrases)) for _, phrases in classes),
        negatives=tuple(dict.fromkeys(negatives)),
    )


def _column(values: Sequence[T | None]) -> tuple[T | None, ...]:
    """Return values of all classes, or an empty tuple if no class has one."""
    return tuple(values) if any(value is not None for value in values) else ()


def _new_classes(words: Vocabulary, other: Vocabulary) -> list[int]:
    """Return the indices of the classes in `other` that `words` lacks.

    Classes that `other` tells apart by case or spacing alone are compared exactly.
    """
    keys = Counter(map(name_key, other.classes))
    return [
        i
        for i, name in enumerate(other.classes)
        if name not in words.classes and (words.index(name) is None or keys[name_key(name)] > 1)
    ]


def _check_phrases(words: Vocabulary) -> None:
    """Check that there are phrases for all classes, and no phrase for two of them."""
    owners: dict[str, str] = {}
    named = list(zip(words.classes, words.phrases, strict=True))
    for name, phrases in [*named, *((f"negative {phrase!r}", (phrase,)) for phrase in words.negatives)]:
        if not phrases:
            raise VocabularyError(f"class {name!r} has no phrase")
        for phrase in phrases:
            key = _normalized(phrase)
            if not key:
                raise VocabularyError(f"class {name!r} has a phrase without letters: {phrase!r}")
            if owners.setdefault(key, name) != name and words.queried:
                raise VocabularyError(f"phrase {phrase!r} belongs to both {owners[key]!r} and {name!r}")


def _check_groups(groups: Sequence[Sequence[str]], classes: Sequence[str]) -> None:
    """Check groups of exclusive classes."""
    for group in groups:
        unknown = [name for name in group if name not in classes]
        if unknown or len(set(group)) < 2:
            problem = f"{unknown[0]!r} is no class" if unknown else "a group needs two or more classes"
            raise VocabularyError(f"exclusive: {problem}, in {list(group)}; the classes are {list(classes)}")


def _merged_groups(words: Vocabulary, other: Vocabulary, new: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of exclusive classes of two vocabularies, under the names that the merged one has.

    Args:
        words: The first vocabulary, whose names are kept.
        other: The second one.
        new: Classes that the first one lacks.
    """
    groups = list(words.exclusive)
    for group in other.exclusive:
        indices = {name: None if name in new else words.index(name) for name in group}
        groups.append(tuple(name if i is None else words.classes[i] for name, i in indices.items()))
    return tuple(dict.fromkeys(groups))


def name_key(name: str) -> str:
    """Return a class name without differences of case and spacing.

    >>> name_key(" Stop  sign")
    'stop sign'
    """
    return " ".join(name.casefold().split())


def default_colors() -> list[str]:
    """Return the default colors of classes, `#rrggbb`, in class order.

    >>> default_colors()[:2]
    ['#a351fb', '#ff4040']
    """
    import supervision as sv

    return [color.as_hex() for color in sv.ColorPalette.DEFAULT.colors]


def _normalized(phrase: str) -> str:
    """Return a phrase without case and punctuation."""
    return " ".join(re.sub(r"[^\w]+", " ", phrase).casefold().split())


def _color_in(name: str) -> str | None:
    """Return the color of the first color word in a class name."""
    return next((NAMED_COLORS[word] for word in _normalized(name).split() if word in NAMED_COLORS), None)
