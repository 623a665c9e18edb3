"""Videos: files, folders of frames, globs, cameras and streams, decoded ahead on a thread."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: What a URL may begin with; ffmpeg knows more protocols, some of which read local files.
SCHEMES = {"http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp"}


def is_stream(input: Any) -> bool:
    """Whether an input is a camera's number or a URL."""
    return str(input).isdecimal() or "://" in str(input)


def rotate_upright(image: NDArray[np.uint8], degrees: int) -> NDArray[np.uint8]:
    """Turn a frame as its video's display matrix says; PyAV gives counter-clockwise degrees."""
    return np.ascontiguousarray(np.rot90(image, round(degrees / 90) % 4)) if degrees else image


def downscale(image: NDArray[np.uint8], size_wh: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture at a smaller size, by area."""
    import cv2

    if (image.shape[1], image.shape[0]) == size_wh:
        return image
    return np.asarray(cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA), np.uint8)


def _video_stream(container: Any) -> Any:
    """The first video stream that is no cover picture."""
    cover = 0x400  # AV_DISPOSITION_ATTACHED_PIC
    return next((s for s in container.streams.video if not int(s.disposition) & cover), None)


def _kinds(container: Any) -> str:
    return ", ".join(sorted({s.type for s in container.streams})) or "nothing"


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).split("; ")[0].split(": ")[0].strip() or type(error).__name__
