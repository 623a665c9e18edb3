"""Existing masks of objects in videos: labels, or results of other tools."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_int, check_number
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.files import home_path
from grounded_sam.formats.video_masks import LabelledVideo, LabelledVideos
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.sources.coco import read_image_of_size
from grounded_sam.sources.inputs import check_input
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.results import Skipped
from grounded_sam.structures.vocabulary import Vocabulary

#: Suffixes of the frames of such datasets.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class LabelledVideoSource:
    """The frames of labeled videos with their objects, for `detector=stored`.

    The ids of the objects become `tracker_id`; confidence is 1. Objects without a class get the class `object`.

    Args:
        input: A DAVIS folder, SA-V JSON, or YouTube-VIS JSON; see `formats.video_masks.LabelledVideos`.
        images: Folder with the frames, by video and name (`JPEGImages/480p`); None if no sink needs pixels.
        fps: Frame rate, which the labels do not contain.
        max_pixels: Larger images are refused before they are decoded.

    Attributes:
        vocabulary: Classes of the labels.

    Raises:
        ConfigError: If the input cannot be read.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        images: str | os.PathLike[str] | None = None,
        fps: float = 24.0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        path = home_path(check_input(input, "masks of videos, e.g. input=DAVIS/Annotations/480p"))
        if not path.exists():
            raise ConfigError(f"input={input}: no such file or folder")
        check_number("source.fps", fps, 0, above=True)
        check_int("source.max_pixels", max_pixels, 1)
        self.labels = LabelledVideos(path, max_pixels=max_pixels)
        self.vocabulary = self.labels.vocabulary or Vocabulary.parse(["object"])
        self.images = None if images is None else home_path(str(images))
        self.fps, self.max_pixels = fps, max_pixels
        self.skipped: list[Skipped] = []

    def __len__(self) -> int:
        return sum(len(video.frames) for video in self.labels.videos.values())

    def __iter__(self) -> Iterator[Frame]:
        for video in self.labels.videos.values():
            for position, key in enumerate(video.frames):
                index = key if isinstance(key, int) else position
                stem = (video.frame_names or {}).get(key) or (f"{key:05d}" if isinstance(key, int) else key)
                name = f"{video.name}/{stem}"
                yield Frame(
                    pixels=partial(self._read, video, name),
                    index=index,
                    name=name,
                    time_s=index / self.fps,
                    video=video.name,
                    size=video.size_hw,
                    annotations=self._annotations(video, key),
                )

    def _annotations(self, video: LabelledVideo, key: int | str) -> sv.Detections:
        """Return the objects of one frame."""
        masks = video.read(key)
        ids = list(masks)
        if ids:
            names = [(video.classes or {}).get(tracker_id, "object") for tracker_id in ids]
            class_ids = [self.vocabulary.classes.index(name) for name in names]
            stacked = np.stack(list(masks.values()))
            boxes, ones = masks_to_xyxy(stacked), np.ones(len(ids))
            detections = make_detections(boxes, ones, class_ids, self.vocabulary, video.size_hw, stacked)
        else:
            detections = empty_detections(self.vocabulary)
        detections.tracker_id = np.array(ids, np.int64)
        return detections

    def _read(self, video: LabelledVideo, name: str) -> NDArray[np.uint8]:
        if self.images is None:
            raise ImageError(f"{name}: source.images is not set; set it to the folder of the frames")
        path = next((p for suffix in SUFFIXES if (p := self.images / f"{name}{suffix}").is_file()), None)
        if path is None:
            raise ImageError(f"{self.images / name}: no such image ({', '.join(SUFFIXES)}); see source.images")
        return read_image_of_size(path, video.size_hw, self.max_pixels, "its masks")
