"""Scores of pairs of an image and a phrase, as SA-Co defines them: IL_MCC, pmF1 and cgF1.

The definitions are those of "SAM 3: Segment Anything with Concepts" (Carion et al. 2025) and of its evaluator,
`sam3/eval/cgf1_eval.py`, with its small constants in the denominators. A pair is positive if the image shows what the
phrase says, and negative if it does not. Where only a part of the pairs is known, only that part counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

#: IoU thresholds of COCO; those of single scores are the first and the sixth.
IOUS = np.linspace(0.5, 0.95, 10)
_ROWS = {"": slice(None), "_50": slice(0, 1), "_75": slice(5, 6)}
_EPSILON, _SMALL_EPSILON = 1e-4, 1e-6  # as in the evaluator


@dataclass(frozen=True, slots=True)
class PairMatch:
    """How the detections of a pair match its labels.

    Attributes:
        labels: Number of labels; 0 for a negative pair.
        detections: Number of detections.
        matched: `(10,) int64`, matches at each of `IOUS`.
    """

    labels: int
    detections: int
    matched: NDArray[np.int64]

    @property
    def f1(self) -> NDArray[np.float64]:
        """F1 of this pair at each of `IOUS`."""
        return _f1(_ratio(self.matched, self.detections), _ratio(self.matched, self.labels))


def match_pair(iou: NDArray[np.float64]) -> PairMatch:
    """Match the detections of a pair with its labels so that the sum of IoU is highest (Hungarian method).

    Args:
        iou: `(n, m)`, IoU of each detection with each label.

    >>> match_pair(np.array([[0.9, 0.0], [0.0, 0.6]])).matched.tolist()
    [2, 2, 2, 1, 1, 1, 1, 1, 1, 0]
    """
    rows, columns = linear_sum_assignment(-iou)
    matched = (iou[rows, columns][:, None] >= IOUS[None]).sum(0)
    return PairMatch(iou.shape[1], iou.shape[0], matched.astype(np.int64))


def best_match(matches: Sequence[PairMatch]) -> PairMatch:
    """Return the best match of a pair that several people labeled (the "oracle" of SA-Co Gold).

    Args:
        matches: Match with the labels of each person, at least one. The best has the highest F1, averaged over `IOUS`;
            finding nothing where a person labeled nothing is perfect.
    """
    best = matches[0]
    for match in matches[1:]:
        is_empty, best_is_empty = (not (pair.labels or pair.detections) for pair in (match, best))
        if is_empty or (not best_is_empty and match.f1.mean() > best.f1.mean()):
            best = match
    return best


def phrase_scores(pairs: Sequence[PairMatch]) -> dict[str, float]:
    """Compute the scores of pairs.

    Args:
        pairs: The pairs.

    Returns:
        `IL_TP`, `IL_FP`, `IL_TN`, `IL_FN` (numbers of positive pairs with detections, negative pairs with, without, and
        positive pairs without), `IL_precision`, `IL_recall`, `IL_F1`, `IL_FPR`, `IL_MCC` (-1 to 1; 0 where there are
        no positive or no negative pairs); `precision`, `recall` and `F1` of objects, `pmF1` (positive micro F1: without
        the detections on negative pairs), `positive_macro_F1` and `cgF1 = pmF1 * IL_MCC`, all averaged over `IOUS`, and
        with `_50` and `_75` at one IoU. `positive_macro_F1` is -1 if no positive pair has detections. `cgF1` is from
        -1 to 1; tables show it in percent elsewhere.

    >>> found, absent = match_pair(np.array([[0.97]])), match_pair(np.zeros((0, 0)))
    >>> scores = phrase_scores([found, absent])
    >>> round(scores["IL_MCC"], 3), round(scores["cgF1"], 3)
    (1.0, 1.0)
    """
    labels = np.array([pair.labels for pair in pairs], np.int64)
    found = np.array([pair.detections for pair in pairs], np.int64)
    matched = np.array([pair.matched for pair in pairs], np.int64).reshape(-1, len(IOUS))
    both = (labels > 0) & (found > 0)
    scores = _image_level(labels > 0, found > 0)
    true = matched.sum(0)
    recall, precision = _ratio(true, int(labels.sum())), _ratio(true, int(found.sum()))
    positive_precision = _ratio(true, int(found[both].sum()))
    pair_f1 = np.array([pair.f1 for pair in pairs if pair.labels and pair.detections]).reshape(-1, len(IOUS))
    positive_f1 = _f1(positive_precision, recall)
    curves = {
        "precision": precision,
        "recall": recall,
        "F1": _f1(precision, recall),
        "pmF1": positive_f1,
        "positive_micro_precision": positive_precision,
        "positive_macro_F1": pair_f1.mean(0) if len(pair_f1) else np.full(len(IOUS), -1.0),
        "cgF1": positive_f1 * scores["IL_MCC"],
    }
    for end, rows in _ROWS.items():
        scores |= {name + end: float(curve[rows].mean()) for name, curve in curves.items()}
    return scores


def _image_level(present: NDArray[np.bool_], found: NDArray[np.bool_]) -> dict[str, float]:
    """Compute the scores of presence: whether something was found where it is, and nothing where it is not."""
    tp, fp = int((present & found).sum()), int((~present & found).sum())
    tn, fn = int((~present & ~found).sum()), int((present & ~found).sum())
    recall, precision = tp / (tp + fn + _SMALL_EPSILON), tp / (tp + fp + _SMALL_EPSILON)
    product = float(tp + fp) * float(tp + fn) * float(tn + fp) * float(tn + fn)
    return {
        "IL_TP": tp,
        "IL_FP": fp,
        "IL_TN": tn,
        "IL_FN": fn,
        "IL_precision": precision,
        "IL_recall": recall,
        "IL_F1": 2 * precision * recall / (precision + recall + _SMALL_EPSILON),
        "IL_FPR": fp / (fp + tn + _SMALL_EPSILON),
        "IL_MCC": float(tp * tn - fp * fn) / (product**0.5 + _SMALL_EPSILON),
    }


def _ratio(matched: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return matched / (count + _EPSILON)


def _f1(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2 * precision * recall / (precision + recall + _EPSILON)
