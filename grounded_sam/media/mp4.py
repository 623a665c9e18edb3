"""Write annotated videos as H.264 in MP4, with the audio of the video that they were made from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.files import PendingFile
from grounded_sam.media.containers import open_video_file
from grounded_sam.media.video_pixels import UNSPECIFIED, VideoLook

#: Codecs of sound that players of MP4 know.
COPIED_CODECS = {"aac", "ac3", "alac", "eac3", "flac", "mp2", "mp3", "mp3float", "opus"}
#: Sample rates of AAC, in Hz.
AAC_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000}
#: Ticks per second, MPEG's 90 kHz clock: fine enough for constant and variable frame rates.
TICKS = 90_000


class Mp4Writer:
    """Write a video frame by frame; `close` renames the finished file into place.

    Frames keep their timestamps, so that the speed is right for variable frame rates too. Odd sizes are padded by a row
    or column, since `yuv420p` needs even ones.

    Args:
        path: File to write. Its folder is created.
        sound_from: Video file whose first audio track is copied, from the time of the first frame to that of the last;
            None for no audio. It is re-encoded as AAC in mono or stereo
            if MP4 does not support its codec.
        crf: Constant rate factor of x264, 0 (lossless) to 51.
        look: Shape of the pixels and color that players are told.
        report: Called with the reason if the sound cannot be copied, or not to its end.
    """

    def __init__(
        self,
        path: Path,
        sound_from: str | None = None,
        crf: int = 20,
        look: VideoLook | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        import av

        self.crf, self.look = crf, look or VideoLook()
        self._report = report or (lambda reason: None)
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
        """Open the first audio track of a video."""
        import av

        try:
            source = open_video_file(Path(path))
        except (av.FFmpegError, OSError, ValueError) as error:
            self._report(_sound_problem(path, error))
            return
        if not source.streams.audio:
            source.close()
            return
        self._audio_source, stream = source, source.streams.audio[0]
        video = next((s for s in source.streams.video), None)
        self._source_start_s = float((video.start_time or 0) * video.time_base) if video is not None else 0.0
        try:
            packets = self._add_audio_stream(source, stream)
            self._audio_packets = (packet for packet in packets if packet.pts is not None)
            self._next_audio_packet = next(self._audio_packets, None)
        except (av.FFmpegError, ValueError, AttributeError) as error:  # no decoder, or a damaged track
            self._report(_sound_problem(path, error))

    def _add_audio_stream(self, source: Any, stream: Any) -> Iterator[Any]:
        """Add an audio stream to the output, and return its packets: those of the source, or re-encoded ones."""
        import av

        if stream.codec_context.name in COPIED_CODECS:
            self._audio_stream = self._container.add_stream_from_template(stream)
            return iter(source.demux(stream))
        rate = stream.rate if stream.rate in AAC_RATES else 48_000
        encoder = self._container.add_stream("aac", rate=rate)
        encoder.layout = layout = "mono" if stream.layout.nb_channels == 1 else "stereo"
        self._audio_stream = encoder
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate, frame_size=1024)
        frames = (part for frame in source.decode(stream) for part in resampler.resample(frame))
        return (packet for frame in chain(frames, (None,)) for packet in encoder.encode(frame))

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
            self._tell_look()
        matrix = {} if self.look.matrix == UNSPECIFIED else {"dst_colorspace": self.look.matrix}
        color_range = 2 if self.look.is_full_range else 1
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
            format="yuv420p", dst_color_range=color_range, **matrix
        )
        frame.pts, frame.time_base = ticks, Fraction(1, TICKS)
        self._durations[ticks] = duration
        self._mux(frame)
        self._copy_audio((ticks + duration) / TICKS)

    def _tell_look(self) -> None:
        """Write the look into the header of the video."""
        codec, look = self._video_stream.codec_context, self.look
        codec.color_range = 2 if look.is_full_range else 1
        codec.colorspace, codec.color_primaries, codec.color_trc = look.matrix, look.primaries, look.transfer
        if look.pixel_aspect is not None:
            self._video_stream.sample_aspect_ratio = look.pixel_aspect

    def _mux(self, frame: Any) -> None:
        """Encode a frame and write the packets that are ready; None flushes the encoder."""
        for packet in self._video_stream.encode(frame):
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self._container.mux(packet)

    def _copy_audio(self, until_s: float) -> None:
        """Copy audio packets up to a time of the new video, in seconds; stop at damaged ones."""
        import av

        try:
            while self._next_audio_packet is not None:
                if not self._copy_packet(self._next_audio_packet, until_s):
                    return
                self._next_audio_packet = next(self._audio_packets, None)
        except (av.FFmpegError, ValueError) as error:
            self._next_audio_packet = None
            self._report(_sound_problem(self._audio_source.name.removeprefix("file:"), error))

    def _copy_packet(self, packet: Any, until_s: float) -> bool:
        """Copy an audio packet; return False if it comes later."""
        offset_s = self._source_start_s + (self._start_s or 0.0)
        time_s = float(packet.pts * packet.time_base) - offset_s
        if time_s >= until_s:
            return False
        if time_s >= 0:
            packet.pts -= round(offset_s / packet.time_base)
            packet.dts = packet.pts
            packet.stream = self._audio_stream
            self._container.mux(packet)
        return True

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


def _sound_problem(path: str, error: BaseException) -> str:
    """Return the message that sound is missing."""
    reason = " ".join(str(error).split()) or type(error).__name__
    failed = f"the sound of {os.path.basename(path)} cannot be copied, or not to its end ({reason})"
    return f"{failed}; sink.overlay.sound_from=FILE takes that of another file"
