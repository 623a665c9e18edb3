"""J, F, HOTA and the rest of videos against other people's evaluators, through the command's own stages."""

from __future__ import annotations

import json

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
from grounded_sam.evaluation.video_scores import VideoScores, mean_scores, trackeval_metrics
from grounded_sam.formats.labels import read_ground_truth
from grounded_sam.formats.video_masks import LabelledVideos, frame_key
from grounded_sam.sinks.masks import MasksSink
from grounded_sam.sinks.metrics import metrics_sink
from grounded_sam.sinks.youtube_vis import YoutubeVisSink
from grounded_sam.structures.detections import make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult


def measure(results, truth, output, *more):
    """The command on results of others; returns what it measured."""
    cfg = compose(["source=tracks", f"input='{results}'", f"truth='{truth}'", "sink=metrics", *more])
    source, model = build_source(cfg), build(cfg)
    sinks = build_sinks(cfg, output, source.vocabulary)
    model.run(source, sinks, output, source.vocabulary)
    assert "J&F davis" in sinks[0].summary()
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="session")
def reference(data):
    return json.loads((data / "reference_numbers.json").read_text())


@pytest.mark.parametrize("name", ["blackswan", "car-shadow", "horsejump-high"])
def test_davis_numbers_of_osvos_are_met(name, data, reference, tmp_path):
    place = data / "vos" / "Annotations" / "480p" / name
    values = measure(data / "vos" / "osvos" / name, place, tmp_path, "sink.metrics.objects=one")
    expected = reference["vos"][name]
    assert values["frames"] == expected["frames"] and values["by_video"][name]["not_looked_at"] == 0
    inner, every = expected["skip_first_last"], expected["all_frames"]
    for part in "JF":
        got = [values["davis"][f"{part}_{what}"] for what in ("mean", "recall", "decay")]
        assert got == pytest.approx(inner[part], abs=1e-4)
        assert values["davis_all_frames"][f"{part}_mean"] == pytest.approx(every[f"{part}_mean"], abs=1e-4)
    assert values["davis"]["JF"] == pytest.approx(inner["JF"], abs=1e-4)
    assert values["davis_all_frames"]["JF"] == pytest.approx(every["JF"], abs=1e-4)


def test_numbers_that_have_nothing_in_common_are_said(data, tmp_path):
    """Labels of DAVIS 2016 have 255, results 1 and 2; by numbers all would be 0."""
    place = data / "vos" / "Annotations" / "480p" / "horsejump-high"
    with pytest.raises(ConfigError, match=r"no track has the number of an object; objects of .* are 255, tracks 1, 2"):
        measure(data / "vos" / "osvos" / "horsejump-high", place, tmp_path, "sink.metrics.objects=ids")


def test_the_official_command_of_davis_says_the_same_of_two_videos(data, reference, tmp_path):
    for name in ("blackswan", "car-shadow"):
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / name).symlink_to(data / "vos" / "osvos" / name)
    values = measure(tmp_path / "results", data / "vos", tmp_path, "sink.metrics.objects=one")
    expected = {key: value for key, value in reference["vos_official_cli"].items() if key != "how"}
    expected["JF"] = expected.pop("JF_mean")
    assert values["davis"] == pytest.approx(expected, abs=1e-5)
    assert values["videos_not_looked_at"] == ["horsejump-high"]


@pytest.fixture(scope="session")
def shifted(data, tmp_path_factory):
    """SA-V's example, every fourth annotated frame, and results that are its masks shifted."""
    place = tmp_path_factory.mktemp("sav")
    content = json.loads((data / "eval_vos" / "sav_000001_manual.json").read_text())
    rows = content["masklet"][::4]
    moved = []
    for row in rows:
        moved.append([])
        for k, rle in enumerate(row):
            mask = coco_mask.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)
            out = np.zeros_like(mask)
            out[2:, 3 + k :] = mask[:-2, : -(3 + k)]
            one = coco_mask.encode(np.asfortranarray(out, dtype=np.uint8))
            moved[-1].append({"size": list(mask.shape), "counts": one["counts"].decode()})
    for name, masklet in (("truth", rows), ("result", moved)):
        about = {**content, "masklet": masklet}
        (place / f"{name}.json").write_text(json.dumps(about))
    return place


