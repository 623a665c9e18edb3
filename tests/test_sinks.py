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


def result(name: str = "a.png", masks: bool = True, seed: int = 0) -> FrameResult:
    """A frame of 60 x 80 px with two objects that overlap; the mask of the second has a hole."""
    found = boxes((5, 5, 40, 40, 0.9, 0), (30, 20, 70, 55, 0.6, 2), size_hw=(60, 80))
    stack = np.zeros((2, 60, 80), bool)
    stack[0, 5:40, 5:40] = True
    stack[1, 20:55, 30:70] = True
    stack[1, 30:40, 45:55] = False
    if masks:
        found = with_masks(found, stack, np.array([0.8, 0.7], np.float32))
    image = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    return FrameResult(Frame(image, 0, name), found)


NOTHING = FrameResult(Frame(np.zeros((30, 20, 3), np.uint8), 1, "leer/名前 (1).jpg"), empty_detections(CLASSES))


def test_coco_is_read_back_by_pycocotools(tmp_path):
    with CocoSink(tmp_path, CLASSES) as sink:
        first = result()
        sink.write(first)
        sink.write(NOTHING)
    coco = COCO(tmp_path / "annotations.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == ["a", "b", "c"]
    assert coco.imgs[2] == {"id": 2, "file_name": "leer/名前 (1).jpg", "width": 20, "height": 30}
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=1))
    assert [a["category_id"] for a in annotations] == [1, 3]
    assert [a["score"] for a in annotations] == pytest.approx([0.9, 0.6])
    for annotation, mask in zip(annotations, first.detections.mask, strict=True):
        assert np.array_equal(coco.annToMask(annotation), mask)
        assert annotation["area"] == mask.sum() == coco_mask.area(annotation["segmentation"])
    assert annotations[0]["bbox"] == [5, 5, 35, 35]


def test_coco_polygons_give_the_masks_back_with_their_holes(tmp_path):
    with CocoSink(tmp_path, CLASSES, segmentation="polygon") as sink:
        first = result()
        sink.write(first)
    coco = COCO(tmp_path / "annotations.json")
    for i, mask in enumerate(first.detections.mask, 1):
        assert np.array_equal(coco.annToMask(coco.anns[i]), mask)


def test_coco_without_masks_still_has_boxes(tmp_path):
    with CocoSink(tmp_path, CLASSES) as sink:
        sink.write(result(masks=False))
    coco = COCO(tmp_path / "annotations.json")
    assert "segmentation" not in coco.anns[1]
    assert coco.anns[1]["area"] == 35 * 35


def test_an_interrupted_run_leaves_a_whole_coco_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), CocoSink(tmp_path, CLASSES) as sink:
        sink.write(result())
        raise KeyboardInterrupt
    assert len(COCO(tmp_path / "annotations.json").anns) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["annotations.json"]


def test_coco_of_nothing_is_valid(tmp_path):
    with CocoSink(tmp_path, CLASSES):
        pass
    assert json.loads((tmp_path / "annotations.json").read_text())["images"] == []


def test_overlay_has_the_size_of_the_frame_and_changes_where_objects_are(tmp_path):
    first = result()
    with OverlaySink(tmp_path, CLASSES, format="png", boxes=False, labels=False) as sink:
        sink.write(first)
        sink.write(NOTHING)
    drawn = np.asarray(Image.open(tmp_path / "overlay" / "a.png"))
    assert drawn.shape == (60, 80, 3)
    changed = (drawn != first.frame.image).any(2)
    assert changed[first.detections.mask[0]].mean() > 0.95
    assert not changed[58, :].any()
    assert Image.open(tmp_path / "overlay" / "leer" / "名前 (1).jpg.png").size == (20, 30)


def test_labels_of_other_scripts_are_drawn():
    first = result()
    words = first.detections
    plain = draw_detections(first.frame.image, words)
    words.data["class_name"] = np.array(["Straßenschild", "знак"])
    assert (draw_detections(first.frame.image, words) != plain).any()


