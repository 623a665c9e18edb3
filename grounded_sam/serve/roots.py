"""Paths in requests: files below the roots, and the examples of the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grounded_sam.errors import ConfigError
from grounded_sam.files import home_path
from grounded_sam.media.files import find_files
from grounded_sam.remote import Location, below, is_address, local_archive
from grounded_sam.serve.problems import RequestError

#: Prefix of the names of the package's own examples.
EXAMPLES = "builtin:demo/"
#: Longest path in a request, in characters.
MAX_PATH = 4096


class Roots:
    """The folders that requests may name files of.

    A path is resolved, with all symbolic links in it, before it is compared with the roots. What lies outside is
    refused in the same words whether it exists or not.

    Args:
        folders: The roots; addresses are those below which addresses in stores may be opened.

    Attributes:
        folders: The folders among the roots, resolved.
        addresses: The addresses among the roots.

    Raises:
        ConfigError: If one is not a folder.

    >>> Roots([]).resolve("photos/a.jpg")
    Traceback (most recent call last):
    grounded_sam.serve.problems.RequestError: this server reads no files of its machine; start it with serve.roots=...
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self.folders: list[Path] = []
        self.addresses = [str(folder) for folder in folders if is_address(folder)]
        for folder in folders:
            if is_address(folder):
                continue
            path = home_path(folder)
            if not path.is_dir():
                raise ConfigError(f"serve.roots: folder {folder} does not exist")
            self.folders.append(path.resolve())

    def contains(self, path: Path | Location) -> bool:
        """Return whether a path is in one of the roots, after all links in it are followed, or an address below one."""
        if isinstance(path, Location):
            if (archive := local_archive(path.address)) is not None:
                return self.contains(Path(archive))
            return any(below(root, str(path)) is not None for root in self.addresses)
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError):
            return False
        return any(resolved.is_relative_to(root) for root in self.folders)

    def resolve(self, given: str) -> Path:
        """Return the file or folder that a request names.

        Args:
            given: A path, absolute or relative to one of the roots, or `builtin:demo/NAME`.

        Raises:
            RequestError: If it is outside of the roots (403), does not exist (404), or is no path (422).
        """
        if given.startswith(EXAMPLES):
            return find_example(given)
        if not self.folders:
            raise RequestError(
                403, "this server reads no files of its machine; start it with serve.roots=[FOLDER], or upload the file"
            )
        if not given or "\0" in given or len(given) > MAX_PATH:
            raise RequestError(422, "a path must have 1 to 4,096 characters, none of them NUL")
        candidates = [Path(given)] if Path(given).is_absolute() else [root / given for root in self.folders]
        inside = [path for path in candidates if self.contains(path)]
        if not inside:
            raise RequestError(403, "the path is outside of the folders that this server may read (serve.roots)")
        for path in inside:
            if path.exists():
                return path.resolve()
        raise RequestError(404, f"no such file or folder: {given}")

    def name_of(self, path: Path) -> str:
        """Return a resolved path relative to its root, with `/`; its last part if it is in none."""
        for root in self.folders:
            if path.is_relative_to(root):
                return path.relative_to(root).as_posix()
        return path.name


def example_names() -> list[str]:
    """Return the names of the examples: `builtin:demo/scene-1.png` and so on."""
    files = find_files(EXAMPLES.rstrip("/"))
    return [EXAMPLES + path.name for path in (*files.images, *files.videos)]


def find_example(name: str) -> Path:
    """Return the file of an example.

    Raises:
        RequestError: If there is none of this name.

    >>> find_example("builtin:demo/scene-1.png").name
    'scene-1.png'
    """
    files = find_files(EXAMPLES.rstrip("/"))
    for path in (*files.images, *files.videos):
        if EXAMPLES + path.name == name:
            return path
    raise RequestError(404, f"no example {name}; the examples are {', '.join(example_names())}")
