"""Pictures from a file, a folder, a glob or a list of paths."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from grounded_sam.errors import ConfigError
from grounded_sam.media.images import safe_formats

VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"}


_EXAMPLES = Path(__file__).parents[1] / "shapes" / "examples"


def natural_key(text: str) -> list[tuple[int, int | str]]:
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


def relative_name(path: Path, root: Path) -> str:
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
        files = sorted((hit for hit in hits if hit.is_file()), key=lambda p: natural_key(str(p)))
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
    return sorted(files, key=lambda p: natural_key(p.as_posix()))


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
