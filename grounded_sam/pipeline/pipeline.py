"""The pipeline: text to boxes to masks, in images and through videos."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, Unpack, overload

import numpy as np

from grounded_sam.detectors.clicks import ClickDetector
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.pipeline.images import DetectThenSegment, ImageStages, StageTimer, process_images
from grounded_sam.pipeline.refine import Refine
from grounded_sam.pipeline.select import Select, SelectOptions, override_select
from grounded_sam.pipeline.tiles import Tiles
from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.pipeline.video import track_video
from grounded_sam.segmenters.session import SegmentSession
from grounded_sam.structures.clicks import Clicks
from grounded_sam.structures.frame import Frame, to_frame, undecoded
from grounded_sam.structures.image_detections import ImageDetections
from grounded_sam.structures.protocols import (
    Detector,
    EndToEndTracker,
    HasVocabulary,
    PromptableSegmenter,
    RunsModel,
    Segmenter,
    TextTracker,
    Tracker,
    Verifier,
)
from grounded_sam.structures.request import Request
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

AnyTracker = Tracker | EndToEndTracker | TextTracker


class Pipeline:
    """Detect, segment and track what text names.

    Args:
        detector: Text to boxes; None for video-only runs whose tracker needs no detector.
        segmenter: Boxes to masks; None for boxes alone, or where the detector returns masks.
        select: Which detections to keep.
        vocabulary: Classes to look for in calls that pass no text.
        negatives: Look-alike phrases whose detections are dropped; used only by calls that pass their own text.
        tracker: Tracker for videos, or a function that builds it when the first video comes; None for no ids.
        track: How videos are tracked.
        prompt_template: Template for each phrase, such as `a photo of a {}`; used only by calls that pass their own
            text.
        tiles: How large images are tiled for the detector.
        refine: How masks and the verifier change boxes and scores.
        verifier: Judges detections once they have masks; None without one.

    Attributes:
        stages: Detector and segmenter with selection, as they are applied to images and keyframes.
        seconds: Wall-clock seconds by stage.

    >>> pipeline = load(preset="shapes")                           # doctest: +SKIP
    >>> pipeline.segment("scene.png", ["red circle"]).mask.shape   # doctest: +SKIP
    (2, 480, 640)
    """

    def __init__(
        self,
        detector: Detector | None,
        segmenter: Segmenter | None = None,
        select: Select | None = None,
        vocabulary: Vocabulary | None = None,
        negatives: Sequence[str] = (),
        tracker: AnyTracker | Callable[[], AnyTracker] | None = None,
        track: TrackSettings | None = None,
        prompt_template: str = "{}",
        tiles: Tiles | None = None,
        refine: Refine | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        self.detector, self.vocabulary = detector, vocabulary
        self.negatives, self.prompt_template = negatives, prompt_template
        self.select, self.track_settings = select or Select(), track or TrackSettings()
        self.timer = StageTimer()
        self.seconds = self.timer.seconds
        self.stages: ImageStages = DetectThenSegment(
            detector, segmenter, self.select, tiles or Tiles(), refine or Refine(), self.timer, verifier
        )
        self._tracker = tracker

    def __repr__(self) -> str:
        parts = {"detector": self.detector, "segmenter": self.segmenter, "verifier": self.stages.verifier}
        texts = [f"{name}={_describe(stage)}" for name, stage in parts.items() if stage is not None]
        if self._tracker is not None:
            is_built = isinstance(self._tracker, Tracker | EndToEndTracker | TextTracker)
            texts.append(f"tracker={_describe(self._tracker) if is_built else 'loaded with the first video'}")
        return f"Pipeline({', '.join(texts)})"

    @property
    def segmenter(self) -> Segmenter | None:
        """The segmenter, if any."""
        return self.stages.segmenter

    @property
    def has_tracker(self) -> bool:
        """Whether videos are tracked; asking does not build the tracker."""
        return self._tracker is not None

    @property
    def tracker(self) -> AnyTracker | None:
        """The tracker, built when it is first needed."""
        if self._tracker is not None and not isinstance(self._tracker, Tracker | EndToEndTracker | TextTracker):
            self._tracker = self._tracker()
        return self._tracker

    def parse_text(self, text: Any = None) -> Vocabulary:
        """Return the vocabulary of a call: `text`, else the pipeline's, else the detector's own.

        Raises:
            ConfigError: If there is none.
            VocabularyError: If the text names no class.
        """
        if isinstance(text, Vocabulary):
            return text
        if text is not None:
            return Vocabulary.parse(text, self.negatives).with_prompt_template(self.prompt_template)
        own = self.vocabulary
        if own is None and isinstance(self.detector, HasVocabulary):
            own = self.detector.vocabulary
        if own is None:
            raise ConfigError("text is missing: name the classes to look for, e.g. text=[car, wheel]")
        return own

    def request(self, text: Any = None, clicks: Any = None) -> Request:
        """Combine the text and clicks of a call, or of the settings, into a `Request`.

        Args:
            text: As for `segment`.
            clicks: A JSON file or entries, see `structures.clicks.Clicks`; None for those of the settings.

        Raises:
            ConfigError: If there is neither text nor clicks.
        """
        entries = clicks if clicks is not None else self.track_settings.clicks
        prompts = None if entries is None else Clicks(entries, "track.clicks")
        detector_clicks = self.detector.clicks if isinstance(self.detector, ClickDetector) else None
        prompts = prompts or detector_clicks
        no_text = text is None and self.vocabulary is None
        if prompts is not None and (detector_clicks is not None or no_text):
            classes = Vocabulary.parse(text) if text is not None else self.vocabulary or prompts.vocabulary
            return Request(classes=classes, clicks=prompts)
        vocabulary = self.parse_text(text)
        classes = vocabulary if prompts is None else vocabulary.with_classes(prompts.vocabulary.classes)
        return Request(classes=classes, vocabulary=vocabulary, clicks=prompts)

    @overload
    def detect(self, images: list[Any], text: Any = None, **select: Unpack[SelectOptions]) -> list[ImageDetections]: ...
    @overload
    def detect(self, images: Any, text: Any = None, **select: Unpack[SelectOptions]) -> ImageDetections: ...
    def detect(self, images: Any, text: Any = None, **select: Unpack[SelectOptions]) -> Any:
        """Detect boxes with classes, without masks; see `segment`."""
        return self._process(images, text, select, masks=False)

    @overload
    def segment(
        self, images: list[Any], text: Any = None, **select: Unpack[SelectOptions]
    ) -> list[ImageDetections]: ...
    @overload
    def segment(self, images: Any, text: Any = None, **select: Unpack[SelectOptions]) -> ImageDetections: ...
    def segment(self, images: Any, text: Any = None, **select: Unpack[SelectOptions]) -> Any:
        """Detect boxes with classes, and segment them.

        Args:
            images: A path, a PIL image, an RGB array `(H, W, 3) uint8`, or a list of those.
            text: Classes: a list, a string, a mapping from class to phrases, a file of those, or a `Vocabulary`; None
                for the pipeline's or the detector's own.
            select: Settings of `Select` that differ in this call, such as `score=0.2`, `class_score={"car": 0.5}`,
                `nms=None` or `top_k=1`.

        Returns:
            Detections, most confident first, in the form that `structures.detections` describes; a list of them for a
            list. They are `supervision.Detections` that also know their image: a notebook shows them, and they have
            `plot`, `show`, `save`, `to_pandas` and `to_coco`. Those of a list of files keep the paths instead of the
            pixels.

        Raises:
            ConfigError: If `select` has an unknown setting, or one out of range.
            ImageError: If an image cannot be read.
            VocabularyError: If the text names no class.

        >>> detections = model.segment("street.jpg", ["car"], score=0.2)      # doctest: +SKIP
        >>> detections                                                        # doctest: +SKIP
        ImageDetections(street.jpg, 800x534 px: 3 car)
        """
        return self._process(images, text, select, masks=True)

    def _process(self, images: Any, text: Any, select: SelectOptions, masks: bool) -> Any:
        is_list = isinstance(images, list | tuple)
        frames = (to_frame(image, i) for i, image in enumerate(images if is_list else [images]))
        vocabulary = self.parse_text(text)
        stages = self.stages.with_select(override_select(self.select, select)) if select else self.stages
        detections = [
            ImageDetections.of(result.detections, undecoded(result.frame) if is_list else result.frame, vocabulary)
            for result in process_images(frames, vocabulary, stages, masks)
        ]
        return detections if is_list else detections[0]

    def session(self, image: Any) -> SegmentSession:
        """Encode an image once for any number of manual prompts.

        Args:
            image: As for `segment`.

        Raises:
            ConfigError: If the segmenter takes no prompts.
            ImageError: If the image cannot be read.
        """
        if not isinstance(self.segmenter, PromptableSegmenter):
            raise ConfigError("a session needs a segmenter that takes prompts, e.g. segmenter=sam2")
        return SegmentSession(self.segmenter, to_frame(image))

    def track(self, video: Any, text: Any = None, clicks: Any = None) -> Generator[FrameResult]:
        """Track objects through a video, one frame at a time.

        >>> for result in model.track("clip.mp4", ["person"]):                # doctest: +SKIP
        ...     print(result.frame.time_s, result.detections.tracker_id)

        Args:
            video: A video file, a folder of frames, a glob, a camera index, a URL, a `sources.video.VideoSource`, or
                any iterable of images of one size (paths, PIL images, RGB arrays).
            text: As for `segment`; not needed where there are clicks.
            clicks: Manual points, boxes or masks, as a JSON file or entries; see `structures.clicks.Clicks`.

        Returns:
            A generator of results whose detections have `tracker_id`. Only the current frame is held in memory; closing
            the generator stops decoding.

        Raises:
            ConfigError: If there is no tracker.
            ImageError: If the video cannot be read.

        Warns:
            UserWarning: At the end, for every click that no frame took.
        """
        from grounded_sam.sources.video import VideoSource

        request = self.request(text, clicks)
        if isinstance(video, str | int | os.PathLike):
            video = VideoSource(video)
        if isinstance(video, np.ndarray) and video.ndim != 4:
            raise ImageError(f"expected a video, such as frames (T, H, W, 3), got one array of shape {video.shape}")
        if not isinstance(video, Iterable):
            raise ImageError(f"expected a video or its frames, got {type(video).__name__}")
        frames = (to_frame(image, i) for i, image in enumerate(video))
        return self._with_images(self.track_frames(frames, request), request)

    def _with_images(self, results: Generator[FrameResult], request: Request) -> Generator[FrameResult]:
        """Yield results whose detections can draw themselves; warn of unused clicks at the end."""
        with closing(results):
            for result in results:
                detections = ImageDetections.of(result.detections, result.frame, request.classes)
                yield FrameResult(frame=result.frame, detections=detections)
        for name, reason in request.clicks.unused() if request.clicks is not None else ():
            warnings.warn(f"{name}: {reason}", stacklevel=2)

    def track_frames(self, frames: Iterator[Frame], request: Request) -> Generator[FrameResult]:
        """Track objects through the frames of one video; see `track`."""
        tracker = self.tracker
        if tracker is None:
            raise ConfigError("to track objects through a video choose a tracker, e.g. tracker=sam2")
        yield from track_video(frames, request, tracker, self.stages, self.track_settings, self.select, self.timer)


def _describe(stage: Any) -> str:
    """Return the class of a stage, and the device of its network."""
    import torch

    if isinstance(stage, RunsModel) and isinstance(stage.model, torch.nn.Module):
        return f"{type(stage).__name__} on {next(stage.model.parameters()).device}"
    return type(stage).__name__
