"""Single frames of videos, decoded forward from one to the next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator
from contextlib import suppress

from grounded_sam.errors import ImageError
from grounded_sam.media.video import VideoDecoder, VideoFrame
from grounded_sam.serve.memory import ByteLimited
from grounded_sam.serve.objects import jpeg
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.uploads import Upload, Uploads

#: Number of videos that are kept open, and memory of the frames that were asked for last, in bytes.
MAX_OPEN, FRAME_BYTES = 4, 64 << 20


def check_video(upload: Upload, max_pixels: int) -> None:
    """Fill in the size of a video from its first frame.

    Args:
        upload: The video.
        max_pixels: Largest frame.

    Raises:
        ImageError: If it cannot be opened, or has no frame.
    """
    decoder = VideoDecoder(upload.path.absolute(), max_pixels=max_pixels)
    frames = iter(decoder)
    try:
        first = next(frames, None)
    finally:
        frames.close()
    if first is None:
        reasons = [problem.reason for problem in decoder.problems]
        raise ImageError(f"{upload.path}: {reasons[0] if reasons else 'no frame can be read'}")
    upload.height, upload.width = first.image.shape[:2]
    with suppress(TypeError):
        upload.num_frames = len(decoder)


class _OpenVideo:
    """A video that is being decoded.

    Args:
        upload: The video.
        max_pixels: Largest frame.
    """

    def __init__(self, upload: Upload, max_pixels: int) -> None:
        self.upload, self.max_pixels = upload, max_pixels
        self.lock = threading.Lock()
        self._frames: Generator[VideoFrame] | None = None
        self._next = 0

    def read(self, number: int) -> VideoFrame:
        """Decode a frame; decoding starts anew if it comes before the last one."""
        if self._frames is None or number < self._next:
            self.close()
            self._frames = iter(VideoDecoder(self.upload.path.absolute(), start=number, max_pixels=self.max_pixels))
        for frame in self._frames:
            self._next = frame.index + 1
            if frame.index == number:
                return frame
        self.close()
        raise RequestError(404, f"{self.upload.name} has no frame {number}")

    def close(self) -> None:
        """Close the file."""
        if self._frames is not None:
            self._frames.close()
        self._frames, self._next = None, 0


class FrameReader:
    """Read single frames of videos as JPEG.

    Args:
        uploads: The videos.
        max_pixels: Largest frame.
    """

    def __init__(self, uploads: Uploads, max_pixels: int) -> None:
        self._uploads, self.max_pixels = uploads, max_pixels
        self._open: OrderedDict[str, _OpenVideo] = OrderedDict()
        self._lock = threading.Lock()
        self._jpegs: ByteLimited[bytes] = ByteLimited(FRAME_BYTES, len)

    def read(self, video: str, number: int, max_side: int | None) -> bytes:
        """Return a frame as JPEG.

        Args:
            video: Id of the upload.
            number: Number of the frame, from 0.
            max_side: Longest side in pixels; None for that of the video.

        Raises:
            RequestError: If there is no such video or frame (404).
            ImageError: If the video cannot be decoded.
        """
        key = f"{video} {number} {max_side}"
        if (known := self._jpegs.get(key)) is not None:
            return known
        with self._uploads.use(video, "video") as upload:
            opened = self._opened(upload)
            with opened.lock:
                encoded = jpeg(opened.read(number).image, max_side)
        self._jpegs.put(key, encoded)
        return encoded

    def _opened(self, upload: Upload) -> _OpenVideo:
        """Return the open video of an upload; close the one used least recently if there are too many."""
        with self._lock:
            if upload.id not in self._open:
                self._open[upload.id] = _OpenVideo(upload, self.max_pixels)
            self._open.move_to_end(upload.id)
            old = self._open.popitem(last=False)[1] if len(self._open) > MAX_OPEN else None
            opened = self._open[upload.id]
        if old is not None:
            with old.lock:
                old.close()
        return opened

    def close(self) -> None:
        """Close all videos."""
        with self._lock:
            opened, self._open = list(self._open.values()), OrderedDict()
        for video in opened:
            with video.lock:
                video.close()
