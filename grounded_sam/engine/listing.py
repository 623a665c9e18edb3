"""List what is left to do: the items of a source that a store does not have, in units of work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grounded_sam.errors import ConfigError
from grounded_sam.formats.store_share import KnownFile
from grounded_sam.formats.store_writer import StoreWriter
from grounded_sam.remote import Location
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.auto import AutoSource
from grounded_sam.sources.video import VideoList, VideoSource
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.items import SourceItem
from grounded_sam.structures.protocols import ListsItems, Lookup, Source
from grounded_sam.structures.results import FrameResult, Skipped

#: A unit is complete with this many bytes of encoded images, even if it has few of them.
UNIT_BYTES = 64 << 20
#: Reason of what two passes of single images or videos have not survived.
KILLED = "killed its worker each time it was tried; engine.retry_killed=true tries it again"

Part = ListsItems | VideoSource


@dataclass(frozen=True)
class Unit:
    """What a worker gets at a time: images, or one video. It can be pickled.

    Attributes:
        part: Position in `parts_of` of the source of the images.
        items: The images, which are not read yet.
        video: The video; None for images.
        known: What the store knows of them.
    """

    part: int = 0
    items: tuple[SourceItem, ...] = ()
    video: VideoSource | None = None
    known: tuple[KnownFile, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the images, or of the video."""
        return [item.name for item in self.items] if self.video is None else [self.video.name]


def parts_of(source: Source) -> list[Part]:
    """Return the parts of a source: sources of images that can be listed, and single videos.

    Raises:
        ConfigError: If the source cannot be divided between workers.
    """
    parts: list[Part] = []
    for part in source.sources if isinstance(source, AutoSource) else [source]:
        if isinstance(part, VideoList):
            parts += part.videos
        elif isinstance(part, VideoSource | ListsItems):
            parts.append(part)
        else:
            raise ConfigError(
                "engine=ray needs images or videos (source=auto, images or video); others need engine=local"
            )
    if any(isinstance(part, VideoSource) and not part.decoder.files for part in parts):
        raise ConfigError("engine=ray reads files; a camera or stream needs engine=local")
    return parts


def find_stored(
    lookup: Lookup, writer: StoreWriter, name: str, files: Sequence[Path | Location]
) -> Iterable[FrameResult] | None:
    """Return the stored results of an image or video; None for none.

    A file is read only if its size, time or tag differ, and the store has one of its name or path.
    """
    results = lookup(name, files, may_read=False)
    return lookup(name, files) if results is None and writer.has_name(name, files) else results


@dataclass
class Listing:
    """What is left to do, found by one pass through a source.

    Attributes:
        parts: Parts of the source.
        store: The store, opened after the last pass.
        batch: Largest number of images per unit.
        skipped: What was skipped in this run; it is left out.
        retry_killed: Whether what killed its worker in an earlier run is tried again.
        listed: Number of images and videos seen so far.
        resumed: How many of them are stored.
        left_out: What is left out because it killed its worker in an earlier run.
    """

    parts: Sequence[Part]
    store: StoreSink
    batch: int
    skipped: Collection[str] = ()
    retry_killed: bool = False
    listed: int = 0
    resumed: int = 0
    passed: int = 0
    left_out: list[Skipped] = field(default_factory=list)

    @property
    def length(self) -> int | None:
        """Number of images and videos; None where it is not known before all are listed."""
        try:
            return sum(1 if isinstance(part, VideoSource) else len(part) for part in self.parts)  # type: ignore[arg-type,misc]
        except TypeError:
            return None

    @property
    def to_do(self) -> int:
        """Number of images and videos that were found to do so far."""
        return self.listed - self.resumed - self.passed - len(self.left_out)

    def units(self) -> Iterator[Unit]:
        """Yield the units of work as they are found, videos first, those with the largest files before others."""
        videos = [part for part in self.parts if isinstance(part, VideoSource)]
        for video in sorted(videos, key=_bytes_of, reverse=True):
            if self._is_left(video.name, video.decoder.files, may_read=True):
                known = self.store.writer.known(video.name, video.decoder.files, is_video=True)
                yield Unit(video=video, known=() if known is None else (known,))
        for number, part in enumerate(self.parts):
            if not isinstance(part, VideoSource):
                yield from self._image_units(number, part)

    def _image_units(self, number: int, part: ListsItems) -> Iterator[Unit]:
        items: list[SourceItem] = []
        known: list[KnownFile] = []
        size = 0
        for item in part.items():
            if not self._is_left(item.name, [item.place]):
                continue
            items.append(item)
            size += item.size or 0
            if (noted := self.store.writer.known(item.name, [item.place])) is not None:
                known.append(noted)
            if len(items) >= self.batch or size >= UNIT_BYTES:
                yield Unit(number, tuple(items), known=tuple(known))
                items, known, size = [], [], 0
        if items:
            yield Unit(number, tuple(items), known=tuple(known))

    def _is_left(self, name: str, files: Sequence[Path | Location], may_read: bool = False) -> bool:
        """Count an image or video, and return whether it is left to do.

        A video is read here, since its digest, by which it is resumed, is known to no worker.
        """
        self.listed += 1
        if name in self.skipped:
            self.passed += 1
            return False
        lookup, writer = self.store.lookup, self.store.writer
        if (lookup(name, files) if may_read else find_stored(lookup, writer, name, files)) is not None:
            self.resumed += 1
            return False
        note = self.store.writer.note(name)
        if note is not None and note.reason == KILLED and not self.retry_killed:
            self.left_out.append(note)
            return False
        return True


def _bytes_of(video: VideoSource) -> int:
    """Return the size of the files of a video; 0 for those that are gone."""
    return sum(path.stat().st_size for path in video.decoder.files if path.is_file())


class ReplaySource:
    """Yields what a store has of a source, in the order of the source, and decodes nothing.

    Args:
        parts: Parts of the source.
        writer: Writer of the store.
        skipped: What could not be used.

    Attributes:
        skipped: As above.
        found: Number of images and videos that are stored.
        missing: Number of those that are neither stored nor skipped.
    """

    def __init__(self, parts: Sequence[Part], writer: StoreWriter, skipped: Sequence[Skipped]) -> None:
        self.parts, self.writer, self.skipped = parts, writer, list(skipped)
        self.found = self.missing = 0

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)  # type: ignore[arg-type,misc]

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        return iter(())

    def resume(self, lookup: Lookup) -> Iterator[Frame | FrameResult]:
        """Yield the stored results of each image and video that has some."""
        names = {skipped.file for skipped in self.skipped}
        for name, files in self._listed():
            results = find_stored(lookup, self.writer, name, files)
            self.found += results is not None
            self.missing += results is None and name not in names
            yield from results or ()

    def _listed(self) -> Iterator[tuple[str, Sequence[Path | Location]]]:
        """Yield names and files."""
        for part in self.parts:
            if isinstance(part, VideoSource):
                yield part.name, part.decoder.files
            else:
                yield from ((item.name, [item.place]) for item in part.items())
