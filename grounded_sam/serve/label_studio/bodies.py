"""What Label Studio sends; keys that are not used are not checked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

#: Tasks of a request.
MAX_TASKS = 10_000


class _Sent(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class SetupBody(_Sent):
    """Sent when a project connects, and before each batch of tasks."""

    project: str = Field(min_length=1, max_length=200, description="id and time of creation of the project")
    label_config: str = Field(alias="schema", max_length=1_000_000, description="labeling config of the project")
    hostname: str = Field(max_length=2000, description="address of Label Studio")
    access_token: str = Field(max_length=2000, description="token of whoever made the project")


class TaskItem(_Sent):
    """A task."""

    id: int = Field(description="id of the task")
    data: dict[str, Any] = Field(description="addresses of its image or video, and its words")


class PredictParams(_Sent):
    """Of a smart tool, what was drawn."""

    context: dict[str, Any] | None = Field(default=None, description="points and rectangles, under `result`")


class PredictTasksBody(_Sent):
    """Tasks to predict; with a context one task, in which somebody uses a smart tool."""

    project: str = Field(min_length=1, max_length=200, description="id and time of creation of the project")
    label_config: str = Field(max_length=1_000_000, description="labeling config of the project")
    tasks: list[TaskItem] = Field(max_length=MAX_TASKS, description="the tasks, each of which gets a prediction")
    params: PredictParams = Field(default=PredictParams(), description="what was drawn with a smart tool")


class WebhookBody(_Sent):
    """Something that has happened in a project."""

    action: str = Field(max_length=200, description="what has happened, such as `ANNOTATION_CREATED`")
    annotation: dict[str, Any] | list[dict[str, Any]] | None = Field(
        default=None, description="the annotation, or many"
    )
    task: dict[str, Any] | list[dict[str, Any]] | None = Field(default=None, description="the task of the annotation")
    project: dict[str, Any] | None = Field(default=None, description="the project, with its `id`")
