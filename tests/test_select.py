from __future__ import annotations

import numpy as np
import pytest
import supervision as sv
from fakes import CLASSES, boxes
from hypothesis import given
from hypothesis import strategies as st

from grounded_sam import ConfigError, Select
from grounded_sam.pipeline.select import select_detections
from grounded_sam.structures.detections import with_masks


def with_shrunken_masks(detections: sv.Detections, shrink: list[int]) -> sv.Detections:
    """Add masks that fill the boxes except for a border of `shrink` pixels."""
    masks = np.zeros((len(detections), 100, 100), bool)
    for mask, (x1, y1, x2, y2), s in zip(masks, detections.xyxy.astype(int), shrink, strict=True):
        mask[y1 + s : y2 - s, x1 + s : x2 - s] = True
    return with_masks(detections, masks, np.ones(len(detections), np.float32))


OVERLAPPING = boxes(
    (10, 10, 50, 50, 0.9, 0), (12, 10, 52, 50, 0.8, 0), (11, 11, 51, 51, 0.7, 1), (60, 60, 70, 70, 0.4, 2)
)


@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        ({"score": 0.0, "nms": None}, [0.9, 0.8, 0.7, 0.4]),
        ({"score": 0.75, "nms": None}, [0.9, 0.8]),
        ({"score": 0.75, "nms": None, "class_score": {"c": 0.3}}, [0.9, 0.8, 0.4]),
        ({"score": 0.1, "nms": None, "class_score": {"a": 0.85}}, [0.9, 0.7, 0.4]),
        ({"score": 0.0, "nms": 0.5}, [0.9, 0.7, 0.4]),
        ({"score": 0.0, "nms": 0.5, "class_agnostic": True}, [0.9, 0.4]),
        ({"score": 0.0, "nms": None, "top_k": 2}, [0.9, 0.8]),
        ({"score": 0.0, "nms": 0.5, "top_k": 2}, [0.9, 0.7]),
        ({"score": 0.0, "nms": None, "top_k": 0}, []),
        ({"score": 0.0, "nms": None, "min_area": 200}, [0.9, 0.8, 0.7]),
        ({"score": 0.0, "nms": None, "max_area": 200}, [0.4]),
    ],
)
def test_thresholds_nms_areas_and_top_k_select_detections(settings, scores):
    assert select_detections(OVERLAPPING, Select(**settings), CLASSES).confidence.tolist() == pytest.approx(scores)


def test_nms_by_mask_and_min_area_use_masks_instead_of_boxes():
    detections = with_shrunken_masks(boxes((10, 10, 50, 50, 0.9, 0), (10, 10, 50, 50, 0.8, 0)), [0, 17])
    assert len(select_detections(detections, Select(score=0, nms=0.5), CLASSES)) == 1
    assert len(select_detections(detections, Select(score=0, nms=0.5, nms_by="mask"), CLASSES)) == 2
    assert len(select_detections(detections, Select(score=0, nms=None, min_area=100), CLASSES)) == 1


def test_nms_by_mask_without_masks_is_an_error():
    with pytest.raises(ConfigError, match="needs masks"):
        select_detections(OVERLAPPING, Select(nms_by="mask"), CLASSES)


def test_class_score_for_an_unknown_class_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'cta'.*'a', 'b', 'c'"):
        select_detections(OVERLAPPING, Select(class_score={"cta": 0.5}), CLASSES)


@pytest.mark.parametrize(
    "setting",
    [
        {"score": 2},
        {"nms": -1},
        {"nms_by": "hand"},
        {"top_k": -1},
        {"class_score": {"a": "x"}},
        {"score": None},
        {"min_area": "abc"},
    ],
)
def test_settings_out_of_range_name_their_key(setting):
    with pytest.raises(ConfigError, match=f"select.{next(iter(setting))}"):
        Select(**setting)


corner = st.integers(0, 80)
rows = st.lists(
    st.tuples(corner, corner, st.integers(1, 20), st.integers(1, 20), st.floats(0, 1, width=32), st.integers(0, 2)),
    max_size=25,
).map(lambda table: boxes(*[(x, y, x + w, y + h, s, c) for x, y, w, h, s, c in table]))
settings = st.builds(
    Select,
    score=st.floats(0, 1),
    nms=st.none() | st.floats(0.05, 1),
    class_agnostic=st.booleans(),
    top_k=st.none() | st.integers(0, 10),
    min_area=st.floats(0, 200),
    max_area=st.none() | st.floats(0, 400),
)


@given(rows, settings)
def test_selecting_twice_equals_selecting_once(detections, settings_):
    once = select_detections(detections, settings_, CLASSES)
    assert select_detections(once, settings_, CLASSES) == once


@given(rows, settings)
def test_selected_detections_are_a_sorted_subset(detections, settings_):
    selected = select_detections(detections, settings_, CLASSES)
    before = {
        (*box, score, c)
        for box, score, c in zip(detections.xyxy.tolist(), detections.confidence, detections.class_id, strict=True)
    }
    after = [
        (*box, score, c)
        for box, score, c in zip(selected.xyxy.tolist(), selected.confidence, selected.class_id, strict=True)
    ]
    assert set(after) <= before
    assert (np.diff(selected.confidence) <= 0).all()


@given(rows, settings)
def test_selecting_before_masks_does_not_change_the_result(detections, settings_):
    """The pipeline selects before and after masks; with masks that fill the boxes this equals one selection."""
    first = select_detections(detections, settings_.before_masks(), CLASSES)
    assert select_detections(first, settings_, CLASSES) == select_detections(detections, settings_, CLASSES)


def test_ontology_scores_apply_unless_class_score_overrides_them():
    from grounded_sam import Vocabulary

    words = Vocabulary.parse({"classes": {"a": {"score": 0.8}, "b": {}, "c": {"score": 0.1}}})
    detections = boxes((0, 0, 9, 9, 0.5, 0), (20, 0, 29, 9, 0.5, 1), (40, 0, 49, 9, 0.2, 2))
    assert select_detections(detections, Select(score=0.3), words).class_id.tolist() == [1, 2]
    assert select_detections(detections, Select(score=0.3, class_score={"a": 0.4}), words).class_id.tolist() == [
        0,
        1,
        2,
    ]


def test_max_ios_suppresses_boxes_inside_others():
    whole, part, other = (10, 10, 90, 90, 0.9, 0), (20, 20, 40, 40, 0.8, 0), (20, 20, 40, 40, 0.7, 1)
    detections = boxes(part, whole, other)
    assert len(select_detections(detections, Select(), CLASSES)) == 3
    selected = select_detections(detections, Select(max_ios=0.9), CLASSES)
    assert selected.confidence.tolist() == pytest.approx([0.9, 0.7])
    assert len(select_detections(detections, Select(max_ios=0.9, class_agnostic=True), CLASSES)) == 1
    assert len(select_detections(detections, Select(max_ios=1.0), CLASSES)) == 2
    half = boxes(whole, (80, 20, 100, 40, 0.8, 0))
    assert len(select_detections(half, Select(max_ios=0.9), CLASSES)) == 2
    assert len(select_detections(half, Select(max_ios=0.4), CLASSES)) == 1
    once = select_detections(detections, Select(max_ios=0.9), CLASSES)
    assert len(select_detections(once, Select(max_ios=0.9), CLASSES)) == len(once)
    with pytest.raises(ConfigError, match="select.max_ios must be null or a number from 0 to 1"):
        Select(max_ios=2)
