"""Pictures in: one way to read a file, an array or a PIL image into upright 8-bit RGB."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ImageError
from grounded_sam.media.images import read_image, to_rgb

if TYPE_CHECKING:
    import supervision as sv


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture on its way through the pipeline.

    Attributes:
        pixels: RGB, upright, `(H, W, 3) uint8`; or a function that makes it when `image` is first asked for.
        index: its place in the source, from 0; of a video, the number of the frame in it.
        name: its path relative to the input, with `/`; unique within a source.
        time_s: seconds from the start of a video, else None.
        video: name of the video that it belongs to, else None.
        file: the picture or video file that it comes from, if it comes from one.
        size: height and width, where pixels are made later.
        found: what an earlier run found in it, for `detector=stored`.
    """

    pixels: NDArray[np.uint8] | Callable[[], NDArray[np.uint8]]
    index: int = 0
    name: str = "image"
    time_s: float | None = None
    video: str | None = None
    file: Path | None = None
    size: tuple[int, int] | None = None
    found: sv.Detections | None = None

    @property
    def image(self) -> NDArray[np.uint8]:
        """RGB, upright, `(H, W, 3) uint8`.

        Raises:
            ImageError: if it is made only now and cannot be.
        """
        if callable(self.pixels):
            object.__setattr__(self, "pixels", self.pixels())
        return self.pixels  # type: ignore[return-value]

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.size or (self.image.shape[0], self.image.shape[1])


def to_frame(picture: Any, index: int = 0) -> Frame:
    """Whatever a caller may hold as a picture, as a frame.

    Args:
        picture: a path, a PIL image, or an array: RGB `(H, W, 3) uint8` or gray `(H, W) uint8`.

    Raises:
        ImageError: for anything else, naming what came.
    """
    if isinstance(picture, Frame):
        return picture
    if isinstance(picture, str | os.PathLike):
        return Frame(read_image(picture), index, Path(picture).name, file=Path(picture))
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.size == 0:
            raise ImageError(f"expected an RGB array of uint8, got {picture.dtype} of shape {picture.shape}")
        if picture.ndim == 2:
            picture = np.repeat(picture[..., None], 3, axis=2)
        if picture.ndim != 3 or picture.shape[2] != 3:
            raise ImageError(f"expected an RGB array of shape (H, W, 3), got {picture.shape}")
        return Frame(np.ascontiguousarray(picture), index, f"image-{index}")
    from PIL import Image, ImageOps

    if isinstance(picture, Image.Image):
        try:
            return Frame(to_rgb(ImageOps.exif_transpose(picture)), index, f"image-{index}")
        except Exception as error:  # as above: a PIL image decodes only now
            raise ImageError(f"damaged picture ({' '.join(str(error).split())})") from error
    raise ImageError(f"expected a path, a PIL image or an RGB array, got {type(picture).__name__}")
