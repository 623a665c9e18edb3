"""Helpers of the image and video metrics: ratios, the value that a sweep maximizes, and tables."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grounded_sam.errors import ConfigError
from grounded_sam.structures.vocabulary import Vocabulary

#: Metrics that a sweep cannot maximize.
LOWER_IS_BETTER = (
    *("missed", "false", "IDSW", "Frag", "error", "false_per_negative_pair", "false_per_image_without_objects"),
    *("IL_FPR", "IL_FP", "IL_FN"),
)


def precision_recall(matched: int, missed: int, false: int) -> dict[str, Any]:
    """Compute precision, recall and F1.

    Args:
        matched: Detections that match a label.
        missed: Labels without a detection.
        false: Detections without a label.

    Returns:
        `precision`, `recall` and `f1`, -1 where undefined, and the counts.

    >>> precision_recall(3, 1, 0)["recall"]
    0.75
    """
    precision = matched / (matched + false) if matched + false else -1.0
    recall = matched / (matched + missed) if matched + missed else -1.0
    f1 = 2 * matched / (2 * matched + missed + false) if matched + missed + false else -1.0
    return {"matched": matched, "missed": missed, "false": false, "precision": precision, "recall": recall, "f1": f1}


def metric_value(values: Mapping[str, Any], path: str, choices: str) -> float:
    """Look up the metric that a sweep maximizes.

    Args:
        values: Content of `metrics.json`.
        path: Keys joined by dots, such as `segm.AP`; keys may contain dots themselves.
        choices: Which metrics there are, for messages.

    Raises:
        ConfigError: If there is no such number, or a lower one is better.

    >>> metric_value({"segm": {"AP": 0.5}}, "segm.AP", "segm.AP")
    0.5
    """
    value = _lookup(values, path.split("."))
    if not isinstance(value, int | float):
        raise ConfigError(f"there is no metric {path}; choose one of {choices}")
    if path.rpartition(".")[2] in LOWER_IS_BETTER or path.endswith("_decay"):
        raise ConfigError(f"lower is better for {path}, but a sweep maximizes its metric; choose one of {choices}")
    return float(value)


def _lookup(node: Any, parts: Sequence[str]) -> Any:
    """Return the value at a path of keys, each of which may be several parts joined by dots; None if there is none."""
    if not parts:
        return node
    for end in range(len(parts), 0, -1):
        key = ".".join(parts[:end])
        if isinstance(node, Mapping) and key in node:
            return _lookup(node[key], parts[end:])
    return None


def check_classes(requested: Vocabulary, labeled: Vocabulary, path: Path) -> None:
    """Check that the ground truth has all classes of a run.

    Args:
        requested: Classes of the run.
        labeled: Classes of the ground truth.
        path: File or folder of the ground truth, for messages.

    Raises:
        ConfigError: If it lacks one, with the classes of both.
    """
    missing = [name for name in requested.classes if name not in labeled.classes]
    if missing:
        raise ConfigError(
            f"{path} has no class {', '.join(map(repr, missing))}; its classes are "
            f"{', '.join(map(repr, labeled.classes))}; the run requested {', '.join(map(repr, requested.classes))}"
        )


def render_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Render a table as text.

    Args:
        title: Line above the table.
        columns: Names of the columns; all but the first are aligned to the right.
        rows: Cells of each row.
        width: Characters per line.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=width, markup=False).print(table)
    return text.getvalue().rstrip()
