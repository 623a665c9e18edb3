"""What `segment`, `detect` and `track` return: detections that draw, describe and export themselves."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import typing

import numpy as np
import pytest
import supervision as sv
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter
from PIL import Image, ImageShow
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from grounded_sam import ConfigError, GroundedSamError, ImageError, Select, load
from grounded_sam.media.draw import draw_detections
from grounded_sam.media.labels import place_labels
from grounded_sam.pipeline.select import SelectOptions
from grounded_sam.sinks.overlay import OverlaySink
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.image_detections import ImageDetections
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

TEXT = ["red shape", "blue shape", "green shape", "yellow shape"]


@pytest.fixture(scope="module")
def scene(scenes):
    return scenes[0]


@pytest.fixture(scope="module")
def found(shapes, scene):
    detections = shapes.segment(scene.image, TEXT)
    assert len(detections) >= 2
    return detections


def plain(detections):
    """Return the same detections as `supervision.Detections`."""
    fields = {field.name: getattr(detections, field.name) for field in dataclasses.fields(sv.Detections)}
    return sv.Detections(**fields)


def test_results_are_detections_of_supervision(found):
    assert isinstance(found, sv.Detections) and found == plain(found)
    rows = np.arange(len(found)) % 2 == 0
    assert found[rows] == plain(found)[rows]
    assert found[0] == plain(found)[0] and found[:1] == plain(found)[:1]
    assert np.array_equal(found["class_name"], plain(found)["class_name"])
    assert found.with_nms(0.5) == plain(found).with_nms(0.5)
    assert sv.Detections.merge([found, found]) == sv.Detections.merge([plain(found)] * 2)
    assert [row[0].tolist() for row in found] == found.xyxy.tolist()
    for annotator in (sv.BoxAnnotator(), sv.MaskAnnotator(), sv.HaloAnnotator(), sv.LabelAnnotator()):
        blank = np.zeros_like(found.frame.image)
        drawn = [annotator.annotate(blank.copy(), detections) for detections in (found, plain(found))]
        assert np.array_equal(*drawn)


def test_selections_and_merges_keep_the_image(found, shapes, scenes):
    parts = [
        found[:1],
        found[np.arange(len(found)) > 0],
        found.with_nms(0.5),
        copy.copy(found),
        found[found.xyxy[:, 0] < 0],
    ]
    for part in parts:
        assert isinstance(part, ImageDetections) and part.frame is found.frame and part.vocabulary == found.vocabulary
    merged = ImageDetections.merge([found[:1], found[1:]])
    assert merged == found and merged.frame is found.frame
    mixed = ImageDetections.merge([found, shapes.segment(scenes[1].image, TEXT)])
    assert mixed.frame is None and mixed._repr_png_() is None
    with pytest.raises(GroundedSamError, match="no single image"):
        mixed.plot()
    with pytest.raises(GroundedSamError, match="no single image"):
        mixed.to_coco()
    assert ImageDetections.merge([]).frame is None
    restored = pickle.loads(pickle.dumps(found))
    assert restored == found and np.array_equal(restored.plot(), found.plot())


def test_results_describe_themselves_in_one_line(found, folder):
    shapes = load(preset="shapes")
    assert repr(found[:0]) == "ImageDetections(image-0, 260x200 px: nothing found)"
    one = shapes.segment(folder / "0.png", TEXT, top_k=1)
    assert repr(one) == f"ImageDetections(0.png, 260x200 px: 1 {one['class_name'][0]})"
    assert repr(shapes) == (
        "Pipeline(detector=GroundingDino on cpu, segmenter=Sam2 on cpu, tracker=loaded with the first video)"
    )
    results = shapes.track([found.frame.image] * 2, TEXT)
    first = next(results)
    results.close()
    assert repr(first) == f"FrameResult(image-0: {len(first.detections)} objects)"
    assert "tracker=Sam2Tracker on cpu" in repr(shapes)
    frame = Frame(pixels=found.frame.image, video="clip.mp4", index=5, time_s=0.2083)
    assert repr(FrameResult(frame=frame, detections=found[:1])) == "FrameResult(clip.mp4, frame 5, 0.21 s: 1 object)"


def test_a_notebook_shows_the_picture(found):
    shown, _ = DisplayFormatter().format(found)
    assert shown["text/plain"] == repr(found)
    picture = Image.open(io.BytesIO(shown["image/png"]))
    assert picture.size == (260, 200) and np.array_equal(np.asarray(picture), found.plot())


def test_results_of_a_video_draw_themselves(shapes, scene):
    results = shapes.track([scene.image] * 2, TEXT)
    result = next(results)
    results.close()
    assert result.detections.plot().shape == scene.image.shape
    assert set(result.detections.to_pandas()["tracker_id"]) == set(result.detections.tracker_id)


def test_save_and_show(found, tmp_path, monkeypatch):
    path = found.save(tmp_path / "new" / "drawn.png", labels=False)
    assert np.array_equal(np.asarray(Image.open(path)), found.plot(labels=False))
    assert not np.array_equal(found.plot(labels=False), found.plot())
    with pytest.raises(GroundedSamError, match=r"ends with \.png or \.jpg, got 'drawn\.txt'"):
        found.save(tmp_path / "drawn.txt")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["drawn.png"]
    shown = []

    class Recorder(ImageShow.Viewer):
        def show(self, image, **options):
            shown.append(np.asarray(image))
            return True

    monkeypatch.setattr(ImageShow, "_viewers", [Recorder()])
    found.show()
    assert np.array_equal(shown[0], found.plot())


def test_a_table_has_a_row_per_detection(found):
    table = found.to_pandas()
    assert len(table) == len(found) and not table.isna().any(axis=None)
    assert table["class_name"].tolist() == found["class_name"].tolist()
    assert np.array_equal(table[["x_min", "y_min", "x_max", "y_max"]], found.xyxy)
    assert table["area"].tolist() == found.mask.sum((1, 2)).tolist()
    assert np.array_equal(table["confidence"], found.confidence)
    assert np.array_equal(table["mask_score"], found.data["mask_score"])
    assert len(found[:0].to_pandas()) == 0 and list(found[:0].to_pandas()) == list(table)


def test_pycocotools_reads_what_to_coco_returns(found, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(found.to_coco()))
    coco = COCO(tmp_path / "one.json")
    masks = np.stack([coco.annToMask(annotation) for annotation in coco.anns.values()]).astype(bool)
    assert np.array_equal(masks, found.mask)
    names = [coco.cats[annotation["category_id"]]["name"] for annotation in coco.anns.values()]
    assert names == found["class_name"].tolist()
    assert coco_mask.area(coco.annToRLE(coco.anns[1])) == found.mask[0].sum()


def test_a_call_can_change_the_selection(shapes, scene):
    loose = shapes.segment(scene.image, TEXT, score=0.05, nms=None)
    usual = shapes.segment(scene.image, TEXT)
    assert len(loose) > len(usual)
    assert shapes.segment(scene.image, TEXT, score=0.05, nms=None, top_k=2) == loose[:2]
    none = shapes.segment(scene.image, TEXT, class_score=dict.fromkeys(TEXT, 1.0))
    assert len(none) == 0
    assert len(shapes.detect(scene.image, TEXT, score=0.05, top_k=1)) == 1
    assert shapes.segment(scene.image, TEXT) == usual  # the pipeline keeps its own settings
    alone = load("select.score=0.05", "select.nms=null", preset="shapes").segment(scene.image, TEXT)
    assert alone == loose


def test_a_wrong_selection_is_named(shapes, scene):
    with pytest.raises(
        ConfigError, match=r"unknown setting 'scor'; the settings of select are score, class_score, nms"
    ):
        shapes.segment(scene.image, TEXT, scor=0.2)
    with pytest.raises(ConfigError, match=r"select\.score must be a number from 0 to 1, got 2"):
        shapes.detect(scene.image, TEXT, score=2)
    with pytest.raises(ConfigError, match="unknown classes: 'rad shape'"):
        shapes.segment(scene.image, TEXT, class_score={"rad shape": 0.2})
    assert set(typing.get_type_hints(SelectOptions)) == {field.name for field in dataclasses.fields(Select)}


def test_results_of_a_list_keep_no_pixels(shapes, folder):
    files = [folder / "0.png", folder / "1.png"]
    results = shapes.segment(files, TEXT)
    assert all(callable(result.frame.pixels) for result in results)
    assert np.array_equal(results[1].plot(), shapes.segment(files[1], TEXT).plot())
    files[0].unlink()
    assert repr(results[0]).startswith("ImageDetections(0.png, 260x200 px: ")
    with pytest.raises(ImageError, match=r"0\.png"):
        results[0].plot()


def draw(names, xyxy, size_hw=(60, 80), **options):
    """Draw detections with masks that fill their boxes over a gray image."""
    vocabulary = Vocabulary.parse(list(dict.fromkeys(names)))
    masks = np.zeros((len(names), *size_hw), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, xyxy, strict=True):
        mask[y1:y2, x1:x2] = True
    detections = sv.Detections(
        xyxy=np.array(xyxy, np.float32),
        mask=masks,
        confidence=np.ones(len(names), np.float32),
        class_id=np.array([vocabulary.classes.index(name) for name in names]),
        data={"class_name": np.array(names)},
    )
    gray = np.full((*size_hw, 3), 100, np.uint8)
    return draw_detections(gray, detections, palette=vocabulary.palette(), **options)


def test_a_class_is_drawn_in_the_color_that_its_name_contains():
    drawn = draw(["Red car", "blue car", "car"], [(5, 5, 30, 50), (40, 5, 70, 25), (40, 35, 70, 55)], labels=False)
    red, blue = drawn[30, 15].astype(int), drawn[15, 55].astype(int)
    assert red[0] > red[1] and blue[2] > blue[0]
    assert np.allclose(red, 100 + 0.3 * (np.array([220, 40, 40]) - 100), atol=2)  # light, so that the object is seen
    own = Vocabulary.parse({"classes": {"red car": {"colour": "#00ff00"}, "scared cat": {}}}).palette()
    assert own[0] == "#00ff00" and own[1] == sv.ColorPalette.DEFAULT.by_idx(1).as_hex()


def test_tracks_are_drawn_in_the_colors_of_their_classes_if_all_have_one(tmp_path):
    for names, by_class in ((["red car", "blue car"], True), (["red car", "car"], False)):
        vocabulary = Vocabulary.parse(names)
        assert vocabulary.has_own_colors == by_class
        assert (OverlaySink(tmp_path, vocabulary).color_by == "class") == by_class
        detections = sv.Detections(
            np.array([[5, 5, 30, 50]], np.float32),
            np.pad(np.ones((1, 45, 25), bool), ((0, 0), (5, 10), (5, 50))),
            np.ones(1),
            np.zeros(1, int),
            np.array([3]),
            {"class_name": np.array(names[:1])},
        )
        frame = Frame(pixels=np.full((60, 80, 3), 100, np.uint8))
        drawn = ImageDetections.of(detections, frame, vocabulary).plot(labels=False)
        assert np.allclose(drawn[30, 15], 100 + 0.3 * (np.array([220, 40, 40]) - 100), atol=2) == by_class


def test_the_outline_is_seen_on_an_object_of_the_same_color():
    image = np.full((60, 80, 3), (50, 80, 220), np.uint8)
    mask = np.zeros((1, 60, 80), bool)
    mask[0, 20:40, 20:60] = True
    detections = sv.Detections(np.array([[20, 20, 60, 40]]), mask, np.ones(1), np.zeros(1, int))
    drawn = draw_detections(image, detections, palette=["#3250dc"], labels=False, boxes=False)
    assert (drawn == 255).all(2).any() and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 1


@pytest.mark.parametrize("name", ["white dog", "black dog", "yellow dog", "blue dog"])
def test_text_contrasts_with_its_background(name):
    drawn = draw([name], [(10, 30, 70, 55)], masks=False, boxes=False)
    label = drawn[15:29, 12:70].reshape(-1, 3).astype(int)
    brightness = label @ [0.299, 0.587, 0.114]
    assert np.ptp(brightness) > 90


@settings(max_examples=60)
@given(st.data())
def test_no_label_covers_another_where_there_is_room(data):
    count = data.draw(st.integers(1, 25))
    corner = st.tuples(st.integers(0, 380), st.integers(0, 280), st.integers(1, 400), st.integers(1, 300))
    boxes = np.array(
        [(x, y, min(x + w, 400), min(y + h, 300)) for x, y, w, h in (data.draw(corner) for _ in range(count))]
    )
    sizes = np.array([(data.draw(st.integers(10, 90)), 16) for _ in range(count)])
    left, top = place_labels(boxes, sizes, (400, 300)).T
    right, bottom = left + sizes[:, 0], top + sizes[:, 1]
    assert (left >= 0).all() and (top >= 0).all() and (right <= 400).all() and (bottom <= 300).all()
    for i in range(count):
        others = np.arange(count) != i
        overlaps = (left < right[i]) & (left[i] < right) & (top < bottom[i]) & (top[i] < bottom)
        assert not (overlaps & others).any()


def test_labels_overlap_where_there_is_no_room_and_stay_inside():
    corners = place_labels(np.array([[0, 0, 20, 20]] * 9), np.array([[30, 15]] * 9), (40, 20))
    assert (corners >= 0).all() and (corners <= (10, 5)).all()
    assert place_labels(np.array([[0, 0, 5, 5]]), np.array([[90, 30]]), (40, 20)).tolist() == [[0, 0]]
