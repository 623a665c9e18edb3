"""List the images under an address, as they come: no list of all names is kept."""

from __future__ import annotations

import calendar
import glob
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from grounded_sam.errors import ConfigError, MissingObjectError, RemoteError
from grounded_sam.files import home_path
from grounded_sam.media.files import image_suffixes, is_video_file, list_lines
from grounded_sam.media.images import safe_formats
from grounded_sam.media.unread import unread_reason
from grounded_sam.output.claim import STATE, parse_listing
from grounded_sam.remote import (
    Location,
    convert_remote_errors,
    is_address,
    open_filesystem,
    protocol_of,
    read_bytes,
    redact_address,
    retry,
    suffix_of,
)

#: Protocols whose file systems are listed in one call, since they know all names or answer for all folders at once.
_FOUND_AT_ONCE = {"zip", "tar", "hf", "memory"}
#: What object stores call the tag of an object, in the order in which they are used.
_TAGS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "CRC", "sha", "checksum", "uid")
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")


@dataclass(frozen=True)
class RemoteImages:
    """The images that an input with addresses names: an object, a prefix, a glob, or a `.txt` list of addresses.

    Attributes:
        given: The input.
        root: Address that names are relative to, with a `/` at its end.
        pattern: Of a glob, the expression that keys match; None for any.
        is_file: Whether the input is itself the image.
        listing: Content of a list; None if it is none.

    >>> from grounded_sam.remote import open_filesystem, write_bytes
    >>> fs, key = open_filesystem("memory://photos/sub/a.jpg")
    >>> write_bytes(fs, key, b"...")
    >>> [name for name, _ in RemoteImages.open("memory://photos/**").images(print)]
    ['sub/a.jpg']
    """

    given: str
    root: str
    pattern: str | None = None
    is_file: bool = False
    listing: bytes | None = None

    @classmethod
    def open(cls, given: str) -> RemoteImages:
        """Find out what an input names, by at most one request.

        Args:
            given: An address, or the path of a list with addresses.

        Raises:
            ConfigError: If it cannot be what it looks like.
            RemoteError: If there is no such object, or it cannot be read.
        """
        if not is_address(given):
            return cls._of_list(given, home_path(given).read_bytes())
        if protocol_of(given) in ("http", "https"):
            if glob.has_magic(given.partition("?")[0]):
                raise ConfigError(
                    f"{redact_address(given)}: web servers list no files; name one image, or a .txt list of addresses"
                )
            return cls._of_list(given, None) if suffix_of(given) == ".txt" else cls(given, _parent(given), None, True)
        path, archive = _split_archive(given)
        if glob.has_magic(path) and not _is_object(given):
            fixed = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0] + "/"
            return cls(given, fixed + archive, _glob_expression(given))
        if not path.partition("://")[2].rstrip("/") or path.endswith("/") or _is_prefix(given):
            return cls(given, path.rstrip("/") + "/" + archive if not path.endswith("://") else path + archive)
        if suffix_of(path) == ".txt":
            return cls._of_list(given, None)
        return cls(given, _parent(path) + archive, None, True)

    @classmethod
    def _of_list(cls, given: str, content: bytes | None) -> RemoteImages:
        """Open a list of addresses."""
        listing = Location(given).read_bytes() if content is None else content
        addresses = list(_listed(given, listing))
        if not addresses:
            raise ConfigError(f"{redact_address(given)} lists no address")
        first, last = min(addresses), max(addresses)
        same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        root = first[:same].rpartition("/")[0] + "/" if "/" in first[:same] else ""
        return cls(given, "" if root.endswith(":/") or root.endswith("://") else root, listing=listing)

    def images(self, note: Callable[[str, str], None]) -> Iterator[tuple[str, Location | Path]]:
        """Yield names and places of the images, in the order of their keys or of the list.

        Objects without a suffix are taken for images. Hidden objects, and what earlier runs wrote, are left out.

        Args:
            note: Called with name and reason for videos and formats that are not read.

        Raises:
            RemoteError: If the input cannot be listed.
        """
        suffixes, formats = image_suffixes(), safe_formats()
        for name, place in self.places(note):
            suffix = PurePosixPath(name).suffix.lower()
            if isinstance(place, Path):
                yield name, place
            elif is_video_file(name):
                note(name, "a video, which is not read from a bucket; copy it to this machine")
            elif not suffix or suffix in suffixes or self.listing is not None or self.is_file:
                yield name, place
            elif (reason := unread_reason(Path(name), formats)) is not None:
                note(name, reason)

    def places(self, note: Callable[[str, str], None]) -> Iterator[tuple[str, Location | Path]]:
        """Yield names and places of all objects, of whatever kind, without hidden ones and what earlier runs wrote."""
        if self.listing is not None:
            yield from self._listed_places(note)
        elif self.is_file:
            location = with_state(Location(self.given))
            yield location.name, location
        else:
            yield from self._objects()

    def _listed_places(self, note: Callable[[str, str], None]) -> Iterator[tuple[str, Location | Path]]:
        """Yield what a list names, each once."""
        seen: dict[str, str] = {}
        for address in _listed(self.given, self.listing or b""):
            shown = redact_address(address)
            name = shown.removeprefix(redact_address(self.root)) if self.root else re.sub(r"^[^:]*:/+", "", shown)
            earlier = seen.setdefault(name, address)
            if earlier != address:
                note(name, "another address of the list differs only in its query, which names do not contain")
            elif is_address(address):
                yield name, Location(address)
            else:
                yield name, Path(address)

    def _objects(self) -> Iterator[tuple[str, Location]]:
        """Yield the objects below the root that match, without hidden ones and what earlier runs wrote."""
        fs, prefix = open_filesystem(self.root)
        prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
        matches = re.compile(self.pattern).match if self.pattern is not None else None
        head, archive = _split_archive(self.root)
        earlier = _EarlierRemoteOutputs(fs, prefix)
        protocol = protocol_of(self.root)
        for key, info in _all_objects(fs, protocol, prefix, redact_address(self.root)):
            name = key.removeprefix(prefix)
            if "/." in f"/{name}":
                earlier.note(name)
            elif not key.endswith("/") and (matches is None or matches(key)) and not earlier.wrote(name):
                size = info.get("size")
                if "." in name.rpartition("/")[2] or size != 0:  # folders and flags of some programs are empty objects
                    yield name, location_of(head + name + archive, info)

    def nothing_found(self) -> str:
        """Return the message for an input without images."""
        what = "no object matches" if self.pattern is not None else "no image in"
        return f"{what} {redact_address(self.given)}"


