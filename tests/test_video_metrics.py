"""Tests of the metrics of videos against other evaluators, through the stages of the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from fakes import CLASSES, Fill, Halves
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from grounded_sam import ConfigError, Pipeline
from grounded_sam.config.build import build, build_sinks, build_source
from grounded_sam.config.compose import compose
from grounded_sam.evaluation.frame_matching import FrameMatcher
from grounded_sam.evaluation.video_scores import VideoScores, mean_scores, trackeval_metrics
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.formats.video_masks import LabelledVideo, LabelledVideos, frame_keys
from grounded_sam.pipeline.images import process_images
from grounded_sam.pipeline.runner import Runner
from grounded_sam.sinks.masks import MasksSink
from grounded_sam.sinks.metrics import metrics_sink
from grounded_sam.sinks.youtube_vis import YoutubeVisSink
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import encode_rle
from grounded_sam.structures.request import Request
from grounded_sam.structures.results import FrameResult


def measure(results, ground_truth, output, *overrides):
    """Measure masks of videos as the command does; return the content of metrics.json."""
    cfg = compose(["source=tracks", f"input='{results}'", f"truth='{ground_truth}'", "sink=metrics", *overrides])
    source, model = build_source(cfg), build(cfg)
    sinks = build_sinks(cfg, output, source.vocabulary)
    Runner(model, source, sinks, output, Request.for_classes(source.vocabulary)).run()
    assert "J&F davis" in sinks[0].summary()
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="session")
def reference(data):
    return json.loads((data / "reference_numbers.json").read_text())


@pytest.mark.parametrize("name", ["blackswan", "car-shadow", "horsejump-high"])
def test_davis_numbers_of_osvos_are_reproduced(name, data, reference, tmp_path):
    labels = data / "vos" / "Annotations" / "480p" / name
    values = measure(data / "vos" / "osvos" / name, labels, tmp_path, "sink.metrics.objects=one")
    expected = reference["vos"][name]
    assert values["frames"] == expected["frames"] and values["by_video"][name]["not_processed"] == 0
    inner, all_frames = expected["skip_first_last"], expected["all_frames"]
    for part in "JF":
        got = [values["davis"][f"{part}_{what}"] for what in ("mean", "recall", "decay")]
        assert got == pytest.approx(inner[part], abs=1e-4)
        assert values["davis_all_frames"][f"{part}_mean"] == pytest.approx(all_frames[f"{part}_mean"], abs=1e-4)
    assert values["davis"]["JF"] == pytest.approx(inner["JF"], abs=1e-4)
    assert values["davis_all_frames"]["JF"] == pytest.approx(all_frames["JF"], abs=1e-4)


def test_ids_that_have_nothing_in_common_are_refused(data, tmp_path):
    """The labels of DAVIS 2016 have the id 255, these results 1 and 2."""
    labels = data / "vos" / "Annotations" / "480p" / "horsejump-high"
    with pytest.raises(ConfigError, match=r"no track has the id of an object; objects of .* are 255, tracks 1, 2"):
        measure(data / "vos" / "osvos" / "horsejump-high", labels, tmp_path, "sink.metrics.objects=ids")


def test_the_official_command_of_davis_gives_the_same_numbers(data, reference, tmp_path):
    for name in ("blackswan", "car-shadow"):
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / name).symlink_to(data / "vos" / "osvos" / name)
    values = measure(tmp_path / "results", data / "vos", tmp_path, "sink.metrics.objects=one")
    expected = {key: value for key, value in reference["vos_official_cli"].items() if key != "how"}
    expected["JF"] = expected.pop("JF_mean")
    assert values["davis"] == pytest.approx(expected, abs=1e-5)
    assert values["videos_not_processed"] == ["horsejump-high"]


@pytest.fixture(scope="session")
def shifted(data, tmp_path_factory):
    """Write every fourth labeled frame of SA-V's example, and results that are its masks shifted."""
    folder = tmp_path_factory.mktemp("sav")
    content = json.loads((data / "eval_vos" / "sav_000001_manual.json").read_text())
    rows = content["masklet"][::4]
    shifted_rows = []
    for row in rows:
        shifted_rows.append([])
        for k, rle in enumerate(row):
            mask = coco_mask.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)
            shifted_mask = np.zeros_like(mask)
            shifted_mask[2:, 3 + k :] = mask[:-2, : -(3 + k)]
            shifted_rows[-1].append(encode_rle(shifted_mask))
    for name, masklet in (("truth", rows), ("result", shifted_rows)):
        (folder / f"{name}.json").write_text(json.dumps({**content, "masklet": masklet}))
    return folder


