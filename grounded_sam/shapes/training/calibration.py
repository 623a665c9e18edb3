"""Calibrate a trained detector: `python -m grounded_sam.shapes.training.calibration DETECTOR_FOLDER [PHOTOS]`.

Confidence should be the probability that a detection is correct, for pairs that were trained and for others, whatever
the length of the phrase. On validation scenes, Platt scaling is fitted for each number of tokens in a phrase and
written to the config of the checkpoint. Scenes of another seed measure the expected calibration error, and F1 by
threshold.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.detectors.grounding_dino import GroundingDino
from grounded_sam.evaluation.calibration import measure_reliability
from grounded_sam.files import atomic_write_text
from grounded_sam.pipeline.select import Select, select_detections
from grounded_sam.shapes.phrases import Phrase, sample_text
from grounded_sam.shapes.scenes import (
    COLORS,
    EXTRA_PAIRS,
    SHAPES,
    TRAIN_PAIRS,
    VALIDATION_PAIRS,
    Pair,
    Scene,
    load_photos,
    make_scene,
)
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary

log = logging.getLogger(__name__)

#: Scores below this one are not used.
MIN_SCORE = 0.01
#: Largest number of tokens with a scale and an offset of their own.
MAX_TOKENS = 4
#: Smallest number of detections for a fit; with fewer, the fit of the next shorter phrases is used.
MIN_SAMPLES = 300


@dataclass(frozen=True)
class Scores:
    """Scores of detections on validation scenes, before calibration or after.

    Attributes:
        score: `(n,)`, 0 to 1.
        tokens: Number of tokens of the phrase, `(n,)`.
        correct: Whether the detection matches an object of its class at IoU 0.5, `(n,) bool`.
        unseen: Whether the phrase names a pair of `VALIDATION_PAIRS`, `(n,) bool`.
        num_objects: Objects to find: of pairs that were trained, and of others.
    """

    score: NDArray[np.float64]
    tokens: NDArray[np.int64]
    correct: NDArray[np.bool_]
    unseen: NDArray[np.bool_]
    num_objects: tuple[int, int]


def sample_queries(rng: np.random.Generator, scene: Scene) -> list[Phrase]:
    """Sample ten pairs, present and absent ones, or all shapes or all colors."""
    kind = rng.choice(["pairs", "absent", "shapes", "colors"], p=[0.6, 0.1, 0.15, 0.15])
    names: Sequence[tuple[str | None, str | None]]
    if kind == "shapes":
        names = [(None, shape) for shape in SHAPES]
    elif kind == "colors":
        names = [(color, None) for color in COLORS]
    else:
        present = list(dict.fromkeys(scene.pairs))
        absent = [pair for pair in (*TRAIN_PAIRS, *VALIDATION_PAIRS, *EXTRA_PAIRS[::4]) if pair not in present]
        chosen: list[Pair] = [] if kind == "absent" else present[:6]
        names = chosen + [absent[i] for i in rng.permutation(len(absent))[: 10 - len(chosen)]]
    return [Phrase(color, shape, sample_text(rng, color, shape)) for color, shape in names]


def match(detections: sv.Detections, phrases: Sequence[Phrase], scene: Scene) -> NDArray[np.bool_]:
    """Return which detections match an object of their phrase at IoU 0.5, the most confident first, one per object."""
    correct = np.zeros(len(detections), bool)
    if not len(detections) or not len(scene.pairs):
        return correct
    assert detections.confidence is not None and detections.class_id is not None
    iou = sv.box_iou_batch(detections.xyxy, scene.xyxy)
    for class_id, phrase in enumerate(phrases):
        matches = np.array([phrase.matches(pair) for pair in scene.pairs])
        free = matches.copy()
        rows = np.flatnonzero(detections.class_id == class_id)
        for row in rows[np.argsort(-detections.confidence[rows])]:
            overlap = np.where(free, iou[row], 0)
            if overlap.max() >= 0.5:
                correct[row] = True
                free[overlap.argmax()] = False
    return correct


def collect_scores(
    detector: GroundingDino, seed: int, count: int, photos: Sequence[NDArray[np.uint8]], nms: float
) -> Scores:
    """Run a detector on `count` validation scenes."""
    columns: list[tuple[float, int, bool, bool]] = []
    num_objects = [0, 0]
    select = Select(score=MIN_SCORE, nms=nms)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        scene = make_scene(rng, TRAIN_PAIRS * 2 + VALIDATION_PAIRS * 4, photos=photos)
        phrases = sample_queries(rng, scene)
        vocabulary = Vocabulary.parse([phrase.text for phrase in phrases])
        detections = detector.detect([Frame(pixels=scene.image)], vocabulary)[0]
        detections = select_detections(detections, select, vocabulary)
        assert detections.confidence is not None and detections.class_id is not None
        for score, class_id, is_correct in zip(
            detections.confidence, detections.class_id, match(detections, phrases, scene), strict=True
        ):
            phrase = phrases[class_id]
            length = len(detector.tokenizer(phrase.text, add_special_tokens=False)["input_ids"])
            columns.append((float(score), length, bool(is_correct), (phrase.color, phrase.shape) in VALIDATION_PAIRS))
        for pair in scene.pairs:
            if any(phrase.matches(pair) for phrase in phrases):
                num_objects[pair in VALIDATION_PAIRS] += 1
    if not columns:
        raise ValueError(f"no detection scores more than {MIN_SCORE}")
    score, tokens, correct, unseen = (np.array(column) for column in zip(*columns, strict=True))
    return Scores(score, tokens, correct, unseen, (num_objects[0], num_objects[1]))


def fit_platt(score: NDArray[np.float64], correct: NDArray[np.bool_]) -> tuple[float, float]:
    """Fit a scale and an offset of the logit by maximum likelihood.

    >>> rng = np.random.default_rng(0)
    >>> p = rng.uniform(0.05, 0.95, 20000)
    >>> scale, offset = fit_platt(p, rng.random(20000) < p)
    >>> round(scale, 1), abs(round(offset, 1))
    (1.0, 0.0)
    """
    from scipy.optimize import minimize

    clipped = score.clip(1e-6, 1 - 1e-6)
    logit = np.log(clipped / (1 - clipped))

    def loss(parameters: NDArray[np.float64]) -> float:
        value = np.exp(parameters[0]) * logit + parameters[1]
        return float(np.mean(np.logaddexp(0, value) - correct * value))

    log_scale, offset = minimize(loss, np.zeros(2), method="Nelder-Mead").x
    return float(np.exp(log_scale)), float(offset)


def calibrate(folder: Path, photos: Sequence[NDArray[np.uint8]], count: int = 500, nms: float = 0.7) -> None:
    """Fit the calibration of a detector, write it to its `config.json`, and log how good it is."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("phrase_calibration", None)
    atomic_write_text(path, json.dumps(config, indent=2) + "\n")
    fitted = collect_scores(GroundingDino(str(folder)), 31, count, photos, nms)
    calibration = []
    pair = (1.0, 0.0)
    for tokens in range(1, MAX_TOKENS + 1):
        rows = fitted.tokens == tokens
        if rows.sum() >= MIN_SAMPLES:
            pair = fit_platt(fitted.score[rows], fitted.correct[rows])
        calibration.append(pair)
    config["phrase_calibration"] = [[round(value, 4) for value in pair] for pair in calibration]
    atomic_write_text(path, json.dumps(config, indent=2) + "\n")
    log.info("phrase_calibration %s", config["phrase_calibration"])
    measured = collect_scores(GroundingDino(str(folder)), 32, count, photos, nms)
    log.info("expected calibration error %.3f", measure_reliability(measured.score, measured.correct).error)
    for threshold in np.arange(0.1, 0.75, 0.05):
        f1 = []
        for is_unseen, num_objects in enumerate(measured.num_objects):
            kept = (measured.score >= threshold) & (measured.unseen == bool(is_unseen))
            matched = int(measured.correct[kept].sum())
            f1.append(2 * matched / max(int(kept.sum()) + num_objects, 1))
        log.info("threshold %.2f  F1 %.3f, of pairs that were not trained %.3f", threshold, *f1)


def main() -> None:
    """Calibrate the detector whose folder is the first command-line argument."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder, *photos = sys.argv[1:]
    calibrate(Path(folder), load_photos(photos[0] if photos else None))


if __name__ == "__main__":
    main()
