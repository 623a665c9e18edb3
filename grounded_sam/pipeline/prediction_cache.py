"""Predict once, select many times: what the models of a sweep find is kept for its other jobs.

Jobs of one multirun that differ only in `select.*`, sinks or truth find the same things before anything is
selected. The first that looks at a picture stores all that any of them may want; the others select from that. Of jobs
that differ in the segmenter, the boxes of the detector are shared in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.files import atomic_write
from grounded_sam.formats.store import fingerprint
from grounded_sam.pipeline.select import Select, select
from grounded_sam.sinks.store import StoreSink
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: Pictures whose predictions are also held in memory, of each of the last two fingerprints; packed, some KB each.
HELD = 20_000
_held: dict[str, dict[Any, Any]] = {}
#: In the folder of a sweep.
PLACE = ".predictions"


def write_sweep_floor(sweep: Path, overrides: Sequence[str]) -> None:
    """Write down what the jobs of a sweep ask of `select`, before the first of them begins.

    Args:
        sweep: the folder of the sweep.
        overrides: its words, with their sweeps: `select.score=0.2,0.3`, `select.nms=interval(0.3,0.8)`.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import IntervalSweep
    from hydra.errors import HydraException

    scores: list[float] = []
    nms: list[float] | str = "own"
    shared = boxes = by_class = False
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, swept = override.key_or_group.lstrip("+"), override.is_sweep_override()
        interval = isinstance(override.value(), IntervalSweep)
        try:
            values = list(override.sweep_string_iterator()) if swept and not interval else [override.value()]
        except HydraException:  # glob() wants to look at the config
            values, nms = [], "any"
        by_class |= key.startswith("select.class_score")
        if key == "select.score" or key.startswith("select.class_score."):
            values = [override.value().start or 0.0] if interval else values
            scores += [float(v) for v in values if _is_share(v)]
        elif key == "select.nms" and swept and nms != "any":
            good = [v for v in values if _is_share(v) or v == "null"]  # others end their job
            nms = "any" if interval or "null" in good or not good else sorted(map(float, good))
        elif key.startswith("select.nms") and swept:
            nms = "any"
        shared |= swept and key.split(".")[0] in ("select", "sink", "truth", "metric")
        boxes |= swept and key.split(".")[0] == "segmenter"
    note = {"shared": shared, "boxes": boxes, "score": min(scores, default=None), "nms": nms, "by_class": by_class}
    with atomic_write(sweep / PLACE / "floor.json") as beside:
        beside.write_text(json.dumps(note))


def _is_share(value: Any) -> bool:
    """Whether a word or number is a threshold that a job can use."""
    try:
        return 0.0 <= float(value) <= 1.0
    except (TypeError, ValueError):
        return False


def read_sweep_floor(sweep: Path) -> dict[str, Any]:
    """What `note_floor` wrote; empty if it did not."""
    note = sweep / PLACE / "floor.json"
    return json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}


def sweep_floors(settings: Select, vocabulary: Vocabulary, note: dict[str, Any]) -> list[Select]:
    """Selects that together leave whatever any job of the sweep may select.

    Duplicates are dropped in the order of their scores, so that a stricter score afterwards leaves what it would have
    left before, and a threshold of the sweep drops the same of what several thresholds together leave. Not so where
    classes have scores of their own and are duplicates of each other, or where masks tell duplicates: there, as with
    thresholds that are not known, all duplicates stay. Nested boxes, numbers and areas are left to the jobs.
    """
    own = [settings.score, *(settings.class_score or {}).values(), *vocabulary.class_score.values()]
    score = min(own if note.get("score") is None else [*own, note["score"]])
    nms = note.get("nms", "own")
    by_class = bool(note.get("by_class") or settings.class_score or vocabulary.class_score)
    if settings.nms_by == "mask" or nms == "any" or (settings.nms_across and by_class):
        nms = [None]
    floor = replace(
        settings,
        score=score,
        class_score=dict.fromkeys(vocabulary.class_score, score) or None,
        nms_by="box",
        nested=None,
        top_k=None,
        min_area=0.0,
        max_area=None,
    )
    return [replace(floor, nms=value) for value in ([settings.nms] if nms == "own" else nms)]


class PredictionCache:
    """What the models found in pictures, for all jobs of a sweep with the same fingerprint.

    Args:
        sweep: the folder of the sweep.
        vocabulary: of the run.
        settings: all that decides what the models find, without `select`; see `store.fingerprint`.
        selected: the `select` of the run.
    """

    def __init__(self, sweep: Path, vocabulary: Vocabulary, settings: dict[str, Any], selected: Select) -> None:
        self.floors = sweep_floors(selected, vocabulary, read_sweep_floor(sweep))
        whole = {**settings, "select": [asdict(floor) for floor in self.floors]}
        mark = fingerprint(whole, vocabulary)
        self._store = StoreSink(sweep / PLACE / mark[:16], vocabulary, whole)
        self.replayed = 0
        self._memory = _held.pop(mark, {})
        _held[mark] = self._memory
        while len(_held) > 2:  # the last of whole predictions and of boxes
            _held.pop(next(iter(_held)))

    def stored(self, name: str, files: list[Path]) -> Iterable[FrameResult] | None:
        """What an earlier job found in a picture of this content; None if none looked at it."""
        state = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
        if (held := self._memory.get((name, *files))) is not None and held[0] == state:
            self.replayed += 1
            return [FrameResult(replace(held[1]), held[2], stored=True)]
        found = self._store.stored(name, files)
        self.replayed += found is not None
        return None if found is None else self._hold((name, *files), state, found)

    def _hold(self, key: Any, state: Any, found: Iterable[FrameResult]) -> Iterable[FrameResult]:
        """Keep what was read in memory for the next job of this process, as long as it is not too much."""
        for result in found:
            if len(self._memory) < HELD and result.frame.video is None:
                self._memory[key] = state, replace(result.frame), result.found
            yield result

    def found(self, frame: Frame) -> sv.Detections | None:
        """`stored` for a frame that is decoded already."""
        if frame.video is not None or frame.file is None:
            return None
        results = self.stored(frame.name, [frame.file])
        return None if results is None else next((result.detections for result in results), None)

    def keep(self, found: sv.Detections, vocabulary: Vocabulary) -> sv.Detections:
        """Of what a detector found all that a job may select, the most confident first."""
        if len(self.floors) == 1:
            return select(found, self.floors[0], vocabulary)
        found.data["row"] = np.arange(len(found))
        kept = [select(found, floor, vocabulary).data["row"] for floor in self.floors]
        del found.data["row"]
        rows = np.unique(np.concatenate(kept))
        assert found.confidence is not None
        return select_rows(found, rows[np.argsort(-found.confidence[rows], kind="stable")])

    def write(self, result: FrameResult) -> None:
        """Keep what was found in a picture."""
        self._store.write(result)

    def close(self) -> None:
        """Write what is not written yet."""
        self._store.__exit__(None, None, None)
