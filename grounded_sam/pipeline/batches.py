"""Collect frames into batches, and run a stage on batches that it may refuse."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import supervision as sv

from grounded_sam.errors import ImageError, OutOfMemoryError
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import Skipped

T = TypeVar("T")
#: Positions and frames.
Batch = list[tuple[int, Frame]]

log = logging.getLogger(__name__)

#: Frames that wait for others of their kind, in batches; and their pixels.
WINDOW, WINDOW_PIXELS = 4, 100_000_000


def collect_batches(frames: Iterator[Frame], batch_size: int, key: Callable[[Frame], Hashable]) -> Generator[Batch]:
    """Sort frames into batches of equal keys, within a window of a few batches.

    Args:
        frames: The frames.
        batch_size: Largest number of frames in a batch.
        key: Function from a frame to its key.

    Yields:
        Batches of positions and frames. While more than `WINDOW` batches of frames wait, or more than `WINDOW_PIXELS`
        pixels, the batch with the oldest frame comes next, even if it is not full.

    >>> import numpy as np
    >>> frames = [Frame(pixels=np.zeros((1, width, 3), np.uint8)) for width in (4, 6, 4)]
    >>> [[position for position, _ in batch] for batch in collect_batches(iter(frames), 2, lambda f: f.size_hw)]
    [[0, 2], [1]]
    """
    waiting: dict[Hashable, Batch] = {}  # the group with the oldest frame is first
    count = pixels = 0
    for position, frame in enumerate(frames):
        group = key(frame)
        waiting.setdefault(group, []).append((position, frame))
        count, pixels = count + 1, pixels + math.prod(frame.size_hw)
        while len(waiting.get(group, ())) >= batch_size or count > WINDOW * batch_size or pixels > WINDOW_PIXELS:
            is_full = len(waiting.get(group, ())) >= batch_size
            batch = waiting.pop(group if is_full else next(iter(waiting)))
            count, pixels = count - len(batch), pixels - sum(math.prod(frame.size_hw) for _, frame in batch)
            yield batch
    yield from waiting.values()


class BatchedStage:
    """Run a stage on batches of frames.

    A batch that the stage refuses is run in halves, so that only the frame at fault is skipped. After a batch that did
    not fit into memory, later ones are no larger than its half.

    Args:
        run: Function from `n` frames, and `n` inputs of each further kind, to their detections.
        name: Name of the stage, for the log.
        on_skipped: Called with every frame that is refused with an `ImageError`; None to raise it.

    >>> import numpy as np
    >>> stage = BatchedStage(lambda frames: [sv.Detections.empty() for _ in frames], "the detector", None)
    >>> len(stage([Frame(pixels=np.zeros((1, 1, 3), np.uint8))]))
    1
    """

    def __init__(
        self, run: Callable[..., list[sv.Detections]], name: str, on_skipped: Callable[[Skipped], None] | None
    ) -> None:
        self.run, self.name, self.on_skipped = run, name, on_skipped
        self._largest: int | None = None  # batch that is known to fit into memory

    def __call__(self, frames: Sequence[Frame], *inputs: Sequence[Any]) -> list[sv.Detections | None]:
        """Return the detections of each frame; None for frames that are skipped."""
        size = self._largest or len(frames) or 1
        results: list[sv.Detections | None] = []
        for start in range(0, len(frames), size):
            part = slice(start, start + size)
            results += self._run(frames[part], *(values[part] for values in inputs))
        return results

    def _run(self, frames: Sequence[Frame], *inputs: Sequence[Any]) -> list[sv.Detections | None]:
        try:
            return list(self.run(frames, *inputs))
        except ImageError as error:
            is_memory = isinstance(error, OutOfMemoryError)
            if len(frames) == 1 or not (self.on_skipped or is_memory):
                if self.on_skipped is None:
                    raise
                self.on_skipped(Skipped(frames[0].name, str(error)))
                return [None]
        half = len(frames) // 2
        if is_memory:
            log.warning("%s ran out of memory with %d images at once and goes on with %d", self.name, len(frames), half)
            self._largest = half
        halves = (slice(None, half), slice(half, None))
        return [result for part in halves for result in self(frames[part], *(values[part] for values in inputs))]


def in_order(items: Iterable[tuple[int, T | None]]) -> Generator[T]:
    """Yield values in the order of their positions.

    Args:
        items: Positions and values; each position from 0 on once, with None for a value that there is not.

    >>> list(in_order([(1, "b"), (2, None), (0, "a"), (3, "d")]))
    ['a', 'b', 'd']
    """
    waiting: dict[int, T | None] = {}
    position = 0
    for number, value in items:
        waiting[number] = value
        while position in waiting:
            ready = waiting.pop(position)
            position += 1
            if ready is not None:
                yield ready
