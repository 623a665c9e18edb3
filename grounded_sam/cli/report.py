"""Report of a sweep: a sorted table, a plot, and the best settings as a preset.

The report of labels is the sink in `sinks.report`.
"""

from __future__ import annotations

import base64
import csv
import io
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from grounded_sam.cli.arguments import local_folder
from grounded_sam.config.compose import GROUPS
from grounded_sam.config.saved import unresolved
from grounded_sam.config.secrets import VARIABLE
from grounded_sam.errors import ConfigError
from grounded_sam.evaluation.sweep_table import (
    INCIDENTAL,
    MEASURED,
    Job,
    Row,
    SweepTable,
    cell_text,
    compare_unmeasured,
    make_table,
    read_jobs,
)
from grounded_sam.files import atomic_write
from grounded_sam.output.claim import ClaimedFolder, acquire, acquired, claim, release
from grounded_sam.output.paths import RemotePath, output_path
from grounded_sam.output.sweep import Sweep
from grounded_sam.pages.rendering import render_html

#: Files of a report, in the folder of the sweep.
REPORT_FILES = ("sweep.csv", "sweep.md", "sweep.png", "sweep.html", "preset/best.yaml")
#: File that Hydra writes into the folder of a sweep.
HYDRA_FILE = "multirun.yaml"


def write_report(folder: Path) -> str:
    """Write `sweep.csv`, `sweep.md`, `sweep.png`, `sweep.html` and `preset/best.yaml`; return the table as text.

    Args:
        folder: Folder of the sweep.

    Raises:
        ConfigError: If it contains no job, or files of these names were not written by an earlier report.
    """
    jobs = read_jobs(folder)
    with claim(folder):
        return _write_table(folder, jobs, make_table(jobs, compare_unmeasured(folder, jobs)))


def _write_table(folder: Path, jobs: Sequence[Job], table: SweepTable) -> str:
    _write_csv(folder / "sweep.csv", table)
    _write_markdown(folder / "sweep.md", table)
    files = ["sweep.csv", "sweep.md"]
    best = next((row for row in table.rows if row.get("metric") is not None), None)
    usage = ""
    if table.metric is None:
        with atomic_write(folder / "sweep.html") as part:
            part.write_text(_to_html(table, None), encoding="utf-8")
        files.append("sweep.html")
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
    notes = "".join(f"\n  {note}" for note in table.notes)
    return f"{_to_console(table)}{notes}\n  in {folder}: {', '.join(files)}{usage}"


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

    order = "the best first" if table.metric is not None else "without ground truth: what they found"
    drawn = Table(title=f"{len(table.rows)} jobs, {order}", title_justify="left")
    for column in table.columns:
        header = column.replace(".", ".\n", 1)  # a key that is too wide is cut, also where there is room below
        drawn.add_column(header, overflow="fold", justify="left" if column == "error" else "right")
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
    header = f"# @package _global_\n# The best of a sweep: {cell_text(row['metric'])}, job {row['job']}.\n"
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
    for i, (label, members) in enumerate(series.items()):
        # Dashes and smaller markers leave lines visible that lie below.
        style: dict[str, Any] = {"marker": "o", "markersize": max(3, 7 - 2 * i), "linestyle": ("-", "--", ":")[i % 3]}
        points = _sorted_points(members, x_key, x_key in numeric)
        axes[0].plot([x for x, _ in points], [row["metric"] for _, row in points], label=label or None, **style)
        if has_rates:
            recall, precision = ([row[key] for _, row in points] for key in ("recall", "precision"))
            axes[1].plot(recall, precision, label=label or None, **style)
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


def _to_html(table: SweepTable, plot: bytes | None) -> str:
    url = None if plot is None else f"data:image/png;base64,{base64.b64encode(plot).decode()}"
    return render_html("sweep.html", plot=url, columns=table.columns, rows=table.texts, notes=table.notes)


class SweepReport(Callback):
    """Hydra callback of sweeps: prepares the shared predictions before the jobs, and reports after them."""

    def on_run_start(self, config: Any, **_: Any) -> None:
        """Keep an output at an address from Hydra, which would make a folder of that name."""
        from omegaconf import flag_override

        if isinstance(output_path(str(config.output)), RemotePath):
            with flag_override(config, ["readonly", "struct"], [False, False]):
                config.hydra.run.dir = "."

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Claim the folder of the sweep until its end, remove an earlier report, write what the jobs may select."""
        from grounded_sam.pipeline.prediction_cache import LoosestSelection

        if isinstance(place := output_path(str(config.hydra.sweep.dir)), RemotePath):
            sys.exit(
                f"grounded-sam: jobs of -m cannot write to {place}, only to a folder; leave out -m, and start each job "
                "with its own output"
            )
        try:
            claimed = acquire(Path(config.hydra.sweep.dir))
            assert isinstance(claimed, ClaimedFolder)
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
            claimed = acquired(folder)
            assert isinstance(claimed, ClaimedFolder)
            claimed.record(hydra_file, hydra_file)
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
        if failed or any(job.metrics for job in jobs) or not _are_shards(jobs):
            print(write_report(folder))
            command = _best_command(config, folder)
            if any(job.value is not None for job in jobs) and not any(VARIABLE in word for word in command):
                print(f"To use the best settings: {shlex.join(command)}")
        if failed:
            sys.exit(
                f"grounded-sam: {len(failed)} of {len(jobs)} jobs failed; see the errors in {folder / 'sweep.csv'}"
            )


def _are_shards(jobs: Sequence[Job]) -> bool:
    """Return whether jobs are parts of one run, or the only one, so that there is nothing to compare."""
    others = [{key: value for key, value in job.settings.items() if key != "source.shard"} for job in jobs]
    return all(settings == others[0] for settings in others)


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
    parser.add_argument("folder", type=local_folder, help="folder of the sweep, with a folder per job in it")
    try:
        print(write_report(parser.parse_args().folder))
    except ConfigError as error:
        sys.exit(f"grounded-sam-report: {error}")
