"""Prompts by hand instead of text: points, boxes and masks, each with a class name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.structures.frame import Frame

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


def read_json_entries(path: Path, key: str) -> list[Any]:
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
