"""Run the pipeline from a source to sinks: threads, progress, resuming, and a summary."""

from __future__ import annotations

import json
import math
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from grounded_sam.errors import ImageError
from grounded_sam.files import atomic_write_text
from grounded_sam.formats.output_classes import OutputClasses
from grounded_sam.media.prefetch import WORKERS
from grounded_sam.media.progress import ProgressBar
from grounded_sam.output.claim import Claim, absolute, check_output, claim
from grounded_sam.output.paths import OutputPath, output_path
from grounded_sam.pipeline.frames import process_frames
from grounded_sam.pipeline.images import convert_errors
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.pipeline.prediction_cache import CachedStages
from grounded_sam.structures.protocols import (
    ListsSkipped,
    Lookup,
    NumbersClasses,
    OwnsFolder,
    PreparesResults,
    RecordsSkipped,
    RefusesAnswers,
    ResultStore,
    Resumable,
    Sharded,
    Sink,
    Source,
)
from grounded_sam.structures.request import Request
from grounded_sam.structures.results import FrameResult, Skipped

#: Results that may wait for the sinks: their number if they are large, and if their masks have few bytes in all.
PENDING_LARGE, PENDING_SMALL, SMALL_BYTES = 4, 16, 256 * 2**20


@dataclass
class Summary:
    """What a run did.

    Attributes:
        images: Number of images and frames processed or read back from the store.
        frames: How many of them are frames of videos.
        stored: How many of them an earlier run had processed.
        empty: How many of them have no detections.
        objects: Number of detections by class name; in videos, of tracks.
        skipped: What could not be used or done, in whole or in part: files, clicks, sound, parts of a split.
        outputs: One line per sink: what it wrote, and where.
        removed: Number of files of earlier runs that were removed from the folders of the sinks.
        kept: Files there that only an earlier run wrote, but that were changed since, or are copies of images.
        interrupted: Whether the run was stopped early, by Ctrl-C.
        missing: Number of images and videos that were listed, and are neither stored nor skipped.
    """

    images: int = 0
    frames: int = 0
    stored: int = 0
    empty: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    removed: int = 0
    kept: list[OutputPath] = field(default_factory=list)
    interrupted: bool = False
    missing: int = 0

    @property
    def unit(self) -> str:
        """What `images` counts, in the plural."""
        if not self.frames:
            return "images"
        return "frames" if self.frames == self.images else "images and frames"


def count_result(result: FrameResult, summary: Summary, tracks: dict[tuple[str | None, int], str]) -> None:
    """Add a result to a summary.

    Args:
        result: The result.
        summary: The summary; the objects of tracked videos are not added to it yet.
        tracks: To which those are added: video and tracker id to class name.
    """
    summary.images += 1
    summary.stored += result.stored
    summary.frames += result.frame.video is not None
    names = [str(name) for name in result.raw.data.get("class_name", [])]
    summary.empty += not names
    if result.raw.tracker_id is None:
        summary.objects.update(names)
    else:
        ids = result.raw.tracker_id.tolist()
        tracks |= {(result.frame.video, i): name for i, name in zip(ids, names, strict=True)}


class PendingWrites:
    """Results that are being written: a few, or more of them while their masks are small."""

    def __init__(self) -> None:
        self._writes: deque[tuple[Future[None], int]] = deque()  # with the bytes of their masks

    def __len__(self) -> int:
        return len(self._writes)

    def add(self, write: Future[None], result: FrameResult) -> None:
        """Add the write of a result, and wait until those that may be pending are few enough.

        Raises:
            OSError: Or any other error of a write that ended.
        """
        size = 0 if result.raw.mask is None else len(result.raw) * math.prod(result.frame.size_hw)
        self._writes.append((write, size))
        while self._writes and (self._is_full() or self._writes[0][0].done()):
            self._writes.popleft()[0].result()

    def _is_full(self) -> bool:
        size = sum(size for _, size in self._writes)
        return len(self) > PENDING_LARGE and (len(self) > PENDING_SMALL or size > SMALL_BYTES)

    def wait(self) -> None:
        """Wait for all writes."""
        while self._writes:
            self._writes.popleft()[0].result()


