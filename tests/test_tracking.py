"""Video tracking: keyframes, ids, ends of tracks, backward tracking and clicks, with stages that make no mistakes."""

from __future__ import annotations

import gc
import json
import threading

import numpy as np
import pytest
from fakes import CLASSES, ByLevel, Levels, boxes
from PIL import Image

from grounded_sam import ConfigError, ImageError, Pipeline, Vocabulary
from grounded_sam.detectors.clicks import ClickDetector
from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.pipeline.tracks import TrackManager
from grounded_sam.sources.video import VideoSource
from grounded_sam.structures.frame import Frame

TEXT = ["small", "middle", "large"]


def film(frames: int, *objects: tuple[int, range, int]) -> list[np.ndarray]:
    """Frames of 30x80 px. An object is (gray level, frames it is visible in, x in frame 0) and moves right."""
    out = []
    for t in range(frames):
        image = np.zeros((30, 80, 3), np.uint8)
        for level, when, x in objects:
            if t in when:
                image[8:18, x + t : x + t + 8] = level
        out.append(image)
    return out


def run(frames, detector=None, text=TEXT, clicks=None, **settings):
    tracker = ByLevel()
    model = Pipeline(detector or Levels(), tracker=tracker, track=TrackSettings(**settings))
    return list(model.track(frames, text, clicks)), tracker.sessions[0] if tracker.sessions else None


def ids(results):
    return [result.detections.tracker_id.tolist() for result in results]


def test_ids_last_and_new_objects_get_ids_at_keyframes():
    results, _ = run(film(12, (50, range(12), 2), (150, range(5, 12), 40)), redetect_every=4)
    assert ids(results) == [[1]] * 8 + [[1, 2]] * 4
    last = results[-1].detections
    assert last.data["class_name"].tolist() == ["small", "middle"]
    assert last.xyxy.tolist() == [[13, 8, 21, 18], [51, 8, 59, 18]]
    assert last.confidence.tolist() == pytest.approx([0.9, 0.9])
    assert last.mask.sum() == 160


def test_the_detector_runs_at_keyframes_only():
    detector = Levels()
    run(film(10, (50, range(10), 2)), detector, redetect_every=4)
    assert detector.detected_frames == [0, 4, 8]


def test_videos_without_objects_at_first_or_at_all():
    results, _ = run(film(9, (50, range(3, 9), 2)), redetect_every=3)
    assert ids(results) == [[]] * 3 + [[1]] * 6
    results, _ = run(film(7), redetect_every=3)
    assert ids(results) == [[]] * 7
    assert all(r.detections.mask.shape == (0, 30, 80) and r.detections.class_id.shape == (0,) for r in results)


def test_an_object_that_returns_in_time_keeps_its_id():
    away = film(16, (50, range(4), 2), (150, range(16), 40))
    back = film(16, (50, range(10, 16), 2))
    frames = [np.maximum(a, b) for a, b in zip(away, back, strict=True)]
    results, _ = run(frames, redetect_every=4, max_lost_frames=6)
    assert ids(results)[0] == [1, 2] and ids(results)[5] == [2] and ids(results)[11] == [1, 2]
    results, session = run(frames, redetect_every=4, max_lost_frames=5)
    assert ids(results)[-1] == [2, 3]
    assert sorted(session.levels) == [2, 3]  # ended tracks are removed from the session


def test_a_track_lost_by_the_tracker_is_recovered_by_a_nearby_detection():
    class Forgetful(ByLevel):
        def open(self, size_hw):
            session = super().open(size_hw)
            step = session.step

            def blind(image):
                if session.steps == 5:
                    session.levels = dict.fromkeys(session.levels, 255)
                return step(image)

            session.step = blind
            return session

    frames = film(14, (50, range(14), 2))
    for reach, want in ((1.0, [1]), (0.0, [2])):
        model = Pipeline(
            Levels(), tracker=Forgetful(), track=TrackSettings(redetect_every=4, max_center_distance=reach)
        )
        results = list(model.track(frames, TEXT))
        assert ids(results)[3] == [1] and ids(results)[5:8] == [[]] * 3
        assert ids(results)[-1] == want


def test_a_missed_detection_at_a_keyframe_ends_no_track():
    results, _ = run(film(10, (50, range(10), 2)), Levels(hidden=[4]), redetect_every=2)
    assert ids(results) == [[1]] * 10


def test_backward_tracking_adds_objects_before_their_keyframe():
    frames = film(12, (50, range(12), 2), (150, range(2, 12), 40))
    results, _ = run(frames, redetect_every=5, direction="both", backward_window=8)
    assert ids(results) == [[1]] * 2 + [[1, 2]] * 10
    for result, frame in zip(results, frames, strict=True):
        np.testing.assert_array_equal(result.frame.image, frame)
        found = result.detections
        for tracker_id, mask in zip(found.tracker_id.tolist(), found.mask, strict=True):
            np.testing.assert_array_equal(mask, frame[..., 0] == {1: 50, 2: 150}[tracker_id])
    assert [r.frame.index for r in results] == list(range(12))


