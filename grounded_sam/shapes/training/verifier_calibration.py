"""Calibrate a trained verifier: `python -m grounded_sam.shapes.training.verifier_calibration MODEL_FOLDER [PHOTOS]`.

On validation scenes, which have pairs that training does not use, it is fitted

- how logits of the model become probabilities for crops: its own scale and bias,
- the weights of the calibrated score and of presence, see `verifiers.calibration.ScoreWeights`, with the small detector
  and SAM 2 in front,
- how similar to an example a crop has to be, and the whitening of embeddings for that.

All of it is written into the folder of the model. Scenes of another seed measure the result.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from safetensors.numpy import save_file
from transformers import SiglipModel

from grounded_sam.config.build import load
from grounded_sam.evaluation.calibration import measure_reliability
from grounded_sam.files import atomic_write, atomic_write_text
from grounded_sam.pipeline.pipeline import Pipeline
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
from grounded_sam.shapes.training.calibration import match
from grounded_sam.shapes.training.verifier import compare, match_phrases, tokenize, vary
from grounded_sam.shapes.training.verifier_crops import (
    ALL_COLORS,
    ALL_SHAPES,
    FIRST_OUTLINE,
    NOTHING,
    draw_objects,
    draw_outlines,
)
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.verifiers.calibration import ScoreWeights, features
from grounded_sam.verifiers.embedding import ImageTextModel
from grounded_sam.verifiers.prototypes import WHITENING

log = logging.getLogger(__name__)

PAIRS = TRAIN_PAIRS * 4 + VALIDATION_PAIRS * 2
#: Crops of other things per crop of the thing that examples show: about as many as the boxes that a detector proposes.
OTHERS = 12


@dataclass(frozen=True)
class Judged:
    """What the models say on validation scenes.

    Attributes:
        features: Of each detection, as `verifiers.calibration.features` returns them, `(n, 5)`.
        correct: Whether it matches an object of its class at IoU 0.5, `(n,) bool`.
        unseen: Whether its phrase is a pair of `VALIDATION_PAIRS`, `(n,) bool`.
        best: Features of the best detection of each image and phrase, `(m, 5)`.
        present: Whether the image shows what the phrase says, `(m,) bool`.
        best_unseen: As `unseen`, for `best`.
        missed: Number of image and phrase pairs without a detection: with an object, and without; of all pairs, and
            of those that training does not use.
        objects: Number of objects that phrases ask for: of pairs that were trained, and of others.
    """

    features: NDArray[np.float64]
    correct: NDArray[np.bool_]
    unseen: NDArray[np.bool_]
    best: NDArray[np.float64]
    present: NDArray[np.bool_]
    best_unseen: NDArray[np.bool_]
    missed: NDArray[np.int64]
    objects: tuple[int, int]


def sample_prompt(rng: np.random.Generator, scene: Scene) -> list[Phrase]:
    """Sample one to ten phrases of which about half are in the scene, the rest mostly look-alikes."""
    count = int(rng.choice([1, 1, 2, 4, 6, 10]))
    present = list(dict.fromkeys(scene.pairs))
    absent = [pair for pair in PAIRS if pair not in present]  # as frequent as in the scenes
    shared = {word for pair in present for word in pair}
    alike = [pair for pair in absent if shared & set(pair)] or absent
    names: list[tuple[str | None, str | None]] = []
    kind = rng.choice(["pairs", "shapes", "colors"], p=[0.8, 0.1, 0.1])
    if kind != "pairs":
        values = SHAPES if kind == "shapes" else COLORS
        chosen = rng.permutation(list(values))[: min(count, len(values))]
        names = [(None, str(value)) if kind == "shapes" else (str(value), None) for value in chosen]
    else:
        for _ in range(count):
            is_present = present and rng.random() < 0.5
            source: Sequence[Pair] = present if is_present else alike if rng.random() < 0.8 else absent
            names.append(source[int(rng.integers(len(source)))])
    phrases = {name: Phrase(*name, sample_text(rng, *name)) for name in dict.fromkeys(names)}
    return list({phrase.text: phrase for phrase in phrases.values()}.values())


def judge(pipeline: Pipeline, seed: int, count: int, photos: Sequence[NDArray[np.uint8]]) -> Judged:
    """Run detector, segmenter and verifier on `count` validation scenes."""
    verifier = pipeline.stages.verifier
    assert verifier is not None
    parts: dict[str, list[Any]] = {name: [] for name in ("x", "correct", "unseen", "best", "present", "best_unseen")}
    missed, objects = np.zeros((2, 2), np.int64), [0, 0]
    everything = Select(score=0.0, nms=0.7)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        scene = make_scene(rng, PAIRS, photos=photos, count=0 if rng.random() < 0.1 else None)
        phrases = sample_prompt(rng, scene)
        vocabulary = Vocabulary.parse([phrase.text for phrase in phrases])
        frame = Frame(pixels=scene.image)
        stages = pipeline.stages.with_select(everything)
        found = stages.segment([frame], stages.detect([frame], vocabulary), vocabulary, stages.segmenter)[0]
        detections = select_detections(found, everything, vocabulary)
        is_unseen = np.array([(phrase.color, phrase.shape) in VALIDATION_PAIRS for phrase in phrases])
        shown = np.array([any(phrase.matches(pair) for pair in scene.pairs) for phrase in phrases])
        for pair in scene.pairs:
            objects[pair in VALIDATION_PAIRS] += any(phrase.matches(pair) for phrase in phrases)
        ids = np.asarray(detections.class_id)
        nothing = ~np.isin(np.arange(len(phrases)), ids)
        for number, group in enumerate((nothing, nothing & is_unseen)):
            missed[number] += ((group & shown).sum(), (group & ~shown).sum())
        if not len(detections):
            continue
        assert detections.confidence is not None
        data = detections.data
        values = features(detections.confidence, data["verify_score"], data["verify_margin"], data.get("mask_score"))
        parts["x"].append(values)
        parts["correct"].append(match(detections, phrases, scene))
        parts["unseen"].append(is_unseen[ids])
        product = detections.confidence * np.asarray(data["verify_score"], np.float64)
        for class_id in np.unique(ids):
            rows = np.flatnonzero(ids == class_id)
            parts["best"].append(values[rows[product[rows].argmax()]][None])
            parts["present"].append(shown[[class_id]])
            parts["best_unseen"].append(is_unseen[[class_id]])
    x, correct, unseen, best, present, best_unseen = (np.concatenate(part) for part in parts.values())
    return Judged(x, correct, unseen, best, present, best_unseen, missed, (objects[0], objects[1]))


def fit_weights(x: NDArray[np.float64], is_right: NDArray[np.bool_], penalty: float = 0.5) -> ScoreWeights:
    """Fit the weights of a logistic model by maximum likelihood, with a small penalty on their squares.

    >>> rng = np.random.default_rng(0)
    >>> x = features(rng.uniform(0.1, 0.9, 9000), rng.uniform(0.1, 0.9, 9000), np.zeros(9000), None)
    >>> fitted = fit_weights(x, rng.random(9000) < 1 / (1 + np.exp(-(0.5 + 2 * x[:, 2]))))
    >>> round(fitted.verify), abs(round(fitted.detector))
    (2, 0)
    """
    from scipy.optimize import minimize

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = x @ weights
        residual = 1 / (1 + np.exp(-logits)) - is_right
        value = float((np.logaddexp(0, logits) - is_right * logits).sum() + penalty * (weights[1:] ** 2).sum())
        gradient = x.T @ residual
        gradient[1:] += 2 * penalty * weights[1:]
        return value, gradient

    start = np.array(list(asdict(ScoreWeights()).values()))
    fitted = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return ScoreWeights(*(round(float(value), 4) for value in fitted))


def correlation(predicted: NDArray[np.bool_], actual: NDArray[np.bool_], negatives: Sequence[int] = (0, 0)) -> float:
    """Compute Matthews' correlation coefficient.

    Args:
        predicted: What is predicted, `(n,) bool`.
        actual: What is true, `(n,) bool`.
        negatives: Number of further cases that are predicted to be negative: wrongly, and rightly.

    >>> correlation(np.array([True, False]), np.array([True, False]))
    1.0
    """
    hit, false = int((predicted & actual).sum()), int((predicted & ~actual).sum())
    miss, rejected = int((~predicted & actual).sum()), int((~predicted & ~actual).sum())
    miss, rejected = miss + int(negatives[0]), rejected + int(negatives[1])
    bottom = float(hit + false) * (hit + miss) * (rejected + false) * (rejected + miss)
    return (hit * rejected - false * miss) / bottom**0.5 if bottom else 0.0


def calibrate_crops(folder: Path, photos: list[NDArray[np.uint8]], count: int = 3000) -> None:
    """Fit the scale and the bias of the model, so that its sigmoid is the probability that a phrase fits a crop."""
    network = ImageTextModel(str(folder), "cpu")
    crops = draw_objects(2001, count, PAIRS, photos)
    settings = OmegaConf.create({"gray": 1.0, "dimmed": 0.0, "mask_noise": 0.15})
    pixels = vary(crops.pixels, crops.masks, settings, torch.Generator().manual_seed(2))
    names = [*TRAIN_PAIRS, *VALIDATION_PAIRS]
    named = torch.tensor([(ALL_COLORS.index(color), ALL_SHAPES.index(shape)) for color, shape in names])
    ids = tokenize(network.tokenizer, [f"{color} {shape}" for color, shape in names])
    with torch.no_grad():
        embedded = [network.model.get_image_features(pixel_values=part).pooler_output for part in pixels.split(200)]
        logits = compare(network.model, torch.nn.functional.normalize(torch.cat(embedded), dim=1), ids)
    right, alike = match_phrases(torch.from_numpy(crops.labels), named)
    chosen = right | alike
    is_right = right[chosen].numpy()
    x = np.column_stack([np.ones(len(is_right)), logits[chosen].double().numpy()])
    # Look-alikes are more frequent here than among detections: both kinds get the same weight.
    weight = np.where(is_right, 0.5 / is_right.mean(), 0.5 / (1 - is_right.mean()))
    bias, scale = _fit_weighted(x, is_right, weight)
    log.info("logits are multiplied by %.3f, and %.3f is added", scale, bias)
    model = SiglipModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.logit_bias.copy_(model.logit_bias * scale + bias)
        model.logit_scale.add_(float(np.log(scale)))
    model.half().save_pretrained(folder)


def _fit_weighted(
    x: NDArray[np.float64], is_right: NDArray[np.bool_], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    from scipy.optimize import minimize

    def loss(weights: NDArray[np.float64]) -> float:
        logits = x @ weights
        return float((weight * (np.logaddexp(0, logits) - is_right * logits)).mean())

    return np.asarray(minimize(loss, np.array([0.0, 1.0]), method="BFGS").x, np.float64)


def whiten(folder: Path, photos: list[NDArray[np.uint8]], count: int = 4000) -> None:
    """Fit the whitening of embeddings: the inverse root of their covariance within shapes, named ones and outlines."""
    network = ImageTextModel(str(folder), "cpu")
    settings = OmegaConf.create({"gray": 1.0, "dimmed": 0.0, "mask_noise": 0.15})
    embeddings, shapes = [], []
    crops = [draw_objects(2002, count, TRAIN_PAIRS * 4 + EXTRA_PAIRS, photos), draw_outlines(2002, count // 2, photos)]
    for part in crops:
        pixels = vary(part.pixels, part.masks, settings, torch.Generator().manual_seed(3))
        with torch.no_grad():
            outputs = [network.model.get_image_features(pixel_values=p).pooler_output for p in pixels.split(200)]
        embeddings.append(torch.nn.functional.normalize(torch.cat(outputs), dim=1).double().numpy())
        shapes.append(part.labels[:, 1])
    values, labels = np.concatenate(embeddings), np.concatenate(shapes)
    values, labels = values[labels != NOTHING], labels[labels != NOTHING]
    centered = values.copy()
    for label in np.unique(labels):
        centered[labels == label] -= values[labels == label].mean(0)
    covariance = centered.T @ centered / len(centered)
    eigenvalues, vectors = np.linalg.eigh(covariance)
    shrunk = eigenvalues + 0.05 * eigenvalues.mean()
    matrix = vectors @ np.diag(shrunk**-0.5) @ vectors.T
    with atomic_write(folder / WHITENING) as part_:
        save_file({"mean": values.mean(0).astype(np.float16), "matrix": matrix.astype(np.float16)}, part_)
    outlines = labels >= FIRST_OUTLINE
    _fit_examples(folder, values[outlines], labels[outlines])


def _fit_examples(folder: Path, values: NDArray[np.float64], labels: NDArray[np.int64]) -> None:
    """Fit the scale and the offset of similarities to the mean of three examples, on outlines."""
    from safetensors.numpy import load_file

    arrays = load_file(folder / WHITENING)
    whitened = (values - arrays["mean"].astype(np.float64)) @ arrays["matrix"].astype(np.float64)
    whitened /= np.linalg.norm(whitened, axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    cosines, same = [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        others = rng.permutation(np.flatnonzero(labels != label))[: OTHERS * len(rows)]
        mean = whitened[rows[:3]].mean(0)
        mean /= np.linalg.norm(mean)
        for group, is_same in ((rows[3:], True), (others, False)):
            cosines.append(whitened[group] @ mean)
            same.append(np.full(len(group), is_same))
    cosine, is_right = np.concatenate(cosines), np.concatenate(same)
    offset, scale = _fit_weighted(np.column_stack([np.ones(len(cosine)), cosine]), is_right, np.ones(len(cosine)))
    log.info("examples: cosine times %.2f plus %.2f", scale, offset)
    _update(folder, examples={"scale": round(float(scale), 3), "offset": round(float(offset), 3), "turns": True})


def _update(folder: Path, **values: Any) -> None:
    """Set values of `verification` in the config of a model."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["verification"] = {**config.get("verification", {}), **values}
    atomic_write_text(path, json.dumps(config, indent=2) + "\n")


