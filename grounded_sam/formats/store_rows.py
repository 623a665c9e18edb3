"""The rows of a store: those that runs wrote, with what people decided about them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from grounded_sam.errors import ConfigError, MissingObjectError, RemoteError
from grounded_sam.formats.segmentations import all_counts_problem
from grounded_sam.formats.store_checks import CHECKED_COLUMNS, table_problem
from grounded_sam.formats.store_files import name_in_video
from grounded_sam.formats.store_index import INDEX_COLUMNS, RowIndex, StoreIndex, video_key
from grounded_sam.formats.store_manifest import Manifest, sequence_of
from grounded_sam.formats.store_objects import Row, merge_decisions, owner_id, with_object_ids
from grounded_sam.formats.store_runs import runs_by_fingerprint, store_vocabulary
from grounded_sam.formats.store_schema import SCHEMA
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.output.paths import OutputPath, RemotePath
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary

#: Number of parts that are kept in memory; the rows of shards interleave, so several are in use at a time.
MAX_CACHED_PARTS = 16
#: Number of parts at an address that are read at a time.
READ_AHEAD = 8


class DamagedPartError(ConfigError):
    """Raised for a part that cannot be used.

    Args:
        part: The part.
        reason: Why.

    Attributes:
        reason: As above.
    """

    def __init__(self, part: OutputPath, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"{part} cannot be read ({reason}); delete it, and its images are processed again when the command that "
            "made the store is run again"
        )


def read_ahead(read: Callable[[OutputPath], bytes], parts: Sequence[OutputPath]) -> Iterator[Callable[[], bytes]]:
    """Yield for each part a function that returns its content; at an address, several parts are read ahead."""
    if not parts or not isinstance(parts[0], RemotePath):
        yield from (partial(read, part) for part in parts)
        return
    with ThreadPoolExecutor(READ_AHEAD, "parts") as pool:
        ahead: deque[Future[bytes]] = deque()
        for part in parts:
            ahead.append(pool.submit(read, part))
            if len(ahead) >= READ_AHEAD:
                yield ahead.popleft().result
        yield from (future.result for future in ahead)


class StoreRows:
    """Read the rows of a store. Only an index of its images is kept in memory.

    Args:
        folder: Folder of the store; may be missing or empty.
        max_pixels: A store with larger images is refused.
        classes: Classes that objects may have, besides those of the runs.
        set_aside: Leave out parts that are damaged, and list them in `damaged_parts`, instead of raising an error.
        is_read: Whether to read the store; otherwise it is taken for an empty one.

    Raises:
        ConfigError: If the store is of a later version, or one of its files is damaged; the message names it.

    Attributes:
        parts: The part files in the order in which they were written.
        missing_parts: Names of parts that were written and are gone.
        damaged_parts: Why parts cannot be used, by their name; empty unless `set_aside`.
        known_lost: Names of parts that were missing or damaged when a run processed their images again.
        runs: Runs by the first 16 digits of their fingerprint.
        index: Where images, videos and decisions are.
        names: Function from key and stored name of an image or video to its name, which no other one has.
        vocabulary: Classes of all runs that wrote into the store, followed by those that only people gave to objects;
            None if there is no run.
    """

    def __init__(
        self,
        folder: OutputPath,
        max_pixels: int = MAX_PIXELS,
        classes: Iterable[str] = (),
        *,
        set_aside: bool = False,
        is_read: bool = True,
    ) -> None:
        self.folder, self.max_pixels, self.set_aside, self.is_read = folder, max_pixels, set_aside, is_read
        self._more_classes = set(classes)
        self.parts: list[OutputPath] = []
        self.damaged_parts: dict[str, str] = {}
        self._listed: list[OutputPath] = []
        self._is_finished = False
        self.refresh()

    def refresh(self) -> None:
        """Read what was written since the store was opened, such as decisions of other processes.

        Raises:
            ConfigError: As for the constructor.
        """
        self.runs = runs_by_fingerprint(self.folder) if self.is_read else {}  # checks the version
        self._classes = {name for run in self.runs.values() for name in run.vocabulary.classes} | self._more_classes
        parts: list[OutputPath] = list(self.folder.glob("part-*.parquet")) if self.is_read else []
        parts.sort(key=lambda part: (sequence_of(part), part.name))
        self._manifest = Manifest(self.folder if self.is_read else None, {part.name for part in parts})
        self.missing_parts = self._manifest.missing
        self.known_lost = self._manifest.lost
        if not self._listed or parts[: len(self._listed)] != self._listed:
            self.parts, self.damaged_parts, self._listed = [], {}, []
            self.index, self._is_finished = StoreIndex(), False
            self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        new = parts[len(self._listed) :]
        for part, content in zip(new, read_ahead(self._manifest.read, new), strict=True):
            try:
                self._index_part(part, content)
            except DamagedPartError as error:
                if not self.set_aside:
                    raise
                self.damaged_parts[part.name] = error.reason
            self._listed.append(part)
        self._vocabulary: Vocabulary | None = None
        if not self._is_finished:
            self.names, self._is_finished = self.index.finish(), True
            self._keys_by_owner: dict[str, list[str]] | None = None

    def _index_part(self, part: OutputPath, content: Callable[[], bytes]) -> None:
        """Check a part and add it to the index."""
        table = self._read_part(part, content, sorted({*INDEX_COLUMNS, *CHECKED_COLUMNS}))
        if (reason := table_problem(table, self._classes, self.max_pixels)) is not None:
            raise DamagedPartError(part, reason)
        if self.index.add(len(self.parts), table):
            self._is_finished = False
        self.parts.append(part)

    def _read_part(self, part: OutputPath, content: Callable[[], bytes], columns: list[str] | None = None) -> pa.Table:
        """Read a part, and compare it with its checksums."""
        options = {"columns": columns, "schema": SCHEMA, "page_checksum_verification": True}
        try:
            return pq.read_table(pa.BufferReader(content()), **options)
        except RemoteError as error:
            if not isinstance(error, MissingObjectError):  # of the server, not of the part
                raise
            raise DamagedPartError(part, "no such object") from error
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DamagedPartError(part, " ".join(str(error).split())[:200]) from error

    @property
    def vocabulary(self) -> Vocabulary:
        """Classes of all runs, and those that only people gave to objects; see the class."""
        if self._vocabulary is None:
            self._vocabulary = store_vocabulary(self.folder).with_classes(list(self.index.added_classes))
        return self._vocabulary

    def runs_in_use(self) -> set[str]:
        """Return the first 16 digits of the fingerprints of the runs whose results are not replaced by later ones."""
        return {self.fingerprint(key)[:16] for key in (*self.index.images, *self.index.videos)}

    def fingerprint(self, key: str) -> str:
        """Return the fingerprint of the run that computed an image or video.

        Args:
            key: One of `index.sorted_keys()`.
        """
        index = self.index
        return (index.images[key] if key in index.images else index.videos[key]).fingerprint

    def row(self, index: RowIndex) -> Row:
        """Return one row."""
        return dict(self._table(index.part).slice(index.row, 1).to_pylist()[0])

    def rows(self, key: str) -> Iterator[tuple[Row, list[Row]]]:
        """Yield the row of an image, or of each frame of a video, with the rows of its objects, also of rejected ones.

        Args:
            key: One of `index.sorted_keys()`.

        Raises:
            ConfigError: If a part is damaged.
        """
        if key in self.index.images:
            yield self.rows_at(key, self.index.images[key].index)
            return
        frames = self.index.videos[key].frames
        for number in sorted(frames):
            yield self.rows_at(key, frames[number])

    def rows_at(self, key: str, index: RowIndex) -> tuple[Row, list[Row]]:
        """Return the row of an image or frame, and those of its objects, with what people decided about them.

        Args:
            key: Key of the image or video.
            index: Where its row is.

        Raises:
            ConfigError: If a part is damaged.
        """
        image = self.row(index)
        count = image["objects"]
        objects = self._table(index.part).slice(index.row + 1, count).to_pylist() if count else []
        self._check_counts(index.part, image, objects)
        predicted = with_object_ids(objects, *self.owner_and_name(key, image))
        decisions = self._decisions(key, None if key in self.index.images else image["frame"], image)
        return image, merge_decisions(predicted, decisions, image["fingerprint"], (image["height"], image["width"]))

    def _table(self, part: int) -> pa.Table:
        """Return the rows of a part, read anew if they are not among those last used."""
        if part not in self._tables:
            path = self.parts[part]
            self._tables[part] = self._read_part(path, partial(self._manifest.read, path)).combine_chunks()
            while len(self._tables) > MAX_CACHED_PARTS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(part)
        return self._tables[part]

    def _decisions(self, key: str, frame: int | None, image: Row) -> list[Row]:
        """Return the rows of the latest decisions about the objects of an image, as long as its file is the same."""
        decisions = []
        for index in self.index.decisions.get((key, frame), {}).values():
            row = self.row(index)
            if is_about(row, image):
                self._check_counts(index.part, image, [row])
                decisions.append(row)
        return decisions

    def all_decisions(self, key: str) -> list[Row]:
        """Return the rows of the latest decisions about an image, or about all frames of a video.

        Args:
            key: Key of the image or video, which need not be stored.

        Raises:
            ConfigError: If a part is damaged.
        """
        frames = [place for place in self.index.decisions if place[0] == key] if self.index.decisions else []
        decisions = []
        for index in (index for place in frames for index in self.index.decisions[place].values()):
            row = self.row(index)
            self._check_counts(index.part, row, [row])
            decisions.append(row)
        return decisions

    def decisions_on(self, frame: Frame, path: str | None, digest: str | None) -> list[Row]:
        """Return what people decided about the objects of an image or frame that a run processes again.

        Args:
            frame: The frame, under the name that its file has in the input.
            path: Path of its file, as stored.
            digest: Digest of its file or, for a frame, of its video.
        """
        if not self.index.decisions:
            return []
        key = (path or frame.name) if frame.video is None else video_key(path, frame.video)
        image = {"file": frame.name, "digest": digest, "height": frame.size_hw[0], "width": frame.size_hw[1]}
        return self._decisions(key, None if frame.video is None else frame.index, image)

    def _check_counts(self, part: int, image: Row, objects: Sequence[Row]) -> None:
        """Check the masks of some objects of an image."""
        counts = [row["counts"] for row in objects if row["counts"] is not None]
        if (reason := all_counts_problem(counts, image["height"] * image["width"])) is not None:
            raise DamagedPartError(self.parts[part], f"{image['file']}: {reason}")

    def owner_and_name(self, key: str, image: Row) -> tuple[str, str]:
        """Return the name of an image twice, or the names of a video and of its frame.

        Args:
            key: Key of the image or video.
            image: Row of the image or frame.
        """
        name = self.names(key, image["video"] or image["file"])
        return name, name if image["video"] is None else f"{name}/{name_in_video(image)}"

    def keys_of_owner(self, owner: str) -> list[str]:
        """Return the keys of the images and videos whose objects have ids that begin alike; nearly always at most one.

        Args:
            owner: First part of the ids, see `store_objects.owner_id`.
        """
        if self._keys_by_owner is None:
            self._keys_by_owner = {}
            for key in self.index.sorted_keys():
                self._keys_by_owner.setdefault(owner_id(self.name(key)), []).append(key)
        return self._keys_by_owner.get(owner, [])

    def key_of_name(self, name: str) -> str | None:
        """Return the key of the image or video of a name; None if there is none.

        Args:
            name: Name of an image or video, as in exports.
        """
        return next((key for key in self.keys_of_owner(owner_id(name)) if self.name(key) == name), None)

    def name(self, key: str) -> str:
        """Return the name of an image or video, which no other one of the store has.

        Args:
            key: One of `index.sorted_keys()`.
        """
        index = self.index
        return self.names(key, index.images[key].name if key in index.images else index.video_names[key])


def is_about(decision: Row, image: Row) -> bool:
    """Return whether a decision is about an image with the same content."""
    columns = ("digest", "width", "height")
    return all(decision[column] == image[column] for column in columns)
