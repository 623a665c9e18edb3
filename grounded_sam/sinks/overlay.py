"""Pictures and videos with masks, boxes and labels drawn on them."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Literal

from grounded_sam.errors import ConfigError
from grounded_sam.files import UniqueNames, atomic_write
from grounded_sam.media.draw import draw_detections
from grounded_sam.media.mp4 import Mp4Writer
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class OverlaySink:
    """Under `overlay/` one picture per picture and one MP4 per video, at their original size.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        format: of pictures, `jpg` or `png`.
        masks, boxes, labels: what to draw.
        opacity: of the masks, 0 to 1.
        colour_by: `class`, or `object` to tell objects of one class apart; None: `object` where there are
            tracks, else `class`.
        sound_from: a video file, or a folder of them, whose sound annotated videos get; None for none.
        crf: quality of videos, 0 (lossless) to 51.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        format: Literal["jpg", "png"] = "jpg",
        masks: bool = True,
        boxes: bool = True,
        labels: bool = True,
        opacity: float = 0.5,
        colour_by: Literal["class", "object"] | None = None,
        sound_from: str | int | None = None,
        crf: int = 20,
    ) -> None:
        if format not in ("jpg", "png"):
            raise ConfigError(f"sink.overlay.format must be jpg or png, got {format!r}")
        if colour_by not in ("class", "object", None):
            raise ConfigError(f"sink.overlay.colour_by must be class, object or null, got {colour_by!r}")
        if isinstance(crf, bool) or not isinstance(crf, int) or not 0 <= crf <= 51:
            raise ConfigError(f"sink.overlay.crf must be a whole number from 0 to 51, got {crf!r}")
        self.folder = Path(output) / "overlay"
        self.format, self.masks, self.boxes, self.labels = format, masks, boxes, labels
        self.opacity, self.colour_by = opacity, colour_by
        self.sound_from = None if sound_from is None else os.path.expanduser(str(sound_from))
        self.crf = crf
        self.palette = vocabulary.palette()
        self.names, self.count = UniqueNames(), 0
        self.clips = 0
        self._current: tuple[str, Mp4Writer] | None = None  # the video on its way

    def __enter__(self) -> OverlaySink:
        return self

    def write(self, result: FrameResult) -> None:
        from PIL import Image

        frame = result.frame
        picture = draw_detections(
            frame.image,
            result.detections,
            self.masks,
            self.boxes,
            self.labels,
            self.opacity,
            self.colour_by,
            self.palette,
        )
        if frame.video is not None:
            if self._current is None or self._current[0] != frame.video:
                self._close()  # an encoder holds frames, so there is one at a time
                path = self.folder / self.names(frame.video, ".mp4")
                self._current = frame.video, Mp4Writer(path, self._sound(frame.video), self.crf)
                self.clips += 1
            self._current[1].write(picture, frame.time_s or 0.0)
            return
        kind = "png" if max(picture.shape) > 65_500 else self.format  # more, JPEG cannot hold
        with atomic_write(self.folder / self.names(result.frame.name, f".{kind}")) as part:
            Image.fromarray(picture).save(part, format="JPEG" if kind == "jpg" else "PNG", quality=92)
        self.count += 1

    def _sound(self, video: str) -> str | None:
        """The file that a video came from: `sound_from` itself, or the one of that name in it."""
        if self.sound_from is None or not os.path.isdir(self.sound_from):
            return self.sound_from
        return os.path.join(self.sound_from, video)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._current is not None:
            self._current[1].close()
            self._current = None

    def summary(self) -> str:
        counts = [f"{n} {what}" for n, what in ((self.count, "pictures"), (self.clips, "videos")) if n]
        return f"{' and '.join(counts) or 'nothing'} in {self.folder}"
