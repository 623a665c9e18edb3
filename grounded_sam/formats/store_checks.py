"""Check the rows of a part file, which may be damaged or made by something else."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from grounded_sam.errors import shorten
from grounded_sam.formats.store_schema import STATUSES

#: Columns that `table_problem` needs.
CHECKED_COLUMNS = (
    *("kind", "file", "reason", "video", "take", "frame", "time_s", "width", "height", "objects", "class", "score"),
    *("mask_score", "x1", "y1", "x2", "y2", "object_id", "status"),
)
_KINDS = {"image", "object", "skipped", "video", "edit"}


def table_problem(table: pa.Table, classes: Set[str], max_pixels: int) -> str | None:
    """Return why the rows of a part cannot be used; None if they can.

    Args:
        table: The rows, with `CHECKED_COLUMNS`.
        classes: Names of the classes of all runs.
        max_pixels: Largest number of pixels of an image.
    """
    kinds = np.asarray(table["kind"])
    if unknown := set(kinds.tolist()) - _KINDS:
        return f"it has rows of the kind {shorten(unknown.pop())}"
    if table["file"].null_count:
        return "a row has no file name"
    is_object, is_image, is_edit = kinds == "object", kinds == "image", kinds == "edit"
    return (
        _count_problem(table, is_object, is_image)
        or _size_problem(table, is_object | is_image | is_edit, max_pixels)
        or _object_problem(table, is_object | is_edit)
        or _class_problem(table, is_object, classes)
        or _edit_problem(table, is_edit)
        or _text_problem(table, kinds)
    )


def _numbers(table: pa.Table, name: str, rows: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return a column of numbers, NaN where there is none."""
    return np.asarray(table[name].cast(pa.float64(), safe=False).to_numpy(), np.float64)[rows]


def _count_problem(table: pa.Table, is_object: NDArray[np.bool_], is_image: NDArray[np.bool_]) -> str | None:
    """Check that every image is followed by its objects, as many as it says."""
    rows = np.flatnonzero(~is_object)
    if not len(rows):
        return "it has no image" if len(is_object) else None
    if rows[0] != 0:
        return "its first object belongs to no image"
    followers = np.diff([*rows, len(is_object)]) - 1
    expected = np.where(is_image[rows], _numbers(table, "objects", ~is_object), 0)
    wrong = np.flatnonzero(followers != expected)
    if len(wrong):
        name, count = shorten(table["file"][int(rows[wrong[0]])].as_py()), followers[wrong[0]]
        return f"{name} is followed by {count} objects, not by as many as it says"
    files = np.asarray(table["file"])
    if (files[is_object] != np.repeat(files[rows], followers)).any():
        return "an object belongs to another image than the one above it"
    return None


def _size_problem(table: pa.Table, rows: NDArray[np.bool_], max_pixels: int) -> str | None:
    """Check the declared sizes of images."""
    width, height = _numbers(table, "width", rows), _numbers(table, "height", rows)
    if not ((width >= 1) & (height >= 1)).all():
        return "an image has no width or height"
    largest = int((width * height).max(initial=0))
    if largest > max_pixels:
        return f"an image has {largest:,} pixels, more than the {max_pixels:,} allowed (source.max_pixels)"
    return None


def _object_problem(table: pa.Table, rows: NDArray[np.bool_]) -> str | None:
    """Check the numbers of objects."""
    column: dict[str, Any] = {name: _numbers(table, name, rows) for name in ("x1", "y1", "x2", "y2", "width", "height")}
    ordered = (column["x1"] >= 0) & (column["x1"] <= column["x2"]) & (column["x2"] <= column["width"])
    ordered &= (column["y1"] >= 0) & (column["y1"] <= column["y2"]) & (column["y2"] <= column["height"])
    if not ordered.all():
        return "a box is not inside its image"
    score = _numbers(table, "score", rows)
    if not ((score >= 0) & (score <= 1)).all():
        return "a score is not from 0 to 1"
    mask_score = _numbers(table, "mask_score", rows)
    if np.isinf(mask_score).any():
        return "a mask_score is not finite"
    return None


def _class_problem(table: pa.Table, rows: NDArray[np.bool_], classes: Set[str]) -> str | None:
    """Check the classes of objects that runs found."""
    unknown = set(np.asarray(table["class"])[rows].tolist()) - classes
    return f"it has objects of the class {shorten(unknown.pop())}, which no run of the store has" if unknown else None


def _edit_problem(table: pa.Table, rows: NDArray[np.bool_]) -> str | None:
    """Check the ids, statuses and classes of decisions, and the statuses of objects."""
    statuses = np.asarray(table["status"])
    if unknown := set(statuses.tolist()) - {None, *STATUSES}:
        return f"an object has the status {shorten(unknown.pop())}"
    if any(not text for name in ("object_id", "status", "class") for text in np.asarray(table[name])[rows]):
        return "a decision has no object, no status or no class"
    return None


def _text_problem(table: pa.Table, kinds: NDArray[Any]) -> str | None:
    """Check that skipped files have a reason, and frames and videos their names and numbers."""
    if any(text is None for text in np.asarray(table["reason"])[kinds == "skipped"]):
        return "a skipped file has no reason"
    has_video = np.array([video is not None for video in table["video"].to_pylist()], bool)
    if not has_video[kinds == "video"].all():
        return "a video has no name"
    if not (_numbers(table, "frame", has_video) >= 0).all():
        return "a frame has no number"
    if np.isinf(_numbers(table, "time_s", kinds != "skipped")).any():
        return "the time of a frame is not finite"
    return None
