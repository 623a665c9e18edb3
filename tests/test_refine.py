"""What masks do to their detections."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import CLASSES, boxes

from grounded_sam import ConfigError, Pipeline, Select, load
from grounded_sam.pipeline.refine import Refine
from grounded_sam.structures.detections import with_masks
from grounded_sam.structures.masks import masks_to_xyxy

IMAGE = np.zeros((100, 100, 3), np.uint8)


class Finds:
    def __init__(self, *rows):
        self.rows = rows

    def detect(self, frames, vocabulary):
        return [boxes(*self.rows) for _ in frames]


class Shrinks:
    """A segmenter whose masks leave out two pixels all round, the last object having none; its estimates are given."""

    def __init__(self, *estimates, empty=False):
        self.estimates, self.empty = estimates, empty

    def segment(self, image, detections):
        masks = np.zeros((len(detections), *image.shape[:2]), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, detections.xyxy.round().astype(int), strict=True):
            mask[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] = True
        if self.empty:
            masks[-1] = False
        return with_masks(detections, masks, np.array(self.estimates, np.float32)[: len(masks)])


def run(detector, segmenter, refine, **select):
    return Pipeline(detector, segmenter, Select(**select), refine=refine).segment(IMAGE, CLASSES)


def test_boxes_come_from_masks_where_there_is_one():
    finds = Finds((10, 10, 30, 30, 0.9, 0), (50, 50, 90, 90, 0.8, 1))
    found = run(finds, Shrinks(1, 1, empty=True), Refine(boxes=True), min_area=0)
    assert found.xyxy.tolist() == [[12, 12, 28, 28], [50, 50, 90, 90]]
    assert run(finds, Shrinks(1, 1), Refine()).xyxy[0].tolist() == [10, 10, 30, 30]


@pytest.mark.parametrize(("score", "expected"), [("text", [0.9, 0.8]), ("mask", [1.0, 0.5]), ("product", [0.8, 0.45])])
def test_confidence_knows_of_the_mask_and_ranks_by_it(score, expected):
    finds = Finds((10, 10, 30, 30, 0.9, 0), (50, 50, 90, 90, 0.8, 1))
    found = run(finds, Shrinks(0.5, 1.2), Refine(score=score))  # estimates may exceed 1
    assert found.confidence.tolist() == pytest.approx(expected)
    assert found.confidence.dtype == np.float32
    assert run(finds, Shrinks(0.5, 1.2), Refine(score=score), top_k=1).confidence.tolist() == pytest.approx(
        expected[:1]
    )


def test_duplicates_are_told_by_the_refined_score():
    finds = Finds((10, 10, 50, 50, 0.9, 0), (11, 10, 51, 50, 0.8, 0), (60, 60, 90, 90, 0.2, 1))
    found = run(finds, Shrinks(0.5, 1.0, 1.0), Refine(score="product"))
    assert found.confidence.tolist() == pytest.approx([0.8])  # the better mask; 0.2 never got one
    assert found.xyxy.tolist() == [[11, 10, 51, 50]]


def test_it_goes_through_the_config_and_a_wrong_value_is_said(scenes):
    names = ["star", "triangle", "ring", "cross"]
    plain = load(preset="shapes").segment(scenes[0].image, names)
    model = load("refine.boxes=true", "refine.score=product", preset="shapes")
    found = model.segment(scenes[0].image, names)
    assert len(found) == len(plain) > 0
    np.testing.assert_array_equal(found.xyxy, masks_to_xyxy(np.asarray(found.mask)))
    product = plain.confidence * plain.data["mask_score"].clip(0, 1)
    np.testing.assert_allclose(np.sort(found.confidence), np.sort(product), atol=1e-6)
    for value in ("refine.boxes=2", "refine.score=best"):
        with pytest.raises(ConfigError, match=value.partition("=")[0]):
            load(value, preset="shapes")


def test_what_would_change_nothing_is_refused_before_a_model_loads():
    for words in (["segmenter=none"], ["detector=sam3"]):
        with pytest.raises(ConfigError, match="none runs here"):
            load("refine.score=product", "checkpoints.grounding_dino=./no", "checkpoints.sam3=./no", *words)
