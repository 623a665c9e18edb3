"""Prompts by hand instead of text: points, boxes and masks, each with a class name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.detections import empty, make_detections, mask_boxes
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.frames import Frame, read_image
from grounded_sam.vocabulary import Vocabulary

_KEYS = {"class", "points", "labels", "box", "mask", "image", "frame", "object"}


@dataclass(frozen=True)
class Click:
    """One object that a person pointed at."""

    name: str
    points: NDArray[np.float32] | None  # (p, 2)
    labels: NDArray[np.int64] | None  # (p,)
    box: NDArray[np.float32] | None  # (4,)
    mask: Path | NDArray[np.bool_] | None
    image: str | None
    frame: int | None = None
    object: int | None = None

    def holds_for(self, frame: Frame) -> bool:
        """Whether it is for every picture, or names this one."""
        return self.image is None or f"/{frame.name}".endswith(f"/{self.image}")


def read_click(entry: Any, where: str, folder: Path) -> Click:
    """Check one entry; see `Clicks`.

    Raises:
        ConfigError: naming the entry and what is wrong with it.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected a mapping with class and points, box or mask, got {entry!r}")
    unknown = sorted(set(entry) - _KEYS)
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; the keys are {', '.join(sorted(_KEYS))}"
        )
    if not entry.get("class"):
        raise ConfigError(f"{where}: class is missing")
    if not any(entry.get(key) is not None for key in ("points", "box", "mask")):
        raise ConfigError(f"{where}: give points, a box or a mask")

    def numbers(key: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        if entry.get(key) is None:
            return None
        try:
            values = np.array(entry[key], np.float32)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {key} must be numbers, got {entry[key]!r}") from error
        if key == "points" and values.shape == (2,):
            values = values[None]
        fits = values.ndim == len(shape) and all(
            want in (-1, got) for want, got in zip(shape, values.shape, strict=True)
        )
        if not fits or not values.size or not np.isfinite(values).all():
            form = {"points": "[[x, y], ...]", "box": "[x1, y1, x2, y2]", "labels": "[1, 0, ...]"}[key]
            raise ConfigError(f"{where}: {key} must be {form}, got {entry[key]!r}")
        return values

    points, box = numbers("points", (-1, 2)), numbers("box", (4,))
    labels: NDArray[np.float32] | None = numbers("labels", (-1,))
    if box is not None and not (box[0] < box[2] and box[1] < box[3]):
        raise ConfigError(f"{where}: box must have x1 < x2 and y1 < y2, got {entry['box']!r}")
    if points is not None:
        labels = np.ones(len(points), np.float32) if labels is None else labels
        if len(labels) != len(points) or not set(labels.tolist()) <= {0, 1}:
            raise ConfigError(
                f"{where}: labels must be one of 1 (on it) or 0 (beside it) per point, got {entry.get('labels')!r}"
            )
    elif labels is not None:
        raise ConfigError(f"{where}: labels without points")
    mask: Any = entry.get("mask")
    if isinstance(mask, np.ndarray):
        if mask.ndim != 2 or mask.dtype != bool:
            raise ConfigError(f"{where}: mask must be an array (H, W) of bool, got {mask.dtype} of shape {mask.shape}")
    elif mask is not None:
        mask = folder / Path(str(mask)).expanduser()
        if not mask.is_file():
            raise ConfigError(f"{where}: there is no mask {mask}")
    for key, least in (("frame", 0), ("object", 1)):
        value = entry.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{where}: {key} must be a whole number from {least}, got {value!r}")
    return Click(
        name=str(entry["class"]).strip(),
        points=points,
        labels=None if points is None or labels is None else labels.astype(np.int64),
        box=box,
        mask=mask,
        image=None if entry.get("image") is None else str(entry["image"]),
        frame=entry.get("frame"),
        object=entry.get("object"),
    )


class Clicks:
    """A detector that finds what a person pointed at, for a segmenter to cut out.

    Args:
        prompts: a list of entries, or a JSON file of one. An entry has `class` (a name), one or more
            of `points` (`[[x, y], ...]` in pixels, with `labels` 1 on the object or 0 beside it, all 1
            if left out), `box` (`[x1, y1, x2, y2]`) and `mask` (a picture of the image's size, white
            on the object, or in Python an array `(H, W) bool`; a relative path is relative to the JSON
            file), and may have `image` (a name as in the output, or its end); without it the entry holds
            for every picture. In a video an entry holds for its `frame` (number in the video, from 0) or
            its `image`, without either for the first frame; `object` is the id that it begins or, on a
            later frame, corrects, by default a new one.

    Raises:
        ConfigError: if the file cannot be read or an entry is wrong, naming the entry.
    """

    def __init__(self, prompts: str | Sequence[Mapping[str, Any]] | None) -> None:
        if not prompts:
            raise ConfigError(
                "detector.prompts is missing: give a JSON file or entries, "
                "e.g. 'detector.prompts=[{class: car, points: [[300, 200]]}]'"
            )
        folder = Path()
        if isinstance(prompts, str):
            path = Path(prompts).expanduser()
            folder, prompts = path.parent, load_entries(path, "detector.prompts")
        self.clicks = [read_click(entry, f"detector.prompts[{i}]", folder) for i, entry in enumerate(prompts)]
        self.vocabulary = Vocabulary.parse([click.name for click in self.clicks])
        self.ids = sorted({click.object for click in self.clicks if click.object is not None})

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """The clicks of each frame, with confidence 1, as columns that segmenters read.

        Raises:
            ImageError: if a click does not lie in its frame, or a mask is not of its size.
        """
        return [self.prompts(self._named(frame), frame, vocabulary) for frame in frames]

    def _named(self, frame: Frame) -> list[Click]:
        return [click for click in self.clicks if click.holds_for(frame)]

    def on(self, frame: Frame, number: int) -> list[Click]:
        """The clicks that hold for a frame of a video, which is the `number`th that is looked at."""
        return [
            click
            for click in self._named(frame)
            if (number == 0 if click.frame is None and click.image is None else click.frame in (None, frame.index))
        ]

    def prompts(self, here: Sequence[Click], frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        """Some of the clicks as detections of a frame, with confidence 1, as columns that models read.

        Raises:
            ConfigError: if one names a class that the vocabulary has not; ImageError: see `detect`.
        """
        unknown = sorted({click.name for click in self.clicks} - set(vocabulary.classes))
        if unknown:
            raise ConfigError(
                f"clicks name the classes {', '.join(map(repr, unknown))}, which text has not; "
                f"it has {', '.join(map(repr, vocabulary.classes))}"
            )
        if not here:
            return empty(vocabulary)
        height, width = frame.size_hw
        columns: dict[str, NDArray[Any]] = {
            key: np.full(len(here), None, object) for key in ("points", "labels", "prompt_mask")
        }
        columns["prompt_box"] = np.array([click.box is not None for click in here])
        boxes = np.zeros((len(here), 4), np.float32)
        for i, click in enumerate(here):
            if click.mask is not None:
                given = click.mask
                mask = given if isinstance(given, np.ndarray) else read_image(given)[..., 0] > 127
                if mask.shape != (height, width):
                    raise ImageError(
                        f"mask {'' if isinstance(given, np.ndarray) else given} is {mask.shape[1]}x{mask.shape[0]} px, "
                        f"but {frame.name} is {width}x{height} px"
                    )
                columns["prompt_mask"][i] = mask
                boxes[i] = mask_boxes(mask[None])[0]
            if click.points is not None and click.labels is not None:
                if (click.points < 0).any() or (click.points >= [width, height]).any():
                    raise ImageError(
                        f"points {click.points.tolist()} lie outside {frame.name}, which is {width}x{height} px"
                    )
                columns["points"][i], columns["labels"][i] = click.points, click.labels
                on = click.points[click.labels == 1] if click.labels.any() else click.points
                boxes[i] = [*on.min(0), *(on.max(0) + 1)]
            if click.box is not None:
                boxes[i] = click.box
                if click.box[0] >= width or click.box[1] >= height or click.box[2] <= 0 or click.box[3] <= 0:
                    raise ImageError(
                        f"box {click.box.tolist()} lies outside {frame.name}, which is {width}x{height} px"
                    )
        ids = [vocabulary.classes.index(click.name) for click in here]
        return make_detections(boxes, np.ones(len(here)), ids, vocabulary, frame.size_hw, **columns)


def load_entries(path: Path, key: str) -> list[Any]:
    """The entries of a JSON file that `key` names.

    Raises:
        ConfigError: if it cannot be read or holds no list.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {key}={path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{key}={path} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{key}={path} must hold a list of entries, got {type(entries).__name__}")
    return entries
