"""Tests of COCO files as input: valid ones are replayed exactly, invalid entries are named and the others used."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from grounded_sam import ConfigError, GroundedSamError, ImageError
from grounded_sam.config.build import build, build_sinks, build_source
from grounded_sam.config.compose import compose
from grounded_sam.formats.segmentations import all_counts_problem, counts_problem
from grounded_sam.pipeline.runner import Runner
from grounded_sam.sources.coco import CocoSource
from grounded_sam.structures.request import Request

BAD = {
    "dangling_category_id": "there is no category 77",
    "dangling_image_id": "there is no image 999",
    "duplicate_ids": "another annotation has the same id 1",
    "empty_segmentation": "the segmentation is empty",
    "nan_bbox": "four finite numbers",
    "outside_image": "extends outside the 800x600 px image",
    "rle_wrong_size": r"its RLE has the size \[10, 10\]",
    "short_polygon": "at least three points",
}


def replay(path, output, *overrides):
    """Write a COCO file anew with the command's stages; return the summary and the new file."""
    cfg = compose(["source=coco", f"input='{path}'", "sink=coco", *overrides])
    source, model = build_source(cfg), build(cfg)
    vocabulary = source.vocabulary
    summary = Runner(model, source, build_sinks(cfg, output, vocabulary), output, Request.for_classes(vocabulary)).run()
    return summary, COCO(output / "annotations.json")


def test_a_real_file_keeps_its_ids_boxes_and_masks(data, tmp_path):
    path = data / "coco_nuts" / "instances.json"
    before = COCO(path)
    summary, after = replay(path, tmp_path)
    assert not summary.skipped and after.dataset["categories"] == before.dataset["categories"]
    old = [a for i in before.imgs for a in before.loadAnns(before.getAnnIds(i))]
    new = [a for i in after.imgs for a in after.loadAnns(after.getAnnIds(i))]
    assert len(new) == len(old)
    by_box = {(after.imgs[a["image_id"]]["file_name"], a["category_id"], tuple(a["bbox"])): a for a in new}
    for annotation in old:
        name = before.imgs[annotation["image_id"]]["file_name"]
        same = by_box[name, annotation["category_id"], tuple(annotation["bbox"])]
        assert np.array_equal(after.annToMask(same), before.annToMask(annotation))


def test_pixels_are_read_only_when_needed(data):
    path = data / "coco_nuts" / "instances.json"
    frames = list(CocoSource(path))
    assert frames[0].image.shape[:2] == frames[0].size_hw
    missing = list(CocoSource(path, images=data / "photos"))
    with pytest.raises(ImageError, match=r"no such file; set source.images"):
        _ = missing[0].image


@pytest.mark.parametrize("name", BAD)
def test_an_invalid_entry_is_named_and_the_others_are_used(data, tmp_path, name):
    good = json.loads((data / "coco_nuts" / "instances.json").read_text())
    bad = json.loads((data / "malformed" / "coco" / f"{name}.json").read_text())
    alone, _ = replay(data / "malformed" / "coco" / f"{name}.json", tmp_path / "alone")
    assert len(alone.skipped) == 1
    # The invalid entries among valid ones of other images.
    others = [a for a in good["annotations"] if a["image_id"] != 0]
    renumbered = [{**a, "id": a["id"] + 1000} for a in others]
    (tmp_path / "both.json").write_text(json.dumps({**good, "annotations": [*renumbered, *bad["annotations"]]}))
    summary, after = replay(tmp_path / "both.json", tmp_path / "both")
    notes = [s for s in summary.skipped if s.file.startswith("annotation")]
    expected = "no mask, although other" if name == "empty_segmentation" else BAD[name]
    assert len(notes) == 1
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(notes[0].reason)
    assert sum(after.imgs[a["image_id"]]["file_name"] != "0.jpg" for a in after.anns.values()) == len(others)


