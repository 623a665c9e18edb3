"""What a sweep found out: one sorted table, a plot, and the best settings to use again."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from grounded_sam.config.compose import GROUPS
from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write

#: Columns of the table that are measured.
MEASURED = ("bbox", "segm", "davis_all_frames", "sav")
#: What jobs do not differ by.
INCIDENTAL = ("output", "hydra")


def jobs(folder: Path) -> list[dict[str, Any]]:
    """One row per job of a sweep, in their order: overrides, measured values, cost, and what went wrong.

    Raises:
        ConfigError: if there is no job in the folder.
    """
    rows = []
    places = [path for path in folder.iterdir() if (path / "run.json").is_file()] if folder.is_dir() else []
    for place in sorted(
        places, key=lambda p: (not p.name.isdecimal(), int(p.name) if p.name.isdecimal() else 0, p.name)
    ):
        about = json.loads((place / "run.json").read_text(encoding="utf-8"))
        measured = place / "metrics.json"
        about["metrics"] = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else {}
        about["job"] = place.name
        about["set"] = dict(word.lstrip("+").split("=", 1) for word in about["overrides"] if "=" in word)
        rows.append(about)
    if not rows:
        raise ConfigError(f"no job of a sweep in {folder}: expected folders with a run.json")
    return rows


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns and lines of the table, the best first and failed jobs last."""
    keys = list(dict.fromkeys(key for row in rows for key in row["set"]))
    varied = [key for key in keys if key.split(".")[0] not in INCIDENTAL]
    varied = [key for key in varied if len({row["set"].get(key) for row in rows}) > 1]
    lines = []
    # Replayed jobs cost what the job cost whose predictions they replay: the one with the same stages.
    paid = {_stages(row, varied): row for row in rows[::-1] if row.get("images") and not row.get("replayed")}
    whole = [row for row in paid.values() if not row.get("boxes_replayed")]
    detected = {_stages(row, varied, "segmenter"): row for row in whole}
    for row in rows:
        line: dict[str, Any] = {"job": row["job"], **{key: _plain(row["set"].get(key, "")) for key in varied}}
        metrics = row["metrics"]
        line["metric"] = row.get("value")
        for kind in ("bbox", "segm"):
            line |= {f"{kind}.{key}": metrics.get(kind, {}).get(key) for key in ("AP", "AP50") if kind in metrics}
        for rule in ("davis_all_frames", "sav"):
            line |= {f"{rule}.JF": metrics[rule]["JF"]} if rule in metrics else {}
        line |= {key: metrics.get("tracking", {}).get(key) for key in ("HOTA", "IDF1", "IDSW") if "tracking" in metrics}
        line |= {key: metrics.get("at_threshold", {}).get(key) for key in ("precision", "recall", "f1") if metrics}
        cost = row if row.get("images") and not row.get("replayed") else paid.get(_stages(row, varied), {})
        seconds = {stage: value / cost["images"] for stage, value in cost.get("seconds", {}).items()}
        if cost.get("boxes_replayed") and (looked := detected.get(_stages(row, varied, "segmenter"))) is not None:
            saved = looked["seconds"].get("detect", 0.0) / looked["images"] - seconds.get("detect", 0.0)
            seconds |= {stage: seconds.get(stage, 0.0) + saved for stage in ("detect", "all")}
        line |= {f"s/image {stage}": seconds.get(stage) for stage in ("detect", "segment", "track", "all")}
        line["peak MiB"] = cost.get("peak_mib")
        line["error"] = row.get("error", "")
        lines.append(line)
    lines.sort(key=lambda line: (line["metric"] is None, -(line["metric"] or 0.0)))
    columns = list(dict.fromkeys(key for line in lines for key in line))
    kept = [key for key in columns if key == "job" or any(line.get(key) not in (None, "") for line in lines)]
    return kept, lines


def _stages(row: dict[str, Any], varied: Sequence[str], without: str = "") -> tuple[Any, ...]:
    """The settings that decide what the models cost."""
    cheap = ("select", "sink", "truth", "metric", without)
    return tuple(row["set"].get(key) for key in varied if key.split(".")[0] not in cheap)


def _plain(value: str) -> str:
    r"""A value without the backslashes and quotes of Hydra's overrides: `builtin\:shapes`."""
    return re.sub(r"\\(.)", r"\1", value).strip("'")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(folder: Path) -> str:
    """Write `sweep.csv`, `sweep.md`, `sweep.png`, `sweep.html` and `preset/best.yaml`; return the table.

    Raises:
        ConfigError: if there is no job in the folder.
    """
    from rich.console import Console
    from rich.table import Table

    rows = jobs(folder)
    columns, lines = table(rows)
    with atomic_write(folder / "sweep.csv") as beside, beside.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    texts = [[_text(line.get(column)) for column in columns] for line in lines]
    with atomic_write(folder / "sweep.md") as beside:
        marks = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [columns, *texts]]
        beside.write_text("\n".join([marks[0], "|" + "---|" * len(columns), *marks[1:]]) + "\n", encoding="utf-8")
    places = ["sweep.csv", "sweep.md"]
    best = next((line for line in lines if line["metric"] is not None), None)
    if best is not None:
        picture = _plot(rows, lines)
        with atomic_write(folder / "sweep.png") as beside:
            beside.write_bytes(picture)
        with atomic_write(folder / "sweep.html") as beside:
            beside.write_text(_page(columns, texts, picture), encoding="utf-8")
        chosen = next(row for row in rows if row["job"] == best["job"])
        with atomic_write(folder / "preset" / "best.yaml") as beside:
            beside.write_text(_preset(chosen["set"], best), encoding="utf-8")
        places += ["sweep.png", "sweep.html", "preset/best.yaml"]
    shown = Table(title=f"{len(rows)} jobs, the best first", title_justify="left")
    for column in columns:
        shown.add_column(column, justify="left" if column == "error" else "right")
    for row in texts:
        shown.add_row(*row)
    out_ = io.StringIO()
    Console(file=out_, width=180, markup=False).print(shown)
    use = f"; use the best with --config-dir {folder} preset=best" if best is not None else ""
    return f"{out_.getvalue().rstrip()}\n  in {folder}: {', '.join(places)}{use}"


