from __future__ import annotations

import json

import numpy as np
import pytest

from grounded_sam import ConfigError, ImageError, Pipeline, load
from grounded_sam.detectors.clicks import ClickDetector
from grounded_sam.pipeline.images import process_images
from grounded_sam.shapes.scenes import COLORS, SceneObject, draw_scene
from grounded_sam.structures.clicks import Clicks
from grounded_sam.structures.frame import Frame

FRAME = Frame(pixels=np.zeros((100, 120, 3), np.uint8), index=0, name="sub/cup.jpg")


def test_points_and_boxes_become_detections():
    detector = ClickDetector(
        [
            {"class": "cup", "points": [[30, 40], [50, 60]], "labels": [1, 0]},
            {"class": "spoon", "box": [5, 6, 70, 80]},
            {"class": "cup", "points": [10, 10]},
        ]
    )
    assert detector.vocabulary.classes == ("cup", "spoon")
    detections = detector.detect([FRAME], detector.vocabulary)[0]
    assert detections.class_id.tolist() == [0, 1, 0]
    assert detections.confidence.tolist() == [1, 1, 1]
    assert detections.xyxy.tolist() == [[30, 40, 31, 41], [5, 6, 70, 80], [10, 10, 11, 11]]
    assert detections.data["prompt_box"].tolist() == [False, True, False]


def test_entries_of_a_file_apply_to_the_images_they_name(tmp_path):
    path = tmp_path / "clicks.json"
    entries = [
        {"class": "cup", "points": [[3, 4]], "image": "cup.jpg"},
        {"class": "jug", "points": [[3, 4]], "image": "jug.jpg"},
    ]
    path.write_text(json.dumps(entries))
    detector = ClickDetector(str(path))
    assert detector.detect([FRAME], detector.vocabulary)[0].data["class_name"].tolist() == ["cup"]
    other = Frame(pixels=FRAME.image, index=0, name="x.jpg")
    assert len(detector.detect([other], detector.vocabulary)[0]) == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"points": [[1, 2]]}, "class is missing"),
        ({"class": "a"}, "expected points, a box or a mask"),
        ({"class": "a", "point": [[1, 2]]}, "unknown key 'point'; the keys are box, class"),
        ({"class": "a", "points": [[1, 2, 3]]}, r"points must be \[\[x, y\], ...\]"),
        ({"class": "a", "points": "here"}, "points must be numbers"),
        ({"class": "a", "points": [[10**400, 1]]}, "points must be numbers"),
        ({"class": "a", "points": [[1, 2]], "object": 2**60}, "object must be null or an integer from 1 to"),
        ({"class": "a", "points": [[1, 2]], "labels": [1, 0]}, "labels must have one value per point"),
        ({"class": "a", "points": [[1, 2]], "labels": [3]}, "labels must have one value per point"),
        ({"class": "a", "box": [9, 9, 1, 1]}, "x1 < x2"),
        ({"class": "a", "box": [1, 2, 3]}, "box must be"),
        ({"class": "a", "mask": "nowhere.png"}, "mask nowhere.png does not exist"),
        ("cup", "expected a mapping"),
    ],
)
def test_malformed_entries_are_named(entry, message):
    with pytest.raises(ConfigError, match=rf"detector.prompts\[1\]: .*{message}"):
        ClickDetector([{"class": "ok", "points": [[1, 1]]}, entry])


