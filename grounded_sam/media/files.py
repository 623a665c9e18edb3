"""Find the image and video files that an input names."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from grounded_sam.errors import ConfigError, ImageError, count_of
from grounded_sam.files import home_path
from grounded_sam.media.images import open_image, safe_formats
from grounded_sam.media.unread import unread_reason
from grounded_sam.output.claim import read_listing
from grounded_sam.output.paths import STATE
from grounded_sam.remote import Location

# fmt: off
#: Suffixes of video files, all of which PyAV reads.
VIDEO_SUFFIXES = {
    ".264", ".265", ".3g2", ".3gp", ".amv", ".asf", ".avi", ".dav", ".divx", ".dv", ".f4v", ".flv", ".gxf",
    ".h264", ".h265", ".hevc", ".ivf", ".lrv", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg",
    ".mk3d", ".mkv", ".mod", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".obu", ".ogm",
    ".ogv", ".qt", ".rm", ".rmvb", ".tod", ".trp", ".ts", ".vob", ".webm", ".wmv", ".wtv", ".y4m",
}
# fmt: on
_EXAMPLES = Path(__file__).parents[1] / "shapes" / "examples"


@dataclass(frozen=True)
class InputFiles:
    """The files that an input names.

    Attributes:
        images: Image files.
        videos: Video files.
        root: Folder that names in the output are relative to.
        is_file: Whether the input is itself the file, rather than a folder, glob or list.
        unread: Images and videos of formats that are not read, and folders that cannot be opened, with the reason.
        outputs: Folders with results of earlier runs, whose files were passed over.
    """

    images: list[Path]
    videos: list[Path]
    root: Path
    is_file: bool = False
    unread: Mapping[Path, str] = field(default_factory=dict)
    outputs: tuple[Path, ...] = ()

    def nothing_found(self, given: object, kind: str) -> str:
        """Return the message for an input without usable files, with what was passed over and is not read.

        Args:
            given: The input.
            kind: What was looked for, such as `image`.
        """
        message = f"no {kind} in {given}"
        if self.outputs:
            message += (
                f" apart from results of earlier runs in {self.outputs[0]}, which are passed over; to use some as "
                "input, name their own folder or list them in a .txt file"
            )
        if self.unread:
            path, reason = next(iter(self.unread.items()))
            count = count_of(len(self.unread), "file is", "files are")
            message += f"; {count} not read: {relative_name(path, self.root)}: {reason}"
        return message


class FoundFiles(NamedTuple):
    """The files in a folder, or that match a glob, of whatever kind.

    Attributes:
        files: The files, in natural order.
        unread: Folders that were not searched, with the reason.
        outputs: Folders with results of earlier runs, whose files were passed over.
    """

    files: list[Path]
    unread: dict[Path, str]
    outputs: list[Path]


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts `frame2` before `frame10`.

    >>> sorted(["frame10", "frame2"], key=natural_key)
    ['frame2', 'frame10']
    """
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", text)]


def image_suffixes() -> set[str]:
    """Return the suffixes of the formats that are read."""
    from PIL import Image

    formats = safe_formats()
    suffixes = {suffix for suffix, name in Image.EXTENSION.items() if name in formats}
    return (suffixes | {".mpo"}) - VIDEO_SUFFIXES  # Pillow opens MPO as JPEG


def _is_image(path: Path) -> bool:
    """Return whether the first bytes of a file without a suffix look like an image."""
    try:
        with open_image(path, sys.maxsize):  # its size is checked when it is read
            return True
    except ImageError:
        return False


def image_files(files: Iterable[Path]) -> list[Path]:
    """Select the files that have an image suffix, or no suffix and the contents of an image."""
    suffixes = image_suffixes()
    return [path for path in files if path.suffix.lower() in suffixes or (not path.suffix and _is_image(path))]


def is_video_file(path: str | Path | Location) -> bool:
    """Return whether a path or an address has the suffix of a video.

    >>> is_video_file("clip.MP4")
    True
    """
    return (Path(path) if isinstance(path, str) else path).suffix.lower() in VIDEO_SUFFIXES


def is_media_name(path: str | Path) -> bool:
    """Return whether a path has the suffix of an image or a video.

    >>> is_media_name("photos/*.JPG"), is_media_name("car")
    (True, False)
    """
    return Path(path).suffix.lower() in image_suffixes() | VIDEO_SUFFIXES


