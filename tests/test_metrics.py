"""Measured values against those of other people's evaluators, through the command's own stages."""

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
from grounded_sam.cli.main import measured
from grounded_sam.config.build import build, build_sinks, build_source
from grounded_sam.config.compose import compose
from grounded_sam.evaluation.image_metrics import STATS
from grounded_sam.evaluation.thresholds import best_threshold
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.pipeline.select import select
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.metrics import metrics_sink
from grounded_sam.sinks.voc import VocSink
from grounded_sam.sinks.yolo import YoloSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult


def measure(results, truth, output, *more):
    """The command on a file of results; returns what it measured."""
    cfg = compose(["source=coco", f"input='{results}'", f"truth='{truth}'", "sink=metrics", *more])
    source, model = build_source(cfg), build(cfg)
    model.run(source, build_sinks(cfg, output, source.vocabulary), output, source.vocabulary)
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
def test_the_reference_numbers_are_met(case, data, reference, tmp_path):
    results, truth = (data / name for name in CASES[case])
    kind, group, key = EXPECTED[case]
    more = ["select.score=0.1"] if case == "fce ignore" else []
    values = measure(results, truth, tmp_path, *more)
    expected = {k.removesuffix("_rounded"): v for k, v in reference[group][key].items() if k != "source"}
    assert {k: values[kind][k] for k in expected} == pytest.approx(expected, abs=1e-4)


def by_pycocotools(truth, results, kind, use_cats=1):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        run = COCOeval(coco, coco.loadRes(results), kind)
        run.params.useCats = use_cats
        run.evaluate()
        run.accumulate()
        run.summarize()
    return dict(zip(STATS, run.stats.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_pycocotools_measures_the_same_of_a_run(data, tmp_path, kind):
    truth = data / "coco_nuts" / "instances.json"
    results = data / "coco_nuts" / f"results_perturbed_{kind}.json"
    values = measure(results, truth, tmp_path)
    same = by_pycocotools(truth, str(results), kind)
    assert {key: values[kind][key] for key in STATS} == pytest.approx(same, abs=1e-6)
    any_class = by_pycocotools(truth, str(results), kind, use_cats=0)
    assert values[kind]["AR100_any_class"] == pytest.approx(any_class["AR100"], abs=1e-6)


def halves(folder, masks=True):
    """Scenes labelled by hand: the left half `a`, the right half `c`."""
    from fakes import Fill

    model = Pipeline(Halves(), Fill() if masks else None, vocabulary=CLASSES)
    return model, list(model.stream(iter(ImageSource(folder)), CLASSES))


@pytest.mark.parametrize("kind", [CocoSink, YoloSink, VocSink])
@pytest.mark.parametrize("masks", [True, False])
def test_a_dataset_measured_against_itself_is_perfect(folder, tmp_path, kind, masks):
    _, results = halves(folder, masks)
    options = {} if kind is CocoSink else {"images": "copy"}
    with kind(tmp_path / "truth", CLASSES, **options) as sink:
        for result in results:
            sink.write(result)
    place = {CocoSink: "annotations.json", YoloSink: "yolo", VocSink: "voc"}[kind]
    words = Vocabulary.parse(["a", "c"]) if kind is VocSink else CLASSES  # VOC names only classes that occur
    found = results
    if kind is VocSink:
        found = [
            FrameResult(
                r.frame,
                make_detections(
                    r.detections.xyxy, r.detections.confidence, [0, 1], words, r.frame.size_hw, r.detections.mask
                ),
            )
            for r in results
        ]
    with metrics_sink(tmp_path, words, tmp_path / "truth" / place) as sink:
        for result in found:
            sink.write(result)
    assert ("segm" in sink.values) == masks
    assert sink.values["bbox"]["AP"] == pytest.approx(1.0) and sink.value() == pytest.approx(1.0)
    assert sink.values["at_threshold"]["f1"] == 1.0 and not sink.values["mistakes"]
    assert np.array_equal(np.diag(sink.values["confusion"]["counts"])[:-1] > 0, np.isin(words.classes, ["a", "c"]))
    assert not (tmp_path / "errors").exists()


@pytest.fixture
def truth(tmp_path):
    """One image with two labels of `a` and one of `b`."""
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


def test_matched_missed_and_false_are_listed_with_their_pictures(truth, tmp_path):
    # One hit, a second one on the same label, one of the wrong class, one on nothing.
    rows = [(1, 0, 20, 20, 0.9, 0), (0, 0, 20, 19, 0.8, 0), (70, 0, 90, 20, 0.7, 0), (0, 70, 20, 90, 0.6, 2)]
    frame = Frame(np.full((100, 100, 3), 200, np.uint8), 0, "x.png")
    with metrics_sink(tmp_path, CLASSES, truth) as sink:
        sink.write(FrameResult(frame, boxes(*rows)))
        sink.write(FrameResult(Frame(frame.pixels, 1, "other.png"), boxes()))
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
    assert "1 images without labels, 1 classes of the truth not asked for" in sink.summary()


def test_a_crowd_is_neither_missed_nor_false(truth, tmp_path):
    content = json.loads(truth.read_text())
    content["annotations"][1]["iscrowd"] = 1
    truth.write_text(json.dumps(content))
    rows = [(0, 0, 20, 20, 0.9, 0), (70, 0, 90, 20, 0.7, 1), (42, 42, 50, 50, 0.6, 0)]
    with metrics_sink(tmp_path, CLASSES, truth) as sink:
        sink.write(FrameResult(Frame(np.zeros((100, 100, 3), np.uint8), 0, "deep/x.png"), boxes(*rows)))
    assert sink.values["at_threshold"]["f1"] == 1.0
    assert sink.values["bbox"]["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a", "cat"], r"has no 'cat'; it has the classes 'b', 'a', 'c', 'd', asked for are 'a', 'cat'"),
    ],
)
def test_classes_that_the_truth_has_not_are_named_with_both_sides(truth, tmp_path, words, says):
    with pytest.raises(ConfigError, match=says):
        metrics_sink(tmp_path, Vocabulary.parse(words), truth)


