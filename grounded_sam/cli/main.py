"""The command `grounded-sam`."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounded_sam.config.build import build, build_sinks, build_source, share_predictions
from grounded_sam.config.compose import explain
from grounded_sam.config.hydra import conf_dir, in_sweep
from grounded_sam.errors import GroundedSamError
from grounded_sam.files import atomic_write

#: Whether the user wants tracebacks. `main` sets HYDRA_FULL_ERROR itself, which workers of a sweep inherit.
DEBUG = os.environ.get("GROUNDED_SAM_DEBUG", os.environ.get("HYDRA_FULL_ERROR")) == "1"

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from grounded_sam.pipeline.runner import Summary
    from grounded_sam.structures.protocols import Sink


#: Stages of the job before, in a sweep whose jobs follow each other in one process.
_kept: dict[str, tuple[Any, Any]] = {}


def run(cfg: DictConfig) -> float | None:
    """One job: build the stages, take every frame through them, say what was done.

    Returns:
        The metric that a sweep goes by, if a sink measures one. A job of a sweep that fails says so, leaves the
        reason in its `run.json` and returns None, so that the others go on.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra_ = HydraConfig.get()
    output = Path(hydra_.runtime.output_dir)
    sweep = Path(hydra_.sweep.dir) if in_sweep() else None
    about: dict[str, Any] = {"overrides": list(hydra_.overrides.task)}
    value, summary = None, None
    try:
        source = build_source(cfg)
        pipeline = build(cfg, None if sweep is None else _kept)
        if pipeline.vocabulary is None:
            pipeline.vocabulary = getattr(source, "vocabulary", None)
        asked, clicks, vocabulary = pipeline.ask_video()
        sinks = build_sinks(cfg, output, vocabulary)
        if sweep is not None:
            share_predictions(cfg, pipeline, vocabulary, sweep)
        summary = pipeline.run(source, sinks, output, vocabulary, asked, clicks)
        about |= {"images": summary.images, "seconds": dict(pipeline.seconds)}
        about["replayed"] = 0 if pipeline.predictions is None else pipeline.predictions.replayed
        about["boxes_replayed"] = 0 if pipeline.boxes is None else pipeline.boxes.replayed
        about["value"] = value = measured(sinks)  # last, since there may be no such metric
    except (GroundedSamError, OSError) as error:
        if DEBUG:
            raise
        if sweep is None:
            if summary is not None:
                report(summary, output)
            sys.exit(f"grounded-sam: {error}")  # here already, or Hydra would print a line of its own
        about["error"] = str(error)
        print(f"grounded-sam: job {hydra_.job.num}: {error}", file=sys.stderr)
    about["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with atomic_write(output / "run.json") as beside:
        beside.write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
    if summary is not None:
        report(summary, output)
        if summary.interrupted:
            sys.exit(130)
    return value


def measured(sinks: Sequence[Sink]) -> float | None:
    """The metric of the first sink that has one."""
    return next((float(sink.value()) for sink in sinks if hasattr(sink, "value")), None)


def report(summary: Summary, output: Path) -> None:
    """Say on the terminal what was found, what was skipped, and where it all lies."""
    from rich.console import Console

    console = Console(stderr=False, highlight=False, soft_wrap=True)
    found = ", ".join(f"{count} {name}" for name, count in summary.objects.most_common()) or "nothing"
    begun = "interrupted after" if summary.interrupted else "looked at"
    what = "images" if not summary.frames else "frames" if summary.frames == summary.images else "pictures and frames"
    before = f", {summary.stored} of them stored before" if summary.stored else ""
    line = f"{begun} {summary.images} {what}{before}, {summary.empty} of them without any: found {found}"
    console.print(line, markup=False)
    for place in summary.places:
        console.print(f"  {place}", markup=False)
    if summary.skipped:
        console.print(f"skipped {len(summary.skipped)} files (also in {output / 'skipped.json'}):", markup=False)
        for skipped in summary.skipped:
            console.print(f"  {skipped.file}: {skipped.reason}", markup=False)


def main() -> None:
    """Entry point: Hydra composes and runs, a user's mistake ends in one line and exit code 1."""
    if sys.argv[1:] in (["--help"], ["-h"]):  # what Hydra would compose, which takes it longer than all else
        print((Path(__file__).parent / "help.txt").read_text(encoding="utf-8"), end="")
        return
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["GROUNDED_SAM_DEBUG"] = str(int(DEBUG))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come through to here instead of being printed by Hydra
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own stages, beside their YAML; last, so that none is shadowed
    GlobalHydra.instance().clear()  # `import sam2` may have claimed it
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(run)()
    except (GroundedSamError, HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        composing = isinstance(error, HydraException | OmegaConfBaseException) or "Config group" in str(error)
        if DEBUG or (isinstance(error, ValueError) and not composing and not isinstance(error, GroundedSamError)):
            raise
        sys.exit(f"grounded-sam: {explain(error, sys.argv[1:]) if composing else error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
