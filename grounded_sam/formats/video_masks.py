"""Read masks of objects in videos: DAVIS folders, SA-V JSON and YouTube-VIS JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path, PurePosixPath
from sys import maxsize
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError, shorten
from grounded_sam.formats.segmentations import decode_segmentation, segmentation_problem, size_problem
from grounded_sam.media.files import natural_key
from grounded_sam.media.images import MAX_PIXELS, read_label_map
from grounded_sam.structures.documents import is_text, read_json
from grounded_sam.structures.ontology import MAX_ID_DIGITS
from grounded_sam.structures.vocabulary import Vocabulary

#: A mask `(H, W) bool`.
Mask = NDArray[np.bool_]
#: What identifies a frame in its video, see `frame_keys`.
FrameKey = int | str
#: Object id of "void" in DAVIS.
_VOID = 255


def split_frame_name(name: str) -> tuple[str, str]:
    """Split the name of a frame, without folders and suffix, into its beginning and the digits that it ends in.

    Args:
        name: Name or path of a frame, with or without a suffix.

    >>> split_frame_name("clip.mp4/000012"), split_frame_name("left_3.jpg")
    (('', '000012'), ('left_', '3'))
    """
    stem = PurePosixPath(name).stem
    beginning = re.sub(r"(?<![0-9])[0-9]{1,18}$", "", stem)  # more digits are a name, which fits no 64 bit number
    return beginning, stem[len(beginning) :]


def frame_keys(names: Sequence[str]) -> list[FrameKey]:
    """Return what identifies each frame of a video: the numbers that their names end in, or else their names.

    They are the names where not all end in a number, differ in more than that, or have a number twice.

    Args:
        names: Names or paths of all frames, with or without suffixes.

    >>> frame_keys(["frame_0000.jpg", "frame_0005.jpg"]), frame_keys(["left_3.jpg", "right_3.jpg"])
    ([0, 5], ['left_3', 'right_3'])
    """
    parts = [split_frame_name(name) for name in names]
    numbers = [int(digits) for _, digits in parts if digits]
    if len(set(numbers)) == len(parts) and len({beginning for beginning, _ in parts}) == 1:
        return list(numbers)
    return [PurePosixPath(name).stem for name in names]


@dataclass(frozen=True, kw_only=True)
class LabelledVideo:
    """The labeled frames of one video.

    Attributes:
        name: Name of the video.
        size_hw: Height and width in pixels.
        frames: Keys of the labeled frames, in order; see `frame_keys`.
        read: Returns the masks `(H, W) bool` of a frame by object id, without empty ones.
        classes: Class name by object id; None if the labels have no classes.
        frame_names: Names of frames by key, without suffix; None if the labels have no names.
        asked: Names of the classes that the labels decide on, as SA-Co/VEval lists them; None for all.
    """

    name: str
    size_hw: tuple[int, int]
    frames: list[FrameKey]
    read: Callable[[FrameKey], dict[int, Mask]]
    classes: dict[int, str] | None = None
    frame_names: dict[FrameKey, str] | None = None
    asked: frozenset[str] | None = None


class LabelledVideos:
    """Labeled videos by name. Masks are decoded when they are read.

    Formats:

    - DAVIS (Perazzi et al. 2016, Pont-Tuset et al. 2017): `Annotations/480p/VIDEO/00000.png`, or any part of that path.
      Pixels are object ids, 0 is background, 255 is void if there are other ids too.
    - Evaluation sets of SA-V: the same with a folder per object, `VIDEO/OBJECT/00000.png`.
    - SA-V (Ravi et al. 2024): `*_manual.json` and `*_auto.json`, one file or a folder of them; manual labels are
      preferred where there are both.
    - YouTube-VIS (Yang et al. 2019): one JSON file, also with the `video_np_pairs` of SA-Co/VEval, which list the
      phrases that people were asked for in each video.

    Args:
        path: The file or folder.
        content: Content of the file, if it was read already.
        max_pixels: Larger masks are refused.

    Attributes:
        path: As above.
        videos: The videos by name.
        vocabulary: The categories of YouTube-VIS; None if objects have no class.

    Raises:
        ConfigError: If it is in none of these formats, or damaged; the message names the file.
    """

    def __init__(self, path: Path, content: Any = None, max_pixels: int = MAX_PIXELS) -> None:
        self.path, self.max_pixels = path, max_pixels
        self.vocabulary: Vocabulary | None = None
        self.videos: dict[str, LabelledVideo] = {}
        if path.is_file():
            self._read_json(path, read_json(path) if content is None else content)
        elif files := sorted(path.glob("*.json"), key=lambda file: natural_key(file.name)):
            for file in files:
                has_manual = file.stem.endswith("_auto") and file.with_stem(f"{file.stem[:-5]}_manual") in files
                if not has_manual:
                    self._read_json(file, read_json(file))
        else:
            for video in _read_maps(path, max_pixels):
                self._add(video)
        if not self.videos:
            raise ConfigError(
                f"no labels in {path}: expected a YOLO dataset (data.yaml), Pascal VOC (.xml), folders of object maps "
                "as in DAVIS (.png), or JSON of SA-V or YouTube-VIS"
            )

    def find(self, video: str) -> LabelledVideo | None:
        """Find the labels of a video of a run.

        Args:
            video: Its name, which may have a suffix and folders that the labels leave out.
        """
        names = (video, PurePosixPath(video).name, PurePosixPath(video).stem)
        return next((self.videos[name] for name in names if name in self.videos), None)

    def _add(self, video: LabelledVideo) -> None:
        if video.name in self.videos:
            raise ConfigError(f"{self.path}: there are two videos {video.name}")
        self.videos[video.name] = video

    def _read_json(self, path: Path, content: Any) -> None:
        """Add the videos of a JSON file."""
        if isinstance(content, Mapping) and "masklet" in content:
            self._add(_read_sav(path, content, self.max_pixels))
        elif isinstance(content, Mapping) and "videos" in content:
            self._read_youtube_vis(path, content)
        else:
            raise ConfigError(f"{path}: expected masklet, as in SA-V, or videos, as in YouTube-VIS")

    def _read_youtube_vis(self, path: Path, content: Mapping[str, Any]) -> None:
        """Add the videos of a YouTube-VIS file, whose tracks have `segmentations`: RLE or null for each frame."""
        for key in ("videos", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                raise ConfigError(f"{path}: expected a list under {key!r}, as in YouTube-VIS")
        self.vocabulary = Vocabulary.from_categories(content["categories"], str(path))
        class_names = dict(zip(self.vocabulary.category_ids, self.vocabulary.classes, strict=True))
        try:
            asked = _read_asked(content, class_names)
            for video in content["videos"]:
                tracks = [track for track in content["annotations"] if track["video_id"] == video["id"]]
                labels = _read_youtube_vis_video(path, video, tracks, class_names, self.max_pixels)
                self._add(labels if asked is None else replace(labels, asked=frozenset(asked.get(video["id"], ()))))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ConfigError(f"{path}: not YouTube-VIS ({type(error).__name__}: {error})") from error


class _RleFrames:
    """Read the masks of a frame from RLE.

    Args:
        frames: RLE or None of each object id, by frame key.
        size_hw: Height and width in pixels.
        where: Name of the file, for messages.
    """

    def __init__(self, frames: Mapping[FrameKey, Mapping[int, Any]], size_hw: tuple[int, int], where: str) -> None:
        self.frames, self.size_hw, self.where = frames, size_hw, where

    def __call__(self, key: FrameKey) -> dict[int, Mask]:
        """Decode the masks of a frame; see `LabelledVideo.read`."""
        masks = {}
        for number, segmentation in self.frames[key].items():
            if not segmentation:
                continue
            reason = segmentation_problem(segmentation, self.size_hw)
            if reason is not None:
                raise ConfigError(f"{self.where}: frame {key}, object {number}: {reason}")
            mask = decode_segmentation(segmentation, self.size_hw)
            if mask.any():
                masks[number] = mask
        return masks


def _read_sav(path: Path, content: Mapping[str, Any], max_pixels: int) -> LabelledVideo:
    """Read a file of SA-V: `masklet[frame][object]` as RLE, for every n-th frame of the video."""
    rows = content["masklet"]
    try:
        first = next(rle for row in rows for rle in row if rle is not None)
        height, width = first["size"]
        if (reason := size_problem(width, height, max_pixels)) is not None:
            raise ValueError(reason)
        numbers = [_object_id(number) for number in content.get("masklet_id") or range(len(rows[0]))]
        step = max(1, round(float(content.get("video_frame_count") or len(rows)) / len(rows)))
        for i, row in enumerate(rows):
            if len(row) != len(numbers):
                raise ValueError(f"frame {i} has {len(row)} objects, masklet_id has {len(numbers)}")
        name = content.get("video_id") or path.stem.removesuffix("_manual").removesuffix("_auto")
        if not is_text(name := str(name)):
            raise ValueError("video_id must be text")
    except (StopIteration, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: not SA-V ({type(error).__name__}: {error})") from error
    frames: dict[FrameKey, dict[int, Any]] = {
        i * step: dict(zip(numbers, row, strict=True)) for i, row in enumerate(rows)
    }
    read = _RleFrames(frames, (height, width), str(path))
    return LabelledVideo(name=name, size_hw=(height, width), frames=list(frames), read=read)


def _read_youtube_vis_video(
    path: Path,
    video: Mapping[str, Any],
    tracks: Sequence[Mapping[str, Any]],
    class_names: Mapping[int, str],
    max_pixels: int,
) -> LabelledVideo:
    """Read one video of YouTube-VIS. Other errors than ConfigError mean that an entry is malformed."""
    files = [str(name) for name in video["file_names"]]
    if not all(map(is_text, [*files, str(video.get("name"))])):
        raise ValueError("file_names must be text")
    keys = frame_keys(files)
    folder = str(PurePosixPath(files[0]).parent) if files else ""
    name = folder if folder not in ("", ".") else str(video.get("name") or video["id"])
    if len(set(keys)) < len(keys):
        raise ConfigError(f"{path}: two frames of the video {name} have the same name")
    size_hw = (video["height"], video["width"])
    if (reason := size_problem(size_hw[1], size_hw[0], max_pixels)) is not None:
        raise ValueError(f"video {name}: {reason}")
    segmentations, classes = {}, {}
    for track in tracks:
        number = _object_id(track.get("track_id", track["id"]))
        segmentations[number], classes[number] = track["segmentations"], class_names[track["category_id"]]
        if len(track["segmentations"]) != len(keys):
            raise ValueError(f"track {number} of {name} has {len(track['segmentations'])} frames, not {len(keys)}")
    frames = {key: {n: column[i] for n, column in segmentations.items()} for i, key in enumerate(keys)}
    return LabelledVideo(
        name=name,
        size_hw=size_hw,
        frames=keys,
        read=_RleFrames(frames, size_hw, f"{path}: video {name}"),
        classes=classes,
        frame_names={key: PurePosixPath(file).stem for key, file in zip(keys, files, strict=True)},
    )


def _read_asked(content: Mapping[str, Any], class_names: Mapping[int, str]) -> dict[Any, set[str]] | None:
    """Return the classes that were asked for, by video id; None if the file lists none."""
    if "video_np_pairs" not in content:
        return None
    asked: dict[Any, set[str]] = {}
    for pair in content["video_np_pairs"]:
        asked.setdefault(pair["video_id"], set()).add(class_names[pair["category_id"]])
    return asked


def _object_id(value: Any) -> int:
    """Return the id of an object.

    Raises:
        ValueError: If it is no integer from 0 that fits into 64 bits.
    """
    number = int(value)
    if not 0 <= number <= maxsize:
        raise ValueError(f"the id of an object must be an integer from 0, got {shorten(value)}")
    return number


class _MapFrames:
    """Read the masks of a frame from PNG maps.

    Args:
        files: PNG files by object id and frame key.
        one_object: Whether each file is the mask of one object; else its pixels are object ids, and `files` has one id.
        size_hw: Height and width in pixels.
        max_pixels: Larger maps are refused.
    """

    def __init__(
        self, files: Mapping[int, Mapping[FrameKey, Path]], one_object: bool, size_hw: tuple[int, int], max_pixels: int
    ) -> None:
        self.files, self.one_object, self.size_hw, self.max_pixels = files, one_object, size_hw, max_pixels

    def __call__(self, key: FrameKey) -> dict[int, Mask]:
        """Read the masks of a frame; see `LabelledVideo.read`."""
        masks: dict[int, Mask] = {}
        for number, files in self.files.items():
            if key not in files:
                continue
            values = _read_map(files[key], self.max_pixels)
            if values.shape != self.size_hw:
                expected = f"{self.size_hw[1]}x{self.size_hw[0]}"
                raise ConfigError(
                    f"{files[key]}: {values.shape[1]}x{values.shape[0]} px, but the first map has {expected} px"
                )
            if self.one_object:
                masks |= {number: values > 0} if values.any() else {}
            else:
                numbers = [int(value) for value in np.unique(values) if value]
                # 255 alone is the single object of DAVIS 2016.
                numbers = [n for n in numbers if n != _VOID] if len(numbers) > 1 else numbers
                masks |= {n: values == n for n in numbers}
        return masks


def _read_maps(path: Path, max_pixels: int) -> list[LabelledVideo]:
    """Read a folder of PNG maps of object ids, or of masks in a folder per object."""
    root = path / "Annotations" if (path / "Annotations").is_dir() else path
    root = next((root / name for name in ("480p", "Full-Resolution") if (root / name).is_dir()), root)
    videos = []
    for video, folders in _group_folders(root, max_pixels).items():
        has_object_folders = folders != [video]
        objects = {int(folder.name): folder for folder in folders} if has_object_folders else {0: video}
        maps = {n: sorted(folder.glob("*.png")) for n, folder in objects.items()}
        names = sorted({file.stem for files in maps.values() for file in files})
        key_of = dict(zip(names, frame_keys([f"{name}.png" for name in names]), strict=True))
        files = {n: {key_of[file.stem]: file for file in files} for n, files in maps.items()}
        file_of = {key: file for by_key in files.values() for key, file in by_key.items()}
        keys = sorted(file_of, key=lambda key: (isinstance(key, str), key))
        height, width = _read_map(file_of[keys[0]], max_pixels).shape
        videos.append(
            LabelledVideo(
                name=video.name if video == root else video.relative_to(root).as_posix(),
                size_hw=(height, width),
                frames=keys,
                read=_MapFrames(files, has_object_folders, (height, width), max_pixels),
                frame_names={key: file.stem for key, file in file_of.items()},
            )
        )
    return videos


def _group_folders(root: Path, max_pixels: int) -> dict[Path, list[Path]]:
    """Group the folders of maps by video: the video's own folder, or folders of its objects, named by their ids."""
    files = glob("**/*.png", root_dir=root, recursive=True)  # follows links, in contrast to pathlib
    folders = sorted({(root / name).parent for name in files}, key=lambda folder: natural_key(folder.as_posix()))
    # Directly in the root, numbers may also be the names of videos: then some map has several object ids.
    top_maps = [min(folder.glob("*.png")) for folder in folders if folder.parent == root]
    one_object_each = all(len(np.unique(_read_map(file, max_pixels))) <= 2 for file in top_maps)
    groups: dict[Path, list[Path]] = {}
    for folder in folders:
        is_object = folder != root and folder.name.isdecimal() and len(folder.name) <= MAX_ID_DIGITS
        is_object = is_object and all(sibling.name.isdecimal() for sibling in folder.parent.iterdir())
        is_object = is_object and (folder.parent != root or one_object_each)
        groups.setdefault(folder.parent if is_object else folder, []).append(folder)
    return groups


def _read_map(path: Path, max_pixels: int) -> NDArray[Any]:
    """Read the values of a PNG map, `(H, W)`."""
    try:
        return read_label_map(path, max_pixels)
    except ImageError as error:
        raise ConfigError(str(error)) from error
