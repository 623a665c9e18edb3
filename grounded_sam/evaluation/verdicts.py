"""Learn from what people decided about the objects of a store: thresholds, negatives, and what to look at next.

The detections that a run stored, down to a low score, are candidates. A verdict says whether a candidate is right: an
object of the class that was predicted. For all others the chance of that is estimated, from the score and from the
verdicts on candidates with similar scores, first of the same class and, as long as there are few, of all classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from grounded_sam.evaluation.thresholds import BestThreshold, best_threshold
from grounded_sam.formats.store_objects import Row, box_of, read_detector_scores, row_overlaps
from grounded_sam.formats.store_rows import StoreRows
from grounded_sam.structures.vocabulary import Vocabulary, name_key

#: Deviations, before there are verdicts, of offset and slope of all classes together, and of each class from these.
OFFSET_DEVIATION, SLOPE_DEVIATION, CLASS_OFFSET_DEVIATION, CLASS_SLOPE_DEVIATION = 1.5, 0.5, 1.5, 0.5
#: Width in logits of the scores that one verdict says something about.
REACH = 0.7
#: Cells of the scores from 0.01 to 0.99, equally wide in logits.
CELLS = 48
#: IoU from which two objects are on the same thing.
SAME_THING_IOU = 0.5
#: Most negatives that are proposed: each takes room in the prompt of a detector.
MAX_NEGATIVES = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A detection in a store, and what is known about it.

    Attributes:
        object_id: Id of the object.
        file: Name of its image or frame.
        image: Number of that image or frame.
        class_name: Class that was predicted.
        score: Confidence, 0 to 1.
        box: xyxy in pixels.
        is_right: Whether it is an object of that class; None if nobody has decided.
        looks_like: What it is instead, if somebody said so, or if a class that is not looked for fits better.
        disagreement: Largest difference of the scores of several detectors, 0 to 1.
    """

    object_id: str
    file: str
    image: int
    class_name: str
    score: float
    box: tuple[float, float, float, float]
    is_right: bool | None = None
    looks_like: str | None = None
    disagreement: float = 0.0


@dataclass(frozen=True)
class Verdicts:
    """The candidates of a store, and objects that are no candidates of their class.

    Attributes:
        candidates: All candidates of the classes.
        missed: Image number and class of objects that people added, or gave another class.
        num_images: Number of images and frames.
        vocabulary: The classes.
    """

    candidates: list[Candidate]
    missed: list[tuple[int, str]]
    num_images: int
    vocabulary: Vocabulary

    def of_class(self, name: str) -> list[int]:
        """Return the indices of the candidates of a class."""
        return [i for i, candidate in enumerate(self.candidates) if candidate.class_name == name]


def read_verdicts(store: StoreRows, vocabulary: Vocabulary | None = None) -> Verdicts:
    """Read the candidates of a store, with the decisions about them.

    Args:
        store: Rows of the store.
        vocabulary: Classes that candidates may have; None for those of the last run whose results are in use, followed
            by those that people gave to objects.
    """
    words = vocabulary or last_vocabulary(store)
    images = ((key, image, rows) for key in store.index.sorted_keys() for image, rows in store.rows(key))
    return join_verdicts(
        (
            image_verdicts(rows, store.owner_and_name(key, image)[1], number, words, (image["height"], image["width"]))
            for number, (key, image, rows) in enumerate(images)
        ),
        words,
    )


def join_verdicts(images: Iterable[Verdicts], vocabulary: Vocabulary) -> Verdicts:
    """Return the candidates of several images together.

    Args:
        images: Those of each image, see `image_verdicts`.
        vocabulary: The classes of all of them.
    """
    joined = Verdicts([], [], 0, vocabulary)
    for image in images:
        joined.candidates.extend(image.candidates)
        joined.missed.extend(image.missed)
        joined = replace(joined, num_images=joined.num_images + 1)
    return joined


def image_verdicts(
    rows: Sequence[Row], name: str, number: int, vocabulary: Vocabulary, size_hw: tuple[int, int]
) -> Verdicts:
    """Return the candidates of one image or frame.

    Args:
        rows: Rows of its objects, also of rejected ones.
        name: Its name.
        number: Its number.
        vocabulary: Classes that candidates may have.
        size_hw: Height and width in pixels.
    """
    missed = [
        (number, vocabulary.classes[i])
        for row in rows
        if row["status"] in ("added", "edited", "accepted") and row["class"] != row["predicted_class"]
        if (i := vocabulary.index(row["class"])) is not None
    ]
    return Verdicts(_candidates(rows, name, number, vocabulary, size_hw), missed, 1, vocabulary)


