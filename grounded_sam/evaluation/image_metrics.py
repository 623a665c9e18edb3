"""Metrics of images against their labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from grounded_sam.errors import ConfigError, count_of
from grounded_sam.evaluation.coco_scores import CocoEvaluator
from grounded_sam.evaluation.image_matching import ImageMatcher
from grounded_sam.evaluation.mistakes import WorstImages
from grounded_sam.evaluation.thresholds import write_ontology
from grounded_sam.evaluation.values import check_classes, metric_value, precision_recall, render_table
from grounded_sam.files import atomic_write_text
from grounded_sam.formats.coco import CocoFile
from grounded_sam.media.files import path_ends
from grounded_sam.output.claim import check_output
from grounded_sam.output.paths import OutputPath, output_path
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class ImageMetrics:
    """Write `metrics.json` and, under `errors/`, the images with the most mistakes; print a table.

    Average precision and recall are those of COCO (Lin et al. 2014), of boxes and, where labels and detections have
    them, of masks; -1 where there is nothing to measure. Precision, recall, F1 and the confusion matrix use the
    detections at the thresholds of the run, see `image_matching.ImageMatcher`. Classes are matched by name; labels of
    classes that the run did not request are left out.

    The same matches give the best threshold of each class, see `thresholds.best_threshold`: in `metrics.json`, and as
    an ontology in `classes.yaml` that can be used as `text`. The choice is among the detections that the run kept, so
    `select.score` should be low.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        ground_truth: Labels of the images, which are matched by name, or else by the longest common path suffix.
        iou: Lowest IoU at which a detection matches a label, above 0.
        metric: Metric that `value` returns, as a path into `metrics.json`; None for `segm.AP`, or without masks
            `bbox.AP`.
        errors: Number of images drawn under `errors/`.
        precision: Precision that the best thresholds reach, with the highest recall; None for the highest F1.

    Attributes:
        values: Content of `metrics.json`, at the end of the run.

    Raises:
        ConfigError: If the labels lack a class of the run, or faster-coco-eval is not installed.
    """

    def __init__(
        self,
        output: OutputPath,
        vocabulary: Vocabulary,
        ground_truth: CocoFile,
        iou: float = 0.5,
        metric: str | None = None,
        errors: int = 24,
        precision: float | None = None,
    ) -> None:
        if find_spec("faster_coco_eval") is None:
            raise ConfigError("sink=metrics needs faster-coco-eval: pip install 'grounded_sam[metrics]'")
        check_classes(vocabulary, ground_truth.vocabulary, ground_truth.path)
        self.output, self.vocabulary, self.ground_truth = output_path(output), vocabulary, ground_truth
        self.iou, self.metric, self.precision = iou, metric, precision
        self.values: dict[str, Any] = {}
        self._images = _LabeledImages(ground_truth)
        self._measured: dict[Any, str] = {}  # by image id of the labels, the name of the frame
        self._without_labels: list[str] = []
        self._coco = CocoEvaluator(ground_truth, vocabulary)
        self._matcher = ImageMatcher(vocabulary, iou)
        self._worst = WorstImages(errors)

    def __enter__(self) -> ImageMetrics:
        for name in ("metrics.json", "classes.yaml"):
            check_output(self.output / name)
        return self

    def write(self, result: FrameResult) -> None:
        """Measure an image.

        Raises:
            ConfigError: If its size differs from that of its labels, or another image has the same labels.
        """
        frame, detections = result.frame, result.packed
        image = self._images.find(frame)
        if image is None:
            self._without_labels.append(frame.name)
            return
        if (image["height"], image["width"]) != frame.size_hw:
            raise ConfigError(
                f"{frame.name} has {frame.size_hw[1]}x{frame.size_hw[0]} px, but {image['width']}x{image['height']} px "
                f"in {self.ground_truth.path}"
            )
        if self._measured.setdefault(image["id"], frame.name) != frame.name:
            raise ConfigError(
                f"{self._measured[image['id']]} and {frame.name} both match {image['file_name']} in "
                f"{self.ground_truth.path}; its file names do not distinguish them"
            )
        self._coco.add(image, detections)
        missed, false = self._matcher.add(frame.name, detections, self.ground_truth.packed_labels(image))
        self._worst.offer(result, missed, false)

    def own_folder(self) -> OutputPath:
        """Return the folder of the images with mistakes."""
        return self.output / "errors"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not len(self._coco):
            if kind is None and self._without_labels:
                labeled = ", ".join(image["file_name"] for image in self.ground_truth.images[:3])
                raise ConfigError(
                    f"no labels for {count_of(len(self._without_labels), 'image')} in {self.ground_truth.path}; "
                    f"it has labels for {labeled}, ...; the run processed {', '.join(self._without_labels[:3])}, ..."
                )
            return
        thresholds = self._matcher.best_thresholds(self.precision)
        scores = {kind_: self._coco.evaluate(kind_) for kind_ in self._coco.kinds()}
        names, counts = self.vocabulary.classes, self._matcher.counts
        self.values = {
            "images": len(self._coco),
            **{kind_: scores_.overall for kind_, scores_ in scores.items()},
            "at_threshold": {"iou": self.iou, **precision_recall(*counts.sum(0).tolist())},
            "classes": {
                name: {
                    **{kind_: scores_.by_class[i] for kind_, scores_ in scores.items()},
                    **precision_recall(*counts[i].tolist()),
                }
                for i, name in enumerate(names)
            },
            "thresholds": {
                name: None if threshold is None else asdict(threshold)
                for name, threshold in zip(names, thresholds, strict=True)
            },
            "confusion": {
                "rows_truth_columns_found": [*names, "none"],
                "counts": self._matcher.confusion.tolist(),
            },
            "mistakes": self._matcher.mistakes,
            "not_asked_for": self._not_requested(),
            "without_labels": self._without_labels,
            "labels_left_out": [asdict(note) for note in self.ground_truth.notes],
        }
        self.values["metric"] = self._metric_path()
        atomic_write_text(self.output / "metrics.json", json.dumps(self.values, ensure_ascii=False, indent=1))
        goal = "the highest F1" if self.precision is None else f"a precision of at least {self.precision:g}"
        comment = f"Lowest confidence of each class for {goal}, on {count_of(len(self._coco), 'labeled image')}."
        write_ontology(self.output / "classes.yaml", self.vocabulary, thresholds, comment)
        self._worst.write(self.output / "errors")

    def _not_requested(self) -> list[str]:
        """Return the classes of the labels that the run did not request."""
        return [name for name in self.ground_truth.vocabulary.classes if name not in self.vocabulary.classes]

    def _metric_path(self) -> str:
        return self.metric or ("segm.AP" if "segm" in self.values else "bbox.AP")

    def value(self) -> float:
        """Return the metric that a sweep maximizes.

        Raises:
            ConfigError: If the chosen metric does not exist, or a lower one is better.
        """
        choices = [f"{kind}.{key}" for kind in ("bbox", "segm") if kind in self.values for key in self.values[kind]]
        choices += [f"at_threshold.{key}" for key in ("precision", "recall", "f1")]
        return metric_value(self.values, self._metric_path(), f"{', '.join(choices)}, and classes.NAME.*")

    def summary(self) -> str:
        """Return a table of the metrics by class, what was left out, and the files."""
        if not self.values:
            return "nothing to measure"
        kinds = [kind for kind in ("bbox", "segm") if kind in self.values]
        averages = [f"{kind} {key}" for kind in kinds for key in ("AP", "AP50")]
        rows = [self._table_row("all", self.values, self.values["at_threshold"])]
        rows += [self._table_row(name, values, values) for name, values in self.values["classes"].items()]
        title = f"{count_of(len(self._coco), 'image')} against {self.ground_truth.path}"
        table = render_table(title, ["class", *averages, "precision", "recall", "F1", "labels"], rows, width=110)
        left_out = [
            (len(self._without_labels), "image without labels", "images without labels"),
            (len(self._not_requested()), "class that was not requested", "classes that were not requested"),
            (len(self.ground_truth.notes), "label with a problem", "labels with problems"),
        ]
        texts = [f"{count} {one if count == 1 else several}" for count, one, several in left_out if count]
        note = f" (left out: {', '.join(texts)})" if texts else ""
        files = [f"  metrics in {self.output / 'metrics.json'}{note}"]
        files.append(f"  best threshold of each class in {self.output / 'classes.yaml'}")
        return "\n".join([table, *files])

    @staticmethod
    def _table_row(name: str, averages: Mapping[str, Any], counts: Mapping[str, Any]) -> list[str]:
        """Return the cells of a class: its name, averages by kind, ratios, and number of labels."""
        numbers = [averages[kind][key] for kind in ("bbox", "segm") if kind in averages for key in ("AP", "AP50")]
        numbers += [counts[key] for key in ("precision", "recall", "f1")]
        return [name, *(f"{number:.3f}" for number in numbers), str(counts["matched"] + counts["missed"])]


class _LabeledImages:
    """Find the labeled image of a frame.

    Args:
        ground_truth: Labels.
    """

    def __init__(self, ground_truth: CocoFile) -> None:
        self._by_end: dict[str, list[dict[str, Any]]] = {}
        for image in ground_truth.images:
            for end in path_ends(image["file_name"]):
                self._by_end.setdefault(end, []).append(image)

    def find(self, frame: Frame) -> dict[str, Any] | None:
        """Return the image whose path shares the longest suffix with that of a frame; None if none or several do."""
        exact = [image for image in self._by_end.get(frame.name, ()) if image["file_name"] == frame.name]
        if len(exact) == 1:
            return exact[0]
        path = frame.name
        if frame.file is not None and frame.video is None:
            path = frame.file.absolute().as_posix() if isinstance(frame.file, Path) else str(frame.file)
        for end in path_ends(path):
            if images := self._by_end.get(end):
                return images[0] if len(images) == 1 else None
        return None
