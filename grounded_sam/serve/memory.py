"""Things that are kept in memory up to a number of bytes, those used least recently going first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ByteLimited(Generic[T]):
    """A mapping of limited size; thread-safe.

    Args:
        max_bytes: Largest size of all values. The newest value is kept even if it alone is larger.
        size_of: Returns the bytes of a value.
        on_removed: Called with each value that is removed.

    >>> kept = ByteLimited(10, len)
    >>> for key in "abc":
    ...     kept.put(key, 4 * key)
    >>> kept.get("a"), kept.get("c"), kept.num_bytes
    (None, 'cccc', 8)
    """

    def __init__(
        self, max_bytes: int, size_of: Callable[[T], int], on_removed: Callable[[T], None] = lambda value: None
    ) -> None:
        self.max_bytes, self._size_of, self._on_removed = max_bytes, size_of, on_removed
        self._values: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def num_bytes(self) -> int:
        """Size of all values."""
        with self._lock:
            return sum(size for _, size in self._values.values())

    def get(self, key: str) -> T | None:
        """Return a value, which counts as used; None if there is none."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: str, value: T) -> None:
        """Add a value, or measure it again; remove others until all fit."""
        removed: list[T] = []
        with self._lock:
            if key in self._values and self._values[key][0] is not value:
                removed.append(self._values[key][0])
            self._values[key] = value, self._size_of(value)
            self._values.move_to_end(key)
            total = sum(size for _, size in self._values.values())
            while total > self.max_bytes and len(self._values) > 1:
                _, (oldest, size) = self._values.popitem(last=False)
                total -= size
                removed.append(oldest)
        for old in removed:
            self._on_removed(old)

    def remove(self, key: str) -> bool:
        """Remove a value; return whether there was one."""
        with self._lock:
            entry: Any = self._values.pop(key, None)
        if entry is not None:
            self._on_removed(entry[0])
        return entry is not None

    def clear(self) -> None:
        """Remove all values."""
        for key in list(self._values):
            self.remove(key)
