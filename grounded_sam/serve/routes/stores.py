"""Routes for stores that the server was started with: browse them, and decide about their objects."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse, Response

from grounded_sam.formats.store_edits import Edit
from grounded_sam.serve.answers import ERRORS, ServerOf, in_thread
from grounded_sam.serve.objects import MaskForm
from grounded_sam.serve.open_store import OpenStore
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.routes.pictures import CACHED, check_picture, picture_answer
from grounded_sam.serve.schemas import (
    EditItem,
    EditsAnswer,
    EditsBody,
    NextAnswer,
    PictureAnswer,
    StoredObjectsAnswer,
    StoredVideosAnswer,
    StorePage,
    UndoBody,
)
from grounded_sam.serve.store_pictures import Order, PictureFilter, Reason, Status, describe_videos

router = APIRouter(tags=["stores"])
StoreName = Annotated[str, Path(max_length=200, description="name of a store in serve.stores")]
PictureId = Annotated[str, Path(max_length=64, description="id of an image of the store")]
Cursor = Annotated[int, Query(ge=0, le=2**53, description="number of images to pass over: `next` of the last page")]
Masks = Annotated[MaskForm, Query(description="form of masks")]


@router.get(
    "/v1/stores/{store}/pictures",
    summary="Images of a store, 50 at a time",
    responses={200: {"model": StorePage}, **ERRORS},
)
async def list_pictures(
    server: ServerOf,
    store: StoreName,
    class_name: Annotated[str | None, Query(alias="class", max_length=500, description="with this class")] = None,
    max_score: Annotated[float | None, Query(ge=0, le=1, description="with an object of at most this score")] = None,
    status: Annotated[Status | None, Query(description="with an object of this status")] = None,
    unreviewed: Annotated[bool, Query(description="with an object that nobody decided about")] = False,
    video: Annotated[str | None, Query(max_length=4096, description="frames of this video")] = None,
    reason: Annotated[Reason | None, Query(description="why to look at it; strongest cases first")] = None,
    order: Annotated[Order, Query(description="by name, or those with the least certain object first")] = "name",
    cursor: Cursor = 0,
) -> JSONResponse:
    """List the images that pass all filters; class, score, status and `unreviewed` must hold for the same object."""
    wanted = PictureFilter(
        class_name=class_name,
        max_score=max_score,
        status=status,
        unreviewed=unreviewed,
        video=video,
        reason=reason,
        order=order,
    )
    return JSONResponse(await in_thread(server, lambda: server.stores.get(store).page(wanted, cursor)))


@router.get(
    "/v1/stores/{store}/pictures/{picture}",
    summary="An image and its objects",
    responses={200: {"model": StoredObjectsAnswer}, **ERRORS},
)
async def show_stored_picture(
    server: ServerOf, store: StoreName, picture: PictureId, masks: Masks = "rle"
) -> JSONResponse:
    """Return what the store knows of an image, with its objects as `detections`, and apart those `rejected`."""
    return JSONResponse(await in_thread(server, lambda: server.stores.get(store).objects(picture, masks)))


@router.get(
    "/v1/stores/{store}/pictures/{picture}/image",
    summary="An image as JPEG",
    responses=ERRORS,
    response_class=Response,
)
async def show_stored_image(
    server: ServerOf,
    store: StoreName,
    picture: PictureId,
    max_side: Annotated[int | None, Query(ge=16, le=65_500, description="longest side in pixels; none: all")] = None,
) -> Response:
    """Return an image in full size; its file must be below the roots and as it was when it was processed."""
    encoded = await in_thread(server, server.stores.picture, store, picture, max_side)
    return Response(encoded, media_type="image/jpeg", headers=CACHED)


@router.get(
    "/v1/stores/{store}/pictures/{picture}/thumbnail",
    summary="An image as a small JPEG",
    responses=ERRORS,
    response_class=Response,
)
async def show_thumbnail(
    server: ServerOf,
    store: StoreName,
    picture: PictureId,
    max_side: Annotated[int, Query(ge=16, le=8192, description="longest side in pixels")] = 256,
) -> Response:
    """Return an image, scaled down."""
    return await show_stored_image(server, store, picture, max_side)


@router.post(
    "/v1/stores/{store}/pictures/{picture}/open",
    summary="Use an image of a store like one that was sent",
    responses={200: {"model": PictureAnswer}, **ERRORS},
)
async def open_stored_picture(server: ServerOf, store: StoreName, picture: PictureId) -> JSONResponse:
    """Add an image to those that clients send, for /v1/sessions and /v1/predict; masks of either fit the store."""

    def add() -> JSONResponse:
        upload = server.stores.upload(
            store, picture, server.uploads, lambda upload: check_picture(upload, server.max_pixels)
        )
        return picture_answer(upload)

    return await in_thread(server, add)


@router.get(
    "/v1/stores/{store}/videos",
    summary="Videos of a store, and their tracks",
    responses={200: {"model": StoredVideosAnswer}, **ERRORS},
)
async def list_videos(server: ServerOf, store: StoreName) -> JSONResponse:
    """List the videos, and of each track its class and the frames that it is seen in."""
    return JSONResponse(await in_thread(server, lambda: {"videos": describe_videos(server.stores.get(store).pictures)}))


@router.get(
    "/v1/stores/{store}/next",
    summary="The objects to look at next",
    responses={200: {"model": NextAnswer}, **ERRORS},
)
async def list_next(
    server: ServerOf,
    store: StoreName,
    count: Annotated[int, Query(ge=1, le=1000, description="largest number of objects")] = 50,
) -> JSONResponse:
    """List the objects whose review changes most, as `grounded-sam-review next` does."""
    return JSONResponse(await in_thread(server, lambda: server.stores.get(store).next_objects(count)))


@router.post(
    "/v1/stores/{store}/edits",
    summary="Decide about objects and tracks",
    responses={200: {"model": EditsAnswer}, **ERRORS},
)
async def edit_store(server: ServerOf, store: StoreName, body: EditsBody) -> JSONResponse:
    """Write decisions into the store; of several about one object the latest counts."""

    def apply() -> dict[str, object]:
        opened = server.stores.get(store)
        return opened.edit([to_edit(item, opened) for item in body.edits], body.author, body.skip_invalid)

    return JSONResponse(await in_thread(server, apply))


def to_edit(item: EditItem, store: OpenStore) -> Edit:
    """Return an edit of a request as the store takes it.

    Args:
        item: The edit.
        store: The store.

    Raises:
        RequestError: If the store has no such image (404), or `file` is given too (422).
    """
    values = item.model_dump(by_alias=False, exclude={"picture"})
    if item.picture is not None:
        if item.file is not None:
            raise RequestError(422, "an edit has either image or file")
        picture = store.find(item.picture)
        values["file"] = picture.name if item.action == "add" else picture.video or picture.name
    return Edit(**values)


@router.post(
    "/v1/stores/{store}/undo",
    summary="Take decisions back",
    responses={200: {"model": EditsAnswer}, **ERRORS},
)
async def undo_edits(server: ServerOf, store: StoreName, body: UndoBody) -> JSONResponse:
    """Let what was decided before a batch count again; an undo is a batch, so that it can be taken back too."""
    return JSONResponse(await in_thread(server, lambda: server.stores.get(store).undo(body.batch, body.author)))
