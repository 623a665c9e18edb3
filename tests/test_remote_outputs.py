"""Stores, COCO files and reports at addresses: the same content and the same promises as in folders."""

# ruff: noqa: F811, SIM118 - fixtures are arguments, and a bucket is no mapping

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command import run_command
from fakes import CLASSES, Fill, Halves
from PIL import Image
from s3 import bucket, s3  # noqa: F401

from grounded_sam import ConfigError, Pipeline, remote
from grounded_sam.config.build import build_node, check_output_address
from grounded_sam.config.compose import compose
from grounded_sam.errors import RemoteError
from grounded_sam.files import MAX_SPOOLED, atomic_text, atomic_write_text
from grounded_sam.formats.store import StoreReader, find_store
from grounded_sam.formats.store_edits import Edit, StoreEditor
from grounded_sam.formats.store_writer import StoreWriter
from grounded_sam.output.claim import claim
from grounded_sam.output.paths import STATE, RemotePath, output_path
from grounded_sam.output.remote_claim import RemoteLock
from grounded_sam.pipeline.images import process_images
from grounded_sam.pipeline.runner import Runner, Summary
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.jsonl import JsonLinesSink
from grounded_sam.sinks.metrics import metrics_sink
from grounded_sam.sinks.report import ReportSink
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.stored import StoreSource

#: A run that takes a while for each image, in a process of its own.
SLOW_RUN = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[3].split(":")
import test_remote_outputs as tests

class Slow(tests.Halves):
    def detect(self, frames, vocabulary):
        time.sleep(0.2)
        return super().detect(frames, vocabulary)

tests.Halves = Slow
tests.label(Path(sys.argv[1]), sys.argv[2], part_images=1)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    (folder / "5.png").write_bytes(b"not an image")
    return folder


def label(
    images: Path, output: str | Path, sinks=(StoreSink, CocoSink, ReportSink, JsonLinesSink), **options
) -> Summary:
    """Label images with a fake pipeline; `options` are those of the store."""
    place = output_path(output)
    made = [sink(place, CLASSES, **({"settings": {}, **options} if sink is StoreSink else {})) for sink in sinks]
    return Runner(Pipeline(Halves(), Fill(), vocabulary=CLASSES), ImageSource(images), made, place).run()


def rows(output: str | Path) -> list[dict]:
    """Return the rows of the images of a store, each with those of its objects."""
    store = StoreReader(find_store(output)).rows
    keys = store.index.sorted_keys()
    return [row for key in keys for image, objects in store.rows(key) for row in (image, *objects)]


def contents(bucket) -> dict[str, bytes]:
    return {key: bucket.get(key) for key in bucket.keys()}


def parts(bucket) -> list[str]:
    return [key for key in bucket.keys() if "/part-" in key]


def test_a_bucket_gets_what_a_folder_gets(bucket, photos, tmp_path):
    summary = label(photos, f"{bucket.address}/out", part_images=2)
    label(photos, tmp_path / "out", part_images=2)
    assert [skipped.file for skipped in summary.skipped] == ["5.png"]
    assert rows(f"{bucket.address}/out") == rows(tmp_path / "out")
    for name in ("annotations.json", "results.jsonl", "review.csv", "report.html", "skipped.json"):
        assert bucket.get(f"out/{name}") == (tmp_path / "out" / name).read_bytes(), name
    files = [path.relative_to(tmp_path) for path in (tmp_path / "out").rglob("*") if path.is_file()]
    kinds = {file.as_posix().split("-")[0] for file in files if file.name != "lock"}
    assert {key.split("-")[0] for key in bucket.keys()} == kinds
    assert f"{bucket.address}/out/annotations.json" in "\n".join(summary.outputs)


def test_a_rerun_resumes_and_replaces_its_own_files_only(bucket, photos):
    label(photos, f"{bucket.address}/out", part_images=2)
    before = parts(bucket)
    summary = label(photos, f"{bucket.address}/out", part_images=2)
    assert summary.stored == 5 and parts(bucket) == before
    bucket.put("out/annotations.json", b"{}")
    with pytest.raises(ConfigError, match=r"out/annotations.json was changed after the run that wrote it"):
        label(photos, f"{bucket.address}/out")
    bucket.put("other/review.csv", b"mine")
    with pytest.raises(ConfigError, match=r"other/review.csv exists and was not written by an earlier run"):
        label(photos, f"{bucket.address}/other")
    assert bucket.get("other/review.csv") == b"mine" and bucket.get("out/annotations.json") == b"{}"
    assert not [key for key in bucket.keys() if key.endswith("lock")]


