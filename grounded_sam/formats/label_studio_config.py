"""Label Studio's labeling config: what a project shows, which regions it takes, and with which labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from grounded_sam.errors import ConfigError
from grounded_sam.formats.label_studio_video import DEFAULT_FPS
from grounded_sam.formats.segmentations import is_number

#: Longest config, in characters.
MAX_CONFIG = 1_000_000
#: Tags that take regions of images with a mask or polygon, and of videos.
MASK_KINDS, PROMPT_KINDS = ("brush", "bitmask", "polygon"), ("keypoint", "rectangle")
_KINDS = (*MASK_KINDS, *PROMPT_KINDS, "videorectangle", "textarea")
_OBJECTS = ("image", "video")


@dataclass(frozen=True)
class LabelTag:
    """A label.

    Attributes:
        value: What the page shows.
        alias: What stands for it in results; None for `value`.
    """

    value: str
    alias: str | None = None

    @property
    def name(self) -> str:
        """What results call it."""
        return self.alias or self.value

    @property
    def phrases(self) -> tuple[str, ...]:
        """Words to look for: those of the alias, separated by commas, else the value.

        >>> LabelTag("vehicle", "car, truck").phrases
        ('car', 'truck')
        """
        words = tuple(dict.fromkeys(word.strip() for word in (self.alias or "").split(",") if word.strip()))
        return words or (self.value,)


@dataclass(frozen=True)
class ControlTag:
    """A tag that takes regions, or words.

    Attributes:
        name: Name, `from_name` in results.
        kind: `brush`, `bitmask`, `polygon`, `rectangle`, `keypoint`, `videorectangle` or `textarea`.
        to_name: Name of the image or video.
        type: `type` of its results, such as `brushlabels`.
        labels: Its labels.
        labels_name: Name of the `Labels` tag that has them; None if they are its own.
        smart_only: Whether its regions are only prompts.
        words_key: Of a `textarea`, the key of a task whose words it begins with.
    """

    name: str
    kind: str
    to_name: str
    type: str
    labels: tuple[LabelTag, ...] = ()
    labels_name: str | None = None
    smart_only: bool = False
    words_key: str | None = None

    def find(self, name: str) -> LabelTag | None:
        """Return the label of a name, or of a value."""
        return next((label for label in self.labels if name in (label.name, label.value)), None)


@dataclass(frozen=True)
class ObjectTag:
    """An `Image` or `Video`.

    Attributes:
        name: Name, `to_name` in results.
        kind: `image` or `video`.
        key: Key of a task with its URL.
        framerate: Of a video, frames a second: a number, or `$` and the key of a task with it.
    """

    name: str
    kind: str
    key: str
    framerate: str = str(DEFAULT_FPS)

    def fps(self, data: Mapping[str, Any]) -> float:
        """Return the frames a second by which the page numbers the frames of a task.

        Args:
            data: `data` of the task.

        >>> ObjectTag("video", "video", "video", "$fps").fps({"fps": 30})
        30.0
        """
        given: Any = data.get(self.framerate[1:]) if self.framerate.startswith("$") else self.framerate
        try:
            value = float(given)
        except (TypeError, ValueError):
            return DEFAULT_FPS
        if not is_number(value, 1e-6, 1e6):
            return DEFAULT_FPS
        return 1 / value if value < 1 else value


@dataclass(frozen=True)
class LabelingConfig:
    """What a project takes.

    Attributes:
        objects: Its images and videos.
        controls: Tags that take regions or words, in their order.
    """

    objects: tuple[ObjectTag, ...]
    controls: tuple[ControlTag, ...]

    def controls_of(self, obj: ObjectTag, kinds: Sequence[str]) -> list[ControlTag]:
        """Return the controls of some kinds that belong to an image or video, in their order."""
        return [control for control in self.controls if control.to_name == obj.name and control.kind in kinds]

    def outputs(self, obj: ObjectTag) -> dict[str, tuple[ControlTag, LabelTag]]:
        """Return where predictions of each label go: to the first control with masks that has it, else to rectangles.

        Args:
            obj: The image or video.

        Returns:
            Control and label by the value of the label.
        """
        kinds = [("videorectangle",)] if obj.kind == "video" else [MASK_KINDS, ("rectangle",)]
        found: dict[str, tuple[ControlTag, LabelTag]] = {}
        for control in (control for group in kinds for control in self.controls_of(obj, group)):
            if not control.smart_only:
                for label in control.labels:
                    found.setdefault(label.value, (control, label))
        return found


def read_labeling_config(xml: str) -> LabelingConfig:
    """Read the labeling config of a project.

    Args:
        xml: The config.

    Raises:
        ConfigError: If it is no XML, or shows neither an image nor a video.

    >>> config = read_labeling_config('<View><Image name="i" value="$image"/><BrushLabels name="b" toName="i">'
    ...                               '<Label value="vehicle" alias="car, truck"/></BrushLabels></View>')
    >>> config.controls[0].type, config.outputs(config.objects[0])["vehicle"][1].phrases
    ('brushlabels', ('car', 'truck'))
    """
    if len(xml) > MAX_CONFIG or re.search(r"<!(DOCTYPE|ENTITY)", xml, re.IGNORECASE):
        raise ConfigError(f"a labeling config must be XML without DOCTYPE, of at most {MAX_CONFIG:,} characters")
    try:
        root = ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError) as error:
        raise ConfigError(f"the labeling config is not XML: {error}") from error
    tags = [
        (element.tag.lower(), _attributes(element), element) for element in root.iter() if isinstance(element.tag, str)
    ]
    objects = tuple(
        ObjectTag(given["name"], tag, given["value"][1:], given.get("framerate", str(DEFAULT_FPS)))
        for tag, given, _ in tags
        if tag in _OBJECTS and given.get("name") and given.get("value", "").startswith("$")
    )
    if not objects:
        raise ConfigError('the labeling config has no Image or Video with a value such as "$image"')
    own = {
        given.get("toname", ""): (given.get("name"), _labels(element))
        for tag, given, element in tags
        if tag == "labels"
    }
    controls = []
    for tag, given, element in tags:
        kind = tag.removesuffix("labels")
        if kind not in _KINDS or not given.get("name") or not given.get("toname"):
            continue
        labels, labels_name = _labels(element), None
        if tag == kind and kind != "textarea":
            name, labels = own.get(given["toname"], (None, ()))
            labels_name = name if kind != "videorectangle" else None  # whose own results have them
        words = given.get("value", "")
        controls.append(
            ControlTag(
                name=given["name"],
                kind=kind,
                to_name=given["toname"],
                type=tag,
                labels=labels,
                labels_name=labels_name,
                smart_only=given.get("smartonly", "").lower() == "true",
                words_key=words[1:] if kind == "textarea" and words.startswith("$") else None,
            )
        )
    return LabelingConfig(objects, tuple(controls))


def _attributes(element: ElementTree.Element) -> dict[str, str]:
    """Return the attributes of a tag by their names in small letters, as Label Studio reads them."""
    return {name.lower(): value for name, value in element.attrib.items()}


def _labels(element: ElementTree.Element) -> tuple[LabelTag, ...]:
    """Return the labels in a tag."""
    given = [_attributes(label) for label in element.iter() if str(label.tag).lower() == "label"]
    return tuple(LabelTag(label["value"], label.get("alias") or None) for label in given if label.get("value"))
