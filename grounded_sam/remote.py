"""Files under addresses such as `s3://bucket/photos/a.jpg`: everything that uses fsspec.

Credentials come from where each protocol looks for them (environment variables, profiles, instance roles); an address
may also have them (`s3://key:secret@bucket/...`). Messages and files never show those: see `redact_address`.
"""

from __future__ import annotations

import errno
import os
import random
import re
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

from grounded_sam.errors import (
    AccessDeniedError,
    ConfigError,
    MissingObjectError,
    RemoteError,
    describe_error,
    redact,
    split_url,
)

T = TypeVar("T")

#: Protocols that are live streams, which PyAV opens, and those of plain local files.
_STREAMS = {"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "udp", "tcp", "mms", "mmsh"}
_LOCAL = {"file", "local"}
#: Protocols whose address names a member of an archive: `zip://MEMBER::ARCHIVE`.
_ARCHIVES = {"zip", "tar", "parquet", "lance"}
#: Those of them that are tables, which fsspec does not know; see `_read_cell`.
TABLES = {"parquet", "lance"}
#: What web addresses must end with to be files; all others are streams, as of cameras, or videos.
_WEB_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".jxl", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    *(".parquet", ".tar", ".txt", ".zip"),
}
#: Protocols of containers whose name stands before an `@`, which is no secret.
_ACCOUNT_PROTOCOLS = {"abfs", "abfss", "adl", "az", "hf", "wasb", "wasbs"}
#: Package that a protocol needs.
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "grounded_sam[remote]"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "adl", "az"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
_STEPS_UP = re.compile(r"(^|[/\\])\.\.?([/\\]|$)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
#: Attempts of a request in all, and seconds before the second one; each further one waits twice as long.
ATTEMPTS, FIRST_WAIT_S = 5, 0.5
#: Error codes of the system, and HTTP statuses, that may be gone at the next attempt.
_TRANSIENT_ERRNOS = {
    *(errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH),
    *(errno.EINTR, errno.ENETUNREACH, errno.EPIPE, errno.ETIMEDOUT),
}
_TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}
#: Libraries whose errors without a status are those of a connection.
_NETWORK_LIBRARIES = ("aiohttp", "botocore.exceptions", "httpcore", "httpx", "requests", "urllib3")
#: Bytes that are read at a time from an archive.
_ARCHIVE_BLOCK = 4 << 20

_filesystems: dict[tuple[int, str], Any] = {}
_lock = threading.RLock()  # opening an archive opens where it lies


def protocol_of(address: str) -> str:
    """Return the protocol of an address, in lower case; empty for a path.

    >>> protocol_of("S3://bucket/a.jpg"), protocol_of("photos/a.jpg")
    ('s3', '')
    """
    match = _SCHEME.match(address)
    return match[1].lower() if match else ""


def is_address(text: object) -> bool:
    """Return whether an input or output is the address of files that fsspec opens.

    Paths, names of the package's examples, cameras and video streams are not. A web address is one if it ends like a
    file that is an image, a list, an archive or a table; others are videos and streams.

    >>> [is_address(text) for text in ("s3://bucket/photos/**", "https://host/a.jpg", "zip://**::photos.zip")]
    [True, True, True]
    >>> [is_address(text) for text in ("photos", "builtin:demo", 0, "rtsp://camera/live", "https://host/a.mp4")]
    [False, False, False, False, False]
    """
    address = str(text)
    protocol = protocol_of(address)
    if not protocol or protocol in _STREAMS or protocol in _LOCAL:
        return False
    if protocol in ("http", "https"):
        return suffix_of(address) in _WEB_SUFFIXES
    return True


def suffix_of(address: str) -> str:
    """Return the suffix of an address in lower case, without the query of a web address.

    >>> suffix_of("https://host/A.JPG?size=large")
    '.jpg'
    """
    return PurePosixPath(_without_query(address).rpartition("/")[2]).suffix.lower()


