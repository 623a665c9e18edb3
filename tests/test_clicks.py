from __future__ import annotations

import json

import numpy as np
import pytest

from grounded_sam import ConfigError, ImageError, Pipeline, load
from grounded_sam.detectors.clicks import ClickDetector
from grounded_sam.pipeline.images import process_images
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
    model = load(prompts, "segmenter.multimask=true", preset="shapes", detector="clicks")
    detections = model.segment(scene.image)
    assert detections.data["class_name"].tolist() == ["it"]
    truth = scene.masks[-1]
    assert (detections.mask[0] & truth).sum() / (detections.mask[0] | truth).sum() > 0.5


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
        "track.clicks[5]": "none is named 'nix'",
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
