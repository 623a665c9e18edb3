"""Labels that exist already, as COCO instances."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.formats.coco import CocoFile
from grounded_sam.media.images import MAX_PIXELS, read_image
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import Skipped


class CocoSource:
    """The images of a COCO file with their annotations, for `detector=stored`.

    Pictures are opened when a stage or sink wants their pixels.

    Args:
        input: a COCO instances file, or a file of results.
        dataset: for results, the COCO file with their images and categories.
        images: the folder that its file names are relative to; None for that of the file, or `images` in it.
        max_pixels: larger pictures are refused before they are decoded.
        shard, num_shards: of the images take only the `shard`-th of so many parts.

    Raises:
        ConfigError: if the file cannot be read or is no COCO file; see `coco.CocoFile`.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        images: str | os.PathLike[str] | None = None,
        dataset: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        if input is None or not str(input):
            raise ConfigError("input is missing: give a COCO file, e.g. input=instances.json")
        check_shard(shard, num_shards)
        about = None if dataset is None else Path(str(dataset)).expanduser()
        self.file = CocoFile(Path(str(input)).expanduser(), about)
        self.vocabulary = self.file.vocabulary
        self.skipped: list[Skipped] = list(self.file.notes)
        self.max_pixels = max_pixels
        self.num_shards = num_shards
        self._images = shard_of(self.file.images, shard, num_shards)
        beside = (about or self.file.path).parent
        self.folders = [Path(str(images)).expanduser()] if images else [beside, beside / "images"]

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Frame]:
        for index, image in enumerate(self._images):
            name, size_hw = image["file_name"], (image["height"], image["width"])
            path = next((p for folder in self.folders if (p := folder / name).is_file()), self.folders[0] / name)
            video = image.get("video")
            yield Frame(
                partial(self._read, path, size_hw),
                index if video is None else image.get("frame", index),
                name,
                image.get("time_s"),
                video,
                path,
                size_hw,
                self.file.detections(image),
            )

    def _read(self, path: Path, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
        if not path.is_file():
            raise ImageError(f"{path}: no such file; source.images says where the pictures are")
        image = read_image(path, self.max_pixels)
        if image.shape[:2] != size_hw:
            height, width = size_hw
            raise ImageError(
                f"{path}: {image.shape[1]}x{image.shape[0]} px, but {width}x{height} px in {self.file.path.name}"
            )
        return image
