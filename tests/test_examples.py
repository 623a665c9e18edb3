"""Examples of classes: images, boxes, masks, folders, COCO files and stores; and what a detector makes of them."""

from __future__ import annotations

import json

import checkpoints
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_review import edit, ids_of, label

from grounded_sam import ConfigError, ImageError, Vocabulary, load
from grounded_sam.detectors.owlv2 import Owlv2
from grounded_sam.formats.examples import read_example_classes, read_examples
from grounded_sam.structures.frame import Frame

WHERE = "detector.examples"


@pytest.fixture
def table(tmp_path):
    """An image of 60x40 px with a red rectangle, and its mask, in which the rectangle lacks a row."""
    image = np.full((40, 60, 3), 200, np.uint8)
    image[10:20, 5:25] = (220, 20, 20)
    mask = np.zeros((40, 60), np.uint8)
    mask[11:20, 5:25] = 255
    Image.fromarray(image).save(tmp_path / "table.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def coco(table):
    """A COCO file with two cups and an ignored one, and a class without objects."""
    (table / "images").mkdir()
    (table / "table.png").rename(table / "images" / "table.png")
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [5, 10, 20, 10], "segmentation": [[5, 10, 25, 10, 25, 20]]},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [30, 0, 10, 40], "segmentation": [[30, 0, 40, 0, 40, 40]]},
        {"id": 3, "image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1}
        | {"segmentation": [[0, 0, 9, 0, 9, 9]]},
    ]
    content = {
        "images": [{"id": 1, "file_name": "upload/table.png", "width": 60, "height": 40}],
        "categories": [{"id": 3, "name": "cup"}, {"id": 4, "name": "spoon"}],
        "annotations": annotations,
    }
    path = table / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_images_boxes_masks_and_folders(table):
    entries = [
        str(table / "table.png"),
        {"image": str(table / "table.png"), "box": [5, 10, 25, 20]},
        {"image": str(table / "table.png"), "mask": str(table / "mask.png")},
    ]
    whole, boxed, masked = read_examples(entries, f"{WHERE}.cup")
    assert whole.box.tolist() == [0, 0, 60, 40] and whole.crop().shape == (40, 60, 3)
    assert (boxed.crop() == (220, 20, 20)).all() and boxed.crop().shape == (10, 20, 3)
    assert masked.box.tolist() == [5, 11, 25, 20]
    both = {"image": str(table / "table.png"), "box": [5, 10, 25, 20], "mask": str(table / "mask.png")}
    (example,) = read_examples(both, f"{WHERE}.cup")
    assert (example.crop()[0] == 127).all() and (example.crop()[1:] == (220, 20, 20)).all()
    crops = table / "examples"
    for name in ("cup/a.png", "cup/b.jpg", "!bowl/c.png"):
        (crops / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(crops / name)
    (crops / "cup" / "notes.txt").write_text("no image")
    examples = read_example_classes(str(crops), None, WHERE)
    assert {name: len(found) for name, found in examples.classes.items()} == {"cup": 2}
    assert len(examples.negatives) == 1
    assert len(read_examples(str(crops / "cup"), f"{WHERE}.cup")) == 2


def test_objects_of_a_coco_file(coco):
    (first, second) = read_examples({"coco": str(coco)}, f"{WHERE}.cup", "Cup")
    assert second.crop().shape == (40, 10, 3)
    crop = first.crop()  # the lower left of the rectangle is outside of its triangle
    assert crop.shape == (10, 20, 3) and (crop[-1, 0] == 127).all() and (crop[0, 10] == (220, 20, 20)).all()
    assert first.image.shape[0] < 40 and first.image.shape[1] < 60  # only what is near is kept
    assert len(read_examples({"coco": str(coco), "class": "cup", "limit": 1}, f"{WHERE}.mug", "mug")) == 1
    assert list(read_example_classes(str(coco), None, WHERE).classes) == ["cup"]
    moved = coco.parent / "elsewhere"
    (coco.parent / "images").rename(moved)
    with pytest.raises(ConfigError, match=r"instances.json names upload/table.png, which is not in .*; set images to"):
        read_examples({"coco": str(coco)}, f"{WHERE}.cup", "cup")
    assert len(read_examples({"coco": str(coco), "images": str(moved)}, f"{WHERE}.cup", "cup")) == 2
    with pytest.raises(ConfigError, match=r"has no class 'mug'; it has 'cup', 'spoon'"):
        read_examples({"coco": str(coco)}, f"{WHERE}.mug", "mug")
    with pytest.raises(ConfigError, match="has no usable object of class 'spoon'"):
        read_examples({"coco": str(coco)}, f"{WHERE}.spoon", "spoon")
    Image.new("RGB", (61, 40)).save(moved / "table.png")
    with pytest.raises(ConfigError, match="has 61x40 px, but 60x40 px in instances.json"):
        read_examples({"coco": str(coco), "images": str(moved)}, f"{WHERE}.cup", "cup")


def test_reviewed_objects_of_a_store(folder, tmp_path):
    output = tmp_path / "labels"
    label(folder, output)
    with pytest.raises(ConfigError, match=r"no object of class 'a' that is accepted or edited or added; it has 4 pred"):
        read_examples({"store": str(output)}, f"{WHERE}.a", "a")
    with pytest.raises(ConfigError, match="nobody has accepted, edited or added an object of"):
        read_example_classes(str(output), None, WHERE)
    first, second = ids_of(output, "0.png")
    edit(output, {"object_id": first, "action": "accept"}, {"object_id": second, "action": "reject"})
    examples = read_example_classes(str(output), None, WHERE)
    assert {name: len(found) for name, found in examples.classes.items()} == {"a": 1}
    (example,) = examples.classes["a"]
    original = np.asarray(Image.open(folder / "0.png").convert("RGB"))
    x1, y1, x2, y2 = (int(v) for v in example.box)
    height, width = example.image.shape[:2]
    # What is around the object comes from the image it is in.
    assert any(
        np.array_equal(original[y : y + height, x : x + width], example.image)
        for y in range(original.shape[0] - height + 1)
        for x in range(original.shape[1] - width + 1)
    )
    assert example.mask is not None and example.mask[y1:y2, x1:x2].any()
    assert len(read_examples({"store": str(output), "status": ["predicted"]}, f"{WHERE}.a", "a")) == 3
    with pytest.raises(ConfigError, match="has no class 'mug'; it has"):
        read_examples({"store": str(output)}, f"{WHERE}.mug", "mug")
    with pytest.raises(ConfigError, match=r"status must be some of predicted, accepted, edited, added, got 'rejected'"):
        read_examples({"store": str(output), "status": "rejected"}, f"{WHERE}.a", "a")
    (folder / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"examples.a: 0.png of .*0.png"):
        read_examples({"store": str(output)}, f"{WHERE}.a", "a")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "has no example"),
        ([], "has no example"),
        (7, "expected an image or .*a folder, {coco: ...} or {store: ...}, got 7"),
        ({"box": [1, 2, 3, 4]}, "expected an image or"),
        ({"image": "TABLE"}, "expected an image or"),
        ({"image": "TABLE", "box": [1, 2, 3, 4], "label": "x"}, "unknown key 'label'; the keys are box, image, mask"),
        ({"image": "TABLE", "box": [1, 2, 3]}, "expected a box"),
        ({"image": "TABLE", "box": [1, 2, "3", None]}, "expected a box"),
        ({"image": "TABLE", "box": [1, 2, float("nan"), 4]}, "expected a box"),
        ({"image": "TABLE", "box": [9, 2, 3, 4]}, "lies outside"),
        ({"image": "TABLE", "box": [60, 0, 70, 10]}, "lies outside .*table.png, which is 60x40 px"),
        ({"image": "TABLE", "mask": "EMPTY"}, "expected a mask of 60x40 px .*got an empty one"),
        ({"image": "TABLE", "mask": "SMALL"}, "expected a mask of 60x40 px .*got 8x6 px"),
        ({"coco": "gone.json"}, "cannot read gone.json"),
        ({"coco": "TABLE", "limit": 0}, "limit must be null or an integer >= 1"),
        ({"store": "gone"}, "no store in gone"),
        ("NOTHING", "has no images; it has"),
    ],
)
def test_malformed_examples_are_refused(entry, message, table):
    Image.new("RGB", (60, 40)).save(table / "empty.png")
    Image.new("RGB", (8, 6), "white").save(table / "small.png")
    (table / "nothing").mkdir()
    paths = {"TABLE": "table.png", "EMPTY": "empty.png", "SMALL": "small.png", "NOTHING": "nothing"}

    def fill(value):
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        return str(table / paths[value]) if isinstance(value, str) and value in paths else value

    with pytest.raises(ConfigError, match=message):
        read_examples(fill(entry), f"{WHERE}.cup", "cup")


