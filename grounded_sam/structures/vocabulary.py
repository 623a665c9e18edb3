"""What the user asks for: classes, the phrases that mean each, and look-alikes to leave out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grounded_sam.errors import VocabularyError
from grounded_sam.structures.ontology import (
    coco_categories,
    parse_phrases,
    parse_text,
    read_ontology,
)


@dataclass(frozen=True)
class Vocabulary:
    """Classes in the user's order; the place of a class is its `class_id`.

    Attributes:
        classes: class names, as the user wrote them.
        phrases: for each class the phrases that mean it, at least one.
        negatives: phrases that compete with the classes and whose detections are dropped.
        ids: for each class its id in the user's own taxonomy, as COCO files carry them; empty for 1, 2, 3...
        scores: for each class its least confidence, None for `select.score`; or empty.
        colours: for each class its colour, `#rrggbb` or None; or empty.
        supercategories: for each class what COCO calls so, or None; or empty.
        asked: whether a detector is asked for it. Names of labels that exist may share phrases.

    Raises:
        VocabularyError: without classes, with an empty phrase, with one id for two classes, or if one
            phrase stands for two classes, or for a class and a negative (compared without case and outer
            punctuation).
    """

    classes: tuple[str, ...]
    phrases: tuple[tuple[str, ...], ...]
    negatives: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    scores: tuple[float | None, ...] = ()
    colours: tuple[str | None, ...] = ()
    supercategories: tuple[str | None, ...] = ()
    asked: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.classes:
            raise VocabularyError("text names no class; give at least one, e.g. text=[car, wheel]")
        if len(self.classes) != len(self.phrases):
            raise VocabularyError(f"expected phrases for each of {len(self.classes)} classes, got {len(self.phrases)}")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise VocabularyError(f"class {twice!r} is named twice")
        taken: dict[int, str] = {}
        for name, number in zip(self.classes, self.ids, strict=False):
            if taken.setdefault(number, name) != name:
                raise VocabularyError(f"classes {taken[number]!r} and {name!r} have the same id {number}")
        owner: dict[str, str] = {}
        named = list(zip(self.classes, self.phrases, strict=True))
        for name, phrases in [*named, *((f"negative {n!r}", (n,)) for n in self.negatives)]:
            if not phrases:
                raise VocabularyError(f"class {name!r} has no phrase")
            for phrase in phrases:
                key = _key(phrase)
                if not key:
                    raise VocabularyError(f"class {name!r} has a phrase without letters: {phrase!r}")
                if owner.setdefault(key, name) != name and self.asked:
                    raise VocabularyError(f"phrase {phrase!r} stands for both {owner[key]!r} and {name!r}")

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """For each class the id that files of categories give it."""
        return self.ids or tuple(range(1, len(self.classes) + 1))

    @property
    def class_score(self) -> dict[str, float]:
        """Least confidence by class, of those that have one of their own."""
        return {name: score for name, score in zip(self.classes, self.scores, strict=False) if score is not None}

    def categories(self) -> list[dict[str, Any]]:
        """The classes as COCO's `categories`."""
        above = self.supercategories or (None,) * len(self)
        return [
            {"id": number, "name": name} | ({} if group is None else {"supercategory": group})
            for number, name, group in zip(self.category_ids, self.classes, above, strict=True)
        ]

    def palette(self) -> list[str]:
        """For each class a colour, `#rrggbb`: its own, or the next of supervision's."""
        import supervision as sv

        own = self.colours or (None,) * len(self)
        return [colour or sv.ColorPalette.DEFAULT.by_idx(i).as_hex() for i, colour in enumerate(own)]

    def with_classes(self, names: Sequence[str]) -> Vocabulary:
        """The same with more classes at the end, to name results with; those that are there already stay."""
        return self.joined(Vocabulary(tuple(names), tuple((name,) for name in names), asked=False)) if names else self

    def joined(self, other: Vocabulary) -> Vocabulary:
        """The classes of both, to name results with; of a class in both what `self` says counts.

        Ids are kept; where only one of the two has ids, or one id stands for two classes, the other class
        gets a free one.
        """
        new = [i for i, name in enumerate(other.classes) if name not in self.classes]
        if not new:
            return self
        ids = list(self.ids or (self.category_ids if other.ids else ()))
        for i in new if ids else ():
            number = other.ids[i] if other.ids else None
            ids.append(number if number is not None and number not in ids else max(ids) + 1)
        columns: dict[str, Any] = {}
        for key in ("scores", "colours", "supercategories"):
            mine, theirs = getattr(self, key), getattr(other, key)
            whole = [*(mine or [None] * len(self)), *((theirs[i] if theirs else None) for i in new)]
            columns[key] = tuple(whole) if any(value is not None for value in whole) else ()
        return replace(
            self,
            classes=(*self.classes, *(other.classes[i] for i in new)),
            phrases=(*self.phrases, *(other.phrases[i] for i in new)),
            ids=tuple(ids),
            asked=False,
            **columns,
        )

    def phrased(self, phrasing: str) -> Vocabulary:
        """The same classes, each phrase put as `phrasing` says: `a photo of a {}`.

        Raises:
            VocabularyError: if it has not exactly one `{}`.
        """
        if phrasing.count("{}") != 1:
            raise VocabularyError(f"phrasing must have one {{}} where the phrase goes, got {phrasing!r}")
        if phrasing == "{}":
            return self
        put = tuple(tuple(phrasing.replace("{}", phrase) for phrase in phrases) for phrases in self.phrases)
        return replace(self, phrases=put, negatives=tuple(phrasing.replace("{}", n) for n in self.negatives))

    @classmethod
    def of_categories(cls, categories: Sequence[Any], where: str) -> Vocabulary:
        """The names and ids of COCO `categories`, to name labels with.

        Raises:
            VocabularyError: if one has no id or name, or two have the same.
        """
        named = coco_categories(categories, where)["classes"]
        above = tuple(item.get("supercategory") for item in named)
        return cls(
            classes=tuple(str(item["name"]) for item in named),
            phrases=tuple((str(item["name"]),) for item in named),
            ids=tuple(item["id"] for item in named),
            supercategories=above if any(above) else (),
            asked=False,
        )

    @classmethod
    def parse(cls, text: Any, negative: Any = ()) -> Vocabulary:
        """Read a vocabulary from whatever a user may write.

        Args:
            text: a list of classes; a mapping from class to phrase or phrases; one string, where
                commas, semicolons, line ends or full stops part the classes; an ontology, which is a
                mapping with `classes` and maybe `negatives` (see `ontology.schema.json`); the path of a
                YAML, JSON or TXT file (one class a line) that holds one of those, or of a COCO file,
                whose categories are taken with their ids; or a `Vocabulary`.
            negative: phrases to absorb look-alikes, in any of the list forms.

        Raises:
            VocabularyError: if it names nothing, or one thing twice, or the file cannot be read.
        """
        if isinstance(text, Vocabulary):
            return text
        where = "text"
        if isinstance(text, str | Path):
            where = str(text)
            text = parse_text(where)
        if isinstance(text, Mapping) and isinstance(text.get("categories"), Sequence) and "classes" not in text:
            text = coco_categories(text["categories"], where)
        if isinstance(text, Mapping) and "classes" in text:
            ontology = cls(**read_ontology(text, where))
            more = cls.parse(["_"], negative).negatives
            return replace(ontology, negatives=tuple(dict.fromkeys([*ontology.negatives, *more])))
        negatives = tuple(parse_phrases(parse_text(negative) if isinstance(negative, str) else negative, "negative"))
        if isinstance(text, Mapping):
            classes = [(str(name), parse_phrases(value, str(name)) or [str(name)]) for name, value in text.items()]
        elif isinstance(text, Iterable):
            classes = [(name, [name]) for name in dict.fromkeys(parse_phrases(text, "text"))]
        else:
            raise VocabularyError(
                "text must be a list of classes, a string, a mapping from class to phrases or a file; "
                f"got {type(text).__name__}: {text!r}"
            )
        return cls(
            classes=tuple(name for name, _ in classes),
            phrases=tuple(tuple(dict.fromkeys(phrases)) for _, phrases in classes),
            negatives=tuple(dict.fromkeys(negatives)),
        )


def _key(phrase: str) -> str:
    return " ".join(re.sub(r"[^\w]+", " ", phrase).casefold().split())
