"""JSON lines, one a frame, written while the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from grounded_sam.structures.masks import coco_segmentation
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class JsonLinesSink:
    """`results.jsonl`: a line per frame as soon as it is done, for programs that follow a run.

    A line has `file`, `frame` (its number), `time_s` (in a video), `width`, `height` and `objects`, each
    with `class`, `class_id`, `score`, `bbox` (x, y, width, height), and where there are any `track_id`,
    `mask_score` and `segmentation` (COCO RLE). The file grows in place, so that it can be read meanwhile.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        masks: whether to write `segmentation`.
    """

    def __init__(self, output: Path, vocabulary: Vocabulary, masks: bool = True) -> None:
        self.path, self.masks, self.count = Path(output) / "results.jsonl", masks, 0
        self._out: IO[str] | None = None

    def __enter__(self) -> JsonLinesSink:
        return self

    def write(self, result: FrameResult) -> None:
        if self._out is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._out = self.path.open("w", encoding="utf-8")
        frame, found = result.frame, result.packed
        height, width = frame.size_hw
        line: dict[str, Any] = {"file": frame.name, "frame": frame.index, "width": width, "height": height}
        if frame.time_s is not None:
            line["time_s"] = round(frame.time_s, 6)
        line["objects"] = [self._object(found, i) for i in range(len(found))]
        self._out.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._out.flush()
        self.count += 1

    def _object(self, found: Any, i: int) -> dict[str, Any]:
        x1, y1, x2, y2 = (round(float(v), 3) for v in found.xyxy[i])
        entry: dict[str, Any] = {
            "class": str(found.data["class_name"][i]),
            "class_id": int(found.class_id[i]),
            "score": round(float(found.confidence[i]), 6),
            "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
        }
        if found.tracker_id is not None:
            entry["track_id"] = int(found.tracker_id[i])
        if "mask_score" in found.data:
            entry["mask_score"] = round(float(found.data["mask_score"][i]), 6)
        if self.masks and "rle" in found.data:
            entry["segmentation"] = coco_segmentation(found, i)
        return entry

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._out is not None:
            self._out.close()

    def summary(self) -> str:
        return f"{self.count} lines in {self.path}"
