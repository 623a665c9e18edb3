"""Videos: files, folders of frames, globs, cameras and streams, decoded ahead on a thread."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.media.files import common_folder, natural_key, picture_files, relative_name
from grounded_sam.media.images import MAX_PIXELS, read_image
from grounded_sam.media.prefetch import prefetch
from grounded_sam.media.video import SCHEMES, _kinds, _reason, _video_stream, downscale, is_stream, rotate_upright
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult, Skipped


class VideoSource:
    """Frames of a video in order, with their numbers and times.

    Video files (whatever PyAV reads) come with rotation applied and with the times that the file gives
    its frames. A file that is cut or damaged gives the frames it holds and an entry in `skipped`. Of a
    folder of frames, pictures that cannot be read or are not of the first one's size are left out
    likewise.

    Args:
        input: a video file, a folder of frames or a glob (natural order of names), a camera's number, or
            a URL (http, rtsp, ...).
        start, stop: numbers of the first frame and of the first one beyond, from 0; null for all.
        stride: take every so-manieth frame.
        max_side: scale frames down to this longer side, in pixels.
        fps: frames per second of a folder or glob, which has no times of its own.
        ahead: frames decoded ahead.
        max_pixels: larger frames are refused before they are decoded.
        name: what outputs call the video; by default after the file or folder.

    Raises:
        ConfigError: if there is no such input, or a number is out of range.
        ImageError: while iterating, if not a single frame can be read.
    """

    def __init__(
        self,
        input: str | int | os.PathLike[str] | None,
        start: int = 0,
        stop: int | None = None,
        stride: int = 1,
        max_side: int | None = None,
        fps: float = 24.0,
        ahead: int = 4,
        max_pixels: int = MAX_PIXELS,
        name: str | None = None,
    ) -> None:
        if input is None or not str(input):
            raise ConfigError("input is missing: give a video, a folder of frames, a camera's number or a URL")
        for key, value, least in (
            ("start", start, 0),
            ("stop", stop, 1),
            ("stride", stride, 1),
            ("max_side", max_side, 16),
            ("ahead", ahead, 1),
            ("max_pixels", max_pixels, 1),
        ):
            if value is None and key in ("stop", "max_side"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"source.{key} must be a whole number from {least}, got {value!r}")
        if stop is not None and stop <= start:
            raise ConfigError(f"source.stop must be more than source.start={start}, got {stop}")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
            raise ConfigError(f"source.fps must be a number above 0, got {fps!r}")
        self.start, self.stop, self.stride, self.max_side = start, stop, stride, max_side
        self.ahead, self.max_pixels = ahead, max_pixels
        self.skipped: list[Skipped] = []
        self.stored: Callable[[str, list[Path]], Iterable[FrameResult] | None] | None = None
        self.files: list[Path] = []
        self.fps: float | None = float(fps)
        self.input = str(input)
        path = Path(self.input).expanduser()
        scheme = urlsplit(self.input).scheme
        if self.input.isdecimal():
            self.name, self._open = f"camera-{self.input}", self._camera
        elif "://" in self.input:
            if scheme not in SCHEMES:
                raise ConfigError(f"cannot open {self.input}: a URL must begin with {', '.join(sorted(SCHEMES))}")
            self.name, self._open = Path(urlsplit(self.input).path).name or "stream", self._container
        elif path.is_dir() or (glob.has_magic(self.input) and not path.exists()):
            self.files = self._find(path)
            self.name, self._open = path.name if path.is_dir() else common_folder(self.files).name, self._pictures
        elif path.is_file():
            self.input, self.name, self._open = str(path), path.name, self._container
        else:
            raise ConfigError(f"no such video, folder or camera: {self.input}")
        self.name = name or self.name
        self._total: int | None = len(self.files) or None

    def _find(self, path: Path) -> list[Path]:
        if path.is_dir():
            found = picture_files([p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")])
        else:
            found = picture_files([Path(hit) for hit in glob.glob(os.path.expanduser(self.input), recursive=True)])
        if not found:
            raise ConfigError(f"no frame in {self.input}")
        return sorted(found, key=lambda p: natural_key(p.as_posix()))

    def __len__(self) -> int:
        """How many frames will come at most.

        Raises:
            TypeError: if that is not known, as of a camera.
        """
        if self._total is None and self._open == self._container and "://" not in self.input:
            self._total = self._count()
        total = self.stop if self._total is None else min(self._total, self.stop or self._total)
        if total is None:
            raise TypeError(f"{self.input} does not say how many frames it has")
        return max(0, -(-(total - self.start) // self.stride))

    def _count(self) -> int | None:
        import av

        try:
            with av.open(self.input) as container:
                stream = _video_stream(container)
                if stream is None:
                    return None
                if stream.frames:
                    return int(stream.frames)
                rate = stream.average_rate
                seconds = container.duration / av.time_base if container.duration else None
                return int(seconds * rate) + 1 if seconds and rate else None
        except av.FFmpegError:
            return None

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        files = self.files or ([Path(self.input)] if not is_stream(self.input) else [])
        if files and self.stored is not None and (results := self.stored(self.name, files)) is not None:
            yield from results
            return
        got = False
        with closing(prefetch(self._taken(), self.ahead)) as frames:
            for frame in frames:
                got = True
                yield frame
        if not got:
            raise ImageError(self.skipped[0].reason if self.skipped else f"{self.input}: no frame from {self.start} on")

    def _taken(self) -> Generator[Frame]:
        """Frames within start, stop and stride, at the size asked for."""
        with closing(self._open()) as numbered:
            for index, time_s, make, name in numbered:
                if self.stop is not None and index >= self.stop:
                    return
                if index < self.start or (index - self.start) % self.stride:
                    continue
                image = make()
                if image is not None:
                    file = self.files[index] if self.files else None if is_stream(self.input) else Path(self.input)
                    yield Frame(image, index, name, time_s, self.name, file)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        if width * height > self.max_pixels:
            raise ImageError(
                f"{self.input}: frames of {width}x{height} px are more than the {self.max_pixels:,} pixels allowed "
                "(source.max_pixels)"
            )
        scale = 1.0 if self.max_side is None else min(1.0, self.max_side / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    def _container(self) -> Generator[tuple[int, float, Any, str]]:
        """Frames of a file or URL, through PyAV."""
        import av
        from av.video.reformatter import Interpolation

        options = {"rtsp_transport": "tcp"} if self.input.startswith("rtsp") else {}
        try:
            container = av.open(self.input, options=options, timeout=20.0 if "://" in self.input else None)
        except av.FFmpegError as error:
            raise ImageError(f"{self.input}: not a video that can be opened ({_reason(error)})") from error
        with container:
            stream = _video_stream(container)
            if stream is None:
                raise ImageError(f"{self.input}: there is no video in it, only {_kinds(container)}")
            stream.thread_type = "AUTO"
            size = self._size(stream.width, stream.height) if stream.width and stream.height else None
            rate = stream.average_rate or stream.guessed_rate
            self.fps = float(rate) if rate else self.fps
            first, index, damaged, reason = None, 0, 0, ""
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets)
                    decoded = packet.decode()
                except StopIteration:
                    break
                except av.FFmpegError as error:
                    damaged, reason = damaged + 1, _reason(error)
                    if damaged > 1000:
                        break
                    continue
                for picture in decoded:
                    if picture.is_corrupt:
                        damaged, reason = damaged + 1, "damaged frame"
                        continue
                    size = size or self._size(picture.width, picture.height)
                    time_s = float(picture.time) if picture.time is not None else index / (self.fps or 24.0)
                    first = time_s if first is None else first

                    def make(picture: Any = picture, size: tuple[int, int] = size) -> NDArray[np.uint8]:
                        rgb = picture.reformat(*size, format="rgb24", interpolation=Interpolation.AREA)
                        return rotate_upright(rgb.to_ndarray(), picture.rotation)

                    yield index, time_s - first, make, f"{self.name}/{index:06d}"
                    index += 1
            promised = int(stream.frames or 0)
            if not index:
                self.skipped.append(Skipped(self.name, f"{self.input}: no frame can be decoded ({reason or 'empty'})"))
            elif damaged or index < promised:
                said = f" of the {promised} it should hold" if promised > index else ""
                why = f" ({reason})" if reason else ""
                self.skipped.append(Skipped(self.name, f"cut or damaged{why}; {index} frames{said} could be read"))

    def _pictures(self) -> Generator[tuple[int, float, Any, str]]:
        """Frames of a folder or glob."""
        root = common_folder(self.files)
        first: list[tuple[int, int]] = []

        def make(path: Path, name: str) -> NDArray[np.uint8] | None:
            try:
                image = read_image(path, self.max_pixels)
            except ImageError as error:
                self.skipped.append(Skipped(name, str(error).removeprefix(f"{path}: ")))
                return None
            size = image.shape[1], image.shape[0]
            if not first:
                first.append(size)
            elif size != first[0]:
                reason = f"a frame of {size[0]}x{size[1]} px, the first one has {first[0][0]}x{first[0][1]} px"
                self.skipped.append(Skipped(name, reason))
                return None
            return downscale(image, self._size(*size))

        assert self.fps is not None
        for index, path in enumerate(self.files):
            name = relative_name(path, root)
            yield index, index / self.fps, lambda p=path, n=name: make(p, n), name

    def _camera(self) -> Generator[tuple[int, float, Any, str]]:
        """Frames of a camera, through OpenCV, until it is closed."""
        import time

        import cv2

        camera = cv2.VideoCapture(int(self.input))
        try:
            if not camera.isOpened():
                raise ImageError(f"camera {self.input} cannot be opened")
            self.fps = camera.get(cv2.CAP_PROP_FPS) or None
            begun, index = time.monotonic(), 0
            while True:
                good, picture = camera.read()
                if not good:
                    return
                size = self._size(picture.shape[1], picture.shape[0])
                rgb = np.ascontiguousarray(picture[..., ::-1])
                now = time.monotonic() - begun
                yield index, now, lambda rgb=rgb, size=size: downscale(rgb, size), f"{self.name}/{index:06d}"
                index += 1
        finally:
            camera.release()
