"""Existing labels of images, as COCO instances."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grounded_sam.checks import check_int
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.files import home_path
from grounded_sam.formats.coco import CocoFile
from grounded_sam.media.files import path_ends
from grounded_sam.media.images import MAX_PIXELS, displayed_size, read_image
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import Skipped


class CocoSource:
    """The images of a COCO file with their annotations, for `detector=stored`.

    Images are opened when a stage or sink needs their pixels.

    Args:
        input: A COCO instances file, or a file of results.
        images: Folder that file names are relative to; None for the folder of the file, or `images` in it. If a name
            is not found there, the beginning of its path is left out, as far as is needed (`C:\\data\\a.png`,
            `../upload/a.png`).
        dataset: For results, the COCO file with their images and categories; of several, the first.
        max_pixels: Larger images are refused before they are decoded.
        shard: Which part of the images to take, from 0.
        num_shards: Number of parts.

    Attributes:
        vocabulary: Categories of the file.
        skipped: Images and annotations that could not be used; while iterating, images of another size.

    Raises:
        ConfigError: If the file cannot be read, or is not a COCO file; see `formats.coco.CocoFile`.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        images: str | os.PathLike[str] | None = None,
        dataset: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        path = home_path(check_input(input, "a COCO file, e.g. input=instances.json"))
        check_shard(shard, num_shards)
        check_int("source.max_pixels", max_pixels, 1)
        if dataset is not None and not isinstance(dataset, str | os.PathLike):
            dataset = next(iter(dataset), None)
        dataset_path = None if dataset is None else home_path(str(dataset))
        self.file = CocoFile(path, dataset_path, max_pixels=max_pixels)
        self.vocabulary = self.file.vocabulary
        self.skipped: list[Skipped] = list(self.file.notes)
        self.max_pixels, self.num_shards = max_pixels, num_shards
        self._images = shard_of(self.file.images, shard, num_shards)
        folder = (dataset_path or self.file.path).parent
        self.folders = [home_path(str(images))] if images else [folder, folder / "images"]
        self._names_by_file: dict[Path, str] = {}

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Frame]:
        for index, image in enumerate(self._images):
            name, size_hw = image["file_name"], (image["height"], image["width"])
            path = self._find(name)
            if (reason := self._size_problem(path, size_hw)) is not None:
                self.skipped.append(Skipped(name, reason))
                continue
            video = image.get("video")
            yield Frame(
                pixels=partial(self._read, path, size_hw),
                index=index if video is None else image.get("frame", index),
                name=name,
                time_s=image.get("time_s"),
                video=video,
                file=path,
                size=size_hw,
                annotations=self.file.detections(image),
                record=self.file.image_record(image),
            )

    def _find(self, name: str) -> Path:
        """Return the file of an image; where there is none of its name, the one that has the longest end of it.

        Raises:
            ConfigError: If the file belongs to another image too.
        """
        ends = (end for end in path_ends(name) if end != name)
        candidates = [folder / end for end in (name, *ends) for folder in self.folders]
        path = next((path for path in candidates if _is_file(path)), candidates[0])
        other = self._names_by_file.setdefault(path, name)
        if other != name:
            raise ConfigError(
                f"{self.file.path}: {other} and {name} both lead to {path}; set source.images to the folder that both "
                "paths begin in"
            )
        return path

    def _size_problem(self, path: Path, size_hw: tuple[int, int]) -> str | None:
        """Return how the header of an image contradicts its labels; damaged files are named by who needs the pixels."""
        try:
            height, width = displayed_size(path, self.max_pixels)
        except ImageError:
            return None
        if (height, width) == size_hw:
            return None
        return (
            f"the image has {width}x{height} px, but {size_hw[1]}x{size_hw[0]} px in {self.file.path.name}; correct "
            "the size there, or set source.images to the images that were labeled"
        )

    def _read(self, path: Path, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
        if not _is_file(path):
            name = path.as_posix().replace("\\", "/").rpartition("/")[2]
            raise ImageError(f"{path}: no such file; set source.images to the folder that has {name}")
        return read_image_of_size(path, size_hw, self.max_pixels, self.file.path.name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def read_image_of_size(path: Path, size_hw: tuple[int, int], max_pixels: int, labels: str) -> NDArray[np.uint8]:
    """Read an image, and check its size against its labels.

    Args:
        path: The image.
        size_hw: Height and width according to the labels.
        max_pixels: Larger images are refused before they are decoded.
        labels: Name of the labels, for messages.

    Raises:
        ImageError: If the image cannot be read, or has another size.
    """
    image = read_image(path, max_pixels)
    if image.shape[:2] != size_hw:
        height, width = size_hw
        raise ImageError(f"{path}: {image.shape[1]}x{image.shape[0]} px, but {width}x{height} px in {labels}")
    return image
