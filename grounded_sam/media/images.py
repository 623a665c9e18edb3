"""Read images: every file becomes upright 8-bit RGB in the same way."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ImageError
from grounded_sam.files import home_path, require_regular
from grounded_sam.media.deep import TiffLayout, black_and_white, read_deep, read_tiff_layout, strips, to_8_bits
from grounded_sam.media.unread import unread_reason

if TYPE_CHECKING:
    from PIL import Image

#: Pixels of the largest image that is decoded by default (450 MB as RGB).
MAX_PIXELS = 150_000_000
#: EXIF tag of the orientation, and its values that swap width and height.
_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)
#: Bytes that a pixel may take when it is decoded, as many as RGBA; of images that take more, fewer pixels are allowed.
BYTES_PER_PIXEL = 4
#: Formats whose further images are not pages: previews and depth maps, sizes of an icon, layers.
_ONE_PICTURE = {"MPO", "ICO", "ICNS", "CUR", "PSD"}
#: Pages of a TIFF that are looked at to find one that is not a smaller copy of the first.
_MAX_PAGES = 32


@cache
def _register_plugins() -> None:
    """Add HEIC and JPEG XL to the formats of Pillow, where the extra `formats` is installed."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401 - registers itself


def safe_formats() -> list[str]:
    """Return Pillow's formats, except those that run other programs or contain no pixels."""
    from PIL import Image

    Image.init()
    _register_plugins()
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


def read_image(
    path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, report: Callable[[str], None] | None = None
) -> NDArray[np.uint8]:
    """Read an image file as upright RGB, `(H, W, 3) uint8`.

    EXIF orientation is applied. Transparent images are composited over white. Of animations and files of several pages
    the first image is read.

    Values of more than 8 bits are scaled to 8 by one rule: black is 0, and white the largest value of the smallest bit
    depth (8, 10, 11, 12, 14, 16, 18 and so on) that holds the brightest value. For floating-point values white is 1 if
    none is above 1.5, else depths begin at 2, 4, 6. In images with negative values black is the smallest value, and
    white the largest. NaN is black.

    Args:
        path: The file.
        max_pixels: Largest number of pixels; checked in the header, before anything is decoded. A pixel that takes more
            than four bytes when it is decoded, as in 16-bit RGB, counts in proportion.
        report: Called with a sentence about what the file holds and is not read, such as further pages.

    Raises:
        ImageError: If the file is missing, empty, truncated, not a file, not an image, larger than `max_pixels`, or
            holds no finite value.
    """
    with guarded(path) as file:
        return _read(file, max_pixels, report, f"; source=video input='{file}' reads all, as frames")


def decode_image(
    data: bytes, path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, report: Callable[[str], None] | None = None
) -> NDArray[np.uint8]:
    """Decode the content of an image file as `read_image` does.

    Args:
        data: The content.
        path: Name of the file for messages, whose suffix also says which formats are not read; a `Path` is a file of
            this machine.
        max_pixels: Largest number of pixels.
        report: Called with a sentence about what the file holds and is not read.

    Raises:
        ImageError: As for `read_image`.
    """
    with _guards(path):
        if not data:
            raise ImageError("the file is empty")
        if (reason := unread_reason(Path(str(path)), safe_formats())) is not None:
            raise ImageError(reason)
        hint = f"; source=video input='{path}' reads all, as frames" if isinstance(path, os.PathLike) else ""
        return _read(data, max_pixels, report, hint)


def _read(file: Path | bytes, max_pixels: int, report: Callable[[str], None] | None, hint: str) -> NDArray[np.uint8]:
    """Decode a file or its content; `hint` says how to read its further images."""
    from PIL import ImageOps, UnidentifiedImageError

    try:
        image = _open(file, max_pixels)
    except UnidentifiedImageError as error:
        layout = _deep_tiff(file, max_pixels, error)
        return _read_deep(file, layout.is_planar, layout.orientation)
    with image:
        deep, tags = is_deep(image), getattr(image, "tag_v2", {})
        if report is not None and (rest := _further_images(image, file)) is not None:
            report(rest + hint)
        if not deep:
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
        is_planar, orientation = tags.get(284, 1) == 2, tags.get(_ORIENTATION)  # which loading removes
        image.load()  # raises if the file is truncated, which OpenCV does not
        orientation = orientation or image.getexif().get(_ORIENTATION, 1)
    return _read_deep(file, is_planar, orientation)


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
                f"a map of objects must have one channel or a palette, got mode {image.mode}; save it as a "
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
    from PIL import UnidentifiedImageError

    with guarded(path) as file:
        try:
            with _open(file, max_pixels) as image:
                tags = getattr(image, "tag_v2", {})  # of a TIFF, whose `size` Pillow may have turned already
                width, height = tags.get(256, image.width), tags.get(257, image.height)
                orientation = image.getexif().get(_ORIENTATION, 1)
        except UnidentifiedImageError as error:
            layout = _deep_tiff(file, max_pixels, error)
            (width, height), orientation = layout.size_wh, layout.orientation
        return (width, height) if orientation in _TRANSPOSED else (height, width)


