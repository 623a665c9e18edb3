"""Labels from files: no number, size or nesting in them crashes the interpreter, takes all memory or ends a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from command import run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from grounded_sam import ConfigError, GroundedSamError, ImageError, Vocabulary
from grounded_sam.errors import VocabularyError
from grounded_sam.formats.coco import CocoFile
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.formats.segmentations import cut_polygons, decode_segmentation, segmentation_problem
from grounded_sam.formats.video_masks import LabelledVideos
from grounded_sam.sources.coco import CocoSource
from grounded_sam.sources.tracks import LabelledVideoSource

#: Numbers that have crashed readers of labels, and what is none.
NUMBERS = [0, -1, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -1e308, float("nan"), float("inf"), -float("inf")]
VALUES = [*NUMBERS, True, None, "7", "", "\ud800", "a\0b", [], [1], {}, [[[1]]]]
numbers = st.one_of(st.sampled_from(NUMBERS), st.floats(-100, 100), st.integers(-50, 50))
values = st.one_of(st.sampled_from(VALUES), numbers)


def coco(**changes) -> dict:
    """Return a COCO file of one image with one object; changes go to the image or to the object."""
    image = {"id": 1, "file_name": "a.png", "width": 40, "height": 30}
    label = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[2, 2, 12, 2, 12, 12]], "bbox": [2, 2, 10, 10]}
    for key, value in changes.items():
        (image if key in ("file_name", "width", "height", "video", "frame", "time_s") else label)[key] = value
    return {"images": [image], "annotations": [label], "categories": [{"id": 1, "name": "cat"}]}


def uses(content: dict) -> int:
    """Read labels and decode their masks; return how many can be used, all others must be named."""
    try:
        file = CocoFile(Path("labels.json"), content=content)
    except GroundedSamError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return 0
    used = sum(len(file.detections(image)) for image in file.images)
    assert used or file.notes
    json.dumps([[note.file, note.reason] for note in file.notes], ensure_ascii=False).encode()
    return used


@given(st.sampled_from(sorted({*coco()["images"][0], *coco()["annotations"][0], "score", "track_id", "area"})), values)
@settings(max_examples=300)
def test_any_value_in_a_coco_file_is_used_or_named(key, value):
    uses(coco(**{key: value}))


@given(st.lists(st.lists(numbers, max_size=12), max_size=3), st.lists(numbers, max_size=5))
@settings(max_examples=300)
def test_any_polygon_and_box_is_used_or_named(polygons, box):
    uses(coco(segmentation=polygons, bbox=box))


@given(st.one_of(values, st.lists(values, max_size=2)), st.one_of(values, st.text("0123o?PO1", max_size=12)))
@settings(max_examples=300)
def test_any_rle_is_used_or_named(size, counts):
    uses(coco(segmentation={"size": size, "counts": counts}))
    uses(coco(segmentation={"size": [30, 40], "counts": counts}))


@given(st.lists(st.tuples(st.integers(-400, 400), st.integers(-400, 400)), min_size=3, max_size=8))
def test_cutting_a_polygon_keeps_its_mask(points):
    polygons = [[float(value) for point in points for value in point]]
    cut = cut_polygons(polygons, (30, 40))
    assert all(-40 <= value <= 80 for polygon in cut for value in polygon)
    whole = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 30, 40)))
    mask = decode_segmentation(cut, (30, 40)) if cut else np.zeros((30, 40), bool)
    # An edge that is cut may be rounded to the other side of a pixel.
    assert np.logical_xor(mask, whole).sum() <= 2 * len(points) + 0.05 * 30 * 40


def test_a_polygon_that_reaches_far_outside_keeps_what_is_inside():
    far = [[2, 2, 12, 2, 12, 2**63, 2, 2**63]]
    assert segmentation_problem(far, (30, 40)) is None
    assert decode_segmentation(far, (30, 40)).sum() == 28 * 10
    assert "outside the 40x30 px image" in segmentation_problem([[50, 2, 60, 2, 60, 9]], (30, 40))
    zigzag = [[value for i in range(2000) for value in (i % 2 * 12000, i)]]
    assert "outline of its polygons is 24," in segmentation_problem(zigzag, (12000, 12000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 2**64}, "18446744073709551616x30 px is more than the 150,000,000 pixels allowed"),
        ({"height": True}, "width and height must be integers"),
        ({"file_name": "\ud800.png"}, r"file_name must be text, got '\\ud800.png'"),
        ({"file_name": None}, "file_name must be text, got None"),
        ({"frame": 1.5, "video": "v"}, "frame must be a number from 0, got 1.5"),
    ],
)
def test_a_bad_image_is_left_out_with_its_labels_and_the_others_are_used(change, message):
    content = coco(**change)
    with pytest.raises(ConfigError, match=message):
        CocoFile(Path("labels.json"), content=content)
    good = coco()
    content["images"].append({**good["images"][0], "id": 2})
    content["annotations"].append({**good["annotations"][0], "id": 2, "image_id": 2})
    file = CocoFile(Path("labels.json"), content=content)
    assert [note.file for note in file.notes] == ["image 1"] and len(file.detections(file.images[0])) == 1


def test_larger_images_are_allowed_when_the_setting_is_raised():
    content = coco(segmentation=[], width=100, height=100)
    with pytest.raises(ConfigError, match=r"source.max_pixels"):
        CocoFile(Path("x.json"), content=content, max_pixels=9999)
    assert len(CocoFile(Path("x.json"), content=content, max_pixels=10000).images) == 1


def test_declared_sizes_are_compared_with_the_images_that_are_there(tmp_path):
    content = coco()
    content["images"] += [{"id": 2, "file_name": "x" * 300, "width": 4, "height": 4}]
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert len(list(CocoSource(tmp_path / "x.json"))) == 2
    Image.new("RGB", (41, 30)).save(tmp_path / "a.png")
    source = CocoSource(tmp_path / "x.json")
    frames = list(source)
    assert [note.file for note in source.skipped] == ["a.png"]
    assert "has 41x30 px, but 40x30 px in x.json" in source.skipped[0].reason
    with pytest.raises(ImageError, match="no such file"):
        _ = frames[0].image


def youtube_vis(**changes) -> dict:
    video = {"id": 1, "file_names": ["v/0.jpg"], "width": 40, "height": 30}
    track = {"id": 1, "video_id": 1, "category_id": 1, "segmentations": [{"size": [30, 40], "counts": [600, 600]}]}
    for key, value in changes.items():
        (video if key in ("width", "height", "file_names") else track)[key] = value
    return {"videos": [video], "annotations": [track], "categories": [{"id": 1, "name": "cat"}]}


def decodes(path: Path, content: dict) -> None:
    """Read labels of videos and decode their masks; any problem must be one line."""
    path.write_text(json.dumps(content))
    try:
        for frame in LabelledVideoSource(path):
            assert frame.annotations is not None
    except GroundedSamError as error:
        assert "\n" not in str(error)


@given(st.sampled_from(["width", "height", "file_names", "id", "track_id", "video_id", "segmentations"]), values)
@settings(max_examples=200)
def test_any_value_in_a_youtube_vis_file_is_used_or_named(tmp_path_factory, key, value):
    decodes(tmp_path_factory.getbasetemp() / "y.json", youtube_vis(**{key: value}))


@given(st.sampled_from(["size", "counts", "masklet_id", "video_frame_count", "video_id"]), values)
@settings(max_examples=200)
def test_any_value_in_an_sa_v_file_is_used_or_named(tmp_path_factory, key, value):
    rle = {"size": [30, 40], "counts": "T3b01O10O1O01000000O0100000O1N00i0"}
    content = {"masklet": [[rle]], "masklet_id": [1], "video_frame_count": 1}
    (rle if key in rle else content)[key] = value
    decodes(tmp_path_factory.getbasetemp() / "s.json", content)


def test_sizes_of_video_masks_are_bounded_by_the_setting(tmp_path):
    (tmp_path / "y.json").write_text(json.dumps(youtube_vis()))
    with pytest.raises(ConfigError, match=r"40x30 px is more than the 100 pixels allowed \(source.max_pixels\)"):
        LabelledVideos(tmp_path / "y.json", max_pixels=100)


def yolo(folder: Path, labels: bytes, data_yaml: str = "train: images\nnames: [cat, 7]\n") -> Path:
    for name in ("images", "labels"):
        (folder / name).mkdir()
    Image.new("RGB", (40, 30)).save(folder / "images" / "a.png")
    (folder / "labels" / "a.txt").write_bytes(labels)
    (folder / "data.yaml").write_text(data_yaml)
    return folder


@pytest.mark.parametrize("word", [b"inf", b"nan", b"1e30", b"\xe9", b"-1e300"])
@pytest.mark.parametrize("line", [b"%s 0.1 0.1 0.5 0.1", b"0 0.1 0.1 %s 0.1", b"0 0.1 0.1 0.2 %s 0.3 0.3"])
def test_damaged_numbers_in_yolo_labels_are_named(tmp_path, line, word):
    with pytest.raises(ConfigError, match="a.txt"):
        read_ground_truth(yolo(tmp_path, line % word))


def test_polygons_of_yolo_that_reach_outside_are_cut(tmp_path):
    labels = read_ground_truth(yolo(tmp_path, b"1 0 0 1000000 0 1000000 0.5 0 0.5"))
    assert labels.vocabulary.classes == ("cat", "7")
    assert labels.detections(labels.images[0]).mask.sum() == 40 * 16
    (tmp_path / "data.yaml").write_text('train: "im\\0ages"\nnames: [a]\n')
    with pytest.raises(ConfigError, match="expected names and train"):
        read_ground_truth(tmp_path)


BOMB = "classes:\n  c0: {phrases: &a0 [y,y,y,y,y,y,y,y,y]}\n" + "".join(
    f"  c{i}: {{phrases: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "more than 1,000,000 values when its aliases are expanded"),
        (MERGES, "more than 1,000,000 values when its aliases are expanded"),
        ("a: &a [*a]", "nested more than 50 levels deep, or contains itself"),
        ("a: &a {b: *a}", "nested more than 50 levels deep, or contains itself"),
        ("a: &a0 [x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}]\n" for i in range(200)), "nested more than 50 levels"),
        ("[" * 60 + "]" * 60, "nested more than 50 levels deep"),
        ("[" * 100000, "nested too deeply"),
    ],
)
def test_yaml_is_bounded_before_it_is_expanded(tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.parse(str(tmp_path / "x.yaml"))
    with pytest.raises(ConfigError, match=message):
        read_ground_truth(tmp_path / "x.yaml")


def test_aliases_within_bounds_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("car: &words [auto, automobile]\nsaloon: [sedan, limousine]\n")
    assert Vocabulary.parse(str(tmp_path / "x.yaml")).classes == ("car", "saloon")


@pytest.mark.parametrize("depth", [60, 900, 100_000])
def test_json_is_bounded(tmp_path, depth):
    (tmp_path / "x.json").write_text("[" * depth + "]" * depth)
    with pytest.raises(VocabularyError, match=r"nested (more than|too deeply)"):
        Vocabulary.parse(str(tmp_path / "x.json"))
    nested = "[" * depth + "]" * depth
    (tmp_path / "y.json").write_text(f'{{"images": {nested}, "annotations": [], "categories": []}}')
    with pytest.raises(GroundedSamError):
        CocoSource(tmp_path / "y.json")


def test_a_pipe_in_place_of_labels_is_refused_at_once(tmp_path):
    for name in ("x.json", "x.yaml", "x.txt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(VocabularyError, match="not a file, but a pipe"):
            Vocabulary.parse(str(tmp_path / name))
    with pytest.raises(ConfigError, match="not a file, but a pipe"):
        CocoSource(tmp_path / "x.json")


def test_names_of_long_numbers_are_no_numbers(tmp_path):
    for folder in ("video/1", f"video/{'9' * 40}"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / folder / f"{'7' * 30}.png")
    frames = list(LabelledVideoSource(tmp_path))
    assert sorted(frame.video for frame in frames) == ["video", f"video/{'9' * 40}"]
    assert all(frame.index == 0 for frame in frames)


def test_the_command_names_what_it_could_not_use(tmp_path):
    content = coco(bbox=[2, 2, float("inf"), 2])
    content["annotations"].append({**coco()["annotations"][0], "id": 2})
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "x.json").write_text(json.dumps(content))
    arguments = ["source=coco", "input=x.json", "sink=coco", "output=o"]
    result = run_command("grounded_sam.cli.main", arguments, tmp_path)
    assert "annotation 1: bbox must be four finite numbers" in result.stdout
    assert len(json.loads((tmp_path / "o" / "annotations.json").read_text())["annotations"]) == 1
