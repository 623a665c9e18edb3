"""The datasets that sinks write, read with independent libraries."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
import supervision as sv
import yaml
from fakes import CLASSES, boxes
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lxml import etree
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from grounded_sam import ConfigError, Vocabulary
from grounded_sam.config.build import build_node
from grounded_sam.config.compose import compose
from grounded_sam.formats.label_studio import encode_brush
from grounded_sam.media.images import read_image
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.cvat import CvatSink
from grounded_sam.sinks.imagefolder import ImageFolderSink
from grounded_sam.sinks.label_studio import LabelStudioSink
from grounded_sam.sinks.labelme import LabelMeSink
from grounded_sam.sinks.report import ReportSink
from grounded_sam.sinks.splits import Splits
from grounded_sam.sinks.voc import VocSink
from grounded_sam.sinks.yolo import YoloSink
from grounded_sam.structures.detections import empty_detections, with_masks
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.results import FrameResult, Skipped

NAMES = ["a.png", "a.jpg", 'sub/ütf8 名前 (1) <x> & "y".png', "clip.mp4/000003"]
DATASET_SINKS = [CocoSink, YoloSink, VocSink, LabelMeSink, LabelStudioSink, CvatSink, ImageFolderSink, ReportSink]


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[FrameResult]:
    """Make three images and a video frame with a disc, a ring and an object of two parts; one image is empty."""
    folder = tmp_path_factory.mktemp("in")
    out = []
    for number, name in enumerate(NAMES):
        rng = np.random.default_rng(number)
        height, width = 120 + 10 * number, 160
        image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        masks = np.zeros((3, height, width), bool)
        y, x = np.mgrid[:height, :width]
        masks[0] = (x - 40) ** 2 + (y - 40) ** 2 < 900
        masks[1] = ((x - 115) ** 2 + (y - 45) ** 2 < 1200) & ((x - 115) ** 2 + (y - 45) ** 2 >= 300)
        masks[2, 85:110, 10:50] = masks[2, 90:119, 60:90] = True
        rows = [
            (*box, score, cls) for box, score, cls in zip(masks_to_xyxy(masks), (0.9, 0.6, 0.4), (0, 2, 0), strict=True)
        ]
        detections = with_masks(boxes(*rows, size_hw=(height, width)), masks, np.array([0.9, 0.8, 0.7], np.float32))
        video = "clip.mp4" if name.startswith("clip") else None
        path = folder / f"{number}{Path(name).suffix or '.png'}"
        Image.fromarray(image).save(path, quality=95)
        if video:
            detections.tracker_id = np.array([4, 5, 6])
        frame = Frame(
            pixels=image,
            index=3,
            name=name,
            time_s=0.1 if video else None,
            video=video,
            file=folder / "clip.mp4" if video else path,
        )
        out.append(FrameResult(frame=frame, detections=detections if number != 1 else empty_detections(CLASSES)))
    return out


def write_dataset(sink_class, results, output: Path, **options):
    with sink_class(output, CLASSES, **options) as sink:
        for result in results:
            sink.write(result)
    return sink


def count_objects(results):
    return Counter(str(name) for result in results for name in result.detections.data["class_name"])


def fill_with_pillow(points, size_hw):
    canvas = Image.new("1", size_hw[::-1])
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points], fill=1, outline=1)
    return np.array(canvas)


def test_supervision_reads_yolo_datasets(results, tmp_path):
    write_dataset(YoloSink, results, tmp_path, images="copy")
    folder = tmp_path / "yolo"
    names = yaml.safe_load((folder / "data.yaml").read_text())
    assert names == {"train": "images/train", "val": "images/train", "nc": 3, "names": {0: "a", 1: "b", 2: "c"}}
    labels = sorted(p.relative_to(folder / "labels").as_posix() for p in (folder / "labels").rglob("*.txt"))
    assert labels == [
        "train/a-2.txt",
        "train/a.txt",
        "train/clip.mp4/000003.txt",
        f"train/sub/{safe_stem(NAMES[2])}.txt",
    ]
    counts = Counter()
    for sub, result in (("", results[0]), ("sub", results[2]), ("clip.mp4", results[3])):
        images, labels = folder / "images" / "train" / sub, folder / "labels" / "train" / sub
        data = sv.DetectionDataset.from_yolo(str(images), str(labels), str(folder / "data.yaml"), force_masks=True)
        for path, _, read in data:
            assert read_image(path).shape == result.frame.image.shape or Path(path).stem == "a-2"
            if len(read):
                counts.update(data.classes[i] for i in read.class_id)
                for mask, expected in zip(read.mask, result.detections.mask, strict=True):
                    assert iou(mask, expected) > 0.97
    assert counts == count_objects(results)
    assert (folder / "labels" / "train" / "a-2.txt").read_text() == ""


def safe_stem(name: str) -> str:
    """Return the stem that a name with forbidden characters gets, encoded as in a URL."""
    return re.sub(r'[<>:"/\\|?*]', lambda match: f"%{ord(match[0]):02X}", Path(name).stem)


def test_yolo_without_masks_has_boxes(tmp_path):
    detections = boxes((10, 20, 30, 60, 0.9, 1))
    write_dataset(
        YoloSink, [FrameResult(frame=Frame(pixels=np.zeros((100, 100, 3), np.uint8)), detections=detections)], tmp_path
    )
    assert (tmp_path / "yolo/labels/train/image.txt").read_text() == "1 0.2 0.4 0.2 0.4\n"


def test_lxml_and_supervision_read_voc_datasets(results, tmp_path):
    write_dataset(VocSink, results, tmp_path, images="copy")
    folder, counts = tmp_path / "voc", Counter()
    stems = (folder / "ImageSets" / "Main" / "train.txt").read_text().split("\n")[:-1]
    assert stems == ["a", "a-2", f"sub/{safe_stem(NAMES[2])}", "clip.mp4/000003"]
    for stem, result in zip(stems, results, strict=True):
        tree = etree.parse(str(folder / "Annotations" / f"{stem}.xml"))
        height, width = result.frame.size_hw
        assert [int(tree.findtext(f"size/{key}")) for key in ("width", "height", "depth")] == [width, height, 3]
        assert (folder / tree.findtext("folder") / tree.findtext("filename")).is_file()
        if len(result.detections):
            objects = np.array(Image.open(folder / "SegmentationObject" / f"{stem}.png"))
            classes = np.array(Image.open(folder / "SegmentationClass" / f"{stem}.png"))
        for i, element in enumerate(tree.findall("object")):
            counts[element.findtext("name")] += 1
            corners = [int(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
            x1, y1, x2, y2 = result.detections.xyxy[i]
            assert corners == [x1 + 1, y1 + 1, x2, y2]
            mask = result.detections.mask[i]
            assert np.array_equal(objects == i + 1, mask)
            assert (classes[mask] == result.detections.class_id[i] + 1).all()
    assert counts == count_objects(results)
    read = sv.DetectionDataset.from_pascal_voc(str(folder / "JPEGImages"), str(folder / "Annotations"))
    assert sum(len(detections) for _, _, detections in read) == 3


def test_labelme_polygons_keep_the_masks(results, tmp_path):
    write_dataset(LabelMeSink, results, tmp_path)
    folder, counts = tmp_path / "labelme", Counter()
    for stem, result in zip(["a", "a-2", f"sub/{safe_stem(NAMES[2])}", "clip.mp4/000003"], results, strict=True):
        content = json.loads((folder / f"{stem}.json").read_text())
        assert ((folder / f"{stem}.json").parent / content["imagePath"]).exists()
        assert (content["imageHeight"], content["imageWidth"]) == result.frame.size_hw
        groups: dict = {}
        for number, shape in enumerate(content["shapes"]):
            group = shape["group_id"] if shape["group_id"] is not None else f"single {number}"
            groups.setdefault(group, []).append(shape)
        for i, shapes in enumerate(groups.values()):
            counts[shapes[0]["label"]] += 1
            mask = np.any([fill_with_pillow(shape["points"], result.frame.size_hw) for shape in shapes], 0)
            assert iou(mask, result.detections.mask[i]) > 0.97
        assert not groups or [len(shapes) for shapes in groups.values()] == [1, 1, 2]
    assert counts == count_objects(results)


def test_label_studio_tasks_have_polygons_and_brushes(results, tmp_path):
    write_dataset(LabelStudioSink, results, tmp_path, regions="both", model_version="custom 2", split={"train": 1.0})
    folder = tmp_path / "label_studio"
    tasks = json.loads((folder / "tasks.json").read_text())
    config = etree.parse(str(folder / "config.xml"))
    for kind in ("PolygonLabels", "BrushLabels"):
        control = config.find(kind)
        assert [label.get("value") for label in control] == ["a", "b", "c"]
    counts = Counter()
    for task, result in zip(tasks, results, strict=True):
        name = unquote(task["data"]["image"].removeprefix("/data/local-files/?d="))
        assert (folder / name).is_file() and task["data"]["split"] == "train"
        (prediction,) = task["predictions"]
        assert prediction["model_version"] == "custom 2"
        height, width = result.frame.size_hw
        regions = prediction["result"]
        assert [r["type"] for r in regions] == ["polygonlabels", "brushlabels"] * len(result.detections)
        for i, (polygon, brush) in enumerate(zip(regions[::2], regions[1::2], strict=True)):
            counts[polygon["value"]["polygonlabels"][0]] += 1
            points = np.array(polygon["value"]["points"])
            assert points.min() >= 0 and points.max() <= 100
            flat = (points * [width / 100, height / 100]).reshape(-1).tolist()
            mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([flat], height, width)))
            assert iou(mask.astype(bool), result.detections.mask[i]) > 0.99
            assert brush["value"]["rle"] == encode_brush(result.detections.mask[i])
            assert brush["score"] == pytest.approx(float(result.detections.confidence[i]))
    assert counts == count_objects(results)


def test_the_label_studio_sdk_accepts_the_predictions(results, tmp_path):
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason="label-studio-sdk is not installed")
    for regions in ("polygon", "brush"):
        write_dataset(LabelStudioSink, results, tmp_path / regions, regions=regions)
        folder = tmp_path / regions / "label_studio"
        label_interface = interface.LabelInterface((folder / "config.xml").read_text())
        for task in json.loads((folder / "tasks.json").read_text()):
            assert label_interface.validate_prediction(task["predictions"][0], return_errors=True) == []


def decode_brush(rle: list[int]) -> np.ndarray:
    """Decode Label Studio's RLE to bytes, step by step as `decode_rle` of its SDK does."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    position = 0

    def read(size):
        nonlocal position
        position += size
        return int(bits[position - size : position], 2)

    count, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    out, i = np.zeros(count, np.uint8), 0
    while i < count:
        run = read(1)
        end = i + 1 + read(sizes[read(2)])
        if run:
            out[i:end] = read(word)
            i = end
        else:
            while i < end:
                out[i] = read(word)
                i += 1
    return out


