from __future__ import annotations

import numpy as np
import pytest
import supervision as sv
from fakes import CLASSES, boxes
from hypothesis import given
from hypothesis import strategies as st

from grounded_sam import ConfigError, Select
from grounded_sam.pipeline.select import select
from grounded_sam.structures.detections import with_masks


def masked(found: sv.Detections, shrink: list[int]) -> sv.Detections:
    """Masks that fill each box but for a border."""
    masks = np.zeros((len(found), 100, 100), bool)
    for mask, (x1, y1, x2, y2), s in zip(masks, found.xyxy.astype(int), shrink, strict=True):
        mask[y1 + s : y2 - s, x1 + s : x2 - s] = True
    return with_masks(found, masks, np.ones(len(found), np.float32))


TWINS = boxes((10, 10, 50, 50, 0.9, 0), (12, 10, 52, 50, 0.8, 0), (11, 11, 51, 51, 0.7, 1), (60, 60, 70, 70, 0.4, 2))


@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        ({"score": 0.0, "nms": None}, [0.9, 0.8, 0.7, 0.4]),
        ({"score": 0.75, "nms": None}, [0.9, 0.8]),
        ({"score": 0.75, "nms": None, "class_score": {"c": 0.3}}, [0.9, 0.8, 0.4]),
        ({"score": 0.1, "nms": None, "class_score": {"a": 0.85}}, [0.9, 0.7, 0.4]),
        ({"score": 0.0, "nms": 0.5}, [0.9, 0.7, 0.4]),
        ({"score": 0.0, "nms": 0.5, "nms_across": True}, [0.9, 0.4]),
        ({"score": 0.0, "nms": None, "top_k": 2}, [0.9, 0.8]),
        ({"score": 0.0, "nms": 0.5, "top_k": 2}, [0.9, 0.7]),
        ({"score": 0.0, "nms": None, "top_k": 0}, []),
        ({"score": 0.0, "nms": None, "min_area": 200}, [0.9, 0.8, 0.7]),
        ({"score": 0.0, "nms": None, "max_area": 200}, [0.4]),
    ],
)
def test_what_stays(settings, scores):
    assert select(TWINS, Select(**settings), CLASSES).confidence.tolist() == pytest.approx(scores)


def test_masks_decide_where_boxes_would_not():
    found = masked(boxes((10, 10, 50, 50, 0.9, 0), (10, 10, 50, 50, 0.8, 0)), [0, 17])
    assert len(select(found, Select(score=0, nms=0.5), CLASSES)) == 1
    assert len(select(found, Select(score=0, nms=0.5, nms_by="mask"), CLASSES)) == 2
    assert len(select(found, Select(score=0, nms=None, min_area=100), CLASSES)) == 1


def test_nms_by_mask_without_masks_is_refused():
    with pytest.raises(ConfigError, match="needs masks"):
        select(TWINS, Select(nms_by="mask"), CLASSES)


def test_thresholds_of_unknown_classes_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'cta'.*'a', 'b', 'c'"):
        select(TWINS, Select(class_score={"cta": 0.5}), CLASSES)


@pytest.mark.parametrize(
    "wrong",
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
def test_settings_out_of_range_name_their_key(wrong):
    with pytest.raises(ConfigError, match=f"select.{next(iter(wrong))}"):
        Select(**wrong)


corner = st.integers(0, 80)
rows = st.lists(
    st.tuples(corner, corner, st.integers(1, 20), st.integers(1, 20), st.floats(0, 1, width=32), st.integers(0, 2)),
    max_size=25,
).map(lambda table: boxes(*[(x, y, x + w, y + h, s, c) for x, y, w, h, s, c in table]))
settings = st.builds(
    Select,
    score=st.floats(0, 1),
    nms=st.none() | st.floats(0.05, 1),
    nms_across=st.booleans(),
    top_k=st.none() | st.integers(0, 10),
    min_area=st.floats(0, 200),
    max_area=st.none() | st.floats(0, 400),
)


@given(rows, settings)
def test_selecting_twice_is_selecting_once(found, chosen):
    once = select(found, chosen, CLASSES)
    assert select(once, chosen, CLASSES) == once


@given(rows, settings)
def test_what_stays_was_there_and_is_sorted(found, chosen):
    kept = select(found, chosen, CLASSES)
    before = {
        (*box, score, c) for box, score, c in zip(found.xyxy.tolist(), found.confidence, found.class_id, strict=True)
    }
    after = [(*box, score, c) for box, score, c in zip(kept.xyxy.tolist(), kept.confidence, kept.class_id, strict=True)]
    assert set(after) <= before
    assert (np.diff(kept.confidence) <= 0).all()


@given(rows, settings)
def test_settling_boxes_first_changes_nothing(found, chosen):
    """The pipeline selects once before masks and once after; with masks that fill the boxes, that is one selection."""
    first = select(found, chosen.before_masks(), CLASSES)
    assert select(first, chosen, CLASSES) == select(found, chosen, CLASSES)


def test_scores_of_an_ontology_count_unless_the_setting_says_otherwise():
    from grounded_sam import Vocabulary

    words = Vocabulary.parse({"classes": {"a": {"score": 0.8}, "b": {}, "c": {"score": 0.1}}})
    found = boxes((0, 0, 9, 9, 0.5, 0), (20, 0, 29, 9, 0.5, 1), (40, 0, 49, 9, 0.2, 2))
    assert select(found, Select(score=0.3), words).class_id.tolist() == [1, 2]
    assert select(found, Select(score=0.3, class_score={"a": 0.4}), words).class_id.tolist() == [0, 1, 2]


def test_a_box_inside_another_of_its_class_is_a_part_of_it():
    whole, part, other = (10, 10, 90, 90, 0.9, 0), (20, 20, 40, 40, 0.8, 0), (20, 20, 40, 40, 0.7, 1)
    found = boxes(part, whole, other)
    assert len(select(found, Select(), CLASSES)) == 3
    kept = select(found, Select(nested=0.9), CLASSES)
    assert kept.confidence.tolist() == pytest.approx([0.9, 0.7])
    assert len(select(found, Select(nested=0.9, nms_across=True), CLASSES)) == 1
    assert len(select(found, Select(nested=1.0), CLASSES)) == 2
    half = boxes(whole, (80, 20, 100, 40, 0.8, 0))
    assert len(select(half, Select(nested=0.9), CLASSES)) == 2
    assert len(select(half, Select(nested=0.4), CLASSES)) == 1
    once = select(found, Select(nested=0.9), CLASSES)
    assert len(select(once, Select(nested=0.9), CLASSES)) == len(once)
    with pytest.raises(ConfigError, match="select.nested must be a number from 0 to 1"):
        Select(nested=2)
