"""What the user asks for: classes, the phrases that mean each, and look-alikes to leave out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from grounded_sam.errors import VocabularyError

# A full stop ends a phrase when a space or the end follows, but not after a lone letter ("U.S. flag").
_STOP = re.compile(r"(?<!\b[^\W\d_])\.(?=\s|$)")


_FILES = {".yaml", ".yml", ".json", ".txt"}


#: What an ontology may say of a class, and its shape; editors check files against it too.
SCHEMA = Path(__file__).with_name("ontology.schema.json")


@cache
def _checker() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _number(value: Any, kind: type) -> Any:
    """A number that a file gave as a word."""
    try:
        return kind(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_ontology(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A mapping with `classes`, each with phrases, id, score, colour and supercategory as it likes.

    Raises:
        VocabularyError: naming the place that does not fit `ontology.schema.json`, and what would.
    """
    from jsonschema.exceptions import best_match
    from PIL import ImageColor

    classes = content["classes"]
    if isinstance(classes, Sequence) and not isinstance(classes, str):
        named = [(item.get("name"), item) if isinstance(item, Mapping) else (item, {}) for item in classes]
        entries = {str(name): {k: v for k, v in entry.items() if k != "name"} for name, entry in named}
        if len(entries) != len(named) or any(name is None for name, _ in named):
            raise VocabularyError(f"{where}: each of the classes needs a name of its own")
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
                entry[key] = _number(entry[key], kind)
        if isinstance(entry.get("phrases"), str):
            entry["phrases"] = [entry["phrases"]]
    negatives = content.get("negatives", [])
    whole = {**content, "classes": entries, "negatives": [negatives] if isinstance(negatives, str) else negatives}
    checker = _checker()
    error = best_match(checker.iter_errors(whole))
    if error is not None:
        place = ".".join(str(part) for part in error.absolute_path) or "the ontology"
        known = error.schema.get("properties") if error.validator == "additionalProperties" else None
        hint = f"; the keys are {', '.join(sorted(known))}" if known else ""
        raise VocabularyError(f"{where}: {place}: {error.message}{hint}")
    ids = [entry.get("id") for entry in entries.values()]
    if any(number is not None for number in ids) and None in ids:
        without = ", ".join(repr(name) for name, entry in entries.items() if "id" not in entry)
        raise VocabularyError(f"{where}: give all classes an id, or none; {without} have none")
    colours = []
    for name, entry in entries.items():
        try:
            rgb = None if entry.get("colour") is None else ImageColor.getrgb(entry["colour"])[:3]
        except ValueError as error_:
            raise VocabularyError(
                f"{where}: classes.{name}.colour: {entry['colour']!r} is no colour; expected #rrggbb or a name"
            ) from error_
        colours.append(None if rgb is None else "#{:02x}{:02x}{:02x}".format(*rgb))

    def column(values: list[Any]) -> tuple[Any, ...]:
        return tuple(values) if any(value is not None for value in values) else ()

    return {
        "classes": tuple(entries),
        "phrases": tuple(
            tuple(dict.fromkeys(parse_phrases(entry.get("phrases"), name))) or (name,)
            for name, entry in entries.items()
        ),
        "negatives": tuple(dict.fromkeys(parse_phrases(whole["negatives"], "negatives"))),
        "ids": column(ids),
        "scores": column([entry.get("score") for entry in entries.values()]),
        "colours": column(colours),
        "supercategories": column([entry.get("supercategory") for entry in entries.values()]),
    }


def coco_categories(categories: Sequence[Any], where: str) -> dict[str, Any]:
    """The categories of a COCO file as an ontology."""
    classes = []
    for item in categories:
        if not isinstance(item, Mapping) or "name" not in item or "id" not in item:
            raise VocabularyError(f"{where}: categories must have an id and a name, got {item!r}")
        classes.append({key: item[key] for key in ("name", "id", "supercategory") if item.get(key) is not None})
    return {"classes": classes}


def parse_phrases(value: Any, where: str) -> list[str]:
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


def parse_text(text: str) -> Any:
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