@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_decoded_brushes_equal_the_masks(mask):
    assert np.array_equal(decode_brush(encode_brush(mask)).reshape(*mask.shape, 4)[..., 3] > 0, mask)


def test_the_decoded_brush_of_a_large_mask_equals_it():
    mask = np.zeros((300, 400), bool)
    mask[250:, 10:390] = True
    assert np.array_equal(decode_brush(encode_brush(mask)).reshape(300, 400, 4)[..., 3] > 0, mask)


@pytest.mark.parametrize("shape", ["mask", "polygon"])
def test_cvat_files_keep_the_masks(results, tmp_path, shape):
    write_dataset(CvatSink, results, tmp_path, shape=shape)
    tree, counts = etree.parse(str(tmp_path / "cvat.xml")), Counter()
    assert [label.findtext("name") for label in tree.iterfind("meta/task/labels/label")] == ["a", "b", "c"]
    for image, result in zip(tree.findall("image"), results, strict=True):
        height, width = result.frame.size_hw
        assert image.get("name") == result.frame.name
        assert (int(image.get("width")), int(image.get("height"))) == (width, height)
        for i, element in enumerate(image.findall(shape)):
            counts[element.get("label")] += 1
            if shape == "mask":
                runs = [int(run) for run in element.get("rle").split(",")]
                x, y, w, h = (int(element.get(key)) for key in ("left", "top", "width", "height"))
                mask = np.zeros((height, width), bool)
                mask[y : y + h, x : x + w] = np.repeat(np.arange(len(runs)) % 2, runs).reshape(h, w)
            else:
                points = [float(v) for pair in element.get("points").split(";") for v in pair.split(",")]
                mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([points], height, width))).astype(bool)
            assert np.array_equal(mask, result.detections.mask[i])
            attributes = {a.get("name"): a.text for a in element.findall("attribute")}
            assert float(attributes["score"]) == pytest.approx(float(result.detections.confidence[i]))
            assert attributes.get("track_id") == (str(4 + i) if result.frame.video else None)
    assert counts == count_objects(results)


