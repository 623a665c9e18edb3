"""COCO files as input: good ones replayed exactly, bad entries named, the rest intact."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from grounded_sam import ConfigError, GroundedSamError, ImageError
from grounded_sam.config.build import build, build_sinks, build_source
from grounded_sam.config.compose import compose
from grounded_sam.formats.coco import _wrong_counts
from grounded_sam.sources.coco import CocoSource

BAD = {
    "dangling_category_id": "there is no category 77",
    "dangling_image_id": "there is no image 999",
    "duplicate_ids": "another annotation has the id 1 too",
    "empty_segmentation": "the segmentation is empty",
    "nan_bbox": "four finite numbers",
    "outside_image": "reaches outside the 800x600 px image",
    "rle_wrong_size": r"its RLE is of size \[10, 10\]",
    "short_polygon": "at least three points",
}


def replay(path, output, *more):
    cfg = compose(["source=coco", f"input='{path}'", "sink=coco", *more])
    source, model = build_source(cfg), build(cfg)
    words = source.vocabulary
    summary = model.run(source, build_sinks(cfg, output, words), output, words)
    return summary, COCO(output / "annotations.json")


def test_a_real_file_comes_back_with_its_ids_boxes_and_masks(data, tmp_path):
    path = data / "coco_nuts" / "instances.json"
    before = COCO(path)
    summary, after = replay(path, tmp_path)
    assert not summary.skipped and after.dataset["categories"] == before.dataset["categories"]
    old = [a for i in before.imgs for a in before.loadAnns(before.getAnnIds(i))]
    new = [a for i in after.imgs for a in after.loadAnns(after.getAnnIds(i))]
    assert len(new) == len(old)
    by_place = {(after.imgs[a["image_id"]]["file_name"], a["category_id"], tuple(a["bbox"])): a for a in new}
    for annotation in old:
        name = before.imgs[annotation["image_id"]]["file_name"]
        same = by_place[name, annotation["category_id"], tuple(annotation["bbox"])]
        assert np.array_equal(after.annToMask(same), before.annToMask(annotation))


def test_pixels_are_read_only_when_asked_for(data):
    path = data / "coco_nuts" / "instances.json"
    frames = list(CocoSource(path))
    assert frames[0].image.shape[:2] == frames[0].size_hw
    missing = list(CocoSource(path, images=data / "photos"))
    with pytest.raises(ImageError, match=r"no such file; source.images"):
        _ = missing[0].image


@pytest.mark.parametrize("name", BAD)
def test_a_bad_entry_is_named_and_the_rest_is_there(data, tmp_path, name):
    good = json.loads((data / "coco_nuts" / "instances.json").read_text())
    bad = json.loads((data / "malformed" / "coco" / f"{name}.json").read_text())
    alone, _ = replay(data / "malformed" / "coco" / f"{name}.json", tmp_path / "alone")
    assert len(alone.skipped) == 1
    # The bad entries among good ones of other images.
    rest = [a for a in good["annotations"] if a["image_id"] != 0]
    kept = [{**a, "id": a["id"] + 1000} for a in rest]
    (tmp_path / "both.json").write_text(json.dumps({**good, "annotations": [*kept, *bad["annotations"]]}))
    summary, after = replay(tmp_path / "both.json", tmp_path / "both")
    notes = [s for s in summary.skipped if s.file.startswith("annotation")]
    expected = "no mask, where others" if name == "empty_segmentation" else BAD[name]
    assert len(notes) == 1
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(notes[0].reason)
    assert sum(after.imgs[a["image_id"]]["file_name"] != "0.jpg" for a in after.anns.values()) == len(rest)


def test_what_is_no_coco_file_is_refused_in_words(data, tmp_path):
    with pytest.raises(ConfigError, match="truncated.json is not valid JSON"):
        CocoSource(data / "malformed" / "coco" / "truncated.json")
    for content, says in (
        ([1], "expected an object"),
        ({"images": [], "annotations": []}, "expected a list under 'categories'"),
        ({"images": [{"id": 1}], "annotations": [], "categories": []}, "names no class"),
        ({"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}, "an image needs id"),
    ):
        (tmp_path / "x.json").write_text(json.dumps(content))
        with pytest.raises(GroundedSamError, match=says):
            CocoSource(tmp_path / "x.json")


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 5))
def test_counts_are_judged_as_pycocotools_reads_them(pixels, cut):
    mask = np.asfortranarray(np.array(pixels, np.uint8)[:, None])
    counts = coco_mask.encode(mask)["counts"].decode()
    assert _wrong_counts(counts, len(pixels)) is None
    assert _wrong_counts(counts, len(pixels) + 1) is not None
    shorter = counts[: len(counts) - cut]
    assert cut == 0 or _wrong_counts(shorter, len(pixels)) is not None


def test_stored_boxes_can_get_other_masks(data, tmp_path):
    path = data / "coco_nuts" / "instances.json"
    with pytest.raises(ConfigError, match=r"detector.masks=false"):
        build(compose(["source=coco", f"input='{path}'", "segmenter=sam2", "preset=shapes"]))
    summary, after = replay(path, tmp_path, "segmenter=sam2", "detector.masks=false", "preset=shapes")
    before = COCO(path)
    assert len(after.anns) == len(before.anns) and not summary.skipped
    assert all("mask_score" in a for a in after.anns.values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bbox": None}, None),
        ({"track_id": None, "score": None}, None),
        ({"score": float("nan")}, "score must be a finite number from 0 to 1"),
        ({"score": 97}, "score must be a finite number from 0 to 1, got 97"),
        ({"image_id": [1]}, r"there is no image \[1\]"),
        ({"category_id": {}}, "there is no category {}"),
        ({"id": [1]}, "the id must be a number"),
    ],
)
def test_odd_entries_are_used_or_noted_and_never_stop_the_rest(data, tmp_path, change, says):
    content = json.loads((data / "coco_nuts" / "instances.json").read_text())
    content["annotations"][5] |= change
    (tmp_path / "x.json").write_text(json.dumps(content))
    summary, after = replay(tmp_path / "x.json", tmp_path)
    assert len(after.anns) == 78 - bool(says)
    notes = [s.reason for s in summary.skipped if s.file.startswith("annotation")]
    assert len(notes) == bool(says)
    if says:
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(notes[0])


def test_categories_that_a_detector_could_not_tell_apart_are_still_labels(data, tmp_path):
    content = json.loads((data / "coco_nuts" / "instances.json").read_text())
    content["categories"][1] |= {"name": "Date", "supercategory": None}
    (tmp_path / "x.json").write_text(json.dumps(content))
    _, after = replay(tmp_path / "x.json", tmp_path)
    assert [c["name"] for c in after.dataset["categories"]] == ["date", "Date", "hazelnut"]
