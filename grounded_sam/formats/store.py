"""What the store holds and how it is read: Parquet part files, written once and never changed.

A store is a folder with

`_run-*.json`    one per setting that wrote into it: fingerprint, settings, classes, versions
`part-*.parquet` rows; the name begins with the time, and a later row replaces an earlier one of the same picture

Rows, schema version 1; of every kind only the columns that apply are filled:

===========  =========  ==================================================================================
kind         string     `image` (a picture or frame that was looked at), `object` (in the image above it),
                        `skipped` (a file that could not be used), `video` (a video that was gone through whole)
file         string     name relative to the input, with `/`; of frames `clip.mp4/000012`
path         string     where the file lay, absolute; null for cameras and streams
digest       string     SHA-256 of the file; of a folder of frames, of their digests
take         string     of a frame and of a `video` row: which passage through the video it belongs to
fingerprint  string     of the settings that made the row, see `fingerprint`
video        string     name of the video that a frame belongs to
frame        int64      number of the frame in its video; of a `video` row, how many frames were stored
time_s       float64    seconds from the start of the video
width        int32      pixels
height       int32
objects      int32      of an image: how many `object` rows follow it
reason       string     of a skipped file
class_id     int32      place in the classes of the run
class        string
score        float32    0 to 1
mask_score   float32    the segmenter's estimate of IoU
x1 y1 x2 y2  float32    box in pixels, right and bottom exclusive
area         int64      pixels of the mask
counts       string     mask as compressed COCO RLE; its size is height and width
tracker_id   int64      in a video, one per object
===========  =========  ==================================================================================

Any Parquet reader opens it: `pandas.read_parquet("store")`, `duckdb`, `pyarrow.dataset`.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.formats.store_pixels import _Clip, _is_movie, _Lazy
from grounded_sam.media.files import common_folder, natural_key
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.structures.detections import empty_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import with_rles
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary

VERSION = 1


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
    ],
    metadata={"grounded_sam.schema": str(VERSION)},
)


#: Settings that change how fast a result comes, not what it is.
INCIDENTAL = {"device", "batch_size", "chunk", "points_per_batch", "exports"}


#: Tables that a reader keeps at once; shards interleave, so several are in use together.
CACHED = 16


def file_digest(files: Sequence[Path]) -> str:
    """SHA-256 of a file; of several, of their digests in order."""
    digests = []
    for file in files:
        with file.open("rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def essential_settings(settings: Any) -> Any:
    """Settings without what is incidental; paths of files are joined by the digest of what is in them."""
    if isinstance(settings, Mapping):
        return {str(k): essential_settings(v) for k, v in sorted(settings.items()) if k not in INCIDENTAL}
    if isinstance(settings, list | tuple):
        return [essential_settings(value) for value in settings]
    if isinstance(settings, str) and settings:
        path = Path(settings).expanduser()
        try:
            files = (
                [path]
                if path.is_file()
                else sorted(p for p in path.rglob("*") if p.is_file())
                if "/" in settings
                else []
            )
        except OSError:  # no path, such as a name that is too long for one
            files = []
        return {"name": path.name, "sha256": file_digest(files)} if files else settings
    return settings


def fingerprint(settings: Mapping[str, Any], vocabulary: Vocabulary) -> str:
    """SHA-256 of all that decides what is found: models, their weights' files, thresholds, classes."""
    from grounded_sam import __version__

    builtin = __version__ if "builtin:" in json.dumps(settings, default=str) else None  # weights of the package
    whole = {"settings": essential_settings(settings), "vocabulary": asdict(vocabulary), "builtin": builtin}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def find_store(given: str | Path) -> Path:
    """The folder of a store: `given` itself, or the `store` in it.

    Raises:
        ConfigError: if there is none.
    """
    path = Path(given).expanduser()
    for folder in (path, path / "store"):
        if any(folder.glob("_run-*.json")):
            return folder
    raise ConfigError(
        f"no store in {given}: expected a folder with _run-*.json and part-*.parquet, as sink=store writes"
    )


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The settings that wrote into a store, oldest first.

    Raises:
        ConfigError: if the store is of a newer version, or a file of it is damaged.
    """
    found = []
    for path in folder.glob("_run-*.json"):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            found.append({key: run[key] for key in ("schema", "fingerprint", "created", "settings", "vocabulary")})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({_line(error)}); a run with its settings makes it anew"
            ) from error
    newest = max((run["schema"] for run in found), default=VERSION)
    if newest > VERSION:
        raise ConfigError(f"{folder} has schema version {newest}, this grounded_sam reads up to {VERSION}")
    return sorted(found, key=lambda run: (run["created"], run["fingerprint"]))


def store_vocabulary(folder: Path) -> Vocabulary:
    """The classes of all runs of a store, those of the first run first."""
    first, *rest = (_vocabulary(run["vocabulary"]) for run in read_runs(folder))
    return reduce(Vocabulary.joined, rest, first)


def _vocabulary(about: Mapping[str, Any]) -> Vocabulary:
    columns: dict[str, Any] = {key: tuple(value) for key, value in about.items() if key != "asked"}
    return Vocabulary(**columns | {"phrases": tuple(map(tuple, columns["phrases"])), "asked": False})


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the row of an image is."""

    part: int
    row: int


