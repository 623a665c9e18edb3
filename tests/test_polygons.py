"""Tests of masks as polygons, filled by the libraries that read them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from grounded_sam.structures.masks import join_loops, mask_outlines

MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def fill_with_pycocotools(polygons, size_hw):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size_hw))).astype(bool)


def fill_with_opencv(loops, size_hw):
    canvas = np.zeros(size_hw, np.uint8)
    cv2.fillPoly(canvas, [loop.astype(np.int32) for loop in loops], 1)
    return canvas.astype(bool)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@given(MASKS)
def test_pycocotools_fills_a_part_with_its_holes_exactly(mask):
    polygons = [join_loops([part]).reshape(-1).tolist() for part in mask_outlines(mask, "edges")]
    assert bool(polygons) == bool(mask.any())
    if polygons:
        assert np.array_equal(fill_with_pycocotools(polygons, mask.shape), mask)


@given(MASKS)
def test_pycocotools_fills_all_parts_in_one_polygon_exactly(mask):
    if mask.any():
        polygon = join_loops(mask_outlines(mask, "edges")).reshape(-1).tolist()
        assert np.array_equal(fill_with_pycocotools([polygon], mask.shape), mask)


@given(MASKS)
def test_opencv_fills_loops_through_pixels_exactly(mask):
    parts = mask_outlines(mask, "pixels")
    if parts:
        assert np.array_equal(fill_with_opencv([loop for part in parts for loop in part], mask.shape), mask)


@pytest.fixture(scope="module")
def shapes_with_holes():
    """Make masks of rings and of several parts."""
    masks = []
    rng = np.random.default_rng(3)
    for _ in range(20):
        canvas = np.zeros((180, 240), np.uint8)
        for _ in range(rng.integers(1, 4)):
            center = (int(rng.integers(40, 200)), int(rng.integers(40, 140)))
            cv2.circle(canvas, center, int(rng.integers(18, 38)), 1, -1)
            cv2.circle(canvas, center, int(rng.integers(5, 15)), 0, -1)
        masks.append(canvas.astype(bool))
    return masks


def test_one_polygon_per_object_is_close_to_the_mask_in_opencv_and_pillow(shapes_with_holes):
    for mask in shapes_with_holes:
        polygon = join_loops(mask_outlines(mask, "pixels"))
        assert iou(fill_with_opencv([polygon], mask.shape), mask) > 0.98
        canvas = Image.new("1", mask.shape[::-1])
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in polygon], fill=1, outline=1)
        assert iou(np.array(canvas), mask) > 0.97


def test_an_empty_mask_has_no_outline():
    assert mask_outlines(np.zeros((5, 5), bool), "edges") == []
