"""Masks of objects through videos that exist already: results of others, or labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.formats.video_masks import LabelledVideo, LabelledVideos
from grounded_sam.media.images import MAX_PIXELS, read_image
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.results import Skipped
from grounded_sam.structures.vocabulary import Vocabulary

#: Of the frames of such datasets.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class LabelledVideoSource:
    """The frames of labelled videos with their objects, for `detector=stored`.

    Objects keep their numbers as `tracker_id` and have the confidence 1; where they have no class it is `object`.

    Args:
        input: a folder of DAVIS, SA-V's JSON, YouTube-VIS JSON; see `masklets.Masklets`.
        images: the folder that has the frames, by video and name (`JPEGImages/480p`); without it, sinks that want
            pixels have none.
        fps: frames per second, which labels do not say.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        ConfigError: if the input cannot be read.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        images: str | os.PathLike[str] | None = None,
        fps: float = 24.0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if input is None or not str(input):
            raise ConfigError("input is missing: give masks of videos, e.g. input=DAVIS/Annotations/480p")
        path = Path(str(input)).expanduser()
        if not path.exists():
            raise ConfigError(f"input={input}: no such file or folder")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
            raise ConfigError(f"source.fps must be a number above 0, got {fps!r}")
        self.masklets = LabelledVideos(path)
        self.vocabulary = self.masklets.vocabulary or Vocabulary.parse(["object"])
        self.images = None if images is None else Path(str(images)).expanduser()
        self.fps, self.max_pixels = fps, max_pixels
        self.skipped: list[Skipped] = []

    def __len__(self) -> int:
        return sum(len(video.frames) for video in self.masklets.videos.values())

    def __iter__(self) -> Iterator[Frame]:
        for video in self.masklets.videos.values():
            for place, key in enumerate(video.frames):
                index = key if isinstance(key, int) else place
                found = video.read(key)
                stem = (video.names or {}).get(key) or (f"{key:05d}" if isinstance(key, int) else key)
                name = f"{video.name}/{stem}"
                numbers = list(found)
                if numbers:
                    masks = np.stack([found[number] for number in numbers])
                    names = [(video.classes or {}).get(number, "object") for number in numbers]
                    ids = [self.vocabulary.classes.index(name) for name in names]
                    boxes = masks_to_xyxy(masks)
                    rows = make_detections(boxes, np.ones(len(ids)), ids, self.vocabulary, video.size_hw, masks)
                else:
                    rows = empty_detections(self.vocabulary)
                rows.tracker_id = np.array(numbers, np.int64)
                pixels = partial(self._read, video, name)
                yield Frame(pixels, index, name, index / self.fps, video.name, None, video.size_hw, rows)

    def _read(self, video: LabelledVideo, name: str) -> NDArray[np.uint8]:
        if self.images is None:
            raise ImageError(f"{name}: the picture is not known; source.images says where the frames are")
        path = next((p for end in SUFFIXES if (p := self.images / f"{name}{end}").is_file()), None)
        if path is None:
            raise ImageError(f"{self.images / name}: no such picture ({', '.join(SUFFIXES)}), see source.images")
        image = read_image(path, self.max_pixels)
        if image.shape[:2] != video.size_hw:
            height, width = video.size_hw
            raise ImageError(f"{path}: {image.shape[1]}x{image.shape[0]} px, but its masks have {width}x{height} px")
        return image
