"""Images from a file, a folder, a glob or a list of paths."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grounded_sam.checks import check_int
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.media.files import InputFiles, find_files, relative_name
from grounded_sam.media.images import MAX_PIXELS, read_image
from grounded_sam.media.prefetch import WORKERS, Prefetch, map_ahead
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import Lookup
from grounded_sam.structures.results import FrameResult, Skipped

#: Images that are decoded ahead.
AHEAD = max(2, WORKERS)


@dataclass(frozen=True, eq=False)
class _DecodedFile:
    """What was read from a file.

    Attributes:
        name: Name of the image.
        file: The file.
        pixels: RGB, `(H, W, 3) uint8`; None if it cannot be read.
        problems: Why it cannot be read, or not in whole.
    """

    name: str
    file: Path
    pixels: NDArray[np.uint8] | None
    problems: list[Skipped]


class ImageSource:
    """Images, decoded one at a time in natural order of their paths.

    A folder is searched recursively, also through links, for files with an image suffix and for images without a
    suffix; hidden files and the outputs of earlier runs are left out. Videos are listed in `skipped`, as are files that
    cannot be read or of which only a part is, and pictures of formats that are not read.

    Args:
        input: An image, a folder, a glob (`photos/**/*.jpg`), a `.txt` file with one path per line (relative ones are
            relative to it), or `builtin:demo`; in Python also files that `media.files.find_files` returned.
        max_pixels: Larger images are refused before they are decoded.
        shard: Which part of the images to take, from 0.
        num_shards: Number of parts.

    Attributes:
        skipped: Files that could not be used, or not in whole.

    Raises:
        ConfigError: If the input is missing, or has no image.
        ImageError: While iterating, if the input is a single file and cannot be read.

    >>> [frame.image.shape for frame in ImageSource("builtin:demo", num_shards=4)]
    [(640, 960, 3)]
    """

    def __init__(
        self,
        input: str | os.PathLike[str] | InputFiles | None,
        max_pixels: int = MAX_PIXELS,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        path = check_input(input, "an image, a folder, a glob or a .txt file of paths, e.g. input=photos/")
        check_int("source.max_pixels", max_pixels, 1)
        check_shard(shard, num_shards)
        self.max_pixels, self.num_shards = max_pixels, num_shards
        files = input if isinstance(input, InputFiles) else find_files(path)
        if not files.images:
            hint = ", only videos; use source=auto or source=video" if files.videos else ""
            raise ConfigError(files.nothing_found(path, "image") + hint)
        self.root, self.is_single = files.root, files.is_file
        reasons = dict.fromkeys(files.videos, "a video; source=auto reads both") | dict(files.unread)
        self.skipped = [
            Skipped(self.name(path), reason) for path, reason in shard_of(list(reasons.items()), shard, num_shards)
        ]
        self.files = shard_of(files.images, shard, num_shards)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Frame | FrameResult]:
        return self.resume(lambda name, files: None)

    def resume(self, lookup: Lookup) -> Iterator[Frame | FrameResult]:
        """Yield the stored result of each image that has one, else the decoded image."""
        with closing(Prefetch(self._decode(lookup), AHEAD)) as frames:
            yield from frames

    def _decode(self, lookup: Lookup) -> Generator[Frame | FrameResult]:
        index = 0
        with closing(map_ahead(self._read, self._look_up(lookup), WORKERS)) as items:
            for item in items:
                if isinstance(item, Iterable):
                    yield from item
                    continue
                self.skipped += item.problems
                if item.pixels is not None:
                    yield Frame(pixels=item.pixels, index=index, name=item.name, file=item.file)
                    index += 1

    def _look_up(self, lookup: Lookup) -> Iterator[Path | Iterable[FrameResult]]:
        """Yield the stored results of each file that has some, else the file."""
        for path in self.files:
            results = lookup(self.name(path), [path])
            yield path if results is None else results

    def _read(self, item: Path | Iterable[FrameResult]) -> _DecodedFile | Iterable[FrameResult]:
        """Decode a file; stored results are returned as they are."""
        if not isinstance(item, Path):
            return item
        name = self.name(item)
        problems: list[str] = []
        pixels = None
        try:
            pixels = read_image(item, self.max_pixels, problems.append)
        except ImageError as error:
            if self.is_single:
                raise
            problems.append(str(error).removeprefix(f"{item}: "))
        return _DecodedFile(name, item, pixels, [Skipped(name, problem) for problem in problems])

    def name(self, path: Path) -> str:
        """Return the name of an image in the output: its path relative to the input, with `/`."""
        return relative_name(path, self.root)
