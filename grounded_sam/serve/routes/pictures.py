"""Routes for images, and for what is found in them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from grounded_sam.media.images import read_image
from grounded_sam.serve.answers import ERRORS, ServerOf, ask, in_thread
from grounded_sam.serve.objects import MaskForm, jpeg, object_entries
from grounded_sam.serve.predictions import Prediction, covers, override_selection, thresholds
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.routes.receiving import UPLOAD_CONTENT, receive_upload
from grounded_sam.serve.schemas import PictureAnswer, PredictBody, PredictionAnswer, SelectBody
from grounded_sam.serve.uploads import Upload
from grounded_sam.serve.vocabularies import read_vocabulary

router = APIRouter(tags=["pictures"])


@router.post(
    "/v1/pictures",
    summary="Send an image, or name one below the roots",
    responses={200: {"model": PictureAnswer}, **ERRORS},
    openapi_extra=UPLOAD_CONTENT,
)
async def add_picture(request: Request, server: ServerOf) -> JSONResponse:
    """Read an image as the command does: upright 8-bit RGB, damaged and oversized ones refused in the same words."""
    upload = await receive_upload(request, server, "image", check_picture)
    return picture_answer(upload)


def picture_answer(upload: Upload) -> JSONResponse:
    """Return what a client may know of an image."""
    keys = ("id", "name", "width", "height", "notes")
    return JSONResponse({key: value for key, value in vars(upload).items() if key in keys})


def check_picture(upload: Upload, max_pixels: int) -> None:
    """Read an image once, and fill in its size.

    Args:
        upload: The image.
        max_pixels: Largest number of pixels.

    Raises:
        ImageError: If it cannot be used.
    """
    image = read_image(upload.path, max_pixels, lambda note: upload.notes.append(note.split("; ")[0]))
    upload.height, upload.width = image.shape[:2]


@router.get("/v1/pictures/{picture}", summary="An image as JPEG", responses=ERRORS, response_class=Response)
async def show_picture(
    server: ServerOf,
    picture: Annotated[str, Path(max_length=64)],
    max_side: Annotated[int | None, Query(ge=16, le=65_500, description="longest side in pixels")] = None,
) -> Response:
    """Return an image that was sent, upright and without transparency."""

    def read() -> bytes:
        with server.uploads.use(picture, "image") as upload:
            return jpeg(read_image(upload.path, server.max_pixels), max_side)

    return Response(await in_thread(server, read), media_type="image/jpeg", headers=CACHED)


#: Headers of what never changes under its address.
CACHED = {"Cache-Control": "private, max-age=3600"}


@router.post("/v1/predict", summary="Find objects in an image", responses={200: {"model": PredictionAnswer}, **ERRORS})
async def predict(request: Request, server: ServerOf, body: PredictBody) -> JSONResponse:
    """Detect and segment as the command does; the same request again computes nothing."""
    predictor = server.predictor
    vocabulary = read_vocabulary(server.pipeline, body.text, body.negatives, body.prompt_template)
    select = override_selection(server.pipeline.select, body.select.given())
    _check_class_scores(select.class_score, vocabulary.classes)
    with server.uploads.use(body.picture, "image") as upload:
        question = predictor.question(upload, vocabulary, select, body.min_score)
        prediction = predictor.known(question.id)
        if prediction is None:
            batch = json.dumps([asdict(vocabulary), asdict(question.kept)], sort_keys=True, default=str)
            prediction = await ask(request, server, predictor.answer, question, batch)
    assert isinstance(prediction, Prediction)
    if not covers(prediction.kept, select, vocabulary, predictor.is_tiled):
        floor = min(thresholds(prediction.kept, vocabulary).values())
        raise RequestError(
            422,
            f"more than {len(prediction.candidates):,} candidates, all that an image of this size may have; raise "
            f"select.score to {floor:.3g} or more",
        )
    selected = await in_thread(server, predictor.select, prediction, select)
    everything = None if body.min_score is None else range(len(prediction.candidates))
    return JSONResponse(await in_thread(server, _answer, prediction, selected, everything, body.masks))


def _check_class_scores(class_score: Any, classes: tuple[str, ...]) -> None:
    """Check that thresholds are those of classes of the request."""
    unknown = sorted(set(class_score or {}) - set(classes))
    if unknown:
        names = ", ".join(map(repr, unknown[:8]))
        raise RequestError(422, f"select.class_score names unknown classes: {names}; the classes are those of text")


def _answer(prediction: Prediction, selected: list[int], rows: range | None, masks: MaskForm) -> dict[str, Any]:
    """Return the answer with the selected candidates, or with all of them."""
    entries = object_entries(prediction.candidates, selected if rows is None else rows, masks)
    if rows is not None:
        chosen = set(selected)
        entries = [{**entry, "selected": entry["id"] in chosen} for entry in entries]
    return {
        "prediction": prediction.id,
        "picture": prediction.picture,
        "width": prediction.size_hw[1],
        "height": prediction.size_hw[0],
        "classes": list(prediction.vocabulary.classes),
        "colors": prediction.vocabulary.palette(),
        "class_score": prediction.vocabulary.class_score,
        "min_score": round(min(thresholds(prediction.kept, prediction.vocabulary).values()), 6),
        "selected": selected,
        "objects": entries,
    }


@router.post(
    "/v1/select",
    summary="Select from the candidates of a prediction",
    responses={200: {"model": PredictionAnswer}, **ERRORS, 409: {"description": "too few candidates were kept"}},
)
async def select_again(server: ServerOf, body: SelectBody) -> JSONResponse:
    """Select what the command selects with these settings; no model runs."""
    predictor = server.predictor
    prediction = predictor.known(body.prediction)
    if prediction is None:
        raise RequestError(404, f"no prediction {body.prediction[:40]!r}: it made room for newer ones; predict again")
    select = override_selection(server.pipeline.select, body.select.given())
    _check_class_scores(select.class_score, prediction.vocabulary.classes)
    selected = await in_thread(server, predictor.select, prediction, select)
    return JSONResponse(await in_thread(server, _answer, prediction, selected, None, body.masks))