def test_both_rules_for_objects_that_come_late_are_met(shifted, reference, tmp_path):
    values = measure(shifted / "result.json", shifted / "truth.json", tmp_path, "sink.metrics.objects=ids")
    expected = reference["sav_000001_shifted"]
    davis = expected["davis_metrics_counting_empty_frames_as_1"]
    for key in ("J_mean", "F_mean", "JF"):
        assert values["davis"][key] == pytest.approx(davis[key], abs=1e-4)
    objects = values["by_video"]["sav_000001"]["objects"]
    for number, by_part in enumerate(davis["per_object"]):
        for part, numbers in by_part.items():
            got = [objects[str(number)]["davis"][f"{part}_{what}"] for what in ("mean", "recall", "decay")]
            assert got == pytest.approx(numbers, abs=1e-4)
    for part, numbers in expected["sav_evaluator_percent"].items():
        got = {f"{int(n):03d}": 100 * about["sav"][part] for n, about in objects.items()}
        assert got == pytest.approx(numbers, abs=1e-4)
    # The best assignment is at least as good, whatever the numbers say.
    best = measure(shifted / "result.json", shifted / "truth.json", tmp_path / "best")
    assert best["davis_all_frames"]["JF"] >= values["davis_all_frames"]["JF"]
    tracks = [about["track"] for about in best["by_video"]["sav_000001"]["objects"].values()]
    assert tracks[:3] == [0, 1, 2] and sorted(tracks) == [0, 1, 2, 3, 4]


def test_folders_of_pngs_are_read_as_the_json_they_come_from(shifted, tmp_path):
    video = LabelledVideos(shifted / "truth.json").videos["sav_000001"]
    assert [key % 4 for key in video.frames] == [0] * 31
    for key in video.frames:
        masks = video.read(key)
        for number in range(5):
            folder = tmp_path / "objects" / "sav_000001" / f"{number:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            mask = masks.get(number, np.zeros(video.size_hw, bool))
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{key:05d}.png")
    single = read_ground_truth(tmp_path / "objects").videos["sav_000001"]
    assert single.frames == video.frames
    for key in video.frames[::7]:
        one, other = single.read(key), video.read(key)
        assert one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


SQUARES = st.lists(
    st.dictionaries(
        st.integers(1, 3), st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(2, 20)), max_size=3
    ),
    min_size=4,
    max_size=8,
)


def drawn(square):
    mask = np.zeros((48, 64), bool)
    x, y, side = square
    mask[y : y + side, x : x + side] = True
    return mask


@settings(deadline=None, max_examples=40)
@given(SQUARES, SQUARES)
def test_trackeval_measures_the_same_j_and_f(truth, found):
    trackeval = pytest.importorskip("trackeval.metrics")
    frames = min(len(truth), len(found))
    video = VideoScores()
    for t in range(frames):
        video.add(*({n: drawn(square) for n, square in side[t].items()} for side in (truth, found)))
    data = video.for_trackeval()
    if not data["num_gt_ids"]:
        assert mean_scores(list(video.by_object().values()))["davis_all_frames"]["JF"] == -1
        return
    for key, side in (("gt_dets", truth), ("tracker_dets", found)):
        masks = [
            [np.asfortranarray(drawn(square), dtype=np.uint8) for square in side[t].values()] for t in range(frames)
        ]
        data[key] = [[coco_mask.encode(mask) for mask in row] for row in masks]
    metric = trackeval.JAndF()
    metric.optim_type = "J&F"
    theirs = metric.eval_sequence(data)
    ours = mean_scores(list(video.by_object().values()))["davis_all_frames"]
    # Assignments of the same value may be different ones; then J and F alone are not the same, their mean is.
    assert ours["JF"] == pytest.approx(theirs["J&F"])


def test_hota_idf1_and_switches_of_a_known_case():
    pytest.importorskip("trackeval")
    video, mask = VideoScores(), drawn((4, 4, 10))
    for t in range(10):
        video.add({1: mask}, {7 if t < 5 else 8: mask})
    whole, single = trackeval_metrics({"a": video.for_trackeval()})
    assert whole == single["a"]
    assert whole["IDSW"] == 1 and whole["IDF1"] == pytest.approx(0.5) and whole["MOTA"] == pytest.approx(0.9)
    assert whole["HOTA"] == pytest.approx(np.sqrt(0.5)) and whole["DetA"] == pytest.approx(1.0)


class Steps(Halves):
    """Tracks for frames: the halves of the picture, `a` with id 1 and `c` with id 2."""

    def results(self, video="clip.mp4", frames=5):
        model = Pipeline(self, Fill(), vocabulary=CLASSES)
        pictures = [Frame(np.zeros((40, 60, 3), np.uint8), t, f"{video}/{t:06d}", t / 24, video) for t in range(frames)]
        for result in model.stream(iter(pictures), CLASSES):
            result.detections.tracker_id = np.arange(1, len(result.detections) + 1)
            yield result


def test_what_the_sinks_write_of_tracks_is_perfect_truth_of_them(tmp_path):
    results = list(Steps().results())
    with YoutubeVisSink(tmp_path, CLASSES) as sink, MasksSink(tmp_path, CLASSES, mode="davis") as maps:
        for result in results:
            sink.write(result)
            maps.write(result)
    for truth in (tmp_path / "youtube_vis.json", tmp_path / "masks"):
        with metrics_sink(tmp_path, CLASSES, truth, metric="tracking.HOTA") as sink:
            for result in results:
                sink.write(result)
        assert sink.values["davis_all_frames"]["JF"] == 1 and sink.values["sav"]["JF"] == 1
        assert sink.value() == pytest.approx(1) and sink.values["at_threshold"]["f1"] == 1
        assert sink.values["frames"] == 5 and not (tmp_path / "errors").exists()
    classes = {about.get("class") for about in sink.values["by_video"]["clip.mp4"]["objects"].values()}
    assert classes == {None}  # maps have numbers alone


