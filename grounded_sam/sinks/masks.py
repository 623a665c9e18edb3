"""Masks as PNG files: one per object, or one map of classes per image."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.sinks.files import Names, safe_part, written_whole
from grounded_sam.stages import FrameResult
from grounded_sam.vocabulary import Vocabulary


class Masks:
    """PNG masks under `masks/`.

    With `mode: objects` a folder per frame with one picture per object, `<number>_<class>.png`, 255 on
    the object; numbers follow confidence. With `mode: labels` one picture per frame whose pixels are
    class id plus 1, 0 for background, the more confident object on top where two overlap; in colours
    (a palette) up to 255 classes, as 16-bit gray beyond; and one `legend.json` that maps values to
    class names.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        mode: `objects` or `labels`.
    """

    def __init__(self, output: Path, vocabulary: Vocabulary, mode: Literal["objects", "labels"] = "objects") -> None:
        if mode not in ("objects", "labels"):
            raise ConfigError(f"sink.masks.mode must be objects or labels, got {mode!r}")
        self.folder = Path(output) / "masks"
        self.vocabulary, self.mode = vocabulary, mode
        self.names, self.count = Names(), 0

    def __enter__(self) -> Masks:
        return self

    def write(self, result: FrameResult) -> None:
        found = result.detections
        if found.mask is None and len(found):
            raise ConfigError("sink=masks needs masks; choose a segmenter other than none")
        if self.mode == "objects":
            self._objects(result)
        else:
            self._labels(result)

    def _objects(self, result: FrameResult) -> None:
        from PIL import Image

        found, folder = result.detections, self.folder / self.names(result.frame.name, "")
        for old in folder.glob("[0-9][0-9][0-9]*_*.png"):  # of an earlier run into the same place
            old.unlink()
        for i, name in enumerate(found.data.get("class_name", [])):
            assert found.mask is not None
            with written_whole(folder / f"{i:03d}_{safe_part(str(name))}.png") as part:
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
            with written_whole(self.folder / "legend.json") as part:
                legend = {0: "background"} | {i + 1: name for i, name in enumerate(self.vocabulary.classes)}
                part.write_text(json.dumps(legend, ensure_ascii=False, indent=1), encoding="utf-8")
        with written_whole(self.folder / self.names(result.frame.name, ".png")) as part:
            picture.save(part, format="PNG")
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def summary(self) -> str:
        what = "masks" if self.mode == "objects" else "label maps (legend.json says what the values mean)"
        return f"{self.count} {what} in {self.folder}"
