"""What an earlier run stored, once more through the pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from grounded_sam.errors import ConfigError
from grounded_sam.formats.store import StoreReader, find_store
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import Skipped


class StoreSource:
    """The images of a store with what was found in them, for `detector=stored`.

    Pictures and videos are opened when a stage or sink wants their pixels, where they lay when they were
    stored. What could not be used then is listed again.

    Args:
        input: the folder of a store, or the output that has one.
        root: where the pictures lie now, if they were moved: the folder that their names are relative to.
        max_pixels: larger pictures are refused before they are decoded.
        shard, num_shards: of the images take only the `shard`-th of so many parts; frames of one video go
            together.

    Raises:
        ConfigError: if there is no store, or one of a newer version, or a part of it is damaged.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        root: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        if input is None or not str(input):
            raise ConfigError("input is missing: give a folder that sink=store wrote, e.g. input=labels")
        check_shard(shard, num_shards)
        self._reader = StoreReader(find_store(str(input)), max_pixels, None if root is None else str(root))
        self.vocabulary = self._reader.vocabulary
        self.skipped: list[Skipped] = list(self._reader.skipped.values())
        self.num_shards = num_shards
        self._keys = shard_of(list(self._reader.keys()), shard, num_shards)

    def __len__(self) -> int:
        return sum(self._reader.count(key) for key in self._keys)

    def __iter__(self) -> Iterator[Frame]:
        for key in self._keys:
            for result in self._reader.read(key, self.vocabulary):
                yield replace(result.frame, found=result.detections)