def test_both_rules_for_objects_that_appear_late_are_reproduced(shifted, reference, tmp_path):
    values = measure(shifted / "result.json", shifted / "truth.json", tmp_path, "sink.metrics.objects=ids")
    expected = reference["sav_000001_shifted"]
    davis = expected["davis_metrics_counting_empty_frames_as_1"]
    for key in ("J_mean", "F_mean", "JF"):
        assert values["davis"][key] == pytest.approx(davis[key], abs=1e-4)
    objects = values["by_video"]["sav_000001"]["objects"]
    for number, by_part in enumerate(davis["per_object"]):
        for part, numbers in by_part.items():
            values_of = [objects[str(number)]["davis"][f"{part}_{what}"] for what in ("mean", "recall", "decay")]
            assert values_of == pytest.approx(numbers, abs=1e-4)
    for part, numbers in expected["sav_evaluator_percent"].items():
        percent = {f"{int(n):03d}": 100 * scores["sav"][part] for n, scores in objects.items()}
        assert percent == pytest.approx(numbers, abs=1e-4)
    # The best assignment is at least as good as that by ids.
    best = measure(shifted / "result.json", shifted / "truth.json", tmp_path / "best")
    assert best["davis_all_frames"]["JF"] >= values["davis_all_frames"]["JF"]
    tracks = [scores["track"] for scores in best["by_video"]["sav_000001"]["objects"].values()]
    assert tracks[:3] == [0, 1, 2] and sorted(tracks) == [0, 1, 2, 3, 4]


def test_folders_of_pngs_are_read_like_the_json_they_come_from(shifted, tmp_path):
    video = LabelledVideos(shifted / "truth.json").videos["sav_000001"]
    assert [key % 4 for key in video.frames] == [0] * 31
    for key in video.frames:
        masks = video.read(key)
        for number in range(5):
            folder = tmp_path / "objects" / "sav_000001" / f"{number:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            mask = masks.get(number, np.zeros(video.size_hw, bool))
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{key:05d}.png")
    from_pngs = read_ground_truth(tmp_path / "objects").videos["sav_000001"]
    assert from_pngs.frames == video.frames
    for key in video.frames[::7]:
        masks, expected = from_pngs.read(key), video.read(key)
        assert masks.keys() == expected.keys() and all(np.array_equal(masks[n], expected[n]) for n in masks)


SQUARES = st.lists(
    st.dictionaries(
        st.integers(1, 3), st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(2, 20)), max_size=3
    ),
    min_size=4,
    max_size=8,
)


def draw_square(square):
    mask = np.zeros((48, 64), bool)
    x, y, side = square
    mask[y : y + side, x : x + side] = True
    return mask


