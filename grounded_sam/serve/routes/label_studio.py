"""Routes of an ML backend of Label Studio: connect it with the address of the server and `/label-studio`."""

from __future__ import annotations

import logging
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from grounded_sam.errors import GroundedSamError
from grounded_sam.formats.label_studio_config import read_labeling_config
from grounded_sam.serve.answers import ERRORS, ServerOf, in_thread
from grounded_sam.serve.label_studio.backend import Backend
from grounded_sam.serve.label_studio.bodies import PredictTasksBody, SetupBody, WebhookBody
from grounded_sam.serve.problems import public_message


def get_backend(request: Request) -> Backend:
    """Return the ML backend."""
    return cast(Backend, request.app.state.backend)


BackendOf = Annotated[Backend, Depends(get_backend)]
log = logging.getLogger(__name__)
router = APIRouter(prefix="/label-studio", tags=["Label Studio"])


@router.get("/health", summary="Whether the server runs")
async def backend_health(server: ServerOf) -> dict[str, Any]:
    """Answer at once, also while the models are being loaded."""
    return {"status": "UP", "model_class": "grounded_sam", "ready": server.worker.is_ready}


@router.post("/setup", summary="Connect a project", responses=ERRORS)
async def setup(backend: BackendOf, body: SetupBody) -> dict[str, Any]:
    """Remember where the files of a project are, and return the version of its predictions."""
    backend.projects.connect(body.project, body.hostname, body.access_token)
    try:
        read_labeling_config(body.label_config)
    except GroundedSamError as error:  # a project is often connected before it has a config
        log.warning("Label Studio, project %s: %s", body.project, error)
    return {"model_version": backend.version(body.label_config)}


@router.post("/predict", summary="Predict tasks, or what a smart tool asks", responses=ERRORS)
async def predict_tasks(request: Request, server: ServerOf, backend: BackendOf, body: PredictTasksBody) -> JSONResponse:
    """Return an entry for each task; long videos and what is not ready after a minute are sent afterwards."""
    try:
        results = await backend.predict(request, body)
    except GroundedSamError as error:  # Label Studio shows the status alone
        log.warning("Label Studio, project %s: %s", body.project, public_message(error, server.public_folders))
        raise
    return JSONResponse({"results": results, "model_version": backend.version(body.label_config)})


@router.post("/webhook", summary="Take an annotation into a store", responses=ERRORS)
async def webhook(server: ServerOf, backend: BackendOf, body: WebhookBody) -> JSONResponse:
    """Accept, reject, correct and add the objects of a store as an annotation has them; other actions are ignored."""
    try:
        answer = await in_thread(server, backend.annotations.take, body)
    except GroundedSamError as error:
        log.warning("Label Studio, webhook %s: %s", body.action, public_message(error, server.public_folders))
        raise
    for note in answer["notes"]:
        log.warning("Label Studio, webhook %s: %s", body.action, note)
    return JSONResponse(answer)
