"""An annotated video, H.264 in MP4, frame by frame, with the sound of the video it was made from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Ticks per second, as MPEG has them: fine enough for any frame rate, constant or not.
TICKS = 90_000


class Mp4Writer:
    """Writes one video beside its place and renames it into place when it is closed.

    Frames keep their times, so that the speed is right also where the frame rate varies. Odd sizes are
    padded by a row or column, since H.264's usual colour format has even ones.

    Args:
        path: of the video.
        sound_from: a video file whose first sound track is copied as it is, from the time of the first
            frame to that of the last; None for silence.
        crf: quality of x264, 0 (lossless) to 51.
    """

    def __init__(self, path: Path, sound_from: str | None = None, crf: int = 20) -> None:
        import av

        self.path, self.crf = path, crf
        path.parent.mkdir(parents=True, exist_ok=True)
        self._part = path.with_name(f".{path.name}.part")
        self._out: Any = av.open(str(self._part), "w", format="mp4")
        self._video: Any = None
        self._waiting: tuple[NDArray[np.uint8], int] | None = None  # its duration is known with the next
        self._begin: float | None = None
        self._step = TICKS // 24
        self._durations: dict[int, int] = {}  # by time, of frames that are in the encoder
        self._sound: Any = None
        self._packets: Iterator[Any] = iter(())
        self._next: Any = None
        if sound_from is not None and os.path.isfile(sound_from):
            self._open_sound(sound_from)

    def _open_sound(self, path: str) -> None:
        import av

        source: Any = av.open(path)
        if not source.streams.audio:
            source.close()
            return
        stream = source.streams.audio[0]
        try:
            self._track = self._out.add_stream_from_template(stream)
        except (OSError, ValueError):  # a codec that MP4 does not hold
            source.close()
            return
        self._sound = source
        picture = next((s for s in source.streams.video), None)
        self._zero = float((picture.start_time or 0) * picture.time_base) if picture is not None else 0.0
        self._packets = (p for p in source.demux(stream) if p.pts is not None)
        self._next = next(self._packets, None)

    def write(self, image: NDArray[np.uint8], time_s: float) -> None:
        """The next frame, RGB `(H, W, 3) uint8`, at its time in seconds."""
        if self._begin is None:
            self._begin = time_s
        ticks = round((time_s - self._begin) * TICKS)
        if self._waiting is not None:
            before = self._waiting[1]
            ticks = max(ticks, before + 1)
            self._step = ticks - before
            self._encode(*self._waiting, self._step)
        self._waiting = (image, ticks)

    def _encode(self, image: NDArray[np.uint8], ticks: int, duration: int) -> None:
        import av

        height, width = image.shape[:2]
        image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._video is None:
            self._video = self._out.add_stream("libx264", rate=24, options={"crf": str(self.crf), "preset": "veryfast"})
            self._video.height, self._video.width = image.shape[:2]
            self._video.pix_fmt = "yuv420p"
            self._video.codec_context.time_base = Fraction(1, TICKS)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = ticks, Fraction(1, TICKS)
        self._durations[ticks] = duration
        self._mux(frame)
        self._copy_sound((ticks + duration) / TICKS)

    def _mux(self, frame: Any) -> None:
        """Encode a frame, or with None what the encoder still holds."""
        for packet in self._video.encode(frame):
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self._out.mux(packet)

    def _copy_sound(self, until: float) -> None:
        """Sound up to a time of the new video."""
        while self._next is not None:
            packet = self._next
            shift = self._zero + (self._begin or 0.0)
            time_s = float(packet.pts * packet.time_base) - shift
            if time_s >= until:
                return
            if time_s >= 0:
                moved = round(shift / packet.time_base)
                packet.pts -= moved
                packet.dts = packet.pts
                packet.stream = self._track
                self._out.mux(packet)
            self._next = next(self._packets, None)

    def close(self) -> None:
        """Write what is left and put the video into its place."""
        if self._waiting is not None:
            self._encode(*self._waiting, self._step)
            self._waiting = None
        if self._video is not None:
            self._mux(None)
        self._out.close()
        if self._sound is not None:
            self._sound.close()
        if self._video is not None:
            os.replace(self._part, self.path)
        self._part.unlink(missing_ok=True)
