"""Decode videos: files, streams, cameras, and folders of frames."""

from __future__ import annotations

import errno
import glob
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.files import home_path, require_regular
from grounded_sam.media.files import common_folder, image_files, match_files, natural_key, relative_name
from grounded_sam.media.images import MAX_PIXELS, read_image

#: Schemes that a URL may have. FFmpeg knows more protocols, some of which read local files.
SCHEMES = {"http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp"}
#: Containers that are read, by FFmpeg's names. Those that open other files (concat, hls, dash, sdp, image2) are absent.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,flv,live_flv,f4v,"
    "asf,mxf,ogg,nut,dv,gxf,wtv,nsv,rm,nuv,yuv4mpegpipe,gif,apng,mjpeg,mjpeg_2000,mpjpeg,avs2,avs3,cavsvideo,dirac,vc1,"
    "h261,h263,swf,amv,roq,smk,bink,flic"
)
#: What FFmpeg may open on the way from a file, and from a URL.
FILE_PROTOCOLS, URL_PROTOCOLS = "file", "http,https,tcp,tls,udp,rtp,rtsp,rtsps,rtmp,rtmps,rtmpt,srt,httpproxy,crypto"
#: Formats of streams, and of playlists, which name the addresses that are opened next.
STREAM_FORMATS, PLAYLISTS = "rtsp,rtp,sdp,mpegtsraw", {".m3u8": "hls", ".mpd": "dash"}
#: Seconds that a server may take to answer.
URL_TIMEOUT = 20.0
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
    if path.is_file():
        return _Container(str(path), name or path.name, fps, path)
    raise ConfigError(f"no such video, folder or camera: {input}")


class _Container:
    """A video file or URL, through PyAV."""

    def __init__(self, input: str, name: str, fps: float, file: Path | None = None) -> None:
        self.input, self.name, self.fps, self.file = input, name, fps, file
        self.files = [] if file is None else [file]
        self._url = input if file is None else f"file:{file}"  # or FFmpeg takes `12:30.mp4` for a protocol

    def count(self) -> int | None:
        import av

        if self.file is None:
            return None
        try:
            with self._open() as container:
                stream = _video_stream(container)
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
        try:
            return self._open_input(self.input)
        except Exception as error:  # besides FFmpeg's errors, of damaged headers
            target = None if self.file is not None else redirect_target(self.input)
            if target is not None:
                return self._open_input(target)
            refused = isinstance(error, OSError) and error.errno == errno.EINVAL  # by the list of formats
            reason = "a playlist, which is not followed, or no known format" if refused else _reason(error)
            raise ImageError(f"{self.input}: cannot be opened as a video ({reason})") from error

    def _open_input(self, input: str) -> Any:
        import av

        if self.file is not None:
            return open_video_file(self.file)
        playlist = PLAYLISTS.get(Path(urlsplit(input).path).suffix.lower())
        formats = ",".join(filter(None, [CONTAINERS, STREAM_FORMATS, playlist]))
        options = {"protocol_whitelist": URL_PROTOCOLS, "format_whitelist": formats}
        if input.startswith("rtsp"):
            options["rtsp_transport"] = "tcp"
        if input.startswith("http"):
            options["max_redirects"] = "0"
        return av.open(input, options=options, timeout=URL_TIMEOUT, metadata_errors="replace")

    def frames(self, decoder: VideoDecoder) -> Generator[_Undecoded]:
        with self._open() as container:
            stream = _video_stream(container)
            if stream is None:
                kinds = ", ".join(sorted({stream.type or "unknown" for stream in container.streams})) or "nothing"
                raise ImageError(f"{self.input}: no video stream, only {kinds}")
            try:
                stream.thread_type = "AUTO"
                size = decoder.scaled_size(stream.width, stream.height) if stream.width and stream.height else None
                rate = stream.average_rate or stream.guessed_rate
            except AttributeError as error:  # PyAV has no codec for it
                raise ImageError(
                    f"{self.input}: its video has a format that cannot be decoded, or is damaged"
                ) from error
            fps = float(rate) if rate else self.fps
            errors: list[str] = []
            first, index = None, 0
            for av_frame in self._decode(container, stream, errors):
                size = size or decoder.scaled_size(av_frame.width, av_frame.height)
                time_s = float(av_frame.time) if av_frame.time is not None else index / fps
                first = time_s if first is None else first
                decode = partial(_to_rgb, av_frame, size)
                yield _Undecoded(index, time_s - first, decode, f"{self.name}/{index:06d}", self.file)
                index += 1
            self._report(decoder, index, int(stream.frames or 0), errors)

    def _decode(self, container: Any, stream: Any, errors: list[str]) -> Generator[Any]:
        """Yield PyAV's frames; add the reason of each one that is damaged to `errors`."""
        packets = container.demux(stream)
        while True:
            try:
                decoded = next(packets).decode()
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


