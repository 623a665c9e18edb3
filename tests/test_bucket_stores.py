"""Images in a bucket are labeled, resumed, exported and replayed as local ones are."""

from __future__ import annotations

import json
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import CLASSES, Fill, Halves
from PIL import Image
from s3 import bucket, s3  # noqa: F401

from grounded_sam import Pipeline
from grounded_sam.errors import ConfigError, ImageError
from grounded_sam.formats.store_files import StoredFiles
from grounded_sam.pipeline.runner import Runner
from grounded_sam.remote import Location, below, open_filesystem
from grounded_sam.serve.roots import Roots
from grounded_sam.sinks.coco import CocoSink
from grounded_sam.sinks.imagefolder import ImageFolderSink
from grounded_sam.sinks.label_studio import LabelStudioSink
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sinks.voc import VocSink
from grounded_sam.sinks.yolo import YoloSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.stored import StoreSource
from grounded_sam.structures.frame import undecoded


@pytest.fixture
def tree(tmp_path):
    """Write a JPEG, a PNG, one that has to be re-encoded, and a damaged one."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    pixels = np.random.default_rng(3).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.fromarray(pixels[::-1]).save(folder / "sub" / "b.png")
    Image.fromarray(pixels).convert("P").save(folder / "c.gif")
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def label(given, output, *sinks, **options):
    detector = Halves()
    store = StoreSink(output, CLASSES, {}, **options)
    summary = Runner(Pipeline(detector, Fill(), vocabulary=CLASSES), ImageSource(given), [store, *sinks], output).run()
    return detector, summary


def rows(output) -> list[dict]:
    return [row for part in sorted(output.glob("store/part-*.parquet")) for row in pq.read_table(part).to_pylist()]


class Requests:
    """Count the objects that are read."""

    def __init__(self, bucket, monkeypatch) -> None:  # noqa: F811
        fs, _ = open_filesystem(bucket.address)
        self.keys: list[str] = []
        read = fs.cat_file

        def cat_file(key, **options):
            self.keys.append(key.partition("/")[2])
            return read(key, **options)

        monkeypatch.setattr(fs, "cat_file", cat_file)


def test_the_rows_are_those_of_local_files_and_each_object_is_read_once(bucket, tree, tmp_path, monkeypatch):  # noqa: F811
    bucket.upload(tree, "photos/")
    requests = Requests(bucket, monkeypatch)
    _, remote = label(f"{bucket.address}/photos/**", tmp_path / "remote", YoloSink(tmp_path / "remote", CLASSES))
    assert sorted(requests.keys) == ["photos/a.jpg", "photos/bad.png", "photos/c.gif", "photos/sub/b.png"]
    label(tree, tmp_path / "local")

    def comparable(output) -> list[tuple]:
        left_out = ("path", "etag", "mtime_ns")
        return sorted(tuple(repr(value) for key, value in row.items() if key not in left_out) for row in rows(output))

    assert comparable(tmp_path / "remote") == comparable(tmp_path / "local")
    image = next(row for row in rows(tmp_path / "remote") if row["file"] == "a.jpg")
    assert image["path"] == f"{bucket.address}/photos/a.jpg" and image["etag"] and len(image["digest"]) == 64
    assert [s.file for s in remote.skipped] == ["bad.png"]


def test_a_resumed_run_reads_only_what_has_changed(bucket, tree, tmp_path, monkeypatch):  # noqa: F811
    bucket.upload(tree, "photos/")
    address, output = f"{bucket.address}/photos/", tmp_path / "out"
    label(address, output)
    requests = Requests(bucket, monkeypatch)
    detector, summary = label(address, output, CocoSink(output, CLASSES))
    assert not detector.calls and summary.stored == 3 and requests.keys == ["photos/bad.png"]
    requests.keys.clear()
    bucket.put("photos/a.jpg", (tree / "a.jpg").read_bytes() + b"\0")
    bucket.put("photos/d.png", (tree / "sub" / "b.png").read_bytes())
    detector, summary = label(address, output)
    assert sum(detector.calls) == 2 and summary.images == 2
    assert sorted(requests.keys) == ["photos/a.jpg", "photos/bad.png", "photos/d.png"]
    bucket.put("moved/sub/b.png", (tree / "sub" / "b.png").read_bytes())  # is recognized by its content
    detector, summary = label(f"{bucket.address}/moved/", output)
    assert not detector.calls


def test_a_local_run_that_resumes_does_not_read_the_images(tree, tmp_path, monkeypatch):
    label(tree, tmp_path / "out")
    (tree / "bad.png").unlink()
    monkeypatch.setattr("grounded_sam.sources.items.read_item", lambda item: 1 / 0)
    monkeypatch.setattr("grounded_sam.formats.store_writer.file_digest", lambda files: 1 / 0)
    detector, _ = label(tree, tmp_path / "out")
    assert not detector.calls


def test_a_local_file_that_changed_or_moved_is_found_out(tree, tmp_path):
    label(tree, tmp_path / "out")
    time.sleep(0.02)
    (tree / "a.jpg").write_bytes((tree / "a.jpg").read_bytes()[:-2] + b"\xff\xd9")  # the same content, written again
    Image.new("RGB", (32, 24)).save(tree / "sub" / "b.png")
    detector, _ = label(tree, tmp_path / "out")
    assert sum(detector.calls) == 1
    moved = tree.rename(tmp_path / "moved")
    detector, _ = label(moved, tmp_path / "out")
    assert not detector.calls


@pytest.mark.parametrize("kind", [YoloSink, VocSink, ImageFolderSink, LabelStudioSink])
def test_datasets_get_the_bytes_of_the_objects(bucket, tree, tmp_path, kind):  # noqa: F811
    bucket.upload(tree, "photos/")
    label(f"{bucket.address}/photos/", tmp_path / "remote", kind(tmp_path / "remote", CLASSES))
    label(tree, tmp_path / "local", kind(tmp_path / "local", CLASSES))

    def files(output) -> dict:
        """The files of the dataset, apart from those that name versions or folders."""
        folder = output / kind.name
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.suffix in (".jpg", ".png", ".txt", ".xml", ".jsonl")
        }

    remote, local = files(tmp_path / "remote"), files(tmp_path / "local")
    assert {name for name in remote if name.endswith((".jpg", ".png"))}
    assert set(remote) == set(local)
    assert {n: d for n, d in remote.items() if n.endswith((".jpg", ".png"))} == {
        n: d for n, d in local.items() if n.endswith((".jpg", ".png"))
    }


def test_images_are_named_by_address_on_request(bucket, tree, tmp_path):  # noqa: F811
    bucket.upload(tree, "photos/")
    address = f"s3://key:hunter2@{bucket.name}/photos/"
    sinks = [kind(tmp_path, CLASSES, images="address") for kind in (CocoSink, LabelStudioSink)]
    label(address, tmp_path, *sinks)
    images = json.loads((tmp_path / "annotations.json").read_text())["images"]
    assert {i["file_name"]: i["coco_url"] for i in images}["sub/b.png"] == f"{bucket.address}/photos/sub/b.png"
    tasks = json.loads((tmp_path / "label_studio" / "tasks.json").read_text())
    assert f"{bucket.address}/photos/a.jpg" in [task["data"]["image"] for task in tasks]
    assert not list((tmp_path / "label_studio").rglob("*.jpg"))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    with pytest.raises(ImageError, match="no usable images"):
        label(tree, tmp_path / "local", CocoSink(tmp_path / "local", CLASSES, images="address"))
    skipped = json.loads((tmp_path / "local" / "skipped.json").read_text())
    assert any("images=address is for images in buckets" in entry["reason"] for entry in skipped)
    with pytest.raises(ConfigError, match="sink.yolo.images must be link, copy or none"):
        YoloSink(tmp_path, CLASSES, images="address")


def test_a_stored_address_is_opened_only_below_a_named_root(bucket, tree, tmp_path, monkeypatch):  # noqa: F811
    bucket.upload(tree, "photos/")
    label(f"{bucket.address}/photos/", tmp_path)
    requests = Requests(bucket, monkeypatch)
    source = StoreSource(tmp_path)
    assert not list(source)
    assert all(f"set source.roots=[{bucket.address}/photos/" in s.reason for s in source.skipped if s.file != "bad.png")
    frames = list(StoreSource(tmp_path, check_files=False))
    assert len(frames) == 3
    with pytest.raises(ImageError, match="source.roots"):
        _ = frames[0].image
    assert not requests.keys
    for options in ({"roots": [f"{bucket.address}/"]}, {"root": f"{bucket.address}/photos"}):
        source = StoreSource(tmp_path, **options)
        replayed = {frame.name: frame for frame in source}
        assert set(replayed) == {"a.jpg", "c.gif", "sub/b.png"} and len(source.skipped) == 1
        image = replayed["sub/b.png"].image
        assert np.array_equal(image, np.asarray(Image.open(tree / "sub" / "b.png")))
    bucket.put("photos/a.jpg", b"another")
    bucket.client.delete_object(Bucket=bucket.name, Key="photos/c.gif")
    source = StoreSource(tmp_path, roots=[bucket.address])
    assert [frame.name for frame in source] == ["sub/b.png"]
    reasons = {s.file: s.reason for s in source.skipped}
    assert "has changed since" in reasons["a.jpg"] and "no such object" in reasons["c.gif"]


@pytest.mark.parametrize(
    ("root", "address", "expected"),
    [
        ("s3://b/photos/", "s3://b/photos/a.jpg", True),
        ("s3://b", "s3://b/photos/a.jpg", True),
        ("s3://b/photos", "s3://b/photos2/a.jpg", False),
        ("s3://b/photos", "s3://b/photos/../secret", False),
        ("https://host/photos", "https://host/photos/%2e%2e/admin.jpg", False),
        ("https://host/", "https://host@evil/a.jpg", False),
        ("s3://b/", "gs://b/a.jpg", False),
        ("s3://b/", "http://169.254.169.254/latest/a.jpg", False),
        ("s3://b/", "file:///etc/passwd", False),
        ("s3://b/", "zip://a.jpg::s3://b/x.zip", True),
        ("zip://in/**::s3://b/x.zip", "zip://a.jpg::s3://b/x.zip", True),
        ("s3://b/", "zip://a.jpg::/etc/x.zip", False),
        ("s3://b/", "zip://a.jpg::s3://other/x.zip", False),
        ("", "s3://b/a.jpg", False),
    ],
)
def test_which_addresses_are_below_a_root(root, address, expected):
    assert (below(root, address) is not None) is expected
    row = {"path": address, "file": "a.jpg", "video": None, "bytes": 1, "etag": "x", "mtime_ns": 1, "digest": "0"}
    is_path = address.startswith("file:") or address.endswith("::/etc/x.zip")  # as any path of this machine
    assert StoredFiles(None, [root] if root else []).find(row, ()).refused is (not expected and not is_path)


def test_a_server_opens_addresses_below_its_roots(bucket):  # noqa: F811
    roots = Roots([f"{bucket.address}/photos"])
    assert not roots.folders
    assert roots.contains(Location(f"{bucket.address}/photos/a.jpg"))
    assert not roots.contains(Location(f"{bucket.address}/other/a.jpg"))
    assert not Roots([]).contains(Location(f"{bucket.address}/photos/a.jpg"))


def test_a_frame_without_pixels_reads_its_object_again(bucket, tree):  # noqa: F811
    bucket.upload(tree, "photos/")
    frame = next(f for f in ImageSource(f"{bucket.address}/photos/") if f.name == "sub/b.png")
    light = undecoded(frame)
    assert callable(light.pixels) and (light.content is None or light.content.data is None)
    assert np.array_equal(light.image, frame.image)
