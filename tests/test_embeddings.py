"""Image features: encoded once for the prompts of a session, and cached for later runs."""

from __future__ import annotations

import os

import checkpoints
import numpy as np
import pytest
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from grounded_sam import ConfigError, ImageError, load
from grounded_sam.segmenters.feature_cache import FeatureCache
from grounded_sam.segmenters.sam2 import fit_predictor
from grounded_sam.shapes.scenes import make_scene

CLICK = {"class": "it", "points": [[60, 50]]}
BOX = {"class": "it", "box": [20, 20, 120, 110]}
#: Overrides of the tests that need only one segmenter.
SHAPES = ["preset=shapes", "device=cpu", "detector=clicks"]


@pytest.fixture(scope="module")
def images():
    return [make_scene(np.random.default_rng(seed)).image for seed in (1, 2)]


@pytest.fixture(scope="module")
def hq(tmp_path_factory):
    return str(checkpoints.sam_hq(tmp_path_factory.mktemp("hq")))


@pytest.fixture(params=["sam", "sam2", "sam2_hf", "sam_hq"])
def overrides(request, hq):
    extra = [f"checkpoints.sam_hq='{hq}'"] if request.param == "sam_hq" else []
    return ["preset=shapes", f"segmenter={request.param}", "device=cpu", "detector=clicks", *extra]


def load_with_prompt(overrides, entry, *more):
    return load(*overrides, *more, **{"detector.prompts": [entry]})


def count_encodings(model, monkeypatch):
    """Return a list that gets an entry whenever the segmenter encodes an image."""
    calls = []
    set_image = model.segmenter._set_image
    monkeypatch.setattr(model.segmenter, "_set_image", lambda image: calls.append(1) or set_image(image))
    return calls


def test_results_of_a_session_equal_those_of_a_run_per_prompt(overrides, images, monkeypatch):
    expected = [
        load_with_prompt(overrides, entry, "select.min_area=0").segment(image)
        for image in images
        for entry in (CLICK, BOX)
    ]
    model = load_with_prompt(overrides, CLICK)
    calls = count_encodings(model, monkeypatch)
    with model.session(images[0]) as first, model.session(images[1]) as second:
        results = [session.segment([entry]) for session in (first, second) for entry in (CLICK, BOX)]
        both = first.segment([CLICK, BOX])
    assert len(calls) == 2
    for actual, single in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual.mask, single.mask)
        np.testing.assert_allclose(actual.data["mask_score"], single.data["mask_score"], atol=1e-6)
    assert len(both) == 2 and both.mask.shape[1:] == images[0].shape[:2]
    with pytest.raises(ValueError, match="closed"):
        first.segment([CLICK])


def test_a_later_run_reads_the_features_of_an_earlier_one(overrides, images, tmp_path, monkeypatch):
    cache = f"cache.folder='{tmp_path / 'cache'}'"
    expected = load_with_prompt(overrides, BOX, cache).segment(images[0])
    later = load_with_prompt(overrides, BOX, cache)
    calls = count_encodings(later, monkeypatch)
    actual = later.segment(images[0])
    assert calls == []
    np.testing.assert_array_equal(actual.mask, expected.mask)
    later.segment(images[1])
    assert len(calls) == 1


def test_other_weights_or_images_do_not_hit_the_cache(images, tmp_path, monkeypatch):
    cache = f"cache.folder='{tmp_path}'"
    load_with_prompt(SHAPES, BOX, cache).segment(images[0])
    changed = load_with_prompt(SHAPES, BOX, cache)
    with torch.no_grad():
        next(changed.segmenter.model.parameters()).add_(1e-3)
    calls = count_encodings(changed, monkeypatch)
    changed.segment(images[0])
    flipped = np.ascontiguousarray(images[0][:, ::-1])
    changed.segment(flipped)
    assert len(calls) == 2


