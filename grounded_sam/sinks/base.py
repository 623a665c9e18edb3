"""Base class of the sinks that write datasets: settings, split, image files and counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from grounded_sam.checks import check_number
from grounded_sam.errors import count_of
from grounded_sam.output.claim import check_output
from grounded_sam.output.paths import output_path
from grounded_sam.sinks.dataset_images import DatasetImages, ImageMode
from grounded_sam.sinks.splits import Splits
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary


@dataclass(eq=False)
class DatasetSink(ABC):
    """Base of the sinks that write a dataset; a format implements `_write` and `_close`.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        split: Share of each split, such as `{train: 0.8, val: 0.2}`, see `splits.Splits`; None for no splits.
        seed: Seed of the split.

    Attributes:
        name: Name of the format: its key in the config and, of most formats, its folder in `output`.
        reserved_folders: Names of folders that its readers do not find images in, and that are encoded.
        takes_image_addresses: Whether its files can name images by their addresses.
        folder: That folder.
        num_images: Images written so far.
        num_objects: Objects written so far.

    Raises:
        ConfigError: If a setting is not one of its choices, or the shares are invalid.
    """

    name: ClassVar[str]
    reserved_folders: ClassVar[frozenset[str]] = frozenset()
    takes_image_addresses: ClassVar[bool] = False

    output: Path
    vocabulary: Vocabulary
    split: Mapping[str, float] | None = None
    seed: int = 0
    images: ImageMode = field(default="none", init=False)  # formats with image files declare it again, as a setting
    tolerance: float = field(default=0.0, init=False)  # formats with polygons declare it again

    def __post_init__(self) -> None:
        # An address is only given to sinks that declare that they take one.
        self.folder: Path = output_path(self.output) / self.name  # type: ignore[assignment]
        self.num_images = self.num_objects = 0
        self._splits = Splits(self.split, self.seed)
        self._image_files = DatasetImages(
            self.images, f"sink.{self.name}.images", self.reserved_folders, self.takes_image_addresses
        )
        check_number(f"sink.{self.name}.tolerance", self.tolerance, 0)
        self._is_open = False

    def __enter__(self) -> Self:
        for path in self._last_files():
            check_output(path)
        return self

    def numbered_classes(self) -> Sequence[str]:
        """Return the classes in the order of their numbers."""
        return self.vocabulary.classes

    def _last_files(self) -> Sequence[Path]:
        """Return the files that are written at the end of a run, to check at its start that they may be."""
        return ()

    def write(self, result: FrameResult) -> None:
        """Write an image and its labels.

        Raises:
            ConfigError: At the first image, if the folder holds a dataset of another split.
            ImageError: If an image file has to be written and the pixels cannot be read.
        """
        if not self._is_open:
            self._open()
            self._image_files.read_names(self.folder)
            self._is_open = True
        self.num_objects += self._write(result)
        self.num_images += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_open:
            self._image_files.write_names(self.folder)
            self._close()

    def _open(self) -> None:
        """Prepare the output, before the first image."""
        self._splits.claim(self.folder)

    @property
    def skipped(self) -> list[Skipped]:
        """Parts of the split that got no image."""
        return self._splits.skipped()

    @abstractmethod
    def _write(self, result: FrameResult) -> int:
        """Write an image and its labels, and return the number of objects."""

    @abstractmethod
    def _close(self) -> None:
        """Complete the dataset, after the last image, also after an interruption."""

    def _counts(self) -> str:
        """Return the counts, for `summary`."""
        return f"{count_of(self.num_objects, 'object')} in {count_of(self.num_images, 'image')}"
