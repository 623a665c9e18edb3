"""Where the files of a store's images are now, and which of their addresses may be opened.

A store may come from anywhere, and an address in it could name any server: it is opened only below an address that the
user has named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounded_sam.errors import MissingObjectError, RemoteError
from grounded_sam.files import home_path, require_regular
from grounded_sam.formats.store_runs import file_digest
from grounded_sam.media.files import common_folder, is_video_file
from grounded_sam.media.listing import with_state
from grounded_sam.remote import TABLES, Location, below, is_address, local_archive, protocol_of


@dataclass(frozen=True)
class StoredFile:
    """The file of an image or frame of a store, as it was processed.

    Attributes:
        place: Where it is now: a path, an address, or None for a camera or stream.
        row: Its row.
        refused: Whether it is an address that must not be opened.
    """

    place: Path | Location | None
    row: Mapping[str, Any]
    refused: bool = False

    def refusal(self) -> str:
        """Return why an address is not opened, with the key to set."""
        return (
            f"{self.place} is not opened, because a store may name any address; if it is one of yours, set "
            f"source.roots=[{str(self.place).rpartition('/')[0]}/] or an address above it"
        )

    def problem(self) -> str | None:
        """Return why the file is not the one that was processed; None if it is, or was not there at that time.

        It is read only if its size, and its tag or time of change, are other ones.
        """
        if self.place is None or (self.row["digest"] is None and self.row["bytes"] is None):
            return None
        if self.refused:
            return self.refusal()
        if isinstance(self.place, Location):
            return self._problem_of_object(self.place)
        return self._problem_of_file(self.place)

    def _problem_of_object(self, place: Location) -> str | None:
        try:
            if protocol_of(place.address) in TABLES:  # of a row nothing is known but its content
                return self._problem_of_content(place)
            now = with_state(Location(place.address))
            is_same_size = now.size == self.row["bytes"]
            if is_same_size and now.etag is not None and now.etag == self.row["etag"]:
                return None
            if is_same_size and now.etag is None and now.modified_ns == self.row["mtime_ns"] is not None:
                return None
            return self._problem_of_content(place)
        except MissingObjectError:
            return f"no such object: {place}; set source.root to the address of the images now"
        except RemoteError as error:
            return str(error)

    def _problem_of_file(self, path: Path) -> str | None:
        try:
            status = require_regular(path)
            if (status.st_size, status.st_mtime_ns) == (self.row["bytes"], self.row["mtime_ns"]):
                return None
            return self._problem_of_content(path)
        except FileNotFoundError:
            return f"no such file: {path}; set source.root to the folder of the images now"
        except (OSError, ValueError) as error:
            return f"{path}: {getattr(error, 'strerror', None) or error}"

    def _problem_of_content(self, place: Path | Location) -> str | None:
        if self.row["digest"] is None or file_digest([place]) == self.row["digest"]:
            return None
        return f"{place} has changed since it was processed; run the command that made the store again"


class StoredFiles:
    """Find the files of the images of a store.

    Args:
        root: Folder or address of the images, if they were moved; their names are relative to it.
        roots: Addresses below which stored addresses may be opened.
    """

    def __init__(self, root: str | None = None, roots: Iterable[str] = ()) -> None:
        self.root, self.roots = root, tuple(roots)

    def find(self, row: Mapping[str, Any], files: Sequence[Path | Location]) -> StoredFile:
        """Return the file of a row of an image or frame.

        Args:
            row: The row.
            files: Files of the image or video, if they are known; else it is looked for where the store says.
        """
        if len(files) == 1:
            return StoredFile(files[0], row)
        if files:
            paths = [file for file in files if isinstance(file, Path)]
            return StoredFile(common_folder(paths) / name_in_video(row), row)
        path: str | None = row["path"]
        if path is None:
            return StoredFile(None, row)
        if self.root is None:
            return self._at_stored_path(path, row)
        if is_address(self.root):
            return StoredFile(_location(f"{self.root.rstrip('/')}/{name_in_video(row)}", row), row)
        folder = home_path(self.root)
        moved = folder / (row["video"] if is_video_file(path) else row["file"])
        in_root = folder / name_in_video(row)  # the folder of the frames itself
        is_frame = row["video"] is not None and not moved.exists() and in_root.exists()
        return StoredFile(in_root if is_frame else moved, row)

    def _at_stored_path(self, path: str, row: Mapping[str, Any]) -> StoredFile:
        if not is_address(path):
            return StoredFile(Path(path), row)
        if local_archive(path) is not None:  # a file of this machine, as a path is
            return StoredFile(_location(path, row), row)
        allowed = (found for root in self.roots if (found := below(root, path)) is not None)
        address = next(allowed, None)
        if address is None:
            return StoredFile(Location(path), row, refused=True)
        return StoredFile(_location(address, row), row)


def _location(address: str, row: Mapping[str, Any]) -> Location:
    """Return the location of a stored image, with what is known of it."""
    return Location(address, row["bytes"], row["etag"], row["mtime_ns"])


def name_in_video(row: Mapping[str, Any]) -> str:
    """Return the name of a row without that of its video, which stores of earlier versions leave out."""
    return str(row["file"]) if row["video"] is None else str(row["file"]).removeprefix(f"{row['video']}/")
