"""One bad thing does not stop the rest: stages that fail on an image, in a video, and in a job of a sweep."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from command import run_command
from fakes import CLASSES, Fill, Halves
from PIL import Image

from grounded_sam import ConfigError, ImageError, Pipeline
from grounded_sam.errors import StageError
from grounded_sam.pipeline.runner import Runner
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.auto import AutoSource
from grounded_sam.sources.images import ImageSource
from grounded_sam.structures.detections import tracked_detections


class FailsOn(Halves):
    """`Halves` that raises an error on images of a given width."""

    def __init__(self, width: int, error: Exception | None = None, batch_size: int = 1) -> None:
        super().__init__(batch_size=batch_size)
        self.width, self.error = width, error or ValueError("math domain error\nsecond line")

    def detect(self, frames, vocabulary):
        if any(frame.size_hw[1] == self.width for frame in frames):
            raise self.error
        return super().detect(frames, vocabulary)


class FillFailsOn(Fill):
    def __init__(self, width: int) -> None:
        self.width = width

    def segment(self, image, detections):
        if image.shape[1] == self.width:
            return sv.Detections(np.array([[0, 0, 9999, 5]], np.float32), None, np.ones(1), np.zeros(1, int))
        return super().segment(image, detections)


@pytest.fixture
def photos_of_three_widths(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, width in {"a": 40, "b": 41, "c": 42}.items():
        Image.new("RGB", (width, 30), "white").save(folder / f"{name}.png")
    return folder


def run(pipeline, source, output, *sinks):
    return Runner(pipeline, source, list(sinks), output, pipeline.request(CLASSES)).run()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("detector", "segmenter", "reason"),
    [
        (FailsOn(41), Fill(), "FailsOn failed (ValueError: math domain error)"),
        (FailsOn(41, MemoryError()), Fill(), "FailsOn failed (MemoryError)"),
        (FailsOn(41, KeyError("x")), Fill(), "FailsOn failed (KeyError: 'x')"),
        (Halves(), FillFailsOn(41), "FillFailsOn: expected boxes inside the 41x30 px image"),
    ],
)
def test_a_stage_that_fails_on_an_image_skips_it(
    photos_of_three_widths, tmp_path, detector, segmenter, reason, batch_size
):
    detector.batch_size = batch_size
    summary = run(
        Pipeline(detector, segmenter), ImageSource(photos_of_three_widths), tmp_path, CocoSink(tmp_path, CLASSES)
    )
    assert summary.images == 2
    assert [(skipped.file, skipped.reason.startswith(reason)) for skipped in summary.skipped] == [("b.png", True)]
    assert json.loads((tmp_path / "skipped.json").read_text())[0]["file"] == "b.png"
    names = [image["file_name"] for image in json.loads((tmp_path / "annotations.json").read_text())["images"]]
    assert names == ["a.png", "c.png"]


def test_a_stage_that_fails_on_every_image_ends_the_run(photos_of_three_widths, tmp_path):
    class Broken(Halves):
        def detect(self, frames, vocabulary):
            raise RuntimeError("no kernel image")

    with pytest.raises(
        ImageError, match=r"3 skipped; the first: a\.png: Broken failed \(RuntimeError: no kernel image\)"
    ):
        run(Pipeline(Broken()), ImageSource(photos_of_three_widths), tmp_path)


def test_an_error_of_the_settings_ends_the_run(photos_of_three_widths, tmp_path):
    with pytest.raises(ConfigError, match="nonsense"):
        run(Pipeline(FailsOn(41, ConfigError("nonsense"))), ImageSource(photos_of_three_widths), tmp_path)


def test_a_resumed_run_names_the_image_again(photos_of_three_widths, tmp_path):
    for _ in range(2):
        store = StoreSink(tmp_path, CLASSES, settings={})
        summary = run(Pipeline(FailsOn(41), Fill()), ImageSource(photos_of_three_widths), tmp_path, store)
        assert [skipped.file for skipped in summary.skipped] == ["b.png"]
    assert summary.images == 0 and store.files_resumed() == 2


def test_the_traceback_is_shown_on_request(photos_of_three_widths, tmp_path, monkeypatch, capsys):
    run(Pipeline(FailsOn(41)), ImageSource(photos_of_three_widths), tmp_path)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("GROUNDED_SAM_DEBUG", "1")
    run(Pipeline(FailsOn(41)), ImageSource(photos_of_three_widths), tmp_path)
    assert "Traceback" in (shown := capsys.readouterr().err) and "second line" in shown


def test_the_api_raises_an_error_of_its_own():
    image = np.zeros((30, 41, 3), np.uint8)
    with pytest.raises(StageError, match="FailsOn failed") as caught:
        Pipeline(FailsOn(41)).segment(image, CLASSES)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_sink_that_fails_on_an_image_does_not_stop_the_others(photos_of_three_widths, tmp_path):
    class Picky:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def write(self, result):
            if result.frame.name == "b.png":
                raise ValueError("not this one")

        def summary(self):
            return ""

    summary = run(
        Pipeline(Halves()), ImageSource(photos_of_three_widths), tmp_path, Picky(), CocoSink(tmp_path, CLASSES)
    )
    assert [skipped.reason.split(";")[0] for skipped in summary.skipped] == ["Picky failed (ValueError: not this one)"]
    assert len(json.loads((tmp_path / "annotations.json").read_text())["images"]) == 3


class Session:
    """A tracker session that shows the prompted masks again, and fails at a given step."""

    def __init__(self, fails_at: int | None) -> None:
        self.fails_at, self.steps, self.masks = fails_at, 0, {}

    def step(self, image):
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("lost it")
        return self._detections(list(self.masks))

    def prompt(self, detections):
        for tracker_id, mask in zip(detections.tracker_id.tolist(), detections.mask, strict=True):
            self.masks[tracker_id] = mask
        return self._detections(detections.tracker_id.tolist())

    def _detections(self, ids):
        masks = np.array([self.masks[i] for i in ids]).reshape(len(ids), 30, 40) if ids else np.zeros((0, 30, 40), bool)
        return tracked_detections(np.array(ids, int), masks.astype(bool), np.ones(len(ids)), np.ones(len(ids)))

    def remove(self, tracker_id):
        self.masks.pop(tracker_id, None)

    def close(self):
        pass


class FailingTracker:
    """Fails in the second frame of the second video that it opens."""

    def __init__(self) -> None:
        self.opened = 0

    def open(self, size_hw):
        self.opened += 1
        return Session(fails_at=2 if self.opened == 2 else None)


def test_a_video_that_fails_stops_alone_and_is_not_complete(tmp_path):
    from grounded_sam.media.mp4 import Mp4Writer

    (tmp_path / "in").mkdir()
    for name in "abc":
        video = Mp4Writer(tmp_path / "in" / f"{name}.mp4")
        for t in range(4):
            video.write(np.full((30, 40, 3), 40 * t, np.uint8), t / 10)
        video.close()
    out = tmp_path / "out"
    pipeline = Pipeline(Halves(), Fill(), tracker=FailingTracker())
    store = StoreSink(out, CLASSES, settings={})
    summary = run(pipeline, AutoSource(str(tmp_path / "in")), out, store)
    assert [skipped.file for skipped in summary.skipped] == ["b.mp4"]
    assert "lost it" in summary.skipped[0].reason and summary.skipped[0].reason.endswith("stopped after 1 frame")
    assert summary.images == 4 + 1 + 4
    again = StoreSink(out, CLASSES, settings={})
    summary = run(pipeline, AutoSource(str(tmp_path / "in")), out, again)
    assert again.files_resumed() == 2 and summary.images == 4 and not summary.skipped


def test_a_job_of_a_sweep_that_fails_is_a_row_of_the_table(tmp_path, photos_of_three_widths):
    (tmp_path / "broken.py").write_text(
        "class Broken:\n    def __init__(self, what):\n        raise RuntimeError(what)\n"
    )
    (tmp_path / "my" / "detector").mkdir(parents=True)
    (tmp_path / "my" / "detector" / "broken.yaml").write_text("_target_: broken.Broken\nwhat: out of memory\n")
    (tmp_path / "my" / "detector" / "nowhere.yaml").write_text("_target_: broken.Broken\nwhat: ${no.such.key}\n")
    process = run_command(
        "grounded_sam.cli.main",
        [
            "-m", "--config-dir", "my", "detector=broken,nowhere", "segmenter=none", "tracker=none", "input=in",
            "text=[a]", "sink=none", "output=sweep",
        ],
        tmp_path,
    )  # fmt: skip
    assert process.returncode == 1 and "2 of 2 jobs failed" in process.stderr and "Traceback" not in process.stderr
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        errors = {row["detector"]: row["error"] for row in csv.DictReader(file)}
    assert "out of memory" in errors["broken"] and "no.such.key" in errors["nowhere"]
