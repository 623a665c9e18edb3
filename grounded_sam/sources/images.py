"""Pictures from a file, a folder, a glob or a list of paths."""

from __future__ import annotations

import glob
import os
import queue
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.frames import MAX_PIXELS, Frame, read_image, safe_formats
from grounded_sam.stages import FrameResult, Skipped

T = TypeVar("T")
VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"}
_EXAMPLES = Path(__file__).parents[1] / "shapes" / "examples"


def natural(text: str) -> list[tuple[int, int | str]]:
    """Sort key that puts `frame2` before `frame10`."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", text)]


def _suffixes() -> set[str]:
    from PIL import Image

    formats = safe_formats()
    readable = {suffix for suffix, kind in Image.EXTENSION.items() if kind in formats}
    return (readable | {".mpo"}) - VIDEO_SUFFIXES  # Pillow opens MPO as JPEG


def _is_picture(path: Path) -> bool:
    """Whether the first bytes of a file without a suffix look like a picture."""
    from PIL import Image

    try:
        with Image.open(path, formats=safe_formats()):
            return True
    except Exception:  # Pillow's plugins raise all sorts; any means "does not look like one"
        return False


def picture_files(files: Iterable[Path]) -> list[Path]:
    """Those files that have a picture's suffix, or none and are pictures."""
    suffixes = _suffixes()
    return [p for p in files if p.suffix.lower() in suffixes or (not p.suffix and _is_picture(p))]


class Images:
    """Pictures, decoded one at a time in natural order of their paths.

    In a folder every file with a picture's suffix counts, and files without a suffix that are
    pictures. It is searched recursively, also through links, but hidden files and the outputs of
    earlier runs are left out. Videos in it are listed as skipped. A file that cannot be read is put
    into `skipped` and the rest goes on.

    Args:
        input: a picture, a folder, a glob (`photos/**/*.jpg`), a `.txt` file with one path a line
            (relative ones are relative to it), or `builtin:demo`.
        max_pixels: larger pictures are refused before they are decoded.
        shard, num_shards: of the pictures take only the `shard`-th of so many parts.

    Raises:
        ConfigError: if the input is missing or holds no picture.
        ImageError: while iterating, if the input is one single file and that cannot be read.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        if input is None or not str(input):
            raise ConfigError(
                "input is missing: give a picture, a folder, a glob or a .txt file of paths, e.g. input=photos/"
            )
        if not isinstance(max_pixels, int) or max_pixels < 1:
            raise ConfigError(f"source.max_pixels must be a whole number from 1, got {max_pixels!r}")
        check_shard(shard, num_shards)
        self.max_pixels = max_pixels
        self.skipped: list[Skipped] = []
        self.stored: Callable[[str, list[Path]], Iterable[FrameResult] | None] | None = None
        self.files, videos, self.root = find_files(str(input))
        self.single = len(self.files) == 1 and Path(str(input)) == self.files[0]
        if not self.files:
            if videos:
                raise ConfigError(f"no picture in {input}, only videos; source=auto or source=video takes those")
            raise ConfigError(f"no picture in {input}")
        self.skipped += [Skipped(self.name(path), "a video; source=images reads pictures") for path in videos]
        self.num_shards = num_shards
        self.files = part_of(self.files, shard, num_shards)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        with closing(ahead(self._decoded(), 2)) as frames:
            yield from frames

    def _decoded(self) -> Generator[Frame | FrameResult]:
        index = 0
        for path in self.files:
            if self.stored is not None and (results := self.stored(self.name(path), [path])) is not None:
                yield from results
                continue
            try:
                image = read_image(path, self.max_pixels)
            except ImageError as error:
                if self.single:
                    raise
                reason = str(error).removeprefix(f"{path}: ")
                self.skipped.append(Skipped(self.name(path), reason))
                continue
            yield Frame(image, index, self.name(path), file=path)
            index += 1

    def name(self, path: Path) -> str:
        """The path relative to the input, with `/`; bytes that are no UTF-8 as `\\xNN`."""
        return name_of(path, self.root)


def check_shard(shard: int, num_shards: int) -> None:
    """Raise a ConfigError unless `shard` is one of `num_shards`."""
    for key, value, least in (("num_shards", num_shards, 1), ("shard", shard, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"source.{key} must be a whole number from {least}, got {value!r}")
    if shard >= num_shards:
        raise ConfigError(f"source.shard must be below source.num_shards={num_shards}, got {shard}")


def part_of(items: list[T], shard: int, num_shards: int) -> list[T]:
    """One of so many parts of a list, in a row, so that what is stored by shards can be read in order."""
    return items[len(items) * shard // num_shards : len(items) * (shard + 1) // num_shards]


def ahead(items: Iterable[T], size: int) -> Generator[T]:
    """The same items, made on a thread, at most `size` of them ahead; closing it ends the thread."""
    made: queue.Queue[tuple[str, Any]] = queue.Queue(size)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            with suppress(queue.Full):
                made.put((kind, value), timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    break
            put("end", None)
        except BaseException as error:  # raised again where the items are taken
            put("error", error)
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = threading.Thread(target=work, name="decode", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join(timeout=10)


def name_of(path: Path, root: Path) -> str:
    """A path relative to a folder above it, with `/`; bytes that are no UTF-8 as `\\xNN`."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def find_files(given: str) -> tuple[list[Path], list[Path], Path]:
    """Pictures and videos that an input names, and the folder that they are named relative to.

    Raises:
        ConfigError: if there is no such input, or nothing that a glob matches.
    """
    if given.startswith("builtin:"):
        folder = _EXAMPLES / given.removeprefix("builtin:")
        if not folder.is_dir():
            names = ", ".join(f"builtin:{p.name}" for p in sorted(_EXAMPLES.iterdir()) if p.is_dir())
            raise ConfigError(f"input={given} does not ship with the package; it ships {names}")
        return *_sift(_walk(folder)), folder
    path = Path(given).expanduser()
    if path.is_dir():
        return *_sift(_walk(path)), path
    if path.is_file() and path.suffix.lower() == ".txt":
        files = _listed(path)
        videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
        return [file for file in files if file not in videos], videos, common_folder(files)
    if path.is_file():
        return ([], [path], path.parent) if path.suffix.lower() in VIDEO_SUFFIXES else ([path], [], path.parent)
    if glob.has_magic(given):
        hits = (Path(hit) for hit in glob.glob(os.path.expanduser(given), recursive=True))
        files = sorted((hit for hit in hits if hit.is_file()), key=lambda p: natural(str(p)))
        if not files:
            raise ConfigError(f"no file matches {given}")
        return *_sift(files), common_folder(files)
    raise ConfigError(f"no such file or folder: {given}")


def _walk(folder: Path) -> list[Path]:
    """Files of a folder and those in it, in natural order; no hidden ones, no outputs of earlier runs."""
    files = []
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or ".hydra" in folders:  # a loop of links, or the output of an earlier run
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(files, key=lambda p: natural(p.as_posix()))


def _sift(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Pictures and videos among files."""
    return picture_files(files), [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]


def _listed(listing: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{listing} is no list of paths: {error}") from error
    files = [listing.parent / Path(line).expanduser() for line in lines if line and not line.startswith("#")]
    files = [Path(os.path.abspath(path)) for path in dict.fromkeys(files)]
    if not files:
        raise ConfigError(f"{listing} lists no path")
    return files


def common_folder(files: list[Path]) -> Path:
    """The deepest folder that holds all files."""
    try:
        return Path(os.path.commonpath([path.parent for path in files]))
    except ValueError:  # different drives
        return Path(files[0].anchor)
