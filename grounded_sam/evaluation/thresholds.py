"""Find the best score threshold of each class, from one run on labeled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.files import atomic_write_text
from grounded_sam.output.paths import OutputPath
from grounded_sam.structures.vocabulary import Vocabulary

#: Bootstrap resamples of the images for an interval.
RESAMPLES = 1000
#: Elements per bootstrap block, which bounds memory.
BLOCK = 4_000_000


@dataclass(frozen=True)
class BestThreshold:
    """The best threshold of a class, and its results on the images that it was chosen on.

    Attributes:
        score: Lowest confidence, halfway between the last detection kept and the next one.
        interval: 95% interval of `score`, by resampling images (percentile bootstrap, Efron 1979).
        precision: Precision, 0 to 1.
        recall: Recall, 0 to 1.
        f1: F1, 0 to 1.
    """

    score: float
    interval: tuple[float, float]
    precision: float
    recall: float
    f1: float


def best_threshold(
    image: NDArray[np.int64],
    score: NDArray[np.float64],
    is_match: NDArray[np.bool_] | NDArray[np.float64],
    label_counts: NDArray[np.int64] | NDArray[np.float64],
    precision: float | None = None,
    seed: int = 0,
    fewest_errors: bool = False,
) -> BestThreshold | None:
    """Find the threshold with the highest F1, with the highest recall at a minimum precision, or with fewest errors.

    Whether a detection is right does not depend on the threshold, since labels are assigned to the most confident
    detections first.

    Args:
        image: `(n,)`, number of the image of each detection, from 0.
        score: `(n,)`, confidence.
        is_match: `(n,)`, whether the detection matches a label, or the chance of that, 0 to 1.
        label_counts: `(m,)`, labels in each image, or how many are to be expected.
        precision: Lowest precision; None for the highest F1.
        seed: Seed of the bootstrap.
        fewest_errors: Whether to choose the smallest sum of false and missed detections instead of the highest F1.

    Returns:
        None if there are no detections or no labels, or if no threshold reaches the precision.

    >>> image, score = np.zeros(3, int), np.array([0.75, 0.5, 0.25])
    >>> best = best_threshold(image, score, np.array([True, True, False]), np.array([2]))
    >>> best.score, best.f1
    (0.375, 1.0)
    """
    if not len(score) or not label_counts.sum():
        return None
    order = np.argsort(-score, kind="stable")
    image, score, is_match = image[order], score[order], is_match[order]
    # A threshold cannot separate detections of equal confidence.
    ends = np.flatnonzero(np.append(score[1:] < score[:-1], True))
    thresholds = (score[ends] + np.append(score[ends[1:]], 0.0)) / 2
    thresholds[-1] = score[-1]  # the run kept no detections below it

    def choose(weights: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the index of the best threshold for each row of image weights `(k, m)`, -1 for none."""
        detections = weights[:, image]
        matched = np.cumsum(detections * is_match, 1)[:, ends]
        kept = np.cumsum(detections, 1)[:, ends]
        if precision is None and fewest_errors:
            return (2 * matched - kept).argmax(1)
        if precision is None:
            labels = (weights @ label_counts)[:, None]
            return (2 * matched / np.maximum(kept + labels, 1e-9)).argmax(1)
        precise = matched >= precision * kept
        return np.where(precise.any(1), np.where(precise & (kept > 0), matched, -1.0).argmax(1), -1)

    best = int(choose(np.ones((1, len(label_counts))))[0])
    if best < 0:
        return None
    interval = _bootstrap_interval(choose, thresholds, len(score), len(label_counts), seed)
    matched, kept, labels = float(is_match[: ends[best] + 1].sum()), int(ends[best]) + 1, float(label_counts.sum())
    return BestThreshold(
        score=float(thresholds[best]),
        interval=interval,
        precision=matched / kept,
        recall=matched / labels,
        f1=2 * matched / (kept + labels),
    )


def _bootstrap_interval(
    choose: Callable[[NDArray[np.float64]], NDArray[np.int64]],
    thresholds: NDArray[np.float64],
    detections: int,
    images: int,
    seed: int,
) -> tuple[float, float]:
    """Compute the 95% interval of the chosen threshold over resamples of the images."""
    step = max(1, BLOCK // detections)
    chosen = np.concatenate(
        [
            choose(weights[start : start + step].astype(np.float64))
            for weights in _resamples(images, seed)
            for start in range(0, len(weights), step)
        ]
    )
    chosen = chosen[chosen >= 0]
    if not len(chosen):
        return 0.0, 1.0
    low, high = np.percentile(thresholds[chosen], [2.5, 97.5])
    return float(low), float(high)


def _resamples(images: int, seed: int) -> Iterator[NDArray[np.uint16]]:
    """Yield how often each image is drawn in each resample, `(RESAMPLES, images)` in blocks of rows."""
    step = max(1, BLOCK // images)
    if step >= RESAMPLES:
        yield _all_resamples(images, seed)
        return
    rng = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, step):
        yield rng.multinomial(images, np.full(images, 1 / images), min(step, RESAMPLES - start)).astype(np.uint16)


@lru_cache(maxsize=1)  # the same for every class, and for every job of a sweep
def _all_resamples(images: int, seed: int) -> NDArray[np.uint16]:
    """Return how often each image is drawn in each resample, `(RESAMPLES, images)`."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES).astype(np.uint16)


def write_ontology(
    path: OutputPath, vocabulary: Vocabulary, thresholds: Sequence[BestThreshold | None], comment: str
) -> None:
    """Write a vocabulary as an ontology file with the best thresholds as scores.

    Args:
        path: YAML file.
        vocabulary: The classes.
        thresholds: Best threshold of each class; with None it keeps its own score.
        comment: Comment at the top of the file.
    """
    import yaml

    columns = {
        "id": vocabulary.ids,
        "score": vocabulary.scores,
        "colour": vocabulary.colors,
        "supercategory": vocabulary.supercategories,
    }
    classes: dict[str, dict[str, Any]] = {}
    for i, (name, threshold) in enumerate(zip(vocabulary.classes, thresholds, strict=True)):
        entry: dict[str, Any] = {"phrases": list(vocabulary.phrases[i])}
        entry |= {key: column[i] for key, column in columns.items() if column and column[i] is not None}
        if threshold is not None:
            entry["score"] = round(threshold.score, 4)
        classes[name] = entry
    content: dict[str, Any] = {"classes": classes}
    if vocabulary.negatives:
        content["negatives"] = list(vocabulary.negatives)
    text = "".join(f"# {line}\n" for line in comment.splitlines())
    text += yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    atomic_write_text(path, text)
