"""Predict once, select many times: share what the models of a sweep find between its jobs.

Jobs of one multirun that differ only in `select.*`, sinks or ground truth find the same objects before selection. The
first job that processes an image stores all detections that any job may select; the others select from these. Jobs
that differ in the segmenter share the boxes of the detector in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import supervision as sv

from grounded_sam.files import atomic_write
from grounded_sam.formats.store_runs import fingerprint
from grounded_sam.formats.store_writer import StoreWriter
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.pipeline.images import DetectThenSegment
from grounded_sam.pipeline.select import Select, select_detections
from grounded_sam.remote import Location
from grounded_sam.structures.detections import select_rows, validate_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.items import FileContent
from grounded_sam.structures.protocols import Segmenter, Verifier
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: Number of images whose predictions are also held in memory, for each of the last two caches; a few KB per image.
MAX_IN_MEMORY = 20_000
_in_memory: dict[str, dict[Any, Any]] = {}


@dataclass(frozen=True)
class LoosestSelection:
    """The least strict selection among the jobs of a sweep.

    Attributes:
        results: Whether jobs can share detections with masks: selection, sinks or ground truth are swept.
        boxes: Whether jobs can share boxes: the segmenter is swept.
        score: Lowest score threshold; None if no job sets one.
        nms: NMS thresholds of the jobs; `own` if each job's config has the same one, `any` if they cannot be listed.
        by_class: Whether a job sets per-class thresholds.
    """

    results: bool = False
    boxes: bool = False
    score: float | None = None
    nms: list[float] | Literal["own", "any"] = "own"
    by_class: bool = False

    @classmethod
    def from_overrides(cls, overrides: Sequence[str]) -> LoosestSelection:
        """Read the overrides of a sweep, such as `select.score=0.2,0.3` or `select.nms=interval(0.3,0.8)`."""
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.core.override_parser.types import IntervalSweep
        from hydra.errors import HydraException

        scores: list[float] = []
        nms: list[float] | Literal["own", "any"] = "own"
        results = boxes = by_class = False
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key, swept = override.key_or_group.lstrip("+"), override.is_sweep_override()
            interval = isinstance(override.value(), IntervalSweep)
            try:
                values = list(override.sweep_string_iterator()) if swept and not interval else [override.value()]
            except HydraException:  # glob() needs the config
                values, nms = [], "any"
            by_class |= key.startswith("select.class_score")
            if key == "select.score" or key.startswith("select.class_score."):
                values = [override.value().start or 0.0] if interval else values
                scores += [float(value) for value in values if _is_threshold(value)]
            elif key == "select.nms" and swept and nms != "any":
                valid = [value for value in values if _is_threshold(value) or value == "null"]  # others fail their job
                nms = "any" if interval or "null" in valid or not valid else sorted(map(float, valid))
            elif key.startswith("select.nms") and swept:
                nms = "any"
            results |= swept and key.split(".")[0] in ("select", "sink", "truth", "metric")
            boxes |= swept and key.split(".")[0] == "segmenter"
        return cls(results, boxes, min(scores, default=None), nms, by_class)

    @classmethod
    def read(cls, folder: Path) -> LoosestSelection:
        """Read what `write` wrote into the folder of the predictions; nothing is shared if it did not."""
        path = folder / "loosest_selection.json"
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()

    def write(self, folder: Path) -> None:
        """Write to the folder of the predictions of a sweep, before its first job starts."""
        with atomic_write(folder / "loosest_selection.json") as path:
            path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def selections(self, settings: Select, vocabulary: Vocabulary) -> list[Select]:
        """Return selections whose union contains what any job of the sweep may select.

        NMS goes in order of score, so a stricter score threshold after NMS keeps what it would have kept before it, and
        the union over several NMS thresholds contains the result of each. This does not hold where classes have
        thresholds of their own and suppress each other, nor for NMS by masks: then, and where the thresholds are not
        known, nothing is suppressed. IoS, number and area are left to the jobs.
        """
        own_scores = [settings.score, *(settings.class_score or {}).values(), *vocabulary.class_score.values()]
        score = min(own_scores if self.score is None else [*own_scores, self.score])
        by_class = bool(self.by_class or settings.class_score or vocabulary.class_score)
        keep_all = settings.nms_by == "mask" or self.nms == "any" or (settings.class_agnostic and by_class)
        own_nms: list[float | None] = [settings.nms] if isinstance(self.nms, str) else [*self.nms]
        thresholds = [None] if keep_all else own_nms
        loosest = replace(
            settings,
            score=score,
            class_score=dict.fromkeys(vocabulary.class_score, score) or None,
            nms_by="box",
            max_ios=None,
            top_k=None,
            min_area=0.0,
            max_area=None,
            verify=None,
            presence=None,
        )
        return [replace(loosest, nms=threshold) for threshold in thresholds]


def _is_threshold(value: Any) -> bool:
    """Return whether a value is a number from 0 to 1."""
    try:
        return 0.0 <= float(value) <= 1.0
    except (TypeError, ValueError):
        return False


class PredictionCache:
    """Detections of images, shared by the jobs of a sweep that have the same fingerprint.

    Args:
        folder: Folder of the predictions of the sweep.
        vocabulary: Classes of the run.
        settings: All settings that decide what the models find, without `select`.
        select: Selection of the run.
        max_pixels: Largest image of the run.
        candidates: What a verifier is to judge, which does not depend on the selection of a job; None without one.

    Attributes:
        replayed: Number of images found in the cache.
    """

    def __init__(
        self,
        folder: Path,
        vocabulary: Vocabulary,
        settings: dict[str, Any],
        select: Select,
        max_pixels: int = MAX_PIXELS,
        candidates: Select | None = None,
    ) -> None:
        loosest = LoosestSelection.read(folder)
        self.selections = loosest.selections(select, vocabulary) if candidates is None else [candidates]
        settings = {**settings, "select": [asdict(selection) for selection in self.selections]}
        key = fingerprint(settings, vocabulary)
        self._store = StoreWriter(folder / key[:16] / "store", vocabulary, settings, max_pixels=max_pixels)
        self.replayed = 0
        self._memory = _in_memory.pop(key, {})
        _in_memory[key] = self._memory
        while len(_in_memory) > 2:  # one cache of results and one of boxes
            _in_memory.pop(next(iter(_in_memory)))

    def lookup(
        self,
        name: str,
        files: Sequence[Path | Location],
        content: FileContent | None = None,
        *,
        may_read: bool = True,
    ) -> Iterable[FrameResult] | None:
        """Return what an earlier job found in an image with the same content; None if none processed it."""
        state = [_state(file) for file in files]
        key = (name, *files)
        if (held := self._memory.get(key)) is not None and held[0] == state:
            self.replayed += 1
            return [FrameResult(frame=replace(held[1]), detections=held[2], stored=True)]
        results = self._store.lookup(name, files, content, may_read=may_read)
        if results is None:
            return None
        self.replayed += 1
        return self._remember(key, state, results)

    def _remember(self, key: Any, state: Any, results: Iterable[FrameResult]) -> Iterable[FrameResult]:
        """Keep results in memory for the next job of this process, up to a limit."""
        for result in results:
            if len(self._memory) < MAX_IN_MEMORY and result.frame.video is None:
                self._memory[key] = state, replace(result.frame), result.raw
            yield result

    def lookup_frame(self, frame: Frame) -> sv.Detections | None:
        """Look up an image that is decoded already."""
        if frame.video is not None or frame.file is None:
            return None
        results = self.lookup(frame.name, [frame.file], frame.content)
        return None if results is None else next((result.detections for result in results), None)

    def keep_selectable(self, detections: sv.Detections, vocabulary: Vocabulary) -> sv.Detections:
        """Keep all detections that a job of the sweep may select, most confident first."""
        vocabulary = vocabulary.overlapping
        if len(self.selections) == 1:
            return select_detections(detections, self.selections[0], vocabulary)
        detections.data["row"] = np.arange(len(detections))
        selected = [select_detections(detections, selection, vocabulary).data["row"] for selection in self.selections]
        del detections.data["row"]
        rows = np.unique(np.concatenate(selected))
        assert detections.confidence is not None
        return select_rows(detections, rows[np.argsort(-detections.confidence[rows], kind="stable")])

    def write(self, result: FrameResult) -> None:
        """Store what was found in an image."""
        self._store.write(result)

    def close(self) -> None:
        """Write what is still in memory."""
        self._store.close(complete=True)


def _state(file: Path | Location) -> tuple[object, ...]:
    """Return what changes with a file."""
    if isinstance(file, Location):
        return file.size, file.modified_ns, file.etag
    with suppress(OSError):
        status = file.stat()
        return status.st_size, status.st_mtime_ns
    return ()


class CachedStages:
    """`DetectThenSegment` that shares what it finds in images with the other jobs of a sweep.

    Frames of videos are not shared.

    Args:
        stages: Detector and segmenter.
        results: Cache of detections with masks, before selection; None not to share them.
        boxes: Cache of the detector's boxes; None not to share them.
    """

    def __init__(
        self, stages: DetectThenSegment, results: PredictionCache | None, boxes: PredictionCache | None
    ) -> None:
        self.stages, self.results, self.boxes = stages, results, boxes

    @property
    def segmenter(self) -> Segmenter | None:
        """Segmenter of the wrapped stages."""
        return self.stages.segmenter

    @property
    def verifier(self) -> Verifier | None:
        """Verifier of the wrapped stages."""
        return self.stages.verifier

    @property
    def batch_size(self) -> int:
        """Number of frames per detector call."""
        return self.stages.batch_size

    def can_overlap(self, stage: object) -> bool:
        """Return False: detector and segmenter use the same caches."""
        return False

    def batch_key(self, frame: Frame) -> Hashable:
        """Return the batch key of the wrapped stages."""
        return self.stages.batch_key(frame)

    def with_select(self, select: Select) -> DetectThenSegment:
        """Return the wrapped stages with another selection, without the caches."""
        return self.stages.with_select(select)

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """Return cached boxes, and run the detector on the frames that have none."""
        known = [None if self.boxes is None else self.boxes.lookup_frame(frame) for frame in frames]
        missing = [frame for frame, boxes in zip(frames, known, strict=True) if boxes is None]
        detected = iter(self.stages.detect(missing, vocabulary) if missing else [])
        return [next(detected) if boxes is None else boxes for boxes in known]

    def segment(
        self,
        frames: Sequence[Frame],
        boxes: Sequence[sv.Detections],
        vocabulary: Vocabulary,
        segmenter: Segmenter | None,
    ) -> list[sv.Detections]:
        """Store what any job may select, and return what this job selects; see `DetectThenSegment.segment`."""
        if any(frame.video is not None for frame in frames):
            return self.stages.segment(frames, boxes, vocabulary, segmenter)
        name = type(self.stages.detector).__name__
        selectable = []
        for frame, part in zip(frames, boxes, strict=True):
            detections = validate_detections(part, vocabulary, frame.size_hw, name)
            for cache in (self.boxes, self.results):
                detections = detections if cache is None else cache.keep_selectable(detections, vocabulary)
            selectable.append(detections)
        if self.results is None:
            selected = self.stages.segment(frames, selectable, vocabulary, segmenter)
        else:
            segmented = self.stages.add_masks(frames, selectable, vocabulary, segmenter)
            segmented = self.stages.verify(frames, segmented, vocabulary)
            selected = [self.select(detections, vocabulary) for detections in segmented]
            _write(self.results, frames, segmented)
        if self.boxes is not None and all(set(part.data) <= {"class_name"} for part in selectable):
            _write(self.boxes, frames, selectable)  # the store has no other columns
        return selected

    def select(self, detections: sv.Detections, vocabulary: Vocabulary) -> sv.Detections:
        """Select from cached detections exactly what the job would have selected alone."""
        settings = self.stages.select
        if self.verifier is None and self.segmenter is not None and settings.top_k is not None:
            # The number counts before masks are made.
            detections = select_detections(detections, settings.before_masks(), vocabulary.overlapping)
        return select_detections(detections, settings, vocabulary)

    def select_stored(self, result: FrameResult, vocabulary: Vocabulary) -> FrameResult:
        """Select from a result that `results` returned."""
        by_mask = self.stages.select.nms_by == "mask"
        detections = self.select(result.detections if by_mask else result.raw, vocabulary)
        return FrameResult(frame=result.frame, detections=detections, stored=True)

    def close(self) -> None:
        """Write what is still in memory."""
        for cache in (self.results, self.boxes):
            if cache is not None:
                cache.close()


def _write(cache: PredictionCache, frames: Sequence[Frame], detections: Sequence[sv.Detections]) -> None:
    """Store what was found in images."""
    for frame, part in zip(frames, detections, strict=True):
        cache.write(FrameResult(frame=frame, detections=part))
