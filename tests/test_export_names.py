"""Names of images and classes in exports, and labels that a format cannot hold: crowds, ids, roots of taxonomies."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from fakes import boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree
from PIL import Image

from grounded_sam import ConfigError, Vocabulary
from grounded_sam.files import UniqueNames, encode_controls, percent_encode, safe_filename
from grounded_sam.formats.coco import CocoFile
from grounded_sam.formats.yolo import read_yolo
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.cvat import CvatSink
from grounded_sam.sinks.label_studio import LabelStudioSink
from grounded_sam.sinks.labelme import LabelMeSink
from grounded_sam.sinks.masks import MasksSink
from grounded_sam.sinks.overlay import OverlaySink
from grounded_sam.sinks.report import ReportSink
from grounded_sam.sinks.voc import VocSink
from grounded_sam.sinks.yolo import YoloSink
from grounded_sam.structures.detections import make_detections, with_masks
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult, Skipped

CONTROLS = "".join(map(chr, [*range(1, 32), 0x7F, 0x85, 0x2028, 0xFFFE]))


def make_result(name: str = "a.png", vocabulary: Vocabulary | None = None, **columns) -> FrameResult:
    """Make an image with an object of the first class (a disc), and one of the last."""
    words = vocabulary or Vocabulary.parse(["a", "b", "c"])
    y, x = np.mgrid[:60, :80]
    masks = np.array([(x - 25) ** 2 + (y - 30) ** 2 < 400, x >= 50])
    found = make_detections([[5, 10, 46, 51], [50, 0, 80, 60]], [0.9, 0.6], [0, len(words) - 1], words, (60, 80))
    found = with_masks(found, masks, np.ones(2, np.float32))
    for key, values in columns.items():
        found.data[key] = np.array(values)
    return FrameResult(frame=Frame(pixels=np.zeros((60, 80, 3), np.uint8), name=name), detections=found)


def write(sink, *results: FrameResult):
    with sink:
        for result in results:
            sink.write(result)
    return sink


@given(st.text(min_size=1))
def test_encoded_file_names_can_be_decoded(name):
    safe = safe_filename(name)
    assert not set(safe) & set('<>:"/\\|?*\0\n') and safe not in (".", "..") and len(safe.encode()) < 250
    if "~" not in safe:
        assert unquote(safe) == name


@given(st.text(), st.text())
def test_different_texts_are_encoded_differently(a, b):
    assert (encode_controls(a) == encode_controls(b)) == (a == b)
    assert unquote(percent_encode(a, "[/b]")) == a


PARTS = st.sampled_from(["a", "A", "a.png", "a.txt", "a.json", "b", "images", "labels", "%69mages", "x" * 300])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), unique=True, max_size=8))
def test_images_beside_folders_of_their_names_are_all_written(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("out")
    results = [make_result(name) for name in names]
    for sink in (LabelMeSink(folder, VOCABULARY), YoloSink(folder, VOCABULARY), OverlaySink(folder, VOCABULARY)):
        write(sink, *results)
    for mode in ("objects", "labels"):
        write(MasksSink(folder / mode, VOCABULARY, mode=mode), *results)
    for written in ("labelme/*.json", "yolo/labels/*.txt", "overlay/*.jpg", "labels/masks/*.png"):
        root, _, pattern = written.rpartition("/")
        assert sum(path.is_file() for path in (folder / root).rglob(pattern)) == len(names)
    if names:
        images = read_yolo(folder / "yolo" / "data.yaml")
        assert len(images["images"]) == len(names) and len(images["annotations"]) == 2 * len(names)
        recorded = json.loads((folder / "yolo" / ".names").read_text())
        assert sorted(recorded.values()) == sorted(names)


VOCABULARY = Vocabulary.parse(["a", "b", "c"])


def test_an_image_keeps_its_path_in_later_runs(tmp_path):
    write(YoloSink(tmp_path, VOCABULARY), make_result("a.png"), make_result("a.jpg"))
    empty = make_result("a.jpg")
    empty.raw.class_id[:] = 2
    write(YoloSink(tmp_path, VOCABULARY), empty)
    labels = tmp_path / "yolo" / "labels" / "train"
    assert [line.split()[0] for line in (labels / "a-2.txt").read_text().splitlines()] == ["2", "2"]
    assert (labels / "a.txt").read_text().startswith("0 ")
    (tmp_path / "yolo" / ".names").write_text('{"../../x": "a.png"}')
    with pytest.raises(ConfigError, match=r"\.names must map the path of each image file"):
        write(YoloSink(tmp_path, VOCABULARY), make_result("a.png"))


def test_folders_called_images_keep_their_labels(tmp_path):
    write(YoloSink(tmp_path / "images" / "x", VOCABULARY), make_result("images/a.png"), make_result("b/images/c.png"))
    folder = tmp_path / "images" / "x" / "yolo"
    for image in (folder / "images").rglob("*.png"):
        before, _, after = str(image).rpartition("/images/")  # as ultralytics finds the labels of an image
        assert Path(f"{before}/labels/{after}").with_suffix(".txt").is_file()
    assert len(read_yolo(folder / "data.yaml")["annotations"]) == 4


@pytest.mark.parametrize("name", ["a\nb", f"x{CONTROLS}y", "yes", "#1: 'bolt'", '"', "汽车 😀", "a%0Ab", "=1+1"])
def test_names_of_classes_come_back_from_every_export(tmp_path, name):
    words = Vocabulary((name, "other"), (("word",), ("other",)))
    result = make_result(f"a{CONTROLS}.png", words)
    for sink_class in (YoloSink, VocSink, LabelMeSink, LabelStudioSink, CvatSink, CocoSink):
        write(sink_class(tmp_path, words), result)
    write(MasksSink(tmp_path, words), result)
    assert yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text())["names"] == {0: name, 1: "other"}
    for path in (tmp_path / "voc" / "classes.txt", tmp_path / "labelme" / "labels.txt"):
        assert [unquote(line) for line in path.read_text().splitlines()] == [name, "other"]
    (voc,) = (tmp_path / "voc" / "Annotations").glob("*.xml")
    assert [unquote(node.text) for node in etree.parse(str(voc)).iterfind("object/name")] == [name, "other"]
    cvat = etree.parse(str(tmp_path / "cvat.xml"))
    assert [unquote(node.text) for node in cvat.iterfind("meta/task/labels/label/name")] == [name, "other"]
    assert [unquote(node.get("label")) for node in cvat.iterfind("image/mask")] == [name, "other"]
    assert unquote(cvat.find("image").get("name")) == result.frame.name
    config = etree.parse(str(tmp_path / "label_studio" / "config.xml"))
    assert [unquote(node.get("value")) for node in config.iterfind("PolygonLabels/Label")] == [name, "other"]
    masks = sorted((tmp_path / "masks").rglob("*.png"))
    assert [unquote(path.stem.partition("_")[2]) for path in masks if path.is_file()] == [name, "other"]


def test_no_text_of_the_review_list_is_a_formula(tmp_path):
    names = ['=HYPERLINK("x")', "+1.png", "-1.png", "@a", "'quoted.png", "plain.png"]
    words = Vocabulary(("=1+1",), (("word",),))
    with ReportSink(tmp_path, words, duplicates=False) as sink:
        for name in names:
            sink.write(make_result(name, words))
        sink.skip(Skipped("=cmd", "-broken"))
    rows = list(csv.DictReader((tmp_path / "review.csv").open(newline="")))
    cells = [cell for row in rows for cell in row.values()]
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    assert {row["file"].removeprefix("'") for row in rows} == {*names, "=cmd"}


def test_crowds_stay_crowds_or_are_named(tmp_path):
    result = make_result(iscrowd=[False, True])
    sink = write(YoloSink(tmp_path, VOCABULARY), result)
    assert len((tmp_path / "yolo/labels/train/a.txt").read_text().splitlines()) == 1
    (note,) = sink.skipped
    assert "left out 1 crowd" in note.reason and "sink=coco" in note.reason
    assert not write(YoloSink(tmp_path / "b", VOCABULARY), make_result()).skipped
    write(VocSink(tmp_path, VOCABULARY), result)
    tree = etree.parse(str(tmp_path / "voc/Annotations/a.xml"))
    assert [node.text for node in tree.iterfind("object/difficult")] == ["0", "1"]
    write(LabelMeSink(tmp_path, VOCABULARY), result)
    shapes = json.loads((tmp_path / "labelme/a.json").read_text())["shapes"]
    assert [shape["flags"] for shape in shapes] == [{}, {"crowd": True}]
    write(CocoSink(tmp_path, VOCABULARY), result)  # the advice
    annotations = json.loads((tmp_path / "annotations.json").read_text())["annotations"]
    assert [a["iscrowd"] for a in annotations] == [0, 1]


IDS = st.sampled_from([0, 1, 7, 253, 254, 255, 256, 999, 1000, 65_535, 65_536, 70_000])


def track_map(ids, folder: Path, mode: str) -> tuple[MasksSink, list[int]]:
    found = boxes(*((10 * i, 0, 10 * i + 10, 10, 0.9, i % 3) for i in range(len(ids))))
    masks = np.zeros((len(ids), 100, 100), bool)
    for i in range(len(ids)):
        masks[i, :10, 10 * i : 10 * i + 10] = True
    found.mask, found.tracker_id = masks, np.array(ids, np.int64)
    frame = Frame(pixels=np.zeros((100, 100, 3), np.uint8), name="v.mp4/000000", video="v.mp4", time_s=0.0)
    sink = write(MasksSink(folder, VOCABULARY, mode=mode), FrameResult(frame=frame, detections=found))
    picture = np.asarray(Image.open(folder / "masks" / "v.mp4" / "000000.png"))
    return sink, [int(picture[0, 10 * i]) for i in range(len(ids))]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.sampled_from([0, 1, 7, 253, 254, 255, 256, 999, 1000, 65_535, 65_536, 70_000]), unique=True, min_size=1
    ),
    st.sampled_from(["davis", "mots"]),
)
def test_every_track_has_a_value_that_readers_keep(tmp_path_factory, ids, mode):
    ids = ids[:10]
    folder = tmp_path_factory.mktemp("maps")
    sink, values = track_map(ids, folder, mode)
    values = [value - 1000 * (i % 3 + 1) for i, value in enumerate(values)] if mode == "mots" else values
    assert len(set(values)) == len(ids) and 0 not in values and (mode == "mots" or 255 not in values)
    table = folder / "masks" / "v.mp4" / "tracks.csv"
    changed = {i: v for i, v in zip(ids, values, strict=True) if i != v}
    listed = {int(r["track_id"]): int(r["value"]) for r in csv.DictReader(table.open())} if table.is_file() else {}
    assert listed == changed and bool(sink.skipped) == bool(changed)


def test_ids_with_room_stay_as_they_are(tmp_path):
    assert track_map([7, 300], tmp_path, "davis")[1] == [7, 300]


def test_mots_refuses_more_classes_than_it_has_room_for(tmp_path):
    words = Vocabulary.parse([f"thing{i}" for i in range(70)])
    with pytest.raises(ConfigError, match="room for 64 classes, got 70"):
        MasksSink(tmp_path, words, mode="mots")
    MasksSink(tmp_path, words, mode="davis")  # the advice


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([(0, "star", "none"), (1, "star", "star"), (2, "disc", "star")], ("star", "disc")),
        ([(0, "things", "none"), (1, "bolt", "things")], ("bolt",)),
        ([(7, "things", None), (1, "bolt", "things")], ("bolt",)),
        ([(1, "person", "person")], ("person",)),
        ([(1, "animal", "none"), (2, "dog", "animal"), (3, "car", "vehicle")], ("animal", "dog", "car")),
        ([(5, "used", "none"), (1, "bolt", "used")], ("used", "bolt")),
    ],
)
def test_the_root_of_a_taxonomy_is_no_class(tmp_path, entries, expected):
    categories = [{"id": i, "name": name, "supercategory": group} for i, name, group in entries]
    annotations = [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [0, 0, 5, 5]}]
    images = [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    assert CocoFile(path).vocabulary.classes == expected
    assert Vocabulary.parse(str(path)).classes == expected


def test_polygons_can_be_simplified(tmp_path):
    def points(tolerance: float) -> list[int]:
        folder = tmp_path / str(tolerance)
        for kind, options in ((CocoSink, {"segmentation": "polygon"}), (YoloSink, {}), (LabelMeSink, {})):
            write(kind(folder, VOCABULARY, tolerance=tolerance, **options), make_result())
        write(CvatSink(folder, VOCABULARY, shape="polygon", tolerance=tolerance), make_result())
        write(LabelStudioSink(folder, VOCABULARY, tolerance=tolerance), make_result())
        coco = json.loads((folder / "annotations.json").read_text())["annotations"][0]["segmentation"][0]
        yolo = (folder / "yolo/labels/train/a.txt").read_text().splitlines()[0].split()[1:]
        labelme = json.loads((folder / "labelme/a.json").read_text())["shapes"][0]["points"]
        cvat = etree.parse(str(folder / "cvat.xml")).find("image/polygon").get("points").split(";")
        regions = json.loads((folder / "label_studio/tasks.json").read_text())[0]["predictions"][0]["result"]
        return [len(coco) // 2, len(yolo) // 2, len(labelme), len(cvat), len(regions[0]["value"]["points"])]

    for exact, few in zip(points(0), points(2.0), strict=True):
        assert 3 <= few < exact / 2
    with pytest.raises(ConfigError, match=r"sink\.yolo\.tolerance"):
        YoloSink(tmp_path, VOCABULARY, tolerance=-1)


def test_label_studio_says_that_it_needs_a_storage_and_how_to_start(tmp_path):
    sink = write(LabelStudioSink(tmp_path / "it's", VOCABULARY), make_result())
    folder = (tmp_path / "it's" / "label_studio").resolve()
    assert "Local Files storage, see" in sink.summary()
    text = (folder / "README.txt").read_text()
    assert "LOCAL_FILES_SERVING_ENABLED=true" in text and str(folder / "images") in text
    url = json.loads((folder / "tasks.json").read_text())[0]["data"]["image"]
    assert (folder / unquote(url.partition("?d=")[2])).is_file()
    other = write(LabelStudioSink(tmp_path / "b", VOCABULARY, url="https://x/{name}"), make_result())
    assert "storage" not in other.summary() and not (tmp_path / "b" / "label_studio" / "README.txt").exists()


def test_a_name_of_a_folder_is_numbered_only_where_a_file_has_it():
    names = UniqueNames()
    assert [str(names(name, "")) for name in ("a", "a/b", "a.v/c", "a.txt/d")] == ["a", "a/b", "a.v/c", "a.txt-2/d"]
    assert str(names("a.txt/e/f/g", "")) == "a.txt-2/e/f/g"


PLAIN = st.text("ab1_-", min_size=1, max_size=5)


@given(st.lists(PLAIN, min_size=1, max_size=5).map("/".join))
def test_plain_names_are_paths(name):
    assert UniqueNames()(name, "").as_posix() == name
    assert UniqueNames()(name, ".png").as_posix() == f"{name}.png"


def test_printable_names_of_images_are_not_changed_for_cvat(tmp_path):
    names = ["foo%20bar.png", "ü 名/100%.png"]
    write(CvatSink(tmp_path, VOCABULARY), *map(make_result, names))
    assert [node.get("name") for node in etree.parse(str(tmp_path / "cvat.xml")).iterfind("image")] == names
