"""Masks as PNG files: one per object, or one map of classes or of tracks per image."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import supervision as sv

from grounded_sam.checks import check_choice
from grounded_sam.errors import ConfigError, count_of
from grounded_sam.files import UniqueNames, atomic_write, atomic_write_text, is_claimed, safe_filename
from grounded_sam.media.draw import davis_palette, paint_masks, save_label_map
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary

#: Number of classes that fit into 16 bits with three digits for a track.
MAX_MOTS_CLASSES = 64
#: Pixel value of DAVIS for "void", which its tools ignore.
_VOID = 255


class _TrackValues:
    """The pixel values of the tracks of a video: their ids, or free values where a format has no room for the id.

    Args:
        path: CSV file for tracks whose value is not their id.
        highest: Highest value of the format.
    """

    def __init__(self, path: Path, highest: int) -> None:
        self.path, self.highest = path, highest
        self.changed: dict[int, int] = {}  # value by id
        self._id_of: dict[int, int] = {}  # by value

    def __call__(self, track_id: int) -> int:
        """Return the value of a track, the same in all frames.

        Raises:
            ConfigError: If no value is free.
        """
        value = self.changed.get(track_id, track_id)
        if not self._is_free_for(value, track_id):
            # From 254 down, so that a palette has room for it, and small ids of later tracks stay free.
            candidates = chain(range(min(_VOID - 1, self.highest), 0, -1), range(_VOID + 1, self.highest + 1))
            free = next((v for v in candidates if v not in self._id_of), None)
            if free is None:
                raise ConfigError(f"a video has more tracks than the {self.highest - 1} that sink=masks has values for")
            value = self.changed[track_id] = free
        self._id_of[value] = track_id
        return value

    def _is_free_for(self, value: int, track_id: int) -> bool:
        return 1 <= value <= self.highest and value != _VOID and self._id_of.get(value, track_id) == track_id

    def write(self) -> None:
        """Write the values that are not ids, if there are any."""
        if self.changed:
            rows = [f"{value},{track_id}\n" for track_id, value in self.changed.items()]
            atomic_write_text(self.path, "".join(["value,track_id\n", *rows]))


#: Text in the PNG of an object's mask, which tells it from files of others.
MARK = ("Software", "grounded_sam")


class MasksSink:
    """Write PNG masks under `masks/`.

    `objects`: a folder per frame with one image per object, `<number>_<class>.png`, 255 on the object; numbers follow
    confidence. `labels`: one image per frame with class id plus 1, 0 for background, the more confident object on top
    where two overlap; with a palette up to 255 classes, 16-bit gray beyond; `legend.json` maps values to class names.
    For tracked videos, `davis`: a map of track ids per frame in the palette of DAVIS (16-bit gray from id 256 on); and
    `mots`: the 16-bit maps of MOTS, 1000 times class id plus 1, plus track id (below 1000), for up to 64 classes. A
    track whose id a format reserves (255 in DAVIS) or has no room for gets a free value, listed in `tracks.csv` of the
    video. File names of classes are encoded as `files.safe_filename` does.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        mode: `objects`, `labels`, `davis` or `mots`.

    Raises:
        ConfigError: If `mode` is none of these, or `mots` has more classes than the format has room for.
    """

    def __init__(
        self, output: Path, vocabulary: Vocabulary, mode: Literal["objects", "labels", "davis", "mots"] = "objects"
    ) -> None:
        check_choice("sink.masks.mode", mode, ("objects", "labels", "davis", "mots"))
        self.folder, self.vocabulary, self.mode = Path(output) / "masks", vocabulary, mode
        if mode == "mots" and len(vocabulary) > MAX_MOTS_CLASSES:
            raise ConfigError(
                f"sink.masks.mode=mots has room for {MAX_MOTS_CLASSES} classes, got {len(vocabulary)}; use fewer "
                "classes, or sink.masks.mode=davis"
            )
        self._names = UniqueNames()
        self._values: dict[str | None, _TrackValues] = {}  # by video
        self._num_files = 0

    def __enter__(self) -> MasksSink:
        return self

    def numbered_classes(self) -> Sequence[str]:
        """Return the classes in the order of their numbers."""
        return self.vocabulary.classes

    def write(self, result: FrameResult) -> None:
        """Write the masks of a frame.

        Raises:
            ConfigError: If there are no masks, or in the modes for tracks no track ids, or more than it has room for.
        """
        if result.detections.mask is None and len(result.detections):
            raise ConfigError("sink=masks needs masks; choose a segmenter other than none")
        if self.mode == "objects":
            self._write_objects(result)
        elif self.mode == "labels":
            self._write_class_map(result)
        else:
            self._write_track_map(result)

    def _write_objects(self, result: FrameResult) -> None:
        """Write one image per object."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        detections, folder = result.detections, self.folder / self._names(result.frame.name, "")
        _remove_earlier(folder)
        mark = PngInfo()
        mark.add_text(*MARK)
        for i, name in enumerate(detections.data.get("class_name", [])):
            assert detections.mask is not None
            with atomic_write(folder / f"{i:03d}_{safe_filename(str(name))}.png") as part:
                Image.fromarray(np.asarray(detections.mask[i], np.uint8) * 255).save(part, format="PNG", pnginfo=mark)
            self._num_files += 1

    def _write_class_map(self, result: FrameResult) -> None:
        """Write a map of class ids plus 1, and before the first one the legend."""
        palette = None
        if len(self.vocabulary) <= 255:
            colors = [sv.ColorPalette.DEFAULT.by_idx(i).as_rgb() for i in range(255)]
            palette = [0, 0, 0, *(channel for color in colors for channel in color)]
        if not self._num_files:
            legend = {0: "background"} | {i + 1: name for i, name in enumerate(self.vocabulary.classes)}
            atomic_write_text(self.folder / "legend.json", json.dumps(legend, ensure_ascii=False, indent=1))
        assert result.detections.class_id is not None
        path = self.folder / self._names(result.frame.name, ".png")
        save_label_map(path, self._paint(result, result.detections.class_id + 1), palette)
        self._num_files += 1

    def _write_track_map(self, result: FrameResult) -> None:
        """Write a map of track ids, as DAVIS or MOTS has it."""
        ids = result.detections.tracker_id
        if ids is None:
            raise ConfigError(
                f"sink.masks.mode={self.mode} needs tracks: a video as input, and a tracker other than none"
            )
        path, palette = self.folder / self._names(os.path.splitext(result.frame.name)[0], ".png"), None
        track_values = self._values.setdefault(
            result.frame.video, _TrackValues(path.parent / "tracks.csv", 999 if self.mode == "mots" else 65_535)
        )
        values = np.array([track_values(track_id) for track_id in ids.tolist()], np.int64)
        if self.mode == "mots":
            assert result.detections.class_id is not None
            values = 1000 * (result.detections.class_id + 1) + values
        label_map = self._paint(result, values)
        if self.mode == "davis" and label_map.max(initial=0) <= 255:
            palette = davis_palette()
        save_label_map(path, label_map, palette)
        self._num_files += 1

    def _paint(self, result: FrameResult, values: np.ndarray) -> np.ndarray:
        """Paint a value per detection, the more confident ones on top."""
        confidence = result.detections.confidence
        assert confidence is not None
        order = np.argsort(confidence, kind="stable").tolist()
        return paint_masks(result.detections, values, order, result.frame.size_hw)

    def own_folder(self) -> Path:
        """Return the folder of the masks."""
        return self.folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for values in self._values.values():
            values.write()

    @property
    def skipped(self) -> list[Skipped]:
        """Videos in which the value of a track is not its id."""
        return [
            Skipped(
                video or "video",
                f"the maps give {count_of(len(values.changed), 'track')} another value than its id, "
                f"which the format has no room for or reserves; see {values.path}",
            )
            for video, values in self._values.items()
            if values.changed
        ]

    def summary(self) -> str:
        """Return the number of files and the folder."""
        kinds = {"objects": "mask", "labels": "class map"}
        legend = " (values are explained in legend.json)" if self.mode == "labels" else ""
        return f"{count_of(self._num_files, kinds.get(self.mode, 'track map'))}{legend}: {self.folder}"


def _remove_earlier(folder: Path) -> None:
    """Remove the masks that an earlier use of the sink wrote into a folder, outside of runs, which list their files."""
    from PIL import Image

    if is_claimed(folder):
        return
    for old in folder.glob("[0-9][0-9][0-9]*_*.png"):
        try:
            with Image.open(old, formats=["PNG"]) as image:
                is_ours = image.info.get(MARK[0]) == MARK[1]
        except (OSError, ValueError, SyntaxError):  # not a PNG, or a damaged one
            continue
        if is_ours and not old.is_symlink():
            old.unlink()
