"""Routes for videos, and for the jobs that track them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from grounded_sam.serve.answers import ERRORS, ServerOf, in_thread
from grounded_sam.serve.predictions import override_selection
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.routes.pictures import CACHED
from grounded_sam.serve.routes.receiving import UPLOAD_CONTENT, receive_upload
from grounded_sam.serve.routes.sessions import prompt_entry
from grounded_sam.serve.schemas import JobAnswer, TrackBody, VideoAnswer
from grounded_sam.serve.tracking import MAX_RUNNING, TrackJob, TrackRequest
from grounded_sam.serve.videos import check_video
from grounded_sam.serve.vocabularies import read_vocabulary
from grounded_sam.structures.clicks import Clicks
from grounded_sam.structures.request import Request as Asked

router = APIRouter(tags=["videos"])
VideoId = Annotated[str, Path(max_length=64, description="id of a video")]
JobId = Annotated[str, Path(max_length=64, description="id of a job")]

#: Seconds between two looks for new lines, and between two signs of life while there are none.
POLL_S, PING_S = 0.05, 10.0


@router.post(
    "/v1/videos",
    summary="Send a video, or name one below the roots",
    responses={200: {"model": VideoAnswer}, **ERRORS},
    openapi_extra=UPLOAD_CONTENT,
)
async def add_video(request: Request, server: ServerOf) -> JSONResponse:
    """Open a video as the command does; playlists and other hosts are never followed."""
    upload = await receive_upload(request, server, "video", check_video)
    answer = {"id": upload.id, "name": upload.name, "width": upload.width, "height": upload.height}
    return JSONResponse({**answer, "frames": upload.num_frames})


@router.get("/v1/videos/{video}/frames/{number}", summary="A frame as JPEG", responses=ERRORS, response_class=Response)
async def show_frame(
    server: ServerOf,
    video: VideoId,
    number: Annotated[int, Path(ge=0, le=10_000_000, description="number of the frame, from 0")],
    max_side: Annotated[int | None, Query(ge=16, le=65_500, description="longest side in pixels")] = None,
) -> Response:
    """Return one frame; going forward from the last one is fast."""
    encoded = await in_thread(server, server.frames.read, video, number, max_side)
    return Response(encoded, media_type="image/jpeg", headers=CACHED)


@router.post(
    "/v1/videos/{video}/track",
    summary="Track the objects of a video",
    status_code=202,
    responses={202: {"model": JobAnswer}, **ERRORS},
)
async def track(server: ServerOf, video: VideoId, body: TrackBody) -> JSONResponse:
    """Start a job, whose lines come from its events; other requests are answered between its frames."""
    pipeline = server.pipeline
    if not pipeline.has_tracker:
        raise RequestError(409, "this server has no tracker; start it with one, such as tracker=sam2")
    upload = server.uploads.get(video, "video")
    clicks = None
    if body.clicks is not None:
        clicks = Clicks([prompt_entry(click, (upload.height, upload.width)) for click in body.clicks], "clicks")
    words = (body.text, body.negatives, body.prompt_template)
    if clicks is not None and all(word is None for word in words) and pipeline.vocabulary is None:
        asked = Asked(classes=clicks.vocabulary, clicks=clicks)
    else:
        vocabulary = read_vocabulary(pipeline, *words)
        classes = vocabulary if clicks is None else vocabulary.with_classes(clicks.vocabulary.classes)
        asked = Asked(classes=classes, vocabulary=vocabulary, clicks=clicks)
    track_request = TrackRequest(
        request=asked,
        select=override_selection(pipeline.select, body.select.given()),
        settings=replace(pipeline.track_settings, **body.track.given(), clicks=None),
        start=body.start,
        stop=body.stop,
        stride=body.stride,
        max_side=body.max_side,
        max_pixels=server.max_pixels,
        masks=body.masks == "rle",
    )
    job = await in_thread(server, server.jobs.make, pipeline, video, track_request)
    try:
        server.worker.submit_long(job, MAX_RUNNING)
    except RequestError:
        server.jobs.remove(job)
        raise
    return JSONResponse(job.status(), 202)


@router.get("/v1/jobs/{job}", summary="How far a job is", responses={200: {"model": JobAnswer}, **ERRORS})
async def job_status(server: ServerOf, job: JobId) -> JSONResponse:
    """Return the state of a job."""
    return JSONResponse(server.jobs.get(job).status())


@router.delete("/v1/jobs/{job}", summary="Cancel a job and delete its lines", status_code=204, responses=ERRORS)
async def cancel_job(server: ServerOf, job: JobId) -> Response:
    """End a job before its next frame."""
    server.jobs.remove(server.jobs.get(job))
    return Response(status_code=204)


@router.get(
    "/v1/jobs/{job}/events",
    summary="The lines of a job as they are written (SSE)",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **ERRORS},
)
async def job_events(
    server: ServerOf, job: JobId, last_event_id: Annotated[str | None, Header(max_length=20)] = None
) -> StreamingResponse:
    """Send a line of JSON for each frame, as `results.jsonl` has it, and at the end an event `end` with the state.

    A client that was cut off goes on where it was with the header `Last-Event-ID`.
    """
    if last_event_id is not None and not last_event_id.isdecimal():
        raise RequestError(422, "Last-Event-ID must be the number of a line")
    start = 0 if last_event_id is None else int(last_event_id) + 1
    events = _events(server.jobs.get(job), start)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(job: TrackJob, start: int) -> AsyncIterator[bytes]:
    """Yield the lines of a job from one on, and its end."""
    job.listen()
    try:
        number, offset, sent = start, 0, time.monotonic()
        while True:
            is_over = job.is_over  # before the lines are read, so that none is missed
            for index, line, end in job.lines(number, offset):
                number, offset, sent = index + 1, end, time.monotonic()
                yield b"id: %d\ndata: %s\n\n" % (index, line)
            if is_over:
                yield f"event: end\ndata: {_one_line(job.status())}\n\n".encode()
                return
            if time.monotonic() - sent > PING_S:
                sent = time.monotonic()
                yield b": still here\n\n"
            await asyncio.sleep(POLL_S)
    finally:
        job.leave()


def _one_line(status: dict[str, Any]) -> str:
    return json.dumps(status, ensure_ascii=False)
