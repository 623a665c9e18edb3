"""Tiles: small objects in large images are detections, and borders of tiles leave no trace."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from hypothesis import given, settings
from hypothesis import strategies as st

from grounded_sam import ConfigError, Vocabulary, load
from grounded_sam.pipeline.tiles import Tiles
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

WORDS = Vocabulary.parse(["a", "b"])


class Perfect:
    """Detect the visible part of every object; the red value of a pixel is the number of its object."""

    def __init__(self, objects):
        self.objects = objects  # box and class

    def __call__(self, frames):
        return [self.detect(frame.image) for frame in frames]

    def detect(self, image):
        boxes, ids = [], []
        for number, (_, class_id) in enumerate(self.objects, 1):
            rows, columns = np.nonzero(image[..., 0] == number)
            if len(rows) > 8:
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                ids.append(class_id)
        return make_detections(np.array(boxes).reshape(-1, 4), np.full(len(ids), 0.9), ids, WORDS, image.shape[:2])


def draw(objects, size_hw):
    image = np.zeros((*size_hw, 3), np.uint8)
    for number, ((x1, y1, x2, y2), _) in enumerate(objects, 1):
        image[y1:y2, x1:x2, 0] = number
    return image


#: One object per cell of a grid, so that none hides another.
OBJECTS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(20, 100), st.integers(20, 100), st.integers(0, 1)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60)
@given(OBJECTS, st.integers(150, 260), st.sampled_from([0.2, 0.35, 0.5]), st.booleans())
def test_every_object_is_detected_whole_and_once(rows, size, overlap, whole):
    """This includes objects that no tile contains whole."""
    objects = []
    for cell, (dx, dy, width, height, class_id) in enumerate(rows):
        x, y = (cell % 3) * 160 + dx, (cell // 3) * 160 + dy
        objects.append(((x, y, x + width, y + height), class_id))
    image = draw(objects, (480, 500))
    detections = Tiles(size, overlap, whole).detect(Frame(pixels=image), Perfect(objects), WORDS)
    ground_truth = np.array([box for box, _ in objects], np.float32)
    assert len(detections) == len(objects)
    overlaps = sv.box_iou_batch(ground_truth, detections.xyxy)
    assert (overlaps.max(1) > 0.99).all()
    assert detections.class_id[overlaps.argmax(1)].tolist() == [class_id for _, class_id in objects]


def test_tiles_cover_the_image_and_have_one_size():
    boxes = Tiles(300, 0.25).boxes((700, 1000))
    covered = np.zeros((700, 1000), bool)
    for x1, y1, x2, y2 in boxes:
        assert (x2 - x1, y2 - y1) == (300, 300)
        covered[y1:y2, x1:x2] = True
    assert covered.all()
    assert Tiles(300).boxes((200, 250)).tolist() == [[0, 0, 250, 200]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"size": 8}, "tiles.size"), ({"overlap": 1.0}, "tiles.overlap"), ({"whole": 1}, "tiles.whole")],
)
def test_settings_out_of_range_are_errors(keys, message):
    with pytest.raises(ConfigError, match=message):
        Tiles(**keys)


def test_tiles_find_small_shapes_in_a_large_image():
    """This is a quarter of `benchmarks/tiles.py`."""
    from tiles import evaluate_tiles, make_large_image

    image, ground_truth = make_large_image(np.random.default_rng(5), 10, 5)
    whole, tiled = (evaluate_tiles(image, ground_truth, size) for size in (None, 400))
    assert whole.recall < 0.6 and tiled.recall >= 0.9 and tiled.duplicates == 0


def test_masks_with_tiles_are_made_on_the_whole_image():
    """A shape across the border of two tiles has one whole mask."""
    from tiles import make_large_image

    image, ground_truth = make_large_image(np.random.default_rng(5), 2, 2)
    x1, y1, x2, y2 = ground_truth[0].astype(int).tolist()
    patch = image[y1:y2, x1:x2].copy()
    image[:] = 190
    image[120 : 120 + y2 - y1, 180 : 180 + x2 - x1] = patch
    model = load("tiles.size=200", "tiles.overlap=0", "tiles.whole=false", preset="shapes")
    detections = model.segment(image, {"red": "red shape"})
    assert len(detections) == 1
    assert sv.box_iou_batch(detections.xyxy, np.array([[180, 120, 180 + x2 - x1, 120 + y2 - y1]]))[0, 0] > 0.8
    columns = np.flatnonzero(detections.mask[0].any(0))
    assert columns[0] < 190 and columns[-1] > 210
