"""Features of pictures kept for many prompts and for later runs."""

from __future__ import annotations

import os

import checkpoints
import numpy as np
import pytest
import torch

from grounded_sam import ConfigError, ImageError, load
from grounded_sam.segmenters.feature_cache import FeatureCache
from grounded_sam.shapes.scenes import make_scene

CLICK = {"class": "it", "points": [[60, 50]]}
BOX = {"class": "it", "box": [20, 20, 120, 110]}


@pytest.fixture(scope="module")
def pictures():
    return [make_scene(np.random.default_rng(seed)).image for seed in (1, 2)]


@pytest.fixture(scope="module")
def hq(tmp_path_factory):
    return str(checkpoints.sam_hq(tmp_path_factory.mktemp("hq")))


@pytest.fixture(params=["sam", "sam2", "sam2_hf", "sam_hq"])
def words(request, hq):
    extra = [f"checkpoints.sam_hq='{hq}'"] if request.param == "sam_hq" else []
    return ["preset=shapes", f"segmenter={request.param}", "device=cpu", "detector=clicks", *extra]


def by_hand(words, entry, *more):
    return load(*words, *more, **{"detector.prompts": [entry]})


def counted(model, monkeypatch):
    """How often the image encoder ran."""
    calls = []
    encode = model.segmenter._encode
    monkeypatch.setattr(model.segmenter, "_encode", lambda image: calls.append(1) or encode(image))
    return calls


def test_prompts_of_a_session_are_those_of_a_run_each(words, pictures, monkeypatch):
    expected = [
        by_hand(words, entry, "select.min_area=0").segment(picture) for picture in pictures for entry in (CLICK, BOX)
    ]
    model = by_hand(words, CLICK)
    calls = counted(model, monkeypatch)
    with model.session(pictures[0]) as first, model.session(pictures[1]) as second:
        got = [session.segment([entry]) for session in (first, second) for entry in (CLICK, BOX)]
        both = first.segment([CLICK, BOX])
    assert len(calls) == 2
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)
        np.testing.assert_allclose(a.data["mask_score"], b.data["mask_score"], atol=1e-6)
    assert len(both) == 2 and both.mask.shape[1:] == pictures[0].shape[:2]
    with pytest.raises(ValueError, match="closed"):
        first.segment([CLICK])


def test_a_later_run_reads_what_an_earlier_one_kept(words, pictures, tmp_path, monkeypatch):
    folder = f"cache.folder='{tmp_path / 'kept'}'"
    first = by_hand(words, BOX, folder)
    expected = first.segment(pictures[0])
    later = by_hand(words, BOX, folder)
    calls = counted(later, monkeypatch)
    got = later.segment(pictures[0])
    assert calls == []
    np.testing.assert_array_equal(got.mask, expected.mask)
    later.segment(pictures[1])
    assert len(calls) == 1


def test_other_weights_and_other_pictures_are_others(pictures, tmp_path, monkeypatch):
    folder = f"cache.folder='{tmp_path}'"
    words = ["preset=shapes", "device=cpu", "detector=clicks"]
    by_hand(words, BOX, folder).segment(pictures[0])
    changed = by_hand(words, BOX, folder)
    with torch.no_grad():
        next(changed.segmenter.model.parameters()).add_(1e-3)
    calls = counted(changed, monkeypatch)
    changed.segment(pictures[0])
    flipped = np.ascontiguousarray(pictures[0][:, ::-1])
    changed.segment(flipped)
    assert len(calls) == 2


def test_each_precision_has_features_of_its_own(pictures, tmp_path):
    words, folder = ["preset=shapes", "device=cpu", "detector=clicks"], f"cache.folder='{tmp_path}'"
    for precision in ("exact", "balanced", "fast"):
        by_hand(words, BOX, folder, f"precision={precision}").segment(pictures[0])
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_file_is_as_good_as_none(pictures, tmp_path, monkeypatch):
    words, folder = ["preset=shapes", "device=cpu", "detector=clicks"], f"cache.folder='{tmp_path}'"
    expected = by_hand(words, BOX, folder).segment(pictures[0])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    again = by_hand(words, BOX, folder)
    calls = counted(again, monkeypatch)
    np.testing.assert_array_equal(again.segment(pictures[0]).mask, expected.mask)
    assert len(calls) == 1 and again.segmenter.embeddings.misses == 1
    np.testing.assert_array_equal(again.segment(pictures[0]).mask, expected.mask)
    assert len(calls) == 1 and again.segmenter.embeddings.hits == 1


def test_the_bound_holds_and_what_was_used_last_stays(tmp_path):
    kept = FeatureCache(tmp_path, gigabytes=3.5e-4)  # three of these
    for i in range(3):
        kept.put(str(i), {"a": [torch.full((25_000,), float(i))], "size": (3, 4), "none": None})
        os.utime(tmp_path / f"{i}.safetensors", ns=(i, i))
    got = kept.get("0", "cpu")
    assert got["size"] == (3, 4) and got["none"] is None and got["a"][0][7] == 0
    kept.put("3", {"a": torch.zeros(25_000)})
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["0", "2", "3"]
    kept.put("4", {"a": torch.zeros(250_000)})  # larger than the bound, and all there is
    assert [path.stem for path in tmp_path.iterdir()] == ["4"]


def test_mistakes_are_named(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"cache\.gigabytes must be a number above 0, got 0"):
        load(f"cache.folder='{tmp_path}'", "cache.gigabytes=0", preset="shapes")
    with pytest.raises(ConfigError, match=r"cache\.folder keeps what a segmenter makes"):
        load(f"cache.folder='{tmp_path}'", "segmenter=none", preset="shapes")
    with pytest.raises(ConfigError, match="a session needs a segmenter"):
        load("segmenter=none", preset="shapes").session(pictures[0])
    session = load(preset="shapes").session(pictures[0])
    with pytest.raises(ImageError, match="lie outside"):
        session.segment([{"class": "it", "points": [[5000, 3]]}])
    with pytest.raises(ConfigError, match="give points, a box or a mask"):
        session.segment([{"class": "it"}])
