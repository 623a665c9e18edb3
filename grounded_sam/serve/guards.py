"""What every request passes before it reaches a route: host, origin, token and size; and headers of every answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from grounded_sam.errors import describe_error, print_traceback
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.settings import ServeSettings

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Paths that need no token, for programs that watch the server.
OPEN_PATHS = ("/health", "/ready")
#: Paths that take forms with a file, and the largest body of any other request, in bytes.
UPLOAD_PATHS, MAX_IN_MEMORY = ("/v1/pictures", "/v1/videos"), 64_000_000
#: Seconds that a client has to send the rest of a body that is refused.
DRAIN_S = 5.0
#: Names of this machine that a browser may use for a server on a loopback address.
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
#: Headers of every answer.
HEADERS = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """Refuse requests that must not reach a route, and add headers to all answers.

    - On a loopback address without a token, the name of the host must be one of this machine: a page of another site
      whose name was made to lead here (DNS rebinding) is refused.
    - A browser that sends a request for a page of another origin is refused, unless `cors` names it.
    - With a token, requests need `Authorization: Bearer TOKEN`, or `Basic` with the token as password, which browsers
      ask for. It is compared in constant time.
    - A body of more than `max_body_mb` is refused as soon as it is known.

    Args:
        app: The application behind it.
        settings: The group `serve`.
    """

    def __init__(self, app: AsgiApp, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings
        self.max_bytes = int(settings.max_body_mb * 1e6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, body = False, _Body(self._limit(scope), receive)

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if body.is_too_large and not started:  # whatever the application makes of the interruption
                return
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, body.receive, send_with_headers)
            if body.is_too_large and not started:
                raise too_large(body.limit)
        except Exception as error:  # what no route expects must neither reach the client nor end the connection
            refusal = error if isinstance(error, RequestError) else unexpected(error)
            if not started:
                is_large, body.is_too_large = refusal.status == 413, False
                await _refuse(send_with_headers, refusal, receive if is_large else None)

    def _check(self, scope: Scope) -> None:
        """Check the headers of a request.

        Raises:
            RequestError: If it must not be answered.
        """
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.settings.token is None and not self._is_own_host(host):
            raise RequestError(421, "the server answers only under a name of its own machine, such as localhost")
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed(origin, host):
            raise RequestError(403, "pages of another origin may not use this server; name them in serve.cors")
        if scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            self._check_token(headers.get("authorization", ""))
        length, limit = headers.get("content-length", "0"), self._limit(scope)
        if not length.isdecimal() or int(length) > limit:
            raise too_large(limit)

    def _limit(self, scope: Scope) -> int:
        """Return the largest body of a request: forms are written to disk, others are held in memory."""
        kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
        is_form = bool(kinds) and kinds[0].startswith(b"multipart/form-data") and scope["path"] in UPLOAD_PATHS
        return self.max_bytes if is_form else min(self.max_bytes, MAX_IN_MEMORY)

    def _is_own_host(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return name.lower() in (*LOOPBACK_NAMES, self.settings.host.lower())

    def _is_allowed(self, origin: str, host: str) -> bool:
        """Return whether the page that sends a request is of this server, or in `cors`."""
        if origin in self.settings.cors:
            return True
        try:
            return urlsplit(origin).netloc.lower() == host.lower() != ""
        except ValueError:
            return False

    def _check_token(self, authorization: str) -> None:
        if self.settings.token is None:
            return
        kind, _, given = authorization.partition(" ")
        given = given.strip()
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("utf-8", "replace").partition(":")[2]
            except (binascii.Error, ValueError):
                given = ""
        elif kind.lower() != "bearer":
            given = ""
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.settings.token.encode()):
            raise RequestError(
                401,
                "the token is missing or wrong; send the header Authorization: Bearer TOKEN",
                {"WWW-Authenticate": 'Basic realm="grounded_sam, the password is the token", charset="UTF-8"'},
            )


class _Body:
    """The body of a request, counted as it comes.

    Args:
        limit: Largest size in bytes.
        receive: Receives its parts.
    """

    def __init__(self, limit: int, receive: Receive) -> None:
        self.limit, self._receive = limit, receive
        self.is_too_large, self._received = False, 0

    async def receive(self) -> Message:
        """Receive a part.

        Raises:
            RequestError: If it makes the body too large (413).
        """
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self._received > self.limit:
                self.is_too_large = True
                raise too_large(self.limit)
        return message


def too_large(limit: int) -> RequestError:
    """Return the error for a body that is too large.

    Args:
        limit: Largest size in bytes.
    """
    message = (
        f"the request is larger than the {limit:,} bytes allowed (serve.max_body_mb; JSON up to {MAX_IN_MEMORY:,})"
    )
    return RequestError(413, message, {"Connection": "close"})


def unexpected(error: Exception) -> RequestError:
    """Return the error for the client where a route fails in a way that nobody expected; the log says more."""
    print_traceback()
    log.warning("a request failed: %s", describe_error(error))
    return RequestError(500, f"the server failed on this request ({type(error).__name__}); its log says more")


async def _refuse(send: Send, error: RequestError, receive: Receive | None = None) -> None:
    """Answer with an error, and read on what a client is about to send, since it may listen only afterwards."""
    body = json.dumps({"error": str(error)}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if receive is not None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drain(receive), DRAIN_S)
    await send({"type": "http.response.body"})


async def _drain(receive: Receive) -> None:
    """Read the rest of a body, up to a limit."""
    num_bytes = 0
    while num_bytes < MAX_IN_MEMORY:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return