def test_images_that_nothing_is_known_of_are_named_with_both_sides(truth, tmp_path):
    with (
        pytest.raises(ConfigError, match=r"none of 1 images has labels in .*; it has deep/x.png.*looked at were y.png"),
        metrics_sink(tmp_path, CLASSES, truth) as sink,
    ):
        sink.write(FrameResult(Frame(np.zeros((100, 100, 3), np.uint8), 0, "y.png"), boxes()))


def test_a_truth_of_another_size_is_refused(truth, tmp_path):
    with pytest.raises(ConfigError, match=r"x.png has 50x40 px, but 100x100 px in"):
        metrics_sink(tmp_path, CLASSES, truth).write(
            FrameResult(Frame(np.zeros((40, 50, 3), np.uint8), 0, "x.png"), boxes(size_hw=(40, 50)))
        )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing.json", "truth=.*nothing.json: no such"),
        ("README.md", "README.md: expected a COCO file"),
        ("videos/bedroom_frames", "no labels in .*bedroom_frames: expected a YOLO dataset"),
        ("malformed/frames_empty", "no labels in .*frames_empty: expected a YOLO dataset"),
    ],
)
def test_what_is_no_truth_is_refused_in_words(data, name, says):
    with pytest.raises(ConfigError, match=says):
        read_ground_truth(data / name)


def test_the_chosen_metric_is_what_a_sweep_gets(truth, tmp_path):
    with metrics_sink(tmp_path, CLASSES, truth, metric="at_threshold.recall") as sink:
        sink.write(FrameResult(Frame(np.zeros((100, 100, 3), np.uint8), 0, "x.png"), boxes((0, 0, 20, 20, 0.9, 0))))
    assert measured([sink]) == pytest.approx(1 / 3)
    sink.metric = "segm.AP"
    with pytest.raises(ConfigError, match=r"no metric segm.AP; there are bbox.AP, .*at_threshold.f1"):
        sink.value()
    assert measured([]) is None


DETECTIONS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.booleans()), min_size=1, max_size=25)