def redact_address(address: str) -> str:
    """Return an address without user name and password, and a web address without its query, which may be signed.

    >>> redact_address("s3://key:secret@bucket/a.jpg"), redact_address("https://host/a.jpg?X-Amz-Signature=1f")
    ('s3://bucket/a.jpg', 'https://host/a.jpg')
    >>> redact_address("zip://a.jpg::s3://key:secret@bucket/photos.zip")
    'zip://a.jpg::s3://bucket/photos.zip'
    """
    protocol = protocol_of(address)
    if not protocol:
        return address
    if protocol in _ARCHIVES:
        member, separator, archive = address.rpartition("::")
        return f"{member}{separator}{redact_address(archive)}" if separator else address
    user, rest = _split_user(address)
    address = address[: address.index("://") + 3] + rest if user else address
    return _without_query(address)


def _without_query(address: str) -> str:
    """Return a web address without query; in others `?` is a part of the name."""
    if protocol_of(address) not in ("http", "https"):
        return address
    return re.split(r"[?#]", address, maxsplit=1)[0]


def _split_user(address: str) -> tuple[str, str]:
    """Return user name and password of an address, and what follows them; an empty user if there is none."""
    scheme, _, rest = address.partition("://")
    user, public, query = split_url(rest)
    if not user or (scheme.lower() in _ACCOUNT_PROTOCOLS and ":" not in user):
        return "", rest
    return user, public + query


