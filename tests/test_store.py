"""Tests of the store: what is written, how a run resumes, and what is replayed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import CLASSES, ByLevel, Fill, Halves, Levels
from PIL import Image
from pycocotools import mask as coco_mask

from grounded_sam import ConfigError, Pipeline, Vocabulary
from grounded_sam.config.build import build, build_node, build_sinks, build_source, to_plain
from grounded_sam.config.compose import compose
from grounded_sam.formats.store import StoreReader
from grounded_sam.formats.store_edits import StoreEditor
from grounded_sam.formats.store_migrations import migrate_settings
from grounded_sam.formats.store_runs import VERSION, fingerprint
from grounded_sam.formats.store_schema import SCHEMA
from grounded_sam.pipeline.images import process_images
from grounded_sam.pipeline.runner import Runner, Summary
from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.overlay import OverlaySink
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.auto import AutoSource
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.stored import StoreSource
from grounded_sam.structures.request import Request

COMMAND = Path(sys.executable).with_name("grounded-sam")


def rows(store: Path) -> list[dict]:
    """Return all rows of a store, in the order of its parts."""
    return [row for part in sorted(store.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def distinct_rows(store: Path, leave_out: tuple[str, ...] = ("take",)) -> list[tuple]:
    """Return the distinct rows without some columns, in an order that does not depend on parts."""
    columns = [name for name in SCHEMA.names if name not in leave_out]
    return sorted({tuple(repr(row[name]) for name in columns) for row in rows(store)})


def label(images: Path, output: Path, *sinks, detector=None, settings=None, **options):
    """Store what a fake detector finds; return the detector and the summary."""
    detector = detector or Halves()
    model = Pipeline(detector, Fill(), vocabulary=CLASSES)
    store = StoreSink(output, CLASSES, settings, **options)
    return detector, Runner(model, ImageSource(images), [store, *sinks], output).run()


def test_rows_hold_images_objects_and_skipped_files(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"not an image")
    label(folder, tmp_path, settings={"select": {"score": 0.3}})
    all_rows = rows(tmp_path / "store")
    stored = [row for row in all_rows if row["kind"] != "skipped"]
    skipped = [row for row in all_rows if row["kind"] == "skipped"]
    assert [row["kind"] for row in stored] == ["image", "object", "object"] * 4
    image, left, right = stored[3:6]
    assert image["file"] == "1.png" and image["path"] == str(folder / "1.png") and image["objects"] == 2
    assert (left["class"], left["class_id"], right["class"], right["class_id"]) == ("a", 0, "c", 2)
    assert [right[key] for key in ("x1", "y1", "x2", "y2", "area")] == [130, 0, 260, 200, 130 * 200]
    mask = coco_mask.decode({"size": [image["height"], image["width"]], "counts": right["counts"].encode()})
    assert mask[:, 130:].all() and not mask[:, :130].any()
    assert [row["file"] for row in skipped] == ["bad.png"] and "not an image" in skipped[0]["reason"]
    assert len({row["fingerprint"] for row in stored}) == 1
    run = json.loads(next((tmp_path / "store").glob("_run-*.json")).read_text())
    assert run["schema"] == VERSION and run["settings"] == {"select": {"score": 0.3}}
    assert run["vocabulary"]["classes"] == ["a", "b", "c"] and run["versions"]["torch"]


def test_images_without_objects_are_stored(folder, tmp_path):
    class Nothing(Halves):
        def detect(self, frames, vocabulary):
            return [detections[[]] for detections in super().detect(frames, vocabulary)]

    label(folder, tmp_path, detector=Nothing())
    assert [(row["kind"], row["objects"]) for row in rows(tmp_path / "store")] == [("image", 0)] * 4
    assert [len(frame.annotations) for frame in StoreSource(tmp_path)] == [0] * 4
    detector, _ = label(folder, tmp_path)
    assert detector.calls == []


def test_a_store_replays_what_was_computed(folder, tmp_path):
    model = Pipeline(Halves(), Fill(), vocabulary=CLASSES)
    label(folder, tmp_path, part_images=3)
    source = StoreSource(tmp_path)
    assert source.vocabulary == CLASSES and len(source) == 4
    direct = list(process_images(iter(ImageSource(folder)), CLASSES, model.stages))
    for frame, result in zip(source, direct, strict=True):
        ids, statuses = (frame.annotations.data.pop(name) for name in ("object_id", "status"))
        assert frame.annotations == result.detections
        assert len(set(ids)) == len(result.detections) and set(statuses) == {"predicted"}
        assert (frame.name, frame.size_hw) == (result.frame.name, result.frame.size_hw)
        assert np.array_equal(frame.image, result.frame.image)


def test_a_stored_source_needs_no_model_and_selects_and_renames_classes(folder, tmp_path):
    label(folder, tmp_path)
    cfg = compose(["source=stored", f"input='{tmp_path}'", "text={side: [a, c]}", "select.score=0.5", "sink=coco"])
    source, model = build_source(cfg), build(cfg)
    assert model.segmenter is None
    sinks = build_sinks(cfg, tmp_path / "out", model.parse_text())
    Runner(model, source, sinks, tmp_path / "out").run()
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["side"]
    assert [a["bbox"] for a in content["annotations"]] == [[0, 0, 130, 200]] * 4


def test_a_second_run_computes_nothing_and_other_sinks_get_everything(folder, tmp_path):
    label(folder, tmp_path, CocoSink(tmp_path, CLASSES))
    first = (tmp_path / "annotations.json").read_bytes()
    before = distinct_rows(tmp_path / "store")
    detector, summary = label(folder, tmp_path, CocoSink(tmp_path, CLASSES), OverlaySink(tmp_path, CLASSES))
    assert detector.calls == [] and (summary.images, summary.stored) == (4, 4)
    assert (tmp_path / "annotations.json").read_bytes() == first
    assert len(list((tmp_path / "overlay").rglob("*.jpg"))) == 4
    assert distinct_rows(tmp_path / "store") == before
    detector, summary = label(folder, tmp_path)  # with no other sink, results are not even read
    assert detector.calls == [] and summary.images == 0


def test_only_new_and_changed_images_are_computed(folder, tmp_path):
    label(folder, tmp_path)
    Image.new("RGB", (50, 40), "red").save(folder / "1.png")
    Image.new("RGB", (30, 20), "blue").save(folder / "9.png")
    detector, _ = label(folder, tmp_path)
    assert sum(detector.calls) == 2
    assert [(f.name, f.size_hw) for f in StoreSource(tmp_path)][1] == ("1.png", (40, 50))
    assert [f.name for f in StoreSource(tmp_path)] == ["0.png", "1.png", "9.png", "sub/2.png", "sub/3.png"]


def test_a_moved_folder_is_recognized_by_content(folder, tmp_path):
    label(folder, tmp_path)
    moved = folder.rename(tmp_path / "elsewhere")
    detector, summary = label(moved, tmp_path, OverlaySink(tmp_path, CLASSES))
    assert detector.calls == [] and not summary.skipped  # pixels are read from the new path
    assert len(list((tmp_path / "overlay").rglob("*.jpg"))) == 4
    assert np.array_equal(
        next(iter(StoreSource(tmp_path, root=moved))).image, np.asarray(Image.open(moved / "0.png").convert("RGB"))
    )


def test_a_skipped_file_is_tried_again_and_recorded_once(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"")
    label(folder, tmp_path)
    _, summary = label(folder, tmp_path)
    assert [s.file for s in summary.skipped] == ["bad.png"]
    assert [row["kind"] for row in rows(tmp_path / "store")].count("skipped") == 1
    assert [s.file for s in StoreSource(tmp_path).skipped] == ["bad.png"]
    Image.new("RGB", (30, 20)).save(folder / "bad.png")
    detector, summary = label(folder, tmp_path)
    assert sum(detector.calls) == 1 and not summary.skipped and not StoreSource(tmp_path).skipped


def test_other_settings_are_refused_unless_resume_is_extend(folder, tmp_path):
    label(folder, tmp_path, settings={"select": {"score": 0.3}, "detector": {"device": "cpu"}})
    with pytest.raises(ConfigError, match=r"other settings \(select.score: was 0.3, now 0.4\).*resume=extend"):
        label(folder, tmp_path, settings={"select": {"score": 0.4}, "detector": {"device": "cpu"}})
    label(folder, tmp_path, settings={"select": {"score": 0.3}, "detector": {"device": "cuda"}})
    Image.new("RGB", (30, 20)).save(folder / "new.png")
    detector, _ = label(folder, tmp_path, settings={"select": {"score": 0.4}}, resume="extend")
    assert sum(detector.calls) == 1
    assert len({row["fingerprint"] for row in rows(tmp_path / "store")}) == 2


def test_other_classes_are_refused_or_appended(folder, tmp_path):
    label(folder, tmp_path)
    other = Vocabulary.parse(["c", "d"])
    with pytest.raises(ConfigError, match="vocabulary.classes"):
        StoreSink(tmp_path, other)
    store = StoreSink(tmp_path, other, resume="extend")
    assert store.output_classes().classes == ("c", "d", "a", "b")
    Image.new("RGB", (30, 20)).save(folder / "new.png")
    model = Pipeline(Halves(), Fill(), vocabulary=other)
    Runner(model, ImageSource(folder), [store, CocoSink(tmp_path, store.output_classes())], tmp_path).run()
    content = json.loads((tmp_path / "annotations.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert [names[a["category_id"]] for a in content["annotations"]] == [
        "a",
        "c",
        "a",
        "c",
        "c",
        "d",
        "a",
        "c",
        "a",
        "c",
    ]


def test_weights_that_change_in_place_change_the_fingerprint(folder, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"1")
    settings = {"detector": {"checkpoint": str(tmp_path / "w.pt")}}
    label(folder, tmp_path, settings=settings)
    label(folder, tmp_path, settings=settings)
    (tmp_path / "w.pt").write_bytes(b"2")
    with pytest.raises(ConfigError, match=r"detector.checkpoint.sha256"):
        label(folder, tmp_path, settings=settings)


def test_a_full_disk_is_reported_and_complete_parts_stay(folder, tmp_path, monkeypatch):
    write, parts = pq.write_table, []

    def full(table, where, **options):
        parts.append(where)
        if len(parts) > 2:
            Path(where).write_bytes(b"PAR1 half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, where, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(ConfigError, match=r"No space left on device.*continues from there"):
        label(folder, tmp_path, part_images=1)
    monkeypatch.undo()
    assert len(list((tmp_path / "store").iterdir())) == 4  # two parts, their list and the settings
    detector, _ = label(folder, tmp_path)
    assert sum(detector.calls) == 2 and len(StoreSource(tmp_path)) == 4


def test_an_output_that_cannot_be_written_is_reported(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write into .*Not a directory"):
        label(folder, tmp_path / "file")


def test_a_damaged_part_is_named_in_the_error_of_a_review(folder, tmp_path):
    label(folder, tmp_path)
    part = next((tmp_path / "store").glob("part-*"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ConfigError, match=rf"{part.name} cannot be read.*delete it"):
        StoreEditor(tmp_path)  # whoever decides about a store needs all of it


def write_detector_module(folder: Path, module: str) -> None:
    """Write a module with a detector class that finds nothing."""
    (folder / f"{module}.py").write_text(
        "import supervision as sv\n\n\n"
        "class NullDetector:\n"
        "    def __init__(self, masks):\n"
        "        pass\n\n"
        "    def detect(self, frames, vocabulary):\n"
        "        return [sv.Detections.empty() for _ in frames]\n"
    )


def test_the_fingerprint_does_not_depend_on_the_module_of_a_class(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    fingerprints = set()
    for module in ("module_before_the_move", "module_after_the_move"):
        write_detector_module(tmp_path, module)
        cfg = compose(["detector=stored", f"detector._target_={module}.NullDetector", "sink=store"])
        assert type(build_node(cfg, "detector")).__module__ == module
        fingerprints.add(fingerprint(to_plain(cfg)["sink"]["store"]["settings"], CLASSES))
    assert len(fingerprints) == 1


#: Settings of the run that wrote tests/data/store_v1, see `test_a_store_of_version_0_1_is_resumed`.
STORE_V1_SETTINGS = {
    "select.class_agnostic": "true",
    "select.max_ios": "0.9",
    "track.max_lost_frames": "12",
    "track.max_center_distance": "2.0",
    "track.min_step_iou": "0.1",
    "track.class_agnostic": "true",
}


def resume_store_v1(output: Path, **changes: str) -> tuple[Summary, StoreSink]:
    """Copy the store of version 0.1 to an output folder, and run into it with its settings and some changes."""
    store_v1 = Path(__file__).parent / "data" / "store_v1"
    shutil.copytree(store_v1 / "store", output / "store")
    cfg = compose(
        [
            f"input='{store_v1 / 'pictures'}'",
            "text=[ball]",
            "detector=clicks",
            "detector.prompts=[{class: ball, box: [10, 8, 46, 40]}]",
            "segmenter=none",
            "tracker=none",
            "sink=[store,coco]",
            *(f"{key}={value}" for key, value in {**STORE_V1_SETTINGS, **changes}.items()),
        ]
    )
    source, pipeline = build_source(cfg), build(cfg)
    sinks = build_sinks(cfg, output, pipeline.parse_text())
    summary = Runner(pipeline, source, sinks, output).run()
    return summary, next(sink for sink in sinks if isinstance(sink, StoreSink))


def test_a_store_of_version_0_1_is_resumed(tmp_path):
    summary, store = resume_store_v1(tmp_path)
    assert (summary.images, summary.stored, store.files_resumed()) == (2, 2, 2)
    assert summary.objects == {"ball": 2}
    assert len(list((tmp_path / "store").iterdir())) == 2  # nothing was written


def test_a_store_of_version_0_1_with_other_settings_names_changes(tmp_path):
    changes = {"select.max_ios": "0.8", "track.min_step_iou": "0.2"}
    with pytest.raises(
        ConfigError, match=r"\(select.max_ios: was 0.9, now 0.8; track.min_step_iou: was 0.1, now 0.2\)"
    ):
        resume_store_v1(tmp_path, **changes)


def test_settings_of_version_0_1_are_translated_in_nested_stages_too():
    ensemble = {
        "_target_": "grounded_sam.detectors.ensemble.Ensemble",
        "floor": 0.1,
        "detectors": {"first": {"_target_": "grounded_sam.detectors.sam3.Sam3", "floor": 0.05}},
    }
    tracker = {
        "_target_": "grounded_sam.trackers.sam3_video.Sam3VideoTracker",
        "patience": 30,
        "settings": {"patience": 1},  # of the model, whose keys are not ours
    }
    segmenter = {"_target_": "mine.segmenters.Boxes", "fill_holes": 5}
    migrated = migrate_settings(
        {"detector": ensemble, "segmenter": segmenter, "tracker": tracker, "track": {"jump": 1}}
    )
    assert migrated == {
        "detector": {
            "_target_": "EnsembleDetector",
            "min_score": 0.1,
            "detectors": {"first": {"_target_": "Sam3", "min_score": 0.05}},
        },
        "segmenter": {"_target_": "Boxes", "fill_holes": 5},
        "tracker": {"_target_": "Sam3VideoTracker", "max_lost_frames": 30, "settings": {"patience": 1}},
        "track": {"min_step_iou": 1},
    }
    assert migrate_settings(migrated) == migrated


def test_a_store_of_a_later_version_is_refused(folder, tmp_path):
    label(folder, tmp_path)
    path = next((tmp_path / "store").glob("_run-*"))
    path.write_text(path.read_text().replace(f'"schema": {VERSION}', '"schema": 99'))
    with pytest.raises(ConfigError, match="schema version 99"):
        StoreSource(tmp_path)


def test_missing_images_are_listed_and_the_others_are_exported(folder, tmp_path):
    label(folder, tmp_path)
    (folder / "1.png").unlink()
    model = Pipeline(Halves(), vocabulary=CLASSES)
    cfg = compose(["source=stored", f"input='{tmp_path}'", "sink=overlay"])
    source, model = build_source(cfg), build(cfg)
    summary = Runner(
        model, source, build_sinks(cfg, tmp_path / "o", CLASSES), tmp_path / "o", Request.for_classes(CLASSES)
    ).run()
    assert [s.file for s in summary.skipped] == ["1.png"] and "no such file" in summary.skipped[0].reason
    assert len(list((tmp_path / "o" / "overlay").rglob("*.jpg"))) == 3


def clip(path: Path, frames: int = 12) -> None:
    """Write a video of one gray square that moves."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for t in range(frames):
            image = np.zeros((48, 64, 3), np.uint8)
            image[10:30, 5 + 2 * t : 25 + 2 * t] = 120
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())


