"""The sinks for COCO, JSON lines, YouTube-VIS, masks and overlays, and output names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fakes import CLASSES, boxes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from grounded_sam import ConfigError, Vocabulary
from grounded_sam.files import UniqueNames
from grounded_sam.media.draw import draw_detections
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.jsonl import JsonLinesSink
from grounded_sam.sinks.masks import MasksSink
from grounded_sam.sinks.overlay import OverlaySink
from grounded_sam.sinks.youtube_vis import YoutubeVisSink
from grounded_sam.structures.detections import empty_detections, with_masks
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult


def make_result(name: str = "a.png", masks: bool = True, seed: int = 0) -> FrameResult:
    """Make a frame of 60x80 px with two overlapping objects; the mask of the second has a hole."""
    detections = boxes((5, 5, 40, 40, 0.9, 0), (30, 20, 70, 55, 0.6, 2), size_hw=(60, 80))
    stack = np.zeros((2, 60, 80), bool)
    stack[0, 5:40, 5:40] = True
    stack[1, 20:55, 30:70] = True
    stack[1, 30:40, 45:55] = False
    if masks:
        detections = with_masks(detections, stack, np.array([0.8, 0.7], np.float32))
    image = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    return FrameResult(frame=Frame(pixels=image, index=0, name=name), detections=detections)


EMPTY = FrameResult(
    frame=Frame(pixels=np.zeros((30, 20, 3), np.uint8), index=1, name="empty/名前 (1).jpg"),
    detections=empty_detections(CLASSES),
)


def test_pycocotools_reads_coco_files(tmp_path):
    with CocoSink(tmp_path, CLASSES) as sink:
        first = make_result()
        sink.write(first)
        sink.write(EMPTY)
    coco = COCO(tmp_path / "annotations.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == ["a", "b", "c"]
    assert coco.imgs[2] == {"id": 2, "file_name": "empty/名前 (1).jpg", "width": 20, "height": 30}
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=1))
    assert [a["category_id"] for a in annotations] == [1, 3]
    assert [a["score"] for a in annotations] == pytest.approx([0.9, 0.6])
    for annotation, mask in zip(annotations, first.detections.mask, strict=True):
        assert np.array_equal(coco.annToMask(annotation), mask)
        assert annotation["area"] == mask.sum() == coco_mask.area(annotation["segmentation"])
    assert annotations[0]["bbox"] == [5, 5, 35, 35]


def test_coco_polygons_keep_masks_with_holes(tmp_path):
    with CocoSink(tmp_path, CLASSES, segmentation="polygon") as sink:
        first = make_result()
        sink.write(first)
    coco = COCO(tmp_path / "annotations.json")
    for i, mask in enumerate(first.detections.mask, 1):
        assert np.array_equal(coco.annToMask(coco.anns[i]), mask)


def test_coco_without_masks_has_boxes(tmp_path):
    with CocoSink(tmp_path, CLASSES) as sink:
        sink.write(make_result(masks=False))
    coco = COCO(tmp_path / "annotations.json")
    assert "segmentation" not in coco.anns[1]
    assert coco.anns[1]["area"] == 35 * 35


def test_an_interrupted_run_leaves_a_complete_coco_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), CocoSink(tmp_path, CLASSES) as sink:
        sink.write(make_result())
        raise KeyboardInterrupt
    assert len(COCO(tmp_path / "annotations.json").anns) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["annotations.json"]


def test_a_coco_file_without_images_is_valid(tmp_path):
    with CocoSink(tmp_path, CLASSES):
        pass
    assert json.loads((tmp_path / "annotations.json").read_text())["images"] == []


def test_an_overlay_has_the_size_of_the_frame_and_differs_at_objects(tmp_path):
    first = make_result()
    with OverlaySink(tmp_path, CLASSES, format="png", boxes=False, labels=False) as sink:
        sink.write(first)
        sink.write(EMPTY)
    drawn = np.asarray(Image.open(tmp_path / "overlay" / "a.png"))
    assert drawn.shape == (60, 80, 3)
    changed = (drawn != first.frame.image).any(2)
    assert changed[first.detections.mask[0]].mean() > 0.95
    assert not changed[58, :].any()
    assert Image.open(tmp_path / "overlay" / "empty" / "名前 (1).jpg.png").size == (20, 30)


def test_labels_in_other_scripts_are_drawn():
    first = make_result()
    detections = first.detections
    before = draw_detections(first.frame.image, detections)
    detections.data["class_name"] = np.array(["Straßenschild", "знак"])
    assert (draw_detections(first.frame.image, detections) != before).any()


def test_mode_objects_writes_one_mask_per_object(tmp_path):
    first = make_result("sub/a.png")
    with MasksSink(tmp_path, CLASSES) as sink:
        sink.write(first)
    files = sorted((tmp_path / "masks" / "sub" / "a.png").iterdir())
    assert [f.name for f in files] == ["000_a.png", "001_c.png"]
    for file, mask in zip(files, first.detections.mask, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)) > 0, mask)


def test_class_maps_have_a_legend_and_the_more_confident_object_on_top(tmp_path):
    with MasksSink(tmp_path, CLASSES, mode="labels") as sink:
        sink.write(make_result())
        sink.write(EMPTY)
    values = np.asarray(Image.open(tmp_path / "masks" / "a.png"))
    assert values[30, 35] == 1  # both objects are here; a (0.9) is more confident than c (0.6)
    assert values[45, 65] == 3
    assert values[0, 0] == 0
    legend = json.loads((tmp_path / "masks" / "legend.json").read_text())
    assert legend == {"0": "background", "1": "a", "2": "b", "3": "c"}


def test_class_maps_of_more_than_255_classes_have_16_bits(tmp_path):
    vocabulary = Vocabulary.parse([f"class {i}" for i in range(300)])
    first = make_result()
    first.detections.class_id[:] = 299
    with MasksSink(tmp_path, vocabulary, mode="labels") as sink:
        sink.write(first)
    assert np.asarray(Image.open(tmp_path / "masks" / "a.png")).max() == 300


def test_the_masks_sink_needs_masks(tmp_path):
    with MasksSink(tmp_path, CLASSES) as sink, pytest.raises(ConfigError, match="needs masks"):
        sink.write(make_result(masks=False))


@pytest.mark.parametrize(
    ("sink", "key"),
    [(OverlaySink, "format"), (OverlaySink, "colour_by"), (CocoSink, "segmentation"), (MasksSink, "mode")],
)
def test_errors_name_the_setting(tmp_path, sink, key):
    with pytest.raises(ConfigError, match=key):
        sink(tmp_path, CLASSES, **{key: "nonsense"})


@given(st.lists(st.text(min_size=1, max_size=30), max_size=12))
def test_output_names_are_unique_and_stay_in_their_folder(names):
    unique_names = UniqueNames()
    paths = [unique_names(name, ".png") for name in names]
    assert len({str(p).casefold() for p in paths}) == len(paths)
    for path in paths:
        assert not path.is_absolute()
        assert Path("/x", path).resolve().is_relative_to("/x")
        assert path.suffix.lower() == ".png"


def test_equal_names_get_different_paths():
    unique_names = UniqueNames()
    assert [str(unique_names(n, ".png")) for n in ("a.png", "a.jpg", "A.PNG", "../a.png", "/etc/a")] == [
        "a.png",
        "a.jpg.png",
        "A-2.PNG".replace(".PNG", ".png"),
        "%2E%2E/a.png",
        "etc/a.png",
    ]


def test_thin_masks_have_polygons(tmp_path):
    first = make_result()
    first.detections.mask[0] = False
    first.detections.mask[0, 7, 3:30] = True
    with CocoSink(tmp_path, CLASSES, segmentation="polygon") as sink:
        sink.write(first)
    coco = COCO(tmp_path / "annotations.json")
    assert coco.annToMask(coco.anns[1]).shape == (60, 80)


def test_a_run_without_images_keeps_the_file_of_an_earlier_run(tmp_path):
    with CocoSink(tmp_path, CLASSES) as sink:
        sink.write(make_result())
    with pytest.raises(ValueError), CocoSink(tmp_path, CLASSES):
        raise ValueError
    assert len(COCO(tmp_path / "annotations.json").anns) == 2


def test_masks_of_an_earlier_run_are_removed(tmp_path):
    for threshold in (0.0, 0.7):
        result = make_result()
        detections = result.detections[result.detections.confidence > threshold]
        with MasksSink(tmp_path, CLASSES) as sink:
            sink.write(FrameResult(frame=result.frame, detections=detections))
    assert [p.name for p in (tmp_path / "masks" / "a.png").iterdir()] == ["000_a.png"]


def test_very_long_names_and_images_are_written(tmp_path):
    wide = FrameResult(
        frame=Frame(pixels=np.zeros((2, 66_000, 3), np.uint8), index=0, name="名" * 120 + ".png"),
        detections=empty_detections(CLASSES),
    )
    with OverlaySink(tmp_path, CLASSES) as sink:
        sink.write(wide)
    (file,) = (tmp_path / "overlay").iterdir()
    assert Image.open(file).size == (66_000, 2)


def make_tracked_result(t: int) -> FrameResult:
    """Make frame `t` of a video with two overlapping tracks; track 300 is gone after the first frame."""
    first = make_result(f"clip.mp4/{t:06d}")
    detections = first.detections
    detections.tracker_id = np.array([7, 300])
    frame = Frame(pixels=first.frame.image, index=t, name=first.frame.name, time_s=t / 25, video="clip.mp4")
    return FrameResult(frame=frame, detections=detections if t == 0 else detections[:1])


def test_coco_and_json_lines_have_track_ids(tmp_path):
    with CocoSink(tmp_path, CLASSES) as coco_sink, JsonLinesSink(tmp_path, CLASSES) as lines_sink:
        for t in range(3):
            coco_sink.write(make_tracked_result(t))
            lines_sink.write(make_tracked_result(t))
            lines = (tmp_path / "results.jsonl").read_text().splitlines()
            assert len(lines) == t + 1  # written at once, for programs that follow the run
    coco = COCO(tmp_path / "annotations.json")
    assert [a["track_id"] for a in coco.anns.values()] == [7, 300, 7, 7]
    assert coco.imgs[2] | {"time_s": 0.04} == coco.imgs[2]
    first = json.loads(lines[0])
    assert [o["track_id"] for o in first["objects"]] == [7, 300] and first["frame"] == 0
    mask = coco_mask.decode(first["objects"][1]["segmentation"]).astype(bool)
    assert np.array_equal(mask, make_tracked_result(0).detections.mask[1])


def test_youtube_vis_has_one_entry_per_track(tmp_path):
    with YoutubeVisSink(tmp_path, CLASSES) as sink:
        for t in range(3):
            sink.write(make_tracked_result(t))
    content = json.loads((tmp_path / "youtube_vis.json").read_text())
    assert content["videos"][0]["file_names"] == ["clip.mp4/000000", "clip.mp4/000001", "clip.mp4/000002"]
    first, second = content["annotations"]
    assert (first["track_id"], second["track_id"], first["category_id"], second["category_id"]) == (7, 300, 1, 3)
    assert [s is None for s in second["segmentations"]] == [False, True, True] and second["bboxes"][1] is None
    assert second["areas"][0] == make_tracked_result(0).detections.mask[1].sum()
    assert np.array_equal(
        coco_mask.decode(first["segmentations"][2]).astype(bool), make_tracked_result(2).detections.mask[0]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["youtube_vis.json"]


def test_davis_and_mots_maps_have_track_ids(tmp_path):
    for mode in ("davis", "mots"):
        with MasksSink(tmp_path / mode, CLASSES, mode=mode) as sink:
            for t in range(2):
                sink.write(make_tracked_result(t))
    detections = make_tracked_result(0).detections
    davis = np.asarray(Image.open(tmp_path / "davis" / "masks" / "clip.mp4" / "000000.png"))
    assert davis.dtype == np.uint16 and set(np.unique(davis)) == {0, 7, 300}  # no palette for ids above 255
    with_palette = Image.open(tmp_path / "davis" / "masks" / "clip.mp4" / "000001.png")
    assert with_palette.mode == "P" and set(np.unique(np.asarray(with_palette))) == {0, 7}
    assert with_palette.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]  # the colors of ids 1 and 2 in DAVIS
    mots = np.asarray(Image.open(tmp_path / "mots" / "masks" / "clip.mp4" / "000000.png"))
    assert set(np.unique(mots)) == {0, 1007, 3300}
    assert (mots[detections.mask[0]] == 1007).all()  # the more confident object is on top


@pytest.mark.parametrize(
    ("kind", "keys"), [(YoutubeVisSink, {}), (MasksSink, {"mode": "davis"}), (MasksSink, {"mode": "mots"})]
)
def test_track_formats_need_tracks(tmp_path, kind, keys):
    with pytest.raises(ConfigError, match="needs tracks"), kind(tmp_path, CLASSES, **keys) as sink:
        sink.write(make_result())


def test_a_part_of_a_split_that_stays_empty_is_named_and_the_seed_fills_it():
    from grounded_sam.sinks.splits import Splits
    from grounded_sam.structures.frame import Frame

    frames = [Frame(pixels=np.zeros((4, 4, 3), np.uint8), name=f"{i}.png") for i in range(6)]
    ratios = {"train": 0.9, "val": 0.1, "unused": 0.0}

    def split(seed, images=frames):
        splits = Splits(ratios, seed)
        return {splits(frame) for frame in images}, splits.skipped()

    seed = next(seed for seed in range(100) if split(seed)[0] == {"train"})
    ((skipped,), used) = (split(seed)[1], split(seed)[0])
    assert used == {"train"} and skipped.file == "split val"
    better = int(skipped.reason.rpartition("seed=")[2].split()[0])
    assert split(better) == ({"train", "val"}, [])
    assert "too few images" in split(0, frames[:1])[1][0].reason
    assert split(0, [])[1] == []
