"""The jobs of a sweep, and the table of what they measured and cost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grounded_sam.errors import ConfigError
from grounded_sam.evaluation.agreement import JobAgreement, compare_jobs
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.output.sweep import JobEntry, Sweep

#: First parts of columns that are measured, as opposed to settings.
MEASURED = ("bbox", "segm", "phrases", "davis_all_frames", "sav")
#: Settings that do not count as a difference between jobs.
INCIDENTAL = ("output", "hydra")
#: Groups of settings that do not change what the models cost.
FREE = ("select", "sink", "truth", "metric")
#: Most jobs whose agreement with each other has a column.
MAX_PAIRED = 8

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of a sweep.

    Attributes:
        name: Name of its folder.
        settings: Its overrides, as strings by key.
        metrics: Content of its `metrics.json`; empty without one.
        value: The metric that the sweep maximizes; None if the job failed.
        images: Number of images that were processed.
        objects: Number of objects by class, in videos of tracks; None in a sweep of an earlier version.
        empty: How many of the images have no object; None as above.
        seconds: Seconds by stage.
        peak_mib: Peak resident memory in MiB.
        replayed: Number of images whose results were taken from another job.
        boxes_replayed: Number of images whose boxes were taken from another job.
        error: Why it failed; None if it did not.
    """

    name: str
    settings: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
    value: float | None = None
    images: int = 0
    objects: dict[str, int] | None = None
    empty: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: float | None = None
    replayed: int = 0
    boxes_replayed: int = 0
    error: str | None = None

    @classmethod
    def read(cls, folder: Path, entry: JobEntry, sweep_id: str | None) -> Job:
        """Read the `run.json` and, if it measured something, the `metrics.json` of a job.

        Args:
            folder: Folder of the sweep.
            entry: Where the job is.
            sweep_id: Id of its sweep; None for sweeps of earlier versions.
        """
        record_file, metrics = folder / entry.folder / "run.json", folder / entry.folder / "metrics.json"
        record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.is_file() else {}
        if entry.error is not None or not record or record.get("sweep") != sweep_id:
            record = {"overrides": entry.overrides, "error": entry.error or "ended without a result", "measured": False}
        has_metrics = record.get("measured", True) and metrics.is_file()
        return cls(
            name=entry.folder,
            settings=dict(override.lstrip("+").split("=", 1) for override in record["overrides"] if "=" in override),
            metrics=json.loads(metrics.read_text(encoding="utf-8")) if has_metrics else {},
            value=record.get("value"),
            images=record.get("images", 0),
            objects=record.get("objects"),
            empty=record.get("empty"),
            seconds=record.get("seconds", {}),
            peak_mib=record.get("peak_mib"),
            replayed=record.get("replayed", 0),
            boxes_replayed=record.get("boxes_replayed", 0),
            error=record.get("error"),
        )

    @property
    def ran_models(self) -> bool:
        """Whether it processed images itself, instead of replaying the results of another job."""
        return self.images > 0 and not self.replayed

    @property
    def seconds_per_image(self) -> dict[str, float]:
        """Seconds per image by stage."""
        return {stage: seconds / self.images for stage, seconds in self.seconds.items()} if self.images else {}


@dataclass(frozen=True)
class SweepTable:
    """The table of a sweep.

    Attributes:
        columns: Names of the columns that have values.
        rows: Values by column; the best job first, failed jobs last. Without ground truth in the order of the jobs.
        metric: Name of the metric that the sweep maximizes; None without ground truth.
        notes: Sentences on what is not in the table, and why.
    """

    columns: list[str]
    rows: list[Row]
    metric: str | None = "metric"
    notes: Sequence[str] = ()

    @property
    def texts(self) -> list[list[str]]:
        """The cells of each row, as text."""
        return [[cell_text(row.get(column)) for column in self.columns] for row in self.rows]


def read_jobs(folder: Path) -> list[Job]:
    """Read the jobs of a sweep in their order.

    Args:
        folder: Folder of the sweep, with a folder per job in it.

    Raises:
        ConfigError: If it contains no job.
    """
    if (sweep := Sweep.last(folder)) is not None:
        entries = sweep.jobs()
    else:  # of an earlier version, which numbered the folders and registered nothing
        names = [path.parent.name for path in folder.glob("*/run.json") if path.parent.name.isdecimal()]
        entries = [JobEntry(int(name), name, []) for name in sorted(names, key=int)]
    if not entries:
        raise ConfigError(f"no job of a sweep in {folder}: expected the output of a sweep (--multirun)")
    return [Job.read(folder, entry, None if sweep is None else sweep.id) for entry in entries]


def is_measured(jobs: Sequence[Job]) -> bool:
    """Return whether a job of a sweep was compared with ground truth, or should have been."""
    return any(job.value is not None or job.metrics for job in jobs) or all(job.error is not None for job in jobs)


def compare_unmeasured(folder: Path, jobs: Sequence[Job], max_pixels: int = MAX_PIXELS) -> JobAgreement | None:
    """Compare what the jobs of a sweep found, if there is no ground truth; else return None.

    Args:
        folder: Folder of the sweep.
        jobs: Its jobs.
        max_pixels: Larger images are refused.
    """
    if is_measured(jobs):
        return None
    inputs = {job.name: job.settings.get("input", "") for job in jobs if job.error is None}
    return compare_jobs(folder, inputs, max(job.images for job in jobs), max_pixels)