class _EarlierRemoteOutputs:
    """The outputs of earlier runs below a prefix, known by their hidden folders, which come first in a listing."""

    def __init__(self, fs: Any, prefix: str) -> None:
        self._fs, self._prefix = fs, prefix
        self._written: dict[str, set[str] | None] = {}  # by folder; None for all of it

    def note(self, name: str) -> None:
        """Look at a hidden object."""
        parts = name.split("/")
        for i, part in enumerate(parts[:-1]):
            folder = "".join(f"{parent}/" for parent in parts[:i])
            if part == STATE and self._written.get(folder) is None:
                self._written[folder] = self._listing(folder)
            elif part == ".hydra":
                self._written.setdefault(folder, None)

    def _listing(self, folder: str) -> set[str]:
        try:
            content = read_bytes(self._fs, f"{self._prefix}{folder}{STATE}/files.jsonl")
        except RemoteError:
            return set()
        return set(parse_listing(content.decode("ascii", "replace").splitlines()))

    def wrote(self, name: str) -> bool:
        """Return whether an earlier run wrote an object."""
        for folder, written in self._written.items():
            if name.startswith(folder) and (written is None or name.removeprefix(folder) in written):
                return True
        return False


def names_addresses(given: str) -> bool:
    """Return whether an input is an address, or a local `.txt` list with addresses."""
    if is_address(given):
        return True
    path = home_path(given)
    if path.suffix.lower() != ".txt" or not path.is_file():
        return False
    with path.open("rb") as file:
        return any(is_address(line.decode("utf-8", "replace").strip()) for line in file if b"://" in line)


def with_state(location: Location) -> Location:
    """Return a location with size, tag and time of change, where the server tells them; one request."""
    if location.size is not None and location.etag is not None:
        return location
    fs, key = open_filesystem(location.address)
    with convert_remote_errors(location.address):
        info = retry(lambda: fs.info(key))
    known = location_of(location.address, info)
    return replace(known, size=location.size if known.size is None else known.size)