def test_images_that_cannot_be_read_and_wrong_forms(table, tmp_path):
    with pytest.raises(ImageError, match="gone.png"):
        read_examples("gone.png", f"{WHERE}.cup")
    with pytest.raises(ConfigError, match="must map classes to examples, or be a folder"):
        read_example_classes([1], None, WHERE)
    with pytest.raises(ConfigError, match="no such file or folder: gone"):
        read_example_classes("gone", None, WHERE)
    (tmp_path / "flat").mkdir()
    with pytest.raises(ConfigError, match="has no folders; expected a folder of images for each class"):
        read_example_classes(str(tmp_path / "flat"), None, WHERE)
    crop = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ConfigError, match="has look-alikes, but no examples of a class"):
        read_example_classes({"!cup": crop}, None, WHERE)
    with pytest.raises(ConfigError, match=r"detector.negative_examples\[1\]: expected an image"):
        read_example_classes({"cup": crop}, [crop, 7], WHERE)
    with pytest.raises(ConfigError, match="expected an RGB array"):
        read_examples(np.zeros((4, 4)), WHERE)


@given(st.lists(st.one_of(st.integers(-99, 99), st.floats(), st.text(max_size=2), st.none()), max_size=5))
def test_any_box_gives_a_crop_or_an_error_of_one_line(box):
    image = np.zeros((40, 60, 3), np.uint8)
    try:
        (example,) = read_examples({"image": image, "box": box}, f"{WHERE}.cup")
    except ConfigError as error:
        assert "box" in str(error) and "\n" not in str(error)
    else:
        assert example.crop().size and example.with_context().crop().shape == example.crop().shape


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
    return checkpoints.owlv2(tmp_path_factory.mktemp("models") / "owlv2")


