"""Tests of the presence and phrase metrics against SA-Co's evaluator and scikit-learn, and of negative pairs.

SA-Co's evaluator is not part of this repository. `REFERENCE` was computed by it, at commit 99d02f2 of
facebookresearch/sam3, from the pairs that `make_pairs` draws. With a copy of that repository, named by the environment
variable SAM3_REPOSITORY, it is run again on other pairs.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_metrics import measure

from grounded_sam import ConfigError, Vocabulary
from grounded_sam.evaluation.calibration import measure_reliability
from grounded_sam.evaluation.phrase_scores import IOUS, PairMatch, best_match, match_pair, phrase_scores
from grounded_sam.formats.coco import CocoFile
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.formats.segmentations import decode_segmentation
from grounded_sam.sinks.metrics import metrics_sink
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import encode_rle, masks_to_xyxy
from grounded_sam.structures.results import FrameResult

SIZE = 40
PHRASES = ["a dog", "red cup", "Tree"]
#: Names of the evaluator's scores, and ours.
NAMES = {"positive_micro_F1": "pmF1"}


def rectangle(rng):
    x, y = rng.integers(0, SIZE - 16, 2)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[y : y + rng.integers(6, 16), x : x + rng.integers(6, 16)] = True
    return mask


def moved(mask, rng, most):
    return np.roll(mask, rng.integers(-most, most + 1, 2), (0, 1))


def make_pairs(folder, seed, images=12, people=3):
    """Write the labels of several people and the results of a detector, as SA-Co has them; return their paths."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pairs, results = [], []
    labels = [[] for _ in range(people)]
    for image in range(images):
        Image.new("RGB", (SIZE, SIZE)).save(folder / f"{image}.png")
        for phrase in PHRASES:
            pair = {"id": 100 + 7 * len(pairs), "text_input": phrase, "file_name": f"{image}.png"}
            pairs.append({**pair, "width": SIZE, "height": SIZE})
            masks = [rectangle(rng) for _ in range(rng.choice([0, 0, 1, 2, 3]))]
            for entries in labels:
                kept = [moved(mask, rng, 1) for mask in masks if rng.random() < 0.9]
                entries += [label(pair["id"], mask) for mask in kept]
            found = [moved(mask, rng, 2) for mask in masks if rng.random() < 0.8]
            found += [rectangle(rng) for _ in range(rng.choice([0, 0, 1]))]
            scores = rng.uniform(0.5, 1, len(found)).round(3).tolist()
            results += [{**label(pair["id"], m), "score": s} for m, s in zip(found, scores, strict=True)]
    paths = [folder / f"person_{number}.json" for number in range(people)]
    for path, entries in zip(paths, labels, strict=True):
        flags = [{**pair, "is_instance_exhaustive": int(rng.random() < 0.95)} for pair in pairs]
        numbered = [{**entry, "id": i + 1} for i, entry in enumerate(entries)]
        content = {"images": flags, "annotations": numbered, "categories": [{"id": 1, "name": "object"}]}
        path.write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(results))
    return paths, folder / "results.json"