def location_of(address: str, info: dict[str, Any]) -> Location:
    """Return the location of an object with what fsspec says about it.

    >>> location_of("s3://b/a.jpg", {"size": 5, "ETag": '"1f"'})
    Location(size=5, etag='1f', modified_ns=None, span=None)
    """
    lfs = info.get("lfs")
    tags = [lfs.get("sha256") if isinstance(lfs, dict) else None, *(info.get(name) for name in _TAGS)]
    tag = next((str(tag).strip('"') for tag in tags if isinstance(tag, str | int) and str(tag)), None)
    time = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    size = info.get("size")
    return Location(address, size if isinstance(size, int) and size >= 0 else None, tag, _nanoseconds(time))


def _nanoseconds(time: Any) -> int | None:
    """Return a time of fsspec, which differs between protocols, in nanoseconds since 1970; None if it is none."""
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time.replace("Z", "+00:00"))
        except ValueError:
            return None
    if isinstance(time, datetime):
        return calendar.timegm(time.utctimetuple()) * 1_000_000_000 + time.microsecond * 1000
    return int(time * 1e9) if isinstance(time, int | float) and 0 <= time < 9e9 else None


def _all_objects(fs: Any, protocol: str, prefix: str, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield keys and properties of all objects below a prefix, a page or folder at a time."""
    if protocol in ("s3", "s3a"):
        yield from _s3_objects(fs, prefix, shown)
    elif protocol in _FOUND_AT_ONCE:
        with convert_remote_errors(shown):
            found = retry(lambda: fs.find(prefix, detail=True))
        yield from sorted(found.items())
    else:
        folders = fs.walk(prefix, detail=True, on_error="raise")
        while True:
            with convert_remote_errors(shown):
                folder, inner, files = next(folders, (None, {}, {}))
            if folder is None:
                return
            if STATE in inner:
                yield f"{folder}/{STATE}/files.jsonl", {}
            if ".hydra" in inner:
                yield f"{folder}/.hydra/config.yaml", {}
            for name in [name for name in inner if name.startswith(".")]:
                del inner[name]
            yield from sorted((info["name"], info) for info in files.values())


def _s3_objects(fs: Any, prefix: str, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield keys and properties of the objects of a bucket, one page of a thousand at a time.

    `find` and `glob` of s3fs return only when they have listed everything, and keep it.
    """
    bucket, _, below = prefix.partition("/")
    more: dict[str, str] = {}
    while True:
        with convert_remote_errors(shown):
            request = {"Bucket": bucket, "Prefix": below, **more}
            page = retry(lambda request=request: fs.call_s3("list_objects_v2", **request))  # type: ignore[misc]
        for item in page.get("Contents", ()):
            yield f"{bucket}/{item['Key']}", {**item, "size": item["Size"]}
        if not page.get("IsTruncated") or not page.get("NextContinuationToken"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _listed(given: str, listing: bytes) -> Iterator[str]:
    """Yield the addresses of a list; relative ones are relative to it. A list on this machine may also name paths."""
    is_remote = is_address(given)
    folder = _parent(given) if is_remote else ""
    try:
        lines = list_lines(listing.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{redact_address(given)} is not a list of addresses: {error}") from error
    for line in lines:
        if is_address(line):
            yield line
        elif is_remote:
            yield folder + line.lstrip("/")
        else:
            yield str(home_path(given).absolute().parent / home_path(line))


def _parent(address: str) -> str:
    """Return the folder of an address, with a `/` at its end."""
    return address.partition("?")[0].rpartition("/")[0] + "/"


def _split_archive(address: str) -> tuple[str, str]:
    """Return an address and, of an address in an archive, `::` with the archive."""
    if protocol_of(address) not in ("zip", "tar"):
        return address, ""
    path, separator, archive = address.rpartition("::")
    return (path, separator + archive) if separator else (address, "")


def _glob_expression(address: str) -> str:
    """Return the regular expression of a glob."""
    from fsspec.utils import glob_translate

    _, pattern = open_filesystem(address)
    try:
        expression: str = glob_translate(pattern)
    except ValueError as error:
        raise ConfigError(f"{redact_address(address)}: ** stands for folders, between two slashes") from error
    return expression


def _is_object(address: str) -> bool:
    """Return whether there is an object of exactly this name, which may have brackets in it."""
    if "*" in address:
        return False
    try:
        return with_state(Location(address)).size is not None
    except MissingObjectError:
        return False


def _is_prefix(address: str) -> bool:
    """Return whether an address is a prefix of objects, not an object.

    Raises:
        RemoteError: If it is neither.
    """
    fs, key = open_filesystem(address)
    with convert_remote_errors(address):
        return bool(retry(lambda: fs.info(key))["type"] == "directory")