def test_files_that_are_not_coco_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="truncated.json is not valid JSON"):
        CocoSource(data / "malformed" / "coco" / "truncated.json")
    for content, message in (
        ([1], "expected an object"),
        ({"images": [], "annotations": []}, "expected a list under 'categories'"),
        ({"images": [{"id": 1}], "annotations": [], "categories": []}, "names no class"),
        ({"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}, "file_name must be text"),
    ):
        (tmp_path / "x.json").write_text(json.dumps(content))
        with pytest.raises(GroundedSamError, match=message):
            CocoSource(tmp_path / "x.json")


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 5))
def test_rle_counts_are_checked_as_pycocotools_reads_them(pixels, cut):
    mask = np.asfortranarray(np.array(pixels, np.uint8)[:, None])
    counts = coco_mask.encode(mask)["counts"].decode()
    assert counts_problem(counts, len(pixels)) is None
    assert counts_problem(counts, len(pixels) + 1) is not None
    assert all_counts_problem([counts, counts, counts], len(pixels)) is None
    shorter = counts[: len(counts) - cut]
    assert cut == 0 or counts_problem(shorter, len(pixels)) is not None


def test_masks_can_be_made_anew_for_the_boxes_of_a_file(data, tmp_path):
    path = data / "coco_nuts" / "instances.json"
    with pytest.raises(ConfigError, match=r"detector.masks=false"):
        build(compose(["source=coco", f"input='{path}'", "segmenter=sam2", "preset=shapes"]))
    summary, after = replay(path, tmp_path, "segmenter=sam2", "detector.masks=false", "preset=shapes")
    before = COCO(path)
    assert len(after.anns) == len(before.anns) and not summary.skipped
    assert all("mask_score" in a for a in after.anns.values())


@pytest.mark.parametrize(
    ("change", "message"),
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
def test_unusual_entries_are_used_or_noted(data, tmp_path, change, message):
    content = json.loads((data / "coco_nuts" / "instances.json").read_text())
    content["annotations"][5] |= change
    (tmp_path / "x.json").write_text(json.dumps(content))
    summary, after = replay(tmp_path / "x.json", tmp_path)
    assert len(after.anns) == 78 - bool(message)
    notes = [s.reason for s in summary.skipped if s.file.startswith("annotation")]
    assert len(notes) == bool(message)
    if message:
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(notes[0])


def test_category_names_may_differ_only_in_case(data, tmp_path):
    content = json.loads((data / "coco_nuts" / "instances.json").read_text())
    content["categories"][1] |= {"name": "Date", "supercategory": None}
    (tmp_path / "x.json").write_text(json.dumps(content))
    _, after = replay(tmp_path / "x.json", tmp_path)
    assert [c["name"] for c in after.dataset["categories"]] == ["date", "Date", "hazelnut"]


@pytest.mark.parametrize(
    "name",
    [
        "images\\a.png",
        "C:\\data\\a.png",
        "../../media/a.png",
        "/data/upload/1/ab12cd34-a.png",
        "/data/a.png",
    ],
)
def test_images_are_found_in_the_folder_that_the_message_asks_for(name, tmp_path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "labels").mkdir()
    image = {"id": 1, "file_name": name, "width": 30, "height": 20}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    path = tmp_path / "labels" / "instances.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ImageError, match=r"set source.images to the folder that has (ab12cd34-)?a.png"):
        next(iter(CocoSource(path))).image  # noqa: B018
    frame = next(iter(CocoSource(path, images=tmp_path)))
    assert frame.image.shape == (20, 30, 3) and frame.file == tmp_path / "a.png"


def test_two_images_do_not_lead_to_one_file(tmp_path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    images = [{"id": i, "file_name": f"{i}\\a.png", "width": 30, "height": 20} for i in range(2)]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}))
    with pytest.raises(ConfigError, match=r"both lead to .*a.png; set source.images"):
        list(CocoSource(path))
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        (tmp_path / "a.png").replace(tmp_path / str(i) / "a.png")
        (tmp_path / "a.png").write_bytes((tmp_path / str(i) / "a.png").read_bytes())
    assert [frame.file.parent.name for frame in CocoSource(path)] == ["0", "1"]
