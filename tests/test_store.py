"""What is stored, how a run goes on after another, and what is replayed."""

from __future__ import annotations

import errno
import json
import os
import random
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
from grounded_sam.config.build import build, build_sinks, build_source
from grounded_sam.config.compose import compose
from grounded_sam.formats.store import SCHEMA, VERSION, StoreReader
from grounded_sam.pipeline.tracks import TrackSettings
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.overlay import OverlaySink
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.auto import AutoSource
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.stored import StoreSource

COMMAND = Path(sys.executable).with_name("grounded-sam")


def rows(store: Path) -> list[dict]:
    """All rows of a store, in the order of their parts."""
    return [row for part in sorted(store.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def latest(store: Path, leave: tuple[str, ...] = ("take",)) -> list[tuple]:
    """Rows in an order that does not depend on parts, each once, without some columns."""
    columns = [name for name in SCHEMA.names if name not in leave]
    return sorted({tuple(repr(row[name]) for name in columns) for row in rows(store)})


def label(pictures: Path, output: Path, *more, detector=None, settings=None, **options):
    """Store what the fakes find; returns the detector and the summary."""
    detector = detector or Halves()
    model = Pipeline(detector, Fill(), vocabulary=CLASSES)
    store = StoreSink(output, CLASSES, settings, **options)
    return detector, model.run(ImageSource(pictures), [store, *more], output, CLASSES)


def test_rows_say_what_was_found_and_where(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"no picture")
    label(folder, tmp_path, settings={"select": {"score": 0.3}})
    everything = rows(tmp_path / "store")
    stored = [row for row in everything if row["kind"] != "skipped"]
    skipped = [row for row in everything if row["kind"] == "skipped"]
    assert [row["kind"] for row in stored] == ["image", "object", "object"] * 4
    image, left, right = stored[3:6]
    assert image["file"] == "1.png" and image["path"] == str(folder / "1.png") and image["objects"] == 2
    assert (left["class"], left["class_id"], right["class"], right["class_id"]) == ("a", 0, "c", 2)
    assert [right[key] for key in ("x1", "y1", "x2", "y2", "area")] == [130, 0, 260, 200, 130 * 200]
    mask = coco_mask.decode({"size": [image["height"], image["width"]], "counts": right["counts"].encode()})
    assert mask[:, 130:].all() and not mask[:, :130].any()
    assert [row["file"] for row in skipped] == ["bad.png"] and "not a picture" in skipped[0]["reason"]
    assert len({row["fingerprint"] for row in stored}) == 1
    about = json.loads(next((tmp_path / "store").glob("_run-*.json")).read_text())
    assert about["schema"] == VERSION and about["settings"] == {"select": {"score": 0.3}}
    assert about["vocabulary"]["classes"] == ["a", "b", "c"] and about["versions"]["torch"]


def test_images_without_objects_are_stored_too(folder, tmp_path):
    class Nothing(Halves):
        def detect(self, frames, vocabulary):
            return [found[[]] for found in super().detect(frames, vocabulary)]

    label(folder, tmp_path, detector=Nothing())
    assert [(row["kind"], row["objects"]) for row in rows(tmp_path / "store")] == [("image", 0)] * 4
    assert [len(frame.found) for frame in StoreSource(tmp_path)] == [0] * 4
    detector, _ = label(folder, tmp_path)
    assert detector.calls == []


def test_a_store_is_replayed_as_it_was(folder, tmp_path):
    model = Pipeline(Halves(), Fill(), vocabulary=CLASSES)
    label(folder, tmp_path, part_images=3)
    source = StoreSource(tmp_path)
    assert source.vocabulary == CLASSES and len(source) == 4
    direct = list(model.stream(iter(ImageSource(folder)), CLASSES))
    for frame, result in zip(source, direct, strict=True):
        assert frame.found == result.detections
        assert (frame.name, frame.size_hw) == (result.frame.name, result.frame.size_hw)
        assert np.array_equal(frame.image, result.frame.image)


def test_through_the_config_a_store_needs_no_model_and_can_be_narrowed(folder, tmp_path):
    label(folder, tmp_path)
    cfg = compose(["source=stored", f"input='{tmp_path}'", "text={side: [a, c]}", "select.score=0.5", "sink=coco"])
    source, model = build_source(cfg), build(cfg)
    assert model.segmenter is None
    sinks = build_sinks(cfg, tmp_path / "out", model.ask())
    model.run(source, sinks, tmp_path / "out", model.ask())
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["side"]
    assert [a["bbox"] for a in content["annotations"]] == [[0, 0, 130, 200]] * 4


def test_a_second_run_computes_nothing_and_other_sinks_still_get_everything(folder, tmp_path):
    label(folder, tmp_path, CocoSink(tmp_path, CLASSES))
    first = (tmp_path / "annotations.json").read_bytes()
    before = latest(tmp_path / "store")
    detector, summary = label(folder, tmp_path, CocoSink(tmp_path, CLASSES), OverlaySink(tmp_path, CLASSES))
    assert detector.calls == [] and (summary.images, summary.stored) == (4, 4)
    assert (tmp_path / "annotations.json").read_bytes() == first
    assert len(list((tmp_path / "overlay").rglob("*.jpg"))) == 4
    assert latest(tmp_path / "store") == before
    detector, summary = label(folder, tmp_path)  # alone, it is not even read
    assert detector.calls == [] and summary.images == 0


def test_only_new_and_changed_pictures_are_computed(folder, tmp_path):
    label(folder, tmp_path)
    Image.new("RGB", (50, 40), "red").save(folder / "1.png")
    Image.new("RGB", (30, 20), "blue").save(folder / "9.png")
    detector, _ = label(folder, tmp_path)
    assert sum(detector.calls) == 2
    assert [(f.name, f.size_hw) for f in StoreSource(tmp_path)][1] == ("1.png", (40, 50))
    assert [f.name for f in StoreSource(tmp_path)] == ["0.png", "1.png", "9.png", "sub/2.png", "sub/3.png"]


def test_a_moved_folder_is_known_by_its_content(folder, tmp_path):
    label(folder, tmp_path)
    moved = folder.rename(tmp_path / "elsewhere")
    detector, summary = label(moved, tmp_path, OverlaySink(tmp_path, CLASSES))
    assert detector.calls == [] and not summary.skipped  # pixels are read from where they are now
    assert len(list((tmp_path / "overlay").rglob("*.jpg"))) == 4
    assert np.array_equal(
        next(iter(StoreSource(tmp_path, root=moved))).image, np.asarray(Image.open(moved / "0.png").convert("RGB"))
    )


def test_a_skipped_file_is_tried_again_and_noted_once(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"")
    label(folder, tmp_path)
    _, summary = label(folder, tmp_path)
    assert [s.file for s in summary.skipped] == ["bad.png"]
    assert [row["kind"] for row in rows(tmp_path / "store")].count("skipped") == 1
    assert [s.file for s in StoreSource(tmp_path).skipped] == ["bad.png"]
    Image.new("RGB", (30, 20)).save(folder / "bad.png")
    detector, summary = label(folder, tmp_path)
    assert sum(detector.calls) == 1 and not summary.skipped and not StoreSource(tmp_path).skipped


def test_other_settings_are_refused_unless_told_to_extend(folder, tmp_path):
    label(folder, tmp_path, settings={"select": {"score": 0.3}, "detector": {"device": "cpu"}})
    with pytest.raises(ConfigError, match=r"other settings \(select.score: 0.3 then, 0.4 now\).*resume=extend"):
        label(folder, tmp_path, settings={"select": {"score": 0.4}, "detector": {"device": "cpu"}})
    label(folder, tmp_path, settings={"select": {"score": 0.3}, "detector": {"device": "cuda"}})
    Image.new("RGB", (30, 20)).save(folder / "new.png")
    detector, _ = label(folder, tmp_path, settings={"select": {"score": 0.4}}, resume="extend")
    assert sum(detector.calls) == 1
    assert len({row["fingerprint"] for row in rows(tmp_path / "store")}) == 2


def test_other_classes_are_refused_and_extended_with(folder, tmp_path):
    label(folder, tmp_path)
    other = Vocabulary.parse(["c", "d"])
    with pytest.raises(ConfigError, match="vocabulary.classes"):
        StoreSink(tmp_path, other)
    store = StoreSink(tmp_path, other, resume="extend")
    assert store.classes.classes == ("c", "d", "a", "b")
    Image.new("RGB", (30, 20)).save(folder / "new.png")
    model = Pipeline(Halves(), Fill(), vocabulary=other)
    model.run(ImageSource(folder), [store, CocoSink(tmp_path, store.classes)], tmp_path, other)
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


def test_weights_that_change_in_place_are_other_settings(folder, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"1")
    settings = {"detector": {"checkpoint": str(tmp_path / "w.pt")}}
    label(folder, tmp_path, settings=settings)
    label(folder, tmp_path, settings=settings)
    (tmp_path / "w.pt").write_bytes(b"2")
    with pytest.raises(ConfigError, match=r"detector.checkpoint.sha256"):
        label(folder, tmp_path, settings=settings)


def test_a_full_disk_ends_in_words_and_leaves_what_is_whole(folder, tmp_path, monkeypatch):
    write, parts = pq.write_table, []

    def full(table, where, **options):
        parts.append(where)
        if len(parts) > 2:
            Path(where).write_bytes(b"PAR1 half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, where, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(ConfigError, match=r"No space left on device.*goes on from there"):
        label(folder, tmp_path, part_images=1)
    monkeypatch.undo()
    assert len(list((tmp_path / "store").iterdir())) == 3  # two parts and the settings
    detector, _ = label(folder, tmp_path)
    assert sum(detector.calls) == 2 and len(StoreSource(tmp_path)) == 4


def test_where_nothing_can_be_written_it_says_so(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write into .*Not a directory"):
        label(folder, tmp_path / "file")


def test_a_damaged_part_is_named(folder, tmp_path):
    label(folder, tmp_path)
    part = next((tmp_path / "store").glob("part-*"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ConfigError, match=rf"{part.name} cannot be read.*delete it"):
        StoreSource(tmp_path)


def test_a_store_of_a_later_version_is_refused(folder, tmp_path):
    label(folder, tmp_path)
    about = next((tmp_path / "store").glob("_run-*"))
    about.write_text(about.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(ConfigError, match="schema version 99"):
        StoreSource(tmp_path)


def test_pictures_that_are_gone_are_listed_and_the_rest_goes_on(folder, tmp_path):
    label(folder, tmp_path)
    (folder / "1.png").unlink()
    model = Pipeline(Halves(), vocabulary=CLASSES)
    cfg = compose(["source=stored", f"input='{tmp_path}'", "sink=overlay"])
    source, model = build_source(cfg), build(cfg)
    summary = model.run(source, build_sinks(cfg, tmp_path / "o", CLASSES), tmp_path / "o", CLASSES)
    assert [s.file for s in summary.skipped] == ["1.png"] and "no such file" in summary.skipped[0].reason
    assert len(list((tmp_path / "o" / "overlay").rglob("*.jpg"))) == 3


def clip(path: Path, frames: int = 12) -> None:
    """A video of one gray square that moves."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for t in range(frames):
            image = np.zeros((48, 64, 3), np.uint8)
            image[10:30, 5 + 2 * t : 25 + 2 * t] = 120
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())


def follow(folder: Path, output: Path, *more, detector=None, **options):
    detector = detector or Levels()
    model = Pipeline(detector, None, vocabulary=CLASSES, tracker=ByLevel(), tracking=TrackSettings(redetect_every=5))
    return detector, model.run(
        AutoSource(folder), [StoreSink(output, CLASSES, **options), *more], output, CLASSES, CLASSES
    )


def test_videos_are_stored_with_tracks_and_known_once_they_are_whole(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    clip(folder / "a.mkv")
    Image.fromarray(np.full((20, 30, 3), 50, np.uint8)).save(folder / "p.png")
    follow(folder, tmp_path, part_images=4)
    stored = rows(tmp_path / "store")
    assert [row["kind"] for row in stored].count("image") == 13
    whole = [row for row in stored if row["kind"] == "video"]
    assert [(row["file"], row["frame"]) for row in whole] == [("a.mkv", 12)]
    assert {row["tracker_id"] for row in stored if row["kind"] == "object" and row["video"]} == {1}
    before = latest(tmp_path / "store")
    detector, summary = follow(folder, tmp_path, CocoSink(tmp_path, CLASSES), OverlaySink(tmp_path, CLASSES))
    assert detector.looked == [] and summary.stored == 13 and latest(tmp_path / "store") == before
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert [image["frame"] for image in content["images"][1:]] == list(range(12))
    assert {a["track_id"] for a in content["annotations"] if a["image_id"] > 1} == {1}
    with av.open(str(tmp_path / "overlay" / "a.mkv.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 12
    frames = [frame for frame in StoreSource(tmp_path) if frame.video]
    assert [frame.index for frame in frames] == list(range(12))
    assert all((frame.image[20, 15 + 2 * t] > 100).all() for t, frame in enumerate(frames[:10]))


def test_a_video_that_was_left_in_its_middle_is_done_again(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    clip(folder / "a.mkv")

    class Stops(Levels):
        def detect(self, frames, vocabulary):
            if frames[0].index >= 5:
                raise KeyboardInterrupt
            return super().detect(frames, vocabulary)

    _, summary = follow(folder, tmp_path / "out", detector=Stops(), part_images=2)
    assert summary.interrupted and 0 < len(StoreSource(tmp_path / "out")) < 12
    follow(folder, tmp_path / "out")
    follow(folder, tmp_path / "undisturbed")
    kept = StoreReader(tmp_path / "out" / "store")
    assert len(kept) == 12
    assert latest(tmp_path / "out" / "store") == latest(tmp_path / "undisturbed" / "store")


def command(folder: Path, output: Path, *more: str) -> list[str]:
    """The labelling command with a stage that takes its time."""
    conf = folder.parent / "conf" / "detector"
    conf.mkdir(parents=True, exist_ok=True)
    (conf / "slow.yaml").write_text("_target_: fakes.Halves\ndelay: 0.01\n")
    stages = ["detector=slow", "segmenter=none", "tracker=none", "text=[a,b,c]", "preset=label", "sink=[store,coco]"]
    words = [f"--config-dir={conf.parent}", *stages, f"input={folder}", f"output={output}"]
    return [str(COMMAND), *sorted(words + list(more), key=lambda word: not word.startswith("-"))]


ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}


def many(folder: Path, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((12, 16, 3), i % 256, np.uint8)).save(folder / f"{i:04d}.png", compress_level=1)


def test_killed_at_twenty_random_moments_it_ends_as_if_undisturbed(tmp_path):
    folder = tmp_path / "in"
    many(folder, 400)
    words = command(folder, tmp_path / "killed", "sink.store.part_images=7")
    moments = random.Random(11)
    kills = 0
    for _ in range(20):
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV) as process:
            parts = len(list((tmp_path / "killed").glob("store/part-*")))
            end = time.monotonic() + 60
            # Once it has begun to write, it gets a random while.
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
    last = subprocess.run(words, capture_output=True, text=True, check=True, env=ENV)
    assert f"{done} of them stored before" in last.stdout
    undisturbed = command(folder, tmp_path / "undisturbed", "sink.store.part_images=7")
    subprocess.run(undisturbed, capture_output=True, check=True, env=ENV)
    assert latest(tmp_path / "killed" / "store") == latest(tmp_path / "undisturbed" / "store")
    files = [tmp_path / name / "annotations.json" for name in ("killed", "undisturbed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_shards_of_a_sweep_write_into_one_store(tmp_path):
    folder = tmp_path / "in"
    many(folder, 30)
    clip(folder / "a.mkv")
    words = command(folder, tmp_path / "shards", "-m", "source.shard=0,1,2,3", "source.num_shards=4")
    subprocess.run(words, capture_output=True, check=True, env=ENV)
    subprocess.run(command(folder, tmp_path / "one"), capture_output=True, check=True, env=ENV)
    assert latest(tmp_path / "shards" / "store") == latest(tmp_path / "one" / "store")
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
def test_a_worker_that_dies_leaves_a_store_that_the_next_run_completes(tmp_path, launcher, workers):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher", reason=f"the {launcher} launcher is not installed")
    folder = tmp_path / "in"
    many(folder, 80)
    words = command(
        folder,
        tmp_path / "shards",
        "-m",
        "source.shard=0,1,2,3",
        "source.num_shards=4",
        f"hydra/launcher={launcher}",
        workers,
        "detector._target_=fakes.Dies",
        f"+detector.flag='{tmp_path / 'dead'}'",
        "+detector.after=12",
        "sink.store.part_images=5",
    )
    first = subprocess.run(words, capture_output=True, check=False, env=ENV, timeout=300)
    assert (tmp_path / "dead").exists()
    if launcher == "joblib":  # Ray starts a task again by itself
        assert first.returncode
        assert 0 < len(StoreReader(tmp_path / "shards" / "store")) < 80
    subprocess.run(words, capture_output=True, check=True, env=ENV, timeout=300)
    subprocess.run(command(folder, tmp_path / "one"), capture_output=True, check=True, env=ENV)
    # The settings differ by the class of the detector alone.
    one, shards = (latest(tmp_path / name / "store", ("fingerprint", "take")) for name in ("one", "shards"))
    assert shards == one


def test_ontologies_of_several_runs_are_joined_whatever_their_phrases(folder, tmp_path):
    first = Vocabulary.parse({"classes": {"vehicle": {"phrases": ["car", "truck"], "id": 3}}, "negatives": ["bus"]})
    second = Vocabulary.parse({"classes": {"car": {"id": 9}, "bus": {"id": 3, "colour": "red"}}})
    for words, options in ((first, {}), (second, {"resume": "extend"})):
        Image.new("RGB", (30, 20 + len(words))).save(folder / f"{len(words)}.png")
        store = StoreSink(tmp_path, words, **options)
        Pipeline(Halves(), Fill(), vocabulary=words).run(ImageSource(folder), [store], tmp_path, words)
    whole = StoreSource(tmp_path).vocabulary
    assert whole.classes == ("vehicle", "car", "bus") and whole.category_ids == (3, 9, 10)
    assert whole.palette()[2] == "#ff0000"


def test_videos_of_one_name_in_two_folders_stay_two(tmp_path):
    for name, frames in (("x", 8), ("y", 5)):
        (tmp_path / name).mkdir()
        clip(tmp_path / name / "a.mkv", frames)
        follow(tmp_path / name, tmp_path / "out")
    assert len(StoreSource(tmp_path / "out")) == 13
    for name in ("x", "y"):
        detector, _ = follow(tmp_path / name, tmp_path / "out")
        assert detector.looked == []


def test_two_passages_through_a_stream_are_not_mixed(tmp_path):
    from grounded_sam.structures.frame import Frame
    from grounded_sam.structures.results import FrameResult

    found = Halves().detect([Frame(np.zeros((10, 10, 3), np.uint8))], CLASSES)[0]
    for count in (10, 3):
        with StoreSink(tmp_path, CLASSES) as store:
            for t in range(count):
                frame = Frame(np.zeros((10, 10, 3), np.uint8), t, f"camera-0/{t}", t / 10, "camera-0")
                store.write(FrameResult(frame, found))
    assert [frame.index for frame in StoreSource(tmp_path)] == [0, 1, 2]


def test_a_mended_video_is_not_listed_any_more(tmp_path, data):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((data / "malformed" / "truncated_moov_first.mp4").read_bytes())
    _, summary = follow(folder, tmp_path / "out")
    assert [s.file for s in summary.skipped] == ["a.mp4"]
    _, summary = follow(folder, tmp_path / "out")
    assert [s.file for s in summary.skipped] == ["a.mp4"] and summary.stored == 0
    (folder / "a.mp4").write_bytes((data / "malformed" / "rotation_90.mp4").read_bytes())
    _, summary = follow(folder, tmp_path / "out")
    assert not summary.skipped and not StoreSource(tmp_path / "out").skipped


def test_a_missing_video_is_listed_and_the_rest_is_exported(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    clip(folder / "a.mkv")
    clip(folder / "b.mkv", 7)
    follow(folder, tmp_path / "out")
    (folder / "a.mkv").unlink()
    cfg = compose(["source=stored", f"input='{tmp_path / 'out'}'", "sink=[yolo,overlay]"])
    source, model = build_source(cfg), build(cfg)
    summary = model.run(source, build_sinks(cfg, tmp_path / "o", CLASSES), tmp_path / "o", CLASSES)
    assert {s.file.rpartition("/")[0] for s in summary.skipped} == {"a.mkv"} and len(summary.skipped) == 12
    assert len(list((tmp_path / "o" / "yolo" / "labels").rglob("*.txt"))) == 7


def test_a_link_to_nowhere_stops_nothing(folder, tmp_path):
    (folder / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = AutoSource(folder)
    assert len([frame for frame in source if frame.size_hw]) == 4
    assert {s.file for s in source.skipped} == {"gone.mp4", "gone.png"}


def test_a_picture_that_is_gone_costs_only_itself_its_new_mask(folder, tmp_path):
    label(folder, tmp_path)
    (folder / "1.png").unlink()
    cfg = compose(["source=stored", f"input='{tmp_path}'", "sink=none", "detector.masks=false", "segmenter=none"])
    source, model = build_source(cfg), build(cfg)
    model.segmenter = Fill()
    summary = model.run(source, [], tmp_path / "o", CLASSES)
    assert summary.images == 3 and [s.file for s in summary.skipped] == ["1.png"]


def test_a_shard_of_nothing_but_bad_files_does_not_end_the_sweep(tmp_path):
    folder = tmp_path / "in"
    many(folder, 8)
    for i in range(2, 4):
        (folder / f"{i:04d}.png").write_bytes(b"")
    words = command(folder, tmp_path / "out", "-m", "source.shard=0,1,2,3", "source.num_shards=4")
    subprocess.run(words, capture_output=True, check=True, env=ENV)
    assert len(StoreReader(tmp_path / "out" / "store")) == 6


def test_pandas_style_readers_open_the_folder(folder, tmp_path):
    import pyarrow.dataset

    label(folder, tmp_path, part_images=1)
    assert pyarrow.dataset.dataset(tmp_path / "store").count_rows() == 12
