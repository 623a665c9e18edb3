"""Store results as Parquet part files, from which later runs resume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

from grounded_sam.checks import check_choice, check_int, check_number
from grounded_sam.errors import count_of
from grounded_sam.formats.store_writer import StoreWriter
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.output.paths import OutputPath, output_path
from grounded_sam.remote import Location
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.items import FileContent
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary


class StoreSink:
    """Store results under `store/` in the output folder, in the format of `formats.store`.

    A later run into the same folder reuses the stored results of files that have not changed; other sinks get them from
    the store. A video is reused only if it was processed to its end, since a tracker cannot resume in the middle.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        settings: All settings that determine the results; see `formats.store_runs.fingerprint`.
        resume: `same` rejects a store made with other settings; `extend` keeps its results and adds to them; `replace`
            processes its images again. What people decided about objects stays in each case.
        part_images: Images per part file.
        part_seconds: Age in seconds at which a part is written even if it has fewer.
        max_pixels: Stored images that are larger are refused.

    Raises:
        ConfigError: If a setting is out of range, or the store was made with other settings.
    """

    takes_address: ClassVar[bool] = True

    def __init__(
        self,
        output: OutputPath,
        vocabulary: Vocabulary,
        settings: Mapping[str, Any] | None = None,
        resume: Literal["same", "extend", "replace"] = "same",
        part_images: int = 512,
        part_seconds: float = 60.0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_choice("resume", resume, ("same", "extend", "replace"))
        check_int("sink.store.part_images", part_images, 1)
        check_number("sink.store.part_seconds", part_seconds, 0)
        folder = output_path(output) / "store"
        self._writer = StoreWriter(
            folder, vocabulary, settings or {}, part_images, part_seconds, resume=resume, max_pixels=max_pixels
        )
        self._files_resumed = 0
        self._notes: list[Skipped] = self._writer.lost_parts()

    @property
    def writer(self) -> StoreWriter:
        """What writes the store, for engines whose workers write into it too."""
        return self._writer

    def __enter__(self) -> StoreSink:
        return self

    def lookup(
        self,
        name: str,
        files: Sequence[Path | Location],
        content: FileContent | None = None,
        *,
        may_read: bool = True,
        replay: bool = True,
    ) -> Iterable[FrameResult] | None:
        """Return the stored results of an image or of a complete video; see `structures.protocols.ResultStore`."""
        results = self._writer.lookup(name, files, content, may_read=may_read)
        if results is None:
            return None
        self._files_resumed += 1
        if (note := self._writer.note(name)) is not None:
            self._notes.append(note)
        return results if replay else ()

    def output_classes(self) -> Vocabulary:
        """Return the classes of the run, followed by those stored before."""
        return self._writer.output_classes()

    def named(self, frame: Frame) -> Frame:
        """Return a frame under a name that no other file of the store has."""
        return self._writer.named(frame)

    def reviewed(self, result: FrameResult) -> FrameResult:
        """Return a result with ids of its objects, and with what people decided about them in earlier runs."""
        return self._writer.reviewed(result)

    def files_resumed(self) -> int:
        """Return how many files `lookup` has found so far."""
        return self._files_resumed

    def notes(self) -> list[Skipped]:
        """Return the problems recorded for files that `lookup` has found, such as truncated videos."""
        return list(self._notes)

    def add_written(self, images: int, objects: int, files: int) -> None:
        """Add to the counts what workers have written in this run, whose files `lookup` has found since.

        Args:
            images: Number of images and frames.
            objects: Number of detections.
            files: Number of images and videos.
        """
        self._writer.images += images
        self._writer.objects += objects
        self._files_resumed = max(0, self._files_resumed - files)

    def not_searched(self) -> list[Skipped]:
        """Return which classes of the run were not looked for in the files that `lookup` has found."""
        return self._writer.not_searched()

    def write(self, result: FrameResult) -> None:
        """Write a result, unless it comes from the store."""
        if not result.stored:
            self._writer.write(result)

    def leave_incomplete(self, video: str) -> None:
        """Take back that a video will be complete, because it stopped; a later run processes it again."""
        self._writer.leave_incomplete(video)

    def skip(self, skipped: Skipped) -> None:
        """Record a file that could not be used; later runs try it again."""
        self._writer.skip(skipped)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close(complete=kind is None)

    def summary(self) -> str:
        """Return the number of images and objects stored, and the folder."""
        resumed = f", {count_of(self._files_resumed, 'file')} resumed" if self._files_resumed else ""
        writer = self._writer
        images, objects = count_of(writer.images, "image"), count_of(writer.objects, "object")
        counts = ", ".join(f"{count} {status}" for status, count in sorted(writer.decisions.items()) if count)
        decided = f"; kept what people decided about {counts} objects" if counts else ""
        return f"{images} with {objects} stored{resumed} in {writer.folder}{decided}"
