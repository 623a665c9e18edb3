"""Pixels of decoded video frames: orientation, transparency, and what a player has to know to show them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.media.containers import open_video_file, video_stream

#: Unspecified color, as H.273 and FFmpeg number it.
UNSPECIFIED = 2
#: Matrices that FFmpeg's scaler knows: BT.709, FCC, BT.601 (two numbers), SMPTE 240M, BT.2020.
MATRICES = {1, 4, 5, 6, 7, 9}


@dataclass(frozen=True)
class VideoLook:
    """How a player shows the pixels of a video; numbers are those of ITU-T H.273.

    Attributes:
        pixel_aspect: Width of an upright pixel divided by its height; None for square.
        matrix: Matrix coefficients.
        primaries: Color primaries.
        transfer: Transfer characteristics.
        is_full_range: Whether luma goes from 0 to 255, not from 16 to 235.
    """

    pixel_aspect: Fraction | None = None
    matrix: int = 1
    primaries: int = 1
    transfer: int = 1
    is_full_range: bool = False


def read_look(path: Path) -> VideoLook:
    """Read the look of a video file from its first frame; that of RGB images (BT.709) for any other file."""
    try:
        with open_video_file(path) as container:
            stream = video_stream(container)
            if stream is None or stream.codec_context is None:
                return VideoLook()
            codec, frame = stream.codec_context, next(container.decode(stream))
            if frame.format.is_rgb or frame.format.has_palette:
                return VideoLook(_upright_aspect(stream.sample_aspect_ratio, frame))
            is_full_range = frame.format.name.startswith("yuvj") or int(codec.color_range) == 2
            matrix = int(codec.colorspace) if int(codec.colorspace) in MATRICES else UNSPECIFIED
            return VideoLook(
                pixel_aspect=_upright_aspect(stream.sample_aspect_ratio, frame),
                matrix=matrix,
                primaries=int(codec.color_primaries),
                transfer=int(codec.color_trc),
                is_full_range=is_full_range,
            )
    except Exception:  # whatever damaged data raises; decoding its frames reports it
        return VideoLook()


def _upright_aspect(aspect: Fraction | None, frame: Any) -> Fraction | None:
    """Return the shape of the pixels of a frame after it is rotated."""
    if not aspect or aspect == 1:
        return None
    return 1 / aspect if display_matrix(frame)[0, 0] == 0 else aspect


def display_matrix(frame: Any) -> NDArray[np.int64]:
    """Return how a frame is turned for display: a matrix `(2, 2)` of -1, 0 and 1, from x and y to x and y.

    Angles that are not multiples of 90 degrees are rounded.
    """
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return np.eye(2, dtype=np.int64)
    matrix = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2].T  # FFmpeg's has rows for x and y of the source
    is_turned = abs(int(matrix[0, 1])) > abs(int(matrix[0, 0]))
    return np.where(np.eye(2, dtype=bool) != is_turned, np.where(matrix < 0, -1, 1), 0)


def turn_upright(image: NDArray[np.uint8], matrix: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Rotate and mirror a frame.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        matrix: As `display_matrix` returns it.

    >>> turn_upright(np.zeros((2, 4, 3), np.uint8), np.array([[0, 1], [-1, 0]])).shape
    (4, 2, 3)
    """
    if matrix[0, 0] == 0:
        image = image.transpose(1, 0, 2)
    if matrix[0].sum() < 0:
        image = image[:, ::-1]
    if matrix[1].sum() < 0:
        image = image[::-1]
    return np.ascontiguousarray(image)


def frame_to_rgb(frame: Any, size_wh: tuple[int, int]) -> NDArray[np.uint8]:
    """Convert PyAV's frame to upright RGB, scaled to a width and height before it is turned.

    Transparent frames are composited over white, as images are.
    """
    from av.video.reformatter import Interpolation

    is_transparent = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    pixels = frame.reformat(
        *size_wh, format="rgba" if is_transparent else "rgb24", interpolation=Interpolation.AREA
    ).to_ndarray()
    if is_transparent:
        alpha = pixels[..., 3:].astype(np.uint16)
        pixels = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return turn_upright(pixels, display_matrix(frame))
