"""What is found in an image or video, as a prediction of Label Studio in the controls of its project."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import supervision as sv
from pycocotools import mask as coco_mask

from grounded_sam.errors import ConfigError
from grounded_sam.formats.label_studio import region_value
from grounded_sam.formats.label_studio_config import ControlTag, LabelingConfig, LabelTag, ObjectTag
from grounded_sam.formats.label_studio_video import VideoTrack, track_regions
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.serve.vocabularies import read_vocabulary
from grounded_sam.structures.vocabulary import Vocabulary

#: Largest distance in pixels of polygons from the outline of a mask; exact ones have a corner at every pixel.
TOLERANCE = 0.5


@dataclass(frozen=True)
class Targets:
    """Where the objects of each class go.

    Attributes:
        by_class: Control and label by class.
        words: Free words, which are classes too.
    """

    by_class: Mapping[str, tuple[ControlTag, LabelTag]]
    words: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        config: LabelingConfig,
        obj: ObjectTag,
        words: Sequence[str] = (),
        label: str | None = None,
        only_words: bool = False,
    ) -> Targets:
        """Return the targets of an image or video.

        Args:
            config: The config of the project.
            obj: Which of its images or videos.
            words: Words that somebody wrote; those that are the name of a label have it.
            label: Label of the other words; None for the first.
            only_words: Whether the labels are not looked for.

        Raises:
            ConfigError: If there is no control with labels for it.
        """
        outputs = config.outputs(obj)
        if not outputs:
            tags = (
                "VideoRectangle and Labels" if obj.kind == "video" else "BrushLabels, PolygonLabels or RectangleLabels"
            )
            raise ConfigError(f"the labeling config has no labels for {obj.name}; it needs {tags}")
        known = {target[1].name: target for target in outputs.values()} | outputs
        other = outputs.get(label or "", next(iter(outputs.values())))
        named = {value for value, (_, tag) in outputs.items() if not only_words or {value, tag.name} & set(words)}
        free = [word for word in words if word not in known]
        classes = {value: outputs[value] for value in outputs if value in named} | dict.fromkeys(free, other)
        return cls(classes, frozenset(free))

    def vocabulary(self, pipeline: Pipeline) -> Vocabulary:
        """Return the classes to look for: the phrases of an alias, or those that the server has for a class.

        Args:
            pipeline: The models, with the classes of the server.

        Raises:
            VocabularyError: If two classes have a phrase in common.
        """
        classes: dict[str, dict[str, Any]] = {}
        for name, (_, label) in self.by_class.items():
            phrases, score = label.phrases if name not in self.words else (name,), None
            own = pipeline.vocabulary
            if label.alias is None and own is not None and (i := own.index(name)) is not None:
                phrases, score = own.phrases[i], own.class_score.get(own.classes[i])
            classes[name] = {"phrases": list(phrases), **({} if score is None else {"score": score})}
        return read_vocabulary(pipeline, {"classes": classes})

    def image_regions(
        self, found: sv.Detections, rows: Iterable[int], size_hw: tuple[int, int]
    ) -> list[dict[str, Any]]:
        """Return the regions of detections in an image.

        Args:
            found: Detections, with masks as RLE or without.
            rows: Which of them.
            size_hw: Height and width of the image.
        """
        regions = []
        for i in rows:
            name = str(found.data["class_name"][i])
            control, label = self.by_class[name]
            score = None if found.confidence is None else round(float(found.confidence[i]), 6)
            box, rle = found.xyxy[i].tolist(), found.data["rle"][i] if "rle" in found.data else None
            meta = {"meta": {"text": [name]}} if name in self.words else {}
            regions += [{**r, **meta} for r in image_region(control, label, box, rle, size_hw, score)]
        return regions

    def video_regions(
        self, tracks: Mapping[int, VideoTrack], obj: ObjectTag, size_hw: tuple[int, int], fps: float, frame_count: int
    ) -> list[dict[str, Any]]:
        """Return the regions of the tracks of a video, see `label_studio_video.track_regions`."""
        regions = []
        for number, track in sorted(tracks.items()):
            control, label = self.by_class[track.class_name]
            track.class_name = label.name
            regions += track_regions({number: track}, control.name, obj.name, size_hw, fps, frame_count)
        return regions


def image_region(
    control: ControlTag,
    label: LabelTag,
    box: Sequence[float],
    rle: Any,
    size_hw: tuple[int, int],
    score: float | None,
) -> list[dict[str, Any]]:
    """Return the results that make a region: one, or two where the labels are those of a `Labels` tag.

    Args:
        control: Where it goes.
        label: Its label.
        box: xyxy in pixels.
        rle: Its mask as COCO RLE; None if there is none: the box is the mask then.
        size_hw: Height and width of the image.
        score: Its confidence.
    """
    height, width = size_hw
    mask = None
    if control.kind != "rectangle":
        if rle is not None:
            mask = np.asarray(coco_mask.decode(rle), bool)
        else:
            mask = np.zeros(size_hw, bool)
            x1, y1, x2, y2 = (round(value) for value in box)
            mask[max(y1, 0) : y2, max(x1, 0) : x2] = True
    value = region_value(control.kind, box, mask, size_hw, TOLERANCE)
    if value is None:
        return []
    region = {
        "id": uuid.uuid4().hex[:10],
        "from_name": control.name,
        "to_name": control.to_name,
        "type": control.type,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        **({} if score is None else {"score": score}),
    }
    if control.labels_name is None:
        return [{**region, "value": {**value, control.type: [label.name]}}]
    labels = {**region, "from_name": control.labels_name, "type": "labels", "value": {**value, "labels": [label.name]}}
    return [{**region, "value": value}, labels]


def prediction(regions: list[dict[str, Any]], version: str) -> dict[str, Any]:
    """Return a prediction, whose score is the mean of its regions.

    >>> prediction([{"score": 0.5}, {"score": 1.0}], "1")["score"]
    0.75
    """
    scores = [region["score"] for region in regions if "score" in region]
    mean = round(float(np.mean(scores)), 6) if scores else 0.0
    return {"result": regions, "score": mean, "model_version": version}