def test_a_store_in_a_bucket_is_exported_and_reviewed(bucket, photos):
    label(photos, f"{bucket.address}/out", [StoreSink], part_images=2)
    editor = StoreEditor(f"{bucket.address}/out")
    objects = [row for row in rows(f"{bucket.address}/out") if row["kind"] == "object"]
    editor.apply([Edit(action="reject", object_id=objects[0]["object_id"])], "somebody")
    source = StoreSource(f"{bucket.address}/out")
    assert sum(len(frame.annotations) for frame in source) == len(objects) - 1
    assert [skipped.file for skipped in source.skipped] == ["5.png"]
    with pytest.raises(ConfigError, match=r"no store in s3://.*/nothing: expected a folder with _run-"):
        StoreSource(f"{bucket.address}/nothing")


@pytest.mark.parametrize("length", [0, -1])
def test_a_truncated_part_is_set_aside_and_named(bucket, photos, length):
    label(photos, f"{bucket.address}/out", [StoreSink], part_images=2)
    before = rows(f"{bucket.address}/out")
    key = parts(bucket)[0]
    bucket.put(key, bucket.get(key)[:length])
    source = StoreSource(f"{bucket.address}/out")
    assert len(list(source)) == 3 and source.skipped[-1].file == Path(key).name
    assert "cannot be read" in source.skipped[-1].reason
    summary = label(photos, f"{bucket.address}/out", [StoreSink])
    assert {skipped.file for skipped in summary.skipped} == {"5.png", Path(key).name}
    bucket.client.delete_object(Bucket=bucket.name, Key=key)
    assert rows(f"{bucket.address}/out") == before


def test_a_killed_run_leaves_whole_parts_and_resumes(bucket, photos, tmp_path):
    output, temporary = f"{bucket.address}/out", tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-c", SLOW_RUN, str(photos), output, ":".join([str(Path(__file__).parent), *sys.path])]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)}) as process:
        deadline = time.monotonic() + 200
        while not parts(bucket) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    num_parts = len(parts(bucket))
    assert 0 < num_parts < 5 and not list(temporary.iterdir())
    assert {key.split("/")[1] for key in bucket.keys()} == {STATE, "store"}  # no half annotations.json
    assert sum(row["kind"] == "image" for row in rows(output)) == num_parts  # all of them are whole
    summary = label(photos, output)  # the lock of a process that has ended is taken over
    assert summary.stored == num_parts and summary.images == 5
    label(photos, tmp_path / "out")
    assert rows(output) == rows(tmp_path / "out")


def test_an_error_publishes_nothing(bucket, photos, monkeypatch):
    label(photos, f"{bucket.address}/out", [CocoSink])
    before = contents(bucket)
    path = RemotePath(f"{bucket.address}/out/annotations.json")
    with claim(path.parent), pytest.raises(RuntimeError, match="in between"), atomic_text(path) as text:
        text.write("half of it" * 10_000)
        raise RuntimeError("in between")
    assert contents(bucket) == before

    def fails(*_, **__):
        raise RemoteError("s3://x: the server says no")

    writer = StoreWriter(path.with_name("store"), CLASSES, {})
    stages = Pipeline(Halves(), Fill(), vocabulary=CLASSES).stages
    for result in process_images(ImageSource(photos / "0.png"), CLASSES, stages):
        writer.write(result)
    monkeypatch.setattr("grounded_sam.output.paths.write_bytes", fails)
    with pytest.raises(ConfigError, match=r"cannot write into s3://.*the server says no.*continues from there"):
        writer.close(complete=True)
    monkeypatch.undo()
    assert contents(bucket) == before


