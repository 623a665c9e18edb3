"""Find the files that hold many images each: tar shards and tables."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import IO, Any

from grounded_sam.errors import ConfigError, RemoteError
from grounded_sam.files import home_path, require_regular
from grounded_sam.media.files import common_folder, match_files, natural_key, read_path_list, relative_name
from grounded_sam.media.listing import RemoteImages, names_addresses, with_state
from grounded_sam.remote import Location, convert_remote_errors, open_filesystem
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.shards import check_shard, in_shard

#: Bytes that are read at a time.
BLOCK = 4 << 20


def find_containers(input: object, suffix: str, shard: int, num_shards: int) -> list[tuple[str, Path | Location]]:
    """Return names and places of the files with a suffix that an input names, and that are of a shard.

    Args:
        input: A file, a folder, a glob, a `.txt` list, or any of these under an address.
        suffix: Suffix of the files.
        shard: Which part of the files to take, from 0; the name of a file decides which it is in.
        num_shards: Number of parts.

    Raises:
        ConfigError: If there is none.
        RemoteError: If an address cannot be listed.
    """
    given = check_input(input, f"{suffix} files, e.g. input='shards/*{suffix}'")
    check_shard(shard, num_shards)
    if names_addresses(given):
        listed = RemoteImages.open(given).places(lambda name, reason: None)
        found = [(name, place) for name, place in listed if name.lower().endswith(suffix)]
    else:
        paths = _local_files(given, suffix)
        root = common_folder(paths) if paths else Path()
        found = [(relative_name(path, root), path) for path in paths]
    if not found:
        raise ConfigError(f"no {suffix} file in {given}")
    return [(name, place) for name, place in found if in_shard(name, shard, num_shards)]


def _local_files(given: str, suffix: str) -> list[Path]:
    path = home_path(given)
    if path.is_dir():
        paths = [found for found in path.rglob("*") if not any(part.startswith(".") for part in found.parts[-1:])]
    elif path.is_file():
        paths = read_path_list(path) if path.suffix.lower() == ".txt" else [path]
    elif glob.has_magic(given):
        paths = match_files(given).files
    else:
        raise ConfigError(f"no such file or folder: {given}")
    files = [Path(os.path.abspath(found)) for found in paths if found.name.lower().endswith(suffix)]
    return sorted(files, key=lambda file: natural_key(str(file)))


def known_place(place: Path | Location) -> Location:
    """Return the location of a file with its size, and with what changes when it does.

    Raises:
        OSError: If there is no such file; `RemoteError` for an address.
    """
    if isinstance(place, Location):
        return with_state(place)
    status = require_regular(place)
    return Location(str(place), status.st_size, f"{status.st_size}-{status.st_mtime_ns}", status.st_mtime_ns)


def open_container(place: Path | Location) -> IO[bytes] | Any:
    """Open a file for reading, local or under an address.

    Raises:
        OSError: If it cannot be opened; `RemoteError` for an address.
    """
    if isinstance(place, Path):
        require_regular(place)
        return place.open("rb")
    fs, key = open_filesystem(place.address)
    with convert_remote_errors(place.address):
        return fs.open(key, "rb", block_size=BLOCK)


def reason_of(error: Exception, place: Path | Location) -> str:
    """Return why a file cannot be read, in one line."""
    if isinstance(error, RemoteError):
        return str(error).removeprefix(f"{place}: ")
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
