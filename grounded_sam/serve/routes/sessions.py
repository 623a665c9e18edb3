"""Routes for clicks in one image."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response

from grounded_sam.serve.answers import ERRORS, ServerOf, ask, in_thread
from grounded_sam.serve.objects import decode_mask, object_entries
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.schemas import ObjectPrompt, SegmentAnswer, SegmentBody, SessionAnswer, SessionBody

router = APIRouter(tags=["sessions"])
SessionId = Annotated[str, Path(max_length=64, description="id of a session")]


@router.post("/v1/sessions", summary="Encode an image for clicks", responses={200: {"model": SessionAnswer}, **ERRORS})
async def open_session(request: Request, server: ServerOf, body: SessionBody) -> JSONResponse:
    """Encode an image once; the sessions used least recently are closed when their memory is used up."""
    with server.uploads.use(body.picture, "image") as upload:
        item = await ask(request, server, server.sessions.open, upload)
    height, width = item.size_hw
    answer = {"id": item.id, "picture": item.picture, "width": width, "height": height, "bytes": item.num_bytes}
    return JSONResponse(answer)


@router.post(
    "/v1/sessions/{session}/segment",
    summary="Segment clicks, boxes or masks",
    responses={200: {"model": SegmentAnswer}, **ERRORS},
)
async def segment_prompts(request: Request, server: ServerOf, session: SessionId, body: SegmentBody) -> JSONResponse:
    """Segment one object for each entry; an entry that adds points to an earlier one corrects its mask."""
    item = server.sessions.get(session)
    entries = [prompt_entry(prompt, item.size_hw) for prompt in body.prompts]
    detections = await ask(request, server, server.sessions.segment, (item, entries))
    classes = list(dict.fromkeys(entry["class"] for entry in entries))
    objects = await in_thread(server, object_entries, detections, range(len(detections)), body.masks)
    return JSONResponse({"classes": classes, "objects": objects})


def prompt_entry(prompt: ObjectPrompt, size_hw: tuple[int, int]) -> dict[str, Any]:
    """Return a prompt as an entry of `structures.clicks.Clicks`.

    Args:
        prompt: The prompt.
        size_hw: Height and width of the image.

    Raises:
        RequestError: If there is neither a point, a box nor a mask, or the mask is damaged (422).
    """
    entry = prompt.model_dump(by_alias=True, exclude_none=True, exclude={"mask"})
    if not {"points", "box"} & entry.keys() and prompt.mask is None:
        raise RequestError(422, "a prompt needs points, a box or a mask")
    if prompt.mask is not None:
        entry["mask"] = decode_mask(prompt.mask.model_dump(), size_hw)
    return entry


@router.delete("/v1/sessions/{session}", summary="Close a session", status_code=204, responses=ERRORS)
async def close_session(server: ServerOf, session: SessionId) -> Response:
    """Free the memory of a session."""
    server.sessions.close(session)
    return Response(status_code=204)