def label(pair_id, mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    normalized = [float(value) / SIZE for value in box]
    rle = encode_rle(mask)
    entry = {"image_id": pair_id, "category_id": 1, "segmentation": rle, "bbox": normalized, "iscrowd": 0}
    return {**entry, "area": float(mask.mean())}


def measure_pairs(paths, results, output, *overrides):
    names = ",".join(f"'{path}'" for path in paths)
    return measure(results, paths[0], output, f"truth=[{names}]", "sink.metrics.errors=0", *overrides)


#: What SA-Co's evaluator returns for `make_pairs(folder, seed=5)`, masks at a threshold of 0.5.
REFERENCE = {
    "cgF1": 0.193243607,
    "precision": 0.305554707,
    "recall": 0.366665444,
    "F1": 0.333282751,
    "positive_macro_F1": 0.381029976,
    "positive_micro_F1": 0.366615458,
    "positive_micro_precision": 0.366665444,
    "IL_precision": 0.714285680,
    "IL_recall": 0.882352889,
    "IL_F1": 0.789473148,
    "IL_FPR": 0.374999977,
    "IL_MCC": 0.527101634,
    "cgF1@0.5": 0.351373565,
    "precision@0.5": 0.555554012,
    "recall@0.5": 0.666664444,
    "F1@0.5": 0.606009187,
    "positive_macro_F1@0.5": 0.678013690,
    "positive_micro_F1@0.5": 0.666614448,
    "positive_micro_precision@0.5": 0.666664444,
    "cgF1@0.75": 0.193243603,
    "precision@0.75": 0.305554707,
    "recall@0.75": 0.366665444,
    "F1@0.75": 0.333282744,
    "positive_macro_F1@0.75": 0.358048888,
    "positive_micro_F1@0.75": 0.366615451,
    "positive_micro_precision@0.75": 0.366665444,
}


def check_equal(phrases, reference):
    for name, value in reference.items():
        metric, _, iou = name.removeprefix("cgF1_eval_segm_").partition("@")
        end = {"": "", "0.5": "_50", "0.75": "_75"}[iou]
        assert phrases[NAMES.get(metric, metric) + end] == pytest.approx(value, abs=1e-6), name


def test_the_evaluator_of_sa_co_computed_the_same_numbers(tmp_path):
    paths, results = make_pairs(tmp_path / "pairs", 5)
    phrases = measure_pairs(paths, results, tmp_path / "run")["phrases"]
    assert phrases["annotators"] == 3 and phrases["pairs_left_out"] > 0
    check_equal(phrases, REFERENCE)


@pytest.fixture(scope="module")
def evaluator():
    """SA-Co's evaluator from a copy of its repository."""
    file = Path(os.environ.get("SAM3_REPOSITORY", "")) / "sam3" / "eval" / "cgf1_eval.py"
    if not file.is_file():
        pytest.skip("needs a copy of facebookresearch/sam3, named by SAM3_REPOSITORY")
    spec = importlib.util.spec_from_file_location("cgf1_eval", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cgf1_eval"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module.CGF1Evaluator


@pytest.mark.parametrize("people", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_evaluator_of_sa_co_computes_the_same_numbers(evaluator, tmp_path, seed, people):
    paths, results = make_pairs(tmp_path / "pairs", seed, people=people)
    reference = evaluator([str(path) for path in paths], "segm").evaluate(str(results))
    check_equal(measure_pairs(paths, results, tmp_path / "run")["phrases"], reference)


def test_a_threshold_of_the_run_is_that_of_the_evaluator(tmp_path):
    paths, results = make_pairs(tmp_path / "pairs", 5)
    entries = json.loads(results.read_text())
    results.write_text(json.dumps(entries + [{**entry, "score": 0.3} for entry in entries]))
    check_equal(measure_pairs(paths, results, tmp_path / "run", "select.score=0.5")["phrases"], REFERENCE)


def test_results_without_masks_may_be_in_pixels_or_parts_of_the_image(tmp_path):
    paths, results = make_pairs(tmp_path / "pairs", 6, people=1)
    entries = [
        {k: v for k, v in e.items() if k not in ("segmentation", "area")} for e in json.loads(results.read_text())
    ]
    found = []
    for scale in (1, SIZE):
        results.write_text(json.dumps([{**e, "bbox": [v * scale for v in e["bbox"]]} for e in entries]))
        found.append(measure_pairs(paths, results, tmp_path / str(scale))["phrases"])
    assert found[0] == found[1] and found[0]["pmF1_50"] > 0.3


TABLES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def pair(labels, detections, matched=0):
    return PairMatch(labels, detections, np.full(len(IOUS), matched))


@given(TABLES)
def test_mcc_is_that_of_scikit_learn(table):
    metrics = pytest.importorskip("sklearn.metrics")
    scores = phrase_scores([pair(int(is_there), int(found)) for is_there, found in table])
    expected = metrics.matthews_corrcoef(*zip(*table, strict=True))
    assert scores["IL_MCC"] == pytest.approx(expected, abs=1e-5)


@given(TABLES)
def test_mcc_is_the_correlation_of_presence_and_detection(table):
    there, found = np.array(table, float).T
    scores = phrase_scores([pair(int(a), int(b)) for a, b in table])
    degenerate = there.std() == 0 or found.std() == 0
    expected = 0.0 if degenerate else np.corrcoef(there, found)[0, 1]
    assert scores["IL_MCC"] == pytest.approx(expected, abs=1e-5)


@st.composite
def matches(draw):
    labels, detections = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    values = draw(st.lists(st.floats(0, 1), min_size=labels * detections, max_size=labels * detections))
    return match_pair(np.array(values).reshape(detections, labels))


@given(st.lists(matches(), max_size=12), st.randoms())
def test_scores_are_in_their_ranges_and_do_not_depend_on_the_order(pairs, random):
    scores = phrase_scores(pairs)
    shuffled = random.sample(pairs, len(pairs))
    assert phrase_scores(shuffled) == pytest.approx(scores)
    for name, value in scores.items():
        assert math.isfinite(value)
        low = -1 if "cgF1" in name or name in ("IL_MCC", *(n for n in scores if "macro" in n)) else 0
        assert low <= value <= 1 or name in ("IL_TP", "IL_FP", "IL_TN", "IL_FN")
    assert scores["F1"] <= scores["pmF1"] + 1e-9, "false detections on negative pairs do not lower pmF1"


@given(st.lists(matches(), max_size=12))
def test_a_right_rejection_changes_only_presence(pairs):
    before, after = phrase_scores(pairs), phrase_scores([*pairs, match_pair(np.zeros((0, 0)))])
    assert after["IL_MCC"] >= before["IL_MCC"] - 1e-9 or before["IL_MCC"] < 0
    assert {k: after[k] for k in ("pmF1", "F1", "positive_macro_F1")} == {
        k: before[k] for k in ("pmF1", "F1", "positive_macro_F1")
    }


@given(st.lists(matches(), min_size=1, max_size=3))
def test_more_people_never_make_a_pair_worse(choices):
    best = best_match(choices)
    assert any(best is choice for choice in choices)
    if not any(c.labels == c.detections == 0 for c in choices):
        assert best.f1.mean() == max(c.f1.mean() for c in choices)


# Ground truth with absences


WORDS = ["cup", "dog", "cat"]


def write_truth(tmp_path, images, annotations=(), name="truth.json"):
    """Write a COCO file of 100 x 100 px; an annotation is (image, category, x, more)."""
    content = {
        "categories": [{"id": i + 1, "name": word} for i, word in enumerate(WORDS)],
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100, **e} for i, e in enumerate(images)],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": number, "bbox": [x, 0, 20, 20], **more}
            for i, (image, number, x, more) in enumerate(annotations)
        ],
    }
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def run_sink(tmp_path, truth, results, **settings):
    """Write detections (word, x, score) of images to the sink; return it."""
    vocabulary = Vocabulary.parse(WORDS)
    sink = metrics_sink(tmp_path, vocabulary, truth, **settings)
    with sink:
        for number, rows in enumerate(results):
            sink.write(make_found(f"{number}.png", rows))
    return sink


