"""Find the labels of the frames of a video by their names and numbers."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from grounded_sam.errors import ConfigError
from grounded_sam.formats.video_masks import FrameKey, LabelledVideo, split_frame_name
from grounded_sam.media.files import is_video_file
from grounded_sam.structures.frame import Frame


class FrameMatcher:
    """Find the labels of the frames of one video.

    Frames that are images are matched by their names where the labels are named alike. Otherwise frames are matched by
    the numbers that names end in, provided that both begin at the same one: the frames of a decoded video count from 0,
    labels may count from 1.

    Args:
        video: Labels of the video.
        where: File or folder of the labels, for messages.
        offset: What to add to the number of a frame for that of its labels; None to find out.

    >>> labels = LabelledVideo(name="clip", size_hw=(2, 2), frames=[1, 2], read=lambda key: {})
    >>> matcher = FrameMatcher(labels, Path("labels"), offset=1)
    >>> [matcher.find(Frame(pixels=None, index=i, name=f"clip.mp4/{i:06d}", video="clip.mp4")) for i in range(3)]
    [1, 2, None]
    """

    def __init__(self, video: LabelledVideo, where: Path, offset: int | None = None) -> None:
        self.video, self.where, self.offset = video, where, offset
        self._keys = set(video.frames)

    def find(self, frame: Frame) -> FrameKey | None:
        """Return the key of the labels of a frame; None if it has none.

        Raises:
            ConfigError: If the numbers of frames and labels begin differently, and `offset` was not given.
        """
        key: FrameKey = PurePosixPath(frame.name).stem
        beginning, digits = split_frame_name(frame.name)
        if digits and any(isinstance(label, int) for label in self._keys):
            if self.offset is None:
                self.offset = self._find_offset(frame, beginning, digits)
            key = int(digits) + self.offset
        return key if key in self._keys else None

    def _find_offset(self, frame: Frame, beginning: str, digits: str) -> int:
        """Return 0 if the numbers of frames and labels agree, judged by one frame."""
        first_label = min(key for key in self._keys if isinstance(key, int))
        first_frame = int(digits) - frame.index
        is_decoded = any(path is not None and is_video_file(path) for path in (frame.video, frame.file))
        label_name = (self.video.frame_names or {}).get(first_label)
        named_alike = not is_decoded and label_name == f"{beginning}{first_label:0{len(digits)}d}"
        if first_label == first_frame or (named_alike and first_label > first_frame):
            return 0
        shift = first_label - first_frame
        raise ConfigError(
            f"frames of {frame.video} are numbered from {first_frame}, but their labels in {self.where} from "
            f"{first_label}: set sink.metrics.frame_offset={shift} if label {first_label} belongs to frame "
            f"{first_frame}, or 0 if frame and label of one number belong together"
        )