@dataclass
class _Take:
    """One passage through a video, whole once its `video` row is there."""

    digest: str | None = None
    whole: bool = False
    frames: dict[int, _Place] = field(default_factory=dict)


class StoreReader:
    """A store, for reading: an index of its images is held, everything else is read when it is asked for.

    Args:
        folder: of the store; may be missing or empty.
        max_pixels: larger pictures are refused before they are decoded.
        root: where the pictures lie, if not where they were; their names are relative to it.

    Raises:
        ConfigError: if the store is of a newer version; if a part is damaged, naming it.
    """

    def __init__(self, folder: Path, max_pixels: int = MAX_PIXELS, root: str | None = None) -> None:
        self.folder, self.max_pixels, self.root = folder, max_pixels, root
        read_runs(folder)
        self.parts = sorted(folder.glob("part-*.parquet"))
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._images: dict[str, tuple[_Place, str | None, str]] = {}  # by path: place, digest, name
        self._names: dict[str, str] = {}  # of videos, by file or folder and name
        self._skipped: dict[str, tuple[Skipped, str | None]] = {}
        takes: dict[str, dict[str, _Take]] = {}  # by the same key, the latest last
        for number, part in enumerate(self.parts):
            self._scan(number, part, takes)
        #: Of each video the newest passage that is whole, or else the newest.
        self._videos: dict[str, _Take] = {}
        for key, passages in takes.items():
            newest = list(passages.values())[::-1]
            self._videos[key] = next((take for take in newest if take.whole), newest[0])
        self._by_name: dict[str, list[str]] = {}
        for key, name in [*((key, name) for key, (_, _, name) in self._images.items()), *self._names.items()]:
            self._by_name.setdefault(name, []).append(key)
        for name, (_, digest) in list(self._skipped.items()):
            self._settle(name, digest)

    def _scan(self, number: int, part: Path, takes: dict[str, dict[str, _Take]]) -> None:
        columns = ["kind", "file", "path", "digest", "video", "take", "frame", "reason"]
        try:
            table = pq.read_table(part, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(
                f"{part} cannot be read ({_line(error)}); delete it, and what it held is done again"
            ) from error
        rows = np.flatnonzero(np.asarray(table["kind"]) != "object")
        picked = table.take(rows).to_pydict()
        for row, kind, file, path, digest, video, take, frame, reason in zip(
            rows.tolist(), *(picked[name] for name in columns), strict=True
        ):
            if kind == "skipped":
                self._skipped[file] = (Skipped(file, reason), digest)
            elif kind == "image" and video is None:
                self._skipped.pop(file, None)
                self._images[path or file] = (_Place(number, row), digest, file)
            else:
                key = f"{_home(path)}\n{video}"
                self._names[key] = video
                passage = takes.setdefault(key, {}).setdefault(take, _Take(digest))
                if kind == "video":
                    passage.whole = True
                else:
                    passage.frames[frame] = _Place(number, row)

    def _settle(self, name: str, digest: str | None) -> None:
        """Of a file that was skipped drop what is stored of other content; or the note, if it was mended since."""
        for key in self._by_name.get(name, ()):
            if key in self._images and digest is not None and self._images[key][1] != digest:
                del self._images[key]
            elif key in self._videos and self._videos[key].whole and self._videos[key].digest != digest:
                self._skipped.pop(name, None)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The classes of all its runs."""
        return store_vocabulary(self.folder)

    def __len__(self) -> int:
        return len(self._images) + sum(len(video.frames) for video in self._videos.values())

    @cached_property
    def skipped(self) -> dict[str, Skipped]:
        """Files that could not be used when they were last tried, or not to their end, by name."""
        return {name: skipped for name, (skipped, _) in self._skipped.items()}

    def known(
        self, name: str, files: Sequence[Path], digest: str, vocabulary: Vocabulary
    ) -> Iterator[FrameResult] | None:
        """The results of a picture or of a whole video, None if the store has not got it with that content.

        Args:
            files: where it lies now; pixels are read from there.
        """
        for key in self._by_name.get(name, ()):
            if key in self._images and self._images[key][1] == digest:
                return self.read(key, vocabulary, files)
            if key in self._videos and self._videos[key].whole and self._videos[key].digest == digest:
                return self.read(key, vocabulary, files)
        return None

    def keys(self) -> Iterator[str]:
        """What `read` takes: pictures in natural order of their names, then videos in that of theirs."""
        yield from sorted(self._images, key=lambda key: (natural_key(self._images[key][2]), key))
        videos = [key for key, take in self._videos.items() if take.frames]
        yield from sorted(videos, key=lambda key: (natural_key(self._names[key]), key))

    def count(self, key: str) -> int:
        """How many images `read` gives."""
        return 1 if key in self._images else len(self._videos[key].frames)

    def read(self, key: str, vocabulary: Vocabulary, files: Sequence[Path] = ()) -> Iterator[FrameResult]:
        """A picture, or the frames of a video, with what was found.

        Args:
            vocabulary: what class ids refer to; objects of classes that it has not are left out.
            files: where it lies now, if that is known.
        """
        if key in self._images:
            yield self._result(self._images[key][0], vocabulary, files, None)
            return
        frames, clip = self._videos[key].frames, _Clip(self.max_pixels)
        for number in sorted(frames):
            yield self._result(frames[number], vocabulary, files, clip)

    def _table(self, part: int) -> pa.Table:
        if part not in self._tables:
            self._tables[part] = pq.read_table(self.parts[part], schema=SCHEMA).combine_chunks()
            while len(self._tables) > CACHED:
                self._tables.popitem(last=False)
        self._tables.move_to_end(part)
        return self._tables[part]

    def _result(self, place: _Place, vocabulary: Vocabulary, files: Sequence[Path], clip: _Clip | None) -> FrameResult:
        top = self._table(place.part).slice(place.row, 1).to_pylist()[0]
        size_hw = (top["height"], top["width"])
        under = self._table(place.part).slice(place.row + 1, top["objects"])
        rows = [row for row in under.to_pylist() if row["class"] in vocabulary.classes] if len(under) else []
        found = _detections(rows, size_hw, vocabulary, top["video"] is not None)
        path = self._path(top, files)
        frame = Frame(
            _Lazy(top["file"], path, top["frame"], size_hw, self.max_pixels, clip),
            top["frame"] if top["frame"] is not None else 0,
            top["file"],
            top["time_s"],
            top["video"],
            None if path is None else Path(path),
            size_hw,
        )
        return FrameResult(frame, found, stored=True)

    def _path(self, row: Mapping[str, Any], files: Sequence[Path]) -> str | None:
        """Where the pixels of a row are: among `files`, else under `root`, else where they were."""
        path: str | None = row["path"]
        if len(files) == 1:
            return str(files[0])
        if files:
            return str(common_folder(list(files)) / row["file"])
        if path is not None and self.root is not None:
            return str(Path(self.root).expanduser() / (row["video"] if _is_movie(path) else row["file"]))
        return path


def _home(path: str | None) -> str | None:
    """What tells videos of one name apart: the file, or the folder of frames."""
    return path if path is None or _is_movie(path) else str(Path(path).parent)


def _detections(
    rows: list[dict[str, Any]], size_hw: tuple[int, int], vocabulary: Vocabulary, video: bool
) -> sv.Detections:
    """Object rows as packed detections."""
    if not rows:
        none = empty_detections(vocabulary)
        none.tracker_id = np.empty(0, np.int64) if video else None
        return none
    ids = [row["tracker_id"] for row in rows]
    data: dict[str, Any] = {"class_name": np.array([row["class"] for row in rows], dtype=str)}
    if all(row["mask_score"] is not None for row in rows):
        data["mask_score"] = np.array([row["mask_score"] for row in rows], np.float32)
    counts = [row["counts"] for row in rows]
    found = sv.Detections(
        xyxy=np.array([[row[k] for k in ("x1", "y1", "x2", "y2")] for row in rows], np.float32),
        confidence=np.array([row["score"] for row in rows], np.float32),
        class_id=np.array([vocabulary.classes.index(row["class"]) for row in rows], np.int64),
        tracker_id=None if None in ids else np.array(ids, np.int64),
        data=data,
    )
    if None in counts:
        return found
    return with_rles(found, [{"size": list(size_hw), "counts": text.encode()} for text in counts])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