@settings(max_examples=40)
@given(SQUARES, SQUARES)
def test_trackeval_computes_the_same_j_and_f(ground_truth, tracks):
    trackeval = pytest.importorskip("trackeval.metrics")
    frames = min(len(ground_truth), len(tracks))
    video = VideoScores()
    for t in range(frames):
        video.add(*({n: draw_square(square) for n, square in side[t].items()} for side in (ground_truth, tracks)))
    data = video.for_trackeval()
    if not data["num_gt_ids"]:
        assert mean_scores(list(video.by_object().values()))["davis_all_frames"]["JF"] == -1
        return
    for key, side in (("gt_dets", ground_truth), ("tracker_dets", tracks)):
        masks = [
            [np.asfortranarray(draw_square(square), dtype=np.uint8) for square in side[t].values()]
            for t in range(frames)
        ]
        data[key] = [[coco_mask.encode(mask) for mask in row] for row in masks]
    metric = trackeval.JAndF()
    metric.optim_type = "J&F"
    expected = metric.eval_sequence(data)
    scores = mean_scores(list(video.by_object().values()))["davis_all_frames"]
    # Different assignments may have the same J&F; then J and F alone differ.
    assert scores["JF"] == pytest.approx(expected["J&F"])


def test_hota_idf1_and_identity_switches_of_a_known_case():
    pytest.importorskip("trackeval")
    video, mask = VideoScores(), draw_square((4, 4, 10))
    for t in range(10):
        video.add({1: mask}, {7 if t < 5 else 8: mask})
    overall, by_video = trackeval_metrics({"a": video.for_trackeval()})
    assert overall == by_video["a"]
    assert overall["IDSW"] == 1 and overall["IDF1"] == pytest.approx(0.5) and overall["MOTA"] == pytest.approx(0.9)
    assert overall["HOTA"] == pytest.approx(np.sqrt(0.5)) and overall["DetA"] == pytest.approx(1.0)


class TracksOfHalves(Halves):
    """Tracks of the two halves of a video: `a` with id 1 and `c` with id 2."""

    def results(self, video="clip.mp4", frames=5):
        model = Pipeline(self, Fill(), vocabulary=CLASSES)
        images = [
            Frame(pixels=np.zeros((40, 60, 3), np.uint8), index=t, name=f"{video}/{t:06d}", time_s=t / 24, video=video)
            for t in range(frames)
        ]
        for result in process_images(iter(images), CLASSES, model.stages):
            result.detections.tracker_id = np.arange(1, len(result.detections) + 1)
            yield result


def test_tracks_measured_against_what_sinks_wrote_of_them_are_perfect(tmp_path):
    results = list(TracksOfHalves().results())
    with YoutubeVisSink(tmp_path, CLASSES) as sink, MasksSink(tmp_path, CLASSES, mode="davis") as maps:
        for result in results:
            sink.write(result)
            maps.write(result)
    for ground_truth in (tmp_path / "youtube_vis.json", tmp_path / "masks"):
        with metrics_sink(tmp_path, CLASSES, ground_truth, metric="tracking.HOTA") as sink:
            for result in results:
                sink.write(result)
        assert sink.values["davis_all_frames"]["JF"] == 1 and sink.values["sav"]["JF"] == 1
        assert sink.value() == pytest.approx(1) and sink.values["at_threshold"]["f1"] == 1
        assert sink.values["frames"] == 5 and not (tmp_path / "errors").exists()
    classes = {scores.get("class") for scores in sink.values["by_video"]["clip.mp4"]["objects"].values()}
    assert classes == {None}  # maps have no classes


def test_tracks_of_another_class_do_not_match(tmp_path):
    results = list(TracksOfHalves().results())
    with YoutubeVisSink(tmp_path, CLASSES) as sink:
        for result in results:
            sink.write(result)
    with metrics_sink(tmp_path, CLASSES, tmp_path / "youtube_vis.json") as sink:
        for result in results:
            detections = result.detections
            swapped = make_detections(
                detections.xyxy,
                detections.confidence,
                [2, 2],  # the `a` becomes a `c`
                CLASSES,
                result.frame.size_hw,
                detections.mask,
            )
            swapped.tracker_id = detections.tracker_id
            sink.write(FrameResult(frame=result.frame, detections=swapped))
    objects = sink.values["by_video"]["clip.mp4"]["objects"]
    assert {scores["class"]: scores["track"] for scores in objects.values()} == {"a": None, "c": 2}
    assert sink.values["davis_all_frames"]["JF"] == 0.5
    assert sink.values["at_threshold"] == {
        "iou": 0.5, "matched": 5, "missed": 5, "false": 5, "precision": 0.5, "recall": 0.5, "f1": 0.5,
    }  # fmt: skip
    assert len(list((tmp_path / "errors").rglob("*.jpg"))) == 5
    with pytest.raises(ConfigError, match=r"no metric segm.AP; choose one of davis.JF, .*tracking.HOTA"):
        sink.metric = "segm.AP"
        sink.value()


