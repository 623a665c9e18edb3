"""Run a job in this process."""

from __future__ import annotations

from collections.abc import Sequence

from grounded_sam.config.build import build, build_sinks, build_source, share_predictions
from grounded_sam.engine.job import EngineJob
from grounded_sam.formats.output_classes import OutputClasses
from grounded_sam.pipeline.prediction_cache import CachedStages
from grounded_sam.pipeline.runner import Runner, Summary
from grounded_sam.structures.protocols import HasVocabulary, Measures, Sink


class LocalEngine:
    """Run a job in this process with `pipeline.runner.Runner`."""

    def run(self, job: EngineJob) -> tuple[Summary, Sequence[Sink]]:
        """Build everything and run it; see `engine.job.Engine`."""
        source = build_source(job.cfg)
        pipeline = build(job.cfg, job.reusable)
        if pipeline.vocabulary is None and isinstance(source, HasVocabulary):
            pipeline.vocabulary = source.vocabulary
        request = pipeline.request()
        classes = OutputClasses(job.output, request.classes)
        sinks = build_sinks(job.cfg, job.output, request.classes, classes)
        if job.sweep is not None:
            share_predictions(job.cfg, pipeline, request.classes, job.sweep.predictions)
        summary = Runner(pipeline, source, sinks, job.output, request, classes).run()
        stages = pipeline.stages
        results, boxes = (stages.results, stages.boxes) if isinstance(stages, CachedStages) else (None, None)
        job.record.update(counts_of(summary, sinks), seconds=dict(pipeline.seconds))
        job.record.update(replayed=results.replayed if results else 0, boxes_replayed=boxes.replayed if boxes else 0)
        return summary, sinks


def counts_of(summary: Summary, sinks: Sequence[Sink]) -> dict[str, object]:
    """Return what `run.json` has of any run: what was found, and whether a sink measured it."""
    measured = any(isinstance(sink, Measures) for sink in sinks)
    return {
        "measured": measured,
        "images": summary.images,
        "objects": dict(summary.objects),
        "empty": summary.empty,
    }
