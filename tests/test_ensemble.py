"""Fusion of several detectors: fakes with known boxes, and real detectors through the config."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
from fakes import CLASSES, boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from grounded_sam import ConfigError, load
from grounded_sam.structures.frame import Frame

pytest.importorskip("ensemble_boxes", reason="the extra ensemble is not installed")
from grounded_sam.detectors.ensemble import EnsembleDetector

FRAME = Frame(pixels=np.zeros((100, 100, 3), np.uint8), name="x")


class FixedDetector:
    """A detector that returns the same boxes for every frame."""

    def __init__(self, *rows, batch_size=1):
        self.rows, self.batch_size, self.calls = rows, batch_size, []

    def detect(self, frames, vocabulary):
        self.calls.append(len(frames))
        return [boxes(*self.rows) for _ in frames]


def test_boxes_of_one_object_become_their_weighted_mean():
    a, b = FixedDetector((10, 10, 50, 50, 0.9, 0)), FixedDetector((14, 10, 54, 50, 0.3, 0))
    (detections,) = EnsembleDetector({"a": a, "b": b}).detect([FRAME], CLASSES)
    assert len(detections) == 1
    np.testing.assert_allclose(detections.xyxy[0], [11, 10, 51, 50], atol=1e-4)  # weighted 3 to 1
    assert detections.confidence[0] == pytest.approx(0.6)
    assert detections.data["detector_scores"].tolist() == [{"a": 0.9, "b": 0.3}]


def test_a_box_of_one_detector_counts_half_and_classes_stay_apart():
    a = FixedDetector((10, 10, 50, 50, 0.8, 0))
    b = FixedDetector((10, 10, 50, 50, 0.8, 1), (60, 60, 90, 90, 0.01, 2))
    (detections,) = EnsembleDetector({"a": a, "b": b}).detect([FRAME], CLASSES)
    assert sorted(detections.data["class_name"]) == ["a", "b"]  # c is below `min_score`
    np.testing.assert_allclose(detections.confidence, 0.4, atol=1e-6)
    (detections,) = EnsembleDetector({"a": a, "b": b}, score="max").detect([FRAME], CLASSES)
    np.testing.assert_allclose(detections.confidence, 0.8, atol=1e-6)
    (detections,) = EnsembleDetector({"a": a, "b": b}, weights={"b": 0}).detect([FRAME], CLASSES)
    assert detections.confidence.max() == pytest.approx(0.8)


def test_duplicates_of_one_detector_do_not_count():
    duplicates = FixedDetector((10, 10, 50, 50, 0.9, 0), (10, 10, 51, 50, 0.1, 0))
    (detections,) = EnsembleDetector({"a": duplicates}).detect([FRAME], CLASSES)
    np.testing.assert_allclose(detections.xyxy, [[10, 10, 50, 50]])
    assert detections.confidence[0] == pytest.approx(0.9)


def test_each_detector_gets_batches_of_its_own_size():
    a, b = FixedDetector(), FixedDetector(batch_size=3)
    ensemble = EnsembleDetector({"a": a, "b": b})
    assert ensemble.batch_size == 3
    results = ensemble.detect([FRAME] * 3, CLASSES)
    assert [len(detections) for detections in results] == [0, 0, 0]
    assert "class_name" in results[0].data
    assert (a.calls, b.calls) == ([1, 1, 1], [3])


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(*[st.integers(0, 45)] * 2, *[st.integers(50, 100)] * 2, st.floats(0.05, 1), st.integers(0, 2)),
        max_size=6,
    )
)
def test_a_detector_merged_with_itself_is_itself_up_to_duplicates(rows):
    (once,) = EnsembleDetector({"a": FixedDetector(*rows)}).detect([FRAME], CLASSES)
    (twice,) = EnsembleDetector({"a": FixedDetector(*rows), "b": FixedDetector(*rows)}).detect([FRAME], CLASSES)
    assert sorted(once.class_id) == sorted(twice.class_id)
    assert len(once) <= len(rows)
    assert ((twice.xyxy >= 0) & (twice.xyxy <= 100)).all() and (twice.confidence <= 1).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"detectors": {}}, "one or more detectors"),
        ({"weights": {"c": 1}}, "names c; the detectors are a"),
        ({"weights": {"a": -1}}, "weights.a must be"),
        ({"weights": {"a": 0}}, "must not all be 0"),
        ({"iou": 2}, "detector.iou must be"),
        ({"score": "median"}, "mean or max"),
    ],
)
def test_wrong_settings_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        EnsembleDetector(**{"detectors": {"a": FixedDetector()}, **overrides})


def test_real_detectors_are_merged_through_the_config(tmp_path, scenes):
    owlv2 = checkpoints.owlv2(tmp_path / "owlv2")
    overrides = ["detector=ensemble", f"checkpoints.owlv2={owlv2}", "detector.weights={second: 0.01}"]
    ensemble = load(*overrides, preset="shapes")
    names = ["star", "triangle", "ring", "cross"]
    merged = ensemble.segment(scenes[0].image, names)
    single = load(preset="shapes").segment(scenes[0].image, names)
    assert len(single) >= 2
    intersection = (merged.mask[:, None] & single.mask[None]).sum((2, 3))
    union = (merged.mask[:, None] | single.mask[None]).sum((2, 3))
    assert ((intersection / union).max(0) > 0.8).all()
    assert merged.confidence.max() > single.confidence.max() - 0.05
