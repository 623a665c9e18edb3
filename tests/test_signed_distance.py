"""Scenes and clips drawn with signed distance functions match their description."""

from __future__ import annotations

import numpy as np
import pytest
import signed_distance
from independent import LabeledShape
from PIL import Image
from signed_distance import COLORS, PROPORTIONS, SHAPES, crowded_scene, occluded_clip, random_scene, shape_distance

CLIP_SEEDS = range(3)


@pytest.fixture(scope="module")
def photo_paths(tmp_path_factory) -> list:
    """Write a landscape and a portrait photo, the latter of 16-bit gray levels, and return their paths."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = [folder / "color.png", folder / "gray.png"]
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(paths[0])
    Image.fromarray(rng.integers(0, 4096, (80, 50), dtype=np.uint16)).save(paths[1])
    return paths


@pytest.fixture(scope="module")
def drawn(photo_paths):
    """Return random and crowded scenes as `(kind, image, objects, full masks)`."""
    results, draw = [], signed_distance._Canvas.draw
    with pytest.MonkeyPatch.context() as patch:
        for kind, make, seeds in (("random", random_scene, range(24)), ("crowded", crowded_scene, range(6))):
            for seed in seeds:
                full: list[np.ndarray | None] = []

                def spy(*args, full=full, **kwargs):
                    full.append(draw(*args, **kwargs))
                    return full[-1]

                patch.setattr(signed_distance._Canvas, "draw", spy)
                image, objects = make(np.random.default_rng(seed), photo_paths)
                results.append((kind, image, objects, [mask for mask in full if mask is not None]))
    return results


@pytest.fixture(scope="module")
def clips(photo_paths):
    """Return clips of 60 frames."""
    return [occluded_clip(np.random.default_rng(seed), photo_paths) for seed in CLIP_SEEDS]


def assert_disjoint(masks: list[np.ndarray]) -> None:
    """Check that no pixel belongs to two masks."""
    assert not masks or np.sum(masks, axis=0).max() <= 1


def color_error(image: np.ndarray, item: LabeledShape) -> float:
    """Return the largest channel difference between an object's median color and its named one, brighter or darker."""
    median = np.median(image[item.mask], axis=0)
    named = np.array(COLORS[item.color])
    factor = np.clip(median @ named / (named @ named), 0.8, 1.12)
    return np.abs(median - factor * named).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_touch_their_circumscribed_circle_and_distances_are_true(shape):
    y, x = np.mgrid[-60:61, -60:61].astype(float)
    for proportion in PROPORTIONS.get(shape, (1,)):
        distance = shape_distance(shape, x, y, 50.0, proportion)
        assert 49 <= np.hypot(x, y)[distance < 0.5].max() <= 50.5
        outside = (distance > 1)[:-1, :-1] & (np.hypot(x, y) > 20)[:-1, :-1]
        slope = np.hypot(np.diff(distance, axis=1)[:-1], np.diff(distance, axis=0)[:, :-1])
        assert np.median(slope[outside]) == pytest.approx(1, abs=0.02)
        assert slope.max() < 1.42


def test_areas_are_those_of_the_shapes():
    y, x = np.mgrid[-60:61, -60:61].astype(float)
    expected = {"circle": np.pi, "square": 2, "triangle": 0.75 * 3**0.5, "ring": np.pi * 0.75, "star": 5 * 0.5 * 0.5878}
    for shape, area in expected.items():
        coverage = np.clip(0.5 - shape_distance(shape, x, y, 50.0, 0.5), 0, 1)
        assert coverage.sum() == pytest.approx(area * 50**2, rel=0.01), shape


def test_sizes_and_counts(drawn):
    limits = {"random": (96, 512, 0, 8), "crowded": (160, 640, 8, 30)}
    for kind, image, objects, full in drawn:
        low, high, fewest, most = limits[kind]
        short, long = sorted(image.shape[:2])
        assert image.dtype == np.uint8 and image.shape[2:] == (3,)
        assert low <= short <= long <= min(high, 2 * short)
        assert fewest <= len(objects) == len(full) <= most
        if kind == "crowded":
            assert long >= 320
            assert 2 <= len({(item.color, item.shape) for item in objects}) <= 6