def test_an_imagefolder_has_one_row_per_image(results, tmp_path):
    write_dataset(ImageFolderSink, results, tmp_path, split={"train": 1.0, "val": 0.0})
    folder, counts = tmp_path / "imagefolder" / "train", Counter()
    rows = pq.read_table(folder / "metadata.parquet").to_pylist()
    for row, result in zip(rows, results, strict=True):
        assert (folder / row["file_name"]).is_file() and row["file"] == result.frame.name
        counts.update(row["objects"]["name"])
        for i, rle in enumerate(row["objects"]["segmentation"]):
            assert np.array_equal(
                coco_mask.decode({**rle, "counts": rle["counts"].encode()}), result.detections.mask[i]
            )
    assert counts == count_objects(results)
    assert rows[3]["objects"]["track_id"] == [4, 5, 6] and rows[0]["objects"]["track_id"] == [None] * 3


def test_the_datasets_library_loads_imagefolders(results, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    write_dataset(ImageFolderSink, results, tmp_path)
    data = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "imagefolder"), cache_dir=str(tmp_path / "c"))
    assert [row["image"].size[::-1] for row in data["train"]] == [r.frame.size_hw for r in results]


def test_coco_files_of_splits_have_the_category_ids_of_the_ontology(results, tmp_path):
    vocabulary = Vocabulary.parse({"classes": {"a": {"id": 18, "supercategory": "x"}, "b": {"id": 3}, "c": {"id": 90}}})
    split = {"train": 0.5, "val": 0.5}
    with CocoSink(tmp_path, vocabulary, split=split, images="copy") as sink:
        for result in results:
            sink.write(result)
    counts, splits = Counter(), Splits(split)
    for name in split:
        coco = COCO(tmp_path / f"annotations_{name}.json")
        assert coco.dataset["categories"][0] == {"id": 18, "name": "a", "supercategory": "x"}
        files = [image["file_name"] for image in coco.imgs.values()]
        assert all((tmp_path / "images" / file).is_file() for file in files)
        assert len(files) == sum(splits(result.frame) == name for result in results)
        counts.update(coco.cats[a["category_id"]]["name"] for a in coco.anns.values())
    assert counts == count_objects(results)