def test_masks_one_by_one(tmp_path):
    first = result("sub/a.png")
    with MasksSink(tmp_path, CLASSES) as sink:
        sink.write(first)
    files = sorted((tmp_path / "masks" / "sub" / "a.png").iterdir())
    assert [f.name for f in files] == ["000_a.png", "001_c.png"]
    for file, mask in zip(files, first.detections.mask, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)) > 0, mask)


def test_label_maps_have_a_legend_and_the_surer_object_on_top(tmp_path):
    with MasksSink(tmp_path, CLASSES, mode="labels") as sink:
        sink.write(result())
        sink.write(NOTHING)
    values = np.asarray(Image.open(tmp_path / "masks" / "a.png"))
    assert values[30, 35] == 1  # both objects are here, a (0.9) is surer than c (0.6)
    assert values[45, 65] == 3
    assert values[0, 0] == 0
    legend = json.loads((tmp_path / "masks" / "legend.json").read_text())
    assert legend == {"0": "background", "1": "a", "2": "b", "3": "c"}


def test_more_than_255_classes_need_sixteen_bits(tmp_path):
    many = Vocabulary.parse([f"class {i}" for i in range(300)])
    first = result()
    first.detections.class_id[:] = 299
    with MasksSink(tmp_path, many, mode="labels") as sink:
        sink.write(first)
    assert np.asarray(Image.open(tmp_path / "masks" / "a.png")).max() == 300


def test_masks_without_a_segmenter_are_refused(tmp_path):
    with MasksSink(tmp_path, CLASSES) as sink, pytest.raises(ConfigError, match="needs masks"):
        sink.write(result(masks=False))


@pytest.mark.parametrize(
    ("sink", "key"),
    [(OverlaySink, "format"), (OverlaySink, "colour_by"), (CocoSink, "segmentation"), (MasksSink, "mode")],
)
def test_wrong_settings_name_their_key(tmp_path, sink, key):
    with pytest.raises(ConfigError, match=key):
        sink(tmp_path, CLASSES, **{key: "nonsense"})


@given(st.lists(st.text(min_size=1, max_size=30), max_size=12))
def test_output_names_never_collide_nor_leave_their_folder(names):
    give = UniqueNames()
    paths = [give(name, ".png") for name in names]
    assert len({str(p).casefold() for p in paths}) == len(paths)
    for path in paths:
        assert not path.is_absolute()
        assert Path("/x", path).resolve().is_relative_to("/x")
        assert path.suffix.lower() == ".png"


def test_duplicate_stems_stay_apart():
    give = UniqueNames()
    assert [str(give(n, ".png")) for n in ("a.png", "a.jpg", "A.PNG", "../a.png", "/etc/a")] == [
        "a.png",
        "a.jpg.png",
        "A-2.PNG".replace(".PNG", ".png"),
        "a-3.png",
        "etc/a.png",
    ]


def test_thin_masks_still_have_polygons(tmp_path):
    first = result()
    first.detections.mask[0] = False
    first.detections.mask[0, 7, 3:30] = True
    with CocoSink(tmp_path, CLASSES, segmentation="polygon") as sink:
        sink.write(first)
    coco = COCO(tmp_path / "annotations.json")
    assert coco.annToMask(coco.anns[1]).shape == (60, 80)


def test_a_run_that_never_began_leaves_the_file_of_the_last(tmp_path):
    with CocoSink(tmp_path, CLASSES) as sink:
        sink.write(result())
    with pytest.raises(ValueError), CocoSink(tmp_path, CLASSES):
        raise ValueError
    assert len(COCO(tmp_path / "annotations.json").anns) == 2


def test_masks_of_an_earlier_run_do_not_stay(tmp_path):
    for threshold in (0.0, 0.7):
        found = result()
        kept = found.detections[found.detections.confidence > threshold]
        with MasksSink(tmp_path, CLASSES) as sink:
            sink.write(FrameResult(found.frame, kept))
    assert [p.name for p in (tmp_path / "masks" / "a.png").iterdir()] == ["000_a.png"]