def last_vocabulary(store: StoreRows) -> Vocabulary:
    """Return the classes of the last run whose results are in use, and those that people gave to objects."""
    in_use = store.runs_in_use()
    runs = [run for key, run in store.runs.items() if key in in_use or not in_use]
    last = max(runs, key=lambda run: (run.number, run.created))
    return last.vocabulary.with_classes(list(store.index.added_classes))


def _candidates(
    rows: Sequence[Row], name: str, number: int, vocabulary: Vocabulary, size_hw: tuple[int, int]
) -> list[Candidate]:
    """Return the candidates of an image."""
    others = [row for row in rows if vocabulary.index(row["class"]) is None and row["status"] != "rejected"]
    found = []
    for row in rows:
        predicted = row["class"] if row["status"] == "predicted" else row["predicted_class"]
        if predicted is None or (i := vocabulary.index(predicted)) is None:
            continue
        is_right = looks_like = None
        if row["status"] != "predicted":
            is_right = row["status"] != "rejected" and name_key(row["class"]) == name_key(predicted)
        if is_right is False:
            looks_like = row["reason"] if row["status"] == "rejected" else row["class"]
            looks_like = looks_like or _better(row, others, size_hw)
        scores = read_detector_scores(row).values()
        found.append(
            Candidate(
                object_id=row["object_id"],
                file=name,
                image=number,
                class_name=vocabulary.classes[i],
                score=float(row["score"]),
                box=tuple(box_of(row)),  # type: ignore[arg-type]
                is_right=is_right,
                looks_like=looks_like,
                disagreement=max(scores, default=0.0) - min(scores, default=0.0),
            )
        )
    return found


def _better(row: Row, others: Sequence[Row], size_hw: tuple[int, int]) -> str | None:
    """Return the class of the most confident other object on the same thing that scores higher, if there is one."""
    overlaps = row_overlaps([row], others, size_hw)[0] if others else []
    on_it = [other for other, iou in zip(others, overlaps, strict=True) if iou >= SAME_THING_IOU]
    fitting = [other for other in on_it if other["score"] > row["score"]]
    return str(max(fitting, key=lambda other: other["score"])["class"]) if fitting else None


