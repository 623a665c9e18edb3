"""Metrics of images against their labels."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError, count_of
from grounded_sam.evaluation.calibration import Reliability, write_diagram
from grounded_sam.evaluation.coco_scores import CocoEvaluator
from grounded_sam.evaluation.image_matching import ImageMatcher
from grounded_sam.evaluation.mistakes import WorstImages
from grounded_sam.evaluation.phrase_metrics import MAX_ROWS, RANKING, PhraseMetrics, check_has_pairs, phrase_table
from grounded_sam.evaluation.thresholds import write_ontology
from grounded_sam.evaluation.values import check_classes, metric_value, precision_recall, render_table
from grounded_sam.files import atomic_write_text
from grounded_sam.formats.coco import CocoFile
from grounded_sam.media.files import path_ends
from grounded_sam.output.claim import check_output
from grounded_sam.output.paths import OutputPath, output_path
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

DETECTIONS_OF_UNLISTED = "detections of classes that are not labeled in their image"
PAIRS_LEFT_OUT = "pairs of an image and a phrase that are not labeled completely"


class ImageMetrics:
    """Write `metrics.json` and, under `errors/`, the images with the most mistakes; print a table.

    Average precision and recall are those of COCO (Lin et al. 2014), of boxes and, where labels and detections have
    them, of masks; -1 where there is nothing to measure. Precision, recall, F1 and the confusion matrix use the
    detections at the thresholds of the run, see `image_matching.ImageMatcher`. Classes are matched by name; labels of
    classes that the run did not request are left out.

    The same matches give the best threshold of each class, see `thresholds.best_threshold`: in `metrics.json`, and as
    an ontology in `classes.yaml` that can be used as `text`. The choice is among the detections that the run kept, so
    `select.score` should be low.

    Whether each class was found in the images that show it, and only there, is measured by
    `phrase_metrics.PhraseMetrics`. How far scores are probabilities is in `metrics.json` and drawn in
    `calibration.png`, both for detections (right if they match a label) and for presence.

    Where labels do not list all classes of an image (see `formats.known_phrases`), detections of the others are left
    out, as are labels and detections of classes that are not labeled completely.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        ground_truth: Labels of the images, which are matched by name, or else by the longest common path suffix.
        iou: Lowest IoU at which a detection matches a label, above 0.
        metric: Metric that `value` returns, as a path into `metrics.json`; None for `segm.AP`, or without masks
            `bbox.AP`.
        errors: Number of images drawn under `errors/`.
        precision: Precision that the best thresholds reach, with the highest recall; None for the highest F1.
        others: Labels of the same images by other people, for the phrase metrics.

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
        others: Sequence[CocoFile] = (),
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
        self._phrases = PhraseMetrics(vocabulary, ground_truth, others)
        self._worst = WorstImages(errors)
        self._unlisted = 0  # detections of classes that the labels of their image do not decide on

    def __enter__(self) -> ImageMetrics:
        for name in ("metrics.json", "classes.yaml", "calibration.png"):
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
        labels, known = self.ground_truth.packed_labels(image), self.ground_truth.known[image["id"]]
        kept = detections
        if known.listed is not None or known.incomplete:
            classes = self.ground_truth.vocabulary.classes
            among = range(len(classes)) if known.listed is None else known.listed
            measured = {classes[i] for i in among if known.measures(i)}
            kept, labels = (_of_classes(side, measured) for side in (detections, labels))
        self._unlisted += len(detections) - len(kept)
        self._coco.add(image, kept)
        self._phrases.add(image, kept)
        missed, false = self._matcher.add(frame.name, kept, labels)
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
            "phrases": self._phrases.values(),
            "calibration": {name: asdict(curve) for name, curve in self._curves().items()},
            "classes": {
                name: {
                    **{kind_: scores_.by_class[i] for kind_, scores_ in scores.items()},
                    **precision_recall(*counts[i].tolist()),
                    "phrases": self._phrases.values_of(i),
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
            "detections_left_out": self._unlisted,
            "not_asked_for": self._not_requested(),
            "without_labels": self._without_labels,
            "labels_left_out": [asdict(note) for note in self.ground_truth.notes],
        }
        self.values["metric"] = self._metric_path()
        atomic_write_text(self.output / "metrics.json", json.dumps(self.values, ensure_ascii=False, indent=1))
        goal = "the highest F1" if self.precision is None else f"a precision of at least {self.precision:g}"
        comment = f"Lowest confidence of each class for {goal}, on {count_of(len(self._coco), 'labeled image')}."
        write_ontology(self.output / "classes.yaml", self.vocabulary, thresholds, comment)
        write_diagram(self.output / "calibration.png", self._curves())
        self._worst.write(self.output / "errors")

    def _curves(self) -> dict[str, Reliability]:
        """Return how far the scores of detections and of presence are probabilities."""
        return {"detections": self._matcher.calibration(), "presence": self._phrases.calibration()}

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
        choices += [f"phrases.{key}" for key in RANKING]
        check_has_pairs(self._metric_path(), self.values)
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
        columns = ["class", *averages, "precision", "recall", "F1", "labels"]
        table = render_table(title, columns, rows[: MAX_ROWS + 1], width=110)
        phrases, hidden = phrase_table(self.values), len(self.vocabulary) - MAX_ROWS
        left_out = [
            (len(self._without_labels), "image without labels", "images without labels"),
            (len(self._not_requested()), "class that was not requested", "classes that were not requested"),
            (len(self.ground_truth.notes), "label with a problem", "labels with problems"),
            (self._unlisted, "detection of a class that is not labeled in its image", DETECTIONS_OF_UNLISTED),
            (
                self.values["phrases"]["pairs_left_out"],
                "pair of an image and a phrase that is not labeled completely",
                PAIRS_LEFT_OUT,
            ),
        ]
        texts = [f"{count} {one if count == 1 else several}" for count, one, several in left_out if count]
        note = f" (left out: {', '.join(texts)})" if texts else ""
        errors = {name: curve["error"] for name, curve in self.values["calibration"].items() if curve["count"]}
        files = [f"  calibration error {', '.join(f'{v:.3f} of {n}' for n, v in errors.items())}"] if errors else []
        if hidden > 0:
            files.append(f"  {count_of(hidden, 'more class', 'more classes')} in metrics.json")
        files.append(f"  metrics in {self.output / 'metrics.json'}{note}")
        files.append(f"  best threshold of each class in {self.output / 'classes.yaml'}")
        return "\n".join([table, phrases, *files])

    @staticmethod
    def _table_row(name: str, averages: Mapping[str, Any], counts: Mapping[str, Any]) -> list[str]:
        """Return the cells of a class: its name, averages by kind, ratios, and number of labels."""
        numbers = [averages[kind][key] for kind in ("bbox", "segm") if kind in averages for key in ("AP", "AP50")]
        numbers += [counts[key] for key in ("precision", "recall", "f1")]
        return [name, *(f"{number:.3f}" for number in numbers), str(counts["matched"] + counts["missed"])]


def _of_classes(detections: sv.Detections, names: Collection[str]) -> sv.Detections:
    """Return the detections or labels of some classes."""
    rows = [str(name) in names for name in detections.data.get("class_name", [])]
    return detections if all(rows) else select_rows(detections, np.array(rows, bool))


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