def test_very_long_names_and_pictures_fit(tmp_path):
    wide = FrameResult(Frame(np.zeros((2, 66_000, 3), np.uint8), 0, "名" * 120 + ".png"), empty_detections(CLASSES))
    with OverlaySink(tmp_path, CLASSES) as sink:
        sink.write(wide)
    (file,) = (tmp_path / "overlay").iterdir()
    assert Image.open(file).size == (66_000, 2)


def tracked_result(t: int) -> FrameResult:
    """Frame `t` of a video, with two tracks that overlap; track 300 leaves after the first frame."""
    first = result(f"clip.mp4/{t:06d}")
    found = first.detections
    found.tracker_id = np.array([7, 300])
    frame = Frame(first.frame.image, t, first.frame.name, t / 25, "clip.mp4")
    return FrameResult(frame, found if t == 0 else found[:1])


def test_track_ids_go_into_coco_and_json_lines(tmp_path):
    with CocoSink(tmp_path, CLASSES) as coco_sink, JsonLinesSink(tmp_path, CLASSES) as lines_sink:
        for t in range(3):
            coco_sink.write(tracked_result(t))
            lines_sink.write(tracked_result(t))
            lines = (tmp_path / "results.jsonl").read_text().splitlines()
            assert len(lines) == t + 1  # there at once, for whoever follows the run
    coco = COCO(tmp_path / "annotations.json")
    assert [a["track_id"] for a in coco.anns.values()] == [7, 300, 7, 7]
    assert coco.imgs[2] | {"time_s": 0.04} == coco.imgs[2]
    first = json.loads(lines[0])
    assert [o["track_id"] for o in first["objects"]] == [7, 300] and first["frame"] == 0
    mask = coco_mask.decode(first["objects"][1]["segmentation"]).astype(bool)
    assert np.array_equal(mask, tracked_result(0).detections.mask[1])


def test_youtube_vis_has_an_entry_per_track(tmp_path):
    with YoutubeVisSink(tmp_path, CLASSES) as sink:
        for t in range(3):
            sink.write(tracked_result(t))
    made = json.loads((tmp_path / "youtube_vis.json").read_text())
    assert made["videos"][0]["file_names"] == ["clip.mp4/000000", "clip.mp4/000001", "clip.mp4/000002"]
    one, two = made["annotations"]
    assert (one["track_id"], two["track_id"], one["category_id"], two["category_id"]) == (7, 300, 1, 3)
    assert [s is None for s in two["segmentations"]] == [False, True, True] and two["bboxes"][1] is None
    assert two["areas"][0] == tracked_result(0).detections.mask[1].sum()
    assert np.array_equal(coco_mask.decode(one["segmentations"][2]).astype(bool), tracked_result(2).detections.mask[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["youtube_vis.json"]


def test_maps_of_tracks_for_davis_and_mots(tmp_path):
    for mode in ("davis", "mots"):
        with MasksSink(tmp_path / mode, CLASSES, mode=mode) as sink:
            for t in range(2):
                sink.write(tracked_result(t))
    found = tracked_result(0).detections
    davis = np.asarray(Image.open(tmp_path / "davis" / "masks" / "clip.mp4" / "000000.png"))
    assert davis.dtype == np.uint16 and set(np.unique(davis)) == {0, 7, 300}  # beyond 255 ids no palette
    small = Image.open(tmp_path / "davis" / "masks" / "clip.mp4" / "000001.png")
    assert small.mode == "P" and set(np.unique(np.asarray(small))) == {0, 7}
    assert small.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]  # DAVIS's colours of ids 1 and 2
    mots = np.asarray(Image.open(tmp_path / "mots" / "masks" / "clip.mp4" / "000000.png"))
    assert set(np.unique(mots)) == {0, 1007, 3300}
    assert (mots[found.mask[0]] == 1007).all()  # the more confident on top


@pytest.mark.parametrize(
    ("kind", "keys"), [(YoutubeVisSink, {}), (MasksSink, {"mode": "davis"}), (MasksSink, {"mode": "mots"})]
)
def test_formats_of_tracks_refuse_what_has_none(tmp_path, kind, keys):
    with pytest.raises(ConfigError, match="needs tracks"), kind(tmp_path, CLASSES, **keys) as sink:
        sink.write(result())
