"""Routes for sweeps that the server was started with."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse

from grounded_sam.serve.answers import ERRORS, ServerOf, in_thread
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
    summary="Two jobs side by side, 50 pictures at a time",
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
    """Match the objects of two jobs by class and IoU; pictures that differ most come first."""
    answer = await in_thread(server, server.sweeps.compare, sweep, a, b, min_iou, masks, cursor)
    return JSONResponse(answer)
