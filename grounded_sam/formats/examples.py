"""Read examples: images, boxes and masks, folders of crops, COCO files, and what people decided about a store.

| entry | examples |
|---|---|
| `cup.jpg`, or an RGB array in Python | the whole image |
| `{image: a.jpg, box: [40, 60, 90, 300]}` | what is in the box (xyxy, pixels) |
| `{image: a.jpg, mask: mask.png}` | what the mask covers; `box` may be given too |
| `examples/cup` | all images of the folder |
| `{coco: instances.json, class: mug}` | the objects of a COCO file |
| `{store: labels, class: mug}` | the objects of a store that somebody accepted, edited or added |

`class` is the name there; without it, that of the class that the entry is for. Of a COCO file, `images` is the folder
of the images; of a store, `status` are other statuses, such as `[predicted, accepted]`. `limit` is how many objects are
taken at most.

Instead of a mapping of classes, a folder with a folder for each class, a COCO file or a store gives all its classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.checks import check_int
from grounded_sam.errors import ConfigError, ImageError, shorten
from grounded_sam.files import home_path
from grounded_sam.formats.coco import CocoFile
from grounded_sam.formats.segmentations import box_problem
from grounded_sam.formats.store import StoreReader, find_store
from grounded_sam.formats.store_schema import STATUSES
from grounded_sam.media.files import image_files, path_ends
from grounded_sam.media.images import read_image
from grounded_sam.structures.examples import Example, Examples
from grounded_sam.structures.masks import masks_to_xyxy, unpack_masks
from grounded_sam.structures.vocabulary import name_key

#: Prefix of the name of a class of look-alikes, as for phrases in `text`.
NEGATIVE = "!"
#: Statuses of objects of a store that are examples, if none are given.
REVIEWED = ("accepted", "edited", "added")
#: Keys of the kinds of entries.
KEYS = {
    "image": {"image", "box", "mask"},
    "coco": {"coco", "class", "images", "limit"},
    "store": {"store", "class", "status", "limit"},
}


def read_example_classes(examples: Any, negatives: Any, where: str) -> Examples:
    """Read the examples of all classes.

    Args:
        examples: Entries by class, those of look-alikes under `!name`; or a path that gives all classes; or None.
        negatives: Entries of look-alikes; None for none.
        where: Key that they come from, for messages, such as `detector.examples`.

    Raises:
        ConfigError: If an entry is malformed, gives no example, or its file cannot be read; the message names it, and
            what is available.
        ImageError: If an image cannot be read.

    >>> crop = np.zeros((8, 6, 3), np.uint8)
    >>> found = read_example_classes({"cup": crop, "!bowl": [crop, crop]}, None, "detector.examples")
    >>> list(found.classes), len(found.negatives)
    (['cup'], 2)
    """
    if isinstance(examples, str | Path):
        examples = _classes_of(home_path(str(examples)), where)
    if examples is not None and not isinstance(examples, Mapping):
        raise ConfigError(
            f"{where} must map classes to examples, or be a folder with a folder for each class, a COCO file or a "
            f"store; got {shorten(examples)}"
        )
    classes: dict[str, list[Example]] = {}
    others: list[Example] = []
    for key, entries in (examples or {}).items():
        name = str(key)
        found = read_examples(entries, f"{where}.{name}", name.removeprefix(NEGATIVE).strip())
        if name.startswith(NEGATIVE):
            others += found
        else:
            classes[name] = found
    if negatives is not None:
        others += read_examples(negatives, where.replace("examples", "negative_examples"))
    if others and not classes:
        raise ConfigError(f"{where} has look-alikes, but no examples of a class that they could be compared with")
    return Examples(classes, others)


def _classes_of(path: Path, where: str) -> dict[str, Any]:
    """Return an entry for each class of a folder of folders, a COCO file or a store."""
    if path.is_file():
        file = _coco_file(path)
        ids = {int(i) for image in file.images for i in file.packed_labels(image).class_id}  # type: ignore[union-attr]
        if not ids:
            raise ConfigError(f"{where}: {path} has no usable object")
        return {name: {"coco": str(path)} for i, name in enumerate(file.vocabulary.classes) if i in ids}
    if not path.is_dir():
        raise ConfigError(f"{where}: no such file or folder: {path}")
    if any(any(folder.glob("_run-*.json")) for folder in (path, path / "store")):
        counts = _reviewed_classes(path)
        if not counts:
            raise ConfigError(f"{where}: nobody has accepted, edited or added an object of {path} yet")
        return {name: {"store": str(path)} for name in counts}
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise ConfigError(f"{where}: {path} has no folders; expected a folder of images for each class, such as cup/")
    return {folder.name: str(folder) for folder in folders}


def _coco_file(path: Path) -> CocoFile:
    """Read a COCO file; the last ones are kept, since each class reads its examples by itself."""
    try:
        state = path.stat()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return _read_coco_file(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _read_coco_file(path: Path, mtime_ns: int, size: int) -> CocoFile:
    return CocoFile(path, allow_mixed=True)


def _reviewed_classes(path: Path) -> Counter[str]:
    """Count the objects of a store that somebody accepted, edited or added, by class."""
    counts: Counter[str] = Counter()
    reader = StoreReader(find_store(path))
    for key in reader.keys():  # noqa: SIM118
        for result in reader.read(key, reader.vocabulary):
            statuses = np.asarray(result.raw.data.get("status", []), dtype=str)
            names = np.asarray(result.raw.data["class_name"], dtype=str)
            counts.update(names[np.isin(statuses, REVIEWED)].tolist() if len(statuses) else [])
    return counts


def read_examples(entries: Any, where: str, name: str = "") -> list[Example]:
    """Read the examples of one class.

    Args:
        entries: One entry or a list of them; see this module.
        where: Key that they come from, for messages.
        name: Name of the class.

    Raises:
        ConfigError: If an entry is malformed or gives no example.
        ImageError: If an image cannot be read.

    >>> read_examples(np.zeros((8, 6, 3), np.uint8), "detector.examples.cup")[0].box.tolist()
    [0.0, 0.0, 6.0, 8.0]
    """
    listed = entries if isinstance(entries, list | tuple) else [entries]
    if entries is None or not len(listed):
        raise ConfigError(f"{where} has no example")
    places = [where if len(listed) == 1 else f"{where}[{i}]" for i in range(len(listed))]
    return [example for entry, at in zip(listed, places, strict=True) for example in _read_entry(entry, at, name)]


def _read_entry(entry: Any, where: str, name: str) -> Iterator[Example]:
    """Yield the examples of one entry."""
    if isinstance(entry, np.ndarray):
        yield _image_example({"image": entry}, where)
        return
    if isinstance(entry, str | Path):
        path = home_path(str(entry))
        if path.is_dir():
            yield from _folder_examples(path, where)
        else:
            yield _image_example({"image": path}, where)
        return
    kind = next((kind for kind in KEYS if isinstance(entry, Mapping) and entry.get(kind) is not None), None)
    if kind is None:
        raise ConfigError(
            f"{where}: expected an image or {{image: ..., box: [x1, y1, x2, y2]}}, {{image: ..., mask: ...}}, a "
            f"folder, {{coco: ...}} or {{store: ...}}, got {shorten(entry)}"
        )
    unknown = sorted(map(str, set(entry) - KEYS[kind]))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(KEYS[kind]))}")
    if kind == "image":
        if entry.get("box") is None and entry.get("mask") is None:
            raise ConfigError(
                f"{where}: expected an image or {{image: ..., box: [x1, y1, x2, y2]}}, got {shorten(entry)}"
            )
        yield _image_example(entry, where)
        return
    limit = entry.get("limit")
    check_int(f"{where}.limit", limit, 1, optional=True)
    wanted = str(entry.get("class") or name)
    found = (_coco_examples if kind == "coco" else _store_examples)(entry, wanted, where)
    for number, example in enumerate(found):
        if limit is not None and number >= limit:
            return
        yield example.with_context()


def _image_example(entry: Mapping[str, Any], where: str) -> Example:
    """Read an image, and the box and mask in it."""
    given, box, mask = entry["image"], entry.get("box"), entry.get("mask")
    image = given if isinstance(given, np.ndarray) else read_image(home_path(str(given)))
    name = where if isinstance(given, np.ndarray) else str(given)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ConfigError(f"{where}: expected an RGB array (H, W, 3) of uint8, got {image.dtype} of {image.shape}")
    height, width = image.shape[:2]
    covered = None
    if mask is not None:
        covered = mask if isinstance(mask, np.ndarray) else read_image(home_path(str(mask))).max(2) > 127
        if covered.shape != (height, width) or not covered.any():
            got = "an empty one" if covered.shape == (height, width) else f"{covered.shape[1]}x{covered.shape[0]} px"
            raise ConfigError(f"{where}: expected a mask of {width}x{height} px as {name} has, got {got}")
        covered = np.asarray(covered, bool)
    if box is None:
        xyxy = np.array([0.0, 0, width, height]) if covered is None else masks_to_xyxy(covered[None])[0]
        return Example(image, np.asarray(xyxy, np.float64), covered, name)
    numbers = list(box) if isinstance(box, list | tuple | np.ndarray) else []
    problem = "no box" if len(numbers) != 4 else box_problem(_to_xywh(numbers), (height, width))
    if problem is not None and not problem.endswith("clipped"):
        if len(numbers) == 4 and all(isinstance(v, int | float) for v in numbers) and "outside" in problem:
            raise ConfigError(f"{where}: the box {numbers} lies outside {name}, which is {width}x{height} px")
        raise ConfigError(f"{where}: expected a box [x1, y1, x2, y2] in {name}, got {shorten(box)}")
    return Example(image, np.array(numbers, np.float64), covered, name)


def _to_xywh(box: Sequence[Any]) -> list[Any]:
    """Convert a box from the config to the form that `box_problem` checks."""
    try:
        x1, y1, x2, y2 = (float(value) for value in box)
    except (TypeError, ValueError):
        return list(box)
    return [x1, y1, x2 - x1, y2 - y1]


def _folder_examples(folder: Path, where: str) -> Iterator[Example]:
    """Yield an example for each image of a folder."""
    files = image_files(sorted(path for path in folder.iterdir() if path.is_file()))
    if not files:
        inside = shorten(sorted(path.name for path in folder.iterdir()))
        raise ConfigError(f"{where}: {folder} has no images; it has {inside}")
    for path in files:
        yield _image_example({"image": path}, where)


def _no_such_class(where: str, source: object, wanted: str, available: Sequence[str]) -> ConfigError:
    return ConfigError(f"{where}: {source} has no class {wanted!r}; it has {', '.join(map(repr, available)) or 'none'}")


def _coco_examples(entry: Mapping[str, Any], wanted: str, where: str) -> Iterator[Example]:
    """Yield the objects of a class in a COCO file."""
    path = home_path(str(entry["coco"]))
    file = _coco_file(path)
    class_id = file.vocabulary.index(wanted)
    if class_id is None:
        raise _no_such_class(where, path, wanted, file.vocabulary.classes)
    folders = [home_path(str(entry["images"]))] if entry.get("images") else [path.parent, path.parent / "images"]
    count = 0
    for image in file.images:
        labels = file.packed_labels(image)
        usable = (labels.class_id == class_id) & ~np.asarray(labels.data.get("ignore", False), bool)
        rows = np.flatnonzero(usable)
        if not len(rows):
            continue
        pixels = _coco_image(image, folders, path, where)
        masks = unpack_masks(labels, pixels.shape[:2]).mask
        for row in rows:
            count += 1
            mask = None if masks is None else masks[row]
            yield Example(pixels, labels.xyxy[row].astype(np.float64), mask, f"{image['file_name']} of {path.name}")
    if not count:
        notes = f"; {file.notes[0].file}: {file.notes[0].reason}" if file.notes else ""
        raise ConfigError(f"{where}: {path} has no usable object of class {wanted!r}{notes}")


def _coco_image(image: Mapping[str, Any], folders: Sequence[Path], labels: Path, where: str) -> NDArray[np.uint8]:
    """Read an image of a COCO file; where none has its name, the beginning of its path is left out."""
    name = str(image["file_name"])
    ends = [name, *(end for end in path_ends(name) if end != name)]
    path = next((folder / end for end in ends for folder in folders if (folder / end).is_file()), None)
    if path is None:
        listed = " or ".join(str(folder) for folder in folders)
        raise ConfigError(f"{where}: {labels} names {name}, which is not in {listed}; set images to its folder")
    pixels = read_image(path)
    if pixels.shape[:2] != (image["height"], image["width"]):
        height, width = pixels.shape[:2]
        raise ConfigError(
            f"{where}: {path} has {width}x{height} px, but {image['width']}x{image['height']} px in {labels.name}"
        )
    return pixels


def _store_examples(entry: Mapping[str, Any], wanted: str, where: str) -> Iterator[Example]:
    """Yield the objects of a class in a store that have one of some statuses."""
    statuses = _read_statuses(entry.get("status"), where)
    folder = find_store(str(entry["store"]))
    reader = StoreReader(folder)
    class_name = next((name for name in reader.vocabulary.classes if name_key(name) == name_key(wanted)), None)
    if class_name is None:
        raise _no_such_class(where, folder, wanted, reader.vocabulary.classes)
    found, counts = 0, Counter[str]()
    for key in reader.keys():  # noqa: SIM118
        for result in reader.read(key, reader.vocabulary):
            own = np.asarray(result.raw.data.get("class_name", []), dtype=str) == class_name
            given = np.asarray(result.raw.data.get("status", []), dtype=str)
            if not own.any():
                continue
            counts.update(given[own].tolist())
            rows = np.flatnonzero(own & np.isin(given, statuses))
            if not len(rows):
                continue
            try:
                pixels = result.frame.image
            except ImageError as error:
                raise ConfigError(f"{where}: {result.frame.name} of {folder}: {error}") from error
            detections = result.detections
            for row in rows:
                found += 1
                mask = None if detections.mask is None else detections.mask[row]
                yield Example(pixels, detections.xyxy[row].astype(np.float64), mask, result.frame.name)
    if not found:
        has = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none"
        raise ConfigError(
            f"{where}: {folder} has no object of class {class_name!r} that is {' or '.join(statuses)}; it has {has}"
        )


def _read_statuses(value: Any, where: str) -> list[str]:
    """Return the statuses that objects of a store may have."""
    statuses = list(REVIEWED) if value is None else [value] if isinstance(value, str) else list(value)
    allowed = [status for status in STATUSES if status != "rejected"]  # of which a store returns no objects
    unknown = [status for status in statuses if status not in allowed]
    if unknown or not statuses:
        raise ConfigError(f"{where}.status must be some of {', '.join(allowed)}, got {shorten(value)}")
    return [str(status) for status in statuses]
