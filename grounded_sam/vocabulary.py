"""What the user asks for: classes, the phrases that mean each, and look-alikes to leave out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounded_sam.errors import VocabularyError

# A full stop ends a phrase when a space or the end follows, but not after a lone letter ("U.S. flag").
_STOP = re.compile(r"(?<!\b[^\W\d_])\.(?=\s|$)")
_FILES = {".yaml", ".yml", ".json", ".txt"}


@dataclass(frozen=True)
class Vocabulary:
    """Classes in the user's order; the place of a class is its `class_id`.

    Attributes:
        classes: class names, as the user wrote them.
        phrases: for each class the phrases that mean it, at least one.
        negatives: phrases that compete with the classes and whose detections are dropped.

    Raises:
        VocabularyError: without classes, with an empty phrase, or if one phrase stands for two
            classes, or for a class and a negative (compared without case and outer punctuation).
    """

    classes: tuple[str, ...]
    phrases: tuple[tuple[str, ...], ...]
    negatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.classes:
            raise VocabularyError("text names no class; give at least one, e.g. text=[car, wheel]")
        if len(self.classes) != len(self.phrases):
            raise VocabularyError(f"expected phrases for each of {len(self.classes)} classes, got {len(self.phrases)}")
        owner: dict[str, str] = {}
        named = list(zip(self.classes, self.phrases, strict=True))
        for name, phrases in [*named, *((f"negative {n!r}", (n,)) for n in self.negatives)]:
            if not phrases:
                raise VocabularyError(f"class {name!r} has no phrase")
            for phrase in phrases:
                key = _key(phrase)
                if not key:
                    raise VocabularyError(f"class {name!r} has a phrase without letters: {phrase!r}")
                if owner.setdefault(key, name) != name:
                    raise VocabularyError(f"phrase {phrase!r} stands for both {owner[key]!r} and {name!r}")

    def __len__(self) -> int:
        return len(self.classes)

    @classmethod
    def parse(cls, text: Any, negative: Any = ()) -> Vocabulary:
        """Read a vocabulary from whatever a user may write.

        Args:
            text: a list of classes; a mapping from class to phrase or phrases; one string, where
                commas, semicolons, line ends or full stops part the classes; the path of a YAML, JSON
                or TXT file (one class a line) that holds one of those; or a `Vocabulary`.
            negative: phrases to absorb look-alikes, in any of the list forms.

        Raises:
            VocabularyError: if it names nothing, or one thing twice, or the file cannot be read.
        """
        if isinstance(text, Vocabulary):
            return text
        if isinstance(text, str | Path):
            text = _from_string(str(text))
        negatives = tuple(_phrases(_from_string(negative) if isinstance(negative, str) else negative, "negative"))
        if isinstance(text, Mapping):
            classes = [(str(name), _phrases(value, str(name)) or [str(name)]) for name, value in text.items()]
        elif isinstance(text, Iterable):
            classes = [(name, [name]) for name in dict.fromkeys(_phrases(text, "text"))]
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


def _phrases(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str | int | float):
        value = [value]
    if not isinstance(value, Sequence):
        raise VocabularyError(f"{where}: expected a phrase or a list of phrases, got {value!r}")
    phrases = []
    for item in value:
        if isinstance(item, Mapping | list | tuple) or item is None:
            raise VocabularyError(f"{where}: expected phrases, got {item!r}")
        phrases.append(str(item).strip())
    return [phrase for phrase in phrases if phrase]


def _from_string(text: str) -> Any:
    path = Path(text).expanduser()
    if path.suffix.lower() in _FILES:
        return _from_file(path)
    parts = re.split(r"[,;\n]", text)
    if len(parts) == 1:
        parts = _STOP.split(text)
    return [stripped for part in parts if (stripped := _STOP.sub("", part.strip()).strip())]


def _from_file(path: Path) -> Any:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VocabularyError(f"cannot read the classes in {path}: {error}") from error
    if path.suffix.lower() == ".txt":
        return [line for raw in content.splitlines() if (line := raw.split("#")[0].strip())]
    kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        if kind == "JSON":
            loaded = json.loads(content)
        else:
            import yaml

            loaded = yaml.load(content, Loader=yaml.BaseLoader)  # words stay words: no, 2024-01-01, 1e3
    except Exception as error:
        raise VocabularyError(f"{path} is not valid {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, list | Mapping):
        raise VocabularyError(f"{path} must hold a list of classes or a mapping from class to phrases")
    return loaded
