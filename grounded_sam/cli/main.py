"""The command `grounded-sam`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import chdir, nullcontext
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounded_sam.cli.next_step import next_step
from grounded_sam.config.compose import explain
from grounded_sam.config.hydra import conf_dir
from grounded_sam.config.saved import save_config, unresolved
from grounded_sam.config.secrets import hide_in_overrides
from grounded_sam.config.words import read_words
from grounded_sam.errors import GroundedSamError, count_of, describe_error, redact
from grounded_sam.files import atomic_write_text
from grounded_sam.hydra_state import in_sweep
from grounded_sam.output.claim import check_output, claim
from grounded_sam.output.paths import OutputPath, RemotePath, output_path
from grounded_sam.output.sweep import Sweep

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from grounded_sam.pipeline.runner import Summary
    from grounded_sam.structures.protocols import Sink

#: Whether to show tracebacks. `main` sets HYDRA_FULL_ERROR itself, and the workers of a sweep inherit that.
DEBUG = os.environ.get("GROUNDED_SAM_DEBUG", os.environ.get("HYDRA_FULL_ERROR")) == "1"

#: Detector and segmenter of the previous job, each with its settings, by config group. In a sweep whose jobs run in one
#: process, the next job takes over those whose settings are the same; see `config.build.build`.
_reusable_stages: dict[str, tuple[Any, Any]] = {}


def run(cfg: DictConfig) -> float | None:
    """Run one job: build the stages, process the input, and print a summary.

    Paths are relative to the folder in which the command was started, also with `hydra.job.chdir=true`.

    Returns:
        The metric that a sweep maximizes, if a sink measures one. A job of a sweep that fails prints its error, writes
        it to its `run.json` and returns None, so that the other jobs go on.
    """
    from hydra.core.hydra_config import HydraConfig

    from grounded_sam.config.build import check_output_address

    hydra_cfg = HydraConfig.get()
    overrides = unresolved(hydra_cfg.overrides.task)
    with chdir(hydra_cfg.runtime.cwd) if hydra_cfg.job.chdir else nullcontext():
        output, sweep, entry = output_folder(cfg, hydra_cfg), None, None
        try:
            check_output_address(cfg, output)
            if in_sweep():
                sweep = Sweep.last(Path(hydra_cfg.sweep.dir)) or Sweep.start(Path(hydra_cfg.sweep.dir))
                assert isinstance(output, Path)  # see SweepReport.on_multirun_start
                entry = sweep.entry(hydra_cfg.job.num, output, overrides)
                sweep.register(entry)
            with claim(output):
                check_output(output / "run.json")
                save_config(cfg, hydra_cfg, output / ".hydra")
                return _run_job(cfg, output, sweep, overrides)
        except (GroundedSamError, OSError) as error:  # the output cannot be used
            if DEBUG:
                raise
            if sweep is None or entry is None:
                sys.exit(f"grounded-sam: {redact(str(error))}")  # not raised, since Hydra would print a line of its own
            sweep.write(replace(entry, error=redact(str(error))))
            print(f"grounded-sam: job {entry.folder}: {redact(str(error))}", file=sys.stderr)
            return None


def _run_job(cfg: DictConfig, output: OutputPath, sweep: Sweep | None, overrides: list[str]) -> float | None:
    """Run a job in its claimed output; see `run`."""
    from hydra.core.hydra_config import HydraConfig

    runtime = HydraConfig.get().runtime
    base = output_path(str(cfg.output)) if isinstance(output, RemotePath) else Path(runtime.output_dir)  # of all shards
    record: dict[str, Any] = {"overrides": overrides, "sweep": None if sweep is None else sweep.id}
    value: float | None = None
    summary: Summary | None = None
    sinks: Sequence[Sink] = ()
    try:
        summary, sinks = _process(cfg, output, sweep, record)
        record["value"] = value = measured_value(sinks)  # last, since the metric may not exist
    except Exception as error:
        reason = _reason(error, overrides)
        if DEBUG or (sweep is None and reason is None):
            raise
        if sweep is None:
            if summary is not None:
                print_summary(summary, output)
            sys.exit(f"grounded-sam: {reason}")  # not raised, since Hydra would print a line of its own
        hint = "" if reason else "; GROUNDED_SAM_DEBUG=1 shows the traceback"
        record["error"] = reason or describe_error(error)
        assert isinstance(output, Path)
        name = sweep.entry(0, output, ()).folder  # as in the report
        print(f"grounded-sam: job {name}: {record['error']}{hint}", file=sys.stderr)
    record["peak_mib"] = peak_mib()
    atomic_write_text(output / "run.json", json.dumps(record, ensure_ascii=False, indent=1))
    if summary is not None:
        print_summary(summary, output)
        sources = {source.provider: source.path for source in runtime.config_sources}
        line = next_step(overrides, summary, sinks, base, sources.get("command-line"))
        if sweep is None and line is not None:
            print(line)
        if summary.interrupted:
            sys.exit(130)
        if summary.missing:
            sys.exit(f"grounded-sam: {missing_line(summary)}")
    return value


def peak_mib() -> float | None:
    """Return the peak memory of this process in MiB; None where the system does not tell, as on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def output_folder(cfg: DictConfig, hydra_cfg: DictConfig) -> OutputPath:
    """Return the folder of a job; shards that are started by hand with the same output each have one in it.

    An output at an address is not known to Hydra; see `SweepReport.on_run_start`.
    """
    from omegaconf import OmegaConf

    output = output_path(str(cfg.output))
    if not isinstance(output, RemotePath):
        output = Path(hydra_cfg.runtime.output_dir)
    if (OmegaConf.select(cfg, "source.num_shards") or 1) > 1 and not in_sweep():
        return output / str(cfg.source.shard)
    return output


