"""Scenes match their description, and the embedded models are accurate on scenes of an independent generator."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import HELD_OUT_PAIRS as INDEPENDENT_HELD_OUT_PAIRS
from independent import photo_files, random_scene

from grounded_sam.shapes.phrases import Phrase, build_tokenizer, sample_phrases
from grounded_sam.shapes.scenes import (
    COLORS,
    EXTRA_PAIRS,
    HELD_OUT_PAIRS,
    TRAIN_PAIRS,
    VALIDATION_PAIRS,
    make_clip,
    make_crowded_scene,
    make_occluded_clip,
    make_scene,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_scenes_match_their_description(seed):
    scene = make_scene(np.random.default_rng(seed))
    height, width = scene.image.shape[:2]
    assert min(height, width) >= 96 and max(height, width) <= 512 and max(height, width) <= 2 * min(height, width) + 1
    assert len(scene.pairs) == len(scene.masks) == len(scene.xyxy) <= 8
    assert not (scene.masks.sum(0) > 1).any()  # masks do not overlap
    for mask, box in zip(scene.masks, scene.xyxy, strict=True):
        ys, xs = np.nonzero(mask)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_a_seed_determines_a_scene():
    first, second = (make_scene(np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first.image, second.image)


def test_objects_have_the_color_of_their_label():
    for seed in range(20):
        scene = make_scene(np.random.default_rng(seed), count=4)
        for (color, _), mask in zip(scene.pairs, scene.masks, strict=True):
            mean = scene.image[mask].mean(0)
            nearest = min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - mean).sum())
            assert nearest == color or np.abs(np.array(COLORS[color]) - mean).max() < 60


def test_ids_in_clips_persist_when_objects_leave_and_return():
    frames = make_clip(np.random.default_rng(1), 40, count=3, size_hw=(160, 200), speed=0.05)
    assert len(frames) == 40
    visible = [set(frame.ids.tolist()) for frame in frames]
    assert visible[0] == {0, 1, 2}
    assert any(i not in ids for ids in visible for i in range(3))
    pairs_by_id = {i: {f.pairs[list(f.ids).index(i)] for f in frames if i in f.ids} for i in range(3)}
    assert all(len(pairs) == 1 for pairs in pairs_by_id.values())


def test_crowded_scenes_have_8_to_30_small_objects():
    for seed in range(10):
        scene = make_crowded_scene(np.random.default_rng(seed))
        height, width = scene.image.shape[:2]
        assert 320 <= max(height, width) <= 640
        assert 6 <= len(scene.pairs) <= 30  # a few may find no room
        sides = (scene.xyxy[:, 2:] - scene.xyxy[:, :2]).max(1)
        assert sides.max() <= 0.12 * min(height, width) + 3


def test_occluded_clips_hide_an_object_for_5_to_15_frames():
    hidden = []
    for seed in range(12):
        clip = make_occluded_clip(np.random.default_rng(seed), 60)
        for i in range(4):
            visible = "".join("1" if i in frame.ids else "0" for frame in clip).strip("0")
            hidden += [len(gap) for gap in visible.split("1") if gap]
    assert len(hidden) >= 8
    assert 4 <= np.median(hidden) <= 16


def test_away_makes_objects_leave_and_return():
    frames = make_clip(np.random.default_rng(4), 12, count=5, size_hw=(160, 200), speed=0.0, away=1.0)
    visible = np.array([[i in frame.ids for frame in frames] for i in range(5)])
    assert visible[:, 0].any() and not visible.all(1).any()
    assert any(row[0] and row[-1] and not row.all() for row in visible)


def test_training_never_uses_the_held_out_pairs():
    held_out = set(HELD_OUT_PAIRS)
    assert held_out == INDEPENDENT_HELD_OUT_PAIRS
    assert not held_out & set(TRAIN_PAIRS + EXTRA_PAIRS + VALIDATION_PAIRS)
    assert not set(VALIDATION_PAIRS) & set(TRAIN_PAIRS + EXTRA_PAIRS)
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = make_scene(rng, TRAIN_PAIRS, count=3, size_hw=(96, 96))
        assert not held_out & set(scene.pairs)
        phrases = sample_phrases(rng, scene.pairs, TRAIN_PAIRS + EXTRA_PAIRS)
        assert not held_out & {(phrase.color, phrase.shape) for phrase in phrases}


def test_the_text_of_a_phrase_names_its_color_and_shape():
    rng = np.random.default_rng(0)
    for _ in range(200):
        for phrase in sample_phrases(rng, [("red", "star")]):
            if phrase.color == "?":
                continue
            words = phrase.text.split()
            assert phrase.color is None or phrase.color in words
            assert phrase.shape is None or any(word.startswith(phrase.shape) for word in words)
    assert Phrase("red", None, "red shape").matches(("red", "star"))
    assert not Phrase("red", "ring", "red ring").matches(("red", "star"))


def test_the_tokenizer_splits_plurals_and_knows_every_letter():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("red circles . crosses") == ["red", "circle", "##s", ".", "cross", "##es"]
    assert tokenizer.unk_token not in tokenizer.tokenize("zebra 42")
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.convert_tokens_to_ids(".")) == (101, 102, 1012)


@pytest.fixture(scope="module")
def independent_scenes(photos):
    """300 scenes of a generator that shares no code with the one the models were trained on."""
    backgrounds = photo_files(photos)
    return [random_scene(np.random.default_rng([99, i]), backgrounds) for i in range(300)]


def test_the_detector_finds_pairs_including_held_out_ones(independent_scenes):
    from shapes import detector_ap

    ap = detector_ap(independent_scenes, "pairs")
    assert np.mean(list(ap.values())) >= 0.9
    assert np.mean([ap[f"{color} {shape}"] for color, shape in HELD_OUT_PAIRS]) >= 0.88


@pytest.mark.parametrize("kind", ["shapes", "colors"])
def test_the_detector_finds_shapes_and_colors(independent_scenes, kind):
    from shapes import detector_ap

    assert np.mean(list(detector_ap(independent_scenes, kind).values())) >= 0.85


def test_absent_pairs_are_rarely_detected(independent_scenes):
    from shapes import false_positives_per_image

    assert false_positives_per_image(independent_scenes) < 0.1


@pytest.mark.parametrize(("segmenter", "minimum"), [("sam2", 0.88), ("sam", 0.85)])
def test_masks_from_detected_boxes_are_accurate(independent_scenes, segmenter, minimum):
    from shapes import mean_mask_iou

    mean, count = mean_mask_iou(independent_scenes, segmenter)
    assert mean >= minimum
    assert count > 800


def test_tracking_is_accurate_on_independent_clips(photos):
    """J&F as DAVIS 2017 defines it (empty against empty counts as 1), HOTA and switches by trackeval."""
    from tracking import evaluate_tracking

    pytest.importorskip("trackeval")
    means = evaluate_tracking(8, photos, [], seed=321)
    # On 20 clips without photos (`benchmarks/tracking.py`) J&F is 0.80 and HOTA 0.81; photos are harder.
    assert means["J&F"] >= 0.68
    assert means["HOTA"] >= 0.68
    assert means["IDSW"] <= 1.0
