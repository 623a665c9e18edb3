"""Report of a sweep: a sorted table, a plot, and the best settings as a preset.

The report of labels is the sink in `sinks.report`.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from grounded_sam.config.compose import GROUPS
from grounded_sam.config.saved import unresolved
from grounded_sam.config.secrets import VARIABLE
from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write
from grounded_sam.output.claim import acquire, acquired, claim, release
from grounded_sam.output.sweep import JobEntry, Sweep

#: First parts of columns that are measured, as opposed to settings.
MEASURED = ("bbox", "segm", "davis_all_frames", "sav")
#: Settings that do not count as a difference between jobs.
INCIDENTAL = ("output", "hydra")
#: Groups of settings that do not change what the models cost.
FREE = ("select", "sink", "truth", "metric")
#: Files of a report, in the folder of the sweep.
REPORT_FILES = ("sweep.csv", "sweep.md", "sweep.png", "sweep.html", "preset/best.yaml")
#: File that Hydra writes into the folder of a sweep.
HYDRA_FILE = "multirun.yaml"

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
        rows: Values by column; the best job first, failed jobs last.
        metric: Name of the metric that the sweep maximizes.
    """

    columns: list[str]
    rows: list[Row]
    metric: str = "metric"

    @property
    def texts(self) -> list[list[str]]:
        """The cells of each row, as text."""
        return [[_to_text(row.get(column)) for column in self.columns] for row in self.rows]


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


def make_table(jobs: Sequence[Job]) -> SweepTable:
    """Make the table of a sweep.

    Args:
        jobs: Its jobs, at least one.

    >>> jobs = [Job(name=str(i), settings={"select.score": str(i / 10)}, value=i / 4) for i in range(2)]
    >>> make_table(jobs).texts
    [['1', '0.1', '0.25'], ['0', '0.0', '0']]
    """
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    swept = [
        key for key in keys if key.split(".")[0] not in INCIDENTAL and len({job.settings.get(key) for job in jobs}) > 1
    ]
    costs = _Costs(jobs, swept)
    rows = [_make_row(job, swept, costs) for job in jobs]
    rows.sort(key=lambda row: (row["metric"] is None, -(row["metric"] or 0.0)))
    columns = dict.fromkeys(column for row in rows for column in row)
    filled = [c for c in columns if c == "job" or any(row.get(c) not in (None, "") for row in rows)]
    names = {job.metrics["metric"] for job in jobs if "metric" in job.metrics}
    return SweepTable(filled, rows, names.pop() if len(names) == 1 else "metric")


def _make_row(job: Job, swept: Sequence[str], costs: _Costs) -> Row:
    metrics = job.metrics
    row: Row = {"job": job.name, **{key: _unquote(job.settings.get(key, "")) for key in swept}}
    row["metric"] = job.value
    for kind in ("bbox", "segm"):
        row |= {f"{kind}.{key}": metrics.get(kind, {}).get(key) for key in ("AP", "AP50") if kind in metrics}
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


def _to_text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(folder: Path) -> str:
    """Write `sweep.csv`, `sweep.md`, `sweep.png`, `sweep.html` and `preset/best.yaml`; return the table as text.

    Args:
        folder: Folder of the sweep.

    Raises:
        ConfigError: If it contains no job, or files of these names were not written by an earlier report.
    """
    jobs = read_jobs(folder)
    with claim(folder):
        return _write_table(folder, jobs, make_table(jobs))


def _write_table(folder: Path, jobs: Sequence[Job], table: SweepTable) -> str:
    _write_csv(folder / "sweep.csv", table)
    _write_markdown(folder / "sweep.md", table)
    files = ["sweep.csv", "sweep.md"]
    best = next((row for row in table.rows if row["metric"] is not None), None)
    usage = ""
    if best is not None:
        plot = _plot(table)
        with atomic_write(folder / "sweep.png") as part:
            part.write_bytes(plot)
        with atomic_write(folder / "sweep.html") as part:
            part.write_text(_to_html(table, plot), encoding="utf-8")
        settings = next(job.settings for job in jobs if job.name == best["job"])
        with atomic_write(folder / "preset" / "best.yaml") as part:
            part.write_text(_to_preset(settings, best), encoding="utf-8")
        files += ["sweep.png", "sweep.html", "preset/best.yaml"]
        usage = f"; use the best with --config-dir {folder} preset=best"
    return f"{_to_console(table)}\n  in {folder}: {', '.join(files)}{usage}"


