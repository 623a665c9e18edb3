"""What somebody draws or writes with a smart tool of Label Studio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grounded_sam.errors import ImageError, shorten
from grounded_sam.formats.label_studio import rectangle_in_pixels
from grounded_sam.formats.label_studio_config import LabelingConfig, ObjectTag
from grounded_sam.formats.segmentations import is_number
from grounded_sam.serve.problems import RequestError

#: Results of a context.
MAX_PROMPTS = 1000


@dataclass(frozen=True)
class SmartTool:
    """What a smart tool asks.

    Attributes:
        entries: Prompts, as `structures.clicks.Clicks` takes them: all points together, and each rectangle.
        label: Value of the label that was chosen.
        words: Words that were written.
    """

    entries: list[dict[str, Any]]
    label: str | None
    words: list[str]


def read_context(
    context: Mapping[str, Any], config: LabelingConfig, obj: ObjectTag, size_hw: tuple[int, int]
) -> SmartTool:
    """Read the `context` of a request.

    Args:
        context: Has `result`, the regions that were drawn with the tool and the label.
        config: The labeling config.
        obj: The image.
        size_hw: Its height and width.

    Raises:
        RequestError: If it is malformed, or has regions of another tool (422).
    """
    results = context.get("result")
    if not isinstance(results, list) or len(results) > MAX_PROMPTS or not all(isinstance(r, Mapping) for r in results):
        raise RequestError(422, f"context.result must be a list of at most {MAX_PROMPTS:,} regions")
    points: list[list[float]] = []
    labels: list[int] = []
    boxes: list[list[float]] = []
    words: list[str] = []
    names: list[str] = []
    for result in results:
        kind, value = str(result.get("type", "")).removesuffix("labels"), result.get("value")
        if not isinstance(value, Mapping):
            raise RequestError(422, f"the value of a region must be an object, got {shorten(value)}")
        names += _names(config, result, value)
        if kind == "keypoint":
            points.append(_point(value, size_hw))
            labels.append(0 if result.get("is_positive") is False else 1)
        elif kind == "rectangle":
            boxes.append(_box(value, size_hw))
        elif kind == "textarea":
            words += _split(value.get("text"))
        elif kind:  # `labels` alone belong to a region
            raise RequestError(422, f"smart tools are points, rectangles and words, got {shorten(kind)}")
    label = _label(config, obj, names)
    name = label or "object"
    entries: list[dict[str, Any]] = []
    if 1 in labels:
        together = {"box": boxes.pop()} if len(boxes) == 1 else {}
        entries.append({"class": name, "points": points, "labels": labels, **together})
    entries += [{"class": name, "box": box} for box in boxes]
    return SmartTool(entries, label, words)


def _names(config: LabelingConfig, result: Mapping[str, Any], value: Mapping[str, Any]) -> list[str]:
    """Return the labels of a region, by their values where the control has them."""
    found: list[Any] = []
    for key in (result.get("type"), "labels"):
        given = value.get(key) if isinstance(key, str) else None
        found += given if isinstance(given, list) else []
    names = [name for name in found if isinstance(name, str)]
    control = next((control for control in config.controls if control.name == result.get("from_name")), None)
    tags = [None if control is None else control.find(name) for name in names]
    return [name if tag is None else tag.value for name, tag in zip(names, tags, strict=True)]


def _label(config: LabelingConfig, obj: ObjectTag, names: Sequence[str]) -> str | None:
    """Return the value of the label of some names; where there is none and only one label, that."""
    outputs = config.outputs(obj)
    for name in names:
        for value, (_, label) in outputs.items():
            if name in (value, label.name):
                return value
    if names:
        raise RequestError(422, f"no control takes masks with the label {names[0][:80]!r}; add it to BrushLabels")
    return next(iter(outputs)) if len(outputs) == 1 else None


def _point(value: Mapping[str, Any], size_hw: tuple[int, int]) -> list[float]:
    """Return a point in pixels, inside the image."""
    x: Any = value.get("x")
    y: Any = value.get("y")
    if not is_number(x, -100, 200) or not is_number(y, -100, 200):
        raise RequestError(422, f"a point needs x and y in percent, got {shorten(dict(value))}")
    height, width = size_hw
    return [min(max(x * width / 100, 0.0), width - 1.0), min(max(y * height / 100, 0.0), height - 1.0)]


def _box(value: Mapping[str, Any], size_hw: tuple[int, int]) -> list[float]:
    """Return a box in pixels, inside the image."""
    try:
        x, y, w, h = rectangle_in_pixels(value, size_hw)
    except ImageError as error:
        raise RequestError(422, str(error)) from error
    height, width = size_hw
    box = [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]
    if box[0] >= box[2] or box[1] >= box[3]:
        raise RequestError(422, "a rectangle is outside of the image")
    return box


def words_of_task(config: LabelingConfig, obj: ObjectTag, data: Mapping[str, Any]) -> list[str]:
    """Return the words that a task brings along for a `TextArea` whose `value` names a key of it.

    Args:
        config: The labeling config.
        obj: The image or video.
        data: `data` of the task.
    """
    areas = config.controls_of(obj, ("textarea",))
    words = [word for area in areas if area.words_key is not None for word in _split(data.get(area.words_key))]
    return list(dict.fromkeys(words))


def _split(text: Any) -> list[str]:
    """Return the words of a text, or of a list of texts, separated by commas, semicolons or line ends."""
    texts = [text] if isinstance(text, str) else text if isinstance(text, list) else []
    words = [
        word.strip() for t in texts if isinstance(t, str) for word in t.replace(";", ",").replace("\n", ",").split(",")
    ]
    return list(dict.fromkeys(word for word in words if word))
