"""The ML backend: predicts tasks, and answers smart tools."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import Request

from grounded_sam.errors import GroundedSamError
from grounded_sam.formats.label_studio_config import LabelingConfig, ObjectTag, read_labeling_config
from grounded_sam.formats.label_studio_video import VideoTrack
from grounded_sam.serve.answers import ask, in_thread
from grounded_sam.serve.label_studio.annotations import Annotations
from grounded_sam.serve.label_studio.bodies import PredictTasksBody, TaskItem
from grounded_sam.serve.label_studio.client import LabelStudioClient
from grounded_sam.serve.label_studio.projects import Files, Projects
from grounded_sam.serve.label_studio.prompts import SmartTool, read_context, words_of_task
from grounded_sam.serve.label_studio.regions import Targets, image_region, prediction
from grounded_sam.serve.predictions import Prediction
from grounded_sam.serve.problems import RequestError, public_message
from grounded_sam.serve.server import Server
from grounded_sam.serve.sessions import OpenSession
from grounded_sam.serve.tracking import MAX_RUNNING, TrackJob, TrackRequest
from grounded_sam.serve.uploads import Upload, UploadKind
from grounded_sam.serve.worker import Work
from grounded_sam.structures.request import Request as Wanted

log = logging.getLogger(__name__)

#: Seconds after which a batch is answered with what is ready; Label Studio waits for 100. The rest is sent afterwards.
ANSWER_S = 60.0
#: Tasks of a batch that are fetched or wait for the models at the same time, and sessions that are remembered.
AT_ONCE, MAX_SESSIONS = 4, 10_000
#: Seconds between two looks whether a video is done, or the models have time.
POLL_S = 0.1
#: Sections of the config that decide what is found.
_STAGES = ("detector", "segmenter", "verify", "tracker", "tiles", "refine", "select", "track")
SETTINGS = (*_STAGES, "text", "negative", "prompt_template", "precision")


@dataclass(frozen=True)
class Project:
    """A project whose tasks are predicted.

    Attributes:
        id: Its id.
        config: Its labeling config.
        client: Its Label Studio.
        version: Fingerprint of what decides the predictions.
    """

    id: str
    config: LabelingConfig
    client: LabelStudioClient
    version: str


class Backend:
    """The ML backend.

    Args:
        server: What the routes share.

    Attributes:
        projects: The projects that have connected.
        files: Their images and videos.
        annotations: Takes their annotations into the stores of the server.

    Raises:
        LabelStudioError: If the address of Label Studio is malformed.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._settings = server, server.digest_of(SETTINGS)
        self.projects = Projects(server.settings.label_studio)
        max_bytes = int(server.settings.max_body_mb * 1e6)
        self.files = Files(server.uploads, max_bytes, server.max_pixels)
        self.annotations = Annotations(server.stores.folders, server.max_pixels)
        self._sessions: dict[tuple[str, str], str] = {}
        self._opening = asyncio.Lock()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._late: dict[tuple[str, int, str], asyncio.Task[None]] = {}

    def version(self, label_config: str) -> str:
        """Return the fingerprint of models, settings and words, as `model_version`.

        Args:
            label_config: Labeling config of a project; one that cannot be read has no words.
        """
        try:
            config = read_labeling_config(label_config)
            words: Any = [[(v, t[0].name, t[1].name) for v, t in config.outputs(obj).items()] for obj in config.objects]
        except GroundedSamError:
            words = None
        digest = hashlib.sha256(json.dumps([self._settings, words]).encode()).hexdigest()
        return f"grounded_sam-{digest[:12]}"

    async def predict(self, request: Request, body: PredictTasksBody) -> list[Any]:
        """Return an entry for each task, in order: its predictions, none where they come later or there are none.

        Raises:
            ConfigError: If the labeling config cannot be read.
            RequestError: If the project has never connected.
        """
        config = read_labeling_config(body.label_config)
        client = self.projects.client(body.project)
        project = Project(body.project, config, client, self.version(body.label_config))
        if body.params.context is not None:
            if not body.tasks:
                raise RequestError(422, "a smart tool needs a task")
            return [await self._click(request, project, body.tasks[0], body.params.context)]
        if not body.tasks:
            return []
        keys = [(project.id, task.id, project.version) for task in body.tasks]
        running = {
            key: asyncio.create_task(self._limited(project, task))
            for key, task in zip(keys, body.tasks, strict=True)
            if key not in self._late
        }
        if running:
            await asyncio.wait(running.values(), timeout=ANSWER_S)
        for key, work in running.items():
            if not work.done():
                self._late[key] = asyncio.create_task(self._send_later(project, key, work))
        return [running[key].result() if key in running and running[key].done() else [] for key in keys]

    async def _limited(self, project: Project, task: TaskItem) -> list[dict[str, Any]]:
        """Predict a task; what goes wrong with it does not end the others."""
        try:
            return [await self._predict(project, task)]
        except GroundedSamError as error:
            reason = public_message(error, self._server.public_folders)
            log.warning("Label Studio, project %s, task %d: %s", project.id, task.id, reason)
            return []

    async def _predict(self, project: Project, task: TaskItem) -> dict[str, Any]:
        """Return the prediction of a task: of its first image or video."""
        obj, url = _object_of(project.config, task)
        words = words_of_task(project.config, obj, task.data)
        targets = Targets.of(project.config, obj, words)
        kind: UploadKind = "video" if obj.kind == "video" else "image"
        async with self._slots:
            upload = await in_thread(self._server, self.files.hold, project.client, url, kind)
            if kind == "image":
                try:
                    regions = await self._find(upload, targets)
                finally:
                    self.files.release(upload)
                return prediction(regions, project.version)
        try:
            return prediction(await self._track(upload, obj, obj.fps(task.data), targets), project.version)
        finally:
            self.files.release(upload)

    async def _find(self, upload: Upload, targets: Targets) -> list[dict[str, Any]]:
        """Return the regions of an image."""
        server = self._server
        await self._until_ready()
        vocabulary, select = targets.vocabulary(server.pipeline), server.pipeline.select
        question = server.predictor.question(upload, vocabulary, select)
        found = server.predictor.known(question.id)
        if found is None:
            batch = json.dumps([asdict(vocabulary), asdict(question.kept)], sort_keys=True, default=str)
            found = await self._submit(Work(server.predictor.answer, question, batch))
        assert isinstance(found, Prediction)
        rows = await in_thread(server, server.predictor.select, found, select)
        return await in_thread(server, targets.image_regions, found.candidates, rows, found.size_hw)

    async def _until_ready(self) -> None:
        while not self._server.worker.is_ready:
            await asyncio.sleep(POLL_S)

    async def _submit(self, work: Work) -> Any:
        """Wait for an answer of the models, and before for room in their queue."""
        while True:
            try:
                return await asyncio.wrap_future(self._server.worker.submit(work))
            except RequestError as error:
                if error.status != 429:
                    raise
                await asyncio.sleep(POLL_S)

    async def _track(self, upload: Upload, obj: ObjectTag, fps: float, targets: Targets) -> list[dict[str, Any]]:
        """Return the regions of a video."""
        server = self._server
        await self._until_ready()
        pipeline = server.pipeline
        if not pipeline.has_tracker:
            raise RequestError(409, "this server has no tracker; start it with one, such as tracker=sam2")
        vocabulary = targets.vocabulary(pipeline)
        asked = TrackRequest(
            request=Wanted(classes=vocabulary, vocabulary=vocabulary),
            select=pipeline.select,
            settings=pipeline.track_settings,
            max_pixels=server.max_pixels,
            masks=False,
        )
        job = await in_thread(server, server.jobs.make, pipeline, upload.id, asked)
        job.listen()
        try:
            await self._run_job(job)
            return await in_thread(server, _job_regions, job, obj, fps, targets)
        finally:
            job.leave()
            server.jobs.remove(job)

    async def _run_job(self, job: TrackJob) -> None:
        """Track a video to its end."""
        while True:
            try:
                self._server.worker.submit_long(job, MAX_RUNNING)
                break
            except RequestError as error:
                if error.status != 429:
                    raise
                await asyncio.sleep(POLL_S)
        while not job.is_over:
            await asyncio.sleep(POLL_S)
        if job.state != "done":
            raise RequestError(422, f"the video was not tracked to its end: {job.error}")

    async def _send_later(self, project: Project, key: tuple[str, int, str], work: asyncio.Task[Any]) -> None:
        """Send the prediction of a task that took longer than Label Studio waits."""
        try:
            for found in await work:
                body = {**found, "task": key[1]}
                await in_thread(self._server, project.client.call, "POST", "/api/predictions", body)
        except GroundedSamError as error:
            log.warning("Label Studio, project %s, task %d: %s", project.id, key[1], public_message(error))
        finally:
            del self._late[key]

    async def _click(
        self, request: Request, project: Project, task: TaskItem, context: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what a smart tool asks for."""
        obj, url = _object_of(project.config, task)
        if obj.kind == "video":  # the page asks when somebody moves a box, and wants nothing then
            return prediction([], project.version)
        server = self._server
        upload = await in_thread(server, self.files.hold, project.client, url, "image")
        try:
            size_hw = upload.height, upload.width
            tool = read_context(context, project.config, obj, size_hw)
            if tool.entries:
                regions = await self._segment(request, project, obj, upload, tool)
            elif tool.words:
                regions = await self._find(upload, Targets.of(project.config, obj, tool.words, tool.label, True))
            else:
                regions = []  # nothing but points on the background
        finally:
            self.files.release(upload)
        return prediction(regions, project.version)

    async def _segment(
        self, request: Request, project: Project, obj: ObjectTag, upload: Upload, tool: SmartTool
    ) -> list[dict[str, Any]]:
        """Return the regions of points and boxes."""
        target = project.config.outputs(obj).get(tool.label or "")
        if target is None:
            raise RequestError(422, f"no control takes masks with the label {tool.label!r}; add it to BrushLabels")
        session = await self._session(request, (project.id, upload.id), upload)
        sessions = self._server.sessions
        found = await ask(request, self._server, sessions.segment, (session, tool.entries))
        regions: list[dict[str, Any]] = []
        for i in range(len(found)):
            score = float(found.data["mask_score"][i]) if "mask_score" in found.data else None
            rle = found.data["rle"][i]
            box = found.xyxy[i].tolist()
            regions += image_region(*target, box, rle, session.size_hw, None if score is None else round(score, 6))
        return regions

    async def _session(self, request: Request, key: tuple[str, str], upload: Upload) -> OpenSession:
        """Return the session of a project and an image, opened at the first click."""
        async with self._opening:
            try:
                return self._server.sessions.get(self._sessions.get(key, ""))
            except RequestError:
                if not self._server.worker.is_ready:
                    raise
            session: OpenSession = await ask(request, self._server, self._server.sessions.open, upload)
            self._sessions[key] = session.id
            while len(self._sessions) > MAX_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            return session


def _object_of(config: LabelingConfig, task: TaskItem) -> tuple[ObjectTag, str]:
    """Return the image or video of a task, and its URL."""
    for obj in config.objects:
        url = task.data.get(obj.key)
        if isinstance(url, str) and url:
            return obj, url
    keys = ", ".join(obj.key for obj in config.objects)
    raise RequestError(422, f"the task has neither an image nor a video under {keys}")


def _job_regions(job: TrackJob, obj: ObjectTag, fps: float, targets: Targets) -> list[dict[str, Any]]:
    """Return the regions of the lines of a job."""
    tracks: dict[int, VideoTrack] = {}
    size_hw, last = (1, 1), 0.0
    for position, line, _ in job.lines(0):
        frame = json.loads(line)
        size_hw, last = (frame["height"], frame["width"]), frame.get("time_s", 0.0)
        for item in frame["objects"]:
            x, y, w, h = item["bbox"]
            track = tracks.setdefault(item["track_id"], VideoTrack())
            track.add(position, last, [x, y, x + w, y + h], size_hw, item["class"], item["score"])
    return targets.video_regions(tracks, obj, size_hw, fps, 1 + round(last * fps))