def _preset(chosen: dict[str, str], line: dict[str, Any]) -> str:
    """Overrides as a preset: choices of groups in its defaults, values as they were given."""
    import yaml
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    defaults: list[Any] = []
    values = OmegaConf.create()
    for key, value in chosen.items():
        if key.split(".")[0] in (*INCIDENTAL, "input", "truth", "metric", "preset", "sink", "sweep"):
            continue
        if key in ("source", "source.shard", "source.num_shards"):
            continue
        if key in GROUPS:
            defaults.append({f"override /{key}": value})
            continue
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        OmegaConf.update(values, key, parsed.value(), force_add=True)
    head = f"# @package _global_\n# The best of a sweep: {_text(line['metric'])}, job {line['job']}.\n"
    if "preset" in chosen:
        names = chosen["preset"].strip("[]").split(",")
        defaults = [*(name.strip() for name in names if name.strip()), *defaults]
    text = yaml.safe_dump({"defaults": defaults}, sort_keys=False) if defaults else ""
    plain = OmegaConf.to_container(values)
    return head + text + (yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) if plain else "")


def _plot(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> bytes:
    """The metric against what was varied, and precision against recall, as PNG."""
    from matplotlib.figure import Figure

    good = [line for line in lines if line["metric"] is not None]
    keys = [key for key in good[0] if "." in key and key.split(".")[0] not in MEASURED] + [
        key for key in good[0] if key in GROUPS
    ]
    numeric = [key for key in keys if all(_number(line.get(key)) is not None for line in good)]
    key = next(iter(numeric or keys), "job")
    rates = all(line.get("recall") is not None for line in good)
    figure = Figure(figsize=(11 if rates else 6, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if rates else 1, squeeze=False)[0]
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in good:
        name = ", ".join(f"{k}={line[k]}" for k in keys if k != key)
        groups.setdefault(name, []).append(line)
    for name, members in groups.items():
        xs = [_number(line.get(key)) if key in numeric else str(line.get(key)) for line in members]
        order = sorted(range(len(xs)), key=lambda i: (isinstance(xs[i], str), xs[i]))
        axes[0].plot([xs[i] for i in order], [members[i]["metric"] for i in order], marker="o", label=name or None)
        if rates:
            axes[1].plot(
                [members[i]["recall"] for i in order],
                [members[i]["precision"] for i in order],
                marker="o",
                label=name or None,
            )
    axes[0].set_xlabel(key)
    axes[0].set_ylabel("metric")
    if rates:
        axes[1].set_xlabel("recall")
        axes[1].set_ylabel("precision")
    if 1 < len(groups) <= 12:
        axes[-1].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _page(columns: list[str], texts: list[list[str]], picture: bytes) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}" for cell in cells) + "</tr>"

    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    style = (
        "body{font:14px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #eee}"
    )
    body = "".join(line(row, "td") for row in texts)
    return (
        f"<!doctype html><meta charset='utf-8'><title>Sweep</title><style>{style}</style><img src='{url}' alt='plot'>"
        f"<table>{line(columns, 'th')}{body}</table>\n"
    )


class SweepReport(Callback):
    """A callback of Hydra: before a sweep notes what its jobs ask for, after it writes and prints the report."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        from grounded_sam.pipeline.prediction_cache import PLACE, write_sweep_floor

        sweep = Path(config.hydra.sweep.dir)
        shutil.rmtree(sweep / PLACE, ignore_errors=True)  # of an earlier sweep into the same folder
        for place in sweep.glob("[0-9]*"):
            for name in ("run.json", "metrics.json"):
                (place / name).unlink(missing_ok=True)
        space = config.hydra.sweeper.get("params") or {}
        words = [*config.hydra.overrides.task, *(f"{key}={value}" for key, value in space.items())]
        write_sweep_floor(Path(config.hydra.sweep.dir), words)

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        try:
            rows = jobs(folder)
        except ConfigError:
            return
        failed = [row for row in rows if "error" in row]
        if failed or any(row["metrics"] for row in rows):
            print(write_report(folder))
        if failed:
            sys.exit(
                f"grounded-sam: {len(failed)} of {len(rows)} jobs failed; the reasons are in {folder / 'sweep.csv'}"
            )


def main() -> None:
    """Entry point of `grounded-sam-report FOLDER`: the report of a sweep that was run before."""
    import argparse

    parser = argparse.ArgumentParser(prog="grounded-sam-report", description=write_report.__doc__)
    parser.add_argument("folder", type=Path, help="of the sweep, with a folder per job in it")
    try:
        print(write_report(parser.parse_args().folder))
    except ConfigError as error:
        sys.exit(f"grounded-sam-report: {error}")