def open_filesystem(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the key of the address in it.

    The file system is kept for the life of the process, and may be used on several threads.

    Args:
        address: An address, see `is_address`.

    Raises:
        ConfigError: If the protocol is unknown, or its package is not installed.
        RemoteError: If the archive that an address names cannot be opened.
    """
    protocol = protocol_of(address)
    if protocol in _ARCHIVES:
        member, separator, archive = address.rpartition("::")
        if not separator:
            raise ConfigError(
                f"{address}: expected {protocol}://MEMBER::ARCHIVE, such as {protocol}://**::s3://b/a.zip"
            )
        return _cached(f"{protocol}::{archive}", lambda: _open_archive(protocol, archive)), member.partition("://")[2]
    user, rest = _split_user(address)
    root = f"{protocol}://{user}@{rest.partition('/')[0]}"
    fs = _cached(root, lambda: _open_protocol(protocol, address, user))
    is_s3 = protocol in ("s3", "s3a")
    return fs, fs._strip_protocol(f"{protocol}://{rest}" if user and is_s3 else address)


def _cached(name: str, open_it: Callable[[], Any]) -> Any:
    """Return the file system of a name, opened once per process; a forked process opens its own."""
    key = (os.getpid(), name)
    with _lock:
        if key not in _filesystems:
            _filesystems[key] = open_it()
        return _filesystems[key]


def _open_protocol(protocol: str, address: str, user: str) -> Any:
    """Open the file system of a protocol."""
    try:
        from fsspec.registry import available_protocols, get_filesystem_class
    except ImportError as error:
        raise ConfigError(
            f"{redact_address(address)} needs the extra remote: pip install 'grounded_sam[remote]'"
        ) from error
    try:
        kind = get_filesystem_class(protocol)
    except ValueError as error:
        known = ", ".join(sorted({"s3", "gs", "az", "hf", "https", "zip"} & set(available_protocols())))
        raise ConfigError(
            f"{redact_address(address)}: unknown protocol {protocol!r}; known are {known}, others of fsspec, and the "
            "streams of source=video"
        ) from error
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        way_out = f"pip install '{package}'" if package else describe_error(error)
        raise ConfigError(f"{redact_address(address)} needs a package that is not installed: {way_out}") from error
    options: dict[str, Any] = {"skip_instance_cache": True}
    if protocol in ("s3", "s3a", "gs", "gcs"):
        options["use_listings_cache"] = False  # it would keep the names of all objects, and miss new ones
    if protocol in ("s3", "s3a"):
        key, _, secret = user.partition(":")
        options |= {"key": unquote(key), "secret": unquote(secret)} if user else {}
        if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & set(os.environ):  # `retry` is enough
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
    else:
        options |= kind._get_kwargs_from_urls(address)
    with convert_remote_errors(address):
        fs = kind(**options)
        if protocol in ("s3", "s3a"):
            fs.retries = 1
        return fs


def _open_archive(protocol: str, archive: str) -> Any:
    """Open an archive, local or under an address, as a file system."""
    from fsspec.registry import get_filesystem_class

    with convert_remote_errors(archive):
        if is_address(archive):
            fs, key = open_filesystem(archive)
            file = fs.open(key, "rb", block_size=_ARCHIVE_BLOCK)
        else:
            file = open(os.path.expanduser(archive), "rb")  # noqa: SIM115 - it is open as long as the file system is
        try:
            return get_filesystem_class(protocol)(fo=file, skip_instance_cache=True)
        except (EOFError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise RemoteError(f"{redact_address(archive)}: damaged, or no {protocol} archive") from error


@contextmanager
def convert_remote_errors(address: str) -> Iterator[None]:
    """Turn what fsspec and the libraries below it raise into errors of one line.

    Args:
        address: What is read or written, for the message.

    Raises:
        MissingObjectError: If there is no such object.
        AccessDeniedError: If credentials are missing, wrong or not enough.
        RemoteError: For anything else.
    """
    try:
        yield
    except (RemoteError, ConfigError):
        raise
    except Exception as error:  # the libraries below fsspec raise many kinds of error
        raise _converted(error, redact_address(address)) from (None if redact(str(error)) != str(error) else error)


def _converted(error: Exception, shown: str) -> RemoteError:
    """Return the error of one line for an error of fsspec."""
    name, status = type(error).__name__, _status(error)
    if isinstance(error, FileNotFoundError | IsADirectoryError | KeyError) or status == 404:
        return MissingObjectError(f"{shown}: no such object")
    if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"):
        return AccessDeniedError(
            f"{shown}: no credentials found; set those of {protocol_of(shown) or 'it'}, such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for s3"
        )
    if isinstance(error, PermissionError) or status in (401, 403):
        return AccessDeniedError(f"{shown}: access denied ({_reason(error)})")
    return RemoteError(f"{shown}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Return the reason of an error: that of the system, else its kind and first line."""
    text = error.strerror if isinstance(error, OSError) else None
    return redact(text) if text else describe_error(error)


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error, or of the error that caused it."""
    for _ in range(4):
        if error is None:
            return None
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # requests and httpx; aiohttp; gcsfs
            code = getattr(response, "status_code", None) or getattr(error, "status", None)
            code = code or getattr(error, "code", None)
        if isinstance(code, int) and 100 <= code < 600:
            return code
        error = error.__cause__ or error.__context__
    return None


def is_transient(error: BaseException) -> bool:
    """Return whether a request that failed may succeed when it is repeated.

    >>> is_transient(ConnectionResetError()), is_transient(FileNotFoundError())
    (True, False)
    """
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
        return False
    if (status := _status(error)) is not None:
        return status in _TRANSIENT_STATUSES
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    name = type(error).__name__
    return type(error).__module__.startswith(_NETWORK_LIBRARIES) and "Credentials" not in name and "Param" not in name


def retry(call: Callable[[], T]) -> T:
    """Call a function; where a transient error comes, call it again after a while, twice as long each time."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if attempt == ATTEMPTS - 1 or not is_transient(error):
                raise
        time.sleep(FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.0))  # not all workers at once
    raise AssertionError  # the last attempt returned or raised


def read_bytes(fs: Any, key: str, span: tuple[int, int] | None = None) -> bytes:
    """Return the content of an object; transient errors are tried again.

    Args:
        fs: File system of `open_filesystem`.
        key: Key of the object.
        span: First byte, and the one to stop before, if only a part is wanted.

    Raises:
        RemoteError: If it cannot be read; `MissingObjectError` and `AccessDeniedError` are kinds of it.
    """
    start, end = span or (None, None)
    with convert_remote_errors(address_of(fs, key)):
        data = retry(lambda: fs.cat_file(key, start=start, end=end))
    return bytes(data)