def test_missing_and_invalid_files_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"detector.prompts is missing"):
        ClickDetector(None)
    with pytest.raises(ConfigError, match="cannot read"):
        ClickDetector(str(tmp_path / "no.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ClickDetector(str(tmp_path / "bad.json"))


def test_prompts_outside_the_image_and_unknown_classes_are_errors():
    detector = ClickDetector([{"class": "cup", "points": [[300, 4]]}])
    with pytest.raises(ImageError, match=r"outside sub/cup.jpg, which is 120x100 px"):
        detector.detect([FRAME], detector.vocabulary)
    with pytest.raises(ImageError, match="outside"):
        away = ClickDetector([{"class": "cup", "box": [200, 10, 300, 20]}])
        away.detect([FRAME], away.vocabulary)
    small, large = np.zeros((10, 10, 3), np.uint8), np.zeros((50, 400, 3), np.uint8)
    skipped: list = []
    frames = iter([Frame(pixels=small, index=0, name="small"), Frame(pixels=large, index=1, name="large")])
    results = list(process_images(frames, detector.vocabulary, Pipeline(detector).stages, on_skipped=skipped.append))
    assert [r.frame.name for r in results] == ["large"]
    assert [s.file for s in skipped] == ["small"]
    from grounded_sam import Vocabulary

    with pytest.raises(ConfigError, match="not in text: 'cup'"):
        detector.detect([FRAME], Vocabulary.parse(["dog"]))


def test_a_click_on_a_shape_gives_its_mask(scenes):
    scene = scenes[0]
    rows, columns = np.nonzero(scene.masks[-1])
    middle = [float(columns.mean()), float(rows.mean())]
    if not scene.masks[-1][int(middle[1]), int(middle[0])]:
        middle = [float(columns[0]), float(rows[0])]
    prompts = f"detector.prompts=[{{class: it, points: [{middle}]}}]"
    model = load(prompts, preset="shapes", detector="clicks")
    detections = model.segment(scene.image)
    assert detections.data["class_name"].tolist() == ["it"]
    truth = scene.masks[-1]
    assert (detections.mask[0] & truth).sum() / (detections.mask[0] | truth).sum() > 0.5


def test_a_click_with_an_empty_mask_is_named(tmp_path):
    from fakes import ByLevel, Levels

    from grounded_sam.pipeline.runner import Runner

    class Blind(ByLevel):
        """Finds nothing on black."""

        class Session(ByLevel.Session):
            def _segment(self, ids):
                detections = super()._segment(ids)
                detections.mask &= self.image[..., 0] > 0
                return detections

    class Source(list):
        skipped = ()

    class Fill:
        """Masks are the boxes, but for black objects."""

        def segment(self, image, detections):
            masks = np.zeros((len(detections), *image.shape[:2]), bool)
            for mask, (x1, y1, x2, y2) in zip(masks, detections.xyxy.astype(int), strict=True):
                mask[y1:y2, x1:x2] = image[y1:y2, x1:x2, 0] > 0
            detections.mask = masks
            return detections

    image = np.zeros((20, 20, 3), np.uint8)
    image[:10] = 90
    entries = [{"class": "a", "points": [[3, y]]} for y in (4, 15)]
    video = Source(Frame(pixels=image, index=i, name=f"v.mp4/{i}", video="v.mp4", time_s=i) for i in range(2))
    pipeline = Pipeline(Levels(), tracker=Blind())
    (note,) = Runner(pipeline, video, [], tmp_path / "video", pipeline.request(clicks=entries)).run().skipped
    assert note.file == "track.clicks[1]" and "the mask of the click is empty in v.mp4/0" in note.reason
    images = Source([Frame(pixels=image, name="a.png")])
    (note,) = Runner(Pipeline(ClickDetector(entries), Fill()), images, [], tmp_path / "images").run().skipped
    assert note.file == "a.png" and note.reason.startswith("1 click of 2 gave no object: the mask is empty")
    good = ClickDetector(entries[:1])
    assert not Runner(Pipeline(good, Fill()), images, [], tmp_path / "good").run().skipped


def test_clicks_that_no_frame_takes_are_named_with_the_reason(tmp_path):
    from fakes import ByLevel, Levels

    from grounded_sam.pipeline.runner import Runner
    from grounded_sam.structures.results import FrameResult

    class Source:
        """Frames 2, 4 and 6 of a video, or three images."""

        def __init__(self, video):
            self.video, self.skipped = video, []

        def __len__(self):
            return 3

        def __iter__(self):
            for i in (2, 4, 6):
                pixels = np.full((20, 20, 3), 90, np.uint8)
                yield Frame(pixels=pixels, index=i, name=f"v.mp4/{i:06d}", video=self.video, time_s=i / 10)

    entries = [
        {"class": "a", "points": [[3, 4]], "frame": frame, "image": image}
        for frame, image in [(None, None), (4, None), (None, "000006"), (400, None), (3, None), (None, "nix")]
    ]
    expected = {
        "track.clicks[3]": "frame 400 is after the last one, 6",
        "track.clicks[4]": "frame 3 was not processed; see source.start and source.stride",
        "track.clicks[5]": "no image or frame is named 'nix'",
    }

    def run(video, name):
        pipeline = Pipeline(Levels(), tracker=ByLevel())
        request = pipeline.request(clicks=entries)
        return Runner(pipeline, Source(video), [], tmp_path / name, request).run()

    skipped = {s.file: s.reason for s in run("v.mp4", "video").skipped}
    assert set(skipped) == set(expected)
    assert all(part in skipped[name] for name, part in expected.items())
    assert {e["file"] for e in json.loads((tmp_path / "video" / "skipped.json").read_text())} == set(expected)
    images = run(None, "images").skipped
    assert len(images) == len(entries) and all("detector=clicks" in s.reason for s in images)

    pipeline = Pipeline(Levels(), tracker=ByLevel())
    with pytest.warns(UserWarning, match="frame 400 is after"):
        results = list(pipeline.track(list(Source("v.mp4")), clicks=entries))
    assert all(isinstance(result, FrameResult) for result in results)


def test_entries_of_one_object_and_frame_are_one_prompt():
    yes = {"class": "cup", "points": [[30, 40]], "object": 7, "frame": 0}
    no = {"class": "cup", "points": [[90, 20]], "labels": [0], "object": 7, "frame": 0}
    later = {"class": "cup", "box": [5, 6, 70, 80], "object": 7, "frame": 3}
    other = {"class": "cup", "points": [[1, 1]], "frame": 0}
    clicks = Clicks([yes, no, later, other], "clicks")
    merged = clicks.for_video_frame(FRAME, 0)
    assert [click.object for click in merged] == [7, None]
    assert merged[0].points.tolist() == [[30, 40], [90, 20]] and merged[0].labels.tolist() == [1, 0]
    detections = clicks.to_detections(merged, FRAME, clicks.vocabulary)
    assert detections.xyxy.tolist() == [[30, 40, 31, 41], [1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"class": "jug", "points": [[9, 9]]}, "object 7 is called 'cup' and 'jug'"),
        ({"class": "cup", "box": [5, 6, 9, 9]}, "object 7 has two entries with a box in one frame; keep one"),
    ],
)
def test_entries_of_one_object_that_contradict_are_named(second, message):
    first = {"class": "cup", "box": [1, 2, 30, 40], "object": 7}
    with pytest.raises(ConfigError, match=message):
        Clicks([first, {**second, "object": 7}], "clicks").for_video_frame(FRAME, 0)