def test_splits_are_reproducible_and_keep_the_frames_of_a_video_together():
    frames = [Frame(pixels=np.zeros((1, 1, 3), np.uint8), index=i, name=f"{i}.png") for i in range(2000)]
    splits = Splits({"train": 0.7, "val": 0.2, "test": 0.1})
    counts = Counter(splits(frame) for frame in frames)
    assert [counts[name] / 2000 for name in splits.names] == pytest.approx([0.7, 0.2, 0.1], abs=0.04)
    assert [splits(f) for f in frames[::-1]][::-1] == [Splits(splits.ratios)(f) for f in frames]
    assert [splits(f) for f in frames] != [Splits(splits.ratios, seed=1)(f) for f in frames]
    clip = [
        Frame(pixels=np.zeros((1, 1, 3), np.uint8), index=i, name=f"c.mp4/{i}", time_s=i / 10, video="c.mp4")
        for i in range(50)
    ]
    assert len({splits(frame) for frame in clip}) == 1
    assert Splits(None)(frames[0]) is None


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": 0.5}, "add up to 1"),
        ({"train": 2, "val": -1}, "split.train must be a number from 0 to 1"),
        ({"../x": 1.0}, "the names in split may contain only letters, digits, - and _"),
    ],
)
def test_invalid_splits_are_rejected(split, message):
    with pytest.raises(ConfigError, match=message):
        Splits(split)


def test_images_are_linked_if_every_reader_shows_them_as_labeled(photos, tmp_path):
    names = ["truck.jpg", "exif_landscape_6.jpg", "chelsea.png", "chelsea_palette.png", "cmyk_small.jpg", "flower.webp"]
    frames = [
        Frame(pixels=read_image(photos / name), index=i, name=name, file=photos / name) for i, name in enumerate(names)
    ]
    write_dataset(
        YoloSink, [FrameResult(frame=frame, detections=empty_detections(CLASSES)) for frame in frames], tmp_path
    )
    paths = {path.name: path for path in (tmp_path / "yolo" / "images" / "train").iterdir()}
    assert {name for name, path in paths.items() if path.is_symlink()} == {"truck.jpg", "chelsea.png"}
    assert sorted(set(paths) - {"truck.jpg", "chelsea.png"}) == [
        "chelsea_palette.png",
        "cmyk_small.png",
        "exif_landscape_6.png",
        "flower.png",
    ]
    for frame in frames:
        path = next(path for name, path in paths.items() if Path(name).stem == Path(frame.name).stem)
        with Image.open(path) as image:
            assert image.mode == "RGB" and np.array_equal(np.asarray(image), frame.image)