def test_a_large_file_appears_when_its_upload_is_complete(bucket, monkeypatch):
    monkeypatch.setattr("grounded_sam.output.paths._ONE_REQUEST", 2**20)
    path, line = RemotePath(f"{bucket.address}/large.txt"), "x" * 1023 + "\n"
    with atomic_text(path) as text:
        for _ in range(6 * 1024):
            text.write(line)
        assert not bucket.keys()
    assert bucket.get("large.txt") == line.encode() * 6 * 1024 and MAX_SPOOLED > 2**20

    def fails(source, target, *_):
        target.write(b"x" * 60 * 2**20)  # more than one part
        raise RuntimeError("in between")

    monkeypatch.setattr("shutil.copyfileobj", fails)
    with pytest.raises(RemoteError, match="in between"):
        atomic_write_text(path, line * 2048)
    assert len(bucket.get("large.txt")) == 6 * 2**20
    assert not bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads")


def test_one_run_at_a_time(bucket):
    folder = RemotePath(f"{bucket.address}/out")
    with claim(folder) as claimed, claim(folder) as again:
        assert claimed is again
        with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match="another run is writing to"):
            pool.submit(lambda: claim(folder).__enter__()).result()
        lock = json.loads(bucket.get(f"out/{STATE}/lock"))
    bucket.put(f"out/{STATE}/lock", json.dumps({**lock, "pid": os.getppid()}).encode())
    message = rf"another run is writing to .*process {os.getppid()} on .*, since .*delete s3://.*lock"
    with pytest.raises(ConfigError, match=message), claim(folder):
        pass
    bucket.client.delete_object(Bucket=bucket.name, Key=f"out/{STATE}/lock")  # as the message says
    with claim(folder):
        pass
    assert not bucket.keys()


def test_the_lock_of_another_machine_counts_as_long_as_it_shows_life(bucket, monkeypatch, capsys):
    monkeypatch.setattr("grounded_sam.output.remote_claim.BEAT_S", 0.1)
    monkeypatch.setattr("grounded_sam.output.remote_claim.STALE_S", 3.0)
    path = RemotePath(f"{bucket.address}/lock")
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    held = RemoteLock(path, "")
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    with pytest.raises(ConfigError, match=r"a run is at it \(process \d+ on elsewhere.*delete s3://"):
        RemoteLock(path, "a run is at it")
    assert "Waiting up to 3 s: a run is at it" in capsys.readouterr().err
    held._released.set()  # as if its machine were gone
    held._thread.join()
    with RemoteLock(path, "a run is at it"):
        held.release()  # it comes back, and the lock is not its own
        assert json.loads(bucket.get("lock"))["host"] == "here"
    assert not bucket.keys()


def test_a_run_whose_output_was_taken_over_stops(bucket, monkeypatch):
    monkeypatch.setattr("grounded_sam.output.remote_claim.BEAT_S", 0.05)
    folder = RemotePath(f"{bucket.address}/out")
    with claim(folder) as claimed:
        while claimed._lock._thread.is_alive():  # it may write its sign of life at the same moment
            bucket.put(f"out/{STATE}/lock", b'{"id": "another"}')
            time.sleep(0.1)
        with pytest.raises(ConfigError, match="another run has taken over s3://.*continues from there"):
            atomic_write_text(folder / "annotations.json", "{}")
    assert bucket.keys() == [f"out/{STATE}/lock"] and b"another" in bucket.get(f"out/{STATE}/lock")


def test_of_several_claims_at_a_time_one_wins(bucket, monkeypatch):
    monkeypatch.setattr("grounded_sam.output.remote_claim.BEAT_S", 0.2)
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    path, start = RemotePath(f"{bucket.address}/lock"), threading.Barrier(8)

    def take(_) -> RemoteLock | None:
        start.wait()
        try:
            return RemoteLock(path, "another process is at it")
        except ConfigError:
            return None

    for round_number in range(4):
        if round_number % 2:  # there is the lock of a process that has ended
            RemoteLock(path, "")._released.set()
            content = json.loads(bucket.get("lock"))
            bucket.put("lock", json.dumps({**content, "pid": int(ended.stdout)}).encode())
        with ThreadPoolExecutor(8) as pool:
            locks = [lock for lock in pool.map(take, range(8)) if lock is not None]
        assert len(locks) == 1
        locks[0].release()
        assert not bucket.keys()