def _reason(error: Exception, overrides: list[str]) -> str | None:
    """Return the message of an error that a user can fix; None for any other."""
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OmegaConfBaseException):
        return redact(explain(error, overrides))
    return redact(str(error)) if isinstance(error, GroundedSamError | OSError) else None


def _process(
    cfg: DictConfig, output: OutputPath, sweep: Sweep | None, record: dict[str, Any]
) -> tuple[Summary, Sequence[Sink]]:
    """Run it on the engine of the config, which adds counts and costs to `record`."""
    from grounded_sam.config.build import build_node
    from grounded_sam.engine.job import Engine, EngineJob
    from grounded_sam.engine.local import LocalEngine
    from grounded_sam.errors import ConfigError

    engine = build_node(cfg, "engine") if "engine" in cfg else LocalEngine()  # an earlier version saved no engine
    if not isinstance(engine, Engine):
        raise ConfigError(f"engine._target_ must be a class with a method run, got {type(engine).__name__}")
    return engine.run(EngineJob(cfg, output, sweep, None if sweep is None else _reusable_stages, record))


def measured_value(sinks: Sequence[Sink]) -> float | None:
    """Return the metric of the first sink that measures one."""
    from grounded_sam.structures.protocols import Measures

    return next((float(sink.value()) for sink in sinks if isinstance(sink, Measures)), None)


def print_summary(summary: Summary, output: OutputPath) -> None:
    """Print what was found, what was skipped, and where the results are."""
    from rich.console import Console

    console = Console(stderr=False, highlight=False, soft_wrap=True)
    console.print(summary_line(summary), markup=False)
    for line in summary.outputs:
        console.print(f"  {line}", markup=False)
    if summary.removed:
        files = count_of(summary.removed, "file")
        console.print(f"  removed {files} of an earlier run that this one did not write again: {output}", markup=False)
    if summary.kept:
        files = count_of(len(summary.kept), "file")
        console.print(
            f"  kept {files} of an earlier run, changed since or copies of images, such as {summary.kept[0]}",
            markup=False,
        )
    if summary.skipped:
        console.print(f"Skipped, in whole or in part (also listed in {output / 'skipped.json'}):", markup=False)
        for skipped in summary.skipped:
            console.print(f"  {skipped.file}: {skipped.reason}", markup=False)


def summary_line(summary: Summary) -> str:
    """Return the first line of the summary.

    >>> from collections import Counter
    >>> from grounded_sam.pipeline.runner import Summary
    >>> summary_line(Summary(images=9, empty=2, objects=Counter(car=5)))
    'Processed 9 images (2 empty): 5 car'
    """
    counts = ", ".join(f"{count} {name}" for name, count in summary.objects.most_common()) or "nothing found"
    processed = count_of(summary.images, summary.unit.removesuffix("s"), summary.unit)
    details = [f"{summary.stored} from the store"] if summary.stored else []
    details += [f"{summary.empty} empty"] if summary.empty else []
    verb = "Interrupted after" if summary.interrupted else "Processed"
    noted = f" ({', '.join(details)})" if details else ""
    return f"{verb} {processed}{noted}: {counts}"


def missing_line(summary: Summary) -> str:
    """Return what to say of images that were listed, and are neither stored nor skipped.

    >>> from grounded_sam.pipeline.runner import Summary
    >>> missing_line(Summary(missing=2))
    '2 images or videos were listed, but are neither stored nor skipped; run the same command again'
    """
    files = count_of(summary.missing, "image or video", "images or videos")
    return f"{files} were listed, but are neither stored nor skipped; run the same command again"


def main() -> None:
    """Run the command: Hydra composes the config, and a user's mistake ends with one line and exit code 1."""
    if isinstance(sys.stdout, TextIOWrapper):  # a console of Windows may lack letters of names
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.argv[1:] in (["--help"], ["-h"]):  # composing the same text takes Hydra longer than everything else
        print((Path(__file__).parent / "help.txt").read_text(encoding="utf-8"), end="")
        return
    if "--version" in sys.argv[1:]:
        from grounded_sam.formats.store_runs import package_version

        print(f"grounded-sam {package_version('grounded_sam')}")
        return
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["GROUNDED_SAM_DEBUG"] = str(int(DEBUG))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach this function instead of being printed by Hydra
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for user-defined stages; last, so that they shadow no package
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: what was written stays usable
    GlobalHydra.instance().clear()  # `import sam2` may have initialized it
    try:
        sys.argv[1:] = hide_in_overrides(read_words(sys.argv[1:]))
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(run)()
    except (GroundedSamError, HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        composing = isinstance(error, HydraException | OmegaConfBaseException) or "Config group" in str(error)
        if DEBUG or (isinstance(error, ValueError) and not composing and not isinstance(error, GroundedSamError)):
            raise
        sys.exit(f"grounded-sam: {redact(explain(error, sys.argv[1:]) if composing else str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
