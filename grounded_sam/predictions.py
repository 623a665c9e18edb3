"""Predict once, select many times: what the models of a sweep find is kept for its other jobs.

Jobs of one multirun that differ only in `select.*`, sinks or truth find the same things before anything is
selected. The first that looks at a picture stores all that any of them may want; the others select from that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grounded_sam.select import Select
from grounded_sam.sinks.files import written_whole
from grounded_sam.sinks.store import Store
from grounded_sam.stages import FrameResult
from grounded_sam.store import fingerprint
from grounded_sam.vocabulary import Vocabulary

#: In the folder of a sweep.
PLACE = ".predictions"


def note_floor(sweep: Path, overrides: Sequence[str]) -> None:
    """Write down what the jobs of a sweep ask of `select`, before the first of them begins.

    Args:
        sweep: the folder of the sweep.
        overrides: its words, with their sweeps: `select.score=0.2,0.3`, `select.nms=interval(0.3,0.8)`.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import IntervalSweep

    scores: list[float] = []
    duplicates = shared = False
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, swept = override.key_or_group.lstrip("+"), override.is_sweep_override()
        if key == "select.score" or key.startswith("select.class_score."):
            value = override.value()
            if isinstance(value, IntervalSweep):
                scores.append(float(value.start or 0.0))
            elif swept:
                scores += [float(v) for v in override.sweep_string_iterator()]
            elif isinstance(value, int | float):
                scores.append(float(value))
        duplicates |= swept and key.startswith("select.nms")
        shared |= swept and key.split(".")[0] in ("select", "sink", "truth", "metric")
    with written_whole(sweep / PLACE / "floor.json") as beside:
        beside.write_text(json.dumps({"shared": shared, "score": min(scores, default=None), "nms_varies": duplicates}))


def read_floor(sweep: Path) -> dict[str, Any]:
    """What `note_floor` wrote; empty if it did not."""
    note = sweep / PLACE / "floor.json"
    return json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}


def floor_of(settings: Select, vocabulary: Vocabulary, note: dict[str, Any]) -> Select:
    """The select of the models' run: it leaves whatever any job of the sweep may select.

    Dropping by score and dropping duplicates the same way for all commute with later, stricter scores; numbers
    and areas are left to the jobs, and so are duplicates if the sweep varies how they are told.
    """
    own = [settings.score, *(settings.class_score or {}).values(), *vocabulary.class_score.values()]
    score = min(own if note.get("score") is None else [*own, note["score"]])
    by_mask = settings.nms_by == "mask"
    return replace(
        settings,
        score=score,
        class_score=dict.fromkeys(vocabulary.class_score, score) or None,
        nms=None if by_mask or note.get("nms_varies") else settings.nms,
        nms_by="box",
        top_k=None,
        min_area=0.0,
        max_area=None,
    )


class Predictions:
    """What the models found in pictures, for all jobs of a sweep with the same fingerprint.

    Args:
        sweep: the folder of the sweep.
        vocabulary: of the run.
        settings: all that decides what the models find, without `select`; see `store.fingerprint`.
        select: of the run.
    """

    def __init__(self, sweep: Path, vocabulary: Vocabulary, settings: dict[str, Any], select: Select) -> None:
        self.floor = floor_of(select, vocabulary, read_floor(sweep))
        whole = {**settings, "select": asdict(self.floor)}
        place = sweep / PLACE / fingerprint(whole, vocabulary)[:16]
        self._store = Store(place, vocabulary, whole)
        self.replayed = 0

    def stored(self, name: str, files: list[Path]) -> Iterable[FrameResult] | None:
        """What an earlier job found in a picture of this content; None if none looked at it."""
        found = self._store.stored(name, files)
        self.replayed += found is not None
        return found

    def write(self, result: FrameResult) -> None:
        """Keep what was found in a picture."""
        self._store.write(result)

    def close(self) -> None:
        """Write what is not written yet."""
        self._store.__exit__(None, None, None)
