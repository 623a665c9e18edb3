"""Images and videos with masks, boxes and labels drawn on them."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from grounded_sam.checks import check_bool, check_choice, check_int, check_number
from grounded_sam.errors import ConfigError, count_of
from grounded_sam.files import UniqueNames, atomic_write, home_path
from grounded_sam.media.draw import draw_detections
from grounded_sam.media.files import is_video_file
from grounded_sam.media.mp4 import Mp4Writer
from grounded_sam.media.video_pixels import read_look
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary

#: Longest side that a JPEG can have, in pixels.
MAX_JPEG_SIDE = 65_500


class OverlaySink:
    """Write each image and video with its detections drawn under `overlay/`, at the original size; videos become MP4.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        format: Format of images, `jpg` or `png`.
        masks: Whether to draw masks.
        boxes: Whether to draw boxes.
        labels: Whether to write class names, scores and track ids.
        opacity: Opacity of masks, 0 to 1.
        colour_by: One color per `class` or per `object`; None for `object` if there are tracks and not all classes have
            a color of their own, else `class`.
        sound_from: Whose audio the annotated videos get: `input` for that of each video itself, a video file, or a
            folder with a file of the name of each video; None for no audio.
        crf: Constant rate factor of videos, 0 (lossless) to 51.

    Attributes:
        skipped: Videos whose sound is missing.

    Raises:
        ConfigError: If a setting is not one of its choices, or out of range, or `sound_from` does not exist.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        format: Literal["jpg", "png"] = "jpg",
        masks: bool = True,
        boxes: bool = True,
        labels: bool = True,
        opacity: float = 0.3,
        colour_by: Literal["class", "object"] | None = None,
        sound_from: str | None = None,
        crf: int = 20,
    ) -> None:
        check_choice("sink.overlay.format", format, ("jpg", "png"))
        check_choice("sink.overlay.colour_by", colour_by, ("class", "object"), optional=True)
        check_number("sink.overlay.opacity", opacity, 0, 1)
        check_int("sink.overlay.crf", crf, 0, 51)
        for key, value in {"masks": masks, "boxes": boxes, "labels": labels}.items():
            check_bool(f"sink.overlay.{key}", value)
        self.folder, self.format, self.crf = Path(output) / "overlay", format, crf
        self.masks, self.boxes, self.labels = masks, boxes, labels
        self.opacity, self.palette = opacity, vocabulary.palette()
        self.color_by = colour_by or ("class" if vocabulary.has_own_colors else None)
        self.sound_from = None if sound_from is None else str(home_path(str(sound_from)))
        if self.sound_from not in (None, "input") and not os.path.exists(str(self.sound_from)):
            raise ConfigError(
                f"sink.overlay.sound_from={sound_from}: no such file or folder; input takes the sound of each video"
            )
        self.skipped: list[Skipped] = []
        self._names = UniqueNames()
        self._num_images = self._num_videos = 0
        self._current: tuple[str, Mp4Writer] | None = None  # name and writer of the video that is being written

    def __enter__(self) -> OverlaySink:
        return self

    def write(self, result: FrameResult) -> None:
        """Draw a frame and write it."""
        self.write_prepared(result, self.prepare(result))

    def prepare(self, result: FrameResult) -> NDArray[np.uint8] | bytes:
        """Draw a frame; an image is also encoded."""
        from PIL import Image

        drawn = draw_detections(
            result.frame.image,
            result.detections,
            masks=self.masks,
            boxes=self.boxes,
            labels=self.labels,
            opacity=self.opacity,
            color_by=self.color_by,
            palette=self.palette,
        )
        if result.frame.video is not None:
            return drawn
        encoded = io.BytesIO()
        Image.fromarray(drawn).save(
            encoded, format="JPEG" if self._suffix(result.frame) == "jpg" else "PNG", quality=92
        )
        return encoded.getvalue()

    def write_prepared(self, result: FrameResult, prepared: NDArray[np.uint8] | bytes) -> None:
        """Write what `prepare` returned."""
        frame = result.frame
        if frame.video is not None:
            assert isinstance(prepared, np.ndarray)
            self._writer(frame, frame.video).write(prepared, frame.time_s or 0.0)
            return
        assert isinstance(prepared, bytes)
        with atomic_write(self.folder / self._names(frame.name, f".{self._suffix(frame)}")) as part:
            part.write_bytes(prepared)
        self._num_images += 1

    def _suffix(self, frame: Frame) -> str:
        """Return the format of an image: PNG where JPEG has no room for it."""
        return "png" if max(frame.size_hw) > MAX_JPEG_SIDE else self.format

    def _writer(self, frame: Frame, video: str) -> Mp4Writer:
        """Return the writer of a video; the one before is closed, since an encoder holds frames in memory."""
        if self._current is None or self._current[0] != video:
            self._close()
            path = self.folder / self._names(video, ".mp4")
            look = read_look(frame.file) if isinstance(frame.file, Path) and frame.file.is_file() else None
            report = partial(self._report, video)
            self._current = video, Mp4Writer(path, self._sound_file(frame, video), self.crf, look, report)
            self._num_videos += 1
        return self._current[1]

    def _report(self, video: str, reason: str) -> None:
        """List a video whose sound is missing."""
        self.skipped.append(Skipped(video, reason))

    def _sound_file(self, frame: Frame, video: str) -> str | None:
        """Return the file whose sound a video gets: its own, `sound_from` itself, or that of its name in the folder."""
        if self.sound_from == "input":
            return None if frame.file is None else str(frame.file)
        if self.sound_from is None or not os.path.isdir(self.sound_from):
            return self.sound_from
        is_video = isinstance(frame.file, Path) and is_video_file(frame.file)
        if is_video and frame.file.is_relative_to(self.sound_from):  # type: ignore[union-attr]
            return str(frame.file)  # its name may have got a number in a store
        path = os.path.join(self.sound_from, video)
        if not os.path.isfile(path):
            self._report(video, f"no sound, since {path} does not exist; name the files in sound_from as the videos")
        return path

    def own_folder(self) -> Path:
        """Return the folder of the annotated images and videos."""
        return self.folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._current is not None:
            self._current[1].close()
            self._current = None

    def summary(self) -> str:
        """Return the numbers of images and videos and the folder."""
        counts = [count_of(n, noun) for n, noun in ((self._num_images, "image"), (self._num_videos, "video")) if n]
        return f"{' and '.join(counts) or 'no images'} with detections drawn: {self.folder}"