def _logits(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    scores = np.clip(scores, 0.01, 0.99)
    return np.log(scores / (1 - scores))


@dataclass(frozen=True)
class Calibration:
    """Chance that a candidate is right, as a function of class and score: a logistic regression.

    Attributes:
        offset: `(c,)`, by class.
        slope: `(c,)`, of the logit of the score, above 0.
    """

    offset: NDArray[np.float64]
    slope: NDArray[np.float64]

    def __call__(self, class_ids: NDArray[np.int64], logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the chances, `(n,)`.

        Args:
            class_ids: `(n,)`.
            logits: `(n,)`, logits of the scores.
        """
        return np.asarray(1 / (1 + np.exp(-(self.offset[class_ids] + self.slope[class_ids] * logits))))


def fit_calibration(verdicts: Verdicts) -> Calibration:
    """Fit the chance that a candidate is right to the verdicts.

    The parameters have normal priors: scores mean what they say (slope 1, offset 0), and classes differ moderately, so
    that a class with few verdicts follows the others. The choice of candidates for verdicts may depend on class and
    score, since these are what the chance depends on.

    Args:
        verdicts: At least the candidates.
    """
    from scipy.optimize import minimize

    num_classes = len(verdicts.vocabulary)
    judged = [c for c in verdicts.candidates if c.is_right is not None]
    class_ids = _class_ids(verdicts.vocabulary, judged)
    logits = _logits(np.array([c.score for c in judged], np.float64))
    right = np.array([c.is_right for c in judged], np.float64)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        offset, slope = parameters[:2]
        own_offset, own_slope = parameters[2:].reshape(2, num_classes)
        value = offset + own_offset[class_ids] + (slope + own_slope[class_ids]) * logits
        error = 1 / (1 + np.exp(-value)) - right
        total = (np.logaddexp(0, value) - right * value).sum()
        total += ((offset / OFFSET_DEVIATION) ** 2 + ((slope - 1) / SLOPE_DEVIATION) ** 2) / 2
        total += ((own_offset / CLASS_OFFSET_DEVIATION) ** 2 + (own_slope / CLASS_SLOPE_DEVIATION) ** 2).sum() / 2
        gradient = np.concatenate(
            [
                [error.sum() + offset / OFFSET_DEVIATION**2],
                [(error * logits).sum() + (slope - 1) / SLOPE_DEVIATION**2],
                np.bincount(class_ids, error, num_classes) + own_offset / CLASS_OFFSET_DEVIATION**2,
                np.bincount(class_ids, error * logits, num_classes) + own_slope / CLASS_SLOPE_DEVIATION**2,
            ]
        )
        return float(total), gradient

    start = np.concatenate([[0.0, 1.0], np.zeros(2 * num_classes)])
    best = minimize(loss, start, jac=True, method="L-BFGS-B").x
    own_offset, own_slope = best[2:].reshape(2, num_classes)
    return Calibration(best[0] + own_offset, np.maximum(best[1] + own_slope, 0.1))


def _class_ids(vocabulary: Vocabulary, candidates: Sequence[Candidate]) -> NDArray[np.int64]:
    return np.array([vocabulary.index(c.class_name) for c in candidates], np.int64)


def chances(verdicts: Verdicts) -> NDArray[np.float64]:
    """Return for each candidate the chance that it is right, `(n,)`; 0 or 1 where somebody decided.

    >>> words = Vocabulary.parse(["car"])
    >>> seen = Candidate("a", "1.jpg", 0, "car", 0.5, (0, 0, 9, 9), is_right=True)
    >>> chances(Verdicts([seen, replace(seen, is_right=None)], [], 1, words)).round(2).tolist()
    [1.0, 0.75]
    """
    judged = np.array([-1.0 if c.is_right is None else float(c.is_right) for c in verdicts.candidates])
    return np.where(judged >= 0, judged, _estimated(verdicts))


def _estimated(verdicts: Verdicts) -> NDArray[np.float64]:
    """Return for each candidate the chance that one of its class and score is right, `(n,)`."""
    logits = _logits(np.array([c.score for c in verdicts.candidates], np.float64))
    return fit_calibration(verdicts)(_class_ids(verdicts.vocabulary, verdicts.candidates), logits)


def tuned_thresholds(verdicts: Verdicts, precision: float | None = None) -> list[BestThreshold | None]:
    """Find the best threshold of each class for all candidates, see `thresholds.best_threshold`.

    For all candidates the estimated chance counts, also for those with a verdict: where they were chosen is no property
    of the class.

    Args:
        verdicts: Candidates and verdicts.
        precision: Precision to reach, with the highest recall; None for the fewest errors, false and missed ones.

    Returns:
        By class; None for a class without verdicts, and where no threshold reaches the precision.
    """
    chance, best = _estimated(verdicts), list[BestThreshold | None]()
    for name in verdicts.vocabulary.classes:
        rows = verdicts.of_class(name)
        if all(verdicts.candidates[i].is_right is None for i in rows):
            best.append(None)
            continue
        image = np.array([verdicts.candidates[i].image for i in rows], np.int64)
        score = np.array([verdicts.candidates[i].score for i in rows], np.float64)
        labels = np.bincount(image, chance[rows], verdicts.num_images)
        labels += np.bincount([i for i, missed in verdicts.missed if missed == name], minlength=verdicts.num_images)
        best.append(best_threshold(image, score, chance[rows], labels, precision, fewest_errors=True))
    return best


@dataclass(frozen=True)
class Negative:
    """A phrase that rejected objects look like.

    Attributes:
        phrase: The phrase.
        count: How many rejected candidates look like it.
        classes: The classes that were predicted for them, the most frequent first.
    """

    phrase: str
    count: int
    classes: tuple[str, ...]


def proposed_negatives(verdicts: Verdicts, min_count: int = 2) -> list[Negative]:
    """Return phrases that wrong candidates look like and that are no phrase of a class, the most frequent first.

    Such a phrase is what somebody said when rejecting, or a class of another run whose detection of the same thing is
    more confident.

    Args:
        verdicts: Candidates and verdicts.
        min_count: Fewest wrong candidates that look alike.
    """
    words = verdicts.vocabulary
    taken = {name_key(text) for text in (*words.classes, *(p for phrases in words.phrases for p in phrases))}
    taken |= set(map(name_key, words.negatives))
    spelled: dict[str, str] = {}
    classes: dict[str, Counter[str]] = {}
    for candidate in verdicts.candidates:
        if candidate.is_right is not False or candidate.looks_like is None:
            continue
        key = name_key(candidate.looks_like)
        if key in taken or not any(map(str.isalpha, key)):
            continue
        spelled.setdefault(key, " ".join(candidate.looks_like.split()))
        classes.setdefault(key, Counter())[candidate.class_name] += 1
    found = [
        Negative(spelled[key], counts.total(), tuple(name for name, _ in counts.most_common()))
        for key, counts in classes.items()
        if counts.total() >= min_count
    ]
    return sorted(found, key=lambda negative: (-negative.count, negative.phrase))[:MAX_NEGATIVES]


def tuned_vocabulary(verdicts: Verdicts, negatives: Sequence[Negative]) -> Vocabulary:
    """Return the classes with the proposed negatives."""
    words = verdicts.vocabulary
    return replace(words, negatives=(*words.negatives, *(negative.phrase for negative in negatives)))


def next_candidates(verdicts: Verdicts, count: int, seed: int = 0) -> list[int]:
    """Choose the candidates whose verdicts are worth most.

    A verdict is worth most where it is least certain on which side of an even chance candidates of this class and score
    are, since that decides the threshold of the class, and where nobody has looked at similar ones. The value of a cell
    of class and score is the expected loss of deciding now (as in the expected improvement of Mockus 1978). Among the
    candidates of a cell, those of images that were not chosen yet come first, of these those about which detectors
    disagree.

    Args:
        verdicts: Candidates and verdicts.
        count: How many to choose.
        seed: Seed of the choice among equals.

    Returns:
        Indices of candidates without a verdict, the most valuable first.
    """
    candidates, num_classes = verdicts.candidates, len(verdicts.vocabulary)
    if not candidates:
        return []
    class_ids = _class_ids(verdicts.vocabulary, candidates)
    low, high = _logits(np.array([0.0, 1.0])).tolist()
    edges = np.linspace(low, high, CELLS + 1)
    centers = (edges[1:] + edges[:-1]) / 2
    cells = np.clip(np.digitize(_logits(np.array([c.score for c in candidates])), edges) - 1, 0, CELLS - 1)
    kernel = np.exp(-(((centers[:, None] - centers[None]) / REACH) ** 2) / 2)
    judged = np.array([c.is_right is not None for c in candidates])
    table = np.zeros((num_classes, CELLS))
    np.add.at(table, (class_ids[judged], cells[judged]), 1)
    known = table @ kernel
    ids = np.repeat(np.arange(num_classes), CELLS)
    chance = fit_calibration(verdicts)(ids, np.tile(centers, num_classes)).reshape(num_classes, CELLS)
    seen: Counter[int] = Counter(c.image for c in candidates if c.is_right is not None)
    order = np.random.default_rng(seed).permutation(len(candidates))
    waiting: dict[tuple[int, int], list[int]] = {}
    for i in order[~judged[order]].tolist():
        waiting.setdefault((int(class_ids[i]), int(cells[i])), []).append(i)
    is_free = np.zeros((num_classes, CELLS), bool)
    for place in waiting:
        is_free[place] = True
    chosen: list[int] = []
    while len(chosen) < count and is_free.any():
        value = np.where(is_free, _expected_loss(chance, known), -1.0)
        class_id, cell = divmod(int(value.argmax()), CELLS)
        members = waiting[class_id, cell]
        best = min(members, key=lambda i: (seen[candidates[i].image], -candidates[i].disagreement))
        members.remove(best)
        is_free[class_id, cell] = bool(members)
        seen[candidates[best].image] += 1
        known[class_id] += kernel[cell]
        chosen.append(best)
    return chosen


def _expected_loss(chance: NDArray[np.float64], known: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how much is lost on average by taking the more likely side now, in logits.

    Args:
        chance: Chances that candidates are right.
        known: Numbers of verdicts on similar ones.
    """
    from scipy.special import ndtr

    mean = np.abs(np.log(chance / (1 - chance)))
    deviation = 1 / np.sqrt(1 / (CLASS_OFFSET_DEVIATION**2 + OFFSET_DEVIATION**2) + known * chance * (1 - chance))
    z = mean / deviation
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return np.asarray(deviation * density - mean * ndtr(-z), np.float64)