@contextmanager
def open_image(path: str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file whose format and size are safe to decode, inside the guards of `guarded`.

    Args:
        path: The file, or its content.
        max_pixels: Largest number of pixels; see `read_image`.

    Raises:
        ImageError: See `read_image`.
    """
    if isinstance(path, bytes):
        with _guards("image"), _open(path, max_pixels) as image:
            yield image
        return
    with guarded(path) as file, _open(file, max_pixels) as image:
        yield image


@contextmanager
def guarded(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Check that an image file may be opened; whatever a decoder raises inside is an `ImageError` with the path.

    Args:
        path: The file, with `~` for the home folder.

    Yields:
        Its path. Sizes are not limited inside: check them.

    Raises:
        ImageError: If it is missing, empty, not a file, of a format that is not read, or damaged.
    """
    path = home_path(path)
    with _guards(path):
        if require_regular(path).st_size == 0:
            raise ImageError("the file is empty")
        if (reason := unread_reason(path, safe_formats())) is not None:
            raise ImageError(reason)
        yield path


@contextmanager
def _guards(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lift Pillow's limits, and convert errors to `ImageError`s that name the path."""
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings(), _no_pillow_limit:
            warnings.simplefilter("ignore")  # warnings concern unusual metadata; real problems raise
            yield
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error.__cause__
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image that Pillow can read") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: is a directory; name the files in it") from error
    except Exception as error:  # Pillow's plugins raise many kinds of error on damaged files; none may end a run
        if isinstance(error, OSError) and error.errno is not None:  # of the file, not of its content
            raise ImageError(f"{path}: {error.strerror}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: damaged image ({reason})") from error


def _handle(file: Path | bytes) -> Path | BytesIO:
    """Return what Pillow opens; it seeks in it, so that each image needs its own."""
    return BytesIO(file) if isinstance(file, bytes) else file


def _open(file: Path | bytes, max_pixels: int) -> Image.Image:
    """Open an image and check its size, in pixels and in bytes; nothing is decoded."""
    from PIL import Image

    image = Image.open(_handle(file), formats=safe_formats())
    try:
        _check_size(*image.size, _bytes_per_pixel(image), max_pixels)
    except Exception:
        image.close()
        raise
    return image


def _deep_tiff(file: Path | bytes, max_pixels: int, error: Exception) -> TiffLayout:
    """Return the layout of a TIFF of more than 8 bits that Pillow does not know; raise `error` for any other file."""
    layout = read_tiff_layout(file)
    if layout is None or layout.channels not in (1, 3, 4) or layout.bits <= 8:
        raise error
    _check_size(*layout.size_wh, layout.channels * layout.bits // 8, max_pixels)
    return layout


def _read_deep(file: Path | bytes, is_planar: bool, orientation: int) -> NDArray[np.uint8]:
    """Read an image of more than 8 bits per color, and rotate it upright."""
    from PIL import Image, ImageOps

    if is_planar:  # Pillow and OpenCV return garbage
        raise ImageError("more than 8 bits, with a plane per color, which is not read; save it as PNG")
    rgb = read_deep(file)
    if orientation == 1:
        return rgb
    image = Image.fromarray(rgb)
    image.getexif()[_ORIENTATION] = orientation
    ImageOps.exif_transpose(image, in_place=True)
    return np.array(image)


def _check_size(width: int, height: int, num_bytes: int, max_pixels: int) -> None:
    """Refuse an image that has no pixels, or takes too much memory.

    Args:
        width: Width in pixels.
        height: Height in pixels.
        num_bytes: Bytes per pixel, as it is decoded.
        max_pixels: Largest number of pixels of up to `BYTES_PER_PIXEL` bytes.
    """
    if width < 1 or height < 1:
        raise ImageError(f"the image is {width}x{height} px")
    if width * height > max_pixels:
        raise ImageError(f"{width}x{height} px is more than the {max_pixels:,} pixels allowed (source.max_pixels)")
    counted = math.ceil(width * height * num_bytes / BYTES_PER_PIXEL)
    if counted > max_pixels:
        raise ImageError(
            f"{width}x{height} px of {num_bytes} bytes count as {counted:,}, "
            f"which is more than the {max_pixels:,} pixels allowed (source.max_pixels)"
        )


def is_deep(image: Image.Image) -> bool:
    """Return whether a file has color of more than 8 bits that Pillow would cut to 8."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    if image.format == "PNG":
        return any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    tags = getattr(image, "tag_v2", {})
    bits, is_plain = tags.get(258, (8,)), tags.get(338, (2,)) == (2,)  # alpha that is not multiplied into the color
    return max(bits) > 8 and len(bits) == len(image.mode) and is_plain


def _bytes_per_pixel(image: Image.Image) -> int:
    """Return how many bytes a pixel takes when it is decoded."""
    if is_deep(image):
        return 2 * len(image.getbands())
    if image.mode.startswith("I;16"):
        return 2
    return 1 if image.mode in ("1", "L", "P") else 4


def _further_images(image: Image.Image, file: Path | bytes) -> str | None:
    """Return a sentence about the images of a file after the first one; None if there are none."""
    if not getattr(image, "is_animated", False) or image.format in _ONE_PICTURE:
        return None
    if image.format == "TIFF" and not _has_pages(file):
        return None
    return "only the first of several images in the file is read"


def _has_pages(file: Path | bytes) -> bool:
    """Return whether a TIFF has a page that is neither a smaller copy of another page nor a mask."""
    from PIL import Image

    with Image.open(_handle(file), formats=["TIFF"]) as image:
        for page in range(1, _MAX_PAGES):
            try:
                image.seek(page)
            except EOFError:
                return False
            except Exception:  # a page of a kind that Pillow does not read
                return True
            if not getattr(image, "tag_v2", {}).get(254, 0) & 5:
                return True
    return False


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a PIL image of any mode to RGB, `(H, W, 3) uint8`; see `read_image` for the rules.

    The image is converted in strips, which keeps the memory for intermediate results small.

    Raises:
        ImageError: If it holds no finite value.

    >>> from PIL import Image
    >>> to_rgb(Image.new("L", (2, 1), 7)).tolist()
    [[[7, 7, 7], [7, 7, 7]]]
    """
    width, height = image.size
    parts = list(strips(width, height))
    image.load()
    convert: Callable[[Image.Image], NDArray[Any]] = _convert_strip
    if image.mode.startswith(("I", "F")):
        is_unsigned = _is_uint32(image)

        def values(strip: Image.Image) -> NDArray[Any]:
            array = np.asarray(strip)
            return array.view(np.uint32) if is_unsigned else array

        black, white = black_and_white(values(_crop(image, part)) for part in parts)

        def convert(strip: Image.Image) -> NDArray[Any]:
            return to_8_bits(values(strip), black, white)[..., None]

    rgb = np.empty((height, width, 3), np.uint8)
    for part in parts:
        rgb[part] = convert(_crop(image, part))
    return rgb


def _crop(image: Image.Image, rows: slice) -> Image.Image:
    """Return some rows of an image; all of them without a copy."""
    width, height = image.size
    return image if rows == slice(0, height) else image.crop((0, rows.start, width, rows.stop))


def _convert_strip(image: Image.Image) -> NDArray[Any]:
    """Convert an image of up to 8 bits to RGB, over white."""
    from PIL import Image

    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _is_uint32(image: Image.Image) -> bool:
    """Return whether the 32-bit integers of a TIFF are unsigned; Pillow takes them to be signed."""
    tags = getattr(image, "tag_v2", {})
    return image.mode == "I" and tags.get(258, (0,))[0] == 32 and tags.get(339, (1,))[0] == 1
