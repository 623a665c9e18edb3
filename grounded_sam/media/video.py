"""Decode videos: files, streams, cameras, and folders of frames."""

from __future__ import annotations

import errno
import glob
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.files import home_path
from grounded_sam.media.completeness import missing_end
from grounded_sam.media.containers import open_url, open_video_file, redirect_target, video_stream
from grounded_sam.media.files import (
    common_folder,
    find_files,
    image_files,
    is_video_file,
    match_files,
    natural_key,
    relative_name,
    unread_files,
)
from grounded_sam.media.images import MAX_PIXELS, guarded, is_deep, read_image, safe_formats, to_rgb
from grounded_sam.media.video_pixels import frame_to_rgb

#: Schemes that a URL may have. FFmpeg knows more protocols, some of which read local files.
SCHEMES = {"http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp"}
#: Packets that are looked at before the first frame is decoded.
LOOK_AHEAD = 64
#: Steps back in time that are longer begin a new count, as in recordings joined to one file.
MAX_STEP_BACK_S = 1.0
#: Decoding errors after which a file is given up.
MAX_DECODING_ERRORS = 1000
#: Frame rate where a video has none.
DEFAULT_FPS = 24.0


@dataclass(frozen=True)
class VideoFrame:
    """One decoded frame.

    Attributes:
        index: Frame number in the video, from 0.
        time_s: Seconds from the first frame.
        image: RGB, upright, `(H, W, 3) uint8`.
        name: Name of the frame, as in the output.
        file: File that it comes from; None for cameras and streams.
    """

    index: int
    time_s: float
    image: NDArray[np.uint8]
    name: str
    file: Path | None


@dataclass(frozen=True)
class Problem:
    """What could not be decoded: the name of the frame or video, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class _Undecoded:
    """A frame that is decoded only if it is wanted.

    Attributes:
        decode: Returns the image; reports the problem and returns None if it cannot be used.
    """

    index: int
    time_s: float
    decode: Callable[[], NDArray[np.uint8] | None]
    name: str
    file: Path | None


class _Reader(Protocol):
    """Reads one kind of video.

    Attributes:
        input: What it reads, for messages.
        name: Name of the video.
        files: Files that it consists of; empty for cameras and streams.
    """

    input: str
    name: str
    files: list[Path]

    def count(self) -> int | None:
        """Return the number of frames; None if that is unknown."""

    def frames(self, decoder: VideoDecoder) -> Generator[_Undecoded]:
        """Yield all frames, scaled as the decoder says; report problems to it."""


class VideoDecoder:
    """Decode the frames of a video in order.

    Rotation is applied, and frames have the times that the file gives them. A file that is truncated or damaged gives
    the frames it holds. In a folder of frames, images that cannot be read or have another size than the first one are
    left out. Both are added to `problems`.

    Args:
        input: Video file, folder of frames or glob (in natural order), camera index, or URL.
        start: Number of the first frame.
        stop: Number of the frame to stop before; None for the end.
        stride: Keep every `stride`-th frame.
        max_side: Scale frames down to this longer side, in pixels; None for no limit.
        fps: Frame rate of a folder or glob.
        max_pixels: Larger frames are refused before they are decoded.
        name: Name of the video; None for that of the file or folder.

    Attributes:
        input: What is decoded, for messages.
        name: Name of the video.
        files: Files that it consists of; empty for cameras and streams.
        problems: What could not be decoded so far.

    Raises:
        ConfigError: If the input does not exist, or has a URL scheme that is not allowed.
        ImageError: While iterating, if the video cannot be opened, or its frames are too large.
    """

    def __init__(
        self,
        input: str | os.PathLike[str],
        start: int = 0,
        stop: int | None = None,
        stride: int = 1,
        max_side: int | None = None,
        fps: float = DEFAULT_FPS,
        max_pixels: int = MAX_PIXELS,
        name: str | None = None,
    ) -> None:
        self._reader = _find_reader(str(input), fps, name)
        self.input, self.name, self.files = self._reader.input, self._reader.name, self._reader.files
        self.start, self.stop, self.stride = start, stop, stride
        self.max_side, self.max_pixels = max_side, max_pixels
        self.problems: list[Problem] = []
        self._total: int | None = None

    def __len__(self) -> int:
        """Return the largest number of frames that may come.

        Raises:
            TypeError: If that is unknown, as for a camera.
        """
        if self._total is None:
            self._total = self._reader.count()
        end = self.stop if self._total is None else min(self._total, self.stop or self._total)
        if end is None:
            raise TypeError(f"the number of frames of {self.input} is unknown")
        return max(0, -(-(end - self.start) // self.stride))

    def __iter__(self) -> Generator[VideoFrame]:
        with closing(self._reader.frames(self)) as frames:
            for frame in frames:
                if self.stop is not None and frame.index >= self.stop:
                    return
                if frame.index < self.start or (frame.index - self.start) % self.stride:
                    continue
                try:
                    image = frame.decode()
                except ImageError:
                    raise
                except Exception as error:  # whatever a decoder raises, only its frame is lost
                    self.report(frame.name, f"damaged frame ({_reason(error)})")
                    continue
                if image is not None:
                    yield VideoFrame(frame.index, frame.time_s, image, frame.name, frame.file)

    def report(self, name: str, reason: str) -> None:
        """Add to `problems`."""
        self.problems.append(Problem(name, reason))

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that a frame is scaled to.

        Args:
            width: Width of the frame in pixels.
            height: Height of the frame in pixels.

        Raises:
            ImageError: If the frame has more than `max_pixels` pixels.

        >>> VideoDecoder("rtsp://camera/live", max_side=320).scaled_size(640, 480)
        (320, 240)
        """
        if width * height > self.max_pixels:
            raise ImageError(
                f"{self.input}: frames of {width}x{height} px are more than the {self.max_pixels:,} pixels allowed "
                "(source.max_pixels)"
            )
        scale = 1.0 if self.max_side is None else min(1.0, self.max_side / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))


