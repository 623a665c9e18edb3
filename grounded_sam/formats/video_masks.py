"""Masks of objects through videos that exist already: DAVIS folders, SA-V's JSON, YouTube-VIS JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.formats.coco import decode_segmentation, read_json, wrong_segmentation
from grounded_sam.media.files import natural_key
from grounded_sam.media.images import MAX_PIXELS, no_pillow_limit, safe_formats
from grounded_sam.structures.vocabulary import Vocabulary

Mask = NDArray[np.bool_]


def frame_key(name: str) -> int | str:
    """What tells frames of one video apart: the number that a name ends in, `clip.mp4/000012` or `00012.jpg`."""
    stem = PurePosixPath(name).stem
    return int(stem) if stem.isdecimal() else stem


@dataclass(frozen=True)
class LabelledVideo:
    """The labelled frames of one video.

    Attributes:
        name: of the video.
        size_hw: height and width in pixels.
        frames: keys of its labelled frames in order, see `frame_key`.
        read: of a key the masks `(H, W) bool` of the objects that are in that frame, by number; an object without
            a pixel is not in it.
        classes: name of each object's class, by number; None where the labels have none.
        names: of frames whose labels have names, those, without suffix.
    """

    name: str
    size_hw: tuple[int, int]
    frames: list[int | str]
    read: Callable[[int | str], dict[int, Mask]]
    classes: dict[int, str] | None = None
    names: dict[int | str, str] | None = None


class LabelledVideos:
    """Labelled videos by name.

    What is read: a folder of DAVIS (`Annotations/480p/VIDEO/00000.png`, or any part of that path; pixels are
    numbers of objects, 0 is none, 255 beside others is void), the same with a folder per object
    (`VIDEO/OBJECT/00000.png`, as SA-V's sets for evaluation are), one or a folder of SA-V's `*_manual.json` and
    `*_auto.json` (where both are there, by hand), YouTube-VIS JSON. Masks are decoded when they are asked for.

    Args:
        path: of the file or folder.
        content: of the file, where it has been read.

    Attributes:
        videos: by name.
        vocabulary: the categories of YouTube-VIS; None where objects have no class.

    Raises:
        ConfigError: if it is none of these, or damaged, naming the file.
    """

    def __init__(self, path: Path, content: Any = None) -> None:
        self.path = path
        self.vocabulary: Vocabulary | None = None
        self.videos: dict[str, LabelledVideo] = {}
        if path.is_file():
            self._file(path, read_json(path) if content is None else content)
        elif files := sorted(path.glob("*.json"), key=lambda p: natural_key(p.name)):
            for file in files:
                # SA-V has both; those by hand count.
                if not (file.stem.endswith("_auto") and file.with_stem(f"{file.stem[:-5]}_manual") in files):
                    self._file(file, read_json(file))
        else:
            self._folders(path)
        if not self.videos:
            raise ConfigError(
                f"no labels in {path}: expected a YOLO dataset (data.yaml), Pascal VOC (.xml), folders of maps as "
                "DAVIS has them (.png), SA-V's JSON or YouTube-VIS JSON"
            )

    def find(self, video: str) -> LabelledVideo | None:
        """The labels of a video of a run, whose name may have a suffix and folders that the labels leave out."""
        names = (video, PurePosixPath(video).name, PurePosixPath(video).stem)
        return next((self.videos[name] for name in names if name in self.videos), None)

    def _add(self, one: LabelledVideo) -> None:
        if one.name in self.videos:
            raise ConfigError(f"{self.path}: the video {one.name} is there twice")
        self.videos[one.name] = one

    def _file(self, path: Path, content: Any) -> None:
        if isinstance(content, Mapping) and "masklet" in content:
            self._sav(path, content)
        elif isinstance(content, Mapping) and "videos" in content:
            self._youtube_vis(path, content)
        else:
            raise ConfigError(f"{path}: expected masklet, as SA-V has it, or videos, as YouTube-VIS has them")

    def _sav(self, path: Path, content: Mapping[str, Any]) -> None:
        """SA-V (Ravi et al. 2024): `masklet[frame][object]` as RLE, of every so-manieth frame of the video."""
        rows = content["masklet"]
        try:
            first = next(one for row in rows for one in row if one is not None)
            height, width = (int(side) for side in first["size"])
            numbers = [int(number) for number in content.get("masklet_id") or range(len(rows[0]))]
            step = max(1, round(float(content.get("video_frame_count") or len(rows)) / len(rows)))
            odd = next((i for i, row in enumerate(rows) if len(row) != len(numbers)), None)
            if odd is not None:
                raise ValueError(f"frame {odd} has {len(rows[odd])} objects, masklet_id names {len(numbers)}")
        except (StopIteration, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: not annotations of SA-V ({type(error).__name__}: {error})") from error
        place = {i * step: row for i, row in enumerate(rows)}

        def read(key: int | str) -> dict[int, Mask]:
            row = dict(zip(numbers, place[key], strict=True))  # type: ignore[index]
            return _decoded(row, (height, width), f"{path}: frame {key}")

        name = str(content.get("video_id") or path.stem.removesuffix("_manual").removesuffix("_auto"))
        self._add(LabelledVideo(name, (height, width), list(place), read))

    def _youtube_vis(self, path: Path, content: Mapping[str, Any]) -> None:
        """YouTube-VIS (Yang et al. 2019): per track `segmentations`, one entry or null for each frame."""
        for key in ("videos", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                raise ConfigError(f"{path}: expected a list under {key!r}, as YouTube-VIS has it")
        self.vocabulary = Vocabulary.of_categories(content["categories"], str(path))
        names = dict(zip(self.vocabulary.category_ids, self.vocabulary.classes, strict=True))
        try:
            for video in content["videos"]:
                files = [str(name) for name in video["file_names"]]
                keys = [frame_key(name) for name in files]
                home = str(PurePosixPath(files[0]).parent) if files else ""
                name = home if home not in ("", ".") else str(video.get("name") or video["id"])
                tracks = [a for a in content["annotations"] if a["video_id"] == video["id"]]
                if len(set(keys)) < len(keys):
                    raise ConfigError(f"{path}: the video {name} has frames of one name")
                numbers = [int(a.get("track_id", a["id"])) for a in tracks]
                classes = {n: names[a["category_id"]] for n, a in zip(numbers, tracks, strict=True)}
                size_hw = (int(video["height"]), int(video["width"]))
                columns = {n: a["segmentations"] for n, a in zip(numbers, tracks, strict=True)}
                for number, column in columns.items():
                    if len(column) != len(keys):
                        raise ValueError(f"track {number} of {name} has {len(column)} frames, not {len(keys)}")
                read = _Columns(columns, keys, size_hw, f"{path}: video {name}")
                stems = {key: PurePosixPath(file).stem for key, file in zip(keys, files, strict=True)}
                self._add(LabelledVideo(name, size_hw, keys, read, classes, stems))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: not YouTube-VIS ({type(error).__name__}: {error})") from error

    def _folders(self, path: Path) -> None:
        """DAVIS (Perazzi et al. 2016, Pont-Tuset et al. 2017): a folder of PNG maps for each video."""
        root = path / "Annotations" if (path / "Annotations").is_dir() else path
        root = next((root / name for name in ("480p", "Full-Resolution") if (root / name).is_dir()), root)
        maps = glob("**/*.png", root_dir=root, recursive=True)  # which follows links, as pathlib does not
        homes = sorted({(root / name).parent for name in maps}, key=lambda p: natural_key(p.as_posix()))
        groups: dict[Path, list[Path]] = {}
        # Right in the root these may also be videos with numbers for names.
        firsts = [min(home.glob("*.png")) for home in homes if home.parent == root]
        one_each = all(len(np.unique(_map(file))) <= 2 for file in firsts)
        for home in homes:  # a folder per object, if all folders beside it are numbers
            single = home != root and home.name.isdecimal() and all(p.name.isdecimal() for p in home.parent.iterdir())
            single = single and (home.parent != root or one_each)
            groups.setdefault(home.parent if single else home, []).append(home)
        for video, folders in groups.items():
            objects = {int(f.name): f for f in folders} if folders != [video] else {0: video}
            files = {o: {frame_key(f.name): f for f in folder.glob("*.png")} for o, folder in objects.items()}
            every = {key: file for place in files.values() for key, file in place.items()}
            keys = sorted(every, key=lambda key: (isinstance(key, str), key))
            name = video.name if video == root else video.relative_to(root).as_posix()
            height, width = _map(every[keys[0]]).shape
            read = _Maps(files, folders != [video], (height, width))
            stems = {key: file.stem for key, file in every.items()}
            self._add(LabelledVideo(name, (height, width), keys, read, names=stems))


class _Columns:
    """Masks of the tracks of YouTube-VIS in one frame."""

    def __init__(
        self, columns: dict[int, list[Any]], keys: list[int | str], size_hw: tuple[int, int], about: str
    ) -> None:
        self.columns, self.size_hw, self.about = columns, size_hw, about
        self.place = {key: i for i, key in enumerate(keys)}

    def __call__(self, key: int | str) -> dict[int, Mask]:
        at = self.place[key]
        about = f"{self.about}: frame {key}"
        return _decoded({number: column[at] for number, column in self.columns.items()}, self.size_hw, about)


class _Maps:
    """Masks of objects from PNG maps: of all objects of a frame, or of each its own."""

    def __init__(self, files: dict[int, dict[int | str, Path]], single: bool, size_hw: tuple[int, int]) -> None:
        self.files, self.single, self.size_hw = files, single, size_hw

    def __call__(self, key: int | str) -> dict[int, Mask]:
        masks: dict[int, Mask] = {}
        for number, files in self.files.items():
            if key not in files:
                continue
            values = _map(files[key])
            if values.shape != self.size_hw:
                was = f"{self.size_hw[1]}x{self.size_hw[0]}"
                raise ConfigError(f"{files[key]}: {values.shape[1]}x{values.shape[0]} px, the first map has {was} px")
            if self.single:
                masks |= {number: values > 0} if values.any() else {}
            else:
                numbers = [int(value) for value in np.unique(values) if value]
                # Beside others 255 is DAVIS's void; alone it is the one object of DAVIS 2016.
                numbers = [n for n in numbers if n != 255] if len(numbers) > 1 else numbers
                masks |= {number: values == number for number in numbers}
        return masks


def _map(path: Path) -> NDArray[Any]:
    """The values of a map: of a palette its indices, of gray its levels."""
    from PIL import Image

    try:
        with no_pillow_limit(), Image.open(path, formats=safe_formats()) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ConfigError(f"{path}: {picture.width}x{picture.height} px is more than {MAX_PIXELS:,} pixels")
            values = np.array(picture)
    except OSError as error:
        raise ConfigError(f"{path}: a map of objects that cannot be read ({' '.join(str(error).split())})") from error
    if values.ndim != 2:
        raise ConfigError(f"{path}: a map of objects must have one channel or a palette, not mode {picture.mode}")
    return values


def _decoded(row: Mapping[int, Any], size_hw: tuple[int, int], about: str) -> dict[int, Mask]:
    masks = {}
    for number, segmentation in row.items():
        if not segmentation:
            continue
        reason = wrong_segmentation(segmentation, size_hw)
        if reason is not None:
            raise ConfigError(f"{about}, object {number}: {reason}")
        mask = decode_segmentation(segmentation, size_hw)
        if mask.any():
            masks[number] = mask
    return masks
