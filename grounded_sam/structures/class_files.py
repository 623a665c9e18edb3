"""Read files of class names: YAML, JSON, text with a name per line, and CSV."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grounded_sam.errors import ConfigError, VocabularyError
from grounded_sam.structures import documents
from grounded_sam.structures.documents import check_depth, parse_json, read_text

#: Suffixes of files that are read; `.names` is that of Darknet.
FILE_SUFFIXES = {".yaml", ".yml", ".json", ".txt", ".names", ".csv"}
#: A comment in a file with a name per line: `#1 bolt` and `C#` are names.
_COMMENT = re.compile(r"(^|\s+)#(\s.*)?$")
#: Titles of the column of names in CSV files, and of the column of ids.
_NAME_COLUMNS = ("name", "class", "class_name", "label", "category")
_ID_COLUMNS = ("id", "class_id", "label_id", "category_id")


def read_class_file(path: Path) -> Any:
    """Read a file of classes.

    Args:
        path: The file.

    Returns:
        The list or mapping in a YAML or JSON file; the lines of other files, without comments (`#` and a space). Of a
        CSV file the column of names, as a list, or with a column of ids as a mapping from name to id.

    Raises:
        VocabularyError: If it cannot be read, is not of a kind that has classes, or has a name twice.
    """
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise VocabularyError(
            f"text={path} is a file, but not one of classes ({', '.join(sorted(FILE_SUFFIXES))}); rename it to .txt if "
            f"it has a class per line, or write text=[{path}] to look for a class of this name"
        )
    try:
        content = read_text(path)
    except ConfigError as error:
        raise VocabularyError(f"cannot read the classes in {error}") from error
    if suffix in (".yaml", ".yml", ".json"):
        return _parse_document(content, str(path), suffix)
    if suffix in (".txt", ".names"):
        return [line for raw in content.splitlines() if (line := _COMMENT.sub("", raw).strip())]
    return _read_csv(content, path)


def _parse_document(content: str, where: str, suffix: str) -> Any:
    """Parse a YAML or JSON file, of a COCO file only the categories."""
    try:
        loaded = parse_json(content, where, unique_keys=True) if suffix == ".json" else parse_class_yaml(content, where)
        if isinstance(loaded, Mapping) and "categories" in loaded and "classes" not in loaded:  # a COCO file
            categories, labels = loaded["categories"], loaded.get("annotations")
            is_list = isinstance(categories, list) and isinstance(labels, list | None)
            loaded = {"categories": without_root(categories, labels) if is_list else categories}
        check_depth(loaded, where)
    except ConfigError as error:
        raise VocabularyError(str(error)) from error
    if not isinstance(loaded, list | Mapping):
        raise VocabularyError(f"{where} must hold a list of classes or a mapping from class to phrases")
    return loaded


def without_root(categories: Sequence[Any], annotations: Any) -> list[Any]:
    """Return the `categories` of a COCO file without the root of its taxonomy, which is no class.

    Roboflow's exports have such a category: it has no annotation, and is the `supercategory` of all others.

    Args:
        categories: The categories.
        annotations: The annotations of the file, or None.

    >>> root = {"id": 0, "name": "things", "supercategory": "none"}
    >>> without_root([root, {"id": 1, "name": "bolt", "supercategory": "things"}], [])
    [{'id': 1, 'name': 'bolt', 'supercategory': 'things'}]
    """
    entries = [item for item in categories if isinstance(item, Mapping)]
    used = [a.get("category_id") for a in annotations or () if isinstance(a, Mapping)]
    children = Counter(str(item.get("supercategory")) for item in entries)
    for root in entries:
        name, parent = root.get("name"), root.get("supercategory")
        count = children[str(name)] - (str(parent) == str(name))
        if parent in (None, "", "none", name) and count == len(entries) - 1 > 0:
            return [item for item in categories if item is not root] if root.get("id") not in used else list(categories)
    return list(categories)


def parse_class_yaml(content: str, where: str) -> Any:
    """Parse YAML whose words all stay strings, see `documents.parse_yaml`.

    Raises:
        VocabularyError: If it is not valid YAML, has a key twice, or is too large.
    """
    try:
        return documents.parse_yaml(content, where, only_text=True)
    except ConfigError as error:
        raise VocabularyError(str(error)) from error


def _read_csv(content: str, path: Path) -> list[str] | dict[str, str]:
    """Read the names, and the ids if there are any, of a CSV file with or without titles."""
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(content.splitlines()) if any(row)]
    except csv.Error as error:
        raise VocabularyError(f"{path} is not valid CSV: {error}") from error
    titles = [title.casefold() for title in rows[0]] if rows else []
    name_column = next((titles.index(title) for title in _NAME_COLUMNS if title in titles), None)
    id_column = next((titles.index(title) for title in _ID_COLUMNS if title in titles), None)
    if name_column is not None:
        rows = rows[1:]
    elif all(len(row) == 1 for row in rows):
        name_column = 0
    elif all(len(row) == 2 and row[1].isdecimal() and not row[0].isdecimal() for row in rows):
        name_column, id_column = 0, 1  # as keras-retinanet has them
    elif all(len(row) == 2 and row[0].isdecimal() and not row[1].isdecimal() for row in rows):
        name_column, id_column = 1, 0
    if name_column is None or any(len(row) <= max(name_column, id_column or 0) for row in rows):
        raise VocabularyError(f"{path}: expected a column called name and, if classes have ids, one called id")
    names = [row[name_column] for row in rows]
    if not all(names):
        raise VocabularyError(f"{path}: a class has an empty name")
    if id_column is None:
        return names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise VocabularyError(f"{path}: {twice!r} is a name twice; rename one")
    return {name: row[id_column] for name, row in zip(names, rows, strict=True)}
