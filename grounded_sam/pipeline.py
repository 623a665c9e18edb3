"""The stages in a row: frames to detector to select to segmenter to select again, and on to the sinks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, overload

import supervision as sv

from grounded_sam.detections import check
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.frames import Frame, to_frame
from grounded_sam.select import Select, select
from grounded_sam.sinks.files import written_whole
from grounded_sam.stages import Detector, FrameResult, Segmenter, Sink, Skipped, Source
from grounded_sam.vocabulary import Vocabulary


@dataclass
class Summary:
    """What a run did."""

    images: int = 0
    empty: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    interrupted: bool = False


class Pipeline:
    """A detector and, if masks are wanted and the detector gives none, a segmenter.

    Args:
        detector: see `stages.Detector`.
        segmenter: see `stages.Segmenter`; None for boxes alone.
        settings: which detections stay.
        vocabulary: what to ask for when a call names nothing.
        negatives: phrases that absorb look-alikes, for calls that name their classes.
    """

    def __init__(
        self,
        detector: Detector,
        segmenter: Segmenter | None = None,
        settings: Select | None = None,
        vocabulary: Vocabulary | None = None,
        negatives: Sequence[str] = (),
    ) -> None:
        self.detector, self.segmenter = detector, segmenter
        self.negatives = negatives
        self.settings = settings or Select()
        self.vocabulary = vocabulary

    def ask(self, text: Any = None) -> Vocabulary:
        """The vocabulary of a call: `text`, else the pipeline's, else the detector's own.

        Raises:
            ConfigError: if none of them has one.
        """
        if text is not None:
            return Vocabulary.parse(text, self.negatives)
        own = self.vocabulary or getattr(self.detector, "vocabulary", None)
        if own is None:
            raise ConfigError("text is missing: name what to look for, e.g. text=[car, wheel]")
        return own

    def stream(
        self, frames: Iterator[Frame], vocabulary: Vocabulary, masks: bool = True, skipped: list[Skipped] | None = None
    ) -> Iterator[FrameResult]:
        """Results in the order of the frames, decoded and computed as they are asked for.

        Frames that the detector refuses with an `ImageError` go to `skipped`, if that is given.
        """
        settings = self.settings.before_masks() if masks and self.segmenter else self.settings
        size = getattr(self.detector, "batch_size", 1)
        while group := list(islice(frames, size)):
            try:
                detected = self.detector.detect(group, vocabulary)
            except ImageError as error:
                if skipped is None:
                    raise
                skipped += [Skipped(frame.name, str(error)) for frame in group]
                continue
            for frame, boxes in zip(group, detected, strict=True):
                found = check(boxes, vocabulary, frame.size_hw, type(self.detector).__name__)
                if masks and self.segmenter is not None and found.mask is None:
                    found = self.segmenter.segment(frame.image, select(found, settings, vocabulary))
                    check(found, vocabulary, frame.size_hw, type(self.segmenter).__name__)
                yield FrameResult(frame, select(found, self.settings, vocabulary))

    @overload
    def detect(self, images: list[Any], text: Any = None) -> list[sv.Detections]: ...
    @overload
    def detect(self, images: Any, text: Any = None) -> sv.Detections: ...
    def detect(self, images: Any, text: Any = None) -> Any:
        """Boxes with classes, without masks; see `segment`."""
        return self._call(images, text, masks=False)

    @overload
    def segment(self, images: list[Any], text: Any = None) -> list[sv.Detections]: ...
    @overload
    def segment(self, images: Any, text: Any = None) -> sv.Detections: ...
    def segment(self, images: Any, text: Any = None) -> Any:
        """Boxes with classes and masks.

        Args:
            images: a path, a PIL image, an RGB array `(H, W, 3) uint8`, or a list of those.
            text: a list of classes, a string, a mapping from class to phrases, a file of those, or a
                `Vocabulary`; may be left out if the pipeline or the detector has its own.

        Returns:
            `supervision.Detections`, most confident first, see `detections`; a list of them for a list.

        Raises:
            ImageError: if an image cannot be read; VocabularyError: if the text names nothing.
        """
        return self._call(images, text, masks=True)

    def _call(self, images: Any, text: Any, masks: bool) -> Any:
        several = isinstance(images, list | tuple)
        frames = (to_frame(image, i) for i, image in enumerate(images if several else [images]))
        found = [result.detections for result in self.stream(frames, self.ask(text), masks)]
        return found if several else found[0]

    def run(self, source: Source, sinks: Sequence[Sink], output: Path, vocabulary: Vocabulary) -> Summary:
        """Take every frame of a source to every sink, with a progress bar; write `skipped.json`.

        An interruption (Ctrl-C) ends the run early; what was written until then stays usable.

        Raises:
            ImageError: if no frame at all could be read.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        summary = Summary()
        passed_over = len(source.skipped)  # files that the source never counted
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        try:
            with ExitStack() as stack:
                for sink in sinks:
                    stack.enter_context(sink)
                console = Console(stderr=True)
                bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
                progress = stack.enter_context(bar)
                task = progress.add_task("images", total=len(source))
                for result in self.stream(iter(source), vocabulary, skipped=source.skipped):
                    for sink in sinks:
                        sink.write(result)
                    summary.images += 1
                    names = [str(name) for name in result.detections.data.get("class_name", [])]
                    summary.objects.update(names)
                    summary.empty += not names
                    progress.update(task, completed=summary.images + len(source.skipped) - passed_over)
        except KeyboardInterrupt:
            summary.interrupted = True
        summary.skipped = list(source.skipped)
        with written_whole(output / "skipped.json") as part:
            part.write_text(
                json.dumps([asdict(s) for s in summary.skipped], ensure_ascii=False, indent=1), encoding="utf-8"
            )
        if not summary.images and summary.skipped and not summary.interrupted:
            first = summary.skipped[0]
            raise ImageError(
                f"none of {len(summary.skipped)} pictures could be used; the first: {first.file}: {first.reason} "
                f"(all in {output / 'skipped.json'})"
            )
        summary.places = [sink.summary() for sink in sinks]
        return summary
