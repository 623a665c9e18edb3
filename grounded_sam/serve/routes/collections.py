"""Routes for stores and sweeps that the server was started with."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse, Response

from grounded_sam.serve.answers import ERRORS, ServerOf, in_thread
from grounded_sam.serve.objects import MaskForm
from grounded_sam.serve.routes.pictures import CACHED
from grounded_sam.serve.schemas import ComparisonAnswer, StorePage, SweepTableAnswer
from grounded_sam.serve.stores import Reason

router = APIRouter()
StoreName = Annotated[str, Path(max_length=200, description="name of a store in serve.stores")]
SweepName = Annotated[str, Path(max_length=200, description="name of a sweep in serve.sweeps")]
PictureId = Annotated[str, Path(max_length=64, description="id of a picture of the store")]
Cursor = Annotated[int, Query(ge=0, le=2**53, description="number of pictures to pass over: `next` of the last page")]
Masks = Annotated[MaskForm, Query(description="form of masks")]


@router.get(
    "/v1/stores/{store}/pictures",
    tags=["stores"],
    summary="Pictures of a store, 50 at a time",
    responses={200: {"model": StorePage}, **ERRORS},
)
async def list_pictures(
    server: ServerOf,
    store: StoreName,
    class_name: Annotated[str | None, Query(alias="class", max_length=500, description="with an object of it")] = None,
    max_score: Annotated[float | None, Query(ge=0, le=1, description="with an object of at most this score")] = None,
    reason: Annotated[Reason | None, Query(description="why it is worth a look; those that are it most first")] = None,
    cursor: Cursor = 0,
) -> JSONResponse:
    """List the pictures that pass all filters."""

    def page() -> dict[str, object]:
        return server.stores.index(store).page(class_name, max_score, reason, cursor)

    return JSONResponse(await in_thread(server, page))


@router.get(
    "/v1/stores/{store}/pictures/{picture}", tags=["stores"], summary="A picture and its objects", responses=ERRORS
)
async def show_stored_picture(
    server: ServerOf, store: StoreName, picture: PictureId, masks: Masks = "rle"
) -> JSONResponse:
    """Return what the store knows of a picture, with its objects as `detections`."""
    return JSONResponse(await in_thread(server, server.stores.picture, store, picture, masks))


@router.get(
    "/v1/stores/{store}/pictures/{picture}/thumbnail",
    tags=["stores"],
    summary="A picture as JPEG",
    responses=ERRORS,
    response_class=Response,
)
async def show_thumbnail(
    server: ServerOf,
    store: StoreName,
    picture: PictureId,
    max_side: Annotated[int, Query(ge=16, le=8192, description="longest side in pixels")] = 256,
) -> Response:
    """Return a picture, scaled down; its file must be below the roots and as it was when it was processed."""
    encoded = await in_thread(server, server.stores.thumbnail, store, picture, max_side)
    return Response(encoded, media_type="image/jpeg", headers=CACHED)


@router.get(
    "/v1/sweeps/{sweep}",
    tags=["sweeps"],
    summary="The table of a sweep",
    responses={200: {"model": SweepTableAnswer}, **ERRORS},
)
async def show_sweep(server: ServerOf, sweep: SweepName) -> JSONResponse:
    """Return a row for each job, the best one first."""
    return JSONResponse(await in_thread(server, server.sweeps.table, sweep))


@router.get(
    "/v1/sweeps/{sweep}/compare",
    tags=["sweeps"],
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