def test_workers_write_into_the_store_that_another_process_opened(bucket, photos):
    output = f"{bucket.address}/out"
    label(photos / "0.png", output, [StoreSink])
    rejected = next(row["object_id"] for row in rows(output) if row["kind"] == "object")
    StoreEditor(output).apply([Edit(action="reject", object_id=rejected)], "somebody")
    opened = StoreWriter(output_path(output) / "store", CLASSES, {"seed": 1}, resume="replace")
    workers = [StoreWriter.join(pickle.loads(pickle.dumps(opened.share()))) for _ in range(2)]
    stages, found = Pipeline(Halves(), Fill(), vocabulary=CLASSES).stages, {}
    for number, frame in enumerate(ImageSource(photos)):
        assert opened.lookup(frame.name, [frame.file]) is None
        known = pickle.loads(pickle.dumps(opened.known(frame.name, [frame.file])))
        writer = workers[number % 2]
        writer.expect(known)
        for result in process_images([frame], CLASSES, stages):
            reviewed = writer.reviewed(result)
            found[frame.name] = len(reviewed.raw)
            writer.write(reviewed)
        writer.flush()
        assert frame.name in {row["file"] for row in rows(output)}  # stored, whatever happens to the worker now
    for writer in (*workers, opened):
        writer.close(complete=True)
    assert found == {"0.png": 1, **{f"{i}.png": 2 for i in range(1, 5)}}  # what somebody decided counts
    assert [row["file"] for row in rows(output) if row["kind"] == "image"] == [f"{i}.png" for i in range(5)]
    assert sum(len(frame.annotations) for frame in StoreSource(output)) == 9
    again = StoreWriter(output_path(output) / "store", CLASSES, {"seed": 1})
    assert all(again.lookup(f"{i}.png", [photos / f"{i}.png"]) is not None for i in range(5))


def test_a_worker_reads_nothing(bucket, photos, monkeypatch):
    label(photos, f"{bucket.address}/out", [StoreSink], part_images=1)
    opened = StoreWriter(output_path(f"{bucket.address}/out") / "store", CLASSES, {})
    requests = []
    monkeypatch.setattr(RemotePath, "read_bytes", requests.append)
    monkeypatch.setattr(RemotePath, "_ask", lambda path, _: requests.append(path))
    StoreWriter.join(opened.share()).close(complete=True)
    assert not requests


@pytest.mark.parametrize("sinks", ["overlay", "[store,yolo]", "[overlay,coco]", "voc", "masks"])
def test_sinks_that_need_a_folder_are_refused_before_a_model_is_loaded(sinks):
    cfg = compose(["preset=shapes", f"sink={sinks}", "input=photos", "text=[a]", "output=s3://bucket/labels"])
    name = next(name for name in sinks.strip("[]").split(",") if name not in ("store", "coco"))
    message = rf"sink={name} cannot write to s3://bucket/labels, only store, coco, report, metrics and jsonl can; use "
    with pytest.raises(ConfigError, match=message + rf".*'source=stored input=.* sink={name} output=FOLDER'"):
        check_output_address(cfg, output_path("s3://bucket/labels"))
    check_output_address(cfg, Path("labels"))


def test_the_way_out_of_a_refused_sink(bucket, photos, tmp_path):
    label(photos, f"{bucket.address}/out", [StoreSink])
    cfg = compose(["source=stored", f"input={bucket.address}/out", "sink=yolo", "preset=shapes"])
    source = build_node(cfg, "source")
    sink = build_node(cfg, "sink.yolo", output=tmp_path, vocabulary=source.vocabulary)
    model = Pipeline(build_node(cfg, "detector"), None, vocabulary=source.vocabulary)
    assert Runner(model, source, [sink], tmp_path).run().images == 5
    assert len(list((tmp_path / "yolo" / "labels").rglob("*.txt"))) == 5


def test_metrics_in_a_bucket_are_those_in_a_folder(bucket, photos, tmp_path):
    label(photos, tmp_path / "truth", [CocoSink])
    for place in (output_path(f"{bucket.address}/out"), tmp_path / "out"):
        sink = metrics_sink(place, CLASSES, truth=tmp_path / "truth" / "annotations.json")
        Runner(Pipeline(Halves(), None, vocabulary=CLASSES), ImageSource(photos), [sink], place).run()
    for name in ("metrics.json", "classes.yaml"):
        assert bucket.get(f"out/{name}") == (tmp_path / "out" / name).read_bytes()