@pytest.mark.parametrize("sink_class", DATASET_SINKS)
def test_names_cannot_leave_the_output_folder(sink_class, tmp_path):
    detections = boxes((10, 20, 30, 60, 0.9, 1))
    frame = Frame(pixels=np.zeros((100, 100, 3), np.uint8), index=0, name="../../../evil.png")
    write_dataset(sink_class, [FrameResult(frame=frame, detections=detections)], tmp_path / "deep" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}


def test_the_report_is_one_page_with_thumbnails_and_a_review_list(results, tmp_path):
    copy = FrameResult(
        frame=Frame(pixels=results[0].frame.image, index=9, name="copy.png"), detections=results[0].detections
    )
    with ReportSink(tmp_path, CLASSES, samples=2) as sink:
        for result in [*results, copy]:
            sink.write(result)
        sink.skip(Skipped("bad.jpg", "the <file> is empty"))
    page = (tmp_path / "report.html").read_text()
    assert "the &lt;file&gt; is empty" in page and "12 objects of 3 classes in 5 images" in page
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    thumbnails = re.findall(r"data:image/jpeg;base64,([^']+)", page)
    assert len(thumbnails) == 9  # two of a, two of c, two least certain, two most crowded, one empty
    for thumbnail in thumbnails:
        assert Image.open(io.BytesIO(base64.b64decode(thumbnail))).size[0] > 10
    with (tmp_path / "review.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["reason"] for row in rows) == {
        "uncertain": 12,
        "empty": 1,
        "skipped": 1,
        "alike": 2,
        "crowded": 2,
    }
    assert {row["file"] for row in rows if row["reason"] == "alike"} == {"a.png", "copy.png"}
    scores = [float(row["score"]) for row in rows if row["reason"] == "uncertain"]
    assert scores == sorted(scores)


@pytest.mark.parametrize("name", ["yolo", "voc", "labelme", "label_studio", "cvat", "imagefolder", "report", "coco"])
def test_errors_name_the_setting_of_a_sink(name, tmp_path):
    key = {"report": "samples", "cvat": "shape"}.get(name, "images")
    cfg = compose([f"sink={name}", f"sink.{name}.{key}=nonsense"])
    with pytest.raises(ConfigError, match=f"sink.{name}.{key}"):
        build_node(cfg, f"sink.{name}", output=tmp_path, vocabulary=CLASSES)


@pytest.mark.parametrize("sink_class", [YoloSink, VocSink, LabelMeSink, ImageFolderSink])
def test_a_dataset_of_another_split_is_not_overwritten(results, tmp_path, sink_class):
    write_dataset(sink_class, results, tmp_path, split={"train": 0.5, "val": 0.5})
    write_dataset(sink_class, results, tmp_path, split={"train": 0.5, "val": 0.5})
    with pytest.raises(ConfigError, match="another split or seed"):
        write_dataset(sink_class, results, tmp_path, split={"train": 0.5, "val": 0.5}, seed=1)


def test_an_input_image_is_not_replaced_by_a_link_to_itself(results, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(results[0].frame.image).save(folder / "a.png")
    before = (folder / "a.png").read_bytes()
    frame = Frame(pixels=results[0].frame.image, index=0, name="a.png", file=folder / "a.png")
    for _ in range(2):
        write_dataset(CocoSink, [FrameResult(frame=frame, detections=results[0].detections)], tmp_path, images="link")
    assert (folder / "a.png").read_bytes() == before and not (folder / "a.png").is_symlink()


def test_voc_lists_all_splits_and_has_a_mask_for_every_image(results, tmp_path):
    write_dataset(VocSink, results, tmp_path, split={"train": 1.0, "val": 0.0})
    folder = tmp_path / "voc"
    for sets in ("Main", "Segmentation"):
        assert (folder / "ImageSets" / sets / "val.txt").read_text() == ""
        for stem in (folder / "ImageSets" / sets / "train.txt").read_text().split("\n")[:-1]:
            assert (folder / "SegmentationObject" / f"{stem}.png").is_file()


def test_a_report_without_samples_and_review_has_the_counts(results, tmp_path):
    with ReportSink(tmp_path, CLASSES, samples=0, review=0) as sink:
        for result in results:
            sink.write(result)
    assert "9 objects of 3 classes in 4 images" in (tmp_path / "report.html").read_text()


def test_many_equal_images_are_one_group_of_near_duplicates(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    with ReportSink(tmp_path, CLASSES) as sink:
        for i in range(3000):
            sink.write(
                FrameResult(frame=Frame(pixels=image, index=i, name=f"{i}.png"), detections=empty_detections(CLASSES))
            )
        assert len(sink._near_duplicates.groups()) == 1