def find_clips(input: str) -> dict[str, str]:
    """Find the videos of a folder or glob with several: video files, and folders with the frames of a video each.

    Args:
        input: A folder without frames of its own, or a glob whose files are in several folders or that matches folders.

    Returns:
        File, folder or glob of each video by its name, in natural order; empty for an input that is one video.

    Raises:
        ConfigError: If a folder has neither images nor videos.
    """
    path = home_path(input)
    if input.isdecimal() or "://" in input or not (path.is_dir() or (glob.has_magic(input) and not path.exists())):
        return {}
    if path.is_dir():
        if _frame_files(path):
            return {}
        files = find_files(input)
        if not files.images and not files.videos:
            raise ConfigError(files.nothing_found(input, "frame and no video"))
        clips = {folder: str(folder) for folder in _folders_of(files.images)} | {
            file: str(file) for file in files.videos
        }
    else:
        found = match_files(input)
        pattern = os.path.basename(input).replace("**", "*")
        clips = {folder: str(folder) for folder in found.unread if _frame_files(folder)}
        folders = _folders_of(image_files(found.files))
        clips |= {folder: os.path.join(glob.escape(str(folder)), pattern) for folder in folders}
        clips |= {file: str(file) for file in found.files if is_video_file(file)}
        if list(clips) == folders and len(folders) < 2:
            return {}
    root = path if path.is_dir() else common_folder(list(clips))
    names = {relative_name(clip, root) if clip != root else clip.name: source for clip, source in clips.items()}
    return dict(sorted(names.items(), key=lambda item: natural_key(item[0])))