def make_found(name, rows):
    frame = Frame(pixels=np.zeros((100, 100, 3), np.uint8), name=name)
    boxes = [[x, 0, x + 20, 20] for _, x, _ in rows]
    words = Vocabulary.parse(WORDS)
    detections = make_detections(boxes, [s for *_, s in rows], [WORDS.index(w) for w, *_ in rows], words, (100, 100))
    return FrameResult(frame=frame, detections=detections)


def test_without_lists_everything_that_is_not_labeled_is_absent(tmp_path):
    truth = write_truth(tmp_path, [{}, {}], [(0, 1, 0, {})])
    sink = run_sink(tmp_path, truth, [[("cup", 0, 0.9), ("dog", 0, 0.8), ("dog", 50, 0.7)], [("cat", 9, 0.6)]])
    phrases = sink.values["phrases"]
    assert (phrases["positive_pairs"], phrases["negative_pairs"], phrases["pairs_left_out"]) == (1, 5, 0)
    assert [phrases[f"IL_{key}"] for key in ("TP", "FP", "TN", "FN")] == [1, 2, 3, 0]
    assert phrases["false_per_negative_pair"] == pytest.approx(3 / 5)
    assert phrases["images_without_objects"] == 1 and phrases["false_per_image_without_objects"] == 1
    assert sink.values["classes"]["dog"]["phrases"]["false_per_negative_pair"] == 1


def test_classes_that_an_image_does_not_list_are_not_measured(tmp_path):
    images = [{"neg_category_ids": [2], "not_exhaustive_category_ids": []}, {"neg_category_ids": []}]
    truth = write_truth(tmp_path, images, [(0, 1, 0, {})])
    sink = run_sink(tmp_path, truth, [[("cup", 0, 0.9), ("dog", 0, 0.8), ("cat", 50, 0.7)], [("cat", 9, 0.6)]])
    values = sink.values
    assert (values["phrases"]["positive_pairs"], values["phrases"]["negative_pairs"]) == (1, 1)
    assert values["detections_left_out"] == 2 and values["at_threshold"]["false"] == 1
    assert "2 detections of classes that are not labeled in their image" in sink.summary()


def test_lists_of_category_ids_are_not_exported(tmp_path):
    """Another file may number the categories otherwise."""
    truth = CocoFile(write_truth(tmp_path, [{"neg_category_ids": [2], "license": 3}], [(0, 1, 0, {})]))
    assert truth.image_record(truth.images[0]) == {"id": truth.images[0]["id"], "license": 3}