def test_backward_tracking_is_bounded_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    frames = film(12, (50, range(12), 2), (150, range(12), 40))
    detector = Levels(hidden=[0])
    results, _ = run(frames, detector, redetect_every=6, direction="both", backward_window=4)
    assert ids(results) == [[]] * 2 + [[1, 2]] * 10
    assert list(tmp_path.iterdir()) == []


def test_results_are_lazy_and_closing_frees_everything():
    decoded = []

    def frames():
        for i, image in enumerate(film(1000, (50, range(1000), 2))[:40]):
            decoded.append(i)
            yield image

    tracker = ByLevel()
    results = Pipeline(Levels(), tracker=tracker).track(frames(), TEXT)
    assert next(results).detections.tracker_id.tolist() == [1]
    assert len(decoded) <= 5  # a few frames ahead
    next(results)
    results.close()
    assert len(decoded) <= 6 and tracker.sessions[0].closed


def test_closing_a_video_leaves_no_thread_behind(tmp_path):
    for i, image in enumerate(film(30, (50, range(30), 2))):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    results = Pipeline(Levels(), tracker=ByLevel()).track(VideoSource(tmp_path), TEXT)
    next(results)
    results.close()
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "decode"]


def test_clicks_combine_with_text_on_any_frame_and_id():
    frames = film(8, (50, range(8), 2), (250, range(8), 40))

    class Small(Levels):
        def detect(self, frames, vocabulary):
            assert vocabulary.classes == ("small",)  # the detector is not asked for the clicked class
            return [found[found.class_id == 0] for found in super().detect(frames, Vocabulary.parse(TEXT))]

    clicks = [{"class": "thing", "points": [[46, 12]], "frame": 3, "object": 7}]
    results, _ = run(frames, Small(), ["small"], clicks)
    assert ids(results) == [[1]] * 3 + [[1, 7]] * 5
    last = results[-1].detections
    assert last.data["class_name"].tolist() == ["small", "thing"]
    assert last.xyxy[1].tolist() == [47, 8, 55, 18]


def test_clicks_from_a_file_start_and_correct_a_track(tmp_path):
    frames = film(8, (50, range(8), 2), (250, range(8), 40))
    mask = frames[0][..., 0] == 50
    entries = [
        {"class": "thing", "mask": mask, "object": 2},
        {"class": "thing", "points": [44, 12], "frame": 4, "object": 2},
    ]
    results, _ = run(frames, text=None, clicks=entries)
    assert ids(results) == [[2]] * 8
    assert results[3].detections.xyxy[0, 0] == 5 and results[4].detections.xyxy[0, 0] == 44
    (tmp_path / "c.json").write_text(json.dumps([{"class": "thing", "points": [[4, 12]]}]))
    model = Pipeline(ClickDetector(str(tmp_path / "c.json")), tracker=ByLevel())
    assert ids(model.track(frames)) == [[1]] * 8


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class": "a", "points": [[1, 1]], "frame": -1}, "frame must be null or an integer from 0 to"),
        ({"class": "a", "points": [[1, 1]], "object": 0}, "object must be null or an integer from 1 to"),
        ({"class": "a", "mask": np.zeros((3, 3))}, "mask must be an array"),
    ],
)
def test_malformed_clicks_name_their_entry(entry, message):
    with pytest.raises(ConfigError, match=message):
        ClickDetector([entry])


def test_a_missing_tracker_text_or_video_is_an_error():
    with pytest.raises(ConfigError, match="choose a tracker"):
        next(Pipeline(Levels()).track(film(2), TEXT))
    with pytest.raises(ConfigError, match="text is missing"):
        Pipeline(Levels(), tracker=ByLevel()).track(film(2))
    with pytest.raises(ConfigError, match="no such video"):
        Pipeline(Levels(), tracker=ByLevel()).track("nowhere.mp4", TEXT)
    with pytest.raises(ImageError):
        next(Pipeline(Levels(), tracker=ByLevel()).track(["nowhere.png"], TEXT))


def test_the_tracker_is_built_when_the_first_video_comes():
    built = []
    model = Pipeline(Levels(), tracker=lambda: built.append(1) or ByLevel())
    model.segment(film(1, (50, range(1), 2))[0], TEXT)
    assert not built
    list(model.track(film(2), TEXT))
    assert built == [1]


