"""Results as Parquet part files: the format, and its reader.

A store is a folder with

- `_run-*.json`, one for all runs with the same settings: settings, classes, versions; see `store_runs`
- `part-*.parquet`: rows, written once and never changed; the name begins with the number of the part
- `_parts-*.jsonl`: checksums of the parts; see `store_manifest`

Rows of later parts replace those of earlier parts for the same image. Schema version 1; the kind of a row decides which
columns are filled:

| column | type | |
|---|---|---|
| `kind` | string | `image` (processed), `object` (in the image row above), `skipped` (unusable), `video` (completed) |
| `file` | string | name relative to the input, with `/`; of frames `clip.mp4/000012` or `folder/000012.jpg` |
| `path` | string | absolute path of the file; null for cameras and streams |
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
| `reason` | string | of a skipped file |
| `class_id` | int32 | index into the classes of the run |
| `class` | string |  |
| `score` | float32 | 0 to 1 |
| `mask_score` | float32 | the segmenter's estimate of IoU |
| `x1`, `y1`, `x2`, `y2` | float32 | box in pixels, right and bottom exclusive |
| `area` | int64 | pixels of the mask |
| `counts` | string | mask as compressed COCO RLE, of the image's height and width |
| `tracker_id` | int64 | in a video, one per object |
| `record` | string | JSON: what a COCO file says besides, such as ids, licenses, attributes and `iscrowd` |

Any Parquet reader opens the folder: `pandas.read_parquet("store")`, DuckDB, `pyarrow.dataset`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.files import home_path
from grounded_sam.formats.segmentations import all_counts_problem
from grounded_sam.formats.store_checks import CHECKED_COLUMNS, changed_file, table_problem
from grounded_sam.formats.store_manifest import Manifest, sequence_of
from grounded_sam.formats.store_pixels import StoredPixels, StoredVideo
from grounded_sam.formats.store_runs import VERSION, StoreRun, runs_by_fingerprint, store_vocabulary
from grounded_sam.media.files import common_folder, is_video_file, natural_key
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.structures.detections import empty_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import with_rles
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary

#: Columns of the part files.
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("kind", "file", "path", "digest", "fingerprint", "video", "take")),
        ("frame", pa.int64()),
        ("time_s", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("objects", pa.int32()),
        ("reason", pa.string()),
        ("class_id", pa.int32()),
        ("class", pa.string()),
        ("score", pa.float32()),
        ("mask_score", pa.float32()),
        *((name, pa.float32()) for name in ("x1", "y1", "x2", "y2")),
        ("area", pa.int64()),
        ("counts", pa.string()),
        ("tracker_id", pa.int64()),
        ("record", pa.string()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
    ],
    metadata={"grounded_sam.schema": str(VERSION)},
)
#: Number of parts that a reader keeps in memory; the rows of shards interleave, so several are in use at a time.
MAX_CACHED_PARTS = 16


def find_store(path: str | Path) -> Path:
    """Return the folder of a store.

    Args:
        path: The folder itself, or the output folder that contains it as `store`.

    Raises:
        ConfigError: If neither is a store.
    """
    folder = home_path(path)
    for candidate in (folder, folder / "store"):
        if any(candidate.glob("_run-*.json")):
            return candidate
    raise ConfigError(
        f"no store in {path}: expected a folder with _run-*.json and part-*.parquet, as sink=store writes"
    )


@dataclass(frozen=True, slots=True)
class _RowIndex:
    """Part and row of an image."""

    part: int
    row: int


@dataclass(frozen=True)
class _StoredImage:
    """An image: where its row is, the digest of its file, its name, and the fingerprint of its run."""

    index: _RowIndex
    digest: str | None
    name: str
    fingerprint: str


@dataclass
class _VideoPass:
    """One pass through a video, a `take` in the part files; complete once it has a `video` row."""

    digest: str | None = None
    fingerprint: str = ""
    complete: bool = False
    frames: dict[int, _RowIndex] = field(default_factory=dict)


class StoreReader:
    """Read a store. Only an index of its images is kept in memory; rows and pixels are read when they are needed.

    Of a video that was processed several times, the newest complete pass counts.

    Args:
        folder: Folder of the store; may be missing or empty.
        max_pixels: Larger images are refused before they are decoded.
        root: Folder of the images, if they were moved; their names are relative to it.
        classes: Classes that objects may have, besides those of the runs.

    Raises:
        ConfigError: If the store is of a later version, or one of its files is damaged; the message names it.

    Attributes:
        parts: The part files in the order in which they were written.
        missing_parts: Names of parts that were written and are gone.
    """

    def __init__(
        self,
        folder: Path,
        max_pixels: int = MAX_PIXELS,
        root: str | None = None,
        classes: Iterable[str] = (),
    ) -> None:
        self.folder, self.max_pixels, self.root = folder, max_pixels, root
        self._runs = runs_by_fingerprint(folder)  # checks the version
        self._classes = {name for run in self._runs.values() for name in run.vocabulary.classes} | set(classes)
        self._manifest = Manifest(folder)
        self.missing_parts = self._manifest.missing
        self.parts = sorted(folder.glob("part-*.parquet"), key=lambda part: (sequence_of(part), part.name))
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._images: dict[str, _StoredImage] = {}  # by path, or by name where there is none
        self._video_names: dict[str, str] = {}  # by video key
        self._first_names: dict[str, str] = {}  # by path or video key: the name that it was first stored with
        self._skipped: dict[str, tuple[Skipped, str | None]] = {}  # by name: record and digest
        passes: dict[str, dict[str, _VideoPass]] = {}  # by video key and id of the pass, the latest last
        for number, part in enumerate(self.parts):
            self._index_part(number, part, passes)
        self._videos: dict[str, _VideoPass] = {}  # by video key
        for key, by_id in passes.items():
            newest = list(by_id.values())[::-1]
            self._videos[key] = next((video for video in newest if video.complete), newest[0])
        self._keys_by_name: dict[str, list[str]] = {}
        for key, image in self._images.items():
            self._keys_by_name.setdefault(image.name, []).append(key)
        for key, name in self._video_names.items():
            self._keys_by_name.setdefault(name, []).append(key)
        self._names = _UniqueNames(self._first_names)
        for name, (_, digest) in list(self._skipped.items()):
            self._reconcile_skipped(name, digest)

    def _index_part(self, number: int, part: Path, passes: dict[str, dict[str, _VideoPass]]) -> None:
        """Add the images, videos and skipped files of a part to the index."""
        columns = ["kind", "file", "path", "digest", "video", "take", "frame", "reason", "fingerprint"]
        table = self._read_part(part, sorted({*columns, *CHECKED_COLUMNS}))
        if (reason := table_problem(table, self._classes, self.max_pixels)) is not None:
            raise self._damaged(part, reason)
        rows = np.flatnonzero(np.asarray(table["kind"]) != "object")
        values = table.take(rows).to_pydict()
        for row, kind, file, path, digest, video, pass_id, frame, reason, run in zip(
            rows.tolist(), *(values[name] for name in columns), strict=True
        ):
            if kind == "skipped":
                self._skipped[file] = (Skipped(file, reason), digest)
            elif kind == "image" and video is None:
                self._skipped.pop(file, None)
                self._first_names.setdefault(path or file, file)
                self._images[path or file] = _StoredImage(_RowIndex(number, row), digest, file, sys.intern(run or ""))
            else:
                key = _video_key(path, video)
                self._video_names[key] = video
                self._first_names.setdefault(key, video)
                video_pass = passes.setdefault(key, {}).setdefault(pass_id, _VideoPass(digest, run or ""))
                if kind == "video":
                    video_pass.complete = True
                else:
                    video_pass.frames[frame] = _RowIndex(number, row)

    def _read_part(self, part: Path, columns: list[str] | None = None) -> pa.Table:
        """Read a part, and compare it with its checksums."""
        try:
            content = pa.BufferReader(self._manifest.read(part))
            return pq.read_table(content, columns=columns, schema=SCHEMA, page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(part, " ".join(str(error).split())[:200]) from error

    def _damaged(self, part: Path, reason: str) -> ConfigError:
        return ConfigError(
            f"{part} cannot be read ({reason}); delete it, and its images are processed again when the command that "
            "made the store is run again"
        )

    def _reconcile_skipped(self, name: str, digest: str | None) -> None:
        """Drop the results of an image that was skipped after its content had changed.

        Or drop the skip record of a video that was since processed with new content.
        """
        for key in self._keys_by_name.get(name, ()):
            if key in self._images and digest is not None and self._images[key].digest != digest:
                del self._images[key]
            elif key in self._videos and self._videos[key].complete and self._videos[key].digest != digest:
                self._skipped.pop(name, None)

    def __len__(self) -> int:
        """Return the number of images and frames."""
        return len(self._images) + sum(len(video.frames) for video in self._videos.values())

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Classes of all runs that wrote into the store."""
        return store_vocabulary(self.folder)

    @cached_property
    def skipped(self) -> dict[str, Skipped]:
        """Files that could not be used, or not completely, when they were last tried; by name."""
        return {name: skipped for name, (skipped, _) in self._skipped.items()}

    def find(self, name: str, digest: str, path: str | None = None) -> str | None:
        """Return the key, for `read`, of an image or of a complete video; None if it is not stored with this content.

        Args:
            name: Name of the image or video.
            digest: Digest of its files, see `store_runs.file_digest`.
            path: Path of the image, as stored, which an input of another folder names differently.
        """
        for key in (*self._keys_by_name.get(name, ()), path):
            if key in self._images and self._images[key].digest == digest:
                return key
            if key in self._videos and self._videos[key].complete and self._videos[key].digest == digest:
                return key
        return None

    def run_of(self, key: str) -> StoreRun | None:
        """Return the run that computed an image or video; None if its `_run-*.json` is gone."""
        stored = self._images[key] if key in self._images else self._videos[key]
        return self._runs.get(stored.fingerprint[:16])

    def keys(self) -> Iterator[str]:
        """Yield the keys for `read`: images in natural order of their names, then videos."""
        yield from sorted(self._images, key=lambda key: (natural_key(self._images[key].name), key))
        videos = [key for key, video in self._videos.items() if video.frames]
        yield from sorted(videos, key=lambda key: (natural_key(self._video_names[key]), key))

    def name(self, key: str) -> str:
        """Return the name of an image or video.

        Args:
            key: One of `keys()`.
        """
        return self._images[key].name if key in self._images else self._video_names[key]

    def lost_parts(self) -> list[Skipped]:
        """Return a note for each part that is missing."""
        reason = "a part of the store that is missing, with its images; run the command that made the store again"
        return [Skipped(name, reason) for name in self.missing_parts]

    def count(self, key: str) -> int:
        """Return how many results `read` yields."""
        return 1 if key in self._images else len(self._videos[key].frames)

    def read(self, key: str, vocabulary: Vocabulary, files: Sequence[Path] = ()) -> Iterator[FrameResult]:
        """Yield the result of an image, or those of the frames of a video.

        Args:
            key: One of `keys()`.
            vocabulary: Classes that `class_id` refers to; objects of other classes are left out.
            files: Files of the image or video now, if they are known.
        """
        if key in self._images:
            yield self._result(key, self._images[key].index, vocabulary, files, None)
            return
        frames, video = self._videos[key].frames, StoredVideo(self.max_pixels)
        for number in sorted(frames):
            yield self._result(key, frames[number], vocabulary, files, video)

    def file_problem(self, key: str) -> str | None:
        """Return why the file of an image or video is not the one that was processed; None if it is, or was a camera.

        The file is read only if its size or time of change are other ones. Folders of frames are not compared, nor are
        files that were not there when their labels were stored.

        Args:
            key: One of `keys()`.
        """
        index = self._images[key].index if key in self._images else min(self._videos[key].frames.items())[1]
        row = self._table(index.part).slice(index.row, 1).to_pylist()[0]
        path = _row_file(row, (), self.root)
        if path is None or (row["video"] is not None and not is_video_file(path)):
            return None
        return changed_file(row, path)

    def _table(self, part: int) -> pa.Table:
        """Return the rows of a part, read anew if they are not among those last used."""
        if part not in self._tables:
            self._tables[part] = self._read_part(self.parts[part]).combine_chunks()
            while len(self._tables) > MAX_CACHED_PARTS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(part)
        return self._tables[part]

    def _result(
        self, key: str, index: _RowIndex, vocabulary: Vocabulary, files: Sequence[Path], video: StoredVideo | None
    ) -> FrameResult:
        """Make the result of an image from its row and the object rows below it."""
        table = self._table(index.part)
        image = table.slice(index.row, 1).to_pylist()[0]
        size_hw = (image["height"], image["width"])
        objects = table.slice(index.row + 1, image["objects"]).to_pylist() if image["objects"] else []
        counts = [row["counts"] for row in objects if row["counts"] is not None]
        if (reason := all_counts_problem(counts, size_hw[0] * size_hw[1])) is not None:
            raise self._damaged(self.parts[index.part], f"{image['file']}: {reason}")
        known = ((row, vocabulary.index(row["class"])) for row in objects)
        objects = [{**row, "class_id": i, "class": vocabulary.classes[i]} for row, i in known if i is not None]
        path = _row_file(image, files, self.root)
        name = self._names(key, image["video"] or image["file"])
        frame = Frame(
            pixels=StoredPixels(image["file"], path, image["frame"], size_hw, self.max_pixels, video),
            index=image["frame"] if image["frame"] is not None else 0,
            name=name if image["video"] is None else f"{name}/{_in_video(image)}",
            time_s=image["time_s"],
            video=None if image["video"] is None else name,
            file=None if path is None else Path(path),
            size=size_hw,
            record=_read_record(image),
        )
        detections = _to_detections(objects, size_hw, vocabulary, tracked=image["video"] is not None)
        return FrameResult(frame=frame, detections=detections, stored=True)

    def named(self, frame: Frame, path: str | None) -> Frame:
        """Return a frame under a name that no other file of the store has.

        A file keeps the name that it got first. A file of another folder with the same name gets a number.

        Args:
            frame: A frame that is not stored yet.
            path: Path of its file, as stored.
        """
        if frame.video is None:
            name = self._names(path or frame.name, frame.name)
            return frame if name == frame.name else replace(frame, name=name)
        video = self._names(_video_key(path, frame.video), frame.video)
        if video == frame.video:
            return frame
        return replace(frame, name=f"{video}/{frame.name.removeprefix(f'{frame.video}/')}", video=video)


