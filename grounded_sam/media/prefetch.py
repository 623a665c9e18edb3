"""Prepare items on a thread, ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], size: int) -> Generator[T]:
    """Yield the same items, produced on a thread.

    Args:
        items: The items; if it is a generator, it is closed at the end.
        size: Largest number of items that wait.

    Returns:
        A generator; closing it ends the thread. An error of `items` is raised where the item would have come.

    >>> list(prefetch(iter([1, 2, 3]), 2))
    [1, 2, 3]
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(size)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put((kind, value), timeout=0.1)
                return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put("item", item):
                    break
            put("end", None)
        except BaseException as error:  # raised again where the items are used
            put("error", error)
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=produce, name="decode", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join(timeout=10)