class Runner:
    """Take every frame of a source through a pipeline to the sinks.

    Sinks write on a thread of their own, so that models and files do not wait for each other. With a sink that stores
    results, or with a prediction cache, files that have not changed are read back instead of processed again. The
    output is claimed during the run; see `output.claim`. At its end, files that an earlier run wrote into the folders
    that sinks own (see `OwnsFolder`), and this run did not write again, are removed.

    Args:
        pipeline: Detects, segments and tracks.
        source: Images and videos; the frames of a video are tracked if the pipeline has a tracker.
        sinks: Where results go.
        output: Folder for `skipped.json`.
        request: What to look for; None for the pipeline's own text and clicks.
        classes: Classes of the output, if the sinks were built with them; None where they have those of the request.

    >>> Runner(pipeline, source, sinks, Path("results")).run().images         # doctest: +SKIP
    9
    """

    def __init__(
        self,
        pipeline: Pipeline,
        source: Source,
        sinks: Sequence[Sink],
        output: OutputPath,
        request: Request | None = None,
        classes: OutputClasses | None = None,
    ) -> None:
        self.pipeline, self.source, self.sinks, self.output = pipeline, source, sinks, output_path(output)
        self.request, self.classes = request or pipeline.request(), classes
        self._numbering = [sink for sink in sinks if isinstance(sink, NumbersClasses)]
        self.store = next((sink for sink in sinks if isinstance(sink, ResultStore)), None)
        self.cache = pipeline.stages if isinstance(pipeline.stages, CachedStages) else None
        self._replays = len(sinks) > 1  # a sink other than the store wants stored results
        self.summary = Summary()
        self._unwritten: Counter[int] = Counter()  # images that a sink could not write, by its position
        self._unusable: list[Skipped] = []  # frames that a later stage or a sink could not use
        self._stopped_videos: list[str] = []  # which the store must not take for complete
        self._reported: set[Skipped] = set()
        self._tracks: dict[tuple[str | None, int], str] = {}  # video and tracker id to class name

    def run(self) -> Summary:
        """Process everything, with a progress bar, and write `skipped.json`.

        An interruption (Ctrl-C) ends the run early; what was written so far stays usable.

        Raises:
            ConfigError: If another run is writing to the output, or files in it are not of an earlier run.
            ImageError: If not a single frame could be read.
        """
        with claim(self.output) as claimed:
            check_output(self.output / "skipped.json")
            for folder in _own_folders(self.sinks):
                claimed.check_folder(folder)  # type: ignore[arg-type]  # of the kind of the output
            return self._run(claimed)

    def _run(self, claimed: Claim) -> Summary:
        start = time.perf_counter()
        _take_refused(self.pipeline.detector)  # that of an earlier run with the same models
        try:
            with ExitStack() as stack:
                for sink in self.sinks:
                    stack.enter_context(sink)
                stack.callback(self._report_skipped)
                writer = stack.enter_context(ThreadPoolExecutor(1, "write"))
                workers = stack.enter_context(ThreadPoolExecutor(WORKERS, "prepare"))
                progress = stack.enter_context(ProgressBar("images", _length(self.source)))
                self._process(stack.enter_context(closing(self._results())), writer, workers, progress)
        except KeyboardInterrupt:
            self.summary.interrupted = True
        finally:
            if self.cache is not None:
                self.cache.close()
        self.pipeline.seconds["all"] = time.perf_counter() - start
        self.summary.objects.update(self._tracks.values())
        refused = _take_refused(self.pipeline.detector)
        self.summary.skipped = [*self._skipped(), *refused, *_listed_by_sinks(self.sinks), *self._unused_clicks()]
        if self.store is not None:
            self.summary.skipped += self.store.not_searched()
        self._write_skipped()
        if not self.summary.interrupted:
            for folder in _own_folders(self.sinks):
                removed, kept = claimed.remove_stale(folder)  # type: ignore[arg-type]
                self.summary.removed += len(removed)
                self.summary.kept += kept
        self.summary.outputs = [sink.summary() for sink in self.sinks]
        return self.summary

    def _process(
        self,
        results: Iterator[FrameResult],
        writer: ThreadPoolExecutor,
        workers: ThreadPoolExecutor,
        progress: ProgressBar,
    ) -> None:
        """Hand results to the sinks, a few at a time, and count them."""
        pending = PendingWrites()
        preparing = {i: sink for i, sink in enumerate(self.sinks) if isinstance(sink, PreparesResults) and WORKERS > 1}
        skipped_before = len(self.source.skipped)  # files that `len(source)` does not count
        for found in results:
            result = found if self.store is None or found.stored else self.store.reviewed(found)
            if result.stored and not len(pending) and not preparing:  # no model to overlap with
                self._write(result, {})
            else:
                prepared = {i: workers.submit(sink.prepare, result) for i, sink in preparing.items()}
                pending.add(writer.submit(self._write, result, prepared), result)
            self._count(result)
            done = self.summary.images + len(self.source.skipped) + len(self._unusable) - skipped_before
            if self.store is not None and not self._replays:
                done += self.store.files_resumed()  # their results are not yielded
            progress.update(done, self.summary.unit)
        pending.wait()
        self._leave_incomplete()

    def _results(self) -> Generator[FrameResult]:
        """Yield results: images one by one, the frames of each video together, stored results as they are."""
        lookup = self._lookup()
        resumes = lookup is not None and isinstance(self.source, Resumable)
        frames = self.source.resume(lookup) if resumes else iter(self.source)  # type: ignore[attr-defined]
        try:
            yield from process_frames(
                frames,
                self.pipeline,
                self.request,
                on_skipped=self._unusable.append,
                on_stopped=self._stopped_videos.append,
                stored=self._stored,
            )
        finally:
            if isinstance(frames, Generator):
                with suppress(ValueError):  # a thread that is stuck in it, such as in a stream without data
                    frames.close()

    def _lookup(self) -> Lookup | None:
        """Return the function that finds stored results: of the store, else of the prediction cache."""
        store, replay = self.store, self._replays
        if store is not None:
            return partial(store.lookup, replay=replay)
        if self.cache is not None and self.cache.results is not None:
            return self.cache.results.lookup
        return None

    def _stored(self, results: Iterator[Any]) -> Iterator[FrameResult]:
        """Yield stored results; cached predictions first pass this job's selection."""
        for result in results:
            selects = self.store is None and self.cache is not None and self.cache.results is not None
            yield self.cache.select_stored(result, self.request.classes) if selects else result  # type: ignore[union-attr]

    def _write(self, result: FrameResult, prepared: Mapping[int, Future[Any]]) -> None:
        """Write a result to every sink.

        Args:
            result: The result.
            prepared: What sinks have prepared for it, by position of the sink.
        """
        self._leave_incomplete(except_for=result.frame.video)
        original = result.predicted or result
        renumbered = result
        if self.classes is not None and self._numbering:
            self.classes.save()  # before the first file with a number
            renumbered = self.classes.renumber(result)
        for position, sink in enumerate(self.sinks):
            try:
                with convert_errors(sink, passing=(OSError,)):  # such as that of a full disk, which ends the run
                    if isinstance(sink, PreparesResults) and position in prepared:
                        sink.write_prepared(result, prepared[position].result())
                        continue
                    sink.write(original if sink is self.store else renumbered if sink in self._numbering else result)
            except ImageError as error:  # such as that of a stored result whose file is gone
                self._unwritten[position] += 1
                skipped = Skipped(result.frame.name, str(error))
                if skipped not in self._unusable:
                    self._unusable.append(skipped)
        self._report_skipped()

    def _leave_incomplete(self, except_for: str | None = None) -> None:
        """Tell the store which videos stopped, once all of their frames are written."""
        if self.store is not None:
            for video in self._stopped_videos:
                if video != except_for:
                    self.store.leave_incomplete(video)

    def _count(self, result: FrameResult) -> None:
        """Add a result to the summary."""
        count_result(result, self.summary, self._tracks)
        if self.request.clicks is not None and result.frame.video is None:
            self.request.clicks.note_objects(result.frame, len(result.raw))

    def _skipped(self) -> list[Skipped]:
        """Return everything that could not be used so far."""
        notes = self.store.notes() if self.store is not None else ()
        return list(dict.fromkeys([*self.source.skipped, *self._unusable, *notes]))

    def _unused_clicks(self) -> list[Skipped]:
        """Return the clicks that no frame took; none where other runs or shards may have had their frames."""
        resumed = self.summary.stored or (self.store is not None and self.store.files_resumed())
        if self.request.clicks is None or self.summary.interrupted or resumed or _is_shard(self.source):
            return []
        return [Skipped(name, reason) for name, reason in self.request.clicks.unused()]

    def _report_skipped(self) -> None:
        """Report newly skipped files to the sinks that record them; the store knows its own notes already."""
        notes = self.store.notes() if self.store is not None else []
        if len(self.source.skipped) + len(self._unusable) + len(notes) <= len(self._reported):
            return
        for skipped in self._skipped():
            if skipped in self._reported:
                continue
            self._reported.add(skipped)
            for sink in self.sinks:
                if isinstance(sink, RecordsSkipped) and not (isinstance(sink, ResultStore) and skipped in notes):
                    sink.skip(skipped)

    def _write_skipped(self) -> None:
        """Write `skipped.json`, and raise if no image was usable."""
        summary, path = self.summary, self.output / "skipped.json"
        entries = [asdict(skipped) for skipped in summary.skipped]
        atomic_write_text(path, json.dumps(entries, ensure_ascii=False, indent=1))
        resumed = self.store.files_resumed() if self.store is not None else 0
        # A shard may happen to consist of bad files.
        written = summary.images - max(self._unwritten.values(), default=0)  # by the sink that lost most
        if summary.skipped and not (written or resumed or _is_shard(self.source) or summary.interrupted):
            first = summary.skipped[0]
            raise ImageError(
                f"no usable images, {len(summary.skipped)} skipped; the first: {first.file}: {first.reason} "
                f"(all in {path})"
            )


def _length(source: Source) -> int | None:
    """Return how many frames may come; None where that is unknown, as for a camera."""
    try:
        return len(source)
    except TypeError:
        return None


def _is_shard(source: Source) -> bool:
    """Return whether a source has only a part of the input."""
    return isinstance(source, Sharded) and source.num_shards > 1


def _listed_by_sinks(sinks: Sequence[Sink]) -> list[Skipped]:
    """Return what sinks left out of what they wrote, each once."""
    parts = (sink.skipped for sink in sinks if isinstance(sink, ListsSkipped))
    return list(dict.fromkeys(skipped for part in parts for skipped in part))


def _take_refused(detector: object) -> list[Skipped]:
    """Return what a detector refused of the answers of its model."""
    return detector.take_refused() if isinstance(detector, RefusesAnswers) else []


def _own_folders(sinks: Sequence[Sink]) -> list[OutputPath]:
    """Return the folders that only one sink writes to."""
    return [absolute(sink.own_folder()) for sink in sinks if isinstance(sink, OwnsFolder)]