@given(DETECTIONS, st.integers(0, 10), st.sampled_from([None, 0.5, 0.9]))
def test_the_best_threshold_is_the_best_of_all(rows, missed, wanted):
    image, score, right = (np.array(column) for column in zip(*rows, strict=True))
    score = score / 10
    labels = np.bincount(image, weights=right, minlength=5).astype(int)
    labels[0] += missed
    best = best_threshold(image, score, right, labels, wanted)
    total, options = labels.sum(), {}
    for least in np.unique(score):
        kept = score >= least
        good, found = right[kept].sum(), kept.sum()
        if wanted is None or good / found >= wanted:
            options[least] = 2 * good / (found + total) if wanted is None else good / max(total, 1)
    if not total or not options:
        assert best is None
        return
    kept = score >= best.score
    assert (best.f1 if wanted is None else best.recall) == pytest.approx(max(options.values()))
    assert best.precision == pytest.approx(right[kept].sum() / kept.sum())
    assert best.recall == pytest.approx(right[kept].sum() / total)
    assert best.interval[0] <= best.interval[1]


def test_an_interval_narrows_with_more_images():
    rng = np.random.default_rng(0)

    def width(images):
        image = np.repeat(np.arange(images), 4)
        right = rng.random(len(image)) < 0.5
        score = np.clip(np.where(right, 0.6, 0.4) + rng.normal(0, 0.1, len(image)), 0, 1)
        low, high = best_threshold(image, score, right, np.bincount(image, weights=right).astype(int)).interval
        return high - low

    assert width(1000) < width(30)


def test_thresholds_are_an_ontology_that_a_run_can_use(truth, tmp_path):
    words = Vocabulary.parse({"classes": {"a": {"phrases": ["aa"], "id": 5}, "b": {"id": 6, "score": 0.9}}}, ["z"])
    rows = [(0, 0, 20, 20, 0.9, 0), (40, 40, 60, 60, 0.6, 0), (0, 70, 20, 90, 0.3, 0)]
    with metrics_sink(tmp_path, words, truth) as sink:
        sink.write(FrameResult(Frame(np.zeros((100, 100, 3), np.uint8), 0, "x.png"), boxes(*rows)))
    tuned = Vocabulary.parse(str(tmp_path / "classes.yaml"))
    assert tuned.class_score == {"a": pytest.approx(0.45), "b": 0.9} and tuned.negatives == ("z",)
    assert tuned.phrases == words.phrases and tuned.ids == words.ids
    found = select(boxes(*rows), Select(score=0.05), tuned)
    assert found.confidence.tolist() == pytest.approx([0.9, 0.6])
    values = json.loads((tmp_path / "metrics.json").read_text())["thresholds"]
    assert values["a"]["f1"] == 1.0 and values["b"] is None
    with pytest.raises(ConfigError, match="sink.metrics.precision"):
        metrics_sink(tmp_path, words, truth, precision=2)


def test_without_its_extra_it_says_what_to_install(truth, tmp_path, monkeypatch):
    monkeypatch.setattr("grounded_sam.evaluation.image_metrics.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'grounded_sam\[metrics\]'"):
        metrics_sink(tmp_path, CLASSES, truth)


def test_labels_without_masks_count_as_boxes(truth, tmp_path):
    """Labels of which only some have masks, as in VOC: dropping the others would make the numbers wrong."""
    content = json.loads(truth.read_text())
    content["annotations"][0]["segmentation"] = [[0, 0, 20, 0, 20, 20, 0, 20]]
    del content["annotations"][2]["bbox"]  # no box and no mask: of no use
    truth.write_text(json.dumps(content))
    frame = Frame(np.full((100, 100, 3), 200, np.uint8), 0, "x.png")
    with metrics_sink(tmp_path, CLASSES, truth) as sink:
        sink.write(FrameResult(frame, boxes((0, 0, 20, 20, 0.9, 0), (40, 40, 60, 60, 0.8, 0))))
    assert sink.values["at_threshold"]["matched"] == 2 and sink.values["at_threshold"]["missed"] == 0
    assert "segm" not in sink.values and "2 labels that are not sound" in sink.summary()
    assert "boxes alone are used" in sink.values["labels_left_out"][0]["reason"]


