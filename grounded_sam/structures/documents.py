"""Read JSON and YAML files, which may be damaged or made to exhaust memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grounded_sam.errors import ConfigError
from grounded_sam.files import require_regular
from grounded_sam.output.paths import OutputPath, RemotePath

#: Levels of lists and mappings inside each other in a list of classes or a YAML file.
MAX_DEPTH = 50
#: Values in a YAML file, where an alias (`*name`) counts as everything that it stands for.
MAX_VALUES = 1_000_000


def read_json(path: OutputPath, *, unique_keys: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        unique_keys: Refuse a key that comes twice in an object, of which the parser keeps the last.

    Raises:
        ConfigError: If it cannot be read, is not JSON, or is nested too deeply for the parser.
    """
    return parse_json(read_text(path), str(path), unique_keys=unique_keys)


def parse_json(text: str, where: str, *, unique_keys: bool = False) -> Any:
    """Parse JSON; see `read_json`.

    >>> parse_json('{"car": [1]}', "text")
    {'car': [1]}
    """
    hook = (lambda pairs: _unique_keys(pairs, where)) if unique_keys else None
    try:
        return json.loads(text, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {_reason(error)}") from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file; see `parse_yaml`."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str, *, only_text: bool = False) -> Any:
    """Parse YAML, whose aliases are counted before they are expanded.

    Args:
        text: The text.
        where: Name of the file or setting, for messages.
        only_text: Keep all words as text, also `no`, `2024-01-01` and `1e3`.

    Raises:
        ConfigError: If it is not YAML, has a key twice, is nested more than `MAX_DEPTH` levels deep, or has more than
            `MAX_VALUES` values.

    >>> parse_yaml("{car: [no, 1e3]}", "text", only_text=True)
    {'car': ['no', '1e3']}
    """
    import yaml

    try:
        loader: Any = (yaml.BaseLoader if only_text else yaml.SafeLoader)(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _check_nodes(root, where)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {_reason(error)}") from error


def read_text(path: OutputPath) -> str:
    """Read a UTF-8 file, with or without a byte order mark; on this machine or at an address.

    Raises:
        ConfigError: If it cannot be read, is not a file, or not UTF-8.
    """
    try:
        if not isinstance(path, RemotePath):
            require_regular(path)
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({_reason(error)}); save the file as UTF-8") from error


def check_depth(value: Any, where: str) -> None:
    """Check that lists and mappings are nested at most `MAX_DEPTH` levels deep.

    Args:
        value: Content of a JSON file.
        where: Name of the file, for messages.

    Raises:
        ConfigError: If they are nested more deeply.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, list | Mapping)]
        if not containers:
            return
        level = [child for item in containers for child in (item.values() if isinstance(item, Mapping) else item)]
    raise ConfigError(f"{where}: {_TOO_DEEP}")


def is_text(value: Any) -> bool:
    """Return whether a value is text that can be written to a file and name one.

    >>> is_text("größe.png"), is_text("a\\0b"), is_text("\\ud800"), is_text(7)
    (True, False, False, False)
    """
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep, or contains itself"


def _unique_keys(pairs: Sequence[tuple[Any, Any]], where: str) -> dict[Any, Any]:
    """Return pairs as a mapping; raise ConfigError if a key comes twice."""
    names = [str(key) for key, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{where}: the key {twice!r} appears twice; put both under one key, or rename one")
    return dict(pairs)


def _check_nodes(root: Any, where: str) -> None:
    """Check the depth, the keys and the number of values of a YAML document.

    Raises:
        ValueError: If there are too many.
    """
    seen: dict[int, tuple[int, int]] = {}  # number of values and depth, by node

    def measure(node: Any, depth: int) -> tuple[int, int]:
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        if isinstance(node.value, str):
            return 1, 0
        if id(node) not in seen:
            pairs = [item for item in node.value if isinstance(item, tuple) and item[0].value != "<<"]
            _unique_keys([(key.value, None) for key, _ in pairs if isinstance(key.value, str)], where)
            children = [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
            measured = [measure(child, depth + 1) for child in children]
            count, height = 1 + sum(c for c, _ in measured), 1 + max((h for _, h in measured), default=0)
            if count > MAX_VALUES:
                raise ValueError(f"it has more than {MAX_VALUES:,} values when its aliases are expanded")
            if height > MAX_DEPTH:
                raise ValueError(_TOO_DEEP)
            seen[id(node)] = count, height
        return seen[id(node)]

    measure(root, 0)


def _reason(error: Exception) -> str:
    """Return the message of an error as one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:300]