def _video_key(path: str | None, name: str) -> str:
    """Return a key that tells videos of the same name apart: by their file, or the folder of their frames."""
    return f"{path if path is None or is_video_file(path) else Path(path).parent}\n{name}"


def _row_file(row: Mapping[str, Any], files: Sequence[Path], root: str | None) -> str | None:
    """Return the file of an image row: among `files`, else under `root`, else where it was."""
    path: str | None = row["path"]
    if len(files) == 1:
        return str(files[0])
    if files:
        return str(common_folder(list(files)) / _in_video(row))
    if path is None or root is None:
        return path
    moved = home_path(root) / (row["video"] if is_video_file(path) else row["file"])
    in_root = home_path(root) / _in_video(row)  # the folder of the frames itself
    return str(in_root if row["video"] is not None and not moved.exists() and in_root.exists() else moved)


def _in_video(row: Mapping[str, Any]) -> str:
    """Return the name of a row without that of its video, which stores of earlier versions leave out."""
    return str(row["file"]) if row["video"] is None else str(row["file"]).removeprefix(f"{row['video']}/")


class _UniqueNames:
    """Names of images and videos, no two the same: the first one of a name keeps it, later ones get a number.

    Args:
        named: Name of each image and video by its key, in the order in which they were stored.
    """

    def __init__(self, named: Mapping[str, str]) -> None:
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()
        for key, name in named.items():
            self(key, name)

    def __call__(self, key: str, name: str) -> str:
        """Return the name for a key; `name` itself unless another key has it."""
        if key not in self._names:
            stem, ending = os.path.splitext(name)
            unique, count = name, 1
            while unique in self._taken:
                count += 1
                unique = f"{stem}-{count}{ending}"
            self._names[key] = unique
            self._taken.add(unique)
        return self._names[key]


