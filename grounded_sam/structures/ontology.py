"""Read what users write as classes: strings, lists, files, ontologies and the categories of COCO files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from grounded_sam.errors import VocabularyError, shorten
from grounded_sam.files import home_path
from grounded_sam.structures.class_files import FILE_SUFFIXES, parse_class_yaml, read_class_file
from grounded_sam.structures.documents import is_text

#: JSON Schema of ontologies; editors can check files against it too.
SCHEMA = Path(__file__).with_name("ontology.schema.json")
#: Keys that tell YOLO's data.yaml from a mapping with a class called `names`.
_YOLO_KEYS = {"nc", "path", "train", "val", "test"}
# A full stop ends a phrase if a space or the end follows, but not after a single letter ("U.S. flag").
_FULL_STOP = re.compile(r"(?<!\b[^\W\d_])\.(?=\s|$)")
#: Most digits of an id, which fits into 64 bits.
MAX_ID_DIGITS = 18


@dataclass(frozen=True)
class OntologyClass:
    """One class of an ontology.

    Attributes:
        name: Name of the class.
        phrases: Phrases that a detector is queried with, at least one.
        id: Id in the user's own taxonomy.
        score: Lowest confidence, 0 to 1.
        color: `#rrggbb`.
        supercategory: As in COCO.
    """

    name: str
    phrases: tuple[str, ...]
    id: int | None = None
    score: float | None = None
    color: str | None = None
    supercategory: str | None = None


@dataclass(frozen=True)
class Ontology:
    """Classes, and phrases that compete with them.

    Attributes:
        classes: The classes in order.
        negatives: Phrases whose detections are dropped.
        exclusive: Groups of class names, of which an object can be only one each.
    """

    classes: tuple[OntologyClass, ...]
    negatives: tuple[str, ...]
    exclusive: tuple[tuple[str, ...], ...] = ()


def read_ontology(content: Mapping[str, Any], where: str) -> Ontology:
    """Read a mapping with `classes` and, if there are any, `negatives` and `exclusive`; see `ontology.schema.json`.

    Args:
        content: The mapping.
        where: Name of the file or setting, for messages.

    Raises:
        VocabularyError: If it does not match the schema; the message names the key and what is allowed there.

    >>> read_ontology({"classes": {"car": {"id": 3, "colour": "red"}}}, "text").classes[0].color
    '#ff0000'
    """
    entries = _named_entries(content["classes"], where)
    if any(not name.strip() for name in entries):
        raise VocabularyError(f"{where}: a class has an empty name")
    negatives = content.get("negatives", [])
    negatives = [negatives] if isinstance(negatives, str) else negatives
    _check_schema({**content, "classes": entries, "negatives": negatives}, where)
    without_id = [repr(name) for name, entry in entries.items() if "id" not in entry]
    if without_id and len(without_id) < len(entries):
        raise VocabularyError(f"{where}: give all classes an id, or none; there is none for {', '.join(without_id)}")
    classes = tuple(
        OntologyClass(
            name=name,
            phrases=tuple(dict.fromkeys(parse_phrases(entry.get("phrases"), name))) or (name,),
            id=entry.get("id"),
            score=entry.get("score"),
            color=_hex_color(entry.get("colour"), f"{where}: classes.{name}.colour"),
            supercategory=entry.get("supercategory"),
        )
        for name, entry in entries.items()
    )
    groups = tuple(tuple(map(str, group)) for group in content.get("exclusive") or ())
    return Ontology(classes, tuple(dict.fromkeys(parse_phrases(negatives, "negatives"))), groups)


def _named_entries(classes: Any, where: str) -> dict[str, dict[str, Any]]:
    """Convert `classes` in any of its forms to a mapping from class name to entry."""
    if isinstance(classes, Sequence) and not isinstance(classes, str):
        named = [(item.get("name"), item) if isinstance(item, Mapping) else (item, {}) for item in classes]
        entries = {str(name): {k: v for k, v in entry.items() if k != "name"} for name, entry in named}
        if len(entries) != len(named) or any(name is None for name, _ in named):
            raise VocabularyError(f"{where}: every class needs a name, and no two the same")
    elif isinstance(classes, Mapping):
        entries = {
            str(name): dict(entry) if isinstance(entry, Mapping) else {} if entry is None else {"phrases": entry}
            for name, entry in classes.items()
        }
    else:
        raise VocabularyError(f"{where}: classes must be a mapping or a list, got {classes!r}")
    if not entries:
        raise VocabularyError(f"{where} names no class")
    for entry in entries.values():
        for key, kind in (("id", int), ("score", float)):
            if key in entry:
                entry[key] = _to_number(entry[key], kind)
        if isinstance(entry.get("phrases"), str):
            entry["phrases"] = [entry["phrases"]]
    return entries


def _to_number(value: Any, kind: type) -> Any:
    """Convert a number that was read as a string; anything else stays as it is."""
    try:
        return kind(value) if isinstance(value, str) else value
    except ValueError:
        return value


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _check_schema(ontology: Mapping[str, Any], where: str) -> None:
    """Check an ontology against its schema.

    Raises:
        VocabularyError: With the most relevant violation.
    """
    from jsonschema.exceptions import best_match

    error = best_match(_validator().iter_errors(ontology))
    if error is not None:
        key = ".".join(str(part) for part in error.absolute_path) or "the ontology"
        known = error.schema.get("properties") if error.validator == "additionalProperties" else None
        hint = f"; the keys are {', '.join(sorted(known))}" if known else ""
        message = " ".join(error.message.split())[:300]  # it repeats the value, which may be long
        raise VocabularyError(f"{where}: {key}: {message}{hint}")


def _hex_color(color: str | None, where: str) -> str | None:
    """Convert a color to `#rrggbb`."""
    from PIL import ImageColor

    if color is None:
        return None
    try:
        return "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(color)[:3])
    except ValueError as error:
        raise VocabularyError(f"{where}: {color!r} is not a color; expected #rrggbb or a CSS color name") from error


def coco_categories(categories: Sequence[Any], where: str) -> dict[str, Any]:
    """Convert the `categories` of a COCO file to the form of an ontology.

    Args:
        categories: The categories.
        where: Name of the file, for messages.

    Raises:
        VocabularyError: If a category has no name or no integer id.

    >>> coco_categories([{"id": 18, "name": "dog", "color": [0, 0, 0]}], "instances.json")
    {'classes': [{'name': 'dog', 'id': 18}]}
    """
    classes = []
    for item in categories:
        name: Any = item.get("name") if isinstance(item, Mapping) else None
        name = str(name) if isinstance(name, int | float) else name
        if not is_text(name) or not name.strip():
            raise VocabularyError(f"{where}: categories must have an id and a name, got {shorten(item)}")
        number, group = item.get("id"), item.get("supercategory")
        if isinstance(number, str) and number.isdecimal() and len(number) <= MAX_ID_DIGITS:
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int) or abs(number) >= 10**MAX_ID_DIGITS:
            raise VocabularyError(
                f"{where}: categories must have an id and a name, and integer ids, got {shorten(item)}"
            )
        named = {"name": name, "id": number}
        classes.append(named if group is None or not is_text(group) else {**named, "supercategory": group})
    return {"classes": classes}


def numbered_classes(content: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Convert classes with numbers, in a form of YOLO or transformers, to the form of an ontology.

    These are `names` of YOLO's data.yaml (a list, or a mapping from number to name), `id2label` and `label2id` of a
    transformers config, and mappings of the same form without a key above them.

    Args:
        content: The mapping.
        where: Name of the file or setting, for messages.

    Returns:
        The classes in the order of their numbers, which are kept as ids unless they are 0, 1, 2...; None for a mapping
        of another form.

    Raises:
        VocabularyError: If a number is not an integer, or does not match `nc`.

    >>> numbered_classes({"names": {"0": "car", "1": "wheel"}}, "data.yaml")
    {'classes': [{'name': 'car'}, {'name': 'wheel'}]}
    >>> numbered_classes({"wheel": 7, "car": 3}, "label2id.json")
    {'classes': [{'name': 'car', 'id': 3}, {'name': 'wheel', 'id': 7}]}
    """
    names = next((content[key] for key in ("id2label", "label2id") if isinstance(content.get(key), Mapping)), None)
    if names is None and (len(content) == 1 or _YOLO_KEYS & set(content)) and "names" in content:
        names = content["names"]
        if isinstance(names, Mapping) and not all(_is_number(key) for key in names):
            names = None
    names = content if names is None else names
    if isinstance(names, Sequence) and not isinstance(names, str):
        numbered = list(enumerate(names))
    elif isinstance(names, Mapping) and names and all(_is_number(key) for key in names):
        if not all(isinstance(name, str) for name in names.values()):
            return None
        numbered = [(int(key), name) for key, name in names.items()]
    elif isinstance(names, Mapping) and names and all(_is_number(number) for number in names.values()):
        numbered = [(int(number), name) for name, number in names.items()]
    else:
        return None
    if "names" in content and content.get("nc") is not None and str(content["nc"]) != str(len(numbered)):
        raise VocabularyError(f"{where}: nc is {content['nc']}, but there are {len(numbered)} names")
    numbered.sort(key=lambda item: item[0])
    is_plain = [number for number, _ in numbered] == list(range(len(numbered)))
    return {"classes": [{"name": name} if is_plain else {"name": name, "id": number} for number, name in numbered]}


