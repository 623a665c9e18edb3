"""How far scores are probabilities: reliability diagram and expected calibration error."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grounded_sam.files import atomic_write_bytes
from grounded_sam.output.paths import OutputPath

#: Number of bins of equal width, as in Guo et al. 2017.
BINS = 10


@dataclass(frozen=True)
class Bin:
    """Scores of one range.

    Attributes:
        low: Lowest score of the range; that of the next range is the upper end, which only the last range includes.
        count: Number of scores.
        score: Their mean.
        rate: Which part of them is right, 0 to 1.
    """

    low: float
    count: int
    score: float
    rate: float


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram.

    Attributes:
        count: Number of scores.
        error: Expected calibration error: mean distance of score and rate over the bins, weighted by their counts, 0 to
            1; -1 without scores.
        bins: Bins that have scores.
    """

    count: int
    error: float
    bins: tuple[Bin, ...]


def measure_reliability(
    scores: Sequence[float] | NDArray[np.floating], right: Sequence[bool] | NDArray[np.bool_]
) -> Reliability:
    """Compare scores with the rate at which they are right ("On calibration of modern neural networks", Guo et al.).

    Args:
        scores: Scores, 0 to 1.
        right: Whether each one is right.

    >>> measure_reliability([0.9, 0.9, 0.1, 0.1], [True, True, False, False]).error
    0.1
    """
    values, hits = np.asarray(scores, np.float64), np.asarray(right, bool)
    numbers = np.minimum((values * BINS + 1e-9).astype(np.int64), BINS - 1)
    bins = []
    for number in range(BINS):
        rows = numbers == number
        if rows.any():
            mean, rate = float(values[rows].mean()), float(hits[rows].mean())
            bins.append(Bin(number / BINS, int(rows.sum()), mean, rate))
    count = len(values)
    error = sum(b.count * abs(b.score - b.rate) for b in bins) / count if count else -1.0
    return Reliability(count, round(error, 12), tuple(bins))


def write_diagram(path: OutputPath, curves: Mapping[str, Reliability]) -> None:
    """Draw reliability diagrams side by side, as a PNG.

    Args:
        path: File to write.
        curves: What the scores belong to, and their calibration. Those without scores are left out.
    """
    from matplotlib.figure import Figure

    drawn = {name: curve for name, curve in curves.items() if curve.count}
    if not drawn:
        path.unlink(missing_ok=True)
        return
    figure = Figure(figsize=(4.6 * len(drawn), 4.4), layout="constrained")
    for axis, (name, curve) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        lows, rates = [b.low + 0.5 / BINS for b in curve.bins], [b.rate for b in curve.bins]
        axis.bar(lows, rates, width=0.9 / BINS, color="#9ecae1", label="fraction correct")
        points = {"color": "#08519c", "clip_on": False, "zorder": 3, "label": "at the mean score"}  # whole at the edges
        axis.plot([b.score for b in curve.bins], rates, "o", **points)
        axis.plot([0, 1], [0, 1], "--", color="#666666", label="calibrated")
        for b in curve.bins:
            axis.annotate(str(b.count), (b.low + 0.5 / BINS, 0.01), ha="center", va="bottom", fontsize=7)
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="score", ylabel="fraction correct")
        axis.set_title(f"{name}: calibration error {curve.error:.3f}", fontsize=10)
        axis.legend(loc="upper left", fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    atomic_write_bytes(path, out.getvalue())