def test_each_precision_has_its_own_features(images, tmp_path):
    for precision in ("exact", "balanced", "fast"):
        load_with_prompt(SHAPES, BOX, f"cache.folder='{tmp_path}'", f"precision={precision}").segment(images[0])
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_file_counts_as_a_miss_and_is_replaced(images, tmp_path, monkeypatch):
    expected = load_with_prompt(SHAPES, BOX, f"cache.folder='{tmp_path}'").segment(images[0])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    model, cache = load_with_prompt(SHAPES, BOX), FeatureCache(tmp_path)
    model.segmenter.use_feature_cache(cache)
    calls = count_encodings(model, monkeypatch)
    np.testing.assert_array_equal(model.segment(images[0]).mask, expected.mask)
    assert len(calls) == 1 and cache.misses == 1
    np.testing.assert_array_equal(model.segment(images[0]).mask, expected.mask)
    assert len(calls) == 1 and cache.hits == 1


def test_the_least_recently_used_files_are_deleted_first(tmp_path):
    cache = FeatureCache(tmp_path, gigabytes=3.5e-4)  # room for three of these files
    for i in range(3):
        cache.put(str(i), {"a": [torch.full((25_000,), float(i))], "size": (3, 4), "none": None})
        os.utime(tmp_path / f"{i}.safetensors", ns=(i, i))
    features = cache.get("0", "cpu")
    assert features["size"] == (3, 4) and features["none"] is None and features["a"][0][7] == 0
    cache.put("3", {"a": torch.zeros(25_000)})
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["0", "2", "3"]
    cache.put("4", {"a": torch.zeros(250_000)})  # too large on its own
    assert [path.stem for path in tmp_path.iterdir()] == ["4"]


def test_a_correction_is_prompted_with_the_logits_of_the_mask_it_corrects():
    """As the demos of SAM and SAM 2 do: `mask_input=logits[scores.argmax()]` of the three masks of the first click."""
    scene = make_scene(np.random.default_rng(3), count=3)
    (x1, y1, x2, y2), (other_x, other_y) = scene.xyxy[0].tolist(), scene.xyxy[1, :2].tolist()
    points = [[(x1 + x2) / 2, (y1 + y2) / 2], [other_x, other_y]]
    first = {"class": "it", "points": points[:1]}
    second = {"class": "it", "points": points, "labels": [1, 0]}
    model = load(preset="shapes", segmenter="sam2", device="cpu")
    predictor = fit_predictor(SAM2ImagePredictor(model.segmenter.model), model.segmenter.model)
    predictor.set_image(scene.image)
    _, scores, logits = predictor.predict(np.array(points[:1]), np.array([1]), multimask_output=True)
    prompt = {"point_coords": np.array(points), "point_labels": np.array([1, 0]), "multimask_output": False}
    expected, expected_score, _ = predictor.predict(**prompt, mask_input=logits[scores.argmax()][None])
    alone, alone_score, _ = predictor.predict(**prompt)
    with model.session(scene.image) as session:
        session.segment([first])
        corrected = session.segment([second])
        assert "prompt_logits" not in corrected.data
    with model.session(scene.image) as session:
        without = session.segment([second])
    for result, mask, score in ((corrected, expected, expected_score), (without, alone, alone_score)):
        assert (result.mask[0] != mask[0].astype(bool)).mean() < 1e-4
        assert result.data["mask_score"][0] == pytest.approx(score[0], abs=1e-4)
    assert corrected.data["mask_score"][0] != pytest.approx(without.data["mask_score"][0], abs=1e-4)


def test_errors_of_cache_and_session_name_the_mistake(images, tmp_path):
    with pytest.raises(ConfigError, match=r"cache\.gigabytes must be a number > 0, got 0"):
        load(f"cache.folder='{tmp_path}'", "cache.gigabytes=0", preset="shapes")
    with pytest.raises(ConfigError, match=r"cache\.folder needs a segmenter"):
        load(f"cache.folder='{tmp_path}'", "segmenter=none", preset="shapes")
    with pytest.raises(ConfigError, match="a session needs a segmenter"):
        load("segmenter=none", preset="shapes").session(images[0])
    session = load(preset="shapes").session(images[0])
    with pytest.raises(ImageError, match="lie outside"):
        session.segment([{"class": "it", "points": [[5000, 3]]}])
    with pytest.raises(ConfigError, match="expected points, a box or a mask"):
        session.segment([{"class": "it"}])