def _is_number(value: Any) -> bool:
    """Return whether a value is an integer of at least 0, or the digits of one."""
    if isinstance(value, str):
        return value.isascii() and value.isdecimal() and len(value) < 10
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_phrases(value: Any, where: str) -> list[str]:
    """Convert a phrase or a list of phrases to a list, without empty ones.

    Args:
        value: A string, a number, a list of them, or None.
        where: Name of the setting, for messages.

    Raises:
        VocabularyError: If it is something else.

    >>> parse_phrases(["car ", "", 7], "text")
    ['car', '7']
    """
    if value is None:
        return []
    if isinstance(value, str | int | float):
        value = [value]
    if not isinstance(value, Sequence):
        raise VocabularyError(f"{where}: expected a phrase or a list of phrases, got {value!r}")
    phrases = []
    for item in value:
        if isinstance(item, Mapping | list | tuple | bool) or item is None:
            hint = " (write it in quotes if it is a word)" if item is None or isinstance(item, bool) else ""
            raise VocabularyError(f"{where}: expected phrases, got {item!r}{hint}")
        phrases.append(phrase := str(item).strip())
        if os.path.splitext(phrase)[1].lower() in FILE_SUFFIXES and os.path.isfile(home_path(phrase)):
            raise VocabularyError(f"{where}: {phrase} is a file, not a phrase; to read its classes write text={phrase}")
    return [phrase for phrase in phrases if phrase]