def test_diameters_are_in_the_range_and_objects_inside(drawn):
    for kind, image, objects, full in drawn:
        for item, mask in zip(objects, full, strict=True):
            left, top, right, bottom = Image.fromarray(mask).getbbox()
            side, low, high = max(right - left, bottom - top), *((0.10, 0.45) if kind == "random" else (0.04, 0.12))
            assert 0.7 * low * min(image.shape[:2]) - 2 <= side <= high * min(image.shape[:2]) + 2
            if item.shape == "circle":
                assert abs((right - left) - (bottom - top)) <= 1


def test_masks_are_disjoint_and_two_thirds_stay_visible(drawn):
    hidden = 0
    for _, image, objects, full in drawn:
        assert_disjoint([item.mask for item in objects])
        for item, mask in zip(objects, full, strict=True):
            assert item.mask.dtype == bool and item.mask.shape == image.shape[:2]
            assert not np.any(item.mask & ~mask)
            assert item.mask.sum() >= mask.sum() * 2 / 3
            hidden += item.mask.sum() < mask.sum()
    assert hidden > 10


def test_colors_are_near_the_named_ones(drawn):
    errors = [color_error(image, item) for _, image, objects, _ in drawn for item in objects if item.mask.sum() >= 60]
    assert len(errors) > 100
    assert max(errors) < 40
    assert np.median(errors) < 16


def test_pairs_and_counts_can_be_chosen():
    rng = np.random.default_rng(1)
    _, objects = random_scene(rng, [], pairs=[("red", "star"), ("blue", "ring")], count=8)
    assert len(objects) == 8
    assert {(item.color, item.shape) for item in objects} <= {("red", "star"), ("blue", "ring")}
    assert random_scene(rng, [], count=0)[1] == []
    assert len(crowded_scene(rng, [], count=40)[1]) == 40


def test_clips_have_look_alikes_and_larger_solid_objects(clips):
    for images, objects in clips:
        assert len(images) == 60
        short, long = sorted(images[0].shape[:2])
        assert 128 <= short <= long <= min(384, 2 * short)
        assert 3 <= len(objects) <= 6
        assert objects[-1].shape in {"circle", "square"}
        assert objects[0].color == objects[1].color or objects[0].shape == objects[1].shape
        for frame, image in enumerate(images):
            assert image.dtype == np.uint8 and image.shape == images[0].shape
            masks = [item.masks[frame] for item in objects if item.masks[frame] is not None]
            assert_disjoint(masks)
            assert all(mask.shape == image.shape[:2] and mask.sum() >= 12 for mask in masks)


def test_clips_hide_an_object_for_5_to_15_frames(clips):
    hiding = 0
    for _, objects in clips:
        lengths = []
        for item in objects:
            seen = np.flatnonzero([mask is not None for mask in item.masks])
            lengths += list(np.diff(seen) - 1)
        hiding += any(5 <= length <= 15 for length in lengths)
    assert hiding >= 0.75 * len(clips)


def test_objects_of_clips_move_smoothly(clips):
    for images, objects in clips:
        for item in objects:
            whole = max(mask.sum() for mask in item.masks if mask is not None)
            for before, after in zip(item.masks, item.masks[1:], strict=False):
                if before is None or after is None or min(before.sum(), after.sum()) < 0.97 * whole:
                    continue
                shift = np.argwhere(after).mean(axis=0) - np.argwhere(before).mean(axis=0)
                assert np.hypot(*shift) < 0.025 * min(images[0].shape[:2]) + 2


@pytest.mark.parametrize("make", [random_scene, crowded_scene, lambda *a: occluded_clip(*a, frames=12)])
def test_the_seed_determines_everything(photo_paths, make):
    first, second, other = (make(np.random.default_rng(seed), photo_paths) for seed in (3, 3, 4))
    assert np.array_equal(first[0], second[0])
    assert [item.color for item in first[1]] == [item.color for item in second[1]]
    assert not np.array_equal(first[0], other[0])