def test_videos_that_cannot_be_measured_are_refused(tmp_path, data):
    ground_truth = data / "vos" / "Annotations" / "480p" / "blackswan"
    frame = Frame(
        pixels=np.zeros((480, 854, 3), np.uint8), index=0, name="other.mp4/000000", time_s=0.0, video="other.mp4"
    )
    nothing = make_detections([], [], [], CLASSES, (480, 854))
    with (
        pytest.raises(
            ConfigError, match=r"no frame has labels in .*blackswan.*the run processed other.mp4.*source=video"
        ),
        metrics_sink(tmp_path, CLASSES, ground_truth) as sink,
    ):
        sink.write(FrameResult(frame=frame, detections=nothing))
    small = Frame(pixels=np.zeros((48, 85, 3), np.uint8), index=0, name="00000.jpg", time_s=0.0, video="blackswan")
    with pytest.raises(ConfigError, match="00000.jpg has 85x48 px, but 854x480 px in"):
        metrics_sink(tmp_path, CLASSES, ground_truth).write(FrameResult(frame=small, detections=nothing))
    untracked = make_detections([[0, 0, 9, 9]], [1], [0], CLASSES, (480, 854))
    frame = Frame(pixels=np.zeros((480, 854, 3), np.uint8), index=0, name="00000.jpg", time_s=0.0, video="blackswan")
    with pytest.raises(ConfigError, match="needs tracks with masks"):
        metrics_sink(tmp_path, CLASSES, ground_truth).write(FrameResult(frame=frame, detections=untracked))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"masklet": []}, "not SA-V"),
        ({"masklet": [[{"size": [4, 4], "counts": "zz"}]]}, "object 0: the counts of its RLE"),
        ({"masklet": [[None], None]}, "not SA-V"),
        (
            {
                "videos": [{"id": 1, "file_names": ["0.jpg", "1.jpg"], "height": 4, "width": 4}],
                "annotations": [{"id": 1, "video_id": 1, "category_id": 1, "segmentations": [None]}],
                "categories": [{"id": 1, "name": "a"}],
            },
            "track 1 of 1 has 1 frames, not 2",
        ),
        ({"videos": [], "annotations": 3, "categories": []}, "expected a list under 'annotations'"),
        ({"videos": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}, "not YouTube-VIS"),
    ],
)
def test_damaged_labels_of_videos_are_named(content, message, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"labels.json.*{message}"):
        for video in read_ground_truth(path).videos.values():
            video.read(video.frames[0])


def write_maps(folder, *values):
    """Write maps of object ids, each with one id per row."""
    folder.mkdir(parents=True)
    for i, numbers in enumerate(values):
        pixels = np.zeros((8, 8), np.uint8)
        for k, number in enumerate(numbers):
            pixels[k] = number
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")


def test_videos_may_be_named_by_numbers_and_255_is_void(tmp_path):
    write_maps(tmp_path / "0001", [1, 2, 255], [1])
    write_maps(tmp_path / "0002", [255], [255])
    videos = read_ground_truth(tmp_path).videos
    assert list(videos) == ["0001", "0002"]
    assert list(videos["0001"].read(0)) == [1, 2] and list(videos["0002"].read(1)) == [255]
    assert videos["0001"].frame_names == {0: "000000", 1: "000001"}


