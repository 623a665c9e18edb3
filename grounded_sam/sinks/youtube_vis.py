"""YouTube-VIS JSON: one entry per track, with its mask in every frame of its video."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from grounded_sam.errors import ConfigError, count_of
from grounded_sam.files import atomic_write
from grounded_sam.output.claim import check_output
from grounded_sam.sinks.coco import json_header
from grounded_sam.structures.masks import coco_segmentation, mask_area
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


@dataclass
class _Video:
    """An entry of `videos`, with the keys of the format."""

    id: int
    width: int
    height: int
    length: int = 0
    file_names: list[str] = field(default_factory=list)


@dataclass
class _Track:
    """A track, whose masks are in the temporary file.

    Attributes:
        class_id: Class in its last frame so far.
        score: Confidence there.
        offsets: By position in the video, the offset of the frame's line in the temporary file.
    """

    class_id: int
    score: float
    offsets: dict[int, int] = field(default_factory=dict)


class YoutubeVisSink:
    """Write `youtube_vis.json` as the tools of YouTube-VIS (2019, 2021) and OVIS read it.

    `videos` list their `file_names`; an annotation is a track, with `segmentations` (COCO RLE or null), `bboxes` and
    `areas` per frame, `category_id` (of the ontology, or class id plus 1), `score` and `track_id`. Masks go to a
    temporary file during the run, so that they are not kept in memory.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
    """

    def __init__(self, output: Path, vocabulary: Vocabulary) -> None:
        self.path, self.vocabulary = Path(output) / "youtube_vis.json", vocabulary
        self._videos: dict[str, _Video] = {}
        self._tracks: dict[tuple[str, int], _Track] = {}  # by name of the video and tracker id
        self._lines: IO[bytes] | None = None

    def __enter__(self) -> YoutubeVisSink:
        check_output(self.path)
        return self

    def numbered_classes(self) -> Sequence[str]:
        """Return the classes in the order of their numbers."""
        return self.vocabulary.classes

    def write(self, result: FrameResult) -> None:
        """Write the objects of a frame.

        Raises:
            ConfigError: If they have no track ids.
        """
        frame, detections = result.frame, result.packed
        if detections.tracker_id is None:
            raise ConfigError("sink=youtube_vis needs tracks: a video as input, and a tracker other than none")
        if self._lines is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without a name, so that nothing is left when the process is killed.
            self._lines = tempfile.TemporaryFile("w+b", dir=self.path.parent)  # noqa: SIM115
        name = frame.video or "video"
        height, width = frame.size_hw
        video = self._videos.setdefault(name, _Video(len(self._videos) + 1, width, height))
        for i, tracker_id in enumerate(detections.tracker_id.tolist()):
            assert detections.class_id is not None and detections.confidence is not None and "rle" in detections.data
            class_id, score = int(detections.class_id[i]), float(detections.confidence[i])
            track = self._tracks.setdefault((name, tracker_id), _Track(class_id, score))
            track.class_id, track.score = class_id, score
            x1, y1, x2, y2 = (round(float(value), 3) for value in detections.xyxy[i])
            entry = {
                "segmentations": coco_segmentation(detections, i),
                "bboxes": [x1, y1, x2 - x1, y2 - y1],
                "areas": mask_area(detections, i),
            }
            track.offsets[video.length] = self._lines.tell()
            self._lines.write(json.dumps(entry).encode() + b"\n")
        video.length += 1
        video.file_names.append(frame.name)

    def _annotations(self) -> Iterator[dict[str, Any]]:
        """Yield the entry of each track."""
        for annotation_id, ((name, tracker_id), track) in enumerate(self._tracks.items(), 1):
            video = self._videos[name]
            entries = {}
            assert self._lines is not None
            for position, offset in track.offsets.items():
                self._lines.seek(offset)
                entries[position] = json.loads(self._lines.readline())
            yield {
                "id": annotation_id,
                "video_id": video.id,
                "category_id": self.vocabulary.category_ids[track.class_id],
                "track_id": tracker_id,
                "score": round(track.score, 6),
                "iscrowd": 0,
                "width": video.width,
                "height": video.height,
                "length": video.length,
                **{
                    key: [entries[position][key] if position in entries else None for position in range(video.length)]
                    for key in ("segmentations", "bboxes", "areas")
                },
            }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._videos:
            return
        header = json_header(self.vocabulary, videos=[asdict(video) for video in self._videos.values()])
        with atomic_write(self.path) as part, part.open("w", encoding="utf-8") as out:
            out.write(header + ',\n"annotations": [')
            for number, annotation in enumerate(self._annotations()):
                out.write((",\n" if number else "\n") + json.dumps(annotation))
            out.write("\n]}\n")
        if self._lines is not None:
            self._lines.close()

    def summary(self) -> str:
        """Return the number of tracks and the path of the file."""
        return f"{count_of(len(self._tracks), 'track')} in {count_of(len(self._videos), 'video')}: {self.path}"
