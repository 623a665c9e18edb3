"""One thread that owns the models: loads them, and runs requests one after the other, like ones together."""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from grounded_sam.errors import GroundedSamError, OutOfMemoryError, describe_error, print_traceback
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.serve.problems import RequestError

log = logging.getLogger(__name__)

#: Weight of the newest request in the mean time of one.
NEWEST = 0.2


@dataclass(eq=False)
class Work:
    """A request for the models.

    Attributes:
        run: Function from the payloads of some requests to the answer of each; an exception in place of an answer is
            that of one request alone. Called on the thread of the worker.
        payload: What this request asks.
        batch: Requests whose values here are equal and not None may run together.
        future: Its answer. Cancelling it takes the request out of the queue.
    """

    run: Callable[[Sequence[Any]], Sequence[Any]]
    payload: Any = None
    batch: Hashable | None = None
    future: Future[Any] = field(default_factory=Future)


class Steps(Protocol):
    """Work that takes long, between whose steps requests are answered.

    Attributes:
        is_over: Whether nothing is left to do, also because it was cancelled.
    """

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""

    def step(self) -> bool:
        """Do a little; return whether more is to come."""

    def abandon(self, reason: str) -> None:
        """End without doing the rest."""


class Worker:
    """Run requests on one thread; between two of them, a step of the oldest long work.

    Args:
        load: Builds the pipeline; called on the thread of the worker.
        max_waiting: Largest number of requests that wait.
        on_loaded: Called on the thread of the worker with the pipeline, or with the error that loading ended with.

    Attributes:
        pipeline: The pipeline, once it is loaded.
        failure: Why it could not be loaded.

    >>> Worker(lambda: None, max_waiting=1).is_ready
    False
    """

    def __init__(
        self,
        load: Callable[[], Pipeline],
        max_waiting: int,
        on_loaded: Callable[[Pipeline | None, BaseException | None], None] = lambda pipeline, error: None,
    ) -> None:
        self._load, self.max_waiting, self._on_loaded = load, max_waiting, on_loaded
        self.pipeline: Pipeline | None = None
        self.failure: BaseException | None = None
        self.max_batch = 1
        self._waiting: deque[Work] = deque()
        self._long: deque[Steps] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 1.0  # of a request, on average
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    @property
    def is_ready(self) -> bool:
        """Whether the models are loaded."""
        return self.pipeline is not None

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    @property
    def num_long(self) -> int:
        """Number of long works that are not done."""
        return len(self._long)

    def start(self) -> None:
        """Start the thread, which loads the models first."""
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after the request that it is at; others are refused."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def submit(self, work: Work) -> Future[Any]:
        """Add a request to the queue.

        Raises:
            RequestError: If the models are not loaded (503), or the queue is full (429).
        """
        with self._changed:
            self._check_ready()
            if len(self._waiting) >= self.max_waiting:
                self._waiting = deque(item for item in self._waiting if not item.future.cancelled())
            if len(self._waiting) >= self.max_waiting:
                raise RequestError(
                    429, f"{self.max_waiting} requests are waiting already; try again later", self._retry_after()
                )
            self._waiting.append(work)
            self._changed.notify_all()
        return work.future

    def submit_long(self, steps: Steps, limit: int) -> None:
        """Add work that takes long.

        Args:
            steps: The work.
            limit: Largest number of such works that are not done.

        Raises:
            RequestError: If the models are not loaded (503), or there are too many (429).
        """
        with self._changed:
            self._check_ready()
            if sum(not other.is_over for other in self._long) >= limit:
                raise RequestError(
                    429, f"{limit} videos are being tracked or waiting; try again later", {"Retry-After": "30"}
                )
            self._long.append(steps)
            self._changed.notify_all()

    def _check_ready(self) -> None:
        if self._stopping:
            raise RequestError(503, "the server is shutting down")
        if self.pipeline is None:
            raise RequestError(503, "the models are being loaded; /ready tells when they are", {"Retry-After": "2"})

    def _retry_after(self) -> dict[str, str]:
        """Return the header that says when the queue should have room."""
        batches = math.ceil(len(self._waiting) / self.max_batch)
        return {"Retry-After": str(max(1, math.ceil(self._seconds * batches / 2)))}

    def _run(self) -> None:
        """Load the models, then run requests until `stop`."""
        try:
            pipeline = self._load()
            self.max_batch = max(1, pipeline.stages.batch_size)
            self._on_loaded(pipeline, None)
            self.pipeline = pipeline
        except BaseException as error:  # of any kind: the server has to end with it
            self.failure = error
            self._on_loaded(None, error)
            return
        while True:
            with self._changed:
                while not (self._waiting or self._long or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
                batch = self._take_batch()
                long = self._long[0] if self._long else None
            if batch:
                self._run_batch(batch)
            if long is not None and not self._step(long):
                with self._changed:
                    self._long.remove(long)
            batch, long = [], None  # so that what they hold is freed while the thread waits
        self._refuse_rest()

    def _take_batch(self) -> list[Work]:
        """Take the oldest request from the queue, and those that can run with it."""
        batch: list[Work] = []
        rest: deque[Work] = deque()
        for work in self._waiting:
            fits = not batch or (
                work.batch is not None and work.batch == batch[0].batch and len(batch) < self.max_batch
            )
            if not fits:
                rest.append(work)
            elif work.future.set_running_or_notify_cancel():
                batch.append(work)
        self._waiting = rest
        return batch

    def _run_batch(self, batch: list[Work]) -> None:
        """Run requests together; if they fail, each alone."""
        start = time.perf_counter()
        try:
            answers = list(batch[0].run([work.payload for work in batch]))
        except BaseException as error:  # no request may end the thread
            if len(batch) > 1:
                for work in batch:
                    self._run_batch([work])
                return
            answers = [readable_error(error)]
        for work, answer in zip(batch, answers, strict=True):
            if isinstance(answer, BaseException):
                work.future.set_exception(answer)
            else:
                work.future.set_result(answer)
        seconds = (time.perf_counter() - start) / len(batch)
        self._seconds += NEWEST * (seconds - self._seconds)

    def _step(self, long: Steps) -> bool:
        """Do a step of long work; return whether more is to come."""
        try:
            return long.step()
        except BaseException as error:  # no video may end the thread
            long.abandon(str(readable_error(error)))
            return False

    def _refuse_rest(self) -> None:
        """Refuse what is left in the queue."""
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
            long, self._long = self._long, deque()
        for work in waiting:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(RequestError(503, "the server is shutting down"))
        for steps in long:
            steps.abandon("the server is shutting down")


def readable_error(error: BaseException) -> GroundedSamError:
    """Return an error as one of this package, whose message says what happened; free memory that ran out.

    Args:
        error: Any error.

    >>> readable_error(ZeroDivisionError("division by zero")).status
    500
    """
    import torch

    kinds = (MemoryError, OutOfMemoryError, torch.OutOfMemoryError)
    if isinstance(error, kinds) or isinstance(error.__cause__, kinds):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return RequestError(503, "there is not enough memory for this request; send a smaller image, or close sessions")
    if isinstance(error, GroundedSamError):
        return error
    print_traceback()
    log.warning("a request failed: %s", describe_error(error))
    return RequestError(500, f"the server failed on this request ({type(error).__name__}); its log says more")
