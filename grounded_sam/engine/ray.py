"""Run a job on the workers of Ray, on this machine or on a cluster."""

from __future__ import annotations

import copy
import logging
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from grounded_sam.checks import check_bool, check_int, check_number
from grounded_sam.config.build import (
    build,
    build_sinks,
    build_source,
    detector_traits,
    has_store,
    to_plain,
    vocabulary_from_config,
)
from grounded_sam.config.hydra import conf_dir
from grounded_sam.engine.job import EngineJob
from grounded_sam.engine.listing import KILLED, Listing, ReplaySource, parts_of
from grounded_sam.engine.local import counts_of
from grounded_sam.engine.ray_dataset import Pool, run_pass
from grounded_sam.engine.worker import Report, WorkerSettings
from grounded_sam.errors import ConfigError, GroundedSamError, count_of, describe_error
from grounded_sam.formats.output_classes import OutputClasses
from grounded_sam.media.progress import ProgressBar
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.pipeline.runner import Runner, Summary
from grounded_sam.sinks.store import StoreSink
from grounded_sam.structures.protocols import ResultStore, Sink
from grounded_sam.structures.request import Request
from grounded_sam.structures.results import Skipped

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: Passes of single images and videos over what is missing, before it is put aside.
SINGLE_PASSES = 2
#: Cores per worker where there are no GPUs and `num_cpus` is not set.
CORES_PER_WORKER = 4
#: Seconds after which a worker that has reported nothing is no longer counted.
WORKER_SEEN_S = 300.0


class EngineError(GroundedSamError):
    """Raised where Ray or a worker cannot go on."""


@dataclass
class _Totals:
    """What all workers did so far, in counts."""

    listed: int = 0
    resumed: int = 0
    done: int = 0
    images: int = 0
    frames: int = 0
    empty: int = 0
    written: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    skipped: dict[Skipped, None] = field(default_factory=dict)
    workers: dict[int, float] = field(default_factory=dict)
    interrupted: bool = False

    def add(self, report: Report) -> None:
        self.done += report.done
        self.images += report.images
        self.frames += report.frames
        self.empty += report.empty
        self.written += report.written
        self.objects.update(report.objects)
        self.decisions.update(report.decisions)
        self.skipped.update(dict.fromkeys(report.skipped))
        self.workers[report.pid] = time.monotonic()


