"""Results as Parquet part files: the format, and its reader.

A store is a folder with

- `_run-*.json`, one for all runs with the same settings: settings, classes, versions; see `store_runs`
- `part-*.parquet`: rows, written once and never changed; the name begins with the number of the part
- `_parts-*.jsonl`: checksums of the parts; see `store_manifest`

Rows of later parts replace those of earlier parts for the same image; what somebody decided about an object replaces
what a run found. Schema version 3; the kind of a row decides which columns are filled:

| column | type | |
|---|---|---|
| `kind` | string | `image` (processed), `object` (of the image above), `edit`, `skipped`, `video` (complete) |
| `file` | string | name relative to the input, with `/`; of frames `clip.mp4/000012` or `folder/000012.jpg` |
| `path` | string | absolute path of the file, or its address, without credentials; null for cameras and streams |
| `digest` | string | SHA-256 of the file; of a folder of frames, that of their digests |
| `bytes` | int64 | size of the file; of a folder of frames, that of the first one |
| `mtime_ns` | int64 | when it was changed last, nanoseconds since 1970; if both are still the same, so is the digest |
| `take` | string | of frames and `video` rows: id of the take, one pass through the video, that they belong to |
| `fingerprint` | string | of the settings of the run that wrote the row, see `store_runs.fingerprint` |
| `video` | string | name of the video that a frame belongs to |
| `frame` | int64 | frame number; of a `video` row, how many frames were stored |
| `time_s` | float64 | seconds from the start of the video |
| `width` | int32 | pixels |
| `height` | int32 |  |
| `objects` | int32 | of an image: how many `object` rows follow it |
| `reason` | string | of a skipped file; of a rejected object, what it looks like |
| `class_id` | int32 | index into the classes of the run; null in `edit` rows |
| `class` | string |  |
| `score` | float32 | 0 to 1 |
| `mask_score` | float32 | the segmenter's estimate of IoU; null for masks that somebody drew |
| `verify_score` | float32 | whether the object is what its class says, by the verifier; null without one |
| `presence` | string | of an image, JSON: by class the probability that it shows one at all, if a model estimated it |
| `x1`, `y1`, `x2`, `y2` | float32 | box in pixels, right and bottom exclusive |
| `area` | int64 | pixels of the mask |
| `counts` | string | mask as compressed COCO RLE, of the image's height and width |
| `tracker_id` | int64 | in a video, one per object |
| `record` | string | JSON: what a COCO file says besides, such as ids, licenses, attributes and `iscrowd` |
| `object_id` | string | id of the object, see `store_objects.object_ids`; derived where a store of version 1 has none |
| `status` | string | `predicted`; of an `edit` also `accepted`, `rejected`, `edited`, `added` |
| `author` | string | of an `edit`: who decided |
| `edited_at` | string | when, ISO 8601 in UTC |
| `predicted_class` | string | class that the object had before anybody changed it; null if it was added |
| `detector_scores` | string | JSON: the score of each detector, by name, if there are several |
| `etag` | string | of an object under an address: its entity tag, checksum or version; changes with it |

Any Parquet reader opens the folder: `pandas.read_parquet("store")`, DuckDB, `pyarrow.dataset`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from grounded_sam.errors import ConfigError
from grounded_sam.files import store_path
from grounded_sam.formats.store_files import StoredFile, StoredFiles
from grounded_sam.formats.store_index import RowIndex, StoreIndex, video_key
from grounded_sam.formats.store_objects import detections_from_rows, in_vocabulary, read_presence, read_record
from grounded_sam.formats.store_pixels import StoredPixels, StoredVideo
from grounded_sam.formats.store_rows import StoreRows
from grounded_sam.formats.store_runs import StoreRun
from grounded_sam.media.files import is_video_file
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.output.paths import OutputPath
from grounded_sam.remote import Location
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary


@overload
def find_store(path: Path) -> Path: ...


@overload
def find_store(path: str | OutputPath) -> OutputPath: ...


def find_store(path: str | OutputPath) -> OutputPath:
    """Return the folder of a store.

    Args:
        path: The folder itself, or the output folder that contains it as `store`; on this machine or at an address.

    Raises:
        ConfigError: If neither is a store.
    """
    folder = store_path(path)
    for candidate in (folder, folder / "store"):
        if any(candidate.glob("_run-*.json")):
            return candidate
    raise ConfigError(
        f"no store in {path}: expected a folder with _run-*.json and part-*.parquet, as sink=store writes"
    )


class StoreReader:
    """Read the results in a store. Rows and pixels are read when they are needed; see `StoreRows` for the rows alone.

    Of a video that was processed several times, the newest complete pass counts. Objects that somebody rejected are
    left out.

    Args:
        folder: Folder of the store; may be missing or empty.
        max_pixels: Larger images are refused before they are decoded.
        root: Folder or address of the images, if they were moved; their names are relative to it.
        roots: Addresses below which addresses of the store may be opened; see `store_files`.
        classes: Classes that objects may have, besides those of the runs.
        set_aside: Leave out parts that are damaged, and name them in `lost_parts`, instead of raising an error.
        is_read: Whether to read the store; otherwise it is taken for an empty one.

    Raises:
        ConfigError: If the store is of a later version, or one of its files is damaged; the message names it.

    Attributes:
        rows: The rows, with what people decided.
        parts: The part files in the order in which they were written.
        missing_parts: Names of parts that were written and are gone.
    """

    def __init__(
        self,
        folder: OutputPath,
        max_pixels: int = MAX_PIXELS,
        root: str | None = None,
        classes: Iterable[str] = (),
        *,
        roots: Iterable[str] = (),
        set_aside: bool = False,
        is_read: bool = True,
    ) -> None:
        self.folder, self.max_pixels = folder, max_pixels
        self._files = StoredFiles(root, roots)
        self.rows = StoreRows(folder, max_pixels, classes, set_aside=set_aside, is_read=is_read)

    @property
    def _index(self) -> StoreIndex:
        """Where everything is, as of the last `refresh`."""
        return self.rows.index

    @property
    def parts(self) -> list[OutputPath]:
        """The part files; see the class."""
        return self.rows.parts

    @property
    def missing_parts(self) -> list[str]:
        """Parts that are gone; see the class."""
        return self.rows.missing_parts

    def refresh(self) -> None:
        """Read what was written since the store was opened, such as decisions of other processes.

        Raises:
            ConfigError: As for the constructor.
        """
        self.rows.refresh()

    def __len__(self) -> int:
        """Return the number of images and frames."""
        return len(self._index.images) + sum(len(video.frames) for video in self._index.videos.values())

    @property
    def vocabulary(self) -> Vocabulary:
        """Classes of all runs that wrote into the store, followed by those that only people gave to objects."""
        return self.rows.vocabulary

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Files that could not be used, or not completely, when they were last tried; by name."""
        return self._index.skipped()

    def find(self, name: str, digest: str, path: str | None = None) -> str | None:
        """Return the key, for `read`, of an image or of a complete video; None if it is not stored with this content.

        Args:
            name: Name of the image or video.
            digest: Digest of its files, see `store_runs.file_digest`.
            path: Path of the image, as stored, which an input of another folder names differently.
        """
        return self._index.find(name, digest, path)

    def has_name(self, name: str, path: str) -> bool:
        """Return whether an image or video of this name or path is stored, with whatever content."""
        return self._index.has_name(name, path)

    def find_unchanged(self, name: str, path: str, state: int | None) -> str | None:
        """Return the key of an image or of a complete video whose file is still the same; None if that is not sure.

        Args:
            name: Name of the image or video.
            path: Path of its file, as stored.
            state: State of its file, see `store_index.file_state`.
        """
        return self._index.find_unchanged(name, path, state)

    def run_of(self, key: str) -> StoreRun | None:
        """Return the run that computed an image or video; None if its `_run-*.json` is gone."""
        return self.rows.runs.get(self.rows.fingerprint(key)[:16])

    def keys(self) -> Iterator[str]:
        """Yield the keys for `read`: images in natural order of their names, then videos."""
        return self._index.sorted_keys()

    def name(self, key: str) -> str:
        """Return the name of an image or video, as it is stored.

        Args:
            key: One of `keys()`.
        """
        index = self._index
        return index.images[key].name if key in index.images else index.video_names[key]

    def lost_parts(self, rerun: bool = False) -> list[Skipped]:
        """Return a note for each part that is missing, or damaged and set aside.

        Args:
            rerun: Whether this is the run that processes their images again.
        """
        if rerun:
            missing = "a part of the store that was missing; its images were processed again if they are in the input"
            damaged = "its images were processed again if they are in the input, so delete it"
        else:
            missing = "a part of the store that is missing, with its images; run the command that made the store again"
            damaged = "its images are left out; run the command that made the store again, and delete this part"
        notes = [Skipped(name, missing) for name in self.missing_parts]
        for name, reason in self.rows.damaged_parts.items():
            notes.append(Skipped(name, f"a part that cannot be read ({reason}); {damaged}"))
        return notes

    def count(self, key: str) -> int:
        """Return how many results `read` yields."""
        return 1 if key in self._index.images else len(self._index.videos[key].frames)

    def read(self, key: str, vocabulary: Vocabulary, files: Sequence[Path | Location] = ()) -> Iterator[FrameResult]:
        """Yield the result of an image, or those of the frames of a video, as people left them.

        Args:
            key: One of `keys()`.
            vocabulary: Classes that `class_id` refers to; objects of other classes are left out.
            files: Files of the image or video now, if they are known.
        """
        if key in self._index.images:
            yield self._result(key, self._index.images[key].index, vocabulary, files, None)
            return
        frames, video = self._index.videos[key].frames, StoredVideo(self.max_pixels)
        for number in sorted(frames):
            yield self._result(key, frames[number], vocabulary, files, video)

    def read_frame(self, key: str, number: int, vocabulary: Vocabulary) -> FrameResult:
        """Return the result of one frame of a video.

        Args:
            key: Key of the video.
            number: Number of the frame, of those that are stored.
            vocabulary: Classes that `class_id` refers to; objects of other classes are left out.
        """
        index = self._index.videos[key].frames[number]
        return self._result(key, index, vocabulary, (), StoredVideo(self.max_pixels))

    def path_of(self, key: str) -> str | None:
        """Return the path of an image, or of the first frame of a video, as it is stored; None for cameras.

        Args:
            key: One of `keys()`.
        """
        path: str | None = self._first_row(key)["path"]
        return path

    def file_problem(self, key: str) -> str | None:
        """Return why the file of an image or video is not the one that was processed; None if it is, or was a camera.

        The file is read only if its size or time of change are other ones. Folders of frames are not compared, nor are
        files that were not there when their labels were stored.

        Args:
            key: One of `keys()`.
        """
        file = self.stored_file(key)
        return None if file is None else file.problem()

    def stored_file(self, key: str) -> StoredFile | None:
        """Return the file of an image or video, to find out whether it has changed; None where that is not known.

        Args:
            key: One of `keys()`.
        """
        row = self._first_row(key)
        file = self._files.find(row, ())
        if file.place is None or (row["video"] is not None and not is_video_file(file.place)):
            return None
        return file

    def _first_row(self, key: str) -> dict[str, Any]:
        """Return the row of an image, or of the first frame of a video."""
        index = self._index
        return self.rows.row(
            index.images[key].index if key in index.images else min(index.videos[key].frames.items())[1]
        )

    def _result(
        self,
        key: str,
        index: RowIndex,
        vocabulary: Vocabulary,
        files: Sequence[Path | Location],
        video: StoredVideo | None,
    ) -> FrameResult:
        """Make the result of an image from its row and the rows of its objects."""
        image, objects = self.rows.rows_at(key, index)
        size_hw = (image["height"], image["width"])
        file = self._files.find(image, files)
        owner, name = self.rows.owner_and_name(key, image)
        frame = Frame(
            pixels=StoredPixels(image["file"], file, image["frame"], size_hw, self.max_pixels, video),
            index=image["frame"] if image["frame"] is not None else 0,
            name=name,
            time_s=image["time_s"],
            video=None if image["video"] is None else owner,
            file=file.place,
            size=size_hw,
            record=read_record(image),
        )
        tracked = image["video"] is not None
        detections = detections_from_rows(in_vocabulary(objects, vocabulary), size_hw, vocabulary, tracked)
        if (presence := read_presence(image)) is not None:
            detections.metadata["presence"] = presence
        return FrameResult(frame=frame, detections=detections, stored=True)

    def named(self, frame: Frame, path: str | None) -> Frame:
        """Return a frame under a name that no other file of the store has.

        A file keeps the name that it got first. A file of another folder with the same name gets a number.

        Args:
            frame: A frame that is not stored yet.
            path: Path of its file, as stored.
        """
        if frame.video is None:
            return renamed(frame, self.rows.names(path or frame.name, frame.name))
        return renamed(frame, self.rows.names(video_key(path, frame.video), frame.video))


def renamed(frame: Frame, name: str) -> Frame:
    """Return a frame with another name of its image or video."""
    if name == (frame.video or frame.name):
        return frame
    if frame.video is None:
        return replace(frame, name=name)
    return replace(frame, name=f"{name}/{frame.name.removeprefix(f'{frame.video}/')}", video=name)
