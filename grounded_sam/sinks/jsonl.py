"""JSON lines, one per frame, written during the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Any, ClassVar

import supervision as sv

from grounded_sam.errors import count_of
from grounded_sam.files import growing_text
from grounded_sam.output.paths import OutputPath, output_path
from grounded_sam.structures.masks import coco_segmentation
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class JsonLinesSink:
    """Write a line to `results.jsonl` as soon as a frame is done, for programs that follow a run.

    A line has `file`, `frame` (its number), `time_s` (in a video), `width`, `height` and `objects`, each with `class`,
    `class_id`, `score`, `bbox` (x, y, width, height), and where they exist `track_id`, `mask_score`, `verify_score` and
    `segmentation` (COCO RLE). The file is not written under a temporary name, so that it can be read during the run; at
    an address, such as `s3://bucket/results`, it appears at the end.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        masks: Whether to write `segmentation`.
    """

    takes_address: ClassVar[bool] = True

    def __init__(self, output: OutputPath, vocabulary: Vocabulary, masks: bool = True) -> None:
        self.path, self.vocabulary, self.masks = output_path(output) / "results.jsonl", vocabulary, masks
        self._num_lines = 0
        self._file: IO[str] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> JsonLinesSink:
        return self

    def numbered_classes(self) -> Sequence[str]:
        """Return the classes in the order of their numbers."""
        return self.vocabulary.classes

    def write(self, result: FrameResult) -> None:
        """Append the line of a frame."""
        if self._file is None:
            self._file = self._stack.enter_context(growing_text(self.path))
        self._file.write(json.dumps(frame_line(result, self.masks), ensure_ascii=False) + "\n")
        self._file.flush()
        self._num_lines += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def summary(self) -> str:
        """Return the number of lines and the path of the file."""
        return f"{count_of(self._num_lines, 'line')}: {self.path}"


def frame_line(result: FrameResult, masks: bool = True) -> dict[str, Any]:
    """Return the line of a frame as a dictionary; see `JsonLinesSink` for its keys.

    Args:
        result: The frame and its detections.
        masks: Whether objects have `segmentation`.
    """
    frame, detections = result.frame, result.packed
    height, width = frame.size_hw
    line: dict[str, Any] = {"file": frame.name, "frame": frame.index, "width": width, "height": height}
    if frame.time_s is not None:
        line["time_s"] = round(frame.time_s, 6)
    line["objects"] = [_object(detections, i, masks) for i in range(len(detections))]
    return line


def _object(detections: sv.Detections, i: int, masks: bool) -> dict[str, Any]:
    """Return the entry of one detection."""
    assert detections.class_id is not None and detections.confidence is not None
    x1, y1, x2, y2 = (round(float(value), 3) for value in detections.xyxy[i])
    entry: dict[str, Any] = {
        "class": str(detections.data["class_name"][i]),
        "class_id": int(detections.class_id[i]),
        "score": round(float(detections.confidence[i]), 6),
        "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
    }
    if detections.tracker_id is not None:
        entry["track_id"] = int(detections.tracker_id[i])
    for name in ("mask_score", "verify_score"):
        if name in detections.data:
            entry[name] = round(float(detections.data[name][i]), 6)
    if masks and "rle" in detections.data:
        entry["segmentation"] = coco_segmentation(detections, i)
    return entry
