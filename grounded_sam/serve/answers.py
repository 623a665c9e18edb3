"""How routes wait for the models, and which answer an error becomes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from grounded_sam.errors import GroundedSamError
from grounded_sam.serve.problems import ClientGoneError, RequestError, public_message, status_of
from grounded_sam.serve.schemas import ErrorAnswer
from grounded_sam.serve.server import Server
from grounded_sam.serve.worker import Work

T = TypeVar("T")
#: Errors that any route may answer with, for the OpenAPI description.
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorAnswer, "description": text}
    for code, text in {
        401: "the token is missing or wrong",
        403: "a path outside of the roots, or a page of another origin",
        404: "there is no such thing, or it made room for newer ones",
        413: "larger than the server takes",
        422: "the request, or a file in it, cannot be used",
        429: "too many requests wait; `Retry-After` says when to try again",
        503: "the models are being loaded, or there is not enough memory",
    }.items()
}


def get_server(request: Request) -> Server:
    """Return what the routes share."""
    return cast(Server, request.app.state.server)


ServerOf = Annotated[Server, Depends(get_server)]


async def in_thread(server: Server, function: Callable[..., T], *arguments: Any) -> T:
    """Run a function that reads or encodes on a thread, few at a time.

    Args:
        server: What the routes share.
        function: The function.
        arguments: Its arguments.
    """
    async with server.threads:
        return await run_in_threadpool(function, *arguments)


async def ask(
    request: Request, server: Server, run: Callable[[Sequence[Any]], Sequence[Any]], payload: Any, batch: Any = None
) -> Any:
    """Wait for an answer of the models; a client that leaves takes its request with it.

    Args:
        request: The request, whose body is read.
        server: What the routes share.
        run: See `worker.Work`.
        payload: See `worker.Work`.
        batch: See `worker.Work`.

    Raises:
        RequestError: If the queue is full (429), or the models are being loaded (503).
        ClientGoneError: If the client has closed the connection.
    """
    work = Work(run, payload, batch)
    future = asyncio.wrap_future(server.worker.submit(work))
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ClientGoneError
        return future.result()
    finally:
        future.cancel()
        gone.cancel()


async def _until_gone(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_answer(request: Request, error: Exception) -> Response:
    """Return the answer for an error: a status and one sentence.

    Args:
        request: The request.
        error: What a route has raised, or FastAPI for it.
    """
    if isinstance(error, ClientGoneError):
        return Response(status_code=499)
    if isinstance(error, GroundedSamError):
        headers = error.headers if isinstance(error, RequestError) else {}
        message = public_message(error, get_server(request).public_folders)
        return JSONResponse({"error": message}, status_of(error), headers=headers)
    if isinstance(error, RequestValidationError):
        return JSONResponse({"error": validation_message(error)}, 422)
    if isinstance(error, HTTPException):
        detail = {404: "there is no such route; /docs lists them", 405: "the route does not take this method"}
        message = detail.get(error.status_code, public_message(error))
        return JSONResponse({"error": message}, error.status_code, headers=error.headers)
    raise error


def validation_message(error: RequestValidationError) -> str:
    """Return the first problem of a body or query as one sentence."""
    first = error.errors()[0]
    if first["type"] in ("json_invalid", "model_attributes_type", "missing") and len(first["loc"]) < 2:
        return "the body must be JSON with the keys that /docs lists"
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    message = str(first["msg"])
    return f"{where}: {message[:1].lower()}{message[1:]}"[:500] if where else message[:500]
