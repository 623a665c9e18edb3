"""Runs on the workers of Ray, with stages that need no weights."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from fakes import CLASSES
from s3 import bucket, s3  # noqa: F401
from test_store import clip, distinct_rows, write_images

from grounded_sam.config.compose import compose
from grounded_sam.engine.job import Engine, EngineJob
from grounded_sam.engine.listing import KILLED, Listing, Unit, parts_of
from grounded_sam.engine.local import LocalEngine
from grounded_sam.engine.ray import RayEngine
from grounded_sam.errors import ConfigError
from grounded_sam.output.claim import claim
from grounded_sam.output.paths import output_path
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.auto import AutoSource

FAKES = ("segmenter=none", "text=[a,b,c]", "preset=label", "sink=[coco]", "device=cpu")


@pytest.fixture(scope="module")
def ray_cluster(s3, tmp_path_factory):  # noqa: F811
    """Start Ray once for all tests of this module; its workers know the S3 server. Yield a folder for their logs."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    pytest.importorskip("ray.data", reason="the extra `ray` is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[1]}")
        logs = tmp_path_factory.mktemp("logs")
        patch.setenv("POISON_LOGS", str(logs))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False
        )
        yield logs
        ray.shutdown()


def job(folder: Path, output: Path, *overrides: str) -> EngineJob:
    """Return a job with a detector without weights."""
    cfg = compose([*FAKES, f"input={folder}", f"output={output}", "tracker=none", *overrides])
    return EngineJob(cfg, output)


def with_detector(made: EngineJob, target: str, tracker: str | None = None, **settings: object) -> EngineJob:
    """Set the detector of a job, and its tracker."""
    made.cfg.detector = {"_target_": target, **settings}
    if tracker is not None:
        made.cfg.tracker = {"_target_": tracker}
    return made


def run(engine: Engine, made: EngineJob):
    """Run a job as the command does."""
    with claim(made.output):
        return engine.run(made)


