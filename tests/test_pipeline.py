from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import supervision as sv
from fakes import CLASSES, Fill, Halves
from PIL import Image

from grounded_sam import ConfigError, GroundedSamError, ImageError, Pipeline, Select, load
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sources.images import ImageSource


def test_stages_run_in_order_and_results_are_detections(folder):
    model = Pipeline(Halves(), Fill())
    found = model.segment(folder / "0.png", ["left", "right"])
    assert isinstance(found, sv.Detections)
    assert found.data["class_name"].tolist() == ["left", "right"]
    assert found.mask.sum((1, 2)).tolist() == [200 * 130, 200 * 130]
    assert found.confidence.dtype == np.float32 and found.class_id.dtype == np.int64 and found.mask.dtype == bool


def test_every_way_to_hand_in_an_image(folder):
    model = Pipeline(Halves(), Fill(), vocabulary=CLASSES)
    path = folder / "0.png"
    array = np.asarray(Image.open(path))
    one, two, three = (model.segment(image) for image in (path, Image.open(path), array))
    assert one == two == three
    several = model.segment([path, array, str(path)])
    assert several == [one, one, one]
    assert model.segment([]) == []


def test_detect_gives_boxes_without_masks():
    assert Pipeline(Halves(), Fill()).detect(np.zeros((10, 10, 3), np.uint8), "a").mask is None


def test_frames_go_to_the_detector_in_batches():
    detector = Halves(batch_size=3)
    Pipeline(detector).detect([np.zeros((8, 8, 3), np.uint8)] * 7, "a")
    assert detector.calls == [3, 3, 1]


def test_text_is_asked_for_if_nobody_has_it():
    with pytest.raises(ConfigError, match="text is missing"):
        Pipeline(Halves()).detect(np.zeros((8, 8, 3), np.uint8))


class Broken:
    def __init__(self, **wrong):
        self.wrong = wrong

    def detect(self, frames, vocabulary):
        fields = {"xyxy": np.array([[0, 0, 5, 5.0]]), "confidence": np.array([0.5]), "class_id": np.array([0])}
        return [sv.Detections(**{**fields, **self.wrong})]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"class_id": np.array([7])}, r"Broken: expected class_id from 0 to 0, got \[7\]"),
        ({"confidence": None}, "expected confidence of shape"),
        ({"mask": np.zeros((1, 3, 3), bool)}, r"expected masks of shape \(1, 8, 8\), got \(1, 3, 3\)"),
        ({"xyxy": np.array([[0, 0, 50, 5.0]])}, "expected boxes inside the 8x8 px image"),
    ],
)
def test_a_stage_that_breaks_the_rules_is_named(wrong, says):
    with pytest.raises(GroundedSamError, match=says):
        Pipeline(Broken(**wrong)).detect(np.zeros((8, 8, 3), np.uint8), "a")


def test_a_detector_with_masks_needs_no_segmenter():
    mask = np.ones((1, 8, 8), bool)
    never = object()
    found = Pipeline(Broken(mask=mask), never, Select(score=0)).segment(np.zeros((8, 8, 3), np.uint8), "a")
    assert found.mask.all()


def test_a_run_over_a_folder_counts_skips_and_reports(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"no picture")
    model = Pipeline(Halves(), Fill(), Select(score=0.5), CLASSES)
    summary = model.run(ImageSource(folder), [CocoSink(tmp_path, CLASSES)], tmp_path, CLASSES)
    assert (summary.images, summary.empty, dict(summary.objects)) == (4, 0, {"a": 4})
    assert [s.file for s in summary.skipped] == ["bad.png"]
    assert json.loads((tmp_path / "skipped.json").read_text())[0]["file"] == "bad.png"


def test_if_every_picture_is_bad_the_run_fails(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    out = tmp_path / "out"
    with pytest.raises(ImageError, match="none of 3 pictures could be used"):
        Pipeline(Halves(), None, None, CLASSES).run(ImageSource(tmp_path), [], out, CLASSES)
    assert len(json.loads((out / "skipped.json").read_text())) == 3


def test_an_interruption_keeps_what_was_written(folder, tmp_path):
    class Impatient(Halves):
        def detect(self, frames, vocabulary):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().detect(frames, vocabulary)

    model = Pipeline(Impatient(), Fill(), None, CLASSES)
    summary = model.run(ImageSource(folder), [CocoSink(tmp_path, CLASSES)], tmp_path, CLASSES)
    assert summary.interrupted and summary.images == 2
    assert len(json.loads((tmp_path / "annotations.json").read_text())["images"]) == 2


def test_importing_is_light():
    code = (
        "import sys, grounded_sam; grounded_sam.Vocabulary.parse('cat');"
        "print([m for m in ('torch', 'sam2', 'hydra', 'transformers', 'supervision') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    code = "import sys; from grounded_sam import load, Pipeline, Select, read_image; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_the_embedded_models_find_what_is_there(shapes, scenes):
    right = 0
    for scene in scenes:
        names = list(dict.fromkeys(f"{c} {s}" for c, s in scene.pairs))
        found = shapes.segment(scene.image, names)
        assert found.mask.shape == (len(found), *scene.image.shape[:2])
        for (colour, shape), truth in zip(scene.pairs, scene.masks, strict=True):
            named = found[found.data["class_name"] == f"{colour} {shape}"]
            right += any((m & truth).sum() / (m | truth).sum() > 0.6 for m in named.mask)
    assert right >= 0.6 * sum(len(scene.pairs) for scene in scenes)


def test_load_takes_the_words_of_the_command_line():
    model = load("select.score=0.42", preset="shapes", segmenter="none", text=["red circle"])
    assert model.segmenter is None
    assert model.settings.score == 0.42
    assert model.vocabulary.classes == ("red circle",)
