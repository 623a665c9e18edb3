"""Mistakes: counting them, and pictures of where the most are."""

from __future__ import annotations

import heapq
import io
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.files import UniqueNames, atomic_write
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import pack_masks, unpack_masks
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: No goal of a sweep.
LESS_IS_BETTER = ("missed", "false", "IDSW", "Frag")


class WorstImages:
    """The images with the most mistakes, drawn at the end.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self.most, self._count = most, itertools.count()
        self._kept: list[tuple[int, int, str, Any]] = []  # mistakes, order, name, JPEG or what makes it

    def offer(self, result: FrameResult, missed: sv.Detections, false: sv.Detections) -> None:
        """Keep an image if it is among the worst so far."""
        wrong = len(missed) + len(false)
        if not wrong or not self.most or (len(self._kept) == self.most and wrong <= self._kept[0][0]):
            return
        frame = replace(result.frame, found=None)
        shown: Any = (frame, pack_masks(missed), pack_masks(false))
        if not callable(frame.pixels):  # drawn now, since pixels cannot be held; later if they can be read
            shown = _draw(*shown)
        place = heapq.heappush if len(self._kept) < self.most else heapq.heapreplace
        place(self._kept, (wrong, -next(self._count), result.frame.name, shown))

    def write(self, folder: Path) -> None:
        """Write the pictures as JPEG files."""
        files = UniqueNames()
        for _, _, name, shown in sorted(self._kept, reverse=True):
            picture = _draw(*shown) if isinstance(shown, tuple) else shown
            if picture is None:
                continue
            with atomic_write(folder / files(name, ".jpg")) as beside:
                beside.write_bytes(picture)
        self._kept.clear()


def _draw(frame: Frame, missed: sv.Detections, false: sv.Detections) -> bytes | None:
    """Missed labels in blue and false detections in red, as JPEG; None if the pixels are gone."""
    from PIL import Image

    from grounded_sam.media.draw import font

    try:
        scene = frame.image[..., ::-1].copy()
    except ImageError:
        return None
    size = int(np.clip(min(scene.shape[:2]) / 32, 9, 72))  # as in overlays
    for part, colour, word in ((missed, sv.Color.BLUE, "missed"), (false, sv.Color.RED, "false")):
        if not len(part):
            continue
        masks = unpack_masks(part, scene.shape[:2]).mask
        shown = sv.Detections(xyxy=part.xyxy, mask=masks, class_id=part.class_id)
        if shown.mask is not None:
            scene = sv.MaskAnnotator(colour, opacity=0.4).annotate(scene, shown)
        scene = sv.BoxAnnotator(colour).annotate(scene, shown)
        texts = [f"{word}: {name}" for name in part.data["class_name"]]
        scene = sv.RichLabelAnnotator(colour, font_path=font(), font_size=size, smart_position=True).annotate(
            scene, shown, texts
        )
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(scene[..., ::-1])).save(out, format="JPEG", quality=88)
    return out.getvalue()


def precision_recall(matched: int, missed: int, false: int) -> dict[str, Any]:
    """Precision, recall and F1 with their counts; -1 where nothing could be found or was."""
    precision = matched / (matched + false) if matched + false else -1.0
    recall = matched / (matched + missed) if matched + missed else -1.0
    f1 = 2 * matched / (2 * matched + missed + false) if matched + missed + false else -1.0
    return {"matched": matched, "missed": missed, "false": false, "precision": precision, "recall": recall, "f1": f1}


def metric_value(values: Mapping[str, Any], path: str, known: str) -> float:
    """The number at a place in `metrics.json`, `segm.AP`.

    Raises:
        ConfigError: if there is none, saying what is known.
    """
    node = _at(values, path.split("."))
    if not isinstance(node, int | float):
        raise ConfigError(f"there is no metric {path}; there are {known}")
    if path.rpartition(".")[2] in LESS_IS_BETTER or path.endswith("_decay"):
        raise ConfigError(f"of {path} less is better, and a sweep goes by what is highest; there are {known}")
    return float(node)


def _at(node: Any, parts: list[str]) -> Any:
    """What is at a path of keys, which may have dots themselves."""
    if not parts:
        return node
    for end in range(len(parts), 0, -1):
        key = ".".join(parts[:end])
        if isinstance(node, Mapping) and key in node:
            return _at(node[key], parts[end:])
    return None


def check_classes(asked: Vocabulary, labelled: Vocabulary, path: Path) -> None:
    """Raises ConfigError, with both sides, if a class that is asked for has no labels."""
    missing = [name for name in asked.classes if name not in labelled.classes]
    if missing:
        raise ConfigError(
            f"{path} has no {', '.join(map(repr, missing))}; it has the classes "
            f"{', '.join(map(repr, labelled.classes))}, asked for are {', '.join(map(repr, asked.classes))}"
        )
