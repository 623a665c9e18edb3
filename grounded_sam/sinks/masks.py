"""Masks as PNG files: one per object, or one map of classes or of tracks per image."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.files import UniqueNames, atomic_write, safe_filename
from grounded_sam.media.draw import davis_palette
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class MasksSink:
    """PNG masks under `masks/`.

    With `mode: objects` a folder per frame with one picture per object, `<number>_<class>.png`, 255 on
    the object; numbers follow confidence. With `mode: labels` one picture per frame whose pixels are
    class id plus 1, 0 for background, the more confident object on top where two overlap; in colours
    (a palette) up to 255 classes, as 16-bit gray beyond; and one `legend.json` that maps values to
    class names. Of tracked videos, `mode: davis` gives a map of track ids per frame in DAVIS's palette
    (16-bit gray from id 256 on) and `mode: mots` the 16-bit maps of MOTS, 1000 times class id plus 1,
    plus track id (below 1000).

    Args:
        output: folder of the run.
        vocabulary: of the run.
        mode: `objects`, `labels`, `davis` or `mots`.
    """

    def __init__(
        self, output: Path, vocabulary: Vocabulary, mode: Literal["objects", "labels", "davis", "mots"] = "objects"
    ) -> None:
        if mode not in ("objects", "labels", "davis", "mots"):
            raise ConfigError(f"sink.masks.mode must be objects, labels, davis or mots, got {mode!r}")
        self.folder = Path(output) / "masks"
        self.vocabulary, self.mode = vocabulary, mode
        self.names, self.count = UniqueNames(), 0

    def __enter__(self) -> MasksSink:
        return self

    def write(self, result: FrameResult) -> None:
        found = result.detections
        if found.mask is None and len(found):
            raise ConfigError("sink=masks needs masks; choose a segmenter other than none")
        if self.mode == "objects":
            self._objects(result)
        elif self.mode == "labels":
            self._labels(result)
        else:
            self._tracks(result)

    def _objects(self, result: FrameResult) -> None:
        from PIL import Image

        found, folder = result.detections, self.folder / self.names(result.frame.name, "")
        for old in folder.glob("[0-9][0-9][0-9]*_*.png"):  # of an earlier run into the same place
            old.unlink()
        for i, name in enumerate(found.data.get("class_name", [])):
            assert found.mask is not None
            with atomic_write(folder / f"{i:03d}_{safe_filename(str(name))}.png") as part:
                Image.fromarray(np.asarray(found.mask[i], np.uint8) * 255).save(part, format="PNG")
            self.count += 1

    def _labels(self, result: FrameResult) -> None:
        from PIL import Image

        found = result.detections
        few = len(self.vocabulary) <= 255
        values = np.zeros(result.frame.size_hw, np.uint8 if few else np.uint16)
        for i in np.argsort(found.confidence, kind="stable") if found.confidence is not None else ():
            assert found.mask is not None and found.class_id is not None
            values[np.asarray(found.mask[i], bool)] = found.class_id[i] + 1
        picture = Image.fromarray(values)
        if few:
            colours = [sv.ColorPalette.DEFAULT.by_idx(i).as_rgb() for i in range(255)]
            picture.putpalette([0, 0, 0, *(channel for colour in colours for channel in colour)])
        if not self.count:
            with atomic_write(self.folder / "legend.json") as part:
                legend = {0: "background"} | {i + 1: name for i, name in enumerate(self.vocabulary.classes)}
                part.write_text(json.dumps(legend, ensure_ascii=False, indent=1), encoding="utf-8")
        with atomic_write(self.folder / self.names(result.frame.name, ".png")) as part:
            picture.save(part, format="PNG")
        self.count += 1

    def _tracks(self, result: FrameResult) -> None:
        from PIL import Image

        found = result.detections
        if found.tracker_id is None:
            raise ConfigError(
                f"sink.masks.mode={self.mode} needs tracks: a video as input, and a tracker other than none"
            )
        values = np.zeros(result.frame.size_hw, np.uint16)
        assert found.confidence is not None and found.class_id is not None
        for i in np.argsort(found.confidence, kind="stable"):
            assert found.mask is not None
            number = int(found.tracker_id[i])
            if self.mode == "mots" and number > 999:
                raise ConfigError(f"sink.masks.mode=mots holds track ids up to 999, but there is track {number}")
            ahead = 1000 * (int(found.class_id[i]) + 1) if self.mode == "mots" else 0
            values[np.asarray(found.mask[i], bool)] = ahead + number
        few = self.mode == "davis" and values.max(initial=0) <= 255
        picture = Image.fromarray(values.astype(np.uint8) if few else values)
        if few:
            picture.putpalette(davis_palette())
        with atomic_write(self.folder / self.names(Path(result.frame.name).with_suffix("").as_posix(), ".png")) as part:
            picture.save(part, format="PNG")
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def summary(self) -> str:
        maps = {"objects": "masks", "labels": "label maps (legend.json says what the values mean)"}
        what = maps.get(self.mode, "maps of tracks")
        return f"{self.count} {what} in {self.folder}"