def test_owlv2_takes_examples_of_a_coco_file_and_negative_ones(owlv2, coco, tmp_path):
    rng = np.random.default_rng(0)
    frame = Frame(pixels=rng.integers(0, 256, (80, 120, 3)).astype(np.uint8))
    cups = read_examples({"coco": str(coco)}, WHERE, "cup")
    arrays = {"cup": [example.crop() for example in cups]}
    by_array = Owlv2(str(owlv2), examples=arrays)
    by_file = Owlv2(str(owlv2), examples={"cup": {"coco": str(coco)}})
    first, second = (detector.detect([frame], detector.vocabulary)[0] for detector in (by_array, by_file))
    np.testing.assert_allclose(second.confidence, first.confidence, atol=1e-6)
    assert len(first) > 10
    # A look-alike that equals an example takes some of its patches, since their scores are the same at best.
    other = Owlv2(str(owlv2), examples=arrays, negative_examples=rng.integers(0, 256, (30, 30, 3)).astype(np.uint8))
    fewer = other.detect([frame], other.vocabulary)[0]
    kept = {tuple(box) for box in fewer.xyxy.round(3).tolist()}
    assert len(fewer) < len(first) and kept <= {tuple(box) for box in first.xyxy.round(3).tolist()}
    with pytest.raises(ConfigError, match="detector.examples name classes that are not in text: 'cup'; text has 'car'"):
        by_file.detect([frame], Vocabulary.parse(["car"]))


def test_examples_across_images_need_a_model_that_can(tmp_path):
    with pytest.raises(ConfigError, match="SAM 3 compares with boxes in the same image"):
        load("detector=sam3", "checkpoints.sam3=./no", "detector.examples={cup: [cup.jpg]}")
