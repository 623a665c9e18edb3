"""One pass of Ray Data: units of work to tasks that fetch, to a pool of workers, to reports.

A row of each dataset is a unit, pickled. One task takes the units from a queue as the command lists them, other tasks
add the encoded images, and actors process them. Every row is a block of its own.
"""

from __future__ import annotations

import pickle
import threading
import uuid
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from grounded_sam.engine.listing import Unit
from grounded_sam.engine.worker import Report, SafeWorker, WorkerSettings
from grounded_sam.errors import ImageError

#: Threads of a task that fetches images.
FETCHERS = 8
#: Units that wait in the queue.
QUEUED = 8
#: Units per worker that are listed and not done yet.
AHEAD_PER_WORKER = 6
#: Seconds without a report after which one more unit may be listed: those of a worker that died twice give none.
STALL_S = 20.0
_COLUMN = "unit"


@dataclass(frozen=True)
class Pool:
    """The workers of a pass.

    Attributes:
        sizes: Smallest and largest number of workers.
        num_cpus: Cores per worker.
        num_gpus: GPUs per worker.
        singly: Whether each worker gets one unit at a time and tries it once.
    """

    sizes: tuple[int, int]
    num_cpus: float
    num_gpus: float
    singly: bool = False


def _table(content: object) -> pa.Table:
    return pa.table({_COLUMN: pa.array([pickle.dumps(content, pickle.HIGHEST_PROTOCOL)], pa.large_binary())})


def _content(block: pa.Table) -> Any:
    """Return what a row of this module holds; it was pickled by another process of the same run."""
    return pickle.loads(block[_COLUMN][0].as_buffer())


def _take_units(units: Any) -> Iterator[pa.Table]:
    """Yield the units of a queue until None comes, which stays in it for a task that is started again."""
    while (unit := units.get()) is not None:
        yield _table(unit)
    units.put(None)


class _Fetch:
    """Add the encoded images to a unit."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings  # reference of an object in Ray's store

    def __call__(self, block: pa.Table) -> pa.Table:
        import ray

        unit: Unit = _content(block)
        if unit.video is not None:
            return _table((unit, ()))
        source = ray.get(self._settings).parts[unit.part]

        def fetch(item: Any) -> bytes | str:
            try:
                return source.fetch(item)
            except ImageError as error:
                return str(error)

        with ThreadPoolExecutor(FETCHERS) as pool:
            return _table((unit, tuple(pool.map(fetch, unit.items))))


class _RayWorker:
    """An actor with a worker."""

    def __init__(self, settings: Any) -> None:
        import ray

        self._worker = SafeWorker(ray.get(settings))

    def __call__(self, block: pa.Table) -> pa.Table:
        unit, contents = _content(block)
        return _table(self._worker.process(unit, contents))


class UnitFeed:
    """Put units into Ray's queue on a thread, no faster than they are processed.

    Args:
        units: The units, listed as they are taken.
        ahead: Number of units that may be listed and not done.
    """

    def __init__(self, units: Iterable[Unit], ahead: int) -> None:
        from ray.util.queue import Queue

        self.queue = Queue(QUEUED, actor_options={"num_cpus": 0})
        self.error: BaseException | None = None
        self._units, self._free, self._stop = units, threading.Semaphore(ahead), threading.Event()
        self._thread = threading.Thread(target=self._run, name="list", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for unit in self._units:
                self._free.acquire(timeout=STALL_S)
                if not self._put(unit):
                    return
        except BaseException as error:  # raised again where the reports are read
            self.error = error
        self._put(None)

    def _put(self, unit: Unit | None) -> bool:
        from ray.util.queue import Full

        while not self._stop.is_set():
            try:
                self.queue.put(unit, timeout=0.5)
                return True
            except Full:
                continue
        return False

    def note_done(self) -> None:
        """Let one more unit be listed."""
        self._free.release()

    def close(self) -> None:
        """End the thread and the queue."""
        self._stop.set()
        self._thread.join(timeout=10)
        self.queue.shutdown(force=True)


@dataclass
class _Actors:
    """Options of the actors of a pass, each with a name of its own.

    Ray Data (2.60) forgets an actor that is being started again when a dataset ends. The actor then keeps its cores,
    and no actor of the next pass can start.

    Attributes:
        options: Options of all of them.
        names: Names of those that were started.
    """

    options: dict[str, Any]
    names: list[str] = field(default_factory=list)

    def next_options(self) -> dict[str, Any]:
        """Return the options of the next actor."""
        self.names.append(f"grounded_sam-{uuid.uuid4().hex}")
        return {**self.options, "name": self.names[-1]}

    def kill(self) -> None:
        """End those that are still there."""
        import ray

        for name in self.names:
            with suppress(ValueError):  # it has ended
                ray.kill(ray.get_actor(name))


def run_pass(units: Iterable[Unit], settings: WorkerSettings, pool: Pool) -> Generator[Report]:
    """Process units on the workers of a pool, and yield their reports as they come.

    A unit whose worker dies is tried once more on another one, or not at all with `pool.singly`; if that one dies too,
    there is no report of it.

    Args:
        units: The units; iterated on another thread.
        settings: What workers are built from.
        pool: The workers.

    Raises:
        Exception: As iterating the units does.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy, read_datasource

    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # a block for each row
    context.max_errored_blocks = -1
    reference = ray.put(settings)
    ahead = AHEAD_PER_WORKER * pool.sizes[1] + QUEUED
    feed = UnitFeed(units, ahead)
    smallest, largest = pool.sizes
    in_flight = {"max_tasks_in_flight_per_actor": 1} if pool.singly else {}
    actors = _Actors({"max_restarts": -1, "max_task_retries": 0 if pool.singly else 1})
    try:
        with DataContext.current(context):
            dataset = read_datasource(_source(feed.queue), override_num_blocks=1, num_cpus=0)
            fetchers = max(2, 2 * largest)
            dataset = dataset.map_batches(
                _Fetch(reference).__call__,
                batch_size=None,
                batch_format="pyarrow",
                compute=TaskPoolStrategy(size=fetchers),
                num_cpus=0,
            )
            dataset = dataset.map_batches(
                _RayWorker,
                batch_size=None,
                batch_format="pyarrow",
                fn_constructor_args=(reference,),
                compute=ActorPoolStrategy(min_size=smallest, max_size=largest, **in_flight),
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                ray_remote_args_fn=actors.next_options,
            )
            for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in range(block.num_rows):
                    feed.note_done()
                    yield _content(block.slice(row, 1))
        if feed.error is not None:
            raise feed.error
    finally:
        feed.close()
        actors.kill()


def _source(units: Any) -> Any:
    """Return a datasource with one task, which yields units as they come."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Units(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(lambda: _take_units(units), metadata)]

    return Units()