def _frame_files(folder: Path) -> list[Path]:
    """Return the images that are directly in a folder, in natural order."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(image_files(files), key=lambda file: natural_key(file.name))


def _folders_of(files: Iterable[Path]) -> list[Path]:
    """Return the folders that files are in, each once."""
    return list(dict.fromkeys(file.parent for file in files))


def _find_reader(input: str, fps: float, name: str | None) -> _Reader:
    """Return the reader for an input.

    Args:
        input: Video file, folder of frames or glob, camera index, or URL.
        fps: Frame rate where the video has none.
        name: Name of the video; None for that of the file or folder.

    Raises:
        ConfigError: If the input does not exist, or has a URL scheme that is not allowed.
    """
    if input.isdecimal():
        return _Camera(input, name or f"camera-{input}")
    if "://" in input:
        url = urlsplit(input)
        if url.scheme not in SCHEMES:
            raise ConfigError(f"cannot open {input}: a URL must begin with {', '.join(sorted(SCHEMES))}")
        return _Container(input, name or Path(url.path).name or "stream", fps)
    path = home_path(input)
    if path.is_dir() or (glob.has_magic(input) and not path.exists()):
        return _ImageSequence(input, name, fps)
    if path.is_file() and image_files([path]):
        return _PageSequence(path, name or path.name, fps)
    if path.is_file():
        return _Container(str(path), name or path.name, fps, path)
    raise ConfigError(f"no such video, folder or camera: {input}")


class _Container:
    """A video file or URL, through PyAV."""

    def __init__(self, input: str, name: str, fps: float, file: Path | None = None) -> None:
        self.input, self.name, self.fps, self.file = input, name, fps, file
        self.files = [] if file is None else [file]

    def count(self) -> int | None:
        import av

        if self.file is None:
            return None
        try:
            with self._open() as container:
                stream = video_stream(container)
                if stream is None:
                    return None
                if stream.frames:
                    return int(stream.frames)
                rate = stream.average_rate
                seconds = container.duration / av.time_base if container.duration else None
                return int(seconds * rate) + 1 if seconds and rate else None
        except Exception:  # reported when its frames are read
            return None

    def _open(self) -> Any:
        """Open the container, without what it may name: other files, or the host that a server redirects to.

        Raises:
            ImageError: If it cannot be opened.
        """
        reason = ""
        for address in self._addresses():
            try:
                return open_url(address) if isinstance(address, str) else open_video_file(address)
            except Exception as error:  # besides FFmpeg's errors, of damaged headers
                refused = getattr(error, "errno", None) == errno.EINVAL  # by the list of formats
                reason = "a playlist, which is not followed, or no known format" if refused else _reason(error)
        # Not raised from PyAV's error, which may name the URL with its password.
        raise ImageError(f"{self.input}: cannot be opened as a video ({reason})")

    def _addresses(self) -> Iterator[str | Path]:
        """Yield the file, or the URL and, if that cannot be opened, where it redirects to."""
        if self.file is not None:
            yield self.file
            return
        yield self.input
        if (target := redirect_target(self.input)) is not None:
            yield target

    def frames(self, decoder: VideoDecoder) -> Generator[_Undecoded]:
        with self._open() as container:
            stream = video_stream(container)
            if stream is None:
                kinds = ", ".join(sorted({stream.type or "unknown" for stream in container.streams})) or "nothing"
                raise ImageError(f"{self.input}: no video stream, only {kinds}")
            if stream.codec_context is None:
                raise ImageError(f"{self.input}: no decoder for its codec; convert it to H.264")
            stream.thread_type = "AUTO"
            size = decoder.scaled_size(stream.width, stream.height) if stream.width and stream.height else None
            rate = stream.average_rate or stream.guessed_rate
            errors: list[str] = []
            index, clock = 0, _Clock(float(rate) if rate else self.fps)
            for av_frame in self._decode(container, stream, clock, errors):
                size = size or decoder.scaled_size(av_frame.width, av_frame.height)
                decode = partial(frame_to_rgb, av_frame, size)
                yield _Undecoded(index, clock.time_s(av_frame), decode, f"{self.name}/{index:06d}", self.file)
                index += 1
            if self.file is not None and not errors and (reason := missing_end(self.file, container, clock.end_s)):
                errors.append(reason)
            self._report(decoder, index, int(stream.frames or 0), errors)

    def _decode(self, container: Any, stream: Any, clock: _Clock, errors: list[str]) -> Generator[Any]:
        """Yield PyAV's frames; add the reason of each one that is damaged to `errors`."""
        packets = container.demux(stream)
        if self.file is not None and stream.codec_context.has_b_frames:
            packets = clock.look_ahead(packets)
        decoder = _transparent_decoder(stream)
        while True:
            try:
                packet = next(packets)
                if packet.is_corrupt:
                    errors.append("damaged packet")
                decoded = packet.decode() if decoder is None else decoder.decode(packet if packet.size else None)
            except StopIteration:
                return
            except Exception as error:  # damaged data raises more than FFmpeg's errors
                errors.append(_reason(error))
                if len(errors) > MAX_DECODING_ERRORS:
                    return
                continue
            for av_frame in decoded:
                if av_frame.is_corrupt:
                    errors.append("damaged frame")
                else:
                    yield av_frame

    def _report(self, decoder: VideoDecoder, count: int, promised: int, errors: list[str]) -> None:
        """Report a video that has fewer frames than it should."""
        reason = errors[-1] if errors else ""
        if not count:
            decoder.report(self.name, f"no frame can be decoded ({reason or 'empty'})")
        elif errors or count < promised:
            expected = f" of {promised}" if promised > count else ""
            detail = f" ({reason})" if reason else ""
            decoder.report(self.name, f"truncated or damaged{detail}; {count}{expected} frames could be read")


