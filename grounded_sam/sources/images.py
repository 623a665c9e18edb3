"""Images from a file, a folder, a glob or a list of paths."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from grounded_sam.checks import check_int
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.media.files import InputFiles, find_files, relative_name
from grounded_sam.media.images import MAX_PIXELS, read_image
from grounded_sam.media.prefetch import prefetch
from grounded_sam.sources.inputs import check_input
from grounded_sam.sources.shards import check_shard, shard_of
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.protocols import Lookup
from grounded_sam.structures.results import FrameResult, Skipped

#: Images that are decoded ahead.
AHEAD = 2


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
        with closing(prefetch(self._decode(lookup), AHEAD)) as frames:
            yield from frames

    def _decode(self, lookup: Lookup) -> Generator[Frame | FrameResult]:
        index = 0
        for path in self.files:
            name = self.name(path)
            if (results := lookup(name, [path])) is not None:
                yield from results
                continue
            try:
                image = read_image(path, self.max_pixels, partial(self._report, name))
            except ImageError as error:
                if self.is_single:
                    raise
                self.skipped.append(Skipped(name, str(error).removeprefix(f"{path}: ")))
                continue
            yield Frame(pixels=image, index=index, name=name, file=path)
            index += 1

    def _report(self, name: str, reason: str) -> None:
        """List an image of which only a part is read."""
        self.skipped.append(Skipped(name, reason))

    def name(self, path: Path) -> str:
        """Return the name of an image in the output: its path relative to the input, with `/`."""
        return relative_name(path, self.root)
