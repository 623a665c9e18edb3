"""Routes that tell how the server is, and what it can do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from grounded_sam.serve.answers import ERRORS, ServerOf

router = APIRouter(tags=["about"])


@router.get("/health", summary="Whether the server runs")
async def health() -> dict[str, str]:
    """Answer at once, also while the models are being loaded."""
    return {"status": "ok"}


@router.get("/ready", summary="Whether the models are loaded", responses={503: ERRORS[503]})
async def ready(server: ServerOf) -> JSONResponse:
    """Answer 503 until the models are loaded."""
    if not server.worker.is_ready:
        return JSONResponse({"error": "the models are being loaded"}, 503, headers={"Retry-After": "2"})
    return JSONResponse({"status": "ready", "waiting": server.worker.num_waiting, "videos": server.worker.num_long})


@router.get("/v1/about", summary="Stages, classes, settings, device, licenses and limits")
async def about(server: ServerOf) -> dict[str, Any]:
    """Return what the server was started with; answers while the models are being loaded, too."""
    return server.about()
