"""Tests of the metrics of images against other evaluators, through the stages of the command."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
from fakes import CLASSES, Halves, boxes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from grounded_sam import ConfigError, Pipeline, Select, Vocabulary
from grounded_sam.cli.main import measured_value
from grounded_sam.config.build import build, build_sinks, build_source
from grounded_sam.config.compose import compose
from grounded_sam.evaluation.coco_scores import STATS
from grounded_sam.evaluation.thresholds import best_threshold
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.pipeline.images import process_images
from grounded_sam.pipeline.runner import Runner
from grounded_sam.pipeline.select import select_detections
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.metrics import metrics_sink
from grounded_sam.sinks.voc import VocSink
from grounded_sam.sinks.yolo import YoloSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.request import Request
from grounded_sam.structures.results import FrameResult


def measure(results, ground_truth, output, *overrides):
    """Measure a file of results as the command does; return the content of metrics.json."""
    cfg = compose(["source=coco", f"input='{results}'", f"truth='{ground_truth}'", "sink=metrics", *overrides])
    source, model = build_source(cfg), build(cfg)
    request = Request.for_classes(source.vocabulary)
    Runner(model, source, build_sinks(cfg, output, source.vocabulary), output, request).run()
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="session")
def reference(data):
    return json.loads((data / "reference_numbers.json").read_text())


CASES = {
    "demo boxes": ("eval_coco/instances_val2014_fakebbox100_results.json", "eval_coco/instances_val2014_100.json"),
    "demo masks": ("eval_coco/instances_val2014_fakesegm100_results.json", "eval_coco/instances_val2014_100.json"),
    "nuts boxes": ("coco_nuts/results_perturbed_bbox.json", "coco_nuts/instances.json"),
    "nuts masks": ("coco_nuts/results_perturbed_segm.json", "coco_nuts/instances.json"),
    "nuts as boxes": ("coco_nuts/instances.json", "coco_nuts/instances.json"),
    "nuts as masks": ("coco_nuts/instances.json", "coco_nuts/instances.json"),
    "fce boxes": ("eval_coco/fce_dt_dataset.json", "eval_coco/fce_gt_dataset.json"),
    "fce masks": ("eval_coco/fce_dt_dataset.json", "eval_coco/fce_gt_dataset.json"),
    "fce ignore": ("eval_coco/fce_dt_ignore_test.json", "eval_coco/fce_gt_ignore_test.json"),
}
EXPECTED = {
    "demo boxes": ("bbox", "eval_coco", "bbox"),
    "demo masks": ("segm", "eval_coco", "segm"),
    "nuts boxes": ("bbox", "coco_nuts", "perturbed_bbox"),
    "nuts masks": ("segm", "coco_nuts", "perturbed_segm"),
    "nuts as boxes": ("bbox", "coco_nuts", "gt_as_bbox"),
    "nuts as masks": ("segm", "coco_nuts", "gt_as_segm"),
    "fce boxes": ("bbox", "eval_coco", "fce_gt_dataset_bbox"),
    "fce masks": ("segm", "eval_coco", "fce_gt_dataset_segm"),
    "fce ignore": ("bbox", "eval_coco", "fce_gt_ignore_test_bbox_min_score_0_1"),
}


@pytest.mark.parametrize("case", CASES)
def test_reference_numbers_are_reproduced(case, data, reference, tmp_path):
    results, ground_truth = (data / name for name in CASES[case])
    kind, group, key = EXPECTED[case]
    overrides = ["select.score=0.1"] if case == "fce ignore" else []
    values = measure(results, ground_truth, tmp_path, *overrides)
    expected = {k.removesuffix("_rounded"): v for k, v in reference[group][key].items() if k != "source"}
    assert {k: values[kind][k] for k in expected} == pytest.approx(expected, abs=1e-4)


def evaluate_with_pycocotools(ground_truth, results, kind, use_cats=1):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(ground_truth)
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.params.useCats = use_cats
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATS, evaluation.stats.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_pycocotools_computes_the_same_numbers(data, tmp_path, kind):
    ground_truth = data / "coco_nuts" / "instances.json"
    results = data / "coco_nuts" / f"results_perturbed_{kind}.json"
    values = measure(results, ground_truth, tmp_path)
    expected = evaluate_with_pycocotools(ground_truth, str(results), kind)
    assert {key: values[kind][key] for key in STATS} == pytest.approx(expected, abs=1e-6)
    any_class = evaluate_with_pycocotools(ground_truth, str(results), kind, use_cats=0)
    assert values[kind]["AR100_any_class"] == pytest.approx(any_class["AR100"], abs=1e-6)


def detect_halves(folder, masks=True):
    """Return results whose left half is an `a`, and the right half a `c`."""
    from fakes import Fill

    model = Pipeline(Halves(), Fill() if masks else None, vocabulary=CLASSES)
    return list(process_images(iter(ImageSource(folder)), CLASSES, model.stages))


@pytest.mark.parametrize("kind", [CocoSink, YoloSink, VocSink])
@pytest.mark.parametrize("masks", [True, False])
def test_a_dataset_measured_against_itself_is_perfect(folder, tmp_path, kind, masks):
    results = detect_halves(folder, masks)
    options = {} if kind is CocoSink else {"images": "copy"}
    with kind(tmp_path / "truth", CLASSES, **options) as sink:
        for result in results:
            sink.write(result)
    file = {CocoSink: "annotations.json", YoloSink: "yolo", VocSink: "voc"}[kind]
    # Pascal VOC has only the classes that occur.
    vocabulary = Vocabulary.parse(["a", "c"]) if kind is VocSink else CLASSES
    measured = results
    if kind is VocSink:
        measured = [
            FrameResult(
                frame=r.frame,
                detections=make_detections(
                    r.detections.xyxy, r.detections.confidence, [0, 1], vocabulary, r.frame.size_hw, r.detections.mask
                ),
            )
            for r in results
        ]
    with metrics_sink(tmp_path, vocabulary, tmp_path / "truth" / file) as sink:
        for result in measured:
            sink.write(result)
    assert ("segm" in sink.values) == masks
    assert sink.values["bbox"]["AP"] == pytest.approx(1.0) and sink.value() == pytest.approx(1.0)
    assert sink.values["at_threshold"]["f1"] == 1.0 and not sink.values["mistakes"]
    assert np.array_equal(np.diag(sink.values["confusion"]["counts"])[:-1] > 0, np.isin(vocabulary.classes, ["a", "c"]))
    assert not (tmp_path / "errors").exists()


def make_result(name, *rows, size_hw=(100, 100), file=None):
    """Make the result of a black image from rows of detections, see `fakes.boxes`."""
    frame = Frame(pixels=np.zeros((*size_hw, 3), np.uint8), name=name, file=file)
    return FrameResult(frame=frame, detections=boxes(*rows, size_hw=size_hw))


@pytest.fixture
def ground_truth(tmp_path):
    """Write labels of one image, two of `a` and one of `b`."""
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 30, "bbox": [0, 0, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 30, "bbox": [40, 40, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 10, "bbox": [70, 0, 20, 20], "area": 400, "iscrowd": 0},
    ]
    categories = [{"id": 10, "name": "b"}, {"id": 30, "name": "a"}, {"id": 40, "name": "c"}, {"id": 50, "name": "d"}]
    images = [{"id": 7, "file_name": "deep/x.png", "width": 100, "height": 100}]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_matches_and_mistakes_are_counted_and_drawn(ground_truth, tmp_path):
    # A match, a duplicate of it, one of the wrong class, and one without any label.
    rows = [(1, 0, 20, 20, 0.9, 0), (0, 0, 20, 19, 0.8, 0), (70, 0, 90, 20, 0.7, 0), (0, 70, 20, 90, 0.6, 2)]
    with metrics_sink(tmp_path, CLASSES, ground_truth) as sink:
        sink.write(make_result("x.png", *rows))
        sink.write(make_result("other.png"))
    values = json.loads((tmp_path / "metrics.json").read_text())
    assert values["at_threshold"] == pytest.approx(
        {"iou": 0.5, "matched": 1, "missed": 2, "false": 3, "precision": 0.25, "recall": 1 / 3, "f1": 2 / 7}
    )
    assert [(m["kind"], m["class"]) for m in values["mistakes"]] == [
        ("missed", "a"), ("missed", "b"), ("false", "a"), ("false", "a"), ("false", "c"),
    ]  # fmt: skip
    assert values["confusion"]["rows_truth_columns_found"] == ["a", "b", "c", "none"]
    assert values["confusion"]["counts"] == [[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
    assert values["classes"]["b"]["recall"] == 0 and values["classes"]["c"]["precision"] == 0
    assert values["not_asked_for"] == ["d"] and values["without_labels"] == ["other.png"]
    assert Image.open(tmp_path / "errors" / "x.png.jpg").size == (100, 100)
    assert "left out: 1 image without labels, 1 class that was not requested" in sink.summary()


@pytest.fixture
def ground_truth_with_crowd(ground_truth):
    """Make the second label of `a` a crowd."""
    content = json.loads(ground_truth.read_text())
    content["annotations"][1]["iscrowd"] = 1
    ground_truth.write_text(json.dumps(content))
    return ground_truth


def test_a_crowd_is_neither_missed_nor_false(ground_truth_with_crowd, tmp_path):
    rows = [(0, 0, 20, 20, 0.9, 0), (70, 0, 90, 20, 0.7, 1), (42, 42, 50, 50, 0.6, 0)]
    with metrics_sink(tmp_path, CLASSES, ground_truth_with_crowd) as sink:
        sink.write(make_result("deep/x.png", *rows))
    assert sink.values["at_threshold"]["f1"] == 1.0
    assert sink.values["bbox"]["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "cat"], r"has no class 'cat'; its classes are 'b', 'a', 'c', 'd'; the run requested 'a', 'cat'"),
    ],
)
def test_a_class_without_labels_is_refused_with_the_classes_of_both(ground_truth, tmp_path, classes, message):
    with pytest.raises(ConfigError, match=message):
        metrics_sink(tmp_path, Vocabulary.parse(classes), ground_truth)


def test_images_without_labels_are_refused_with_the_names_of_both(ground_truth, tmp_path):
    with (
        pytest.raises(
            ConfigError, match=r"no labels for 1 image in .*; it has labels for deep/x.png.*the run processed y.png"
        ),
        metrics_sink(tmp_path, CLASSES, ground_truth) as sink,
    ):
        sink.write(make_result("y.png"))


def test_labels_of_another_size_are_refused(ground_truth, tmp_path):
    with pytest.raises(ConfigError, match=r"x.png has 50x40 px, but 100x100 px in"):
        metrics_sink(tmp_path, CLASSES, ground_truth).write(make_result("x.png", size_hw=(40, 50)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.json", "truth=.*nothing.json: no such"),
        ("README.md", "README.md: expected a COCO file"),
        ("videos/bedroom_frames", "no labels in .*bedroom_frames: expected a YOLO dataset"),
        ("malformed/frames_empty", "no labels in .*frames_empty: expected a YOLO dataset"),
    ],
)
def test_files_that_are_not_labels_are_refused(data, name, message):
    with pytest.raises(ConfigError, match=message):
        read_ground_truth(data / name)


def test_a_sweep_gets_the_chosen_metric(ground_truth, tmp_path):
    with metrics_sink(tmp_path, CLASSES, ground_truth, metric="at_threshold.recall") as sink:
        sink.write(make_result("x.png", (0, 0, 20, 20, 0.9, 0)))
    assert measured_value([sink]) == pytest.approx(1 / 3)
    sink.metric = "segm.AP"
    with pytest.raises(ConfigError, match=r"no metric segm.AP; choose one of bbox.AP, .*at_threshold.f1"):
        sink.value()
    assert measured_value([]) is None


DETECTIONS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.booleans()), min_size=1, max_size=25)


@given(DETECTIONS, st.integers(0, 10), st.sampled_from([None, 0.5, 0.9]))
def test_the_best_threshold_is_the_best_of_all_candidates(rows, missed, precision):
    image, score, is_match = (np.array(column) for column in zip(*rows, strict=True))
    score = score / 10
    label_counts = np.bincount(image, weights=is_match, minlength=5).astype(int)
    label_counts[0] += missed
    best = best_threshold(image, score, is_match, label_counts, precision)
    total, candidates = label_counts.sum(), {}
    for threshold in np.unique(score):
        selected = score >= threshold
        matched, kept = is_match[selected].sum(), selected.sum()
        if precision is None or matched / kept >= precision:
            candidates[threshold] = 2 * matched / (kept + total) if precision is None else matched / max(total, 1)
    if not total or not candidates:
        assert best is None
        return
    selected = score >= best.score
    assert (best.f1 if precision is None else best.recall) == pytest.approx(max(candidates.values()))
    assert best.precision == pytest.approx(is_match[selected].sum() / selected.sum())
    assert best.recall == pytest.approx(is_match[selected].sum() / total)
    assert best.interval[0] <= best.interval[1]


def test_the_interval_narrows_with_more_images():
    rng = np.random.default_rng(0)

    def width(images):
        image = np.repeat(np.arange(images), 4)
        is_match = rng.random(len(image)) < 0.5
        score = np.clip(np.where(is_match, 0.6, 0.4) + rng.normal(0, 0.1, len(image)), 0, 1)
        label_counts = np.bincount(image, weights=is_match).astype(int)
        low, high = best_threshold(image, score, is_match, label_counts).interval
        return high - low

    assert width(1000) < width(30)


def test_best_thresholds_are_written_as_an_ontology(ground_truth, tmp_path):
    vocabulary = Vocabulary.parse({"classes": {"a": {"phrases": ["aa"], "id": 5}, "b": {"id": 6, "score": 0.9}}}, ["z"])
    rows = [(0, 0, 20, 20, 0.9, 0), (40, 40, 60, 60, 0.6, 0), (0, 70, 20, 90, 0.3, 0)]
    with metrics_sink(tmp_path, vocabulary, ground_truth) as sink:
        sink.write(make_result("x.png", *rows))
    tuned = Vocabulary.parse(str(tmp_path / "classes.yaml"))
    assert tuned.class_score == {"a": pytest.approx(0.45), "b": 0.9} and tuned.negatives == ("z",)
    assert tuned.phrases == vocabulary.phrases and tuned.ids == vocabulary.ids
    detections = select_detections(boxes(*rows), Select(score=0.05), tuned)
    assert detections.confidence.tolist() == pytest.approx([0.9, 0.6])
    values = json.loads((tmp_path / "metrics.json").read_text())["thresholds"]
    assert values["a"]["f1"] == 1.0 and values["b"] is None
    with pytest.raises(ConfigError, match="sink.metrics.precision"):
        metrics_sink(tmp_path, vocabulary, ground_truth, precision=2)


def test_a_missing_extra_says_what_to_install(ground_truth, tmp_path, monkeypatch):
    monkeypatch.setattr("grounded_sam.evaluation.image_metrics.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'grounded_sam\[metrics\]'"):
        metrics_sink(tmp_path, CLASSES, ground_truth)


def test_boxes_are_used_if_some_labels_have_no_mask(ground_truth, tmp_path):
    """As in Pascal VOC: leaving out the labels without masks would make the numbers wrong."""
    content = json.loads(ground_truth.read_text())
    content["annotations"][0]["segmentation"] = [[0, 0, 20, 0, 20, 20, 0, 20]]
    del content["annotations"][2]["bbox"]  # unusable without a box and a mask
    ground_truth.write_text(json.dumps(content))
    with metrics_sink(tmp_path, CLASSES, ground_truth) as sink:
        sink.write(make_result("x.png", (0, 0, 20, 20, 0.9, 0), (40, 40, 60, 60, 0.8, 0)))
    assert sink.values["at_threshold"]["matched"] == 2 and sink.values["at_threshold"]["missed"] == 0
    assert "segm" not in sink.values and "2 labels with problems" in sink.summary()
    assert "only boxes are used" in sink.values["labels_left_out"][0]["reason"]


def test_images_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    for part, row in (("train", (0, 0, 20, 20, 1.0, 0)), ("val", (20, 20, 40, 40, 1.0, 0))):
        (tmp_path / "yolo" / "images" / part).mkdir(parents=True)
        (tmp_path / "yolo" / "labels" / part).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "yolo" / "images" / part / "0.png")
        x1, y1, x2, y2 = (v / 40 for v in row[:4])
        line = f"0 {(x1 + x2) / 2} {(y1 + y2) / 2} {x2 - x1} {y2 - y1}\n"
        (tmp_path / "yolo" / "labels" / part / "0.txt").write_text(line)
    (tmp_path / "yolo" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b, c]\n")
    for part, row in (("train", (0, 0, 20, 20, 1.0, 0)), ("val", (20, 20, 40, 40, 1.0, 0))):
        with metrics_sink(tmp_path, CLASSES, tmp_path / "yolo") as sink:
            file = tmp_path / "yolo" / "images" / part / "0.png"
            sink.write(make_result("0.png", row, size_hw=(40, 40), file=file))
        assert sink.values["at_threshold"]["f1"] == 1.0
    with (
        pytest.raises(ConfigError, match=r"no labels for 1 image"),
        metrics_sink(tmp_path, CLASSES, tmp_path / "yolo") as sink,
    ):
        sink.write(make_result("0.png", size_hw=(40, 40)))  # it could be of either split


@pytest.mark.parametrize("start", ["./", "", "absolute", "../lists/../images/"])
def test_splits_of_yolo_may_be_lists_of_images(tmp_path, start):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "lists").mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 40)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    prefix = {"absolute": f"{tmp_path}/images/", "./": "./images/", "": "images/"}.get(start, start)
    listing = "lists/train.txt" if start.startswith("..") else "train.txt"
    (tmp_path / listing).write_text(f"{prefix}a.png\n{prefix}b.png\n")
    (tmp_path / "val.txt").write_text("images/b.png\n")
    (tmp_path / "data.yaml").write_text(f"path: .\ntrain: {listing}\nval: val.txt\nnames: [a, b, c]\n")
    truth = read_ground_truth(tmp_path / "data.yaml")
    assert [image["file_name"] for image in truth.images] == ["images/a.png", "images/b.png"]
    assert all(len(truth.annotations(image["id"])) == 1 for image in truth.images)
    (tmp_path / "val.txt").unlink()
    with pytest.raises(ConfigError, match=r"there is no file .*val.txt; correct or remove val.txt there"):
        read_ground_truth(tmp_path / "data.yaml")


def test_two_images_cannot_have_the_same_labels(ground_truth, tmp_path):
    sink = metrics_sink(tmp_path, CLASSES, ground_truth)
    sink.write(make_result("a/x.png"))
    with pytest.raises(ConfigError, match=r"a/x.png and b/x.png both match deep/x.png"):
        sink.write(make_result("b/x.png"))


def test_a_detection_that_only_touches_a_crowd_is_false(ground_truth_with_crowd, tmp_path):
    rows = [(0, 0, 20, 20, 0.9, 0), (70, 0, 90, 20, 0.7, 1), (58, 58, 90, 90, 0.6, 0)]
    with metrics_sink(tmp_path, CLASSES, ground_truth_with_crowd) as sink:
        sink.write(make_result("deep/x.png", *rows))
    assert sink.values["at_threshold"]["false"] == 1


def test_class_names_with_markup_and_ids_that_are_strings(tmp_path):
    """Also labels without boxes."""
    vocabulary = Vocabulary.parse(["red [/a]"])
    images = [{"id": "im0", "file_name": "x.png", "width": 40, "height": 40}]
    labels = [{"id": 1, "image_id": "im0", "category_id": 1, "segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]]}]
    content = {"images": images, "annotations": labels, "categories": [{"id": 1, "name": "red [/a]"}]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    detections = make_detections([[0, 0, 20, 20]], [0.9], [0], vocabulary, (40, 40))
    detections.mask = np.zeros((1, 40, 40), bool)
    detections.mask[0, :20, :20] = True
    with metrics_sink(tmp_path, vocabulary, tmp_path / "truth.json") as sink:
        sink.write(
            FrameResult(
                frame=Frame(pixels=np.zeros((40, 40, 3), np.uint8), index=0, name="x.png"), detections=detections
            )
        )
    assert sink.value() == pytest.approx(1.0) and "red [/a]" in sink.summary()
    sink.metric = "classes.red [/a].segm.AP"
    assert sink.value() == pytest.approx(1.0)
    sink.metric = "at_threshold.missed"
    with pytest.raises(ConfigError, match="lower is better"):
        sink.value()


@pytest.mark.parametrize(
    ("data_yaml", "label", "message"),
    [
        ("names: {a: b\n", "", "data.yaml is not valid YAML"),
        ("names:\ntrain: images\n", "", "expected names and train"),
        ("names: [a]\ntrain: images\n", "a 0.5 0.5 0.1 0.1", r"0.txt, line 1: expected a class and a box"),
        ("names: [a]\ntrain: images\n", "0 0.5 0.5 0.1 0.1 0.9", r"0.txt, line 1: expected a class and a box"),
    ],
)
def test_damaged_yolo_labels_are_named(data_yaml, label, message, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "0.png")
    (tmp_path / "labels" / "0.txt").write_text(label)
    (tmp_path / "data.yaml").write_text(data_yaml)
    with pytest.raises(ConfigError, match=message):
        read_ground_truth(tmp_path)


@pytest.mark.parametrize("is_sweep", [False, True])
def test_images_of_mistakes_are_not_drawn_in_a_sweep(ground_truth, tmp_path, monkeypatch, is_sweep):
    monkeypatch.setattr("grounded_sam.sinks.metrics.in_sweep", lambda: is_sweep)
    with metrics_sink(tmp_path, CLASSES, ground_truth) as sink:
        sink.write(make_result("x.png"))  # misses all labels
    assert (tmp_path / "errors").exists() != is_sweep
