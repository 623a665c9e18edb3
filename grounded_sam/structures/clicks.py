"""Manual prompts: points, boxes and masks, each with a class name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_int
from grounded_sam.errors import ConfigError, ImageError, count_of, shorten
from grounded_sam.files import home_path, require_regular
from grounded_sam.media.images import read_image
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.documents import read_json
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.vocabulary import Vocabulary

#: Largest number of a frame or an object, which every reader of JSON has room for.
MAX_NUMBER = 2**53
_KEYS = {"class", "points", "labels", "box", "mask", "image", "frame", "object"}


@dataclass(frozen=True, kw_only=True)
class Click:
    """The prompts of one object.

    Attributes:
        class_name: Class of the object.
        points: `(p, 2) float32`, pixels.
        labels: `(p,) int64`, 1 for a point on the object, 0 for one on the background.
        box: `(4,) float32`, xyxy in pixels.
        mask: Path of a mask image, or a mask `(H, W) bool`.
        image: Name of the image, or the end of it; None for every image.
        frame: Frame number in a video; None for the first frame.
        object: `tracker_id` of the object in a video; None for a new one.
        entries: Positions of its entries in the list.
    """

    class_name: str
    points: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None
    box: NDArray[np.float32] | None = None
    mask: Path | NDArray[np.bool_] | None = None
    image: str | None = None
    frame: int | None = None
    object: int | None = None
    entries: tuple[int, ...] = ()

    def matches(self, frame: Frame) -> bool:
        """Return whether the prompts are for this image, or for every image."""
        return self.image is None or f"/{frame.name}".endswith(f"/{self.image}")

    def is_for(self, index: int, position: int) -> bool:
        """Return whether the prompts are for a frame of a video that they match.

        Args:
            index: Number of the frame.
            position: Its position among the frames that are processed, from 0.
        """
        return position == 0 if self.frame is None and self.image is None else self.frame in (None, index)


def read_click(entry: Any, where: str, folder: Path) -> Click:
    """Read one entry; see `Clicks` for its keys.

    Args:
        entry: The entry.
        where: Name of the entry, for messages.
        folder: Folder against which relative mask paths are resolved.

    Raises:
        ConfigError: If the entry is malformed; the message names it.

    >>> read_click({"class": "cup", "points": [320, 200]}, "clicks[0]", Path()).points.tolist()
    [[320.0, 200.0]]
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected a mapping with class and points, box or mask, got {shorten(entry)}")
    unknown = sorted(str(key) for key in entry if key not in _KEYS)
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; the keys are {', '.join(sorted(_KEYS))}"
        )
    if not entry.get("class"):
        raise ConfigError(f"{where}: class is missing")
    if not any(entry.get(key) is not None for key in ("points", "box", "mask")):
        raise ConfigError(f"{where}: expected points, a box or a mask")
    box = _numbers(entry, "box", (4,), where)
    if box is not None and not (box[0] < box[2] and box[1] < box[3]):
        raise ConfigError(f"{where}: box must have x1 < x2 and y1 < y2, got {shorten(entry['box'])}")
    points, labels = _points(entry, where)
    check_int(f"{where}: frame", entry.get("frame"), 0, MAX_NUMBER, optional=True)
    check_int(f"{where}: object", entry.get("object"), 1, MAX_NUMBER, optional=True)
    return Click(
        class_name=str(entry["class"]).strip(),
        points=points,
        labels=labels,
        box=box,
        mask=_mask(entry.get("mask"), where, folder),
        image=None if entry.get("image") is None else str(entry["image"]),
        frame=entry.get("frame"),
        object=entry.get("object"),
    )


def _numbers(entry: Mapping[str, Any], key: str, shape: tuple[int, ...], where: str) -> NDArray[np.float32] | None:
    """Read numbers of a given shape, where -1 stands for any length; None if the key is absent."""
    if entry.get(key) is None:
        return None
    try:
        values = np.array(entry[key], np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: {key} must be numbers, got {shorten(entry[key])}") from error
    if key == "points" and values.shape == (2,):
        values = values[None]
    fits = values.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, values.shape, strict=True))
    if not fits or not values.size or not np.isfinite(values).all():
        form = {"points": "[[x, y], ...]", "box": "[x1, y1, x2, y2]", "labels": "[1, 0, ...]"}[key]
        raise ConfigError(f"{where}: {key} must be {form}, got {shorten(entry[key])}")
    return values


