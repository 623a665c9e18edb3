"""Lists of objects to review: `review.csv`, which reports write, people fill in, and `grounded-sam-review` imports."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounded_sam.errors import ConfigError, shorten
from grounded_sam.files import atomic_write_text
from grounded_sam.formats.store_edits import Edit
from grounded_sam.formats.store_objects import Row
from grounded_sam.formats.store_rows import StoreRows
from grounded_sam.structures.documents import read_text
from grounded_sam.structures.vocabulary import name_key

#: Columns of `review.csv`.
REVIEW_COLUMNS = ("file", "reason", "object", "class", "score", "mask_score", "detail", "object_id", "status")
#: What may stand in the column `status`, and the action that it means.
_ACTIONS = {"accepted": "accept", "rejected": "reject"}
_SHORT = {
    "accept": "accepted",
    "a": "accepted",
    "yes": "accepted",
    "reject": "rejected",
    "r": "rejected",
    "no": "rejected",
}


@dataclass(frozen=True)
class ReviewLine:
    """A line of a review list that says something about an object.

    Attributes:
        number: Number of the line in the file, from 1.
        object_id: The object.
        status: What somebody decided, or what was there before.
        class_name: Class, changed or not.
        detail: Of a rejected object, what it looks like.
    """

    number: int
    object_id: str
    status: str
    class_name: str
    detail: str


def escape_cell(value: Any) -> Any:
    """Return a value that no spreadsheet takes for a formula: a text that may be one gets an apostrophe in front.

    >>> escape_cell("=1+1"), escape_cell("car"), escape_cell(0.5)
    ("'=1+1", 'car', 0.5)
    """
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r\n'") else value


def write_review_list(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a review list.

    Args:
        path: CSV file.
        rows: Values by column, of `REVIEW_COLUMNS`; those that are missing stay empty.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, REVIEW_COLUMNS)
    writer.writeheader()
    for row in rows:
        writer.writerow({key: escape_cell(value) for key, value in row.items()})
    atomic_write_text(path, text.getvalue().replace("\r\n", "\n"))


def read_review_list(path: Path) -> list[ReviewLine]:
    """Read the lines of a review list that are about objects; lines about images are left out.

    Spreadsheets may have changed the order of columns, the separator (comma, semicolon or tab) or the line ends.

    Args:
        path: CSV file.

    Raises:
        ConfigError: If it cannot be read, or has no column for the object or its status.
    """
    content = read_text(path).removeprefix("\ufeff")
    header = content.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    try:
        rows = list(csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path} is not valid CSV: {error}") from error
    columns = [cell.strip().casefold() for cell in rows[0]] if rows else []
    if missing := [name for name in ("object_id", "status", "class") if name not in columns]:
        raise ConfigError(
            f"{path} has no column {missing[0]}; it must have object_id, status and class, as the review.csv that "
            "sink=report writes beside a store"
        )
    lines = []
    for number, cells in enumerate(rows[1:], 2):
        values = {name: _unescaped(cell.strip()) for name, cell in zip(columns, cells, strict=False)}
        if values.get("object_id") or values.get("status"):
            status = values.get("status", "").casefold()
            lines.append(
                ReviewLine(
                    number=number,
                    object_id=values.get("object_id", ""),
                    status=_SHORT.get(status, status),
                    class_name=values.get("class", ""),
                    detail=values.get("detail", ""),
                )
            )
    return lines


def _unescaped(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" else cell


def edit_of_line(line: ReviewLine, store: StoreRows, new_class: bool) -> Edit | str | None:
    """Return the edit that a line asks for, None if it asks for none, or a message if it cannot be applied.

    Args:
        line: The line.
        store: Rows of the store.
        new_class: Whether a class may be one that the store does not have.
    """
    if not line.object_id:
        return f"status is {shorten(line.status)}, but object_id is empty"
    row = find_object(store, line.object_id)
    if row is None:
        return f"the store has no object {shorten(line.object_id)}"
    if line.status not in ("", "predicted", "accepted", "rejected", "edited", "added"):
        return f"status must be accepted, rejected or empty, got {shorten(line.status)}"
    is_renamed = bool(line.class_name) and name_key(line.class_name) != name_key(row["class"])
    if line.status == "rejected":
        if row["status"] == "rejected" and (not line.detail or line.detail == row["reason"]):
            return None
        looks_like = line.detail or (line.class_name if is_renamed else None)
        return Edit(action="reject", object_id=line.object_id, looks_like=looks_like)
    if is_renamed:
        return Edit(action="relabel", object_id=line.object_id, class_name=line.class_name, new_class=new_class)
    if line.status in ("", row["status"]) or (line.status == "predicted" and row["status"] != "predicted"):
        return None  # a list that was written before the decision takes nothing back
    if line.status in ("edited", "added"):
        return f"status is {line.status}, but the class is the same; write another class, accepted or rejected"
    return Edit(action=_ACTIONS[line.status], object_id=line.object_id)


def find_object(store: StoreRows, object_id: str) -> Row | None:
    """Return the row of an object; None if the store does not have it.

    Args:
        store: Rows of the store.
        object_id: Id of the object.
    """
    for key in store.keys_of_owner(object_id.partition("-")[0]):
        for _, rows in store.rows(key):
            for row in rows:
                if row["object_id"] == object_id:
                    return row
    return None
