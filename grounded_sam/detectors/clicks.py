"""Prompts by hand instead of text: points, boxes and masks, each with a class name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.media.images import read_image
from grounded_sam.structures.clicks import Click, read_click, read_json_entries
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.vocabulary import Vocabulary


class ClickDetector:
    """A detector that finds what a person pointed at, for a segmenter to cut out.

    Args:
        prompts: a list of entries, or a JSON file of one. An entry has `class` (a name), one or more
            of `points` (`[[x, y], ...]` in pixels, with `labels` 1 on the object or 0 beside it, all 1
            if left out), `box` (`[x1, y1, x2, y2]`) and `mask` (a picture of the image's size, white
            on the object, or in Python an array `(H, W) bool`; a relative path is relative to the JSON
            file), and may have `image` (a name as in the output, or its end); without it the entry holds
            for every picture. In a video an entry holds for its `frame` (number in the video, from 0) or
            its `image`, without either for the first frame; `object` is the id that it begins or, on a
            later frame, corrects, by default a new one.

    Raises:
        ConfigError: if the file cannot be read or an entry is wrong, naming the entry.
    """

    def __init__(self, prompts: str | Sequence[Mapping[str, Any]] | None) -> None:
        if not prompts:
            raise ConfigError(
                "detector.prompts is missing: give a JSON file or entries, "
                "e.g. 'detector.prompts=[{class: car, points: [[300, 200]]}]'"
            )
        folder = Path()
        if isinstance(prompts, str):
            path = Path(prompts).expanduser()
            folder, prompts = path.parent, read_json_entries(path, "detector.prompts")
        self.clicks = [read_click(entry, f"detector.prompts[{i}]", folder) for i, entry in enumerate(prompts)]
        self.vocabulary = Vocabulary.parse([click.name for click in self.clicks])
        self.ids = sorted({click.object for click in self.clicks if click.object is not None})

    def detect(self, frames: Sequence[Frame], vocabulary: Vocabulary) -> list[sv.Detections]:
        """The clicks of each frame, with confidence 1, as columns that segmenters read.

        Raises:
            ImageError: if a click does not lie in its frame, or a mask is not of its size.
        """
        return [self.prompts(self._named(frame), frame, vocabulary) for frame in frames]

    def _named(self, frame: Frame) -> list[Click]:
        return [click for click in self.clicks if click.holds_for(frame)]

    def on(self, frame: Frame, number: int) -> list[Click]:
        """The clicks that hold for a frame of a video, which is the `number`th that is looked at."""
        return [
            click
            for click in self._named(frame)
            if (number == 0 if click.frame is None and click.image is None else click.frame in (None, frame.index))
        ]

    def prompts(self, here: Sequence[Click], frame: Frame, vocabulary: Vocabulary) -> sv.Detections:
        """Some of the clicks as detections of a frame, with confidence 1, as columns that models read.

        Raises:
            ConfigError: if one names a class that the vocabulary has not; ImageError: see `detect`.
        """
        unknown = sorted({click.name for click in self.clicks} - set(vocabulary.classes))
        if unknown:
            raise ConfigError(
                f"clicks name the classes {', '.join(map(repr, unknown))}, which text has not; "
                f"it has {', '.join(map(repr, vocabulary.classes))}"
            )
        if not here:
            return empty_detections(vocabulary)
        height, width = frame.size_hw
        columns: dict[str, NDArray[Any]] = {
            key: np.full(len(here), None, object) for key in ("points", "labels", "prompt_mask")
        }
        columns["prompt_box"] = np.array([click.box is not None for click in here])
        boxes = np.zeros((len(here), 4), np.float32)
        for i, click in enumerate(here):
            if click.mask is not None:
                given = click.mask
                mask = given if isinstance(given, np.ndarray) else read_image(given)[..., 0] > 127
                if mask.shape != (height, width):
                    raise ImageError(
                        f"mask {'' if isinstance(given, np.ndarray) else given} is {mask.shape[1]}x{mask.shape[0]} px, "
                        f"but {frame.name} is {width}x{height} px"
                    )
                columns["prompt_mask"][i] = mask
                boxes[i] = masks_to_xyxy(mask[None])[0]
            if click.points is not None and click.labels is not None:
                if (click.points < 0).any() or (click.points >= [width, height]).any():
                    raise ImageError(
                        f"points {click.points.tolist()} lie outside {frame.name}, which is {width}x{height} px"
                    )
                columns["points"][i], columns["labels"][i] = click.points, click.labels
                on = click.points[click.labels == 1] if click.labels.any() else click.points
                boxes[i] = [*on.min(0), *(on.max(0) + 1)]
            if click.box is not None:
                boxes[i] = click.box
                if click.box[0] >= width or click.box[1] >= height or click.box[2] <= 0 or click.box[3] <= 0:
                    raise ImageError(
                        f"box {click.box.tolist()} lies outside {frame.name}, which is {width}x{height} px"
                    )
        ids = [vocabulary.classes.index(click.name) for click in here]
        return make_detections(boxes, np.ones(len(here)), ids, vocabulary, frame.size_hw, **columns)
