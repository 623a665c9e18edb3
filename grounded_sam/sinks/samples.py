"""Keep a few of many items: a random sample, or those with the highest keys."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class RandomSample(Generic[T]):
    """A random sample of all items offered (Vitter 1985, algorithm R); an item is created only when it is kept.

    Args:
        size: Largest number of items.
        rng: Random number generator.

    Attributes:
        items: The sample.

    >>> sample = RandomSample(2, random.Random(0))
    >>> for number in range(100):
    ...     sample.offer(lambda: number)
    >>> len(sample.items)
    2
    """

    def __init__(self, size: int, rng: random.Random) -> None:
        self.size, self._rng = size, rng
        self.items: list[T] = []
        self._num_offered = 0

    def offer(self, make: Callable[[], T]) -> None:
        """Offer an item; `make` is called if it is kept."""
        self._num_offered += 1
        if len(self.items) < self.size:
            self.items.append(make())
        elif self.size and (index := self._rng.randrange(self._num_offered)) < self.size:
            self.items[index] = make()


class Highest(Generic[T]):
    """The items with the highest keys, the earlier of equal ones; an item is created only when it is kept.

    Args:
        size: Largest number of items.

    >>> highest = Highest(2)
    >>> for key in (1, 3, 2):
    ...     highest.offer(key, lambda: f"item {key}")
    >>> highest.items()
    ['item 3', 'item 2']
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._order = itertools.count()
        self._heap: list[tuple[float, int, T]] = []  # key, order, item

    def offer(self, key: float, make: Callable[[], T]) -> None:
        """Offer an item; `make` is called if it is kept."""
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, (key, -next(self._order), make()))
        elif self.size and key > self._heap[0][0]:
            heapq.heapreplace(self._heap, (key, -next(self._order), make()))

    def items(self) -> list[T]:
        """Return the items, highest key first."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]
