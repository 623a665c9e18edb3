"""What the store holds and how it is read: Parquet part files, written once and never changed.

A store is a folder with

`_run-*.json`    one per setting that wrote into it: fingerprint, settings, classes, versions
`part-*.parquet` rows; the name begins with the time, and a later row replaces an earlier one of the same picture

Rows, schema version 1; of every kind only the columns that apply are filled:

===========  =========  ==================================================================================
kind         string     `image` (a picture or frame that was looked at), `object` (in the image above it),
                        `skipped` (a file that could not be used), `video` (a video that was gone through whole)
file         string     name relative to the input, with `/`; of frames `clip.mp4/000012`
path         string     where the file lay, absolute; null for cameras and streams
digest       string     SHA-256 of the file; of a folder of frames, of their digests
take         string     of a frame and of a `video` row: which passage through the video it belongs to
fingerprint  string     of the settings that made the row, see `fingerprint`
video        string     name of the video that a frame belongs to
frame        int64      number of the frame in its video; of a `video` row, how many frames were stored
time_s       float64    seconds from the start of the video
width        int32      pixels
height       int32
objects      int32      of an image: how many `object` rows follow it
reason       string     of a skipped file
class_id     int32      place in the classes of the run
class        string
score        float32    0 to 1
mask_score   float32    the segmenter's estimate of IoU
x1 y1 x2 y2  float32    box in pixels, right and bottom exclusive
area         int64      pixels of the mask
counts       string     mask as compressed COCO RLE; its size is height and width
tracker_id   int64      in a video, one per object
===========  =========  ==================================================================================

Any Parquet reader opens it: `pandas.read_parquet("store")`, `duckdb`, `pyarrow.dataset`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.media.files import VIDEO_SUFFIXES
from grounded_sam.media.images import read_image
from grounded_sam.media.video import downscale
from grounded_sam.sources.video import VideoSource


class _Clip:
    """Frames of a video file, decoded again in the order they are asked for."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._frames: Any = None
        self._last = -1

    def read(self, path: str, index: int, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
        """Frame `index` at the size that it was stored with."""
        if self._frames is None or index <= self._last:
            try:
                self._frames = iter(VideoSource(path, start=index, max_pixels=self.max_pixels))
            except ConfigError as error:
                raise ImageError(f"{path}: no such file") from error
        for frame in self._frames:
            if frame.index == index:
                self._last = index
                return downscale(frame.image, (size_hw[1], size_hw[0]))
        self._frames = None
        raise ImageError(f"{path}: frame {index} is not there any more")


def _is_movie(path: str) -> bool:
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


class _Lazy:
    """Makes the pixels of a stored frame from the file that it came from, when they are asked for."""

    def __init__(
        self,
        name: str,
        path: str | None,
        index: int | None,
        size_hw: tuple[int, int],
        max_pixels: int,
        clip: _Clip | None,
    ) -> None:
        self.name, self.path, self.index, self.size_hw = name, path, index, size_hw
        self.max_pixels, self.clip = max_pixels, clip

    def __call__(self) -> NDArray[np.uint8]:
        if self.path is None:
            raise ImageError(f"{self.name}: its pixels are gone, it came from a camera or a stream")
        if self.clip is not None and self.index is not None and _is_movie(self.path):
            return self.clip.read(self.path, self.index, self.size_hw)
        image = read_image(self.path, self.max_pixels)
        height, width = self.size_hw
        if self.index is not None:  # a frame, which may have been scaled down
            image = downscale(image, (width, height))
        if image.shape[:2] != self.size_hw:
            was = f"{width}x{height} px"
            raise ImageError(f"{self.path}: {image.shape[1]}x{image.shape[0]} px, but it was stored as {was}")
        return image