def relative_name(path: Path, root: Path) -> str:
    """Return a path relative to a folder above it, with `/`; bytes that are not UTF-8 become `\\xNN`.

    >>> relative_name(Path("photos/a/1.png"), Path("photos"))
    'a/1.png'
    """
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def path_ends(name: str) -> list[str]:
    """Return the paths that a file may have whose name was written on another system, the longest first.

    These are the name with `/` for `\\`, and its ends: without the drive, without folders. For an upload of Label
    Studio they include the name before the upload.

    Args:
        name: Name of an image in a file of labels.

    >>> path_ends("C:\\\\data\\\\a.png"), path_ends("/data/upload/1/ab12cd34-a.png")[-2:]
    (['C:/data/a.png', 'data/a.png', 'a.png'], ['ab12cd34-a.png', 'a.png'])
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    ends = ["/".join(parts[i:]) for i in range(len(parts))]
    if "upload" in parts[:-1] and (match := re.fullmatch(r"[0-9a-f]{4,8}-(.+)", parts[-1])):
        ends.append(match[1])
    return ends


def find_files(given: str) -> InputFiles:
    """Find the images and videos that an input names.

    Args:
        given: A file, a folder (searched recursively, without hidden files), a glob, a `.txt` file with one path per
            line (`#` alone or followed by a space begins a comment), `builtin:NAME`, or a file of that,
            `builtin:NAME/FILE`. What earlier runs wrote below a folder, or below the part of a glob without wildcards,
            is passed over.

    Raises:
        ConfigError: If the input does not exist, a glob matches nothing, or a list has no paths.

    >>> len(find_files("builtin:demo").images), len(find_files("builtin:demo/clip.mp4").videos)
    (4, 1)
    """
    if given.startswith("builtin:"):
        name, _, wanted = given.partition("/")
        folder = builtin_folder("input", name)
        examples = _select_media(_walk(folder), folder)
        return find_files(str(_find_example(examples, given, wanted))) if wanted else examples
    path = home_path(given)
    if path.is_dir():
        return _select_media(_walk(path), path)
    if path.is_file() and path.suffix.lower() == ".txt":
        files = read_path_list(path)
        images: list[Path] = []
        videos: list[Path] = []
        for file in files:  # all are named by the user, so that one of another kind is an unusable image
            (videos if is_video_file(file) else images).append(file)
        return InputFiles(images, videos, common_folder(files))
    if path.is_file():
        is_video = is_video_file(path)
        return InputFiles([] if is_video else [path], [path] if is_video else [], path.parent, is_file=True)
    if glob.has_magic(given):
        found = match_files(given)
        if not found.files and not found.outputs:
            raise ConfigError(f"no file matches {given}")
        return _select_media(found, common_folder([*found.files, *found.unread] or found.outputs))
    raise ConfigError(f"no such file or folder: {given}")


def _find_example(files: InputFiles, given: str, name: str) -> Path:
    """Return the example with a name, for `input`."""
    named = {path.name: path for path in (*files.images, *files.videos)}
    if name not in named:
        available = ", ".join(named)
        raise ConfigError(f"input={given} is not part of the package; the files of that folder are {available}")
    return named[name]


def builtin_folder(key: str, given: str) -> Path:
    """Return the folder of examples that `builtin:NAME` stands for.

    Args:
        key: Key that it was given for, for messages.
        given: `builtin:NAME`.

    Raises:
        ConfigError: If the package has no such examples.

    >>> sorted(path.name for path in builtin_folder("input", "builtin:demo").glob("*.json"))
    ['instances.json']
    """
    folder = _EXAMPLES / given.removeprefix("builtin:")
    names = [path.name for path in sorted(_EXAMPLES.iterdir()) if path.is_dir()]
    if folder.name not in names or folder.parent != _EXAMPLES:
        available = ", ".join(f"builtin:{name}" for name in names)
        raise ConfigError(f"{key}={given} is not part of the package; available: {available}")
    return folder


def match_files(pattern: str) -> FoundFiles:
    """Return the files that match a glob, without what earlier runs wrote below its part without wildcards.

    Args:
        pattern: The glob.
    """
    pattern = str(home_path(pattern))
    fixed = Path(pattern)
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    earlier = _EarlierOutputs()
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    files = [match for match in matches if match.is_file() and not earlier.wrote(match, fixed)]
    folders = [match for match in matches if "**" not in pattern and match.is_dir()]
    unread = dict.fromkeys(folders, "a folder, which this pattern does not search; ** in it does")
    return FoundFiles(sorted(files, key=lambda file: natural_key(str(file))), unread, earlier.found)


class _EarlierOutputs:
    """The outputs of earlier runs among folders.

    Attributes:
        found: Folders of outputs with files that were passed over.
    """

    def __init__(self) -> None:
        self._written: dict[Path, set[str] | None] = {}  # by folder, what was written there; None for all of it
        self.found: list[Path] = []

    def wrote(self, path: Path, top: Path) -> bool:
        """Return whether an earlier run wrote a file.

        Args:
            path: The file.
            top: Folder above it; outputs that it is in do not count.
        """
        for folder in path.parents:
            written = self._written_in(folder)
            if written is None or (written and path.relative_to(folder).as_posix() in written):
                if folder not in self.found:
                    self.found.append(folder)
                return True
            if folder == top:
                break
        return False

    def _written_in(self, folder: Path) -> set[str] | None:
        if folder not in self._written:
            if (folder / STATE).is_dir():
                self._written[folder] = set(read_listing(folder))
            else:  # of an earlier version, or of another program with Hydra
                self._written[folder] = None if (folder / ".hydra").is_dir() else set()
        return self._written[folder]


def _walk(folder: Path) -> FoundFiles:
    """Return the files below a folder, without hidden ones and what earlier runs wrote."""
    files: list[Path] = []
    closed: dict[Path, str] = {}
    visited = set()
    earlier = _EarlierOutputs()

    def note(error: OSError) -> None:
        closed[Path(error.filename)] = f"a folder that cannot be opened ({error.strerror})"

    for current, folders, names in os.walk(folder, followlinks=True, onerror=note):
        real = os.path.realpath(current)
        if real in visited:  # a loop of links
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(current) / name for name in names if not name.startswith(".")]
        files += [path for path in paths if not earlier.wrote(path, folder)]
    return FoundFiles(sorted(files, key=lambda path: natural_key(path.as_posix())), closed, earlier.found)


def _select_media(found: FoundFiles, root: Path) -> InputFiles:
    """Select the images and videos among files, and those of formats that are not read."""
    videos = [path for path in found.files if is_video_file(path)]
    unread = {**found.unread, **unread_files(found.files)}
    return InputFiles(image_files(found.files), videos, root, unread=unread, outputs=tuple(found.outputs))


def unread_files(files: Iterable[Path]) -> dict[Path, str]:
    """Return the images and videos of formats that are not read, with the reason and the way out."""
    formats = safe_formats()
    return {path: reason for path in files if (reason := unread_reason(path, formats)) is not None}


def list_lines(text: str) -> list[str]:
    """Return the lines of a list, without empty ones and comments; `#1.png` is no comment."""
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not re.match(r"#(\s|$)", line)]


def read_path_list(listing: Path, base: Path | None = None) -> list[Path]:
    """Read the paths of a text file; relative ones are relative to it.

    Args:
        listing: The file.
        base: Another folder that relative paths may be relative to.

    Raises:
        ConfigError: If it is no text, or lists no path.
    """
    try:
        paths = list_lines(listing.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{listing} is not a list of paths: {error}") from error
    folders = [listing.parent] if base is None else [listing.parent, base]
    files = [_listed_file(folders, path) for path in paths]
    files = [Path(os.path.abspath(path)) for path in dict.fromkeys(files)]
    if not files:
        raise ConfigError(f"{listing} lists no path")
    return files


def _listed_file(folders: Sequence[Path], path: str) -> Path:
    """Return the file that a line of a list names, also in quotes or with the `\\` of Windows."""
    unquoted = path[1:-1] if len(path) > 2 and path[0] == path[-1] and path[0] in "'\"" else path
    names = (path, unquoted, unquoted.replace("\\", "/"))
    candidates = [folder / home_path(name) for folder in folders for name in names]
    return next((file for file in candidates if os.path.isfile(file)), candidates[0])


def common_folder(files: list[Path]) -> Path:
    """Return the deepest folder that contains all files.

    >>> common_folder([Path("/a/b/1.png"), Path("/a/c/2.png")]).as_posix()
    '/a'
    """
    try:
        return Path(os.path.commonpath([path.parent for path in files]))
    except ValueError:  # different drives
        return Path(files[0].anchor)
