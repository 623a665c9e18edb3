"""Presence and phrase metrics of images: whether each phrase was found where it is, and only there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.evaluation.calibration import Reliability, measure_reliability
from grounded_sam.evaluation.image_matching import label_overlaps, probabilities
from grounded_sam.evaluation.phrase_scores import PairMatch, best_match, match_pair, phrase_scores
from grounded_sam.evaluation.values import render_table
from grounded_sam.formats.coco import CocoFile
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.vocabulary import Vocabulary

#: Metrics that a sweep can maximize.
RANKING = ("cgF1", "cgF1_50", "pmF1", "pmF1_50", "IL_MCC", "IL_F1")
#: Largest number of classes in printed tables; `metrics.json` has all of them.
MAX_ROWS = 40
_COLUMNS = ("class", "present", "absent", "found", "false", "MCC", "false/absent", "pmF1", "cgF1")
#: Metrics that are 0 whatever was found where there is no negative pair, or no positive one.
_NEED_BOTH = ("IL_MCC", "cgF1", "cgF1_50", "cgF1_75")


@dataclass
class _Pairs:
    """Pairs of all images with a phrase: matches, scores of presence, and how many pairs were left out."""

    matches: list[PairMatch] = field(default_factory=list)
    presence: list[float] = field(default_factory=list)
    left_out: int = 0

    def values(self) -> dict[str, Any]:
        """Return the entry of `metrics.json`."""
        false = [pair.detections for pair in self.matches if not pair.labels]
        return {
            "positive_pairs": len(self.matches) - len(false),
            "negative_pairs": len(false),
            "pairs_left_out": self.left_out,
            "false_per_negative_pair": float(np.mean(false)) if false else -1.0,
            **phrase_scores(self.matches),
        }

    def calibration(self) -> Reliability:
        """Compare the scores of presence with the rate of presence."""
        return measure_reliability(self.presence, [pair.labels > 0 for pair in self.matches])


class PhraseMetrics:
    """Collect the pairs of each image and class of the run; see `phrase_scores` for the metrics.

    A pair is left out if the labels do not decide it (see `known_phrases`), if a label of it is a crowd, or if one of
    several people who labeled it says that not all objects are labeled. Of several people the one whose labels fit best
    counts, pair by pair. IoU is that of masks if detections and labels have them, else of boxes.

    The score of presence of a pair is that of `metadata["presence"]` of the detections where there is one, else the
    probability of the best detection, 0 without detections.

    Args:
        vocabulary: Classes of the run.
        ground_truth: Labels.
        others: Labels of the same images by other people.
    """

    def __init__(self, vocabulary: Vocabulary, ground_truth: CocoFile, others: Sequence[CocoFile] = ()) -> None:
        self.vocabulary = vocabulary
        self._files = [ground_truth, *others]
        self._class_ids = [{name: i for i, name in enumerate(file.vocabulary.classes)} for file in self._files]
        self._images = [{image["file_name"]: image for image in file.images} for file in self._files]
        self._numbers = {name: i for i, name in enumerate(vocabulary.classes)}
        self._pairs = [_Pairs() for _ in vocabulary.classes]
        self._empty_images: list[int] = []  # detections of each image in which all phrases are absent

    def add(self, image: Mapping[str, Any], detections: sv.Detections) -> None:
        """Add an image.

        Args:
            image: Its entry in the ground truth.
            detections: Its detections, masks as RLE (see `structures.masks.pack_masks`).
        """
        images = [image, *(by_name.get(image["file_name"]) for by_name in self._images[1:])]
        labels = [f.packed_labels(entry) for f, entry in zip(self._files, images, strict=True) if entry is not None]
        presence = detections.metadata.get("presence") or {}
        class_ids = np.asarray(detections.class_id if detections.class_id is not None else np.empty(0), np.int64)
        scores = probabilities(detections)
        present, known = False, True
        for name, class_id in self._asked(image):
            pairs = self._pairs[class_id]
            if not self._is_decided(name, images):
                pairs.left_out += 1
                known = False
                continue
            rows = np.flatnonzero(class_ids == class_id)
            match = best_match([_match(select_rows(detections, rows), of_one, name) for of_one in labels])
            best = float(scores[rows].max()) if len(rows) else 0.0
            pairs.matches.append(match)
            pairs.presence.append(min(1.0, max(0.0, float(presence.get(name, best)))))
            present |= match.labels > 0
        if known and not present:
            self._empty_images.append(len(detections))

    def _asked(self, image: Mapping[str, Any]) -> list[tuple[str, int]]:
        """Return name and number of the classes of the run that the labels of an image say something about."""
        listed = self._files[0].known[image["id"]].listed
        if listed is None:
            return list(self._numbers.items())
        names = [self._files[0].vocabulary.classes[i] for i in sorted(listed)]
        return [(name, self._numbers[name]) for name in names if name in self._numbers]

    def _is_decided(self, name: str, images: Sequence[Mapping[str, Any] | None]) -> bool:
        """Return whether all who labeled an image decided on a class, and completely."""
        for file, class_ids, image in zip(self._files, self._class_ids, images, strict=True):
            if image is None or name not in class_ids or not file.known[image["id"]].decides(class_ids[name]):
                return False
        return True

    def values(self) -> dict[str, Any]:
        """Return the entry of `metrics.json`, of all pairs together."""
        together = _Pairs(
            [match for pairs in self._pairs for match in pairs.matches],
            [score for pairs in self._pairs for score in pairs.presence],
            sum(pairs.left_out for pairs in self._pairs),
        )
        empty = self._empty_images
        return {
            **together.values(),
            "images_without_objects": len(empty),
            "false_per_image_without_objects": float(np.mean(empty)) if empty else -1.0,
            "annotators": len(self._files),
        }

    def values_of(self, class_id: int) -> dict[str, Any]:
        """Return the entry of a class in `metrics.json`."""
        return self._pairs[class_id].values()

    def calibration(self) -> Reliability:
        """Compare the scores of presence of all pairs with the rate of presence."""
        scores = [score for pairs in self._pairs for score in pairs.presence]
        return measure_reliability(scores, [match.labels > 0 for pairs in self._pairs for match in pairs.matches])


def _match(detections: sv.Detections, labels: sv.Detections, name: str) -> PairMatch:
    """Match detections of one class with the labels of that class."""
    names = labels.data.get("class_name", [])
    return match_pair(label_overlaps(detections, select_rows(labels, [str(other) == name for other in names])))


def phrase_table(values: Mapping[str, Any]) -> str:
    """Render the table of phrases: pairs, presence, false detections and F1, of all and by class.

    Args:
        values: Content of `metrics.json`.
    """
    rows = [_row("all", values["phrases"])]
    rows += [_row(name, of_class["phrases"]) for name, of_class in list(values["classes"].items())[:MAX_ROWS]]
    return render_table("each class, where it is and where it is absent", _COLUMNS, rows, width=110)


def _row(name: str, values: Mapping[str, Any]) -> list[str]:
    has_both = values["positive_pairs"] and values["negative_pairs"]
    counts = [str(values[key]) for key in ("positive_pairs", "negative_pairs", "IL_TP", "IL_FP")]
    cells = [
        f"{values['IL_MCC']:.3f}" if has_both else "",
        f"{values['false_per_negative_pair']:.3f}" if values["negative_pairs"] else "",
        f"{values['pmF1']:.3f}" if values["positive_pairs"] else "",
        f"{values['cgF1']:.3f}" if has_both else "",
    ]
    return [name, *counts, *cells]


def check_has_pairs(metric: str, values: Mapping[str, Any]) -> None:
    """Check that a metric of phrases can differ from 0.

    Args:
        metric: Path of the metric.
        values: Content of `metrics.json`.

    Raises:
        ConfigError: If there are no positive or no negative pairs, and it needs both.
    """
    pairs = values.get("phrases")
    if pairs is None:  # nothing was measured, or a video without classes
        return
    for kind in ("positive", "negative"):
        if metric.rpartition(".")[2] in _NEED_BOTH and metric.startswith("phrases.") and not pairs[f"{kind}_pairs"]:
            raise ConfigError(
                f"{metric} needs images with a phrase and images without it, but there are no {kind} pairs; choose "
                "phrases.pmF1 or at_threshold.f1, or add images"
            )
