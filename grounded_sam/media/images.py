"""Pictures in: one way to read a file, an array or a PIL image into upright 8-bit RGB."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image


#: Pixels of the largest picture that is decoded unless a source says otherwise (450 MB as RGB).
MAX_PIXELS = 150_000_000


def safe_formats() -> list[str]:
    """Pillow's formats, without those that run another program or hold no pixels of their own."""
    from PIL import Image

    Image.init()
    return sorted(set(Image.OPEN) - {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"})


@contextmanager
def no_pillow_limit() -> Iterator[None]:
    """Lift Pillow's limit on pixels, and its warning; who lifts it judges the size before decoding."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read a picture file as upright RGB, `(H, W, 3) uint8`.

    EXIF orientation is applied. Transparency is laid over white. Of animations and multi-picture
    files the first picture is taken. Gray of more than 8 bits is scaled by the smallest of 10, 12,
    14 or 16 bits that holds its brightest pixel.

    Raises:
        ImageError: if the file is missing, empty, truncated, no picture, or would decode to more than
            `max_pixels`; the size is judged by the header, before anything is decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"{path}: the file is empty")
        with warnings.catch_warnings(), no_pillow_limit():
            warnings.simplefilter("ignore")  # of odd metadata; what matters raises
            with Image.open(path, formats=safe_formats()) as picture:
                width, height = picture.size
                if width < 1 or height < 1:
                    raise ImageError(f"{path}: the picture is {width}x{height} px")
                if width * height > max_pixels:
                    raise ImageError(
                        f"{path}: {width}x{height} px is more than the {max_pixels:,} pixels allowed "
                        "(source.max_pixels)"
                    )
                return to_rgb(ImageOps.exif_transpose(picture))
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture that Pillow can read") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    except Exception as error:  # Pillow's plugins raise all sorts on damaged files, and none may end a run
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: damaged picture ({reason})") from error


def to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """A PIL image of any mode as RGB, `(H, W, 3) uint8`; see `read_image` for the rules."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture).astype(np.float64)
        if picture.mode != "F" and values.max(initial=0) > 255:
            bits = next((b for b in (10, 12, 14, 16) if values.max() < 2**b), 32)
            values *= 255 / (2**bits - 1)
        gray = np.clip(np.round(values), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(gray[..., None], 3, axis=2))
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, rgba)
    return np.array(picture.convert("RGB"))