def track(folder: Path, output: Path, *sinks, detector=None, **options):
    detector = detector or Levels()
    model = Pipeline(detector, None, vocabulary=CLASSES, tracker=ByLevel(), track=TrackSettings(redetect_every=5))
    return detector, Runner(model, AutoSource(folder), [StoreSink(output, CLASSES, **options), *sinks], output).run()


def test_videos_are_stored_with_tracks_and_resumed_once_complete(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    clip(folder / "a.mkv")
    Image.fromarray(np.full((20, 30, 3), 50, np.uint8)).save(folder / "p.png")
    track(folder, tmp_path, part_images=4)
    stored = rows(tmp_path / "store")
    assert [row["kind"] for row in stored].count("image") == 13
    complete = [row for row in stored if row["kind"] == "video"]
    assert [(row["file"], row["frame"]) for row in complete] == [("a.mkv", 12)]
    assert {row["tracker_id"] for row in stored if row["kind"] == "object" and row["video"]} == {1}
    before = distinct_rows(tmp_path / "store")
    detector, summary = track(folder, tmp_path, CocoSink(tmp_path, CLASSES), OverlaySink(tmp_path, CLASSES))
    assert detector.detected_frames == [] and summary.stored == 13 and distinct_rows(tmp_path / "store") == before
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert [image["frame"] for image in content["images"][1:]] == list(range(12))
    assert {a["track_id"] for a in content["annotations"] if a["image_id"] > 1} == {1}
    with av.open(str(tmp_path / "overlay" / "a.mkv.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 12
    frames = [frame for frame in StoreSource(tmp_path) if frame.video]
    assert [frame.index for frame in frames] == list(range(12))
    assert all((frame.image[20, 15 + 2 * t] > 100).all() for t, frame in enumerate(frames[:10]))


def test_an_interrupted_video_is_processed_again(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    clip(folder / "a.mkv")

    class Stops(Levels):
        def detect(self, frames, vocabulary):
            if frames[0].index >= 5:
                raise KeyboardInterrupt
            return super().detect(frames, vocabulary)

    _, summary = track(folder, tmp_path / "out", detector=Stops(), part_images=2)
    assert summary.interrupted and 0 < len(StoreSource(tmp_path / "out")) < 12
    track(folder, tmp_path / "out")
    track(folder, tmp_path / "uninterrupted")
    assert len(StoreReader(tmp_path / "out" / "store")) == 12
    assert distinct_rows(tmp_path / "out" / "store") == distinct_rows(tmp_path / "uninterrupted" / "store")


def label_command(folder: Path, output: Path, *overrides: str) -> list[str]:
    """Return the labeling command with a slow detector."""
    conf = folder.parent / "conf" / "detector"
    conf.mkdir(parents=True, exist_ok=True)
    (conf / "slow.yaml").write_text("_target_: fakes.Halves\ndelay: 0.01\n")
    stages = ["detector=slow", "segmenter=none", "tracker=none", "text=[a,b,c]", "preset=label", "sink=[store,coco]"]
    arguments = [f"--config-dir={conf.parent}", *stages, f"input={folder}", f"output={output}", *overrides]
    return [str(COMMAND), *sorted(arguments, key=lambda argument: not argument.startswith("-"))]


ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}


def write_images(folder: Path, count: int) -> None:
    """Write small gray images."""
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((12, 16, 3), i % 256, np.uint8)).save(folder / f"{i:04d}.png", compress_level=1)


def test_a_run_killed_twenty_times_ends_like_an_uninterrupted_one(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, 400)
    arguments = label_command(folder, tmp_path / "killed", "sink.store.part_images=7")
    moments = random.Random(11)
    kills = 0
    for _ in range(20):
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV) as process:
            parts = len(list((tmp_path / "killed").glob("store/part-*")))
            end = time.monotonic() + 60
            # It is killed a random time after it has begun to write.
            while process.poll() is None and time.monotonic() < end:
                if len(list((tmp_path / "killed").glob("store/part-*"))) > parts:
                    break
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.15))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
    assert kills == 20
    done = len(StoreReader(tmp_path / "killed" / "store"))
    assert 0 < done < 400
    last = subprocess.run(arguments, capture_output=True, text=True, check=True, env=ENV)
    assert f"{done} from the store" in last.stdout
    uninterrupted = label_command(folder, tmp_path / "uninterrupted", "sink.store.part_images=7")
    subprocess.run(uninterrupted, capture_output=True, check=True, env=ENV)
    assert distinct_rows(tmp_path / "killed" / "store") == distinct_rows(tmp_path / "uninterrupted" / "store")
    files = [tmp_path / name / "annotations.json" for name in ("killed", "uninterrupted")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_shards_of_a_sweep_write_into_one_store(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, 30)
    clip(folder / "a.mkv")
    arguments = label_command(folder, tmp_path / "shards", "-m", "source.shard=0,1,2,3", "source.num_shards=4")
    subprocess.run(arguments, capture_output=True, check=True, env=ENV)
    subprocess.run(label_command(folder, tmp_path / "one"), capture_output=True, check=True, env=ENV)
    assert distinct_rows(tmp_path / "shards" / "store") == distinct_rows(tmp_path / "one" / "store")
    replayed = [list(StoreSource(tmp_path / name)) for name in ("shards", "one")]
    assert [f.name for f in replayed[0]] == [f.name for f in replayed[1]]
    own = json.loads((tmp_path / "shards" / "1" / "annotations.json").read_text())
    assert [i["file_name"] for i in own["images"]] == [f"{i:04d}.png" for i in range(7, 15)]
    parts = [list(StoreSource(tmp_path / "one", shard=i, num_shards=3)) for i in range(3)]
    assert sorted(f.name for part in parts for f in part) == sorted(f.name for f in replayed[1])
    with pytest.raises(ConfigError, match=r"source.shard must be below source.num_shards=2"):
        ImageSource(folder, shard=2, num_shards=2)


@pytest.mark.parametrize(
    "launcher, workers",
    [("joblib", "hydra.launcher.n_jobs=2"), ("ray", "+hydra.launcher.ray.init.num_cpus=2")],
)
def test_the_store_of_a_killed_worker_is_completed_by_the_next_run(tmp_path, launcher, workers):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher", reason=f"the {launcher} launcher is not installed")
    folder = tmp_path / "in"
    write_images(folder, 160)
    arguments = label_command(
        folder,
        tmp_path / "shards",
        "-m",
        "source.shard=0,1,2,3",
        "source.num_shards=4",
        f"hydra/launcher={launcher}",
        workers,
        "detector._target_=fakes.Dies",
        f"+detector.flag='{tmp_path / 'dead'}'",
        "+detector.after=36",  # the detector is a few batches ahead of the store
        "sink.store.part_images=5",
    )
    first = subprocess.run(arguments, capture_output=True, check=False, env=ENV, timeout=300)
    assert (tmp_path / "dead").exists()
    if launcher == "joblib":  # Ray restarts tasks by itself
        assert first.returncode
        assert 0 < len(StoreReader(tmp_path / "shards" / "store")) < 160
    subprocess.run(arguments, capture_output=True, check=True, env=ENV, timeout=300)
    subprocess.run(label_command(folder, tmp_path / "one"), capture_output=True, check=True, env=ENV)
    # The settings differ only in the class of the detector.
    one, shards = (distinct_rows(tmp_path / name / "store", ("fingerprint", "take")) for name in ("one", "shards"))
    assert shards == one


def test_ontologies_of_several_runs_are_merged(folder, tmp_path):
    first = Vocabulary.parse({"classes": {"vehicle": {"phrases": ["car", "truck"], "id": 3}}, "negatives": ["bus"]})
    second = Vocabulary.parse({"classes": {"car": {"id": 9}, "bus": {"id": 3, "colour": "red"}}})
    for classes, options in ((first, {}), (second, {"resume": "extend"})):
        Image.new("RGB", (30, 20 + len(classes))).save(folder / f"{len(classes)}.png")
        store = StoreSink(tmp_path, classes, **options)
        Runner(Pipeline(Halves(), Fill(), vocabulary=classes), ImageSource(folder), [store], tmp_path).run()
    merged = StoreSource(tmp_path).vocabulary
    assert merged.classes == ("vehicle", "car", "bus") and merged.category_ids == (3, 9, 10)
    assert merged.palette()[2] == "#ff0000"


def test_videos_of_the_same_name_in_two_folders_are_distinct(tmp_path):
    for name, frames in (("x", 8), ("y", 5)):
        (tmp_path / name).mkdir()
        clip(tmp_path / name / "a.mkv", frames)
        track(tmp_path / name, tmp_path / "out")
    assert len(StoreSource(tmp_path / "out")) == 13
    for name in ("x", "y"):
        detector, _ = track(tmp_path / name, tmp_path / "out")
        assert detector.detected_frames == []


def test_two_passes_through_a_stream_are_not_mixed(tmp_path):
    from grounded_sam.structures.frame import Frame
    from grounded_sam.structures.results import FrameResult

    detections = Halves().detect([Frame(pixels=np.zeros((10, 10, 3), np.uint8))], CLASSES)[0]
    for count in (10, 3):
        with StoreSink(tmp_path, CLASSES) as store:
            for t in range(count):
                frame = Frame(
                    pixels=np.zeros((10, 10, 3), np.uint8),
                    index=t,
                    name=f"camera-0/{t}",
                    time_s=t / 10,
                    video="camera-0",
                )
                store.write(FrameResult(frame=frame, detections=detections))
    assert [frame.index for frame in StoreSource(tmp_path)] == [0, 1, 2]


def test_a_repaired_video_is_no_longer_listed(tmp_path, data):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((data / "malformed" / "truncated_moov_first.mp4").read_bytes())
    _, summary = track(folder, tmp_path / "out")
    assert [s.file for s in summary.skipped] == ["a.mp4"]
    _, summary = track(folder, tmp_path / "out")
    assert [s.file for s in summary.skipped] == ["a.mp4"] and summary.stored == 0
    (folder / "a.mp4").write_bytes((data / "malformed" / "rotation_90.mp4").read_bytes())
    _, summary = track(folder, tmp_path / "out")
    assert not summary.skipped and not StoreSource(tmp_path / "out").skipped


def test_a_missing_video_is_listed_and_the_others_are_exported(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    clip(folder / "a.mkv")
    clip(folder / "b.mkv", 7)
    track(folder, tmp_path / "out")
    (folder / "a.mkv").unlink()
    cfg = compose(["source=stored", f"input='{tmp_path / 'out'}'", "sink=[yolo,overlay]"])
    source, model = build_source(cfg), build(cfg)
    summary = Runner(
        model, source, build_sinks(cfg, tmp_path / "o", CLASSES), tmp_path / "o", Request.for_classes(CLASSES)
    ).run()
    assert [s.file for s in summary.skipped] == ["a.mkv"] and "no such file" in summary.skipped[0].reason
    assert len(list((tmp_path / "o" / "yolo" / "labels").rglob("*.txt"))) == 7


def test_broken_links_are_skipped(folder, tmp_path):
    (folder / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = AutoSource(folder)
    assert len([frame for frame in source if frame.size_hw]) == 4
    assert {s.file for s in source.skipped} == {"gone.mp4", "gone.png"}


def test_a_missing_image_is_skipped_when_masks_are_made_anew(folder, tmp_path):
    label(folder, tmp_path)
    (folder / "1.png").unlink()
    cfg = compose(["source=stored", f"input='{tmp_path}'", "sink=none", "detector.masks=false", "segmenter=none"])
    source, model = build_source(cfg), build(cfg)
    model = Pipeline(model.detector, Fill(), model.select, CLASSES)
    summary = Runner(model, source, [], tmp_path / "o").run()
    assert summary.images == 3 and [s.file for s in summary.skipped] == ["1.png"]


def test_a_shard_of_only_bad_files_does_not_end_the_sweep(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, 8)
    for i in range(2, 4):
        (folder / f"{i:04d}.png").write_bytes(b"")
    arguments = label_command(folder, tmp_path / "out", "-m", "source.shard=0,1,2,3", "source.num_shards=4")
    subprocess.run(arguments, capture_output=True, check=True, env=ENV)
    assert len(StoreReader(tmp_path / "out" / "store")) == 6


def test_dataset_readers_open_the_folder(folder, tmp_path):
    import pyarrow.dataset

    label(folder, tmp_path, part_images=1)
    assert pyarrow.dataset.dataset(tmp_path / "store").count_rows() == 12
