"""Detector `everything`: masks without text, by the automatic mask generators of SAM and SAM 2."""

from __future__ import annotations

import numpy as np
import pytest

from grounded_sam import ConfigError, load
from grounded_sam.shapes.scenes import make_scene
from grounded_sam.weights.loading import builtin_path, builtin_settings

FEW_POINTS = ["detector.points_per_side=12", "detector.pred_iou_thresh=0.6", "detector.stability_score_thresh=0.6"]


@pytest.mark.parametrize("segmenter", ["sam", "sam2"])
def test_every_object_gets_a_mask_and_a_tight_box(segmenter):
    scene = make_scene(np.random.default_rng(12), count=3, size_hw=(220, 220))
    model = load(*FEW_POINTS, preset="shapes", detector="everything", segmenter=segmenter)
    detections = model.segment(scene.image)
    assert set(detections.data["class_name"]) <= {"object"}
    ious = [max(((m & gt).sum() / (m | gt).sum() for m in detections.mask), default=0) for gt in scene.masks]
    assert np.mean(np.array(ious) > 0.6) >= 0.6
    assert detections.mask.shape[1:] == (220, 220)
    for box, mask in zip(detections.xyxy, detections.mask, strict=True):
        ys, xs = np.nonzero(mask)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_thresholds_reach_the_generator():
    model = load("detector.pred_iou_thresh=0.99", "detector.points_per_side=4", preset="shapes", detector="everything")
    assert model.detector.generator.pred_iou_thresh == 0.99
    assert len(model.detector.generator.point_grids[0]) == 16


def test_settings_that_are_not_given_are_those_of_the_weights():
    model = load(preset="shapes", detector="everything")
    settings = builtin_settings(builtin_path("shapes", "sam2"), "sam2")["mask_generator"]
    assert model.detector.mask_nms_thresh == settings["mask_nms_thresh"]
    assert model.detector.generator.stability_score_thresh == settings["stability_score_thresh"]
    with pytest.raises(ConfigError, match=r"detector\.mask_nms_thresh must be null or a number from 0 to 1"):
        load("detector.mask_nms_thresh=2", preset="shapes", detector="everything")


def test_text_can_name_the_one_class():
    model = load(*FEW_POINTS, "detector.points_per_side=3", preset="shapes", detector="everything", text="thing")
    detections = model.segment(np.zeros((64, 64, 3), np.uint8))
    assert set(detections.data["class_name"]) <= {"thing"}
    with pytest.raises(ConfigError, match="detector=everything has one class, but text names 2"):
        model.segment(np.zeros((64, 64, 3), np.uint8), ["a", "b"])


def test_everything_needs_a_segmenter_with_a_mask_generator():
    with pytest.raises(ConfigError, match="needs segmenter=sam or segmenter=sam2"):
        load(detector="everything", segmenter="none")
