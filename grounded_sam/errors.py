"""Errors that a user can fix, and what messages consist of.

The command prints the message of an error as one line and exits with code 1.
"""

import os
import re
import reprlib
import traceback

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxlong = 3, 8, 6, 80, 40
#: A URL, up to the next space, without quotes and punctuation after it.
URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>\S+?)(?=['\"),:;.\]}]*(?:\s|$))")


class GroundedSamError(Exception):
    """Base class of the errors of this package; the message says what was expected and what was given.

    The message is one line, and without user names, passwords and queries of URLs.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(one_line(redact(value)) if isinstance(value, str) else value for value in args))


class ConfigError(GroundedSamError):
    """Raised for a config key, a value or a combination of settings that cannot work."""


class VocabularyError(GroundedSamError, ValueError):
    """Raised for text that names no class, or one class twice."""


class ImageError(GroundedSamError):
    """Raised for a file or an array that cannot be used as an image."""


class StageError(ImageError):
    """Raised where a stage fails on an image; `__cause__` is the error of the stage, if it raised one."""


class OutOfMemoryError(StageError):
    """Raised where a batch of images does not fit into the memory of the device; a smaller one may."""


class CheckpointError(GroundedSamError):
    """Raised for weights that are missing, damaged or those of another model."""


class RemoteError(GroundedSamError, OSError):
    """Raised for an address that cannot be read, listed or written."""


class MissingObjectError(RemoteError, FileNotFoundError):
    """Raised where there is no object under an address."""


class AccessDeniedError(RemoteError, PermissionError):
    """Raised where credentials are missing, wrong, or do not allow what is done."""


class EditError(ConfigError):
    """Raised for decisions about the objects of a store that cannot be applied; none of their batch is.

    Args:
        problems: Position of each such edit in the batch, and why it cannot be applied.

    Attributes:
        problems: As above.
    """

    def __init__(self, problems: list[tuple[int, str]]) -> None:
        self.problems = problems
        shown = [f"edit {index}: {reason}" for index, reason in problems[:5]]
        more = [f"and {len(problems) - 5:,} more"] if len(problems) > 5 else []
        super().__init__("; ".join([*shown, *more]))


def one_line(text: str) -> str:
    """Return a text for the terminal: line ends become spaces, and other characters that are not printable are escaped.

    >>> one_line("a\\nb\\x1b[1m")
    'a b\\\\x1b[1m'
    """
    text = " ".join(text.splitlines())
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def describe_error(error: BaseException) -> str:
    """Return the kind and the first line of an error that this package did not raise.

    >>> describe_error(ValueError("too many\\nvalues"))
    'ValueError: too many'
    """
    lines = redact(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def print_traceback() -> None:
    """Print the traceback of the error that is handled, if `GROUNDED_SAM_DEBUG=1`."""
    if os.environ.get("GROUNDED_SAM_DEBUG") == "1":
        traceback.print_exc()


class MissingWeightsError(CheckpointError):
    """Raised for weights that are neither on this machine nor can be downloaded.

    Args:
        repo: Their id on the Hugging Face hub.
        reason: Why they cannot be downloaded.
    """

    def __init__(self, repo: str, reason: str) -> None:
        self.repo = repo
        super().__init__(
            f"weights {repo!r} are not in the cache and cannot be downloaded from the Hugging Face hub ({reason})"
        )


def count_of(count: int, noun: str, plural: str = "") -> str:
    """Write a count with its noun.

    Args:
        count: The count.
        noun: Singular form.
        plural: Plural form; empty for the noun with an "s".

    >>> count_of(1, "image"), count_of(2000, "image"), count_of(0, "class", "classes")
    ('1 image', '2,000 images', '0 classes')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"


def shorten(value: object) -> str:
    """Write a value from a file in a message: `repr` of at most a few items, letters and digits.

    >>> shorten([1, "a"]), shorten("x" * 500)[-8:]
    ("[1, 'a']", "xxxxxxx'")
    """
    return " ".join(_SHORT.repr(value).split())


def split_url(rest: str) -> tuple[str, str, str]:
    """Split a URL, without its scheme, into what identifies a user, the public part, and the query with its `?`.

    >>> split_url("admin:1234@camera:554/live?token=abc")
    ('admin:1234', 'camera:554/live', '?token=abc')
    """
    end = min((i for i in map(rest.find, "/?#") if i >= 0), default=len(rest))
    user, has_user, host = rest[:end].rpartition("@")
    path = rest[end:]
    if not has_user and "@" in rest and not re.fullmatch(r"[^:]*(:\d*)?|\[.*", host):  # an unescaped / ? or # in it
        user, _, path = rest.rpartition("@")
        host = ""
    address = host + path
    end = min((i for i in map(address.find, "?#") if i >= 0), default=len(address))
    return user, address[:end], address[end:]


def redact(text: str) -> str:
    """Replace user names, passwords and queries in the URLs of a text, which may be secret.

    >>> redact("rtsp://admin:1234@camera/live: no answer"), redact("https://host/a.mp4?token=abc")
    ('rtsp://***@camera/live: no answer', 'https://host/a.mp4?***')
    """
    if "://" not in text:
        return text

    def replace(url: re.Match[str]) -> str:
        user, public, query = split_url(url["rest"])
        return f"{url['scheme']}{'***@' if user else ''}{public}{'?***' if query[1:] else ''}"

    return URL.sub(replace, text)