def test_pairs_that_are_not_labeled_completely_are_left_out(tmp_path):
    truth = write_truth(
        tmp_path, [{"not_exhaustive_category_ids": [1]}, {}], [(0, 1, 0, {}), (1, 2, 0, {"iscrowd": 1})]
    )
    sink = run_sink(tmp_path, truth, [[("cup", 50, 0.9), ("dog", 0, 0.8)], [("dog", 0, 0.6)]])
    values = sink.values
    assert values["phrases"]["pairs_left_out"] == 2
    assert (values["phrases"]["positive_pairs"], values["phrases"]["negative_pairs"]) == (0, 4)
    assert values["at_threshold"]["missed"] == 0 and values["at_threshold"]["false"] == 1
    assert values["bbox"]["AP"] == -1, "neither the label of the cup counts nor the detection beside it"
    assert "2 pairs of an image and a phrase that are not labeled completely" in sink.summary()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"neg_category_ids": 2}, "neg_category_ids must be a list of category ids, got 2"),
        ({"neg_category_ids": [7, None, [1], True]}, "neg_category_ids names categories that do not exist: 7"),
        ({"not_exhaustive_category_ids": [2**70]}, "not_exhaustive_category_ids names categories that do not exist"),
        ({"neg_category_ids": [1]}, "neg_category_ids has 1 of the categories that are labeled"),
    ],
)
def test_lists_that_cannot_be_used_are_named(tmp_path, entry, message):
    file = CocoFile(write_truth(tmp_path, [entry], [(0, 1, 0, {})]))
    assert any(message in note.reason for note in file.notes), file.notes
    assert not file.known[0].decides(0) or "labeled" not in message


def test_pairs_of_sa_co_that_cannot_be_used_are_named(tmp_path):
    good = {"id": 1, "file_name": "a.png", "width": 9, "height": 9, "text_input": " a   dog "}
    bad = [{**good, "id": 2}, {**good, "id": 1, "text_input": "x"}, {**good, "id": 3, "text_input": ""}, None]
    bad += [{**good, "id": 4, "text_input": "y", "width": 10}]
    annotations = [{"id": 1, "image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]}, 5]
    path = tmp_path / "gold.json"
    path.write_text(json.dumps({"images": [good, *bad], "annotations": annotations, "categories": []}))
    file = CocoFile(path)
    assert file.vocabulary.classes[0] == "a dog" and len(file.images) == 1
    assert [note.file for note in file.notes[:5]] == ["pair 2", "pair 1", "pair 3", "pair None", "pair 4"]
    assert len(file.notes) == 7 and file.known[1].decides(0)


def test_cgf1_ranks_a_sweep_only_if_there_are_absent_phrases(tmp_path):
    truth = write_truth(tmp_path, [{}], [(0, 1, 0, {}), (0, 2, 0, {}), (0, 3, 0, {})])
    sink = run_sink(tmp_path, truth, [[("cup", 0, 0.9)]], metric="phrases.cgF1")
    with pytest.raises(ConfigError, match="no negative pairs"):
        sink.value()
    truth = write_truth(tmp_path, [{}, {}], [(0, 1, 0, {})], "other.json")
    sink = run_sink(tmp_path, truth, [[("cup", 0, 0.9)], []], metric="phrases.cgF1")
    assert sink.value() == pytest.approx(1, abs=1e-3)
    sink.metric = "phrases.false_per_negative_pair"
    with pytest.raises(ConfigError, match="lower is better"):
        sink.value()


def test_presence_of_a_model_counts_where_the_result_has_it(tmp_path):
    truth = write_truth(tmp_path, [{}], [(0, 1, 0, {})])
    vocabulary = Vocabulary.parse(WORDS)
    result = make_found("0.png", [("cup", 0, 0.9), ("dog", 0, 0.8)])
    result.raw.metadata["presence"] = {"dog": 0.1}
    sink = metrics_sink(tmp_path, vocabulary, truth)
    with sink:
        sink.write(result)
    bins = sink.values["calibration"]["presence"]["bins"]
    assert [(b["count"], round(b["score"], 3), b["rate"]) for b in bins] == [
        (1, 0.0, 0.0),
        (1, 0.1, 0.0),
        (1, 0.9, 1.0),
    ]
    assert sink.values["calibration"]["presence"]["error"] == pytest.approx(0.2 / 3)
    assert sink.values["calibration"]["detections"]["count"] == 2


def test_the_reliability_diagram_is_drawn(tmp_path):
    truth = write_truth(tmp_path, [{}], [(0, 1, 0, {})])
    sink = run_sink(tmp_path, truth, [[("cup", 0, 0.9)]])
    with Image.open(tmp_path / "calibration.png") as image:
        assert image.width > image.height > 300
    assert "calibration error 0.100 of detections" in sink.summary()


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1))
def test_the_calibration_error_is_that_of_its_definition(rows):
    scores, right = zip(*rows, strict=True)
    curve = measure_reliability(scores, right)
    assert 0 <= curve.error <= 1 and curve.count == len(rows) == sum(b.count for b in curve.bins)
    assert sum(b.count * b.rate for b in curve.bins) == pytest.approx(sum(right))
    assert sum(b.count * b.score for b in curve.bins) == pytest.approx(sum(scores))
    # The error of all scores in one bin is a lower bound.
    assert curve.error >= abs(np.mean(scores) - np.mean(right)) - 1e-9


