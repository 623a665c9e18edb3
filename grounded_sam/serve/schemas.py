"""What requests and answers look like: the models of the OpenAPI description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from grounded_sam.serve.objects import MaskForm
from grounded_sam.serve.store_pictures import Status

Score = Annotated[float, Field(ge=0, le=1)]
Id = Annotated[str, Field(min_length=1, max_length=64, pattern="^[0-9a-f]+$")]
Coordinate = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Point = Annotated[list[Coordinate], Field(min_length=2, max_length=2)]
Area = Annotated[float, Field(ge=0, le=1e12)]


class Body(BaseModel):
    """A body whose keys are all known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _without_defaults(schema: dict[str, Any]) -> None:
    """Remove the defaults from a schema, since those of the server count."""
    for entry in schema.get("properties", {}).values():
        entry.pop("default", None)


class Settings(Body):
    """Settings of the config; a key that is left out is as the server was started with."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, json_schema_extra=_without_defaults)

    def given(self) -> dict[str, Any]:
        """Return the keys that the request has."""
        return self.model_dump(exclude_unset=True)


# Requests


class SelectKeys(Settings):
    """Which detections are kept; a key that is left out is as the server was started with."""

    score: Score = Field(default=0.3, description="lowest confidence, 0 to 1")
    class_score: dict[str, Score] | None = Field(default=None, description="lowest confidence by class, 0 to 1")
    nms: Score | None = Field(
        default=0.7, description="IoU above which the less confident of two is dropped; null: none"
    )
    nms_by: Literal["box", "mask"] = Field(default="box", description="whether that IoU is of boxes or of masks")
    class_agnostic: bool = Field(default=False, description="whether different classes suppress each other")
    max_ios: Score | None = Field(default=None, description="intersection over the smaller box, as `nms`; null: none")
    top_k: int | None = Field(default=None, ge=0, le=100_000, description="largest number of objects; null: no limit")
    min_area: Area = Field(default=1, description="smallest area in pixels, of the mask or else of the box")
    max_area: Area | None = Field(default=None, description="largest area in pixels; null: no limit")
    verify: Score | None = Field(default=None, description="lowest score of the verifier, 0 to 1; null: any")
    presence: Score | None = Field(
        default=None, description="lowest probability that a class is in the image at all, 0 to 1; null: any"
    )


class FileBody(Body):
    """An image or video, as base64 or as the path of a file below the roots of the server."""

    data: str | None = Field(default=None, description="content of a file in base64, with or without `data:...,`")
    path: str | None = Field(
        default=None, max_length=4096, description="path of a file below serve.roots, or builtin:demo/scene-1.png"
    )
    name: str = Field(default="", max_length=1000, description="its name in answers and messages")


class Words(Body):
    """What to look for."""

    text: str | list[str] | dict[str, Any] | None = Field(
        default=None,
        description="classes: a list, a string, a mapping from class to phrases, or an ontology with `classes`; null: "
        "those that the server was started with",
        examples=[["green star", "red circle"]],
    )
    negatives: list[str] | None = Field(
        default=None, max_length=1000, description="phrases of look-alikes, whose detections are dropped"
    )
    prompt_template: str | None = Field(
        default=None, max_length=500, description="template of each phrase, such as `a photo of a {}`"
    )


class PredictBody(Words):
    """Predict the objects of an image."""

    picture: Id = Field(description="id of an image")
    select: SelectKeys = Field(default_factory=SelectKeys, description="which detections are kept")
    min_score: Score | None = Field(
        default=None,
        description="lowest score, 0 to 1, from which all candidates are kept and answered, also those that `select` "
        "does not select; null: only what `select` selects",
    )
    masks: MaskForm = Field(
        default="rle", description="form of masks: COCO RLE, COCO polygons, PNG in base64, or none at all"
    )


class SelectBody(Body):
    """Select from the candidates of a prediction."""

    prediction: Id = Field(description="id of a prediction")
    select: SelectKeys = Field(default_factory=SelectKeys, description="which detections are kept")
    masks: MaskForm = Field(default="none", description="form of masks")


class SessionBody(Body):
    """Encode an image for clicks."""

    picture: Id = Field(description="id of an image")


class Rle(Body):
    """A mask as compressed COCO RLE."""

    size: list[int] = Field(min_length=2, max_length=2, description="height and width in pixels")
    counts: str = Field(max_length=10_000_000, description="compressed run lengths")


class ObjectPrompt(Body):
    """The prompts of one object: points, a box or a mask."""

    class_name: str = Field(
        default="object", alias="class", min_length=1, max_length=500, description="name of its class"
    )
    points: list[Point] | None = Field(
        default=None, min_length=1, max_length=1000, description="[[x, y], ...] in pixels"
    )
    labels: list[Literal[0, 1]] | None = Field(
        default=None, max_length=1000, description="of each point: 1 on the object, 0 on the background; null: all 1"
    )
    box: Annotated[list[Coordinate], Field(min_length=4, max_length=4)] | None = Field(
        default=None, description="[x1, y1, x2, y2] in pixels"
    )
    mask: Rle | None = Field(default=None, description="a mask to start from")


class SegmentBody(Body):
    """Segment the prompts of a session.

    An entry with the points of an earlier one and more corrects its mask, as in the demos of SAM.
    """

    prompts: list[ObjectPrompt] = Field(min_length=1, max_length=256, description="one entry for each object")
    masks: MaskForm = Field(default="rle", description="form of masks")


class VideoPrompt(ObjectPrompt):
    """The prompts of one object in one frame of a video."""

    frame: int | None = Field(
        default=None, ge=0, le=2**53, description="number of the frame, from 0; null: the first one"
    )
    object: int | None = Field(
        default=None, ge=1, le=2**53, description="track_id to start or correct; null: a new object"
    )


class TrackKeys(Settings):
    """How objects are tracked; a key that is left out is as the server was started with."""

    redetect_every: int = Field(default=10, ge=1, le=1_000_000, description="frames from one keyframe to the next")
    match_iou: Score = Field(default=0.5, description="mask IoU from which a detection and a track are the same")
    class_agnostic: bool = Field(default=False, description="whether tracks match detections of other classes")
    new_track_score: Score | None = Field(default=None, description="lowest score that starts a track; null: any")
    merge_iou: Score = Field(default=0.7, description="mask IoU from which two tracks are one object")
    max_lost_frames: int = Field(
        default=30, ge=0, le=1_000_000, description="frames without a mask after which a track ends"
    )
    max_center_distance: float = Field(default=1, ge=0, le=1e6, description="how far a lost track may be, in diagonals")
    min_step_iou: Score | None = Field(
        default=None, description="mask IoU between frames below which a track is hidden"
    )
    max_objects: int | None = Field(
        default=None, ge=1, le=10_000, description="largest number of tracks; null: no limit"
    )
    correct: bool = Field(default=False, description="whether detections correct tracks that drift")
    correct_iou: Score = Field(default=0.8, description="see `correct`")
    direction: Literal["forward", "both"] = Field(default="forward", description="both: also backward from keyframes")
    backward_window: int = Field(default=60, ge=1, le=1000, description="frames to track backward")


class TrackBody(Words):
    """Track the objects of a video."""

    clicks: list[VideoPrompt] | None = Field(default=None, min_length=1, max_length=1000, description="manual prompts")
    select: SelectKeys = Field(default_factory=SelectKeys, description="which detections are kept")
    track: TrackKeys = Field(default_factory=TrackKeys, description="how objects are tracked")
    start: int = Field(default=0, ge=0, le=2**53, description="number of the first frame")
    stop: int | None = Field(
        default=None, ge=1, le=2**53, description="number of the frame to stop before; null: the end"
    )
    stride: int = Field(default=1, ge=1, le=1_000_000, description="keep every stride-th frame")
    max_side: int | None = Field(default=None, ge=16, le=65_535, description="longest side in pixels; null: no limit")
    masks: Literal["rle", "none"] = Field(default="rle", description="whether lines have masks")


Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]


class EditItem(Body):
    """What somebody decided about an object or a track of a store."""

    action: Literal[
        "accept",
        "reject",
        "relabel",
        "mask",
        "box",
        "reset",
        "add",
        "merge_tracks",
        "split_track",
        "relabel_track",
        "accept_track",
        "delete_track",
    ] = Field(description="`reset` takes back what was decided; `add` is for an object that was missed")
    object_id: str | None = Field(default=None, max_length=64, description="object of an action on objects")
    class_name: str | None = Field(
        default=None, alias="class", max_length=500, description="new class of relabel, relabel_track and add"
    )
    mask: Rle | list[list[Coordinate]] | None = Field(
        default=None, description="mask of `mask` and `add`: COCO RLE or polygons, of the size of the image"
    )
    box: Annotated[list[Coordinate], Field(min_length=4, max_length=4)] | None = Field(
        default=None, description="box of `box` and `add`: [x1, y1, x2, y2] in pixels, inside the image"
    )
    picture: Id | None = Field(
        default=None, description="image of `add`; of an action on tracks, any frame of the video"
    )
    file: str | None = Field(
        default=None, max_length=4096, description="instead of `picture`: its name; of an action on tracks, the video's"
    )
    track: Whole | None = Field(default=None, description="the track; of `add`, null is a new one")
    into: Whole | None = Field(default=None, description="track that `merge_tracks` adds `track` to")
    frame: Whole | None = Field(default=None, description="first frame of the new track of `split_track`")
    looks_like: str | None = Field(
        default=None, max_length=500, description="of `reject`: what the object is instead, for negatives"
    )
    new_class: bool = Field(default=False, description="whether the class may be one that the store does not have")


Author = Annotated[str, Field(max_length=200, description="who decided, one line")]


class EditsBody(Body):
    """Decisions about objects and tracks of a store, applied in whole or not at all."""

    edits: list[EditItem] = Field(min_length=1, max_length=10_000, description="no two about the same object")
    author: Author = ""
    skip_invalid: bool = Field(
        default=False, description="apply the others if some cannot be applied, which `refused` names"
    )


class UndoBody(Body):
    """Take a batch of decisions back."""

    batch: str = Field(min_length=1, max_length=200, description="`batch` of an answer to edits or undo")
    author: Author = ""


# Answers


class ErrorAnswer(BaseModel):
    """Why a request was not answered."""

    error: str = Field(description="one sentence: what was expected, and what was given")


class PictureAnswer(BaseModel):
    """An image that the server has."""

    id: str = Field(description="digits of the SHA-256 of its content")
    name: str = Field(description="its name")
    width: int = Field(description="pixels, after the EXIF orientation is applied")
    height: int = Field(description="pixels")
    notes: list[str] = Field(description="what the file holds and is not read, such as further pages")


class DetectedObject(BaseModel):
    """One object."""

    id: int = Field(description="its number among the candidates of the prediction")
    class_name: str = Field(alias="class", description="name of its class")
    class_id: int = Field(description="index into `classes`")
    score: float = Field(description="confidence, 0 to 1")
    mask_score: float | None = Field(default=None, description="the segmenter's estimate of IoU")
    verify_score: float | None = Field(default=None, description="how well the object fits its class, by the verifier")
    detector_score: float | None = Field(default=None, description="confidence before the mask changed it")
    box: list[float] = Field(description="[x1, y1, x2, y2] in pixels, right and bottom exclusive")
    area: float = Field(description="pixels of the mask, or of the box without one")
    mask: Rle | list[list[float]] | str | None = Field(default=None, description="in the form that was asked for")
    selected: bool | None = Field(default=None, description="whether `select` selects it")


class PredictionAnswer(BaseModel):
    """The objects of an image, most confident first."""

    prediction: str = Field(description="fingerprint of image, models, classes and what was kept; for /v1/select")
    picture: str = Field(description="id of the image")
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    classes: list[str] = Field(description="classes that `class_id` refers to")
    colors: list[str] = Field(description="color of each class, #rrggbb")
    class_score: dict[str, float] = Field(description="lowest confidence of the classes whose words have their own")
    min_score: float = Field(description="score from which all candidates are kept, 0 to 1")
    selected: list[int] = Field(description="ids of the objects that `select` selects, most confident first")
    objects: list[DetectedObject] = Field(description="the selected objects; with `min_score` all candidates")


class SessionAnswer(BaseModel):
    """A session."""

    id: str = Field(description="its id")
    picture: str = Field(description="id of the image")
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    bytes: int = Field(description="memory that it takes")


class SegmentAnswer(BaseModel):
    """The objects of prompts, in the order of the prompts."""

    classes: list[str] = Field(description="classes that `class_id` refers to")
    objects: list[DetectedObject] = Field(description="the objects")


class VideoAnswer(BaseModel):
    """A video that the server has."""

    id: str = Field(description="digits of the SHA-256 of its content")
    name: str = Field(description="its name")
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    frames: int | None = Field(description="largest number of frames; null: unknown")


class JobAnswer(BaseModel):
    """A video that is tracked."""

    id: str = Field(description="its id")
    video: str = Field(description="id of the video")
    state: Literal["waiting", "running", "done", "failed", "cancelled"] = Field(description="how far it is")
    frames: int = Field(description="number of lines so far")
    total: int | None = Field(description="largest number of lines; null: unknown")
    error: str | None = Field(description="why it failed or was cancelled")
    notes: list[str] = Field(description="clicks without effect, and what could not be decoded")


class StoredPictureAnswer(BaseModel):
    """An image of a store."""

    id: str = Field(description="its id in the server")
    name: str = Field(description="its name in the store")
    video: str | None = Field(description="name of its video; null for an image")
    frame: int | None = Field(description="number of the frame; null for an image")
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    objects: int = Field(description="number of objects, without those that were rejected")
    classes: dict[str, int] = Field(description="number of these by class")
    statuses: dict[Status, int] = Field(description="number of objects by status, also of rejected ones")
    min_score: float | None = Field(description="score of the least certain object, 0 to 1")


class ReviewCounts(BaseModel):
    """How far the review of a store is."""

    statuses: dict[Status, int] = Field(description="number of objects by status")
    reviewed: int = Field(description="number of objects that somebody decided about")
    unreviewed: int = Field(description="number of objects that nobody decided about")
    reviewed_pictures: int = Field(description="number of images without such an object")
    unreviewed_pictures: int = Field(description="number of images with one")


class StorePage(BaseModel):
    """Images of a store."""

    total: int = Field(description="number of images that pass the filters")
    pictures: list[StoredPictureAnswer] = Field(description="at most 50")
    skipped: list[dict[str, str]] = Field(description="name and reason of files that could not be used")
    next: int | None = Field(description="cursor of the next page; null: this is the last one")
    classes: list[str] = Field(description="all classes of the store")
    counts: ReviewCounts = Field(description="of the whole store")


class StoredObjectAnswer(DetectedObject):
    """An object of a store."""

    id: int = Field(description="its number in this list")
    track_id: int | None = Field(default=None, description="its track in a video")
    object_id: str = Field(description="its id in the store, for edits")
    status: Status = Field(description="what somebody decided")
    author: str | None = Field(default=None, description="who decided")
    edited_at: str | None = Field(default=None, description="when, ISO 8601 in UTC")
    predicted_class: str | None = Field(default=None, description="class before anybody changed it")
    looks_like: str | None = Field(default=None, description="of a rejected object: what it is instead")


class StoredObjectsAnswer(StoredPictureAnswer):
    """An image of a store with its objects."""

    detections: list[StoredObjectAnswer] = Field(description="its objects")
    rejected: list[StoredObjectAnswer] = Field(description="those that somebody rejected, which are in no export")


class NextObject(BaseModel):
    """An object to look at."""

    object_id: str = Field(description="its id in the store, for edits")
    picture: str = Field(description="id of its image")
    name: str = Field(description="name of its image")
    class_name: str = Field(alias="class", description="its class")
    score: float = Field(description="confidence, 0 to 1")
    box: list[float] = Field(description="[x1, y1, x2, y2] in pixels")
    chance: float = Field(description="estimated chance that it is right, 0 to 1")


class NextAnswer(BaseModel):
    """The objects whose review changes most."""

    objects: list[NextObject] = Field(description="the most valuable first")
    unreviewed: int = Field(description="number of objects that nobody decided about")


class AppliedEdit(BaseModel):
    """An edit that was applied."""

    edit: int = Field(description="its position in the request")
    action: str = Field(description="its action; `undo` for what was taken back")
    objects: list[str] = Field(description="ids of the objects that it changed or added")


class RefusedEdit(BaseModel):
    """An edit that was left out."""

    edit: int = Field(description="its position in the request")
    reason: str = Field(description="what was expected, what was given, what is available")


class EditsAnswer(BaseModel):
    """What edits have changed."""

    batch: str | None = Field(description="for /undo; null if nothing was applied")
    applied: list[AppliedEdit] = Field(description="what was applied")
    refused: list[RefusedEdit] = Field(description="what was not, with `skip_invalid`")
    pictures: list[StoredPictureAnswer] = Field(description="the images that have changed, as they are now")
    counts: ReviewCounts = Field(description="of the whole store")


class TrackSummary(BaseModel):
    """A track of a stored video."""

    track: int = Field(description="its id")
    class_name: str = Field(alias="class", description="its class, in most frames")
    frames: int = Field(description="number of frames that it is seen in")
    spans: list[list[int]] = Field(description="first and last frame of each stretch in which it is seen")
    statuses: dict[Status, int] = Field(description="number of its objects by status")
    min_score: float = Field(description="score of its least certain object, 0 to 1")


class StoredVideoAnswer(BaseModel):
    """A video of a store."""

    name: str = Field(description="its name in the store, for edits of tracks")
    frames: int = Field(description="number of frames that are stored")
    picture: str = Field(description="id of the first of them")
    first: int = Field(description="number of the first frame")
    last: int = Field(description="number of the last frame")
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    tracks: list[TrackSummary] = Field(description="its tracks, in order of their ids")


class StoredVideosAnswer(BaseModel):
    """The videos of a store."""

    videos: list[StoredVideoAnswer] = Field(description="in natural order of their names")


class SweepTableAnswer(BaseModel):
    """The table of a sweep."""

    metric: str | None = Field(description="what the sweep maximizes; null without ground truth")
    columns: list[str] = Field(description="columns that have values")
    rows: list[dict[str, Any]] = Field(
        description="values by column, the best job first; without ground truth counts and agreement"
    )
    notes: list[str] = Field(description="what is not in the table, and why")


class ComparisonAnswer(BaseModel):
    """What two jobs found in the same images."""

    total: int = Field(description="number of images")
    matched: int = Field(description="number of objects that both have")
    only_a: int = Field(description="number of objects that only the first job has")
    only_b: int = Field(description="number of objects that only the second job has")
    pictures: list[dict[str, Any]] = Field(
        description="at most 50, most different first: name, width, height, matched (a, b, iou), only_a, only_b"
    )
    next: int | None = Field(description="cursor of the next page; null: this is the last one")
