"""One image on its way through the pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ImageError, RemoteError
from grounded_sam.files import home_path
from grounded_sam.media.images import MAX_PIXELS, decode_image, read_image, to_rgb
from grounded_sam.remote import Location
from grounded_sam.structures.items import FileContent

if TYPE_CHECKING:
    import supervision as sv


@dataclass(frozen=True, eq=False, kw_only=True)
class Frame:
    """An image, or one frame of a video.

    Attributes:
        pixels: RGB, upright, `(H, W, 3) uint8`, which must not be changed while the frame is in use; or a function that
            returns them, called when `image` is first read.
        index: Position in the source, from 0; in a video, the frame number.
        name: Path relative to the input, with `/`; unique within a source.
        time_s: Seconds from the start of the video; None for an image.
        video: Name of the video; None for an image.
        file: Image or video file that the frame comes from, or the object under an address, if any.
        content: What is known of that file, where it was read; see `structures.items.FileContent`.
        size: Height and width in pixels, needed where `pixels` is a function.
        annotations: Detections that the source brings along, for `detector=stored`.
        record: What a COCO file says about the image besides name and size (`id`, `license`, `coco_url`...), for
            exports; in `license`, the entry of the license itself.

    >>> Frame(pixels=np.zeros((4, 6, 3), np.uint8)).size_hw
    (4, 6)
    """

    pixels: NDArray[np.uint8] | Callable[[], NDArray[np.uint8]]
    index: int = 0
    name: str = "image"
    time_s: float | None = None
    video: str | None = None
    file: Path | Location | None = None
    content: FileContent | None = None
    size: tuple[int, int] | None = None
    annotations: sv.Detections | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.pixels, np.ndarray):
            # Stages know images by identity, and the caller may use the same memory for the next frame.
            object.__setattr__(self, "pixels", self.pixels.view())

    @property
    def image(self) -> NDArray[np.uint8]:
        """Pixels, RGB, upright, `(H, W, 3) uint8`; decoded once.

        Raises:
            ImageError: If they are decoded now and cannot be.
        """
        if callable(self.pixels):
            object.__setattr__(self, "pixels", self.pixels().view())
        return self.pixels  # type: ignore[return-value]

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels; does not decode where `size` is given."""
        return self.size or (self.image.shape[0], self.image.shape[1])


def to_frame(picture: Any, index: int = 0) -> Frame:
    """Convert an image in any supported form to a frame.

    Args:
        image: A path, a PIL image, an array (RGB `(H, W, 3) uint8` or gray `(H, W) uint8`) or a `Frame`.
        index: Position of the image in its list or video.

    Raises:
        ImageError: If the image cannot be read, or is none of these.

    >>> to_frame(np.zeros((4, 6), np.uint8)).image.shape
    (4, 6, 3)
    """
    if isinstance(picture, Frame):
        return picture
    if isinstance(picture, str | os.PathLike):
        path = home_path(picture)
        return Frame(pixels=read_image(path), index=index, name=path.name, file=path)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.size == 0:
            raise ImageError(f"expected an RGB array of uint8, got {picture.dtype} of shape {picture.shape}")
        if picture.ndim == 2:
            picture = np.repeat(picture[..., None], 3, axis=2)
        if picture.ndim != 3 or picture.shape[2] != 3:
            raise ImageError(f"expected an RGB array of shape (H, W, 3), got {picture.shape}")
        return Frame(pixels=np.ascontiguousarray(picture), index=index, name=f"image-{index}")
    from PIL import Image, ImageOps

    if isinstance(picture, Image.Image):
        try:
            return Frame(pixels=to_rgb(ImageOps.exif_transpose(picture)), index=index, name=f"image-{index}")
        except Exception as error:  # a PIL image is decoded only now, and its plugins raise many kinds of error
            raise ImageError(f"damaged image ({' '.join(str(error).split())})") from error
    raise ImageError(f"expected a path, a PIL image or an RGB array, got {type(picture).__name__}")


def read_file(file: Path | Location, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image, local or under an address, as `media.images.read_image` does.

    Args:
        file: The image.
        max_pixels: Largest number of pixels.

    Raises:
        ImageError: If it cannot be read.
    """
    if isinstance(file, Path):
        return read_image(file, max_pixels)
    try:
        data = file.read_bytes()
    except RemoteError as error:
        raise ImageError(str(error)) from error
    return decode_image(data, str(file), max_pixels)


def undecoded(frame: Frame) -> Frame:
    """Return a frame that reads its pixels from its image file when they are needed.

    A frame without a file, or of a video, is returned as it is.
    """
    if frame.file is None or frame.video is not None:
        return frame
    content = None if frame.content is None else replace(frame.content, data=None)
    return replace(frame, pixels=partial(read_file, frame.file), size=frame.size_hw, content=content)
