"""Routes for sweeps that the server was started with."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse, Response

from grounded_sam.serve.answers import ERRORS, ServerOf, in_thread
from grounded_sam.serve.routes.pictures import CACHED
from grounded_sam.serve.routes.stores import Cursor, Masks
from grounded_sam.serve.schemas import ComparisonAnswer, SweepTableAnswer

router = APIRouter(tags=["sweeps"])
SweepName = Annotated[str, Path(max_length=200, description="name of a sweep in serve.sweeps")]


@router.get(
    "/v1/sweeps/{sweep}",
    summary="The table of a sweep",
    responses={200: {"model": SweepTableAnswer}, **ERRORS},
)
async def show_sweep(server: ServerOf, sweep: SweepName) -> JSONResponse:
    """Return a row for each job, the best one first."""
    return JSONResponse(await in_thread(server, server.sweeps.table, sweep))


@router.get(
    "/v1/sweeps/{sweep}/compare",
    summary="Two jobs side by side, 50 images at a time",
    responses={200: {"model": ComparisonAnswer}, **ERRORS},
)
async def compare_jobs(
    server: ServerOf,
    sweep: SweepName,
    a: Annotated[str, Query(max_length=500, description="a job, as in the table")],
    b: Annotated[str, Query(max_length=500, description="another job")],
    min_iou: Annotated[float, Query(gt=0, le=1, description="IoU from which two objects are the same")] = 0.5,
    masks: Masks = "rle",
    cursor: Cursor = 0,
) -> JSONResponse:
    """Match the objects of two jobs by class and IoU; images that differ most come first."""
    answer = await in_thread(server, server.sweeps.compare, sweep, a, b, min_iou, masks, cursor)
    return JSONResponse(answer)


@router.get("/v1/sweeps/{sweep}/image", summary="An image of a job as JPEG", responses=ERRORS, response_class=Response)
async def show_job_picture(
    server: ServerOf,
    sweep: SweepName,
    job: Annotated[str, Query(max_length=500, description="a job, as in the table")],
    name: Annotated[str, Query(max_length=4096, description="name of an image, as in a comparison")],
    max_side: Annotated[int | None, Query(ge=16, le=65_500, description="longest side in pixels; none: all")] = None,
) -> Response:
    """Return an image that a job has processed; its file must be below the roots, or an example of the package."""
    encoded = await in_thread(server, server.sweeps.picture, sweep, job, name, max_side)
    return Response(encoded, media_type="image/jpeg", headers=CACHED)