def test_manual_labels_of_sav_are_preferred_to_automatic_ones(tmp_path, shifted):
    for end in ("manual", "auto"):
        (tmp_path / f"sav_000001_{end}.json").write_bytes((shifted / "truth.json").read_bytes())
    assert list(read_ground_truth(tmp_path).videos) == ["sav_000001"]


def test_labels_are_numbered_by_what_their_names_end_in():
    assert frame_keys(["00012.jpg", "a/13.png", "clip.mp4/000014"]) == [12, 13, 14]
    assert frame_keys(["frame_0000", "frame_0005"]) == [0, 5]
    assert frame_keys(["left_3.jpg", "right_3.jpg"]) == ["left_3", "right_3"]
    assert frame_keys(["1.png", "01.png"]) == ["1", "01"] and frame_keys(["a.png", "a1.png"]) == ["a", "a1"]


def matched(labels, frames, video, offset=None, first_index=0):
    """Return the label that each frame of a video is matched with."""
    keys = frame_keys(labels)
    names = dict(zip(keys, labels, strict=True))
    truth = LabelledVideo(name="v", size_hw=(2, 2), frames=keys, read=lambda key: {}, frame_names=names)
    matcher = FrameMatcher(truth, Path("labels"), offset)
    found = [
        matcher.find(Frame(pixels=None, index=i, name=f"{video}/{name}", video=video))
        for i, name in enumerate(frames, first_index)
    ]
    return [None if key is None else names[key] for key in found]


DECODED = [f"{i:06d}" for i in range(4)]


@pytest.mark.parametrize(
    ("labels", "frames", "video", "first_index"),
    [
        (["00000", "00001", "00002", "00003"], DECODED, "v.mp4", 0),
        (["frame_0000", "frame_0001", "frame_0002", "frame_0003"], DECODED, "v.mp4", 0),
        (["00000", "00001", "00002", "00003"], DECODED[2:], "v.mp4", 2),
        (["00000", "00001", "00002", "00003"], ["00000.jpg", "00001.jpg", "00002.jpg", "00003.jpg"], "v", 0),
        (["00001", "00002", "00003", "00004"], ["img1.jpg", "img2.jpg", "img3.jpg", "img4.jpg"], "v", 0),
        (["a", "b", "c", "d"], ["a.jpg", "b.jpg", "c.jpg", "d.jpg"], "v", 0),
    ],
)
def test_frames_and_labels_with_the_same_first_number_are_matched(labels, frames, video, first_index):
    assert matched(labels, frames, video, first_index=first_index) == labels[first_index:]


def test_labels_that_begin_late_are_matched_by_equal_names():
    assert matched(["00002", "00003"], [f"{i:05d}.jpg" for i in range(4)], "v") == [None, None, "00002", "00003"]


@pytest.mark.parametrize(
    ("labels", "frames", "video"),
    [
        (["00001", "00002", "00003", "00004"], DECODED, "v.mp4"),
        (["000001", "000002", "000003", "000004"], DECODED, "v.mp4"),
        (["frame_1", "frame_2", "frame_3", "frame_4"], DECODED, "v.mp4"),
        (["00000", "00001", "00002", "00003"], ["img_1.jpg", "img_2.jpg", "img_3.jpg", "img_4.jpg"], "v"),
        (["00000", "00001", "00002", "00003"], ["00001.jpg", "00002.jpg", "00003.jpg", "00004.jpg"], "v"),
    ],
)
def test_frames_are_never_matched_with_the_labels_of_their_neighbors(labels, frames, video):
    with pytest.raises(ConfigError, match="numbered from") as error:
        matched(labels, frames, video)
    offset = int(re.search(r"frame_offset=(-?\d+) if", str(error.value))[1])
    assert matched(labels, frames, video, offset) == labels
    shifted = matched(labels, frames, video, 0)
    assert shifted != labels and None in shifted
