"""Label Studio: tasks with the detections as predictions, and the labeling config that goes with them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import supervision as sv

from grounded_sam.checks import check_choice
from grounded_sam.errors import ConfigError, count_of
from grounded_sam.files import PendingFile, atomic_write_text, encode_controls
from grounded_sam.formats.label_studio import region_value
from grounded_sam.formats.label_studio_video import DEFAULT_FPS, VideoTrack, track_regions
from grounded_sam.formats.store_runs import package_version
from grounded_sam.media.files import is_video_file
from grounded_sam.sinks.base import DatasetSink
from grounded_sam.sinks.dataset_images import ImageMode
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: URL of an image, and of a video, in a storage of local files.
LOCAL_URL, LOCAL_VIDEO_URL = "/data/local-files/?d=images/{name}", "/data/local-files/?d=videos/{name}"
#: Tag of each kind of region, in the order of the config.
_TAGS = {"rectangle": "RectangleLabels", "polygon": "PolygonLabels", "brush": "BrushLabels"}


@dataclass(eq=False)
class LabelStudioSink(DatasetSink):
    """Write tasks to import, the config of their project, and images and videos under `label_studio/`.

    Images are in `tasks.json`, `config.xml` and `images/`; videos in `videos.json`, `videos.xml` and `videos/`, since
    a project of Label Studio shows one or the other. A video has a `VideoRectangle` for each track: boxes at keyframes,
    without masks. With `videos=frames`, and where a video is no file (a camera, a folder of frames), its frames are
    images.

    Label Studio serves files from disk only below its document root, and only if the project has a storage of local
    files there: `README.txt` in the folder has the command that starts it, and the path of the storage;
    `grounded-sam-label-studio create` does all of that. For files on a server, set `url`. Regions have the score of
    their detection, predictions the mean of their regions and `model_version`. Polygons run along the edges of pixels;
    zero-width bridges connect separate parts and holes, so that there is one region per object.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        split: Share of each split, see `splits.Splits`; written as `data.split`.
        seed: Seed of the split.
        images: `link`, `copy` or `none`, also of videos; see `dataset_images.DatasetImages`. `address` names images at
            their addresses (`s3://bucket/a.jpg`), which Label Studio reads with its own credentials.
        regions: `polygon`, `brush` (exact, but Label Studio's own converter omits it from COCO and YOLO), or `both`.
            Without masks regions are rectangles.
        videos: `video`, or `frames` for each frame as an image.
        tolerance: Largest distance in pixels of simplified polygons from the outline; 0 for exact ones.
        url: URL of an image, where `{name}` is its path under `images/`; of a video, that under `videos/`.
        model_version: Version that predictions are marked with; None for this package and its version.

    Raises:
        ConfigError: If `regions` or `videos` is none of its choices, or `url` lacks `{name}`.
    """

    name: ClassVar[str] = "label_studio"
    takes_image_addresses: ClassVar[bool] = True

    images: ImageMode = "copy"
    regions: Literal["polygon", "brush", "both"] = "polygon"
    videos: Literal["video", "frames"] = "video"
    tolerance: float = 0.0
    url: str = LOCAL_URL
    model_version: str | None = None
    _control_kinds: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("sink.label_studio.regions", self.regions, ("polygon", "brush", "both"))
        check_choice("sink.label_studio.videos", self.videos, ("video", "frames"))
        if "{name}" not in self.url:
            raise ConfigError(f"sink.label_studio.url must contain {{name}}, got {self.url!r}")
        super().__post_init__()
        self.model_version = self.model_version or f"grounded_sam {package_version('grounded_sam')}"
        self._image_tasks = _TaskFile(self.folder / "tasks.json")
        self._video_tasks = _TaskFile(self.folder / "videos.json")
        self._video: _Video | None = None

    def _write(self, result: FrameResult) -> int:
        frame, detections = result.frame, result.raw
        if not self._is_in_video_file(frame):
            self._end_video()
            self._write_image(result)
            return len(detections)
        if self._video is None or self._video.name != frame.video:
            self._end_video()
            name = self._image_files.save_video(frame, self.folder / "videos")
            self._video = _Video(str(frame.video), name, frame.size_hw, self._splits(frame))
        self._video.add(result)
        return len(detections)

    def _is_in_video_file(self, frame: Frame) -> bool:
        if self.videos == "frames" or frame.video is None or frame.file is None or frame.time_s is None:
            return False
        if not isinstance(frame.file, Path) or not is_video_file(frame.file):
            return False
        return self.images == "none" or frame.file.is_file()

    def _write_image(self, result: FrameResult) -> None:
        """Write the task of an image."""
        frame, detections = result.frame, result.detections
        name = self._image_files.save(frame, self.folder / "images", self._image_files.unique_stem(frame))
        regions = [region for i in range(len(detections)) for region in self._regions(detections, i, frame.size_hw)]
        url = name if self.images == "address" else self.url.replace("{name}", quote(name))
        data = {"image": url, "file": frame.name}
        if (split := self._splits(frame)) is not None:
            data["split"] = split
        score = float(detections.confidence.mean()) if detections.confidence is not None and len(detections) else 0.0
        self._image_tasks.add(data, self._prediction(score, regions))

    def _prediction(self, score: float, regions: list[dict[str, Any]]) -> dict[str, Any]:
        return {"model_version": self.model_version, "score": round(score, 6), "result": regions}

    def _end_video(self) -> None:
        """Write the task of the video whose frames have come."""
        video, self._video = self._video, None
        if video is None:
            return
        template = LOCAL_VIDEO_URL if self.url == LOCAL_URL else self.url
        url = template.replace("{name}", quote(video.file))
        data: dict[str, Any] = {"video": url, "file": video.name, "fps": video.fps}
        if video.split is not None:
            data["split"] = video.split
        scores = [track.score / len(track.positions) for track in video.tracks.values()]
        self._video_tasks.add(data, self._prediction(float(np.mean(scores)) if scores else 0.0, video.regions()))

    def _regions(self, detections: sv.Detections, i: int, size_hw: tuple[int, int]) -> list[dict[str, Any]]:
        """Return the regions of one detection, in percent of width and height."""
        assert detections.confidence is not None
        height, width = size_hw
        mask = None if detections.mask is None else np.asarray(detections.mask[i], bool)
        kinds = {"both": ["polygon", "brush"]}.get(self.regions, [self.regions]) if mask is not None else ["rectangle"]
        values = {kind: region_value(kind, detections.xyxy[i], mask, size_hw, self.tolerance) for kind in kinds}
        self._control_kinds |= {kind for kind, value in values.items() if value is not None}
        track_id = None if detections.tracker_id is None else int(detections.tracker_id[i])
        meta = {} if track_id is None else {"meta": {"text": [f"track {track_id}"]}}
        object_id = detections.data["object_id"][i] if "object_id" in detections.data else i
        return [
            {
                "id": f"{object_id}-{kind}",
                "type": f"{kind}labels",
                "from_name": kind,
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": round(float(detections.confidence[i]), 6),
                "value": {**value, f"{kind}labels": [encode_controls(str(detections.data["class_name"][i]))]},
                **meta,
            }
            for kind, value in values.items()
            if value is not None
        ]

    def _close(self) -> None:
        self._end_video()
        has_images, has_videos = self._image_tasks.commit(), self._video_tasks.commit()
        if has_images:
            atomic_write_text(self.folder / "config.xml", image_labeling_config(self.vocabulary, self.kinds))
        if has_videos:
            atomic_write_text(self.folder / "videos.xml", video_labeling_config(self.vocabulary))
        if self.url == LOCAL_URL:
            atomic_write_text(self.folder / "README.txt", self._instructions(has_images, has_videos))

    def _instructions(self, has_images: bool, has_videos: bool) -> str:
        """Return how to open the tasks in Label Studio."""
        folder = self.folder.resolve()
        projects = [("config.xml", "tasks.json", "images")] * has_images
        projects += [("videos.xml", "videos.json", "videos")] * has_videos
        own = " of its own" if len(projects) > 1 else ""
        steps = [
            f"2. In a project{own}: Settings, Labeling Interface, Code: paste {config}.\n"
            "3. Settings, Cloud Storage, Add Source Storage, Local Files, with this absolute local path; save it\n"
            f"   without synchronizing, which would add every file a second time:\n\n   {folder / files}\n\n"
            f"4. Import {tasks}.\n"
            for config, tasks, files in projects
        ]
        return (
            "1. Start Label Studio so that it may serve this folder:\n\n"
            "   LOCAL_FILES_SERVING_ENABLED=true LOCAL_FILES_DOCUMENT_ROOT="
            f"{shlex.quote(str(folder))} label-studio start\n\n" + "\n".join(steps)
        )

    def _last_files(self) -> Sequence[Path]:
        return tuple(self.folder / name for name in ("tasks.json", "config.xml", "videos.json", "videos.xml"))

    @property
    def written(self) -> list[str]:
        """Names of the files of tasks that were written."""
        return [tasks.path.name for tasks in (self._image_tasks, self._video_tasks) if tasks.count]

    @property
    def kinds(self) -> set[str]:
        """Kinds of regions of the images, or those that they would have."""
        return self._control_kinds or set({"both": ("polygon", "brush")}.get(self.regions, (self.regions,)))

    def own_folder(self) -> Path:
        """Return the folder of the dataset, whose one list of labels has the images of the last run only."""
        return self.folder

    def summary(self) -> str:
        """Return the counts and the paths of the tasks."""
        files = [str(self.folder / name) for name in self.written]
        storage = f"; it needs a Local Files storage, see {self.folder / 'README.txt'}" if self.url == LOCAL_URL else ""
        numbers = [(self._image_tasks.count, "image"), (self._video_tasks.count, "video")]
        places = " and ".join(count_of(number, noun) for number, noun in numbers if number) or count_of(0, "image")
        paths = " and ".join(files) or str(self._image_tasks.path)
        return f"{count_of(self.num_objects, 'object')} in {places} for Label Studio: {paths}{storage}"


class _TaskFile:
    """A JSON list of tasks that is written one by one, and is there when it is complete.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._file: PendingFile | None = None

    def add(self, data: dict[str, Any], prediction: dict[str, Any]) -> None:
        """Append a task."""
        if self._file is None:
            self._file = PendingFile(self.path)
        task = json.dumps({"data": data, "predictions": [prediction]}, ensure_ascii=False)
        self._file.text.write((",\n" if self.count else "[\n") + task)
        self.count += 1

    def commit(self) -> bool:
        """Put the file in its place; return whether there is one."""
        if self._file is None:
            return False
        self._file.text.write("\n]\n")
        self._file.commit()
        return True


class _Video:
    """The tracks of a video, frame by frame.

    Args:
        name: Name of the video.
        file: Its path below `videos/`.
        size_hw: Height and width of its frames.
        split: Its split.
    """

    def __init__(self, name: str, file: str, size_hw: tuple[int, int], split: str | None) -> None:
        self.name, self.file, self.size_hw, self.split = name, file, size_hw, split
        self.tracks: dict[int, VideoTrack] = {}
        self.fps, self._frames, self._last = DEFAULT_FPS, 0, 0

    def add(self, result: FrameResult) -> None:
        """Add a frame.

        Raises:
            ConfigError: If its objects have no track ids.
        """
        frame, found = result.frame, result.raw
        if len(found) and found.tracker_id is None:
            raise ConfigError(
                "sink=label_studio needs tracks for a video: a tracker other than none, or "
                "sink.label_studio.videos=frames"
            )
        assert frame.time_s is not None
        if frame.index and frame.time_s > 0:
            self.fps = round(frame.index / frame.time_s, 3)
        for i in range(len(found)):
            assert found.tracker_id is not None and found.confidence is not None
            track = self.tracks.setdefault(int(found.tracker_id[i]), VideoTrack())
            name = encode_controls(str(found.data["class_name"][i]))
            score = float(found.confidence[i])
            track.add(self._frames, frame.time_s, found.xyxy[i].tolist(), frame.size_hw, name, score)
        self._frames, self._last = self._frames + 1, frame.index

    def regions(self) -> list[dict[str, Any]]:
        """Return a region for each track."""
        return track_regions(self.tracks, "box", "video", self.size_hw, self.fps, self._last + 1)


def image_labeling_config(vocabulary: Vocabulary, kinds: Iterable[str], smart: bool = False) -> str:
    """Return the labeling config of a project of images.

    Args:
        vocabulary: The classes.
        kinds: Kinds of regions: `rectangle`, `polygon` or `brush`.
        smart: Whether there are points and rectangles that ask an ML backend, and a field for words.

    >>> image_labeling_config(Vocabulary.parse(["car"]), ["brush"]).splitlines()[2]
    '  <BrushLabels name="brush" toName="image">'
    """
    kinds = set(kinds)
    lines = ["<View>", '  <Image name="image" value="$image" zoom="true"/>']
    labels = _label_lines(vocabulary)
    for kind, tag in _TAGS.items():
        if kind in kinds:
            lines += [f'  <{tag} name="{kind}" toName="image">', *labels, f"  </{tag}>"]
    if smart:
        only = 'toName="image" smart="true" smartOnly="true"'
        lines.append('  <Header value="Smart tools, with Auto-Annotation: the label of a point" size="6"/>')
        # Label Studio's COCO export merges all classes that points have, so points have names of their own.
        lines += [
            f'  <KeyPointLabels name="point" {only}>',
            *_label_lines(vocabulary, "point on "),
            "  </KeyPointLabels>",
        ]
        if "rectangle" not in kinds:
            lines.append('  <Header value="The label of a rectangle" size="6"/>')
            lines += [f'  <RectangleLabels name="prompt" {only}>', *labels, "  </RectangleLabels>"]
        lines.append('  <Header value="Anything else, in words" size="6"/>')
        lines.append('  <TextArea name="words" toName="image" smart="true" placeholder="other things to look for"/>')
    return "\n".join([*lines, "</View>"]) + "\n"


def video_labeling_config(vocabulary: Vocabulary) -> str:
    """Return the labeling config of a project of videos.

    Args:
        vocabulary: The classes.
    """
    lines = ["<View>", '  <Labels name="label" toName="video">', *_label_lines(vocabulary)]
    lines += ["  </Labels>", '  <Video name="video" value="$video" framerate="$fps"/>']
    return "\n".join([*lines, '  <VideoRectangle name="box" toName="video"/>', "</View>"]) + "\n"


def _label_lines(vocabulary: Vocabulary, prefix: str | None = None) -> list[str]:
    """Return the tags of the labels, with an alias where there is a prefix for it."""
    lines = []
    for name, color in zip(vocabulary.classes, vocabulary.palette(), strict=True):
        value = encode_controls(name)
        alias = "" if prefix is None else f" alias={quoteattr(prefix + value)}"
        lines.append(f"    <Label value={quoteattr(value)}{alias} background={quoteattr(color)}/>")
    return lines