class _Clock:
    """Give frames times that rise.

    Args:
        fps: Frame rate, for frames without a time.

    Attributes:
        end_s: Time in the file at which the last frame ends; None before the first one.
    """

    def __init__(self, fps: float) -> None:
        self.step_s = 1 / fps
        self.end_s: float | None = None
        self._first_s: float | None = None
        self._last_s = 0.0
        self._shift_s = 0.0  # where the times of a file begin anew
        self._by_dts = False

    def look_ahead(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Return the same packets, after looking at the first ones.

        Containers such as AVI have decoding times alone, in whose order FFmpeg then numbers the frames. The times of
        packets with B-frames do not rise in the others.
        """

        head: list[Any] = []
        with suppress(Exception):  # see `_Container._decode`
            head += islice(packets, LOOK_AHEAD)
        times = [packet.pts for packet in head if packet.size]
        known = [time for time in times if time is not None]
        self._by_dts = all(a < b for a, b in pairwise(known))
        return chain(head, packets)

    def time_s(self, frame: Any) -> float:
        """Return the time of the next frame, in seconds from the first one."""
        ticks = frame.dts if self._by_dts else frame.pts
        if ticks is None or frame.time_base is None:
            time_s = self._last_s + self.step_s if self.end_s is not None else 0.0
        else:
            time_s = float(ticks * frame.time_base) + self._shift_s
        if self._first_s is None:
            self._first_s = time_s
        elif time_s <= self._last_s:
            if time_s < self._last_s - MAX_STEP_BACK_S and ticks is not None:
                self._shift_s += self._last_s + self.step_s - time_s
            time_s = self._last_s + self.step_s
        self._last_s = time_s
        self.end_s = time_s - self._shift_s + self.step_s
        return time_s - self._first_s


def _transparent_decoder(stream: Any) -> Any:
    """Return a decoder for the transparency of VP8 and VP9, which FFmpeg's own decoders drop; None for other videos."""
    import av

    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    modes = [value for key, value in stream.metadata.items() if key.lower() == "alpha_mode"]
    if name is None or modes != ["1"]:
        return None
    try:
        return av.CodecContext.create(name, "r")
    except (av.FFmpegError, ValueError):  # a build of FFmpeg without it
        return None


class _ImageSequence:
    """A folder or glob of frames."""

    def __init__(self, input: str, name: str | None, fps: float) -> None:
        path = home_path(input)
        if path.is_dir():
            candidates = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
        else:
            candidates = match_files(input).files
        self.files = sorted(image_files(candidates), key=lambda file: natural_key(file.as_posix()))
        folders = _folders_of(find_files(str(path)).images) if path.is_dir() else []
        inner = [folder for folder in folders if folder != path]
        if not self.files:
            folders_inside = f" itself, but in {inner[0]}; give one such folder at a time" if inner else ""
            raise ConfigError(f"no frame in {input}{folders_inside}")
        self.unread = unread_files(candidates)
        self.unread |= dict.fromkeys(inner, "a folder in a folder of frames, which is not read; name it as input")
        self.input, self.fps = input, fps
        folder = Path(os.path.abspath(path if path.is_dir() else common_folder(self.files)))
        self.name = name or relative_name(folder, folder.parent) or "frames"

    def count(self) -> int | None:
        return len(self.files)

    def frames(self, decoder: VideoDecoder) -> Generator[_Undecoded]:
        root = common_folder(self.files)
        for path, reason in self.unread.items():
            decoder.report(path.name, reason)
        fit = _OneSize(decoder)
        for index, path in enumerate(self.files):
            name = f"{self.name}/{relative_name(path, root)}"
            yield _Undecoded(index, index / self.fps, partial(self._decode, path, name, decoder, fit), name, path)

    def _decode(self, path: Path, name: str, decoder: VideoDecoder, fit: _OneSize) -> NDArray[np.uint8] | None:
        try:
            image = read_image(path, decoder.max_pixels)
        except ImageError as error:
            decoder.report(name, str(error).removeprefix(f"{path}: "))
            return None
        return fit(image, name)


class _OneSize:
    """Scale frames as a decoder says, and leave out those of another size than the first.

    Args:
        decoder: The decoder, to which frames that are left out are reported.
    """

    def __init__(self, decoder: VideoDecoder) -> None:
        self.decoder = decoder
        self._size_wh: tuple[int, int] | None = None  # of the first frame that could be read

    def __call__(self, image: NDArray[np.uint8], name: str) -> NDArray[np.uint8] | None:
        """Return a frame, scaled; None if it has another size."""
        width, height = size_wh = image.shape[1], image.shape[0]
        self._size_wh = self._size_wh or size_wh
        if size_wh != self._size_wh:
            first = f"{self._size_wh[0]}x{self._size_wh[1]} px"
            self.decoder.report(name, f"a frame of {width}x{height} px, but the first one has {first}")
            return None
        return downscale(image, self.decoder.scaled_size(width, height))


class _PageSequence:
    """The images of one file: pages of a TIFF, or frames of an animation, with their durations."""

    def __init__(self, file: Path, name: str, fps: float) -> None:
        self.input, self.name, self.fps, self.files = str(file), name, fps, [file]

    def _open(self) -> Any:
        from PIL import Image

        with guarded(self.files[0]) as file:  # `frames` checks the size of each page
            return Image.open(file, formats=safe_formats())

    def count(self) -> int | None:
        try:
            with self._open() as image:
                return int(getattr(image, "n_frames", 1))
        except Exception:  # Pillow's plugins raise many kinds of error; `frames` reports it
            return None

    def frames(self, decoder: VideoDecoder) -> Generator[_Undecoded]:
        if self.count() in (None, 1):  # a single image, or one that only `read_image` knows
            decode = partial(read_image, self.files[0], decoder.max_pixels)
            yield _Undecoded(0, 0.0, decode, f"{self.name}/000000", self.files[0])
            return
        fit, time_s = _OneSize(decoder), 0.0
        with self._open() as pages:
            for index in count():
                name = f"{self.name}/{index:06d}"
                try:
                    pages.seek(index)
                except EOFError:
                    return
                except Exception as error:  # see above
                    decoder.report(name, f"damaged page ({_reason(error)}); it and those after it are not read")
                    return
                yield _Undecoded(index, time_s, partial(self._decode, pages, name, decoder, fit), name, self.files[0])
                time_s += float(pages.info.get("duration") or 1000 / self.fps) / 1000

    def _decode(self, pages: Any, name: str, decoder: VideoDecoder, fit: _OneSize) -> NDArray[np.uint8] | None:
        decoder.scaled_size(*pages.size)  # checks the size
        if is_deep(pages):
            decoder.report(name, "a page of more than 8 bits per color; save it as a file of its own")
            return None
        try:
            from PIL import ImageOps

            return fit(to_rgb(ImageOps.exif_transpose(pages)), name)
        except Exception as error:  # see above
            decoder.report(name, f"damaged page ({_reason(error)})")
            return None


class _Camera:
    """A camera, through OpenCV, until it is closed."""

    def __init__(self, index: str, name: str) -> None:
        self.input, self.name = index, name
        self.files: list[Path] = []

    def count(self) -> int | None:
        return None

    def frames(self, decoder: VideoDecoder) -> Generator[_Undecoded]:
        import cv2

        camera = cv2.VideoCapture(int(self.input))
        try:
            if not camera.isOpened():
                raise ImageError(f"camera {self.input} cannot be opened")
            start, index = time.monotonic(), 0
            while True:
                is_read, bgr = camera.read()
                if not is_read:
                    return
                size_wh = decoder.scaled_size(bgr.shape[1], bgr.shape[0])
                rgb = np.ascontiguousarray(bgr[..., ::-1])
                elapsed, name = time.monotonic() - start, f"{self.name}/{index:06d}"
                yield _Undecoded(index, elapsed, partial(downscale, rgb, size_wh), name, None)
                index += 1
        finally:
            camera.release()


def is_stream(input: Any) -> bool:
    """Return whether an input is a camera index or a URL.

    >>> is_stream(0), is_stream("rtsp://camera/live"), is_stream("clip.mp4")
    (True, True, False)
    """
    return str(input).isdecimal() or "://" in str(input)


def downscale(image: NDArray[np.uint8], size_wh: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an image to a smaller size by area averaging.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        size_wh: Width and height of the result.

    >>> downscale(np.zeros((4, 8, 3), np.uint8), (4, 2)).shape
    (2, 4, 3)
    """
    import cv2

    if (image.shape[1], image.shape[0]) == size_wh:
        return image
    return np.asarray(cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA), np.uint8)


def _reason(error: BaseException) -> str:
    """Return the short reason of an FFmpeg error."""
    text = str(getattr(error, "strerror", None) or error)
    return text.split("; ", maxsplit=1)[0].split(": ", maxsplit=1)[0].strip() or type(error).__name__
