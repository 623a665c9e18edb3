"""Read the pixels of stored images again, from the files that they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.formats.store_files import StoredFile
from grounded_sam.media.files import is_video_file
from grounded_sam.media.prefetch import Prefetch
from grounded_sam.media.video import VideoDecoder, downscale
from grounded_sam.structures.frame import read_file

#: Number of frames that are decoded ahead.
AHEAD = 4


class StoredVideo:
    """Frames of one video file, decoded in the order in which they are read.

    Args:
        max_pixels: Larger frames are refused before they are decoded.
    """

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._frames: Any = None
        self._last_index = -1

    def read(self, path: str, index: int, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
        """Decode a frame; decoding starts anew if it comes before the last one.

        Args:
            path: Video file.
            index: Frame number.
            size_hw: Height and width that it was stored with, to which it is scaled down.

        Raises:
            ImageError: If the file is missing, or has no such frame.
        """
        if self._frames is None or index <= self._last_index:
            try:
                if not Path(path).is_file():  # a store may name an address or a camera, which VideoDecoder would open
                    raise ImageError(f"{path}: no such file")
                decoder = VideoDecoder(Path(path).absolute(), start=index, max_pixels=self.max_pixels)
            except ConfigError as error:
                raise ImageError(f"{path}: no such file") from error
            self._frames = Prefetch(iter(decoder), AHEAD)
        for frame in self._frames:
            if frame.index == index:
                self._last_index = index
                return downscale(frame.image, (size_hw[1], size_hw[0]))
        self._frames = None
        raise ImageError(f"{path}: frame {index} no longer exists")


@dataclass(frozen=True, eq=False)
class StoredPixels:
    """A function that reads the pixels of a stored image when they are first needed.

    Attributes:
        name: Name of the image, for messages.
        file: Image or video file.
        index: Frame number in a video; None for an image.
        size_hw: Height and width that it was stored with.
        max_pixels: Larger images are refused before they are decoded.
        video: Decoder that the frames of a video share; None for an image.
    """

    name: str
    file: StoredFile
    index: int | None
    size_hw: tuple[int, int]
    max_pixels: int
    video: StoredVideo | None

    def __call__(self) -> NDArray[np.uint8]:
        """Read the pixels, RGB `(H, W, 3) uint8`.

        Raises:
            ImageError: If the file is missing or damaged, or the image has another size now.
        """
        place = self.file.place
        if place is None:
            raise ImageError(f"{self.name}: its pixels cannot be read again, because it came from a camera or a stream")
        if self.file.refused:
            raise ImageError(self.file.refusal())
        if self.video is not None and self.index is not None and is_video_file(place):
            return self.video.read(str(place), self.index, self.size_hw)
        image = read_file(place, self.max_pixels)
        height, width = self.size_hw
        if self.index is not None:  # frames may have been scaled down
            image = downscale(image, (width, height))
        if image.shape[:2] != self.size_hw:
            stored = f"{width}x{height} px"
            raise ImageError(f"{place}: {image.shape[1]}x{image.shape[0]} px, but it was stored as {stored}")
        return image