class _ImageSequence:
    """A folder or glob of frames."""

    def __init__(self, input: str, name: str | None, fps: float) -> None:
        path = home_path(input)
        if path.is_dir():
            candidates = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
        else:
            candidates, _ = match_files(input)
        self.files = sorted(image_files(candidates), key=lambda file: natural_key(file.as_posix()))
        if not self.files:
            raise ConfigError(f"no frame in {input}")
        self.input, self.fps = input, fps
        self.name = name or (path if path.is_dir() else common_folder(self.files)).name
        self._size_wh: tuple[int, int] | None = None  # of the first frame that could be read

    def count(self) -> int | None:
        return len(self.files)

    def frames(self, decoder: VideoDecoder) -> Generator[_Undecoded]:
        root = common_folder(self.files)
        self._size_wh = None
        for index, path in enumerate(self.files):
            name = relative_name(path, root)
            yield _Undecoded(index, index / self.fps, partial(self._decode, path, name, decoder), name, path)

    def _decode(self, path: Path, name: str, decoder: VideoDecoder) -> NDArray[np.uint8] | None:
        try:
            image = read_image(path, decoder.max_pixels)
        except ImageError as error:
            decoder.report(name, str(error).removeprefix(f"{path}: "))
            return None
        width, height = size_wh = image.shape[1], image.shape[0]
        self._size_wh = self._size_wh or size_wh
        if size_wh != self._size_wh:
            first = f"{self._size_wh[0]}x{self._size_wh[1]} px"
            decoder.report(name, f"a frame of {width}x{height} px, but the first one has {first}")
            return None
        return downscale(image, decoder.scaled_size(width, height))


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


def rotate_upright(image: NDArray[np.uint8], degrees: int) -> NDArray[np.uint8]:
    """Rotate a frame counter-clockwise, as the display matrix of its video says.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        degrees: Angle as PyAV gives it, rounded to a multiple of 90.

    >>> rotate_upright(np.zeros((2, 4, 3), np.uint8), -90).shape
    (4, 2, 3)
    """
    return np.ascontiguousarray(np.rot90(image, round(degrees / 90) % 4)) if degrees else image


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


def open_video_file(path: Path) -> Any:
    """Open a video file with PyAV, but no playlist, whatever its suffix.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be opened, or is no file.
    """
    import av

    require_regular(path)
    options = {"protocol_whitelist": FILE_PROTOCOLS, "format_whitelist": CONTAINERS}
    return av.open(str(path), options=options, metadata_errors="replace")


class _SameHost(HTTPRedirectHandler):
    """Follows redirects that stay on the host."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        moved_to_https = (old.scheme, new.scheme) == ("http", "https") and old.port == new.port is None
        if old.hostname != new.hostname or not (moved_to_https or (old.scheme, old.port) == (new.scheme, new.port)):
            raise ImageError(
                f"{req.full_url}: redirects to another host, {new.scheme}://{new.netloc}, which is not followed; if "
                "you trust it, give the new address as input"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def redirect_target(url: str) -> str | None:
    """Return where a URL redirects to, on the same host; None if it does not.

    Raises:
        ImageError: If it redirects to another host.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        return None
    try:
        with build_opener(_SameHost).open(url, timeout=URL_TIMEOUT) as response:
            target = str(response.url)
            return None if target == url else target
    except (OSError, ValueError):
        return None


def _to_rgb(av_frame: Any, size_wh: tuple[int, int]) -> NDArray[np.uint8]:
    """Convert PyAV's frame to upright RGB, scaled to a width and height before it is rotated."""
    from av.video.reformatter import Interpolation

    rgb = av_frame.reformat(*size_wh, format="rgb24", interpolation=Interpolation.AREA)
    return rotate_upright(rgb.to_ndarray(), av_frame.rotation)


def _video_stream(container: Any) -> Any:
    """Return the first video stream that is not a cover image."""
    cover = 0x400  # AV_DISPOSITION_ATTACHED_PIC
    return next((stream for stream in container.streams.video if not int(stream.disposition) & cover), None)


def _reason(error: BaseException) -> str:
    """Return the short reason of an FFmpeg error."""
    text = str(getattr(error, "strerror", None) or error)
    return text.split("; ", maxsplit=1)[0].split(": ", maxsplit=1)[0].strip() or type(error).__name__
