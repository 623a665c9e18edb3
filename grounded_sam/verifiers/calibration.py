"""Combine what detector, verifier and segmenter say about a detection into one probability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grounded_sam.errors import ConfigError

#: Scores are kept this far from 0 and 1, so that their logits are finite.
EPSILON = 1e-4
#: Largest difference of two phrases that counts, in logits.
MAX_MARGIN = 10.0


def to_logit(score: ArrayLike) -> NDArray[np.float64]:
    """Return the logits of scores from 0 to 1.

    >>> to_logit([0.5]).tolist()
    [0.0]
    """
    clipped = np.asarray(score, np.float64).clip(EPSILON, 1 - EPSILON)
    return np.log(clipped / (1 - clipped))


def to_probability(logit: ArrayLike) -> NDArray[np.float64]:
    """Return the sigmoid of logits.

    >>> to_probability([0.0]).tolist()
    [0.5]
    """
    return np.asarray(1 / (1 + np.exp(-np.asarray(logit, np.float64).clip(-50, 50))), np.float64)


@dataclass(frozen=True)
class ScoreWeights:
    """A logistic model of whether a detection is right.

    The logit of the probability is `bias` plus the other weights times: the logits of the detector's confidence and of
    the verifier's score, the margin between the best phrase of its class and the best of any other class (in logits of
    the verifier, at most 10), and the segmenter's estimate of IoU.

    The default, half of either logit, is the geometric mean of the odds. It is not calibrated: weights are fitted on
    labeled images, as `grounded_sam.shapes.training.verifier_calibration` does.

    Attributes:
        bias: Added to the logit.
        detector: Weight of the logit of the detector's confidence.
        verify: Weight of the logit of the verifier's score.
        margin: Weight of the margin.
        mask: Weight of the estimated IoU, from which 0.9 is subtracted; without masks it is 0.9.

    >>> weights = ScoreWeights()
    >>> [round(float(p), 2) for p in weights.probability([0.8, 0.8], [0.8, 0.2], [0.0, 0.0], None)]
    [0.8, 0.5]
    """

    bias: float = 0.0
    detector: float = 0.5
    verify: float = 0.5
    margin: float = 0.0
    mask: float = 0.0

    @classmethod
    def read(cls, value: Any, where: str) -> ScoreWeights:
        """Read weights by name; those that are missing are 0.

        Args:
            value: A mapping; None for the default.
            where: Key or file that it comes from, for messages.

        Raises:
            ConfigError: If it has other keys, or a value that is not a finite number.
        """
        if value is None:
            return cls()
        names = [field.name for field in fields(cls)]
        is_valid = isinstance(value, Mapping) and all(
            key in names and isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
            for key, number in value.items()
        )
        if not is_valid:
            raise ConfigError(f"{where} must map some of {', '.join(names)} to numbers, got {value!r}")
        return cls(**{name: float(value.get(name, 0.0)) for name in names})

    def probability(
        self, detector: ArrayLike, verify: ArrayLike, margin: ArrayLike, mask: ArrayLike | None
    ) -> NDArray[np.float32]:
        """Return the probabilities of some detections, `(n,) float32`.

        Args:
            detector: Confidence of the detector, `(n,)`, 0 to 1.
            verify: Score of the verifier, `(n,)`, 0 to 1.
            margin: Margin to the best other class, `(n,)`; infinite where there is none.
            mask: Estimated IoU of the masks, `(n,)`; None without masks.
        """
        logits = features(detector, verify, margin, mask) @ np.array(list(asdict(self).values()))
        return to_probability(logits).astype(np.float32)


def features(detector: ArrayLike, verify: ArrayLike, margin: ArrayLike, mask: ArrayLike | None) -> NDArray[np.float64]:
    """Return what the weights of `ScoreWeights` are multiplied with, `(n, 5)`, for the arguments of `probability`."""
    first = to_logit(detector)
    limited = np.nan_to_num(np.asarray(margin, np.float64), posinf=MAX_MARGIN).clip(-MAX_MARGIN, MAX_MARGIN)
    iou = np.zeros_like(first) if mask is None else np.asarray(mask, np.float64).clip(0, 1) - 0.9
    return np.column_stack([np.ones_like(first), first, to_logit(verify), limited, iou])