def parse_text(text: str) -> Any:
    """Split a string into phrases at commas, semicolons and line ends, or else at full stops; or read a file.

    A list or mapping inside quotes, such as `"[car, wheel]"`, is read as YAML.

    Args:
        text: The string, or the path of a file; see `class_files.read_class_file`.

    Returns:
        A list of phrases, or the content of the file.

    Raises:
        VocabularyError: If the file cannot be read, or is not of a kind that has classes.

    >>> parse_text("car . U.S. flag"), parse_text("[car, driver's seat]")
    (['car', 'U.S. flag'], ['car', "driver's seat"])
    """
    path = home_path(text)
    if path.suffix.lower() in FILE_SUFFIXES or os.path.isfile(path):
        return read_class_file(path)
    return parse_inline(text)


def parse_inline(text: str) -> Any:
    """Split a string into phrases as `parse_text` does, but never take it for the path of a file.

    Args:
        text: The string.

    Raises:
        VocabularyError: If it looks like YAML and is not.

    >>> parse_inline("red car, wheel")
    ['red car', 'wheel']
    """
    if text.strip()[:1] + text.strip()[-1:] in ("[]", "{}"):
        return parse_class_yaml(text, "text")
    parts = re.split(r"[,;\n]", text)
    if len(parts) == 1:
        parts = _FULL_STOP.split(text)
    return [stripped for part in parts if (stripped := _FULL_STOP.sub("", part.strip()).strip())]
