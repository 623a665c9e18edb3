"""Results of an earlier run, read from its store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from grounded_sam.checks import check_bool, check_int
from grounded_sam.formats.store import StoreReader, find_store
from grounded_sam.formats.store_files import StoredFile
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.media.prefetch import FETCHERS, map_ahead
from grounded_sam.remote import is_address
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
        root: Folder or address that names in the store are relative to, if the images were moved; None for their old
            paths.
        max_pixels: Larger images are refused before they are decoded.
        shard: Which part of the images to take, from 0; frames of one video stay together.
        num_shards: Number of parts.
        check_files: Leave out images and videos that are gone, or have changed since they were processed.
        roots: Addresses below which addresses in the store may be opened (`s3://bucket/photos/`), besides the input.

    Attributes:
        vocabulary: Classes of the store.
        skipped: Files that could not be used then, and those that `check_files` leaves out; parts that are missing or
            damaged.

    Raises:
        ConfigError: If there is no store, or it is of a newer version.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        root: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
        check_files: bool = True,
        roots: Sequence[str] = (),
    ) -> None:
        folder = check_input(input, "a folder that sink=store wrote, e.g. input=labels")
        check_shard(shard, num_shards)
        check_int("source.max_pixels", max_pixels, 1)
        check_bool("source.check_files", check_files)
        place = find_store(folder)
        allowed = [folder, *roots] if is_address(folder) else roots
        self._reader = StoreReader(
            place, max_pixels, None if root is None else str(root), roots=allowed, set_aside=True
        )
        self.vocabulary = self._reader.vocabulary
        self.check_files = check_files
        self.skipped: list[Skipped] = [*self._reader.skipped.values(), *self._reader.lost_parts()]
        self.num_shards = num_shards
        self._keys = shard_of(list(self._reader.keys()), shard, num_shards)

    def __len__(self) -> int:
        return sum(self._reader.count(key) for key in self._keys)

    def _checked_keys(self) -> Iterator[tuple[str, str | None]]:
        """Yield the keys, and what is wrong with their files; objects under addresses are asked for ahead."""
        if not self.check_files:
            yield from ((key, None) for key in self._keys)
            return

        def problem(item: tuple[str, StoredFile | None]) -> tuple[str, str | None]:
            return item[0], None if item[1] is None else item[1].problem()

        files = ((key, self._reader.stored_file(key)) for key in self._keys)
        with closing(map_ahead(problem, files, FETCHERS)) as checked:
            yield from checked

    def __iter__(self) -> Iterator[Frame]:
        for key, reason in self._checked_keys():
            if reason is not None:
                way_out = "source.check_files=false exports its labels nevertheless"
                self.skipped.append(Skipped(self._reader.name(key), f"{reason}; {way_out}"))
                continue
            for result in self._reader.read(key, self.vocabulary):
                yield replace(result.frame, annotations=result.detections)