def write_bytes(fs: Any, key: str, data: bytes, create: bool = False) -> None:
    """Write an object in one request: readers see the whole content or none of it.

    Args:
        fs: File system of `open_filesystem`.
        key: Key of the object.
        data: Its content.
        create: Whether the object must not exist yet; checked by the server, where it can.

    Raises:
        FileExistsError: If `create` is set and the object exists with another content.
        RemoteError: If it cannot be written.
    """
    address, mode = address_of(fs, key), "create" if create else "overwrite"
    try:
        with convert_remote_errors(address):
            retry(lambda: fs.pipe_file(key, data, mode=mode))
    except MissingObjectError as error:
        raise RemoteError(f"{redact_address(address)}: no such bucket or folder") from error
    except RemoteError as error:
        if not create or not (isinstance(error.__cause__, FileExistsError) or _status(error) in (409, 412)):
            raise
        if read_bytes(fs, key) != data:  # else an attempt whose answer was lost
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), redact_address(address)) from error


def address_of(fs: Any, key: str) -> str:
    """Return the address of a key in a file system, without credentials."""
    return str(fs.unstrip_protocol(key))


def _read_span(archive: str, start: int, end: int) -> bytes:
    """Return a part of an archive, local or under an address."""
    if is_address(archive):
        fs, key = open_filesystem(archive)
        return read_bytes(fs, key, (start, end))
    with convert_remote_errors(archive), open(os.path.expanduser(archive), "rb") as file:
        file.seek(start)
        return file.read(end - start)


@lru_cache(maxsize=2)
def _row_group(archive: str, group: int, column: str) -> Any:
    """Return a column of a group of rows of a Parquet file; rows of one group are mostly read one after the other."""
    import pyarrow.parquet as pq

    if not is_address(archive):
        with pq.ParquetFile(os.path.expanduser(archive)) as table:
            return table.read_row_group(group, columns=[column]).column(0)
    fs, key = open_filesystem(archive)
    with fs.open(key, "rb", block_size=_ARCHIVE_BLOCK) as file, pq.ParquetFile(file) as table:
        return table.read_row_group(group, columns=[column]).column(0)


def open_lance(address: str, version: int | None = None) -> Any:
    """Open a Lance table, local or under an address.

    Args:
        address: Path or address of the table.
        version: Version of the table; None for the newest.

    Returns:
        A `lance.LanceDataset`.

    Raises:
        ConfigError: If the package is not installed.
        RemoteError: If the table cannot be read; `MissingObjectError` if there is none.
    """
    try:
        import lance
    except ImportError as error:
        raise ConfigError(
            f"{redact_address(address)}: Lance tables need the extra lance: pip install 'grounded_sam[lance]'"
        ) from error
    protocol, options = protocol_of(address), {}
    if protocol in ("s3", "s3a"):  # Lance does not use fsspec, but the same environment variables
        user, rest = _split_user(address)
        key, _, secret = user.partition(":")
        address = f"{protocol}://{rest}"
        if user:
            options = {"aws_access_key_id": unquote(key), "aws_secret_access_key": unquote(secret)}
        if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            options["allow_http"] = "true"
    shown = redact_address(address)
    try:
        return lance.dataset(address if protocol else os.path.abspath(address), version, storage_options=options)
    except Exception as error:
        reason = lance_reason(error)
        if "not found" in reason.lower():
            raise MissingObjectError(f"{shown}: no Lance table, or no version {version or 1} of it") from error
        raise RemoteError(f"{shown}: {reason}") from error


def lance_reason(error: Exception) -> str:
    """Return the message of an error of Lance, a ValueError or OSError, without places in its source."""
    return re.sub(r",? \S+\.rs:\d+(:\d+)?", "", redact(describe_error(error)))


@lru_cache(maxsize=8)
def _lance_table(address: str, version: int) -> Any:
    """Return a version of a Lance table, which does not change."""
    return open_lance(address, version)