def _write_csv(path: Path, table: SweepTable) -> None:
    with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table.rows)


def _write_markdown(path: Path, table: SweepTable) -> None:
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [table.columns, *table.texts]
    ]
    lines.insert(1, "|" + "---|" * len(table.columns))
    with atomic_write(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _to_console(table: SweepTable) -> str:
    """Draw the table for a terminal."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=f"{len(table.rows)} jobs, the best first", title_justify="left")
    for column in table.columns:
        drawn.add_column(column, justify="left" if column == "error" else "right")
    for cells in table.texts:
        drawn.add_row(*cells)
    out = io.StringIO()
    Console(file=out, width=180, markup=False).print(drawn)
    return out.getvalue().rstrip()


def _to_preset(settings: dict[str, str], row: Row) -> str:
    """Convert the overrides of a job to a preset: choices of groups become its defaults, others its values."""
    import yaml
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    defaults: list[Any] = []
    values = OmegaConf.create()
    for key, value in settings.items():
        if key.split(".")[0] in (*INCIDENTAL, "input", "truth", "metric", "preset", "sink", "sweep"):
            continue
        if key in ("source", "source.shard", "source.num_shards"):
            continue
        if key in GROUPS:
            defaults.append({f"override /{key}": value})
            continue
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        OmegaConf.update(values, key, parsed.value(), force_add=True)
    header = f"# @package _global_\n# The best of a sweep: {_to_text(row['metric'])}, job {row['job']}.\n"
    if "preset" in settings:
        names = settings["preset"].strip("[]").split(",")
        defaults = [*(name.strip() for name in names if name.strip()), *defaults]
    text = yaml.safe_dump({"defaults": defaults}, sort_keys=False) if defaults else ""
    plain = OmegaConf.to_container(values)
    return header + text + (yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) if plain else "")


def _plot(table: SweepTable) -> bytes:
    """Plot the metric over a swept setting and, if known, precision over recall; return the PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in table.rows if row["metric"] is not None]
    swept = [key for key in rows[0] if "." in key and key.split(".")[0] not in MEASURED]
    swept += [key for key in rows[0] if key in GROUPS]
    numeric = [key for key in swept if all(_to_number(row.get(key)) is not None for row in rows)]
    x_key = next(iter(numeric or swept), "job")
    has_rates = all(row.get("recall") is not None for row in rows)
    figure = Figure(figsize=(11 if has_rates else 6, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if has_rates else 1, squeeze=False)[0]
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(", ".join(f"{key}={row[key]}" for key in swept if key != x_key), []).append(row)
    for label, members in series.items():
        points = _sorted_points(members, x_key, x_key in numeric)
        axes[0].plot([x for x, _ in points], [row["metric"] for _, row in points], marker="o", label=label or None)
        if has_rates:
            recall, precision = ([row[key] for _, row in points] for key in ("recall", "precision"))
            axes[1].plot(recall, precision, marker="o", label=label or None)
    for axis, (x_label, y_label) in zip(axes, ((x_key, table.metric), ("recall", "precision")), strict=False):
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
    if 1 < len(series) <= 12:
        axes[-1].legend(fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _sorted_points(rows: Sequence[Row], key: str, is_numeric: bool) -> list[tuple[Any, Row]]:
    """Return rows with their x values, in order of these."""
    points = [(_to_number(row.get(key)) if is_numeric else str(row.get(key)), row) for row in rows]
    return sorted(points, key=lambda point: (isinstance(point[0], str), point[0]))


def _to_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _to_html(table: SweepTable, plot: bytes) -> str:
    def table_row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}" for cell in cells) + "</tr>"

    url = f"data:image/png;base64,{base64.b64encode(plot).decode()}"
    style = (
        "body{font:14px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #eee}"
    )
    body = "".join(table_row(cells, "td") for cells in table.texts)
    return (
        f"<!doctype html><meta charset='utf-8'><title>Sweep</title><style>{style}</style><img src='{url}' alt='plot'>"
        f"<table>{table_row(table.columns, 'th')}{body}</table>\n"
    )


class SweepReport(Callback):
    """Hydra callback of sweeps: prepares the shared predictions before the jobs, and reports after them."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Claim the folder of the sweep until its end, remove an earlier report, write what the jobs may select."""
        from grounded_sam.pipeline.prediction_cache import LoosestSelection

        try:
            claimed = acquire(Path(config.hydra.sweep.dir))
            for name in (*REPORT_FILES, HYDRA_FILE):
                claimed.check(claimed.folder / name)
            for name in REPORT_FILES:  # of an earlier sweep
                (claimed.folder / name).unlink(missing_ok=True)
            claimed.record(claimed.folder / HYDRA_FILE, None)
            sweep = Sweep.start(claimed.folder)
        except (ConfigError, OSError) as error:  # Hydra would only warn, and start the jobs
            sys.exit(f"grounded-sam: {error}")
        _hide_in_config(config)
        space = unresolved(config.hydra.sweeper).get("params") or {}
        overrides = [*unresolved(config.hydra.overrides.task), *(f"{key}={value}" for key, value in space.items())]
        LoosestSelection.from_overrides(overrides).write(sweep.predictions)

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        """Write and print the report, if there is something to report; exit with an error if jobs failed."""
        folder = Path(config.hydra.sweep.dir)
        with suppress(OSError):  # Hydra has written it
            hydra_file = Path(os.path.abspath(folder / HYDRA_FILE))
            acquired(folder).record(hydra_file, hydra_file)
        try:
            if (sweep := Sweep.last(folder)) is not None:
                sweep.remove_predictions()
            self._report(config, folder)
        finally:
            release(acquired(folder))

    def _report(self, config: Any, folder: Path) -> None:
        """Write and print the report, if there is something to report."""
        try:
            jobs = read_jobs(folder)
        except ConfigError:
            return
        failed = [job for job in jobs if job.error is not None]
        if failed or any(job.metrics for job in jobs):
            print(write_report(folder))
            command = _best_command(config, folder)
            if any(job.value is not None for job in jobs) and not any(VARIABLE in word for word in command):
                print(f"To use the best settings: {shlex.join(command)}")
        if failed:
            sys.exit(
                f"grounded-sam: {len(failed)} of {len(jobs)} jobs failed; see the errors in {folder / 'sweep.csv'}"
            )


def _hide_in_config(config: Any) -> None:
    """Hide the secrets in the URLs of the config of a sweep, which Hydra saves."""
    from omegaconf import flag_override

    with flag_override(config, ["readonly", "struct"], [False, False]):
        for key, value in unresolved(config).items():
            if key != "hydra":
                config[key] = value
            elif value["sweeper"].get("params"):
                config.hydra.sweeper.params = value["sweeper"]["params"]


def _best_command(config: Any, folder: Path) -> list[str]:
    """Return the command that uses the best settings of a sweep, for the same input."""
    inputs = [item for item in unresolved(config.hydra.overrides.task) if item.startswith("input=")]
    return ["grounded-sam", "--config-dir", str(folder), "preset=best", *inputs]


def main() -> None:
    """Entry point of `grounded-sam-report FOLDER`, which writes the report of an earlier sweep again."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="grounded-sam-report",
        description="Write the report of a sweep again: sweep.csv, sweep.md, sweep.png, sweep.html, preset/best.yaml.",
    )
    parser.add_argument("folder", type=Path, help="folder of the sweep, with a folder per job in it")
    try:
        print(write_report(parser.parse_args().folder))
    except ConfigError as error:
        sys.exit(f"grounded-sam-report: {error}")
