"""What a worker does with a unit of work: decode, run the stages, and write a part of the store."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from grounded_sam.engine.listing import Part, Unit
from grounded_sam.errors import GroundedSamError, ImageError, describe_error
from grounded_sam.formats.store_share import KnownFile, StoreShare, state_columns
from grounded_sam.formats.store_writer import StoreWriter
from grounded_sam.media.prefetch import Prefetch
from grounded_sam.pipeline.frames import process_frames
from grounded_sam.pipeline.runner import PendingWrites, Summary, count_result
from grounded_sam.sources.items import AHEAD
from grounded_sam.sources.video import VideoList
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.items import FileContent
from grounded_sam.structures.protocols import ListsItems
from grounded_sam.structures.request import Request
from grounded_sam.structures.results import Skipped


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is built from; can be pickled.

    Attributes:
        config: The config, resolved.
        request: What to look for.
        share: What the process that opened the store tells.
        parts: Parts of the source, which can read and decode their images; None for videos.
        threads: Number of threads for models.
        folder: Folder that the command was started in.
    """

    config: Mapping[str, Any]
    request: Request
    share: StoreShare
    parts: Sequence[ListsItems | None]
    threads: int
    folder: str

    @classmethod
    def readers(cls, parts: Sequence[Part]) -> list[ListsItems | None]:
        """Return parts without what they list."""
        return [part.without_listing() if isinstance(part, ListsItems) else None for part in parts]


@dataclass
class Report:
    """What a worker did with a unit, which is stored by then; small, and can be pickled.

    Attributes:
        done: Number of its images and videos that are stored or skipped.
        images, frames, empty: As of `Summary`.
        written: Number of detections that were written.
        objects: Number of objects by class.
        skipped: What could not be used, or not in whole.
        decisions: Decided objects by status, in images that were processed again.
        pid: The process.
        error: Why the whole run cannot go on; None if it can.
    """

    done: int = 0
    images: int = 0
    frames: int = 0
    empty: int = 0
    written: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)
    decisions: Counter[str] = field(default_factory=Counter)
    pid: int = field(default_factory=os.getpid)
    error: str | None = None


class UnitWorker:
    """Process units with a pipeline that is built once.

    Args:
        settings: What it is built from.

    Raises:
        GroundedSamError: If the pipeline cannot be built.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        import cv2
        import torch
        from omegaconf import OmegaConf

        from grounded_sam.config.build import build

        with suppress(OSError):  # on another machine there may be no such folder
            os.chdir(settings.folder)
        if settings.folder not in sys.path:
            sys.path.append(settings.folder)  # for user-defined stages, as the command does
        torch.set_num_threads(settings.threads)
        cv2.setNumThreads(settings.threads)
        self.pipeline = build(OmegaConf.create(dict(settings.config)))
        self.request, self.parts = settings.request, settings.parts
        self.writer = StoreWriter.join(settings.share)

    def process(self, unit: Unit, contents: Sequence[bytes | str]) -> Report:
        """Process a unit and store its results.

        Args:
            unit: The unit.
            contents: Encoded images, or why they cannot be read; empty for a video.

        Returns:
            What was done. An image that cannot be processed is skipped, and no error of an image is raised.
        """
        skipped: list[Skipped] = []
        stopped: list[str] = []
        for known in unit.known:
            self.writer.expect(known)
        videos = VideoList([] if unit.video is None else [unit.video])
        frames = iter(videos) if unit.video is not None else self._frames(unit, contents, skipped)
        summary, names = Summary(), set()
        tracks: dict[tuple[str | None, int], str] = {}
        objects, decisions = self.writer.objects, Counter(self.writer.decisions)
        with (
            ThreadPoolExecutor(1, "write") as pool,
            closing(Prefetch(frames, AHEAD)) as ahead,
            closing(process_frames(ahead, self.pipeline, self.request, skipped.append, stopped.append)) as results,
        ):
            pending = PendingWrites()
            for result in results:
                reviewed = self.writer.reviewed(result)
                pending.add(pool.submit(self.writer.write, reviewed), reviewed)
                count_result(reviewed, summary, tracks)
                names.add(result.frame.video or result.frame.name)
            pending.wait()
        for video in stopped:
            self.writer.leave_incomplete(video)
        skipped = list(dict.fromkeys([*videos.skipped, *skipped]))
        for note in skipped:
            self.writer.skip(note)
        self.writer.close(complete=True)
        summary.objects.update(tracks.values())
        names |= {note.file for note in skipped}
        return Report(
            done=sum(name in names for name in unit.names),
            images=summary.images,
            frames=summary.frames,
            empty=summary.empty,
            written=self.writer.objects - objects,
            objects=summary.objects,
            skipped=skipped,
            decisions=self.writer.decisions - decisions,
        )

    def _frames(self, unit: Unit, contents: Sequence[bytes | str], skipped: list[Skipped]) -> Iterator[Frame]:
        """Decode the images of a unit; those that cannot be decoded are added to `skipped`."""
        source = self.parts[unit.part]
        assert source is not None
        for item, content in zip(unit.items, contents, strict=True):
            try:
                if isinstance(content, str):
                    raise ImageError(content)
                frame = source.decode(item, content)
            except ImageError as error:
                skipped.append(Skipped(item.name, str(error).removeprefix(f"{item.place}: ")))
                if isinstance(content, bytes) and item.name not in {known.name for known in unit.known}:
                    read = FileContent.of(item, content)
                    columns = {"digest": read.digest, **state_columns(item.place, read)}
                    self.writer.expect(KnownFile(item.name, item.name, columns))
                continue
            finally:
                skipped += source.skipped  # type: ignore[attr-defined]
                source.skipped.clear()  # type: ignore[attr-defined]
            yield frame


class SafeWorker:
    """A worker whose errors are in its reports, since an engine may take raised ones for those of single units.

    Args:
        settings: What it is built from.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._worker: UnitWorker | None = None
        self._error = ""
        try:
            self._worker = UnitWorker(settings)
        except Exception as error:
            self._error = _reason(error)

    def process(self, unit: Unit, contents: Sequence[bytes | str]) -> Report:
        """Process a unit, see `UnitWorker.process`."""
        if self._worker is None:
            return Report(error=self._error)
        try:
            return self._worker.process(unit, contents)
        except Exception as error:
            return Report(error=_reason(error))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, GroundedSamError) else describe_error(error)
