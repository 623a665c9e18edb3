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
from grounded_sam.pipeline.runner import Runner
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sources.images import ImageSource


def test_stages_run_in_order_and_results_are_detections(folder):
    model = Pipeline(Halves(), Fill())
    detections = model.segment(folder / "0.png", ["left", "right"])
    assert isinstance(detections, sv.Detections)
    assert detections.data["class_name"].tolist() == ["left", "right"]
    assert detections.mask.sum((1, 2)).tolist() == [200 * 130, 200 * 130]
    assert (
        detections.confidence.dtype == np.float32
        and detections.class_id.dtype == np.int64
        and detections.mask.dtype == bool
    )


def test_paths_pil_images_and_arrays_give_equal_results(folder):
    model = Pipeline(Halves(), Fill(), vocabulary=CLASSES)
    path = folder / "0.png"
    array = np.asarray(Image.open(path))
    one, two, three = (model.segment(image) for image in (path, Image.open(path), array))
    assert one == two == three
    all_three = model.segment([path, array, str(path)])
    assert all_three == [one, one, one]
    assert model.segment([]) == []


def test_detect_returns_boxes_without_masks():
    assert Pipeline(Halves(), Fill()).detect(np.zeros((10, 10, 3), np.uint8), "a").mask is None


def test_frames_go_to_the_detector_in_batches():
    detector = Halves(batch_size=3)
    Pipeline(detector).detect([np.zeros((8, 8, 3), np.uint8)] * 7, "a")
    assert detector.calls == [3, 3, 1]


def test_missing_text_is_an_error():
    with pytest.raises(ConfigError, match="text is missing"):
        Pipeline(Halves()).detect(np.zeros((8, 8, 3), np.uint8))


class Broken:
    """A detector with one valid detection, some fields of which are replaced."""

    def __init__(self, **fields):
        self.fields = fields

    def detect(self, frames, vocabulary):
        fields = {"xyxy": np.array([[0, 0, 5, 5.0]]), "confidence": np.array([0.5]), "class_id": np.array([0])}
        return [sv.Detections(**{**fields, **self.fields})]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_id": np.array([7])}, r"Broken: expected class_id from 0 to 0, got \[7\]"),
        ({"confidence": None}, "expected confidence of shape"),
        ({"mask": np.zeros((1, 3, 3), bool)}, r"expected masks of shape \(1, 8, 8\), got \(1, 3, 3\)"),
        ({"xyxy": np.array([[0, 0, 50, 5.0]])}, "expected boxes inside the 8x8 px image"),
    ],
)
def test_a_stage_with_invalid_detections_is_named(fields, message):
    with pytest.raises(GroundedSamError, match=message):
        Pipeline(Broken(**fields)).detect(np.zeros((8, 8, 3), np.uint8), "a")


def test_the_segmenter_is_not_run_on_detections_with_masks():
    mask = np.ones((1, 8, 8), bool)
    never = object()
    detections = Pipeline(Broken(mask=mask), never, Select(score=0)).segment(np.zeros((8, 8, 3), np.uint8), "a")
    assert detections.mask.all()


def test_a_run_counts_objects_and_skipped_files(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"no picture")
    model = Pipeline(Halves(), Fill(), Select(score=0.5), CLASSES)
    summary = Runner(model, ImageSource(folder), [CocoSink(tmp_path, CLASSES)], tmp_path).run()
    assert (summary.images, summary.empty, dict(summary.objects)) == (4, 0, {"a": 4})
    assert [s.file for s in summary.skipped] == ["bad.png"]
    assert json.loads((tmp_path / "skipped.json").read_text())[0]["file"] == "bad.png"


def test_a_run_without_a_readable_image_fails(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    out = tmp_path / "out"
    with pytest.raises(ImageError, match="no usable images, 3 skipped"):
        Runner(Pipeline(Halves(), None, None, CLASSES), ImageSource(tmp_path), [], out).run()
    assert len(json.loads((out / "skipped.json").read_text())) == 3


def test_an_interrupted_run_keeps_what_was_written(folder, tmp_path):
    class Impatient(Halves):
        def detect(self, frames, vocabulary):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().detect(frames, vocabulary)

    model = Pipeline(Impatient(), Fill(), None, CLASSES)
    summary = Runner(model, ImageSource(folder), [CocoSink(tmp_path, CLASSES)], tmp_path).run()
    assert summary.interrupted and summary.images == 2
    assert len(json.loads((tmp_path / "annotations.json").read_text())["images"]) == 2


def test_importing_the_package_imports_no_heavy_library():
    code = (
        "import sys, grounded_sam; grounded_sam.Vocabulary.parse('cat');"
        "print([m for m in ('torch', 'sam2', 'hydra', 'transformers', 'supervision') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    code = "import sys; from grounded_sam import load, Pipeline, Select, read_image; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_the_embedded_models_find_most_shapes(shapes, scenes):
    right = 0
    for scene in scenes:
        names = list(dict.fromkeys(f"{c} {s}" for c, s in scene.pairs))
        detections = shapes.segment(scene.image, names)
        assert detections.mask.shape == (len(detections), *scene.image.shape[:2])
        for (color, shape), truth in zip(scene.pairs, scene.masks, strict=True):
            named = detections[detections.data["class_name"] == f"{color} {shape}"]
            right += any((m & truth).sum() / (m | truth).sum() > 0.6 for m in named.mask)
    assert right >= 0.6 * sum(len(scene.pairs) for scene in scenes)


def test_load_takes_command_line_overrides():
    model = load("select.score=0.42", preset="shapes", segmenter="none", text=["red circle"])
    assert model.segmenter is None
    assert model.select.score == 0.42
    assert model.vocabulary.classes == ("red circle",)
