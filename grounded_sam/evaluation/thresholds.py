"""The best least confidence of each class, from one run with labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.files import atomic_write
from grounded_sam.structures.vocabulary import Vocabulary

#: Resamples of the images for an interval.
RESAMPLES = 1000
#: Numbers that are looked at together.
BLOCK = 4_000_000


@dataclass(frozen=True)
class BestThreshold:
    """The best threshold of a class and what it gives.

    Attributes:
        score: least confidence; between the last detection that counts and the next one.
        interval: 95% of it, by resampling images (percentile bootstrap, Efron 1979).
        precision, recall, f1: at that score, on the images it was found on.
    """

    score: float
    interval: tuple[float, float]
    precision: float
    recall: float
    f1: float


def best_threshold(
    image: NDArray[np.int64],
    score: NDArray[np.float64],
    right: NDArray[np.bool_],
    labels: NDArray[np.int64],
    precision: float | None = None,
    seed: int = 0,
) -> BestThreshold | None:
    """The threshold of highest F1, or of highest recall with at least a wanted precision.

    Which detection is right does not depend on the threshold, since labels are given to the most confident first.

    Args:
        image: `(n,)` which image each detection is in, from 0.
        score: `(n,)` their confidence.
        right: `(n,)` whether each has found a label of its own.
        labels: `(m,)` how many labels each image has.
        precision: the least precision wanted; None for F1.
        seed: of the resampling.

    Returns:
        None without detections or labels, or if no threshold has the precision.
    """
    if not len(score) or not labels.sum():
        return None
    order = np.argsort(-score, kind="stable")
    image, score, right = image[order], score[order], right[order]
    # A threshold cannot part detections of equal confidence.
    ends = np.flatnonzero(np.append(score[1:] < score[:-1], True))
    between = (score[ends] + np.append(score[ends[1:]], 0.0)) / 2
    between[-1] = score[-1]  # what lies below was not looked at

    def choose(weights: NDArray[np.float64]) -> NDArray[np.int64]:
        """For each row of weights of images `(k, m)` the best of `ends`, -1 for none."""
        each = weights[:, image]
        good = np.cumsum(each * right, 1)[:, ends]
        found = np.cumsum(each, 1)[:, ends]
        there = (weights @ labels)[:, None]
        if precision is None:
            return (2 * good / np.maximum(found + there, 1e-9)).argmax(1)
        fits = good >= precision * found
        return np.where(fits.any(1), np.where(fits & (found > 0), good, -1.0).argmax(1), -1)

    best = int(choose(np.ones((1, len(labels))))[0])
    if best < 0:
        return None
    step = max(1, BLOCK // len(score))
    several = np.concatenate(
        [
            choose(weights[start : start + step].astype(np.float64))
            for weights in _resamples(len(labels), seed)
            for start in range(0, len(weights), step)
        ]
    )
    low, high = np.percentile(between[several[several >= 0]], [2.5, 97.5]) if (several >= 0).any() else (0.0, 1.0)
    good, found = int(right[: ends[best] + 1].sum()), int(ends[best]) + 1
    recall, f1 = good / int(labels.sum()), 2 * good / (found + int(labels.sum()))
    return BestThreshold(float(between[best]), (float(low), float(high)), good / found, recall, f1)


def _resamples(images: int, seed: int) -> Iterator[NDArray[np.uint16]]:
    """How often each image is drawn in each resample, `(RESAMPLES, images)` in blocks."""
    step = max(1, BLOCK // images)
    if step >= RESAMPLES:
        yield _drawn(images, seed)
        return
    rng = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, step):
        yield rng.multinomial(images, np.full(images, 1 / images), min(step, RESAMPLES - start)).astype(np.uint16)


@lru_cache(maxsize=1)  # every class, and every job of a sweep, asks for the same
def _drawn(images: int, seed: int) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES).astype(np.uint16)


def write_ontology(path: Path, vocabulary: Vocabulary, best: list[BestThreshold | None], note: str) -> None:
    """A vocabulary as an ontology file, with the thresholds found; a class without one keeps its own."""
    import yaml

    classes: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(vocabulary.classes):
        entry: dict[str, Any] = {"phrases": list(vocabulary.phrases[i])}
        for key, column in (
            ("id", "ids"),
            ("score", "scores"),
            ("colour", "colours"),
            ("supercategory", "supercategories"),
        ):
            values = getattr(vocabulary, column)
            if values and values[i] is not None:
                entry[key] = values[i]
        found = best[i]
        if found is not None:
            entry["score"] = round(found.score, 4)
        classes[name] = entry
    content = {"classes": classes, **({"negatives": list(vocabulary.negatives)} if vocabulary.negatives else {})}
    text = "".join(f"# {line}\n" for line in note.splitlines())
    text += yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")
