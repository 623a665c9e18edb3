"""Write annotated videos as H.264 in MP4, with the audio of the video that they were made from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.files import PendingFile
from grounded_sam.media.video import open_video_file

#: Ticks per second, MPEG's 90 kHz clock: fine enough for constant and variable frame rates.
TICKS = 90_000


class Mp4Writer:
    """Write a video frame by frame; `close` renames the finished file into place.

    Frames keep their timestamps, so that the speed is right for variable frame rates too. Odd sizes are padded by a row
    or column, since `yuv420p` needs even ones.

    Args:
        path: File to write. Its folder is created.
        sound_from: Video file whose first audio track is copied without re-encoding, from the time of the first frame
            to that of the last; None for no audio.
        crf: Constant rate factor of x264, 0 (lossless) to 51.
    """

    def __init__(self, path: Path, sound_from: str | None = None, crf: int = 20) -> None:
        import av

        self.crf = crf
        self._file = PendingFile(path)
        self._container: Any = av.open(f"file:{self._file.part}", "w", format="mp4")
        self._video_stream: Any = None
        self._last_frame: tuple[NDArray[np.uint8], int] | None = None  # its duration is known with the next frame
        self._last_duration = TICKS // 24
        self._start_s: float | None = None
        self._durations: dict[int, int] = {}  # by time in ticks, of frames inside the encoder
        self._audio_source: Any = None
        self._audio_packets: Iterator[Any] = iter(())
        self._next_audio_packet: Any = None
        if sound_from is not None and os.path.isfile(sound_from):
            self._open_audio(sound_from)

    def _open_audio(self, path: str) -> None:
        """Open the first audio track of a video, if MP4 supports its codec."""
        source = open_video_file(Path(path))
        if not source.streams.audio:
            source.close()
            return
        stream = source.streams.audio[0]
        try:
            self._audio_stream = self._container.add_stream_from_template(stream)
        except (OSError, ValueError):  # MP4 does not support the codec
            source.close()
            return
        self._audio_source = source
        video = next((s for s in source.streams.video), None)
        self._source_start_s = float((video.start_time or 0) * video.time_base) if video is not None else 0.0
        self._audio_packets = (packet for packet in source.demux(stream) if packet.pts is not None)
        self._next_audio_packet = next(self._audio_packets, None)

    def write(self, image: NDArray[np.uint8], time_s: float) -> None:
        """Append a frame.

        Args:
            image: RGB, `(H, W, 3) uint8`, of the size of the first frame.
            time_s: Its time in seconds; the first frame is shown at 0.
        """
        if self._start_s is None:
            self._start_s = time_s
        ticks = round((time_s - self._start_s) * TICKS)
        if self._last_frame is not None:
            last_ticks = self._last_frame[1]
            ticks = max(ticks, last_ticks + 1)
            self._last_duration = ticks - last_ticks
            self._encode(*self._last_frame, self._last_duration)
        self._last_frame = (image, ticks)

    def _encode(self, image: NDArray[np.uint8], ticks: int, duration: int) -> None:
        """Encode a frame, and copy the audio up to its end."""
        import av

        height, width = image.shape[:2]
        image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._video_stream is None:
            options = {"crf": str(self.crf), "preset": "veryfast"}
            self._video_stream = self._container.add_stream("libx264", rate=24, options=options)
            self._video_stream.height, self._video_stream.width = image.shape[:2]
            self._video_stream.pix_fmt = "yuv420p"
            self._video_stream.codec_context.time_base = Fraction(1, TICKS)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = ticks, Fraction(1, TICKS)
        self._durations[ticks] = duration
        self._mux(frame)
        self._copy_audio((ticks + duration) / TICKS)

    def _mux(self, frame: Any) -> None:
        """Encode a frame and write the packets that are ready; None flushes the encoder."""
        for packet in self._video_stream.encode(frame):
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self._container.mux(packet)

    def _copy_audio(self, until_s: float) -> None:
        """Copy audio packets up to a time of the new video, in seconds."""
        while self._next_audio_packet is not None:
            packet = self._next_audio_packet
            offset_s = self._source_start_s + (self._start_s or 0.0)
            time_s = float(packet.pts * packet.time_base) - offset_s
            if time_s >= until_s:
                return
            if time_s >= 0:
                packet.pts -= round(offset_s / packet.time_base)
                packet.dts = packet.pts
                packet.stream = self._audio_stream
                self._container.mux(packet)
            self._next_audio_packet = next(self._audio_packets, None)

    def close(self) -> None:
        """Write the last frames and rename the file into place; without any frame there is no file."""
        if self._last_frame is not None:
            self._encode(*self._last_frame, self._last_duration)
            self._last_frame = None
        if self._video_stream is not None:
            self._mux(None)
        self._container.close()
        if self._audio_source is not None:
            self._audio_source.close()
        if self._video_stream is not None:
            self._file.commit()
        self._file.discard()
