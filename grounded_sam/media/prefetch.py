"""Prepare items on threads, ahead of their use."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar

#: Threads that decode or draw beside the models; one where there are few cores, which the models use.
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 4))
#: Threads that wait for servers.
FETCHERS = 16

S = TypeVar("S")
T = TypeVar("T")


class Prefetch(Iterator[T], Generic[T]):
    """Yield the same items, produced on a thread.

    An error of the items is raised where the item would have come. The thread ends with the last item, an error, or
    `close`.

    Args:
        items: The items; a generator is closed at the end.
        size: Largest number of items that wait.
        name: Name of the thread.

    >>> list(Prefetch(iter([1, 2, 3]), 2))
    [1, 2, 3]
    """

    def __init__(self, items: Iterable[T], size: int, name: str = "decode") -> None:
        self._ready: queue.Queue[tuple[str, Any]] = queue.Queue(size)
        self._stop = threading.Event()
        self._next: tuple[str, Any] | None = None  # an item that `peek` has taken from the queue
        arguments = (items, self._ready, self._stop)
        self._thread = threading.Thread(target=_produce, args=arguments, name=name, daemon=True)
        self._thread.start()
        weakref.finalize(self, self._stop.set)  # also where nobody closes it

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        kind, value = self._ready.get() if self._next is None else self._next
        self._next = None
        if kind == "item":
            return value  # type: ignore[no-any-return]
        self.close()
        if kind == "error":
            raise value
        raise StopIteration

    def peek(self) -> T | None:
        """Return the next item without taking it; None if it is not ready yet, or there is none."""
        if self._next is None and not self._stop.is_set():
            with suppress(queue.Empty):
                self._next = self._ready.get_nowait()
        return self._next[1] if self._next is not None and self._next[0] == "item" else None

    def close(self) -> None:
        """End the thread, and wait for it for up to ten seconds."""
        self._stop.set()
        self._next = None
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)


def _produce(items: Iterable[Any], ready: queue.Queue[tuple[str, Any]], stop: threading.Event) -> None:
    """Put items into a queue until they end or `stop` is set."""

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put((kind, value), timeout=0.1)
                return True
        return False

    try:
        for item in items:
            if not put("item", item):
                break
        put("end", None)
    except BaseException as error:  # raised again where the items are used
        put("error", error)
    finally:
        if isinstance(items, Generator | Prefetch):
            items.close()


def map_ahead(function: Callable[[S], T], items: Iterable[S], workers: int) -> Generator[T]:
    """Yield `function(item)` in the order of the items, computed ahead on several threads.

    Args:
        function: Function of an item. Its error is raised where the result would have come.
        items: The items, taken a few at a time.
        workers: Number of threads, and of results that are computed ahead.

    >>> list(map_ahead(str, [1, 2, 3], workers=2))
    ['1', '2', '3']
    """
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, "worker") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
