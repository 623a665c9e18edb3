"""The application: routes, errors, guards and static files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from grounded_sam.errors import GroundedSamError
from grounded_sam.formats.store_runs import package_version
from grounded_sam.serve.answers import error_answer
from grounded_sam.serve.guards import Guard
from grounded_sam.serve.label_studio.backend import Backend
from grounded_sam.serve.problems import ClientGoneError
from grounded_sam.serve.routes import about, label_studio, pages, pictures, sessions, stores, sweeps, videos
from grounded_sam.serve.server import Server

DESCRIPTION = """\
Detect, segment and track what text names. Boxes are xyxy in pixels of the upright image, scores 0 to 1, masks
compressed COCO RLE unless another form is asked for. An error is `{"error": "one sentence"}`.
"""


def create_app(server: Server) -> FastAPI:
    """Make the application of a server; starting it starts to load the models.

    Args:
        server: What the routes share.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        try:
            yield
        finally:
            server.close()

    app = FastAPI(
        title="grounded_sam",
        version=package_version("grounded_sam"),
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads its script from another host
        redoc_url=None,
    )
    app.state.server, app.state.backend = server, Backend(server)
    for module in (about, pictures, sessions, videos, stores, sweeps, label_studio, pages):
        app.include_router(module.router)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "page" / "static"), name="static")
    for kind in (GroundedSamError, ClientGoneError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, error_answer)
    if server.settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Last-Event-ID"],
        )
    guard: Any = Guard
    app.add_middleware(guard, settings=server.settings)
    return app