@pytest.mark.parametrize("name", ["red circle", "ball"])
@pytest.mark.parametrize("frame", [0, 2])
def test_a_click_on_an_object_that_text_finds_gives_one_id(shapes, name, frame):
    """Also with a name of the user's own, and also where the click comes before the detector looks."""
    images = [moving_circle(t) for t in range(5)]
    clicks = [{"class": name, "points": [[60 + 3 * frame, 60]], "frame": frame}]
    results = list(shapes.track(images, ["red circle"], clicks))
    for result in results:
        assert len(result.detections) == 1, result
    assert len({result.detections.tracker_id[0] for result in results}) == 1


def test_a_click_corrects_the_object_that_text_found_and_the_others_keep_their_ids(shapes):
    images = [moving_circle(t, second=True) for t in range(5)]
    without = list(shapes.track(images, ["red circle", "blue square"]))
    ids = dict(zip(without[0].detections.data["class_name"], without[0].detections.tracker_id.tolist(), strict=True))
    entry = {"class": "red circle", "points": [[66, 60]], "frame": 2, "object": ids["red circle"]}
    for result in shapes.track(images, ["red circle", "blue square"], [entry]):
        found = result.detections
        assert dict(zip(found.data["class_name"], found.tracker_id.tolist(), strict=True)) == ids


@pytest.mark.parametrize("frame", [0, 2])
def test_an_object_goes_on_under_the_id_that_a_click_chooses(shapes, frame):
    images = [moving_circle(t) for t in range(5)]
    entry = {"class": "red circle", "points": [[60 + 3 * frame, 60]], "frame": frame, "object": 9}
    results = list(shapes.track(images, ["red circle"], [entry]))
    ids = [result.detections.tracker_id.tolist() for result in results]
    assert ids == [[1]] * frame + [[9]] * (5 - frame)


def test_an_object_that_only_a_click_knows_is_not_hidden_when_it_moves_fast(shapes):
    images = [moving_circle(4 * t) for t in range(6)]
    results = list(shapes.track(images, clicks=[{"class": "ball", "points": [[60, 60]]}]))
    assert [len(result.detections) for result in results] == [1] * 6


def moving_circle(t: int, second: bool = False) -> np.ndarray:
    """Return a frame with a red circle that moves to the right, and a blue square that does not."""
    items = [SceneObject("red", "circle", COLORS["red"], 60 + 3 * t, 60, 50, 0.0, 0.5, 0, 0.0)]
    items += [SceneObject("blue", "square", COLORS["blue"], 150, 100, 60, 0.7, 0.5, 0, 0.0)] * second
    return draw_scene(np.full((140, 200, 3), 225, np.uint8), items, np.random.default_rng(0)).image


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((30, 40, 3), np.uint8), r"expected a video, .*got one array of shape \(30, 40, 3\)"),
        (3.5, "expected a video or its frames, got float"),
    ],
)
def test_something_else_than_a_video_is_refused(shapes, video, message):
    with pytest.raises(ImageError, match=message):
        next(shapes.track(video, ["red circle"]))