def test_copies_of_images_at_an_address_are_refused():
    with pytest.raises(ConfigError, match=r"sink.coco.images=copy writes image files to a folder, not to memory://x"):
        CocoSink(RemotePath("memory://x"), CLASSES, images="copy")


def test_secrets_of_an_address_are_not_written(bucket, photos):
    summary = label(photos, f"{bucket.address.replace('s3://', 's3://test-key:test-secret@')}/out")
    assert "test-secret" not in "\n".join(summary.outputs)
    assert not [key for key, content in contents(bucket).items() if b"test-secret" in content]
    review = list(csv.DictReader(bucket.get("out/review.csv").decode().splitlines()))
    assert {row["reason"] for row in review} >= {"skipped", "crowded"}


def test_outputs_in_folders_need_no_fsspec(tmp_path):
    script = (
        "import sys; from grounded_sam.output.paths import output_path; from grounded_sam.output.claim import claim\n"
        "from grounded_sam.sinks.store import StoreSink\n"
        "with claim(output_path(sys.argv[1])): pass\n"
        "sys.exit(any(name.startswith(('fsspec', 's3fs', 'botocore')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 0


def test_an_address_that_cannot_be_written(bucket, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    message = r"cannot write into s3://no-such-bucket-here/x: s3://.*choose another output"
    with pytest.raises(ConfigError, match=message):
        claim(RemotePath("s3://no-such-bucket-here/x")).__enter__()
    with pytest.raises(ConfigError, match="unknown protocol 'nowhere'"):
        claim(RemotePath("nowhere://x/y")).__enter__()


def test_commands_on_addresses(bucket, photos, tmp_path):
    label(photos, tmp_path / "labels", [StoreSink])
    secret = bucket.address.replace("s3://", "s3://test-key:test-secret@")

    def run(*arguments: str, module: str = "main") -> tuple[int, str]:
        result = run_command(f"grounded_sam.cli.{module}", list(arguments), tmp_path)
        return result.returncode, result.stdout + result.stderr

    export = ("source=stored", "input=labels", "sink=[coco,report]")
    code, said = run(*export, f"output={secret}/out")
    assert code == 0 and f"{bucket.address}/out/annotations.json" in said and "test-secret" not in said
    assert len(json.loads(bucket.get("out/annotations.json"))["images"]) == 5
    assert json.loads(bucket.get("out/skipped.json"))[0]["file"] == "5.png"
    assert json.loads(bucket.get("out/run.json"))["images"] == 5
    saved = bucket.get("out/.hydra/config.yaml").decode()
    assert "run:\n    dir: ${output}" in saved and "test-secret" not in saved
    code, said = run(*export[:2], "sink=[overlay,coco]", f"output={bucket.address}/out2")
    assert code == 1 and "sink=overlay cannot write to s3://" in said and said.count("\n") == 1
    code, said = run("-m", *export, "select.score=0.1,0.2", f"output={bucket.address}/out3")
    assert code == 1 and "jobs of -m cannot write to s3://" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels"]  # no folder named s3:

    for module, arguments in (("report", ()), ("label_studio", ("create",))):
        code, said = run(*arguments, f"{bucket.address}/out", module=module)
        assert code == 1 and "is an address, and this command needs a folder of this machine" in said

    label(photos, f"{bucket.address}/stored", [StoreSink])
    code, said = run("next", f"{bucket.address}/stored", module="review")
    assert code == 1 and "say with --to where to write next.csv" in said
    code, said = run("next", f"{bucket.address}/stored", "--to", "next.csv", module="review")
    assert code == 0 and "10 objects to look at: next.csv" in said
    text = (tmp_path / "next.csv").read_text()
    (tmp_path / "next.csv").write_text(text.replace("predicted", "accepted"))
    code, said = run("import", f"{bucket.address}/stored", "next.csv", module="review")
    assert code == 0 and "10 accept" in said
    assert {row["status"] for row in rows(f"{bucket.address}/stored") if row["kind"] != "image"} == {"accepted"}
