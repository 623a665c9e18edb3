"""Read images: every file becomes upright 8-bit RGB in the same way."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ImageError
from grounded_sam.files import home_path, require_regular

if TYPE_CHECKING:
    from PIL import Image

#: Pixels of the largest image that is decoded by default (450 MB as RGB).
MAX_PIXELS = 150_000_000
#: EXIF tag of the orientation, and its values that swap width and height.
_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)


def safe_formats() -> list[str]:
    """Return Pillow's formats, except those that run other programs or contain no pixels."""
    from PIL import Image

    Image.init()
    return sorted(set(Image.OPEN) - {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"})


class _NoPillowLimit(AbstractContextManager[None]):
    """Disables Pillow's limit on pixels and its warning while any thread is inside, for code that checks the size."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        from PIL import Image

        with self._lock:
            if not self._inside:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        from PIL import Image

        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS = self._limit


_no_pillow_limit = _NoPillowLimit()


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image file as upright RGB, `(H, W, 3) uint8`.

    EXIF orientation is applied. Transparent images are composited over white. Of animations and multi-image files the
    first image is read. Grayscale of more than 8 bits is taken to have the smallest bit depth of 10, 12, 14 and 16 that
    holds its brightest pixel.

    Args:
        path: The file.
        max_pixels: Largest number of pixels; checked in the header, before anything is decoded.

    Raises:
        ImageError: If the file is missing, empty, truncated, not a file, not an image, or larger than `max_pixels`.
    """
    from PIL import ImageOps

    with open_image(path, max_pixels) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def read_label_map(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[Any]:
    """Read the values of an image whose pixels are numbers of objects, `(H, W)`: palette indices or gray levels.

    Args:
        path: The file.
        max_pixels: Largest number of pixels.

    Raises:
        ImageError: As `read_image`, or if it has more than one channel.
    """
    with open_image(path, max_pixels) as image:
        values = np.array(image)
        if values.ndim != 2:
            raise ImageError(
                f"{path}: a map of objects must have one channel or a palette, got mode {image.mode}; save it as a "
                "gray or palette PNG whose pixels are the numbers of the objects"
            )
        return values


def displayed_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return height and width of an image as it is displayed, from its header.

    Args:
        path: The file.
        max_pixels: Largest number of pixels.

    Raises:
        ImageError: As `read_image`; damage after the header is not found.
    """
    with open_image(path, max_pixels) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(_ORIENTATION, 1) in _TRANSPOSED else (height, width)


@contextmanager
def open_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file whose format and size are safe to decode; whatever its decoder raises is an `ImageError`.

    Args:
        path: The file.
        max_pixels: Largest number of pixels.

    Raises:
        ImageError: See `read_image`.
    """
    from PIL import Image, UnidentifiedImageError

    path = home_path(path)
    try:
        if require_regular(path).st_size == 0:
            raise ImageError(f"{path}: the file is empty")
        with warnings.catch_warnings(), _no_pillow_limit:
            warnings.simplefilter("ignore")  # warnings concern unusual metadata; real problems raise
            with Image.open(path, formats=safe_formats()) as image:
                width, height = image.size
                if width < 1 or height < 1:
                    raise ImageError(f"{path}: the image is {width}x{height} px")
                if width * height > max_pixels:
                    raise ImageError(
                        f"{path}: {width}x{height} px is more than the {max_pixels:,} pixels allowed "
                        "(source.max_pixels)"
                    )
                yield image
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image that Pillow can read") from error
    except Exception as error:  # Pillow's plugins raise many kinds of error on damaged files; none may end a run
        if isinstance(error, OSError) and error.errno is not None:  # of the file, not of its content
            raise ImageError(f"{path}: {error.strerror}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: damaged image ({reason})") from error


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a PIL image of any mode to RGB, `(H, W, 3) uint8`; see `read_image` for the rules.

    >>> from PIL import Image
    >>> to_rgb(Image.new("L", (2, 1), 7)).tolist()
    [[[7, 7, 7], [7, 7, 7]]]
    """
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if image.mode != "F" and values.max(initial=0) > 255:
            bits = next((b for b in (10, 12, 14, 16) if values.max() < 2**b), 32)
            values *= 255 / (2**bits - 1)
        gray = np.clip(np.round(values), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(gray[..., None], 3, axis=2))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return np.array(image.convert("RGB"))
