"""Results of an earlier run, read from its store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from grounded_sam.checks import check_int
from grounded_sam.formats.store import StoreReader, find_store
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import Skipped


class StoreSource:
    """The images of a store with their detections, for `detector=stored`.

    Images and videos are opened when a stage or sink needs their pixels, at their original paths. Files that could
    not be used then are listed in `skipped` again.

    Args:
        input: Folder of a store, or the output folder that has one.
        root: Folder that names in the store are relative to, if the images were moved; None for their old paths.
        max_pixels: Larger images are refused before they are decoded.
        shard: Which part of the images to take, from 0; frames of one video stay together.
        num_shards: Number of parts.

    Attributes:
        vocabulary: Classes of the store.
        skipped: Files that could not be used.

    Raises:
        ConfigError: If there is no store, it is of a newer version, or a part of it is damaged.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        root: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        folder = check_input(input, "a folder that sink=store wrote, e.g. input=labels")
        check_shard(shard, num_shards)
        check_int("source.max_pixels", max_pixels, 1)
        self._reader = StoreReader(find_store(folder), max_pixels, None if root is None else str(root))
        self.vocabulary = self._reader.vocabulary
        self.skipped: list[Skipped] = list(self._reader.skipped.values())
        self.num_shards = num_shards
        self._keys = shard_of(list(self._reader.keys()), shard, num_shards)

    def __len__(self) -> int:
        return sum(self._reader.count(key) for key in self._keys)

    def __iter__(self) -> Iterator[Frame]:
        for key in self._keys:
            for result in self._reader.read(key, self.vocabulary):
                yield replace(result.frame, annotations=result.detections)
