"""What processes that write into one store tell each other: one opens it, others write parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grounded_sam.formats.store_objects import Row
from grounded_sam.formats.store_runs import StoreRun
from grounded_sam.output.paths import OutputPath
from grounded_sam.structures.vocabulary import Vocabulary


@dataclass(frozen=True)
class StoreShare:
    """What a process needs to write parts into a store that another one has opened; can be pickled.

    The one that opened it claims the output, checks the settings and finds what is stored. The others read nothing, so
    their start and their memory do not depend on the size of the store. See `StoreWriter.share` and `StoreWriter.join`.

    Attributes:
        folder: Folder of the store; a relative one is resolved by the process that opened it.
        run: Settings and classes of the run.
        vocabulary: Classes of the run.
        classes: These, followed by those stored before.
        sequence: Position of the last part that was there; parts of this run come after it.
        part_images: Images per part.
        part_seconds: Age in seconds at which a part is written even if it has fewer.
        max_pixels: Largest number of pixels of an image.
    """

    folder: OutputPath
    run: StoreRun
    vocabulary: Vocabulary
    classes: Vocabulary
    sequence: int
    part_images: int
    part_seconds: float
    max_pixels: int


@dataclass(frozen=True)
class KnownFile:
    """What a store knows of an image or video that is about to be processed; can be pickled.

    Attributes:
        name: Its name in the input.
        unique_name: Its name in the store, another one only if a file of another folder has the same.
        columns: Columns of its rows that `lookup` has found, such as `digest` and `path`.
        decisions: Rows of what people decided about its objects.
    """

    name: str
    unique_name: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    decisions: tuple[Row, ...] = ()