def test_box_tracker_ids_equal_those_of_the_trackers_package():
    trackers = pytest.importorskip("trackers", reason="the package trackers is not installed")
    from grounded_sam.trackers.boxes import BoxTracker

    video = film(14, (50, range(14), 2), (150, range(3, 10), 40))
    settings = {"minimum_consecutive_frames": 1, "track_activation_threshold": 0.5}
    detector = Levels()
    model = Pipeline(detector, tracker=BoxTracker(settings=settings), track=TrackSettings(max_lost_frames=2))
    results = list(model.track(video, TEXT))
    assert detector.detected_frames == list(range(14))
    # The package assigns the same tracks to the same boxes; our ids count from 1.
    reference, known = trackers.ByteTrackTracker(**settings), {}
    for frame, result in zip(video, results, strict=True):
        boxes = Levels().detect([result.frame], Vocabulary.parse(TEXT))[0]
        assert frame is result.frame.image or (frame == result.frame.image).all()
        seen = reference.update(boxes)
        wanted = sorted(known.setdefault(i, len(known) + 1) for i in seen.tracker_id.tolist() if i >= 0)
        assert sorted(result.detections.tracker_id.tolist()) == wanted
        assert result.detections.mask is None or result.detections.mask.shape[1:] == (30, 80)
    assert {1, 2} <= {i for row in ids(results) for i in row}
    names = {
        (i, n) for r in results for i, n in zip(r.detections.tracker_id, r.detections.data["class_name"], strict=True)
    }
    assert names == {(1, "small"), (2, "middle")}


@pytest.mark.parametrize("method", ["bytetrack", "ocsort", "sort", "cbiou"])
def test_every_method_of_the_box_tracker_tracks_an_object(method):
    pytest.importorskip("trackers", reason="the package trackers is not installed")
    from grounded_sam.trackers.boxes import BoxTracker

    tracker = BoxTracker(method=method, settings={"minimum_consecutive_frames": 1})
    model = Pipeline(Levels(), tracker=tracker)
    for _ in range(2):  # every video starts from scratch
        results = list(model.track(film(10, (50, range(10), 2)), TEXT))
        assert ids(results)[-1] == [1]


@pytest.mark.parametrize("method", ["bytetrack", "ocsort", "sort", "cbiou"])
def test_box_tracker_thresholds_fit_the_default_selection(method):
    pytest.importorskip("trackers", reason="the package trackers is not installed")
    from grounded_sam.config.build import build_node
    from grounded_sam.config.compose import compose

    cfg = compose(["tracker=boxes", f"tracker.method={method}", "tracker.settings={minimum_consecutive_frames: 2}"])
    found = boxes((10, 10, 50, 50, 0.35, 0))
    frames = [Frame(pixels=np.zeros((100, 100, 3), np.uint8), index=i, name=str(i)) for i in range(6)]
    seen = [len(out) for _, out in build_node(cfg, "tracker").track(iter(frames), CLASSES, lambda _: found)]
    assert seen[-3:] == [1, 1, 1]


def test_the_box_tracker_names_what_it_cannot_do():
    pytest.importorskip("trackers", reason="the package trackers is not installed")
    from grounded_sam.trackers.boxes import BoxTracker

    video = film(3, (50, range(3), 2))
    with pytest.raises(ConfigError, match="does not take clicks"):
        list(Pipeline(Levels(), tracker=BoxTracker()).track(video, TEXT, [{"class": "small", "points": [[5, 10]]}]))
    with pytest.raises(ConfigError, match="track.direction=both needs"):
        list(Pipeline(Levels(), tracker=BoxTracker(), track=TrackSettings(direction="both")).track(video, TEXT))
    with pytest.raises(ConfigError, match="must be bytetrack"):
        BoxTracker(method="deepsort")
    with pytest.raises(ConfigError, match="are not valid for ocsort"):
        BoxTracker(method="ocsort", settings={"patience": 3})


def test_ids_of_end_to_end_trackers_are_mapped_to_ours():
    def found(*rows):
        out = boxes(*[(*box, score, class_id) for box, score, class_id, _ in rows])
        out.tracker_id = np.array([row[3] for row in rows], np.int64)
        return out

    tracks = TrackManager(TrackSettings(new_track_score=0.5, max_objects=2, max_lost_frames=1))
    here, there = (0, 0, 20, 20), (40, 40, 60, 60)
    seen = tracks.adopt(found((here, 0.4, 0, 7), (there, 0.8, 1, 9)))
    assert seen.tracker_id.tolist() == [1]  # object 7 is below new_track_score
    seen = tracks.adopt(found((here, 0.9, 0, 7), (there, 0.1, 2, 9), ((70, 70, 90, 90), 0.6, 0, 11)))
    assert seen.tracker_id.tolist() == [2, 1]  # object 11 exceeds max_objects; 9 stays, although its score is low now
    assert tracks.label(seen, CLASSES).data["class_name"].tolist() == ["b", "a"]  # oldest first, by votes
    for _ in range(2):
        tracks.adopt(found((there, 0.9, 1, 9)))
    assert tracks.adopt(found((here, 0.9, 0, 7), (there, 0.9, 1, 9))).tracker_id.tolist() == [3, 1]  # track 2 has ended


def test_a_mask_prompt_without_masks_is_an_error_before_loading():
    from grounded_sam import load

    nowhere = ["tracker.prompt=mask", "checkpoints.grounding_dino=./nowhere", "checkpoints.sam2=./nowhere"]
    with pytest.raises(ConfigError, match="prompt=mask needs masks"):
        load(*nowhere, segmenter="none")
    with pytest.raises(ConfigError, match="tracker.prompt must be auto, mask or box"):
        load("tracker.prompt=word", preset="shapes").tracker  # noqa: B018
