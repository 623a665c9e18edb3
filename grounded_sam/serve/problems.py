"""Errors of requests: a status, and one sentence that names no path of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from grounded_sam.errors import GroundedSamError, OutOfMemoryError, StageError, one_line

#: Longest message, in characters.
MAX_MESSAGE = 1000
#: An absolute path; its last part is kept.
_PATH = re.compile(r"(?<![\w.:/])(?:~?/|[A-Za-z]:\\)(?:[^\s'\",;:()\[\]]*[/\\])*([^\s'\",;:()\[\]/\\]*)")


class RequestError(GroundedSamError):
    """Raised for a request that cannot be answered as it is.

    Args:
        status: HTTP status, 400 to 599.
        message: One sentence: what was expected, and what was given.
        headers: Headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class ClientGoneError(Exception):
    """Raised where the client has closed the connection before its answer was ready."""


def status_of(error: GroundedSamError) -> int:
    """Return the HTTP status for an error of this package.

    >>> from grounded_sam.errors import ImageError
    >>> status_of(ImageError("not an image")), status_of(OutOfMemoryError("too large"))
    (422, 503)
    """
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, OutOfMemoryError):
        return 503
    return 500 if isinstance(error, StageError) else 422


def public_message(error: BaseException, folders: Iterable[Path] = ()) -> str:
    """Return the message of an error without paths of this machine.

    Args:
        error: The error.
        folders: Folders whose files are named relative to them.

    >>> from grounded_sam.errors import ImageError
    >>> public_message(ImageError("/tmp/x1/a.png: the file is empty"), [Path("/tmp/x1")])
    'a.png: the file is empty'
    >>> public_message(ImageError("cannot open /etc/shadow (denied)"))
    'cannot open shadow (denied)'
    """
    text = one_line(str(error)) or type(error).__name__
    for folder in sorted(map(str, folders), key=len, reverse=True):
        text = text.replace(f"{folder}/", "").replace(folder, ".")
    if not isinstance(error, RequestError):  # those of the server itself name routes, and nothing else
        text = _PATH.sub(r"\1", text)
    return text[:MAX_MESSAGE]