@pytest.mark.ray
def test_two_workers_store_and_export_what_one_process_does(ray_cluster, tmp_path):
    folder = tmp_path / "in"
    write_images(folder, 60)
    (folder / "damaged.png").write_bytes((folder / "0001.png").read_bytes()[:40])
    for number, frames in enumerate((12, 5)):
        clip(folder / f"clip{number}.mkv", frames)
    made = {}
    for name, engine, sinks in (
        ("ray", RayEngine(concurrency=2, num_cpus=1, batch=7), "sink=[coco]"),  # the store is added
        ("local", LocalEngine(), "sink=[store,coco]"),
    ):
        settings = with_detector(job(folder, tmp_path / name, sinks), "fakes.Levels", "fakes.ConfiguredByLevel")
        made[name] = run(engine, settings)[0]
    assert distinct_rows(tmp_path / "ray" / "store") == distinct_rows(tmp_path / "local" / "store")
    for file in ("annotations.json", "skipped.json"):
        assert (tmp_path / "ray" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
    ours, theirs = made["ray"], made["local"]
    assert (ours.images, ours.frames, ours.empty, ours.objects) == (77, 17, theirs.empty, theirs.objects)
    assert ours.skipped == theirs.skipped and len(ours.skipped) == 1
    assert ours.stored == ours.missing == 0 and ours.images == theirs.images
    # The next run finds everything, and starts no worker.
    (folder / "0003.png").touch()
    again = with_detector(job(folder, tmp_path / "ray"), "fakes.NoSuchDetector", "fakes.ConfiguredByLevel")
    again.cfg.sink.coco.file = "again.json"
    again.cfg.detector["_target_"] = "fakes.Levels"
    (folder / "damaged.png").unlink()
    summary, _ = run(RayEngine(concurrency=2, num_cpus=1), again)
    assert (summary.images, summary.stored, summary.missing) == (77, 77, 0)
    assert (tmp_path / "ray" / "again.json").read_bytes() == (tmp_path / "ray" / "annotations.json").read_bytes()


@pytest.mark.ray
def test_only_the_image_that_kills_its_worker_is_put_aside(ray_cluster, tmp_path):
    folder, log = tmp_path / "in", ray_cluster / "poison"
    write_images(folder, 50)
    settings = {"level": 23, "log": "poison"}
    engine = RayEngine(concurrency=2, num_cpus=1, batch=5)
    made = with_detector(job(folder, tmp_path / "out"), "fakes.Poison", **settings)
    summary, _ = run(engine, made)
    assert [(skipped.file, skipped.reason) for skipped in summary.skipped] == [("0023.png", KILLED)]
    assert (summary.images, summary.missing) == (49, 0)
    names = [image["file_name"] for image in json.loads((tmp_path / "out" / "annotations.json").read_text())["images"]]
    assert names == [f"{i:04d}.png" for i in range(50) if i != 23]
    assert log.read_text().split().count("0023.png") == 4  # twice in its batch, and by itself in two passes
    log.unlink()
    summary, _ = run(engine, made)  # it is left out, and named again
    assert not log.exists() and [skipped.file for skipped in summary.skipped] == ["0023.png"]
    listed = Listing(parts_of(AutoSource(folder)), StoreSink(tmp_path / "out", CLASSES, resume="extend"), 5)
    assert list(listed.units()) == [] and [note.file for note in listed.left_out] == ["0023.png"]
    listed.retry_killed = True
    assert [unit.names for unit in listed.units()] == [["0023.png"]]


@pytest.mark.ray
def test_images_and_store_may_be_in_a_bucket(ray_cluster, tmp_path, bucket):  # noqa: F811
    folder = tmp_path / "in"
    write_images(folder, 12)
    bucket.upload(folder, "photos/")
    annotations = []
    for name, engine in (("ray", RayEngine(concurrency=1, num_cpus=1, batch=5)), ("local", LocalEngine())):
        output = output_path(f"{bucket.address}/{name}")
        made = with_detector(job(folder, output, "sink=[store,coco]"), "fakes.Halves")
        made.cfg.input = f"{bucket.address}/photos"
        summary, _ = run(engine, made)
        assert (summary.images, summary.missing, summary.skipped) == (12, 0, [])
        annotations.append(bucket.get(f"{name}/annotations.json"))
    assert annotations[0] == annotations[1]


@pytest.mark.ray
def test_workers_run_the_small_models(ray_cluster, tmp_path):
    for name, engine in (("ray", RayEngine(concurrency=1, num_cpus=1)), ("local", LocalEngine())):
        overrides = ["preset=demo", "source=images", "tracker=none", "sink=[coco]", "device=cpu"]
        run(engine, EngineJob(compose(overrides), tmp_path / name))
    ours, theirs = (json.loads((tmp_path / name / "annotations.json").read_text()) for name in ("ray", "local"))
    assert ours["images"] == theirs["images"] and len(ours["annotations"]) == len(theirs["annotations"]) > 10
    for one, other in zip(ours["annotations"], theirs["annotations"], strict=True):
        assert one["category_id"] == other["category_id"] and one["bbox"] == pytest.approx(other["bbox"], abs=1)


def test_units_are_batches_of_images_and_whole_videos_the_largest_first(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, 7)
    clip(folder / "short.mkv", 3)
    clip(folder / "x_long.mkv", 30)
    listing = Listing(parts_of(AutoSource(folder)), StoreSink(tmp_path / "out", CLASSES), 3)
    units: list[Unit] = list(listing.units())
    assert [unit.names for unit in units[:2]] == [["x_long.mkv"], ["short.mkv"]]
    assert [len(unit.items) for unit in units[2:]] == [3, 3, 1]
    assert (listing.listed, listing.to_do, listing.resumed) == (9, 9, 0)


@pytest.mark.ray
def test_an_error_of_a_worker_ends_the_run_with_its_reason(ray_cluster, tmp_path):
    folder = tmp_path / "in"
    write_images(folder, 4)
    made = with_detector(job(folder, tmp_path / "out"), "fakes.Halves", speed=3)
    with pytest.raises(Exception, match=r"^detector\.\w+|unknown key 'speed'"):
        run(RayEngine(concurrency=1, num_cpus=1), made)


def test_the_job_for_kubernetes_is_one_that_runs():
    page = (Path(__file__).parents[1] / "docs" / "guides" / "many-machines.md").read_text(encoding="utf-8")
    made = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.S)[1])
    assert made["apiVersion"] == "ray.io/v1" and made["kind"] == "RayJob"
    command, *overrides = shlex.split(made["spec"]["entrypoint"])
    cfg = compose(overrides)
    assert command == "grounded-sam" and cfg.engine.address == "auto"
    cluster = made["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert list(cfg.engine.concurrency) == [workers["minReplicas"], workers["maxReplicas"]]
    for group in (workers, cluster["headGroupSpec"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] and container["resources"]["limits"] == container["resources"]["requests"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["cpu"]) > cfg.engine.num_cpus and float(limits["nvidia.com/gpu"]) == cfg.engine.num_gpus


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"concurrency": [4, 2]}, r"engine.concurrency must be .*\[1, 8\]"),
        ({"concurrency": 0}, r"engine.concurrency must be"),
        ({"batch": 0}, r"engine.batch must be"),
        ({"object_store_memory": 1}, r"engine.object_store_memory must be"),
    ],
)
def test_settings_are_checked(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        RayEngine(**settings)


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["source.num_shards=2"], "engine=ray divides the input itself"),
        (["track.clicks=[{class: a, points: [[1, 1]]}]"], "need engine=local"),
        (["source=coco"], r"engine=ray needs images or videos"),
    ],
)
def test_what_workers_cannot_share_is_refused_before_they_start(tmp_path, overrides, reason):
    pytest.importorskip("ray.data", reason="the extra `ray` is not installed")
    folder = tmp_path / "in"
    write_images(folder, 1)
    image = {"id": 1, "file_name": "0000.png", "width": 16, "height": 12}
    coco = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(coco))
    made = job(tmp_path / "a.json" if "source=coco" in overrides else folder, tmp_path / "out", *overrides)
    with pytest.raises(ConfigError, match=reason):
        run(RayEngine(), made)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"engine=ray needs the extra ray: pip install 'grounded_sam\[ray\]'"):
        RayEngine()