def shapes_pipeline(folder: Path) -> Pipeline:
    """Load the small models with a verifier from a folder, keeping the confidence of the detector."""
    return load("preset=shapes", "verify=shapes", f"verify.checkpoint={folder}", "refine.score=text", "device=cpu")


def calibrate_scores(folder: Path, photos: list[NDArray[np.uint8]], count: int = 500) -> None:
    """Fit the weights of the calibrated score and of presence, and log how good they are on other scenes."""
    pipeline = shapes_pipeline(folder)
    fitted = judge(pipeline, 41, count, photos)
    weights, presence = fit_weights(fitted.features, fitted.correct), fit_weights(fitted.best, fitted.present)
    _update(folder, calibration=asdict(weights), presence=asdict(presence))
    log.info("calibration %s", asdict(weights))
    log.info("presence %s", asdict(presence))
    measured = judge(pipeline, 42, count, photos)
    report(measured, weights, presence)


def report(measured: Judged, weights: ScoreWeights, presence: ScoreWeights) -> None:
    """Log F1 of boxes, calibration error, and MCC of presence, with the detector alone beside them."""
    detector = _sigmoid(measured.features[:, 1])
    calibrated = _sigmoid(measured.features @ np.array(list(asdict(weights).values())))
    for name, score in (("detector", detector), ("calibrated", calibrated)):
        log.info("%s: expected calibration error %.3f", name, measure_reliability(score, measured.correct).error)
        for threshold in (0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8):
            f1 = []
            for is_unseen, objects in enumerate(measured.objects):
                kept = (score >= threshold) & (measured.unseen == bool(is_unseen))
                f1.append(2 * int(measured.correct[kept].sum()) / max(int(kept.sum()) + objects, 1))
            log.info("%s at %.2f: F1 %.3f, of pairs that were not trained %.3f", name, threshold, *f1)
    verify, best = measured.best[:, 2], measured.best
    scores = {
        "detector": _sigmoid(best[:, 1]),
        "verify": _sigmoid(verify),
        "product": np.sqrt(_sigmoid(best[:, 1]) * _sigmoid(verify)),
        "presence": _sigmoid(best @ np.array(list(asdict(presence).values()))),
    }
    for name, score in scores.items():
        texts = []
        for threshold in (0.3, 0.4, 0.5, 0.6, 0.7):
            both = correlation(score >= threshold, measured.present, measured.missed[0].tolist())
            rows = measured.best_unseen
            unseen = correlation(score[rows] >= threshold, measured.present[rows], measured.missed[1].tolist())
            texts.append(f"{threshold}: {both:.3f}/{unseen:.3f}")
        log.info("MCC by %s, of all and of pairs that were not trained, by threshold: %s", name, "  ".join(texts))


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-logits)), np.float64)


def calibrate_verifier(folder: Path, photos: list[NDArray[np.uint8]], count: int = 500) -> None:
    """Calibrate a model, as the module says."""
    calibrate_crops(folder, photos)
    whiten(folder, photos)
    calibrate_scores(folder, photos, count)


def main() -> None:
    """Calibrate the model whose folder is the first command-line argument."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    folder, *photos = sys.argv[1:]
    calibrate_verifier(Path(folder), load_photos(photos[0] if photos else None))


if __name__ == "__main__":
    main()