def _read_cell(address: str) -> bytes:
    """Return the bytes of a cell of a table.

    Args:
        address: `parquet://COLUMN/GROUP/ROW::FILE`, with a row of a group of rows, or
            `lance://COLUMN/VERSION/ROW::TABLE`.
    """
    member, _, archive = address.rpartition("::")
    protocol, _, cell = member.partition("://")
    with convert_remote_errors(address):
        column, part, row = cell.rsplit("/", 2)
        if protocol == "parquet":
            value = retry(lambda: _row_group(archive, int(part), column))[int(row)].as_py()
        else:
            value = _lance_table(archive, int(part)).take([int(row)], columns=[column]).column(0)[0].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise RemoteError(f"{redact_address(address)}: no bytes in this row")
        return data


@dataclass(frozen=True)
class Location:
    """An object under an address, as it was listed. It can be pickled, and holds no connection.

    Attributes:
        address: Its address, which may have credentials: show `str(location)` instead.
        size: Bytes; None if unknown.
        etag: What changes with its content: entity tag, checksum or version; None where the protocol has none.
        modified_ns: When it was changed last, nanoseconds since 1970; None if unknown.
        span: Of a member of an uncompressed archive, whose address is that of the member: first byte in the archive,
            and the one to stop before.

    >>> location = Location("s3://key:secret@bucket/photos/a.jpg", 12)
    >>> str(location), location.name, location.suffix
    ('s3://bucket/photos/a.jpg', 'a.jpg', '.jpg')
    """

    address: str = field(repr=False)
    size: int | None = None
    etag: str | None = None
    modified_ns: int | None = None
    span: tuple[int, int] | None = None

    def __str__(self) -> str:
        return redact_address(self.address)

    @property
    def name(self) -> str:
        """Last part of the address."""
        path = self.address.rpartition("::")[0] if protocol_of(self.address) in _ARCHIVES else self.address
        return _without_query(path).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Suffix of the name, as it is written."""
        return PurePosixPath(self.name).suffix

    def read_bytes(self) -> bytes:
        """Return its content.

        Raises:
            RemoteError: If it cannot be read; see `read_bytes`.
        """
        if self.span is not None:
            data = _read_span(self.address.rpartition("::")[2], *self.span)
            if len(data) != self.span[1] - self.span[0]:
                raise RemoteError(f"{self}: the archive ends in it")
            return data
        if protocol_of(self.address) in TABLES:
            return _read_cell(self.address)
        fs, key = open_filesystem(self.address)
        return read_bytes(fs, key)


def local_archive(address: str) -> str | None:
    """Return the path of the archive of this machine that an address has a member of; None if it has none.

    >>> local_archive("tar://a.jpg::/data/a.tar"), local_archive("s3://bucket/a.jpg")
    ('/data/a.tar', None)
    """
    archive = address.rpartition("::")[2] if protocol_of(address) in _ARCHIVES and "::" in address else ""
    return archive if archive and not protocol_of(archive) else None


def below(root: str, address: str) -> str | None:
    """Return an address with the credentials of a root above it; None if it is not below that root.

    Args:
        root: Address of a folder, or of an archive.
        address: An address without credentials, which need not be trusted.

    >>> below("s3://key:secret@bucket/photos", "s3://bucket/photos/a.jpg")
    's3://key:secret@bucket/photos/a.jpg'
    >>> below("s3://bucket/photos", "s3://bucket/photos-of-others/a.jpg") is None
    True
    """
    address = redact_address(address)
    if protocol_of(address) in _ARCHIVES:
        member, separator, archive = address.rpartition("::")
        root = root.rpartition("::")[2]
        found = archive if archive == root and separator else below(root, archive) if separator else None
        return None if found is None else f"{member}::{found}"
    if not is_address(address) or _STEPS_UP.search(unquote(address)):
        return None
    user, _ = _split_user(root)
    folder = redact_address(root).rstrip("/")
    if not protocol_of(folder) or (address != folder and not address.startswith(f"{folder}/")):
        return None
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{user}@{rest}" if user else address