def _points(entry: Mapping[str, Any], where: str) -> tuple[NDArray[np.float32] | None, NDArray[np.int64] | None]:
    """Read points and their labels."""
    points, labels = _numbers(entry, "points", (-1, 2), where), _numbers(entry, "labels", (-1,), where)
    if points is None:
        if labels is not None:
            raise ConfigError(f"{where}: labels without points")
        return None, None
    labels = np.ones(len(points), np.float32) if labels is None else labels
    if len(labels) != len(points) or not set(labels.tolist()) <= {0, 1}:
        raise ConfigError(
            f"{where}: labels must have one value per point, 1 (on the object) or 0 (background), "
            f"got {shorten(entry.get('labels'))}"
        )
    return points, labels.astype(np.int64)


def _mask(mask: Any, where: str, folder: Path) -> Path | NDArray[np.bool_] | None:
    """Check a mask, and resolve its path."""
    if mask is None:
        return None
    if isinstance(mask, np.ndarray):
        if mask.ndim != 2 or mask.dtype != bool:
            raise ConfigError(f"{where}: mask must be an array (H, W) of bool, got {mask.dtype} of shape {mask.shape}")
        return mask
    path = folder / home_path(str(mask))
    if not path.is_file():
        raise ConfigError(f"{where}: mask {path} does not exist")
    return path