def test_scores_drawn_from_their_own_probability_are_calibrated():
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    assert measure_reliability(scores, rng.random(20_000) < scores).error < 0.02
    assert measure_reliability(scores, rng.random(20_000) < scores**3).error > 0.15


# Videos


def read_toy(folder):
    """Return ground truth and tracks of SA-Co's toy example, and what its evaluator returned."""
    name = "toy_saco_veval_sav_test"
    parts = [json.loads((folder / f"{name}_{part}.json").read_text()) for part in ("pred", "eval_res")]
    return folder / f"{name}_gt.json", parts[0], parts[1]["dataset_results"]


def test_the_toy_example_of_sa_co_is_reproduced(tmp_path):
    pytest.importorskip("trackeval")
    folder = Path(os.environ.get("SAM3_REPOSITORY", "")) / "assets" / "veval" / "toy_gt_and_pred"
    if not folder.is_dir():
        pytest.skip("needs a copy of facebookresearch/sam3, named by SAM3_REPOSITORY")
    truth, tracks, expected = read_toy(folder)
    video = read_ground_truth(truth).videos["sav_000208"]
    names = {c["id"]: c["name"] for c in json.loads(truth.read_text())["categories"]}
    words = Vocabulary.parse(sorted(video.asked))
    tracks = [track for track in tracks if track["score"] >= 0.5]
    with metrics_sink(tmp_path, words, truth, errors=0) as sink:
        for number, key in enumerate(video.frames):
            rows = [(i, t) for i, t in enumerate(tracks) if t["segmentations"][number]]
            mask = np.array([decode(t["segmentations"][number]) for _, t in rows], bool).reshape(-1, *video.size_hw)
            found = [words.classes.index(names[t["category_id"]]) for _, t in rows]
            detections = sv.Detections(
                xyxy=masks_to_xyxy(mask),
                mask=mask,
                confidence=np.array([t["score"] for _, t in rows], np.float32),
                class_id=np.array(found, int),
                tracker_id=np.array([i for i, _ in rows], int),
                data={"class_name": np.array(words.classes)[found]},
            )
            frame = Frame(
                pixels=np.zeros((*video.size_hw, 3), np.uint8), name=f"{key:05d}.jpg", video=video.name, index=key
            )
            sink.write(FrameResult(frame=frame, detections=detections))
    phrases, tracking = sink.values["phrases"], sink.values["tracking"]
    for ours, theirs in (("", "_50_95"), ("_50", "_50"), ("_75", "_75")):
        for name, other in (("cgF1", "cgf1_micro"), ("pmF1", "positive_micro_f1")):
            assert phrases[name + ours] == pytest.approx(expected[f"video_mask_demo_{other}{theirs}"], abs=1e-6)
        for name in ("precision", "recall", "F1"):
            value = expected[f"video_mask_demo_{name.lower()}{theirs}"]
            assert phrases[name + ours] == pytest.approx(value, abs=1e-6)
    assert phrases["IL_MCC"] == pytest.approx(expected["video_mask_demo_ilmcc_50_95"], abs=1e-6)
    assert phrases["positive_macro_F1"] == pytest.approx(expected["video_mask_demo_pmf1_50_95"], abs=1e-6)
    for name in ("HOTA", "DetA", "AssA", "LocA"):
        assert tracking[name] == pytest.approx(expected[f"video_mask_all_phrase_{name}"], abs=1e-6), name


def decode(rle):
    return decode_segmentation(rle, tuple(rle["size"]))
