"""Talk to Label Studio, and to no other host."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

from grounded_sam.errors import GroundedSamError, one_line, shorten

#: Environment variable with the token of Label Studio, as in its own SDK.
TOKEN_VARIABLE = "LABEL_STUDIO_API_KEY"
#: Seconds after which a request is given up.
TIMEOUT_S = 30.0
#: Bytes that are read at a time.
CHUNK = 1 << 20
#: Largest JSON response, in bytes.
MAX_JSON = 64_000_000


class LabelStudioError(GroundedSamError):
    """Raised if Label Studio cannot be reached, or refuses a request.

    Args:
        message: One sentence.
        status: HTTP status of its answer; None if there was none.
        detail: What its answer said.
    """

    def __init__(self, message: str, status: int | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.http_status, self.detail = status, detail


def check_address(address: Any, name: str) -> str:
    """Return the address of Label Studio without a slash at its end.

    Args:
        address: Address, such as `http://localhost:8080`.
        name: Name of the setting, for messages.

    Raises:
        LabelStudioError: If it is no http or https URL, or has a password, a query or a fragment.

    >>> check_address("http://localhost:8080/", "url")
    'http://localhost:8080'
    """
    try:
        parts = urlsplit(address) if isinstance(address, str) else None
        is_plain = parts is not None and not (parts.username or parts.password or parts.query or parts.fragment)
        if parts is not None and is_plain and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    except ValueError:
        pass
    raise LabelStudioError(f"{name} must be an address such as http://localhost:8080, got {shorten(address)}")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class _SameOrigin(urllib.request.HTTPRedirectHandler):
    """Follow redirects within Label Studio alone."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> Any:
        """Return the request to follow."""
        if _origin(newurl) != _origin(req.full_url):
            host = urlsplit(newurl).hostname
            raise LabelStudioError(
                f"Label Studio sends the file from another host, {host}, which is not asked; for a cloud storage, turn "
                "off pre-signed URLs"
            )
        if "/user/login" in urlsplit(newurl).path:
            raise LabelStudioError("Label Studio wants a login: the token is missing or wrong", 401)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class LabelStudioClient:
    """Requests to one Label Studio.

    Args:
        address: Its address.
        token: An access token: a legacy one, or a personal one, from which short-lived ones are made.

    Raises:
        LabelStudioError: If the address is malformed.

    >>> LabelStudioClient("http://localhost:8080", "x").file_url("/data/upload/1/a.png")
    'http://localhost:8080/data/upload/1/a.png'
    """

    def __init__(self, address: str, token: str | None) -> None:
        self.address, self._token = check_address(address, "the address of Label Studio"), token
        self._access: str | None = None
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_SameOrigin())

    def __repr__(self) -> str:
        return f"LabelStudioClient({self.address!r})"  # without the token

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request to the API, and return its answer.

        Args:
            method: `GET`, `POST`, `PATCH` or `DELETE`.
            path: Path below the address, such as `/api/projects`.
            body: JSON to send.

        Raises:
            LabelStudioError: If there is no answer, an error, or no JSON.
        """
        content = None if body is None else json.dumps(body).encode()
        with self._open(method, self.address + path, content) as answer:
            received = answer.read(MAX_JSON + 1)
        if len(received) > MAX_JSON:
            raise LabelStudioError(f"the answer of Label Studio to {path} has more than {MAX_JSON:,} bytes")
        try:
            return json.loads(received) if received else None
        except ValueError as error:
            raise LabelStudioError(f"{self.address}{path} does not answer in JSON; is it Label Studio?") from error

    def file_url(self, given: str) -> str:
        """Return the URL of a file of a task.

        Args:
            given: As the task has it: a path, or a URL.

        Raises:
            LabelStudioError: If it is on another host.
        """
        base = urlsplit(self.address)
        url = urljoin(f"{base.scheme}://{base.netloc}", given) if given.startswith("/") else given
        try:
            if _origin(url) == _origin(self.address):
                return url
        except ValueError:
            pass
        raise LabelStudioError(
            f"the file {shorten(given)} is not on {self.address}, and other hosts are not asked; import it into Label "
            "Studio, or set serve.label_studio to the address that is in its tasks"
        )

    def download(self, url: str, out: IO[bytes], max_bytes: int) -> None:
        """Write a file of Label Studio.

        Args:
            url: From `file_url`.
            out: Written to.
            max_bytes: Largest size.

        Raises:
            LabelStudioError: If it cannot be had, or is larger.
        """
        size = 0
        with self._open("GET", url, None) as answer:
            while chunk := answer.read(CHUNK):
                size += len(chunk)
                if size > max_bytes:
                    raise LabelStudioError(f"the file {shorten(url)} has more than the {max_bytes:,} bytes allowed")
                out.write(chunk)

    def _open(self, method: str, url: str, content: bytes | None) -> Any:
        """Send a request; once more with a new access token if the old one has expired."""
        try:
            return self._send(method, url, content, self._authorization())
        except LabelStudioError as error:
            if error.http_status != 401 or not self._is_personal:
                raise
        with self._lock:
            self._access = None
        return self._send(method, url, content, self._authorization())

    @property
    def _is_personal(self) -> bool:
        """Whether the token is a personal one, a JSON web token."""
        return self._token is not None and self._token.count(".") == 2

    def _authorization(self) -> str | None:
        """Return the value of the header."""
        if not self._is_personal:
            return None if self._token is None else f"Token {self._token}"
        with self._lock:
            if self._access is None:
                content = json.dumps({"refresh": self._token}).encode()
                with self._send("POST", f"{self.address}/api/token/refresh", content, None) as answer:
                    try:
                        self._access = str(json.loads(answer.read(MAX_JSON))["access"])
                    except (ValueError, KeyError, TypeError) as error:
                        raise LabelStudioError("Label Studio makes no access token from the personal one") from error
            return f"Bearer {self._access}"

    def _send(self, method: str, url: str, content: bytes | None, authorization: str | None) -> Any:
        headers = {} if content is None else {"Content-Type": "application/json"}
        headers |= {} if authorization is None else {"Authorization": authorization}
        try:
            request = urllib.request.Request(url, content, headers, method=method)
            return self._opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, url) from None
        except (OSError, ValueError) as error:
            reason = one_line(str(error.reason if isinstance(error, urllib.error.URLError) else error))
            raise LabelStudioError(f"Label Studio cannot be reached at {self.address}: {reason}") from None

    def _refused(self, error: urllib.error.HTTPError, url: str) -> LabelStudioError:
        """Return the error for an answer other than 2xx."""
        try:
            detail = _words_of(json.loads(error.read(100_000)))
        except (ValueError, OSError):
            detail = ""
        where = urlsplit(url).path
        if error.code == 401:
            return LabelStudioError(
                f"{self.address} does not accept the token; set {TOKEN_VARIABLE} to one of Account & Settings (a "
                "legacy token counts only where legacy tokens are on)",
                401,
                detail,
            )
        text = f"{self.address} answers {error.code} to {where}"
        return LabelStudioError(f"{text}: {detail}" if detail else text, error.code, detail)


def _words_of(answer: Any) -> str:
    """Return what an error of Label Studio says, in one line.

    >>> _words_of({"detail": "Validation error", "validation_errors": {"url": ["is reserved"]}})
    'Validation error; url: is reserved'
    """
    if not isinstance(answer, dict):
        return one_line(str(answer))[:500]
    details = answer.get("validation_errors")
    parts = [str(answer["detail"])] if answer.get("detail") else []
    if isinstance(details, dict):
        parts += [
            f"{key}: {' '.join(map(str, text)) if isinstance(text, list) else text}" for key, text in details.items()
        ]
    elif details:
        parts.append(str(details))
    return one_line("; ".join(parts or [str(answer)]))[:800]
