"""YouTube-VIS JSON: one entry per track, with its mask in every frame of its video."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write
from grounded_sam.structures.masks import coco_segmentation, mask_area
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class YoutubeVisSink:
    """`youtube_vis.json` as the YouTube-VIS (2019, 2021) and OVIS tools read it.

    `videos` list their `file_names`; an annotation is a track, with `segmentations` (COCO RLE or null),
    `bboxes` and `areas` per frame, `category_id` (of the ontology, or class id plus 1), `score` and `track_id`.
    Masks wait in a hidden file, of which only places are held.

    Args:
        output: folder of the run.
        vocabulary: of the run.
    """

    def __init__(self, output: Path, vocabulary: Vocabulary) -> None:
        self.path, self.vocabulary = Path(output) / "youtube_vis.json", vocabulary
        self.videos: dict[str, dict[str, Any]] = {}
        # (video, track) to its frames' places in the file, and the class and score last seen
        self.tracks: dict[tuple[str, int], dict[str, Any]] = {}
        self._masks: IO[bytes] | None = None

    def __enter__(self) -> YoutubeVisSink:
        return self

    def write(self, result: FrameResult) -> None:
        frame, found = result.frame, result.packed
        if found.tracker_id is None:
            raise ConfigError("sink=youtube_vis needs tracks: a video as input, and a tracker other than none")
        if self._masks is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._masks = (self.path.parent / f".{self.path.name}.masks").open("w+b")
        name = frame.video or "video"
        height, width = frame.size_hw
        video = self.videos.setdefault(
            name, {"id": len(self.videos) + 1, "width": width, "height": height, "length": 0, "file_names": []}
        )
        for i, tracker_id in enumerate(found.tracker_id.tolist()):
            assert found.class_id is not None and found.confidence is not None and "rle" in found.data
            track = self.tracks.setdefault((name, tracker_id), {"places": {}})
            track |= {"class_id": int(found.class_id[i]), "score": float(found.confidence[i])}
            x1, y1, x2, y2 = (round(float(v), 3) for v in found.xyxy[i])
            entry = {
                "rle": coco_segmentation(found, i),
                "area": mask_area(found, i),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            track["places"][video["length"]] = self._masks.tell()
            self._masks.write(json.dumps(entry).encode() + b"\n")
        video["length"] += 1
        video["file_names"].append(frame.name)

    def _annotations(self) -> Iterator[dict[str, Any]]:
        for number, ((name, tracker_id), track) in enumerate(self.tracks.items(), 1):
            video = self.videos[name]
            entries = {}
            assert self._masks is not None
            for frame, place in track["places"].items():
                self._masks.seek(place)
                entries[frame] = json.loads(self._masks.readline())
            columns: dict[str, list[Any]] = {
                key: [entries[t][one] if t in entries else None for t in range(video["length"])]
                for key, one in (("segmentations", "rle"), ("bboxes", "bbox"), ("areas", "area"))
            }
            yield {
                "id": number,
                "video_id": video["id"],
                "category_id": self.vocabulary.category_ids[track["class_id"]],
                "track_id": tracker_id,
                "score": round(track["score"], 6),
                "iscrowd": 0,
                "width": video["width"],
                "height": video["height"],
                "length": video["length"],
                **columns,
            }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self.videos:
            return
        head = {
            "info": {"description": "Made with grounded_sam"},
            "licenses": [],
            "categories": self.vocabulary.categories(),
            "videos": list(self.videos.values()),
        }
        with atomic_write(self.path) as part, part.open("w", encoding="utf-8") as out:
            out.write(json.dumps(head, ensure_ascii=False)[:-1] + ',\n"annotations": [')
            for number, annotation in enumerate(self._annotations()):
                out.write((",\n" if number else "\n") + json.dumps(annotation))
            out.write("\n]}\n")
        if self._masks is not None:
            self._masks.close()
            Path(self._masks.name).unlink()

    def summary(self) -> str:
        return f"{len(self.tracks)} tracks in {self.path}"