def test_tracks_of_another_class_are_no_match(tmp_path):
    results = list(Steps().results())
    with YoutubeVisSink(tmp_path, CLASSES) as sink:
        for result in results:
            sink.write(result)
    with metrics_sink(tmp_path, CLASSES, tmp_path / "youtube_vis.json") as sink:
        for result in results:
            found = result.detections
            swapped = make_detections(
                found.xyxy, found.confidence, [2, 2], CLASSES, result.frame.size_hw, found.mask
            )  # a called c
            swapped.tracker_id = found.tracker_id
            sink.write(FrameResult(result.frame, swapped))
    objects = sink.values["by_video"]["clip.mp4"]["objects"]
    assert {about["class"]: about["track"] for about in objects.values()} == {"a": None, "c": 2}
    assert sink.values["davis_all_frames"]["JF"] == 0.5
    assert sink.values["at_threshold"] == {
        "iou": 0.5, "matched": 5, "missed": 5, "false": 5, "precision": 0.5, "recall": 0.5, "f1": 0.5,
    }  # fmt: skip
    assert len(list((tmp_path / "errors").rglob("*.jpg"))) == 5
    with pytest.raises(ConfigError, match=r"no metric segm.AP; there are davis.JF, .*tracking.HOTA"):
        metrics_value(sink, "segm.AP")


def metrics_value(sink, path):
    sink.metric = path
    return sink.value()


def test_what_cannot_be_measured_is_said(tmp_path, data):
    truth = data / "vos" / "Annotations" / "480p" / "blackswan"
    frame = Frame(np.zeros((480, 854, 3), np.uint8), 0, "other.mp4/000000", 0.0, "other.mp4")
    none = make_detections([], [], [], CLASSES, (480, 854))
    with (
        pytest.raises(ConfigError, match=r"no frame has labels in .*blackswan.*looked at were other.mp4.*source=video"),
        metrics_sink(tmp_path, CLASSES, truth) as sink,
    ):
        sink.write(FrameResult(frame, none))
    small = Frame(np.zeros((48, 85, 3), np.uint8), 0, "00000.jpg", 0.0, "blackswan")
    with pytest.raises(ConfigError, match="00000.jpg has 85x48 px, but 854x480 px in"):
        metrics_sink(tmp_path, CLASSES, truth).write(FrameResult(small, none))
    found = make_detections([[0, 0, 9, 9]], [1], [0], CLASSES, (480, 854))
    frame = Frame(np.zeros((480, 854, 3), np.uint8), 0, "00000.jpg", 0.0, "blackswan")
    with pytest.raises(ConfigError, match="needs tracks with masks"):
        metrics_sink(tmp_path, CLASSES, truth).write(FrameResult(frame, found))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"masklet": []}, "not annotations of SA-V"),
        ({"masklet": [[{"size": [4, 4], "counts": "zz"}]]}, "object 0: the counts of its RLE"),
        ({"masklet": [[None], None]}, "not annotations of SA-V"),
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
def test_damaged_labels_of_videos_are_named(content, says, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"labels.json.*{says}"):
        for video in read_ground_truth(path).videos.values():
            video.read(video.frames[0])


def maps(folder, *values):
    folder.mkdir(parents=True)
    for i, numbers in enumerate(values):
        picture = np.zeros((8, 8), np.uint8)
        for k, number in enumerate(numbers):
            picture[k] = number
        Image.fromarray(picture).save(folder / f"{i:06d}.png")


def test_videos_may_have_numbers_for_names_and_255_is_void(tmp_path):
    maps(tmp_path / "0001", [1, 2, 255], [1])
    maps(tmp_path / "0002", [255], [255])
    found = read_ground_truth(tmp_path).videos
    assert list(found) == ["0001", "0002"]
    assert list(found["0001"].read(0)) == [1, 2] and list(found["0002"].read(1)) == [255]
    assert found["0001"].names == {0: "000000", 1: "000001"}


def test_of_sav_labels_by_hand_and_automatic_ones_the_first_count(tmp_path, shifted):
    for end in ("manual", "auto"):
        (tmp_path / f"sav_000001_{end}.json").write_bytes((shifted / "truth.json").read_bytes())
    assert list(read_ground_truth(tmp_path).videos) == ["sav_000001"]


def test_frames_are_matched_by_the_number_their_name_ends_in():
    assert frame_key("clip.mp4/000012") == frame_key("00012.jpg") == frame_key("a/12.png") == 12
    assert frame_key("clip.mp4/left_3.jpg") == "left_3"