def test_pictures_of_one_name_are_told_apart_by_their_folders(tmp_path):
    frame = Frame(np.zeros((40, 40, 3), np.uint8), 0, "0.png")
    for part, row in (("train", (0, 0, 20, 20, 1.0, 0)), ("val", (20, 20, 40, 40, 1.0, 0))):
        (tmp_path / "yolo" / "images" / part).mkdir(parents=True)
        (tmp_path / "yolo" / "labels" / part).mkdir(parents=True)
        Image.fromarray(frame.image).save(tmp_path / "yolo" / "images" / part / "0.png")
        x1, y1, x2, y2 = (v / 40 for v in row[:4])
        line = f"0 {(x1 + x2) / 2} {(y1 + y2) / 2} {x2 - x1} {y2 - y1}\n"
        (tmp_path / "yolo" / "labels" / part / "0.txt").write_text(line)
    (tmp_path / "yolo" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b, c]\n")
    for part, row in (("train", (0, 0, 20, 20, 1.0, 0)), ("val", (20, 20, 40, 40, 1.0, 0))):
        with metrics_sink(tmp_path, CLASSES, tmp_path / "yolo") as sink:
            file = tmp_path / "yolo" / "images" / part / "0.png"
            sink.write(FrameResult(Frame(frame.pixels, 0, "0.png", file=file), boxes(row, size_hw=(40, 40))))
        assert sink.values["at_threshold"]["f1"] == 1.0
    with (
        pytest.raises(ConfigError, match=r"none of 1 images has labels"),
        metrics_sink(tmp_path, CLASSES, tmp_path / "yolo") as sink,
    ):
        sink.write(FrameResult(frame, boxes()))  # of which part is not known


def test_two_pictures_are_not_measured_against_one_label(truth, tmp_path):
    pixels = np.zeros((100, 100, 3), np.uint8)
    sink = metrics_sink(tmp_path, CLASSES, truth)
    sink.write(FrameResult(Frame(pixels, 0, "a/x.png"), boxes()))
    with pytest.raises(ConfigError, match=r"a/x.png and b/x.png would both be measured against deep/x.png"):
        sink.write(FrameResult(Frame(pixels, 1, "b/x.png"), boxes()))


def test_what_touches_a_crowd_is_not_excused(truth, tmp_path):
    content = json.loads(truth.read_text())
    content["annotations"][1]["iscrowd"] = 1
    truth.write_text(json.dumps(content))
    rows = [(0, 0, 20, 20, 0.9, 0), (70, 0, 90, 20, 0.7, 1), (58, 58, 90, 90, 0.6, 0)]
    with metrics_sink(tmp_path, CLASSES, truth) as sink:
        sink.write(FrameResult(Frame(np.zeros((100, 100, 3), np.uint8), 0, "deep/x.png"), boxes(*rows)))
    assert sink.values["at_threshold"]["false"] == 1


def test_classes_and_labels_of_any_name_and_id(tmp_path):
    """Markup of the terminal in a class, ids that are words, labels without boxes."""
    words = Vocabulary.parse(["red [/a]"])
    images = [{"id": "im0", "file_name": "x.png", "width": 40, "height": 40}]
    labels = [{"id": 1, "image_id": "im0", "category_id": 1, "segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]]}]
    content = {"images": images, "annotations": labels, "categories": [{"id": 1, "name": "red [/a]"}]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    found = make_detections([[0, 0, 20, 20]], [0.9], [0], words, (40, 40))
    found.mask = np.zeros((1, 40, 40), bool)
    found.mask[0, :20, :20] = True
    with metrics_sink(tmp_path, words, tmp_path / "truth.json") as sink:
        sink.write(FrameResult(Frame(np.zeros((40, 40, 3), np.uint8), 0, "x.png"), found))
    assert sink.value() == pytest.approx(1.0) and "red [/a]" in sink.summary()
    sink.metric = "classes.red [/a].segm.AP"
    assert sink.value() == pytest.approx(1.0)
    sink.metric = "at_threshold.missed"
    with pytest.raises(ConfigError, match="less is better"):
        sink.value()


@pytest.mark.parametrize(
    ("about", "line", "says"),
    [
        ("names: {a: b\n", "", "expected names and train"),
        ("names:\ntrain: images\n", "", "expected names and train"),
        ("names: [a]\ntrain: images\n", "a 0.5 0.5 0.1 0.1", r"0.txt, line 1: expected a class and a box"),
        ("names: [a]\ntrain: images\n", "0 0.5 0.5 0.1 0.1 0.9", r"0.txt, line 1: expected a class and a box"),
    ],
)
def test_damaged_yolo_labels_are_named(about, line, says, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "0.png")
    (tmp_path / "labels" / "0.txt").write_text(line)
    (tmp_path / "data.yaml").write_text(about)
    with pytest.raises(ConfigError, match=says):
        read_ground_truth(tmp_path)
