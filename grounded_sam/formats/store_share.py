"""What processes that write into one store tell each other: one opens it, others write parts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grounded_sam.formats.store_index import video_key
from grounded_sam.formats.store_objects import Row
from grounded_sam.formats.store_rows import StoreRows, is_about
from grounded_sam.formats.store_runs import StoreRun
from grounded_sam.output.paths import OutputPath
from grounded_sam.remote import Location
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.items import FileContent
from grounded_sam.structures.vocabulary import Vocabulary


@dataclass(frozen=True)
class StoreShare:
    """What a process needs to write parts into a store that another one has opened; can be pickled.

    The one that opened it claims the output, checks the settings and looks up what is stored:

        share = writer.share()
        known = writer.known(name, files)  # for each file that `lookup` did not find; nearly always None

    The others write what they computed and read nothing, so their start and their memory do not depend on the size of
    the store. Parts have unique names, and every process lists its own:

        writer = StoreWriter.join(share)
        writer.expect(known)  # if it is not None
        writer.write(result)  # its frame has `content`, or `known` has the columns
        writer.skip(Skipped(name, reason))
        writer.flush()  # now all of that is stored
        writer.close(complete=True)

    Attributes:
        folder: Folder of the store; a relative one is resolved by the process that opened it.
        run: Settings and classes of the run.
        vocabulary: Classes of the run.
        classes: These, followed by those stored before.
        sequence: Position of the last part that was there; parts of this run come after it.
        part_images: Images per part.
        part_seconds: Age in seconds at which a part is written even if it has fewer.
        max_pixels: Largest number of pixels of an image.
    """

    folder: OutputPath
    run: StoreRun
    vocabulary: Vocabulary
    classes: Vocabulary
    sequence: int
    part_images: int
    part_seconds: float
    max_pixels: int


@dataclass(frozen=True)
class KnownFile:
    """What a store knows of an image or video that is about to be processed; can be pickled.

    Attributes:
        name: Its name in the input.
        unique_name: Its name in the store, another one only if a file of another folder has the same.
        columns: Columns of its rows that `lookup` has found, such as `digest` and `path`.
        decisions: Rows of what people decided about its objects.
    """

    name: str
    unique_name: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    decisions: tuple[Row, ...] = ()


class KnownFiles:
    """What is known of the files that are about to be stored, by the names of images and videos.

    It comes from a lookup, with the frames, or from the process that opened the store.
    """

    def __init__(self) -> None:
        self._columns: dict[str, Mapping[str, Any]] = {}
        self._known: dict[str, KnownFile] = {}

    def note(self, name: str, columns: Mapping[str, Any]) -> None:
        """Note columns of the rows of an image or video."""
        self._columns[name] = columns

    def noted(self, name: str) -> Mapping[str, Any]:
        """Return the columns that were noted; none if there are none."""
        return self._columns.get(name, {})

    def expect(self, known: KnownFile) -> None:
        """Note what the process that opened the store knows of a file."""
        self._known[known.name] = known
        if known.columns:
            self._columns[known.name] = known.columns

    def forget(self, name: str) -> None:
        """Forget an image or video that is written."""
        self._columns.pop(name, None)
        self._known.pop(name, None)

    def known(self, rows: StoreRows, name: str, files: Sequence[Path | Location], is_video: bool) -> KnownFile | None:
        """Return what another process has to know of a file, or None for nothing, and forget it here.

        Args:
            rows: Rows of the store.
            name: Name of the image or video.
            files: Its files.
            is_video: Whether it is a video.
        """
        columns = self._columns.pop(name, {})
        path = columns.get("path") or stored_path(files[0])
        key = video_key(path, name) if is_video else path
        known = KnownFile(name, rows.names.peek(key, name), columns, tuple(rows.all_decisions(key)))
        return known if columns or known.decisions or known.unique_name != name else None

    def path(self, frame: Frame) -> str | None:
        """Return the path of a frame's file as it is stored, or will be."""
        path: str | None = self.noted(frame.video or frame.name).get("path")
        return path if path is not None or frame.file is None else stored_path(frame.file)

    def columns(self, frame: Frame) -> Mapping[str, Any]:
        """Return what is known of the file of a frame, noted before or from the frame itself."""
        name = frame.video or frame.name
        if name in self._columns or frame.content is None or frame.file is None or frame.video is not None:
            return self.noted(name)
        return {"digest": frame.content.digest, **state_columns(frame.file, frame.content)}

    def unique_name(self, frame: Frame) -> str:
        """Return the name of the image or video of a frame in the store, as the other process knows it."""
        name = frame.video or frame.name
        return self._known[name].unique_name if name in self._known else name

    def decisions(self, frame: Frame) -> list[Row]:
        """Return what people decided about a frame with this content, as the other process knows it."""
        known = self._known.get(frame.video or frame.name)
        if known is None:
            return []
        index, (height, width) = None if frame.video is None else frame.index, frame.size_hw
        image = {"digest": self.columns(frame).get("digest"), "width": width, "height": height}
        return [row for row in known.decisions if row["frame"] == index and is_about(row, image)]


def stored_path(file: Path | Location) -> str:
    """Return the absolute path or the address of a file, as it is stored."""
    if isinstance(file, Location):
        return str(file)
    return os.fsencode(file.absolute()).decode("utf-8", "backslashreplace")


def state_columns(file: Path | Location, content: FileContent | None) -> dict[str, Any]:
    """Return the columns that tell whether a file has changed, without reading it.

    Raises:
        OSError: If there is no such file.
    """
    if content is not None:
        return {"bytes": content.size, "mtime_ns": content.modified_ns, "etag": content.etag}
    if isinstance(file, Location):
        return {"bytes": file.size, "mtime_ns": file.modified_ns, "etag": file.etag}
    status = file.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "etag": None}