def make_table(jobs: Sequence[Job], found: JobAgreement | None = None) -> SweepTable:
    """Make the table of a sweep: what was measured or, without ground truth, what was found.

    Args:
        jobs: Its jobs, at least one.
        found: How far they agree, without ground truth.

    >>> jobs = [Job(name=str(i), settings={"select.score": str(i / 10)}, value=i / 4) for i in range(2)]
    >>> make_table(jobs).texts
    [['1', '0.1', '0.25'], ['0', '0.0', '0']]
    """
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    swept = [
        key for key in keys if key.split(".")[0] not in INCIDENTAL and len({job.settings.get(key) for job in jobs}) > 1
    ]
    costs = _Costs(jobs, swept)
    rows = [_make_row(job, swept, costs, None if found is None else _found(job, jobs, found)) for job in jobs]
    if found is None:
        rows.sort(key=lambda row: (row["metric"] is None, -(row["metric"] or 0.0)))
    columns = dict.fromkeys(column for row in rows for column in row)
    filled = [c for c in columns if c == "job" or any(row.get(c) not in (None, "") for row in rows)]
    names = {job.metrics["metric"] for job in jobs if "metric" in job.metrics}
    metric = names.pop() if len(names) == 1 else "metric"
    return SweepTable(filled, rows, None if found is not None else metric, [] if found is None else found.notes)


def _found(job: Job, jobs: Sequence[Job], found: JobAgreement) -> Row:
    """Return what a job found: numbers of images and objects, and how far other jobs agree, as columns."""
    classes = dict.fromkeys(name for other in jobs for name in other.objects or ())
    row: Row = {}
    if job.error is None:
        row |= {"images": job.images, "empty": job.empty}
    if job.error is None and job.objects is not None:
        row |= {"objects": sum(job.objects.values())} | {f"count {name}": job.objects.get(name, 0) for name in classes}
    row["agreement"] = found.mean(job.name)
    if len(jobs) <= MAX_PAIRED:
        row |= {f"agrees with {other.name}": found.values.get((job.name, other.name)) for other in jobs}
    return row


def _make_row(job: Job, swept: Sequence[str], costs: _Costs, found: Row | None) -> Row:
    metrics = job.metrics
    row: Row = {"job": job.name, **{key: _unquote(job.settings.get(key, "")) for key in swept}}
    row |= {"metric": job.value} if found is None else found
    for kind in ("bbox", "segm"):
        row |= {f"{kind}.{key}": metrics.get(kind, {}).get(key) for key in ("AP", "AP50") if kind in metrics}
    phrases = metrics.get("phrases", {})
    if phrases.get("positive_pairs") and phrases.get("negative_pairs"):  # otherwise they are 0 in each job
        row |= {f"phrases.{key}": phrases.get(key) for key in ("cgF1", "IL_MCC")}
    for rule in ("davis_all_frames", "sav"):
        row |= {f"{rule}.JF": metrics[rule]["JF"]} if rule in metrics else {}
    row |= {key: metrics.get("tracking", {}).get(key) for key in ("HOTA", "IDF1", "IDSW") if "tracking" in metrics}
    row |= {key: metrics.get("at_threshold", {}).get(key) for key in ("precision", "recall", "f1") if metrics}
    seconds = costs.seconds_per_image(job)
    row |= {f"s/image {stage}": seconds.get(stage) for stage in ("detect", "segment", "track", "all")}
    row["peak MiB"] = costs.peak_mib(job)
    row["error"] = job.error or ""
    return row


class _Costs:
    """Costs of jobs; a job that replays results has the costs of the job that computed them.

    Args:
        jobs: All jobs of a sweep.
        swept: Keys of the settings by which they differ.
    """

    def __init__(self, jobs: Sequence[Job], swept: Sequence[str]) -> None:
        self._keys = [key for key in swept if key.split(".")[0] not in FREE]
        # Of several jobs with the same models, the first one counts.
        self._by_models = {self._models(job): job for job in reversed(jobs) if job.ran_models}
        detected = [job for job in self._by_models.values() if not job.boxes_replayed]
        self._by_detector = {self._models(job, "segmenter"): job for job in detected}

    def _models(self, job: Job, without: str = "") -> tuple[str | None, ...]:
        """Return the settings that decide what models cost."""
        return tuple(job.settings.get(key) for key in self._keys if key.split(".")[0] != without)

    def _source(self, job: Job) -> Job | None:
        """Return the job that ran the models."""
        return job if job.ran_models else self._by_models.get(self._models(job))

    def seconds_per_image(self, job: Job) -> dict[str, float]:
        """Return seconds per image by stage, including those of a detector whose boxes were replayed."""
        source = self._source(job)
        if source is None:
            return {}
        seconds = source.seconds_per_image
        detected = self._by_detector.get(self._models(job, "segmenter"))
        if source.boxes_replayed and detected is not None:
            saved = detected.seconds_per_image.get("detect", 0.0) - seconds.get("detect", 0.0)
            seconds |= {stage: seconds.get(stage, 0.0) + saved for stage in ("detect", "all")}
        return seconds

    def peak_mib(self, job: Job) -> float | None:
        """Return the peak memory in MiB."""
        source = self._source(job)
        return None if source is None else source.peak_mib


def _unquote(value: str) -> str:
    r"""Remove the backslashes and quotes of Hydra's overrides, as in `builtin\:shapes`."""
    return re.sub(r"\\(.)", r"\1", value).strip("'")


def cell_text(value: Any) -> str:
    """Return a value as the text of a cell of the table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