def _read_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the `record` of a row; empty if there is none, or it is no JSON object."""
    try:
        record = json.loads(row["record"] or "{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _to_detections(
    rows: list[dict[str, Any]], size_hw: tuple[int, int], vocabulary: Vocabulary, tracked: bool
) -> sv.Detections:
    """Convert object rows to detections with masks as RLE."""
    if not rows:
        empty = empty_detections(vocabulary)
        empty.tracker_id = np.empty(0, np.int64) if tracked else None
        return empty
    ids = [row["tracker_id"] for row in rows]
    data: dict[str, Any] = {"class_name": np.array([row["class"] for row in rows], dtype=str)}
    if any(row["record"] is not None for row in rows):
        records = [_read_record(row) for row in rows]
        data["iscrowd"] = np.array([bool(record.pop("iscrowd", False)) for record in records])
        data["ignore"] = data["iscrowd"] | np.array([bool(record.get("ignore")) for record in records])
        data["record"] = np.empty(len(rows), object)
        data["record"][:] = records
    if all(row["mask_score"] is not None for row in rows):
        data["mask_score"] = np.array([row["mask_score"] for row in rows], np.float32)
    detections = sv.Detections(
        xyxy=np.array([[row[k] for k in ("x1", "y1", "x2", "y2")] for row in rows], np.float32),
        confidence=np.array([row["score"] for row in rows], np.float32),
        class_id=np.array([row["class_id"] for row in rows], np.int64),
        tracker_id=None if None in ids else np.array(ids, np.int64),
        data=data,
    )
    counts = [row["counts"] for row in rows]
    if None in counts:
        return detections
    return with_rles(detections, [{"size": list(size_hw), "counts": text.encode()} for text in counts])
