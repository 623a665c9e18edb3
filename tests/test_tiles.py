"""Small things in large pictures: what is found in tiles, and that seams leave no trace."""

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
    """Sees the part of every thing that a picture shows; the first value of a pixel is the thing's number."""

    def __init__(self, things):
        self.things = things  # box and class

    def __call__(self, frames):
        return [self.one(frame.image) for frame in frames]

    def one(self, image):
        boxes, ids = [], []
        for number, (_, class_id) in enumerate(self.things, 1):
            rows, columns = np.nonzero(image[..., 0] == number)
            if len(rows) > 8:
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                ids.append(class_id)
        return make_detections(np.array(boxes).reshape(-1, 4), np.full(len(ids), 0.9), ids, WORDS, image.shape[:2])


def picture(things, size_hw):
    image = np.zeros((*size_hw, 3), np.uint8)
    for number, ((x1, y1, x2, y2), _) in enumerate(things, 1):
        image[y1:y2, x1:x2, 0] = number
    return image


#: One thing for each cell of a grid, so that none hides another.
THINGS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(20, 100), st.integers(20, 100), st.integers(0, 1)),
    min_size=1,
    max_size=9,
)


@settings(deadline=None, max_examples=60)
@given(THINGS, st.integers(150, 260), st.sampled_from([0.2, 0.35, 0.5]), st.booleans())
def test_every_thing_comes_out_whole_and_once(rows, size, overlap, whole):
    """Also those that no tile shows whole."""
    things = []
    for place, (dx, dy, width, height, class_id) in enumerate(rows):
        x, y = (place % 3) * 160 + dx, (place // 3) * 160 + dy
        things.append(((x, y, x + width, y + height), class_id))
    image = picture(things, (480, 500))
    found = Tiles(size, overlap, whole).detect(Frame(image), Perfect(things), WORDS)
    truth = np.array([box for box, _ in things], np.float32)
    assert len(found) == len(things)
    overlaps = sv.box_iou_batch(truth, found.xyxy)
    assert (overlaps.max(1) > 0.99).all()
    assert found.class_id[overlaps.argmax(1)].tolist() == [class_id for _, class_id in things]


def test_tiles_cover_a_picture_and_are_of_one_size():
    boxes = Tiles(300, 0.25).boxes((700, 1000))
    seen = np.zeros((700, 1000), bool)
    for x1, y1, x2, y2 in boxes:
        assert (x2 - x1, y2 - y1) == (300, 300)
        seen[y1:y2, x1:x2] = True
    assert seen.all()
    assert Tiles(300).boxes((200, 250)).tolist() == [[0, 0, 250, 200]]


@pytest.mark.parametrize(
    ("keys", "says"),
    [({"size": 8}, "tiles.size"), ({"overlap": 1.0}, "tiles.overlap"), ({"whole": 1}, "tiles.whole")],
)
def test_settings_out_of_range_are_named(keys, says):
    with pytest.raises(ConfigError, match=says):
        Tiles(**keys)


def test_small_shapes_in_a_large_picture():
    """A quarter of `benchmarks/tiles.py`."""
    from tiles import found_in, large

    image, truth = large(np.random.default_rng(5), 10, 5)
    (without, _, _), (recall, twice, _) = found_in(image, truth, None), found_in(image, truth, 400)
    assert without < 0.6 and recall >= 0.9 and twice == 0


def test_masks_of_tiles_are_made_on_the_whole_picture():
    """A shape across the seam of two tiles has one mask, whole."""
    from tiles import large

    image, truth = large(np.random.default_rng(5), 2, 2)
    x1, y1, x2, y2 = truth[0].astype(int).tolist()
    patch = image[y1:y2, x1:x2].copy()
    image[:] = 190
    image[120 : 120 + y2 - y1, 180 : 180 + x2 - x1] = patch
    model = load("tiles.size=200", "tiles.overlap=0", "tiles.whole=false", preset="shapes")
    found = model.segment(image, {"red": "red shape"})
    assert len(found) == 1
    assert sv.box_iou_batch(found.xyxy, np.array([[180, 120, 180 + x2 - x1, 120 + y2 - y1]]))[0, 0] > 0.8
    columns = np.flatnonzero(found.mask[0].any(0))
    assert columns[0] < 190 and columns[-1] > 210
