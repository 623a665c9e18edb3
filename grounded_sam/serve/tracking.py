"""Videos that are tracked frame by frame between other requests, and their lines for those who listen."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grounded_sam.errors import GroundedSamError
from grounded_sam.pipeline.images import DetectThenSegment
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.pipeline.select import Select
from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.pipeline.video import track_video
from grounded_sam.serve.problems import RequestError, public_message
from grounded_sam.serve.uploads import Upload, Uploads
from grounded_sam.serve.worker import readable_error
from grounded_sam.sinks.jsonl import frame_line
from grounded_sam.sources.video import VideoSource
from grounded_sam.structures.request import Request
from grounded_sam.structures.results import FrameResult

#: Largest number of videos that are tracked or wait, and of tracks that are kept after they ended.
MAX_RUNNING, MAX_ENDED = 8, 32
State = Literal["waiting", "running", "done", "failed", "cancelled"]


class InTurnStages(DetectThenSegment):
    """Detector and segmenter that never run on threads of their own, since other requests come between two frames.

    Args:
        stages: The stages.
        select: Which detections to keep.
    """

    def __init__(self, stages: DetectThenSegment, select: Select) -> None:
        super().__init__(
            stages.detector, stages.segmenter, select, stages.tiles, stages.refine, stages.timer, stages.verifier
        )

    def can_overlap(self, stage: object) -> bool:
        """Return False."""
        return False

    def with_select(self, select: Select) -> InTurnStages:
        """Return the same stages with another selection."""
        return InTurnStages(self, select)


@dataclass(frozen=True, kw_only=True)
class TrackRequest:
    """What to track.

    Attributes:
        request: Classes and clicks.
        select: Which detections to keep.
        settings: How to track.
        start: Number of the first frame.
        stop: Number of the frame to stop before; None for the end.
        stride: Keep every `stride`-th frame.
        max_side: Scale frames down to this longer side, in pixels; None for no limit.
        max_pixels: Largest frame.
        masks: Whether lines have masks.
    """

    request: Request
    select: Select
    settings: TrackSettings
    start: int = 0
    stop: int | None = None
    stride: int = 1
    max_side: int | None = None
    max_pixels: int
    masks: bool = True


class TrackJob:
    """A video that is tracked: one step of the worker is one frame, and one line of a file.

    Args:
        pipeline: The models.
        upload: The video, which is held until the job is over.
        asked: What to track.
        path: File of the lines, which is written.
        idle_s: Seconds to go on while nobody listens.
        max_bytes: Largest size of that file.
        on_over: Called once, when the job is over.

    Attributes:
        id: Id of the job.
        state: `waiting`, `running`, `done`, `failed` or `cancelled`.
        error: Why it failed or was cancelled; None otherwise.
        num_frames: Number of lines.
        total: Largest number of lines; None if unknown.
        num_bytes: Size of the file of lines.
        is_discarded: Whether the lines are deleted when it is over.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        upload: Upload,
        asked: TrackRequest,
        path: Path,
        idle_s: float,
        max_bytes: int,
        on_over: Callable[[], None],
    ) -> None:
        self.id, self.path, self.upload_id = uuid.uuid4().hex, path, upload.id
        self.state: State = "waiting"
        self.error: str | None = None
        self.notes: list[str] = []
        self.num_frames = self.num_bytes = 0
        self._pipeline, self._asked, self._upload = pipeline, asked, upload
        self._idle_s, self._max_bytes, self._on_over = idle_s, max_bytes, on_over
        self._listeners, self._heard = 0, time.monotonic()
        self._cancelled = self.is_discarded = False
        self._lock = threading.Lock()
        self._source = VideoSource(
            upload.path,
            start=asked.start,
            stop=asked.stop,
            stride=asked.stride,
            max_side=asked.max_side,
            ahead=1,
            max_pixels=asked.max_pixels,
            name=upload.name,
        )
        self._results: Generator[FrameResult] | None = None
        try:
            self.total: int | None = len(self._source)
        except TypeError:
            self.total = None

    @property
    def is_over(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.state in ("done", "failed", "cancelled")

    def listen(self) -> None:
        """Note that a client listens."""
        with self._lock:
            self._listeners += 1

    def leave(self) -> None:
        """Note that a client does not listen any more."""
        with self._lock:
            self._listeners -= 1
            self._heard = time.monotonic()

    def cancel(self) -> None:
        """End the job before its next frame."""
        with self._lock:
            self._cancelled = True
            is_waiting = self.state == "waiting"
        if is_waiting:
            self.abandon("cancelled by the client", "cancelled")

    def step(self) -> bool:
        """Track the next frame and write its line; return whether more is to come."""
        if self.is_over:  # cancelled while it waited
            self._free()
            return False
        with self._lock:
            is_deserted = not self._listeners and time.monotonic() - self._heard > self._idle_s
        if self._cancelled or is_deserted:
            reason = f"nobody has listened for {self._idle_s:g} s" if is_deserted else "cancelled by the client"
            self.abandon(reason, "cancelled")
            return False
        self.state = "running"
        try:
            if self._results is None:
                self._results = self._track()
            result = next(self._results, None)
            if result is not None:
                self._write(result)
                return True
        except Exception as error:
            self.abandon(public_message(readable_error(error), [self._upload.path.parent]))
            return False
        clicks = self._asked.request.clicks
        self.notes += [f"{name}: {reason}" for name, reason in (clicks.unused() if clicks is not None else ())]
        self.notes += [f"{skipped.file}: {skipped.reason}" for skipped in self._source.skipped]
        self._end("done", None)
        return False

    def _track(self) -> Generator[FrameResult]:
        """Start tracking."""
        asked, pipeline = self._asked, self._pipeline
        tracker, stages = pipeline.tracker, pipeline.stages
        if tracker is None:
            raise RequestError(409, "this server has no tracker; start it with one, such as tracker=sam2")
        assert isinstance(stages, DetectThenSegment)
        in_turn = InTurnStages(stages, asked.select)
        frames = iter(self._source)
        return track_video(frames, asked.request, tracker, in_turn, asked.settings, asked.select, pipeline.timer)

    def _write(self, result: FrameResult) -> None:
        """Append the line of a frame."""
        line = (json.dumps(frame_line(result, self._asked.masks), ensure_ascii=False) + "\n").encode()
        if self.num_bytes + len(line) > self._max_bytes:
            raise RequestError(
                413, f"the lines of this video have more than {self._max_bytes:,} bytes (serve.upload_gb)"
            )
        with self.path.open("ab") as file:
            file.write(line)
        self.num_bytes += len(line)
        self.num_frames += 1

    def abandon(self, reason: str, state: State = "failed") -> None:
        """End without tracking the rest.

        Args:
            reason: Why.
            state: `failed` or `cancelled`.
        """
        self._end(state, reason)

    def _end(self, state: State, reason: str | None) -> None:
        """Free what the job holds."""
        with self._lock:
            if self.is_over:
                return
            self.error = reason
            self.state = state
        self._free()
        self._on_over()

    def _free(self) -> None:
        """Close the video and the session of the tracker; delete the lines if nobody will ask for them."""
        if self._results is not None:
            with suppress(GroundedSamError):
                self._results.close()
            self._results = None
        if self.is_discarded:
            self.path.unlink(missing_ok=True)

    def lines(self, start: int, offset: int = 0) -> Iterator[tuple[int, bytes, int]]:
        """Yield the lines that are written already.

        Args:
            start: Number of the first one, from 0.
            offset: Where it begins in the file, if that is known, else 0.

        Yields:
            Its number, the line without its end, and where the next one begins.
        """
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            number = start if offset else 0
            while number < self.num_frames:
                line = file.readline()
                if not line.endswith(b"\n"):
                    return
                if number >= start:
                    yield number, line[:-1], file.tell()
                number += 1

    def status(self) -> dict[str, Any]:
        """Return what a client may know: `id`, `video`, `state`, `frames`, `total`, `error` and `notes`."""
        return {
            "id": self.id,
            "video": self.upload_id,
            "state": self.state,
            "frames": self.num_frames,
            "total": self.total,
            "error": self.error,
            "notes": self.notes[:20],
        }


class TrackJobs:
    """The jobs by id; of those that are over, the newest are kept.

    Args:
        folder: Folder of the files of lines, which nobody else writes to.
        uploads: The videos.
        idle_s: Seconds to go on while nobody listens.
        max_bytes: Largest size of all lines.
    """

    def __init__(self, folder: Path, uploads: Uploads, idle_s: float, max_bytes: int) -> None:
        self.folder, self._uploads, self._idle_s, self._max_bytes = folder, uploads, idle_s, max_bytes
        self._jobs: OrderedDict[str, TrackJob] = OrderedDict()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._jobs)

    def make(self, pipeline: Pipeline, video: str, asked: TrackRequest) -> TrackJob:
        """Make a job, which the worker has to be given.

        Args:
            pipeline: The models.
            video: Id of the upload.
            asked: What to track.

        Raises:
            RequestError: If there is no such video (404).
            ConfigError: If a setting is out of range.
        """
        upload = self._uploads.hold(video, "video")
        try:
            job = TrackJob(
                pipeline,
                upload,
                asked,
                self.folder / f"{uuid.uuid4().hex}.jsonl",
                self._idle_s,
                self._max_bytes,
                lambda: self._uploads.release(upload),
            )
        except BaseException:
            self._uploads.release(upload)
            raise
        with self._lock:
            self._jobs[job.id] = job
            self._forget_old()
        return job

    def _forget_old(self) -> None:
        """Delete the oldest jobs that are over, until few and small enough ones are left."""
        over = [job for job in self._jobs.values() if job.is_over]
        total = sum(job.num_bytes for job in self._jobs.values())
        for number, job in enumerate(over):
            if len(over) - number <= MAX_ENDED and total <= self._max_bytes:
                return
            del self._jobs[job.id]
            job.path.unlink(missing_ok=True)
            total -= job.num_bytes

    def get(self, job_id: str) -> TrackJob:
        """Return a job.

        Raises:
            RequestError: If there is none (404).
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise RequestError(404, f"no job {job_id[:40]!r}: it never was, or made room for newer ones")
        return job

    def remove(self, job: TrackJob) -> None:
        """Cancel a job, and delete its lines."""
        job.is_discarded = True
        job.cancel()
        with self._lock:
            self._jobs.pop(job.id, None)
        job.path.unlink(missing_ok=True)
