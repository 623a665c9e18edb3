"""Several detectors merged: fakes whose boxes are known, and real classes through the config."""

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

FRAME = Frame(np.zeros((100, 100, 3), np.uint8), 0, "x")


class Finds:
    """A detector that finds what it is given."""

    def __init__(self, *rows, batch_size=1):
        self.rows, self.batch_size, self.calls = rows, batch_size, []

    def detect(self, frames, vocabulary):
        self.calls.append(len(frames))
        return [boxes(*self.rows) for _ in frames]


def test_one_thing_that_two_detectors_find_is_one_box_between():
    ours = EnsembleDetector({"a": Finds((10, 10, 50, 50, 0.9, 0)), "b": Finds((14, 10, 54, 50, 0.3, 0))})
    (found,) = ours.detect([FRAME], CLASSES)
    assert len(found) == 1
    np.testing.assert_allclose(found.xyxy[0], [11, 10, 51, 50], atol=1e-4)  # weighted 3 to 1
    assert found.confidence[0] == pytest.approx(0.6)


def test_what_one_finds_alone_counts_half_and_classes_stay_apart():
    one, other = Finds((10, 10, 50, 50, 0.8, 0)), Finds((10, 10, 50, 50, 0.8, 1), (60, 60, 90, 90, 0.01, 2))
    (found,) = EnsembleDetector({"a": one, "b": other}).detect([FRAME], CLASSES)
    assert sorted(found.data["class_name"]) == ["a", "b"]  # c is below the floor
    np.testing.assert_allclose(found.confidence, 0.4, atol=1e-6)
    (found,) = EnsembleDetector({"a": one, "b": other}, score="max").detect([FRAME], CLASSES)
    np.testing.assert_allclose(found.confidence, 0.8, atol=1e-6)
    (found,) = EnsembleDetector({"a": one, "b": other}, weights={"b": 0}).detect([FRAME], CLASSES)
    assert found.confidence.max() == pytest.approx(0.8)


def test_a_detectors_own_duplicates_do_not_count():
    doubled = Finds((10, 10, 50, 50, 0.9, 0), (10, 10, 51, 50, 0.1, 0))
    (found,) = EnsembleDetector({"a": doubled}).detect([FRAME], CLASSES)
    np.testing.assert_allclose(found.xyxy, [[10, 10, 50, 50]])
    assert found.confidence[0] == pytest.approx(0.9)


def test_nothing_found_is_nothing_and_batches_are_each_ones_own():
    one, two = Finds(), Finds(batch_size=3)
    ours = EnsembleDetector({"a": one, "b": two})
    assert ours.batch_size == 3
    found = ours.detect([FRAME] * 3, CLASSES)
    assert [len(f) for f in found] == [0, 0, 0]
    assert "class_name" in found[0].data
    assert (one.calls, two.calls) == ([1, 1, 1], [3])


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(*[st.integers(0, 45)] * 2, *[st.integers(50, 100)] * 2, st.floats(0.05, 1), st.integers(0, 2)),
        max_size=6,
    )
)
def test_a_detector_with_itself_is_itself_up_to_duplicates(rows):
    (once,) = EnsembleDetector({"a": Finds(*rows)}).detect([FRAME], CLASSES)
    (twice,) = EnsembleDetector({"a": Finds(*rows), "b": Finds(*rows)}).detect([FRAME], CLASSES)
    assert sorted(once.class_id) == sorted(twice.class_id)
    assert len(once) <= len(rows)
    assert ((twice.xyxy >= 0) & (twice.xyxy <= 100)).all() and (twice.confidence <= 1).all()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"detectors": {}}, "one or more detectors"),
        ({"weights": {"c": 1}}, "names c; the detectors are a"),
        ({"weights": {"a": -1}}, "weights.a must be"),
        ({"weights": {"a": 0}}, "all 0"),
        ({"iou": 2}, "detector.iou must be"),
        ({"score": "median"}, "mean or max"),
    ],
)
def test_what_cannot_be_merged_is_said(keys, says):
    with pytest.raises(ConfigError, match=says):
        EnsembleDetector(**{"detectors": {"a": Finds()}, **keys})


def test_real_detectors_merge_through_the_config(tmp_path, scenes):
    owlv2 = checkpoints.owlv2(tmp_path / "owlv2")
    words = ["detector=ensemble", f"checkpoints.owlv2={owlv2}", "detector.weights={second: 0.01}"]
    both = load(*words, preset="shapes")
    names = ["star", "triangle", "ring", "cross"]
    found = both.segment(scenes[0].image, names)
    alone = load(preset="shapes").segment(scenes[0].image, names)
    assert len(alone) >= 2
    overlap = (found.mask[:, None] & alone.mask[None]).sum((2, 3)) / (found.mask[:, None] | alone.mask[None]).sum(
        (2, 3)
    )
    assert (overlap.max(0) > 0.8).all()
    assert found.confidence.max() > alone.confidence.max() - 0.05
