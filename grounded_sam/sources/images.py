"""Pictures from a file, a folder, a glob or a list of paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.media.files import (
    find_files,
    relative_name,
)
from grounded_sam.media.images import MAX_PIXELS, read_image
from grounded_sam.media.prefetch import prefetch
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult, Skipped


class ImageSource:
    """Pictures, decoded one at a time in natural order of their paths.

    In a folder every file with a picture's suffix counts, and files without a suffix that are
    pictures. It is searched recursively, also through links, but hidden files and the outputs of
    earlier runs are left out. Videos in it are listed as skipped. A file that cannot be read is put
    into `skipped` and the rest goes on.

    Args:
        input: a picture, a folder, a glob (`photos/**/*.jpg`), a `.txt` file with one path a line
            (relative ones are relative to it), or `builtin:demo`.
        max_pixels: larger pictures are refused before they are decoded.
        shard, num_shards: of the pictures take only the `shard`-th of so many parts.

    Raises:
        ConfigError: if the input is missing or holds no picture.
        ImageError: while iterating, if the input is one single file and that cannot be read.
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        if input is None or not str(input):
            raise ConfigError(
                "input is missing: give a picture, a folder, a glob or a .txt file of paths, e.g. input=photos/"
            )
        if not isinstance(max_pixels, int) or max_pixels < 1:
            raise ConfigError(f"source.max_pixels must be a whole number from 1, got {max_pixels!r}")
        check_shard(shard, num_shards)
        self.max_pixels = max_pixels
        self.skipped: list[Skipped] = []
        self.stored: Callable[[str, list[Path]], Iterable[FrameResult] | None] | None = None
        self.files, videos, self.root = find_files(str(input))
        self.single = len(self.files) == 1 and Path(str(input)) == self.files[0]
        if not self.files:
            if videos:
                raise ConfigError(f"no picture in {input}, only videos; source=auto or source=video takes those")
            raise ConfigError(f"no picture in {input}")
        self.skipped += [Skipped(self.name(path), "a video; source=images reads pictures") for path in videos]
        self.num_shards = num_shards
        self.files = shard_of(self.files, shard, num_shards)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        with closing(prefetch(self._decoded(), 2)) as frames:
            yield from frames

    def _decoded(self) -> Generator[Frame | FrameResult]:
        index = 0
        for path in self.files:
            if self.stored is not None and (results := self.stored(self.name(path), [path])) is not None:
                yield from results
                continue
            try:
                image = read_image(path, self.max_pixels)
            except ImageError as error:
                if self.single:
                    raise
                reason = str(error).removeprefix(f"{path}: ")
                self.skipped.append(Skipped(self.name(path), reason))
                continue
            yield Frame(image, index, self.name(path), file=path)
            index += 1

    def name(self, path: Path) -> str:
        """The path relative to the input, with `/`; bytes that are no UTF-8 as `\\xNN`."""
        return relative_name(path, self.root)
