"""Boxes and points in the answers of language models; what is neither is refused, with the reason.

Three forms are read:

| form | what the model writes | of |
|---|---|---|
| `boxes` | `[{"bbox_2d": [x1, y1, x2, y2], "label": "cup"}]` | Qwen3-VL, Qwen2.5-VL |
| `points` | `[{"point_2d": [x, y], "label": "cup"}]` | the same |
| `tags` | `<points coords="1 1 344 512 2 701 498">cups</points>`: image, then number, x and y of each point | Molmo 2 |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grounded_sam.errors import shorten

Form = Literal["boxes", "points", "tags"]
#: Key of the numbers in each form of JSON, and how many there are.
KEYS = {"boxes": ("bbox_2d", 4), "points": ("point_2d", 2)}
#: Longest answer that is read, in characters, and the largest number of objects in it.
MAX_CHARACTERS, MAX_OBJECTS = 200_000, 1000
#: By how much of the side a number may lie outside of the image; more is another system of coordinates.
TOLERANCE = 0.01
#: A tag with points, as Molmo 2 writes it (`UnifiedPointFormatter` in its repository), and any attempt at one.
TAG = re.compile(r'<points?\b(?P<before>[^<>]*?)\scoords="(?P<coords>[^"<>]*)"[^<>]*>')
ANY_TAG = re.compile(r"<(?:points?|tracks?)\b")
#: How models say that there is nothing.
NOTHING = re.compile(r"(\s|\[\s*\]|```(json)?|none\.?|(sorry,? )?(there|i see|i do not see|no)\b.*)*", re.I | re.S)


@dataclass(frozen=True)
class WrittenObject:
    """A box or a point as a model wrote it.

    Attributes:
        label: What the model calls it; None if it does not say.
        numbers: A box xyxy, or a point xy, as written.
        start: Position in the answer of the first character of the numbers.
        stop: Position after their last character.
    """

    label: str | None
    numbers: tuple[float, ...]
    start: int
    stop: int


@dataclass
class ParsedAnswer:
    """What was read from an answer.

    Attributes:
        objects: Boxes or points.
        refused: Reason for each part that was refused.
    """

    objects: list[WrittenObject] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def parse_answer(text: str, form: Form, size_wh: tuple[float, float]) -> ParsedAnswer:
    """Read the boxes or points of an answer.

    Text around them is ignored, up to the end of a model's reasoning (`</think>`). Refused is what is not valid JSON,
    has other keys, other numbers than finite ones, too few or too many of them, an empty box, lies outside of the image
    or repeats another object.

    Args:
        text: The answer.
        form: See this module.
        size_wh: Largest x and y that the model may write.

    >>> parse_answer('```json\\n[{"bbox_2d": [10, 20, 30, 40], "label": "cup"}]\\n```', "boxes", (1000, 1000)).objects
    [WrittenObject(label='cup', numbers=(10.0, 20.0, 30.0, 40.0), start=21, stop=37)]
    >>> parse_answer('[{"bbox_2d": [10, 20, 30]}]', "boxes", (1000, 1000)).refused
    ['bbox_2d must be 4 finite numbers, got [10, 20, 30]']
    """
    if len(text) > MAX_CHARACTERS:
        return ParsedAnswer(refused=[f"an answer of {len(text):,} characters; at most {MAX_CHARACTERS:,} are read"])
    first = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
    found = _read_tags(text, first) if form == "tags" else _read_json(text, first, *KEYS[form])
    answer, seen = ParsedAnswer(), set()
    for item in found:
        reason = item if isinstance(item, str) else _reason_to_refuse(item, size_wh)
        if isinstance(item, str) or reason is not None:
            answer.refused.append(str(reason))
        elif (item.label, item.numbers) in seen:
            answer.refused.append(f"written twice: {_describe(item)}")
        elif len(answer.objects) >= MAX_OBJECTS:
            answer.refused.append(f"more than {MAX_OBJECTS:,} objects")
        else:
            seen.add((item.label, item.numbers))
            answer.objects.append(item)
    if not answer.objects and not answer.refused and not NOTHING.fullmatch(text[first : first + 500]):
        answer.refused.append(f"no {form} in the answer {shorten(text[first:].strip())}")
    return answer


def _describe(item: WrittenObject) -> str:
    numbers = ", ".join(f"{number:g}" for number in item.numbers)
    return f"[{numbers}]" + ("" if item.label is None else f" {shorten(item.label)}")


def _reason_to_refuse(item: WrittenObject, size_wh: tuple[float, float]) -> str | None:
    """Return why an object is refused; None if it is not."""
    limits = size_wh * (len(item.numbers) // 2)
    if any(
        not -TOLERANCE * limit <= number <= (1 + TOLERANCE) * limit
        for number, limit in zip(item.numbers, limits, strict=True)
    ):
        return f"outside of 0 to {size_wh[0]:g} and 0 to {size_wh[1]:g}: {_describe(item)}"
    if len(item.numbers) == 4 and not (item.numbers[0] < item.numbers[2] and item.numbers[1] < item.numbers[3]):
        return f"an empty box: {_describe(item)}"
    return None


def _read_json(text: str, first: int, key: str, count: int) -> Iterator[WrittenObject | str]:
    """Yield each object of an answer in JSON, or why it is refused."""
    for start, stop in _outer_braces(text, first):
        part = text[start:stop]
        if not part.endswith("}"):
            yield f"an object without an end: {shorten(part)}"
            continue
        try:
            value = json.loads(part, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError):
            yield f"no valid JSON: {shorten(part)}"
            continue
        numbers, label = value.get(key), value.get("label")
        if key not in value or any(isinstance(inner, dict) for inner in value.values()):
            yield f"an object without {key}: {shorten(part)}"
        elif not isinstance(numbers, list) or len(numbers) != count or not all(map(_is_number, numbers)):
            yield f"{key} must be {count} finite numbers, got {shorten(numbers)}"
        elif label is not None and not isinstance(label, str):
            yield f"label must be text, got {shorten(label)}"
        else:
            place = re.search(rf'"{key}"\s*:\s*(\[[^\]]*\])', part)
            begin, end = place.span(1) if place is not None else (0, len(part))
            yield WrittenObject(label, tuple(map(float, numbers)), start + begin, start + end)


def _outer_braces(text: str, first: int) -> Iterator[tuple[int, int]]:
    """Yield the outermost `{...}` of a text, with the rest of it if one does not end."""
    depth, start, in_string, escaped = 0, first, False, False
    for i in range(first, len(text)):
        character = text[i]
        if escaped:
            escaped = False
        elif in_string:
            escaped, in_string = character == "\\", character != '"'
        elif character == "{":
            start, depth = (i, 1) if depth == 0 else (start, depth + 1)
        elif depth and character == '"':
            in_string = True
        elif depth and character == "}":
            depth -= 1
            if depth == 0:
                yield start, i + 1
    if depth:
        yield start, len(text)


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of the pairs of an object, which may have no key twice."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _read_tags(text: str, first: int) -> Iterator[WrittenObject | str]:
    """Yield each point of the tags of an answer, or why a tag is refused."""
    read = 0
    for tag in TAG.finditer(text, first):
        read += 1
        words = [(match[0], match.start(), match.end()) for match in re.finditer(r"\S+", tag["coords"])]
        valid = all(re.fullmatch(r"\d{1,4}", word) for word, _, _ in words)
        if not valid or len(words) % 3 != 1 or words[0][0] != "1":
            yield f"coords must be 1, then number, x and y of each point, got {shorten(tag['coords'])}"
            continue
        place = tag.start("coords")
        for i in range(1, len(words), 3):
            (x, start, _), (y, _, stop) = words[i + 1], words[i + 2]
            yield WrittenObject(None, (float(x), float(y)), place + start, place + stop)
    attempts = len(ANY_TAG.findall(text, first))
    if attempts > read:
        yield f"{attempts - read} of {attempts} tags without points that can be read"


def span_score(
    text: str, item: WrittenObject, token_stops: Sequence[int], log_probability: Callable[[int], float]
) -> float:
    """Return the geometric mean of the probabilities of the tokens that write the digits of an object.

    Args:
        text: The answer.
        item: An object in it.
        token_stops: Position in the answer after each token.
        log_probability: Function from the index of a token to the logarithm of its probability.

    Returns:
        Score, 0 to 1.

    >>> item = WrittenObject(None, (1.0, 2.0), 0, 6)
    >>> round(span_score("[1, 2]", item, [2, 4, 6], lambda token: math.log([0.5, 0.1, 0.5][token])), 3)
    0.5
    """
    logarithms, start = [], 0
    for token, stop in enumerate(token_stops):
        overlap = text[max(start, item.start) : min(stop, item.stop)]
        if any(character.isdigit() for character in overlap):
            logarithms.append(log_probability(token))
        start = stop
    return math.exp(min(0.0, sum(logarithms) / len(logarithms))) if logarithms else 0.0
