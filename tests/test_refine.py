"""Boxes and confidence recomputed from masks."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import CLASSES, boxes

from grounded_sam import ConfigError, Pipeline, Select, load
from grounded_sam.pipeline.refine import Refine
from grounded_sam.structures.detections import with_masks
from grounded_sam.structures.masks import masks_to_xyxy

IMAGE = np.zeros((100, 100, 3), np.uint8)


class FixedBoxes:
    """A detector with the same boxes for every frame."""

    def __init__(self, *rows):
        self.rows = rows

    def detect(self, frames, vocabulary):
        return [boxes(*self.rows) for _ in frames]


class ShrunkenMasks:
    """A segmenter whose masks are the boxes without a border of two pixels, with given mask scores.

    Args:
        scores: One per object.
        empty: Whether the last object gets an empty mask.
    """

    def __init__(self, *scores, empty=False):
        self.scores, self.empty = scores, empty

    def segment(self, image, detections):
        masks = np.zeros((len(detections), *image.shape[:2]), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, detections.xyxy.round().astype(int), strict=True):
            mask[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] = True
        if self.empty:
            masks[-1] = False
        return with_masks(detections, masks, np.array(self.scores, np.float32)[: len(masks)])


def run(detector, segmenter, refine, **select):
    return Pipeline(detector, segmenter, Select(**select), refine=refine).segment(IMAGE, CLASSES)


def test_boxes_are_recomputed_from_masks_that_are_not_empty():
    detector = FixedBoxes((10, 10, 30, 30, 0.9, 0), (50, 50, 90, 90, 0.8, 1))
    detections = run(detector, ShrunkenMasks(1, 1, empty=True), Refine(boxes=True), min_area=0)
    assert detections.xyxy.tolist() == [[12, 12, 28, 28], [50, 50, 90, 90]]
    assert run(detector, ShrunkenMasks(1, 1), Refine()).xyxy[0].tolist() == [10, 10, 30, 30]


@pytest.mark.parametrize(("score", "expected"), [("text", [0.9, 0.8]), ("mask", [1.0, 0.5]), ("product", [0.8, 0.45])])
def test_refined_confidence_ranks_detections(score, expected):
    detector = FixedBoxes((10, 10, 30, 30, 0.9, 0), (50, 50, 90, 90, 0.8, 1))
    detections = run(detector, ShrunkenMasks(0.5, 1.2), Refine(score=score))  # predicted IoU may exceed 1
    assert detections.confidence.tolist() == pytest.approx(expected)
    assert detections.confidence.dtype == np.float32
    assert run(detector, ShrunkenMasks(0.5, 1.2), Refine(score=score), top_k=1).confidence.tolist() == pytest.approx(
        expected[:1]
    )


def test_nms_uses_the_refined_score():
    detector = FixedBoxes((10, 10, 50, 50, 0.9, 0), (11, 10, 51, 50, 0.8, 0), (60, 60, 90, 90, 0.2, 1))
    detections = run(detector, ShrunkenMasks(0.5, 1.0, 1.0), Refine(score="product"))
    assert detections.confidence.tolist() == pytest.approx(
        [0.8]
    )  # the better mask; 0.2 is below the threshold before masks are made
    assert detections.xyxy.tolist() == [[11, 10, 51, 50]]


def test_refine_is_configurable_and_names_bad_values(scenes):
    names = ["star", "triangle", "ring", "cross"]
    plain = load(preset="shapes").segment(scenes[0].image, names)
    model = load("refine.boxes=true", "refine.score=product", preset="shapes")
    detections = model.segment(scenes[0].image, names)
    assert len(detections) == len(plain) > 0
    np.testing.assert_array_equal(detections.xyxy, masks_to_xyxy(np.asarray(detections.mask)))
    product = plain.confidence * plain.data["mask_score"].clip(0, 1)
    np.testing.assert_allclose(np.sort(detections.confidence), np.sort(product), atol=1e-6)
    for value in ("refine.boxes=2", "refine.score=best"):
        with pytest.raises(ConfigError, match=value.partition("=")[0]):
            load(value, preset="shapes")


def test_refine_without_segmenter_masks_is_an_error_before_loading():
    for words in (["segmenter=none"], ["detector=sam3"]):
        with pytest.raises(ConfigError, match="but none is active"):
            load("refine.score=product", "checkpoints.grounding_dino=./no", "checkpoints.sam3=./no", *words)