class Clicks:
    """Manual prompts for images, or for objects of a video.

    An entry has `class` (a name) and at least one of

    - `points`: `[[x, y], ...]` in pixels, with `labels`, 1 on the object or 0 on the background (default: all 1);
    - `box`: `[x1, y1, x2, y2]` in pixels;
    - `mask`: an image of the same size that is white on the object, or in Python an array `(H, W) bool`.

    `image` (a name as in the output, or the end of one) restricts an entry to one image. In a video an entry applies
    to frame number `frame` or to `image`, by default to the first frame. `object` is the `tracker_id` of the object: it
    starts a track or, on a later frame, corrects it; by default the object is new.

    Args:
        entries: Entries, or the path of a JSON file with a list of them. Paths of masks are relative to that file.
        key: Name of the setting, for messages.

    Attributes:
        clicks: The entries, parsed.
        vocabulary: Their classes.

    Raises:
        ConfigError: If there are no entries, the file cannot be read, or an entry is malformed.

    >>> Clicks([{"class": "cup", "box": [10, 10, 50, 50]}]).vocabulary.classes
    ('cup',)
    """

    def __init__(self, entries: str | Sequence[Mapping[str, Any]] | None, key: str = "clicks") -> None:
        if not entries:
            raise ConfigError(
                f"{key} is missing: give a JSON file or entries, e.g. '{key}=[{{class: car, points: [[300, 200]]}}]'"
            )
        folder = Path()
        if isinstance(entries, str):
            path = home_path(entries)
            folder, entries = path.parent, read_json_entries(path, key)
        clicks = [read_click(entry, f"{key}[{i}]", folder) for i, entry in enumerate(entries)]
        self.clicks = [replace(click, entries=(i,)) for i, click in enumerate(clicks)]
        self.vocabulary = Vocabulary.parse([click.class_name for click in self.clicks])
        self.key = key
        self._taken: set[int] = set()  # positions of the entries that a frame took
        self._named: set[int] = set()  # of those whose name fits a frame
        self._last_frame: int | None = None  # largest number of a frame of a video
        self._empty: dict[int, str] = {}  # names of the frames in which an entry gave an empty mask, by position
        self._fewer: dict[str, str] = {}  # what happened to the entries of an image with fewer objects, by its name

    def for_image(self, frame: Frame) -> list[Click]:
        """Select the entries that apply to an image; those of one object become one."""
        chosen = [i for i, click in enumerate(self.clicks) if click.matches(frame)]
        self._taken.update(chosen)
        return merge_clicks(self.clicks[i] for i in chosen)

    def for_video_frame(self, frame: Frame, position: int) -> list[Click]:
        """Select the entries that apply to a frame of a video; those of one object become one.

        Args:
            frame: The frame.
            position: Its position among the frames that are processed, from 0.
        """
        named = [i for i, click in enumerate(self.clicks) if click.matches(frame)]
        chosen = [i for i in named if self.clicks[i].is_for(frame.index, position)]
        self._named.update(named)
        self._taken.update(chosen)
        self._last_frame = max(frame.index, self._last_frame or 0)
        return merge_clicks(self.clicks[i] for i in chosen)

    def note_empty(self, clicks: Iterable[Click], frame: Frame) -> None:
        """Note that the masks of some entries are empty in a frame of a video."""
        self._empty |= {i: frame.name for click in clicks for i in click.entries}

    def note_objects(self, frame: Frame, count: int) -> None:
        """Note how many objects the entries gave that an image took."""
        taken = (click for i, click in enumerate(self.clicks) if i in self._taken and click.matches(frame))
        asked = len(merge_clicks(taken))
        if count < asked:
            self._fewer[frame.name] = (
                f"{count_of(asked - count, 'click')} of {asked} gave no object: the mask is empty, or the object is "
                "that of another click; move the click, add points, or draw a box"
            )

    def unused(self) -> list[tuple[str, str]]:
        """Return the entries without effect so far, or the images of such: the name of each, why, and the way out."""
        unused = [
            (f"{self.key}[{i}]", self._why_unused(i, click))
            for i, click in enumerate(self.clicks)
            if i not in self._taken or i in self._empty
        ]
        return unused + list(self._fewer.items())

    def _why_unused(self, i: int, click: Click) -> str:
        """Return why an entry had no effect, and the way out."""
        if i in self._empty:
            return f"the mask of the click is empty in {self._empty[i]}; move it, add points, or draw a box"
        if self._last_frame is None and self.key == "track.clicks":
            return "click not applied: no video was tracked; for images use detector=clicks"
        if click.image is not None and i not in self._named:
            return f"click not applied: no image or frame is named {click.image!r}; names are those in the output"
        if click.frame is not None and self._last_frame is not None and click.frame > self._last_frame:
            return f"click not applied: frame {click.frame} is after the last one, {self._last_frame}"
        return f"click not applied: frame {click.frame} was not processed; see source.start and source.stride"

    def to_detections(self, clicks: Sequence[Click], frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        """Convert entries to detections of a frame, as prompts for a segmenter or tracker.

        Args:
            clicks: Some of the entries.
            frame: The frame that they apply to.
            vocabulary: Classes that `class_id` refers to.

        Returns:
            Detections with confidence 1 and, as columns of `data`, `points` and `labels` and `prompt_mask` (object
            arrays, None where not given) and `prompt_box` (bool). `xyxy` encloses the prompts.

        Raises:
            ConfigError: If the vocabulary lacks a class.
            ImageError: If a prompt lies outside the frame, or a mask has another size.
        """
        unknown = sorted({click.class_name for click in self.clicks} - set(vocabulary.classes))
        if unknown:
            raise ConfigError(
                f"clicks name classes that are not in text: {', '.join(map(repr, unknown))}; "
                f"text has {', '.join(map(repr, vocabulary.classes))}"
            )
        if not clicks:
            return empty_detections(vocabulary)
        columns: dict[str, NDArray[Any]] = {
            key: np.full(len(clicks), None, object) for key in ("points", "labels", "prompt_mask")
        }
        columns["prompt_box"] = np.array([click.box is not None for click in clicks])
        boxes = np.zeros((len(clicks), 4), np.float32)
        for i, click in enumerate(clicks):
            if click.mask is not None:
                mask = _read_mask(click.mask, frame)
                columns["prompt_mask"][i] = mask
                boxes[i] = masks_to_xyxy(mask[None])[0]
            if click.points is not None and click.labels is not None:
                _check_inside(click.points, frame)
                columns["points"][i], columns["labels"][i] = click.points, click.labels
                on = click.points[click.labels == 1] if click.labels.any() else click.points
                boxes[i] = [*on.min(0), *(on.max(0) + 1)]
            if click.box is not None:
                _check_overlaps(click.box, frame)
                boxes[i] = click.box
        ids = [vocabulary.classes.index(click.class_name) for click in clicks]
        return make_detections(boxes, np.ones(len(clicks)), ids, vocabulary, frame.size_hw, **columns)


def merge_clicks(clicks: Iterable[Click]) -> list[Click]:
    """Merge the entries of one frame that name the same object, such as a point on it and one on the background.

    Raises:
        ConfigError: If entries of one object have different classes, two boxes or two masks.

    >>> entries = [{"class": "cup", "points": [[5, 5]], "object": 1}, {"class": "cup", "points": [[9, 9]], "object": 1}]
    >>> [click.points.tolist() for click in merge_clicks(Clicks(entries, "clicks").clicks)]
    [[[5.0, 5.0], [9.0, 9.0]]]
    """
    merged: list[Click] = []
    place: dict[int, int] = {}  # of an object in `merged`
    for click in clicks:
        if click.object is None or click.object not in place:
            if click.object is not None:
                place[click.object] = len(merged)
            merged.append(click)
        else:
            merged[place[click.object]] = _merge(merged[place[click.object]], click)
    return merged


def _merge(first: Click, second: Click) -> Click:
    """Merge two entries of one object."""
    if first.class_name != second.class_name:
        raise ConfigError(f"clicks: object {first.object} is called {first.class_name!r} and {second.class_name!r}")
    for key, values in (("box", (first.box, second.box)), ("mask", (first.mask, second.mask))):
        if all(value is not None for value in values):
            raise ConfigError(f"clicks: object {first.object} has two entries with a {key} in one frame; keep one")
    points = [click.points for click in (first, second) if click.points is not None]
    labels = [click.labels for click in (first, second) if click.labels is not None]
    return replace(
        first,
        entries=first.entries + second.entries,
        points=np.concatenate(points) if points else None,
        labels=np.concatenate(labels) if labels else None,
        box=second.box if first.box is None else first.box,
        mask=second.mask if first.mask is None else first.mask,
    )


def _read_mask(mask: Path | NDArray[np.bool_], frame: Frame) -> NDArray[np.bool_]:
    """Load the mask of an entry, `(H, W) bool`, of the frame's size."""
    height, width = frame.size_hw
    array = mask if isinstance(mask, np.ndarray) else read_image(mask)[..., 0] > 127
    if array.shape != (height, width):
        name = "mask" if isinstance(mask, np.ndarray) else f"mask {mask}"
        raise ImageError(f"{name} is {array.shape[1]}x{array.shape[0]} px, but {frame.name} is {width}x{height} px")
    return array


def _check_inside(points: NDArray[np.float32], frame: Frame) -> None:
    height, width = frame.size_hw
    if (points < 0).any() or (points >= [width, height]).any():
        raise ImageError(f"points {points.tolist()} lie outside {frame.name}, which is {width}x{height} px")


def _check_overlaps(box: NDArray[np.float32], frame: Frame) -> None:
    height, width = frame.size_hw
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        raise ImageError(f"box {box.tolist()} lies outside {frame.name}, which is {width}x{height} px")


def read_json_entries(path: Path, key: str) -> list[Any]:
    """Read a JSON file that holds a list of entries.

    Args:
        path: The file.
        key: Setting that names it, for messages.

    Raises:
        ConfigError: If it cannot be read, or holds no list.
    """
    try:
        require_regular(path)
    except OSError as error:
        raise ConfigError(f"cannot read {key}={path}: {error.strerror}") from error
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ConfigError(f"{key}={path} must hold a list of entries, got {type(entries).__name__}")
    return entries
