"""The command that a user is likely to want next, printed at the end of a run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grounded_sam.config.secrets import VARIABLE
from grounded_sam.output.paths import OutputPath, RemotePath

if TYPE_CHECKING:
    from grounded_sam.pipeline.runner import Summary
    from grounded_sam.structures.protocols import Sink

#: Threshold that is suggested where nothing was found.
LOW_SCORE = "0.1"


def next_step(
    overrides: Sequence[str], summary: Summary, sinks: Sequence[Sink], output: OutputPath, config_dir: str | None = None
) -> str | None:
    """Return a line with what to do next and its command; None if there is nothing to suggest.

    Args:
        overrides: Overrides of the run.
        summary: What the run did.
        sinks: Sinks of the run.
        output: Output folder of the run.
        config_dir: Folder that the run was given with `--config-dir`, whose choices the command needs too.
    """
    from grounded_sam.structures.protocols import Measures, ResultStore

    if any(VARIABLE in override for override in overrides):  # the command would lack a secret
        return None
    flags = [] if config_dir is None else ["--config-dir", config_dir]
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    if summary.interrupted or ({"source", "detector"} & set(given) and not summary.images):
        return None
    if any(isinstance(sink, ResultStore) for sink in sinks):
        to = f"{output.name}-yolo" if isinstance(output, RemotePath) else f"{output}-yolo"
        export = {"source": "stored", "input": str(output), "output": to, "sink": "yolo"}
        return _line("export to another format", export, *flags)
    detects = given.get("source", "images") in ("auto", "images") and "detector" not in given
    if any(isinstance(sink, Measures) for sink in sinks):
        if not detects or summary.frames:
            return None
        changed = {"sweep": "thresholds", "sink": "metrics", "output": f"{output}-sweep"}
        return _line("find the best thresholds", {**_without(given, "select"), **changed}, "-m", *flags)
    if summary.frames or not detects or given.get("output") in ("none", "null"):
        return None
    if not summary.objects:
        if given.get("select.score") == LOW_SCORE:
            return None
        return _line("look for less certain objects", {**given, "select.score": LOW_SCORE}, *flags)
    preset = ["label"] if "preset" not in given else [*given["preset"].strip("[]").split(","), "label"]
    changed = {"preset": f"[{','.join(preset)}]" if len(preset) > 1 else "label", "output": f"{output}-labels"}
    return _line("make a dataset that resumes and exports", {**_without(given, "sink"), **changed}, *flags)


def _without(given: dict[str, str], group: str) -> dict[str, str]:
    """Return overrides without those of a group."""
    return {key: value for key, value in given.items() if key.split(".")[0] != group}


def _line(purpose: str, overrides: dict[str, str], *flags: str) -> str:
    words = ["grounded-sam", *flags, *(f"{key}={value}" for key, value in overrides.items())]
    return f"To {purpose}: {shlex.join(words)}"