class RayEngine:
    """Run a job on workers that each build the pipeline, take images from a queue and write into the store.

    The command lists what the store does not have. Sinks that need everything run at the end, from the store.

    Args:
        address: Address of a cluster; None to start Ray on this machine.
        concurrency: Number of workers, or the smallest and the largest number; None for one per GPU, and without GPUs
            one per four cores.
        num_gpus: GPUs per worker; None for 1 where there are GPUs, unless the device is the CPU.
        num_cpus: Cores per worker, and threads of its models; None for an equal share.
        batch: Largest number of images per task.
        object_store_memory: Bytes of the object store of a Ray that is started here.
        retry_killed: Also process what killed its workers in an earlier run.

    Raises:
        ConfigError: If a setting is out of range, or Ray is not installed.
    """

    def __init__(
        self,
        address: str | None = None,
        concurrency: int | Sequence[int] | None = None,
        num_gpus: float | None = None,
        num_cpus: float | None = None,
        batch: int = 32,
        object_store_memory: int = 1_000_000_000,
        retry_killed: bool = False,
    ) -> None:
        sizes = [concurrency or 0] if concurrency is None or isinstance(concurrency, int) else list(concurrency)
        for size in sizes if concurrency is not None else ():
            check_int("engine.concurrency", size, 1)
        if len(sizes) not in (1, 2) or sizes[0] > sizes[-1]:
            raise ConfigError(
                f"engine.concurrency must be a number of workers or [smallest, largest], such as [1, 8], got {sizes}"
            )
        if num_gpus is not None:
            check_number("engine.num_gpus", num_gpus, 0)
        if num_cpus is not None:
            check_number("engine.num_cpus", num_cpus, 0)
        check_int("engine.batch", batch, 1)
        check_int("engine.object_store_memory", object_store_memory, 80_000_000)
        check_bool("engine.retry_killed", retry_killed)
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise ConfigError("engine=ray needs the extra ray: pip install 'grounded_sam[ray]'") from error
        self.address, self.concurrency = address, None if concurrency is None else (sizes[0], sizes[-1])
        self.num_gpus, self.num_cpus, self.batch = num_gpus, num_cpus, batch
        self.object_store_memory, self.retry_killed = object_store_memory, retry_killed

    def run(self, job: EngineJob) -> tuple[Summary, Sequence[Sink]]:
        """Process the input on workers, then hand what is stored to the other sinks; see `engine.job.Engine`."""
        start = time.perf_counter()
        _check_job(job)
        cfg = _with_store(job.cfg)
        parts_of(build_source(cfg))  # a wrong input is named before Ray is started
        with self._ray(str(cfg.device)) as pool:
            request = _request(cfg, pool)
            classes = OutputClasses(job.output, request.classes)
            totals = _Totals()
            try:
                self._passes(job, cfg, request, classes, pool, totals)
            except KeyboardInterrupt:
                totals.interrupted = True
        return self._finish(job, cfg, request, classes, totals, start)

    def _passes(
        self, job: EngineJob, cfg: DictConfig, request: Request, classes: OutputClasses, pool: Pool, totals: _Totals
    ) -> None:
        """Process everything, then what is missing one by one, and put aside what kills its workers."""
        missing = 0
        for number in range(SINGLE_PASSES + 2):
            source = build_source(cfg)
            parts = parts_of(source)
            store = _open_store(job, cfg, request, classes)
            names = {skipped.file for skipped in totals.skipped}
            is_single = number > 0
            listing = Listing(parts, store, 1 if is_single else self.batch, names, self.retry_killed or is_single)
            with store:
                if number > SINGLE_PASSES:
                    self._put_aside(listing, totals)
                    return
                share = store.writer.share()
                threads = max(1, int(pool.num_cpus))
                settings = WorkerSettings(
                    to_plain(cfg), request, share, WorkerSettings.readers(parts), threads, os.getcwd()
                )
                before = totals.done
                smallest, largest = pool.sizes
                sizes = (min(smallest, missing), min(largest, missing)) if is_single else pool.sizes
                self._pass(listing, settings, replace(pool, sizes=sizes, singly=is_single), totals)
            if number == 0:
                totals.listed, totals.resumed = listing.listed, listing.resumed
                totals.skipped.update(dict.fromkeys([*listing.left_out, *source.skipped]))
            missing = listing.to_do - (totals.done - before)
            if missing <= 0:
                return

    def _pass(self, listing: Listing, settings: WorkerSettings, pool: Pool, totals: _Totals) -> None:
        """Run one pass, with a progress bar."""
        start, before = time.monotonic(), totals.done
        units = listing.units()
        first = next(units, None)
        if first is None:
            return
        try:
            with (
                ProgressBar("images", listing.length) as bar,
                closing(run_pass(chain([first], units), settings, pool)) as reports,
            ):
                for report in reports:
                    if report.error is not None:
                        raise EngineError(report.error)
                    totals.add(report)
                    done, now = totals.done - before, time.monotonic()
                    workers = sum(now - seen < WORKER_SEEN_S for seen in totals.workers.values())
                    text = _progress(done / max(now - start, 1e-3), workers, listing.to_do - done, len(totals.skipped))
                    bar.update(listing.listed - listing.to_do + done, text)
        except GroundedSamError:
            raise
        except Exception as error:
            if type(error).__module__.split(".")[0] != "ray":
                raise
            raise EngineError(
                f"Ray ended ({describe_error(error)}); what was stored is intact, and running the same command again "
                "continues from there"
            ) from error

    def _put_aside(self, listing: Listing, totals: _Totals) -> None:
        """Record what is still missing as skipped."""
        for unit in listing.units():
            for name in unit.names:
                skipped = Skipped(name, KILLED)
                listing.store.skip(skipped)
                totals.skipped[skipped] = None

    def _finish(
        self, job: EngineJob, cfg: DictConfig, request: Request, classes: OutputClasses, totals: _Totals, start: float
    ) -> tuple[Summary, Sequence[Sink]]:
        """Hand what is stored to the sinks, and return the summary of all workers."""
        source = build_source(cfg)
        sinks = build_sinks(cfg, job.output, request.classes, classes)
        store = store_of(sinks)
        replay = ReplaySource(parts_of(source), store.writer, list(totals.skipped))
        runner = Runner(Pipeline(None, vocabulary=request.classes), replay, sinks, job.output, request, classes)
        summary = runner.run()
        store.writer.decisions.update(totals.decisions)
        store.add_written(totals.images, totals.written, replay.found - totals.resumed)
        summary.outputs = [sink.summary() for sink in sinks]
        if len(sinks) == 1:  # the runner has counted nothing, since no other sink wanted results
            summary.images, summary.frames, summary.empty = totals.images, totals.frames, totals.empty
            summary.objects = totals.objects
        else:
            summary.stored = max(0, summary.images - totals.images)
        summary.interrupted |= totals.interrupted
        if not summary.interrupted:
            summary.missing = replay.missing
        job.record.update(counts_of(summary, sinks), replayed=0, boxes_replayed=0)
        job.record["seconds"] = {"all": time.perf_counter() - start}
        return summary, sinks

    @contextmanager
    def _ray(self, device: str) -> Iterator[Pool]:
        """Connect to the cluster, or start Ray here until the end of the block; yield the workers to use.

        Raises:
            ConfigError: If the cluster cannot be reached, or this machine has fewer GPUs than the workers need.
            EngineError: If Ray cannot be started.
        """
        import ray

        if ray.is_initialized():  # by a script that runs the command
            yield self._pool(device, ray.cluster_resources())
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        is_quiet = os.environ.get("GROUNDED_SAM_DEBUG") != "1"
        if is_quiet:
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        level = logging.ERROR if is_quiet else logging.INFO
        options: dict[str, Any] = {"logging_level": level, "log_to_driver": not is_quiet}
        pool = None
        if self.address is None:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a token is written to the home folder
            os.environ.setdefault("RAY_worker_niceness", "0")  # else all other programs have precedence
            resources = {"CPU": float(_cores()), "GPU": float(_gpus(device))}
            pool = self._pool(device, resources)
            if pool.num_gpus * pool.sizes[1] > resources["GPU"] + 1e-6:
                raise ConfigError(
                    f"engine.concurrency={pool.sizes[1]} workers with engine.num_gpus={pool.num_gpus:g} need "
                    f"{pool.num_gpus * pool.sizes[1]:g} GPUs, but this machine has {resources['GPU']:g}"
                )
            cores = max(resources["CPU"], pool.num_cpus * pool.sizes[1])
            options |= {"address": "local", "num_cpus": math.ceil(cores), "num_gpus": int(resources["GPU"])}
            options |= {"include_dashboard": False, "object_store_memory": self.object_store_memory}
        else:
            options |= {"address": self.address}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with _without_stderr() if is_quiet else nullcontext():
                ray.init(**options)
        except Exception as error:
            if self.address is None:
                raise EngineError(f"Ray cannot be started ({describe_error(error)})") from error
            raise ConfigError(f"engine.address={self.address} cannot be reached ({describe_error(error)})") from error
        try:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # which Ray has replaced
            if is_quiet:
                logging.getLogger("ray.data").setLevel(logging.CRITICAL)
            yield pool or self._pool(device, ray.cluster_resources())
        finally:
            ray.shutdown()

    def _pool(self, device: str, resources: Mapping[str, float]) -> Pool:
        """Return the workers for the cores and GPUs that there are."""
        cores, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
        num_gpus = self.num_gpus
        if num_gpus is None:
            num_gpus = 1.0 if gpus and device != "cpu" else 0.0
        count = int(gpus / num_gpus) if num_gpus else int(cores / CORES_PER_WORKER)
        sizes = self.concurrency or (max(1, count), max(1, count))
        return Pool(sizes, self.num_cpus or max(1.0, cores // sizes[1]), num_gpus)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Leave out what Ray's own process prints while it starts; what goes wrong is raised."""
    sys.stderr.flush()
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


def _cores() -> int:
    """Return the number of cores of this machine."""
    return os.cpu_count() or 1


def _gpus(device: str) -> int:
    """Return the number of GPUs of this machine; 0 if the device of the run is none."""
    import torch

    return torch.cuda.device_count() if device in ("auto", "cuda") else 0


def _check_job(job: EngineJob) -> None:
    """Check that a job can be divided between workers.

    Raises:
        ConfigError: If it cannot, with the way out.
    """
    from omegaconf import OmegaConf

    cfg = job.cfg
    if job.sweep is not None:
        raise ConfigError("engine=ray runs one job; the jobs of a sweep need engine=local and a launcher")
    if (OmegaConf.select(cfg, "source.num_shards") or 1) > 1:
        raise ConfigError("engine=ray divides the input itself; remove source.num_shards and source.shard")
    if (cfg.detector is not None and detector_traits(cfg.detector).clicks) or cfg.track.get("clicks") is not None:
        raise ConfigError("manual prompts (detector=clicks, track.clicks) need engine=local")


def _with_store(cfg: DictConfig) -> DictConfig:
    """Return a config with `sink=store`, which workers write into, in addition to its sinks."""
    from omegaconf import OmegaConf, open_dict

    if has_store(cfg):
        return cfg
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.sink = OmegaConf.merge(OmegaConf.load(conf_dir() / "sink" / "store.yaml"), cfg.sink or {})
    return cfg


def _request(cfg: DictConfig, pool: Pool) -> Request:
    """Return what to look for; where there is no text a worker finds out, since it has the detector."""
    import ray

    vocabulary = vocabulary_from_config(cfg)
    if vocabulary is not None:
        return Request.for_classes(vocabulary)
    task = ray.remote(_request_of_detector).options(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, max_retries=0)
    request, error = ray.get(task.remote(to_plain(cfg)))
    if error is not None:
        raise EngineError(error)
    return request


def _request_of_detector(config: dict[str, Any]) -> tuple[Request | None, str | None]:
    """Build a pipeline, and return its request or why there is none."""
    from omegaconf import OmegaConf

    try:
        return build(OmegaConf.create(config)).request(), None
    except Exception as error:
        return None, str(error) if isinstance(error, GroundedSamError) else describe_error(error)


def _open_store(job: EngineJob, cfg: DictConfig, request: Request, classes: OutputClasses) -> StoreSink:
    """Open the store with what was written so far, without the other sinks."""
    return store_of(build_sinks(cfg, job.output, request.classes, classes))


def store_of(sinks: Sequence[Sink]) -> StoreSink:
    """Return the store among sinks."""
    store = next(sink for sink in sinks if isinstance(sink, ResultStore))
    if not isinstance(store, StoreSink):
        raise ConfigError(f"engine=ray writes into sink=store, not into {type(store).__name__}")
    return store


def _progress(rate: float, workers: int, left: int, skipped: int) -> str:
    """Return the text beside the bar."""
    text = f"images, {rate:.1f}/s, {count_of(workers, 'worker')}, {left:,} waiting"
    return f"{text}, {skipped:,} skipped" if skipped else text
