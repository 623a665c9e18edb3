"""Images under addresses: listed as they come, named like local ones, fetched ahead."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from s3 import bucket, s3  # noqa: F401

from grounded_sam.errors import ConfigError, ImageError, RemoteError
from grounded_sam.remote import Location, open_filesystem
from grounded_sam.sources.auto import AutoSource
from grounded_sam.sources.images import ImageSource
from grounded_sam.structures.protocols import ListsItems


def write_image(path, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 10, 3), value, np.uint8)).save(path)


@pytest.fixture
def tree(tmp_path):
    """Write a folder with images, and with what is to be left out."""
    for i, name in enumerate(
        ("b/10.png", "b/2.png", "a.jpg", "b/.hidden.png", ".cache/x.png", "b/UPPER.JPG", "c d.png")
    ):
        write_image(tmp_path / "in" / name, 10 * i)
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    (tmp_path / "in" / "clip.mp4").write_bytes(b"x")
    (tmp_path / "in" / "raw.nef").write_bytes(b"x")
    (tmp_path / "in" / "b" / "broken.png").write_bytes(b"")
    return tmp_path / "in"


#: A command of this checkout.
PACKAGE_ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
EXPECTED = {"a.jpg", "b/10.png", "b/2.png", "b/UPPER.JPG", "c d.png"}


@pytest.mark.parametrize("ending", ["/photos/**", "/photos/", "/photos"])
def test_a_prefix_has_the_images_of_the_folder(bucket, tree, ending):  # noqa: F811
    bucket.upload(tree, "photos/")
    bucket.put("photos-of-others/x.png", b"")
    source = ImageSource(f"{bucket.address}{ending}")
    assert isinstance(source, ListsItems)
    frames = list(source)
    local = {frame.name: frame for frame in ImageSource(tree)}
    assert {frame.name for frame in frames} == set(local) == EXPECTED
    assert [frame.name for frame in frames] == sorted(EXPECTED)  # the order of the keys
    for frame in frames:
        assert np.array_equal(frame.image, local[frame.name].image)
        assert frame.file == Location(
            f"{bucket.address}/photos/{frame.name}", frame.file.size, frame.file.etag, frame.file.modified_ns
        )
        assert frame.file.size == (tree / frame.name).stat().st_size and frame.file.etag and frame.file.modified_ns
    assert {s.file: s.reason.partition(",")[0] for s in source.skipped} == {
        "b/broken.png": "the file is empty",
        "clip.mp4": "a video",
        "raw.nef": "a camera RAW file",
    }
    with pytest.raises(TypeError):
        len(source)
    assert [f.name for f in AutoSource(f"{bucket.address}{ending}")] == [f.name for f in frames]


def test_globs_and_single_objects(bucket, tree):  # noqa: F811
    bucket.upload(tree, "photos/")
    bucket.put("photos/a[1].png", (tree / "c d.png").read_bytes())

    def names(ending: str) -> list[str]:
        return [frame.name for frame in ImageSource(f"{bucket.address}/{ending}")]

    assert names("photos/*.jpg") == ["a.jpg"]
    assert names("photos/**/*.png") == ["a[1].png", "b/10.png", "b/2.png", "c d.png"]
    assert names("photos/a.jpg") == ["a.jpg"]
    assert names("photos/a[1].png") == ["a[1].png"]
    assert names("photos/[ab].jpg") == ["a.jpg"]
    assert names("p*/b/1?.png") == ["photos/b/10.png"]
    with pytest.raises(ImageError, match="empty"):
        names("photos/b/broken.png")


def test_an_input_that_is_not_there_is_one_line(bucket):  # noqa: F811
    bucket.put("photos/a.txt.gz", b"x")
    for ending, kind, message in (
        ("/none/a.png", RemoteError, "no such object"),
        ("/photos/**", ConfigError, "no object matches s3://"),
        ("/photos/", ConfigError, "no image in s3://"),
        ("/photos/a**.jpg", ConfigError, r"\*\* stands for folders"),
    ):
        with pytest.raises(kind, match=message) as caught:
            ImageSource(bucket.address + ending)
        assert "\n" not in str(caught.value)
    with pytest.raises(RemoteError, match="s3://no-such-bucket-here.*: no such object"):
        ImageSource("s3://no-such-bucket-here/**")


def test_outputs_of_earlier_runs_are_left_out(bucket, tree):  # noqa: F811
    png = (tree / "c d.png").read_bytes()
    for key in (
        "a.png",
        "run/.grounded_sam/lock",
        "run/overlay/a.png",
        "run/mine.png",
        "old/.hydra/c.yaml",
        "old/b.png",
    ):
        bucket.put(f"photos/{key}", png)
    bucket.put("photos/run/.grounded_sam/files.jsonl", b'["overlay/a.png", "12"]\n["cut')
    assert [frame.name for frame in ImageSource(f"{bucket.address}/photos/")] == ["a.png", "run/mine.png"]


def test_an_archive_in_a_bucket_and_on_the_disk(bucket, tree, tmp_path):  # noqa: F811
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted(tree.rglob("*")):
            archive.write(path, f"in/{path.relative_to(tree)}")
    bucket.put("photos.zip", (tmp_path / "photos.zip").read_bytes())
    for place in (f"{bucket.address}/photos.zip", tmp_path / "photos.zip"):
        frames = list(ImageSource(f"zip://in/**::{place}"))
        assert {frame.name for frame in frames} == EXPECTED
        assert all(frame.file.read_bytes() == (tree / frame.name).read_bytes() for frame in frames)
    assert [f.name for f in ImageSource(f"zip://in/a.jpg::{bucket.address}/photos.zip")] == ["a.jpg"]
    bucket.put("bad.zip", b"PK no zip")
    with pytest.raises(RemoteError, match=r"bad.zip: damaged, or no zip archive"):
        ImageSource(f"zip://**::{bucket.address}/bad.zip")


def test_lists_of_addresses(bucket, tree, tmp_path):  # noqa: F811
    bucket.upload(tree, "photos/")
    lines = ["# comment", f"{bucket.address}/photos/a.jpg", "", f"{bucket.address}/photos/b/2.png", "s3://none/x.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    source = ImageSource(tmp_path / "list.txt")
    assert [f.name for f in source] == [f"{bucket.name}/photos/a.jpg", f"{bucket.name}/photos/b/2.png"]
    assert [(s.file, "no such object" in s.reason) for s in source.skipped] == [("none/x.png", True)]
    bucket.put("photos/list.txt", b"a.jpg\nb/2.png\n")
    source = ImageSource(f"{bucket.address}/photos/list.txt")
    assert [f.name for f in source] == ["a.jpg", "b/2.png"]
    items = list(source.items())
    assert all(item.etag and item.size for item in items)
    (tmp_path / "mixed.txt").write_text(f"{bucket.address}/photos/a.jpg\nin/c d.png\n")
    assert len(list(ImageSource(tmp_path / "mixed.txt"))) == 2
    bucket.put("photos/list.txt", b"/etc/passwd\n")
    assert not list(ImageSource(f"{bucket.address}/photos/list.txt"))


@pytest.fixture
def web(tree):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tree))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_images_of_a_web_server(web, tree, tmp_path):
    assert [frame.name for frame in AutoSource(f"{web}/a.jpg?token=1")] == ["a.jpg"]
    (tree / "list.txt").write_text("a.jpg\nc d.png\nb/none.png\na.jpg?size=2\n")
    source = ImageSource(f"{web}/list.txt")
    assert [f.name for f in source] == ["a.jpg", "c d.png"]
    assert {s.file: s.reason.partition(";")[0] for s in source.skipped} == {
        "b/none.png": "no such object",
        "a.jpg": "another address of the list differs only in its query, which names do not contain",
    }
    with pytest.raises(ConfigError, match="web servers list no files"):
        ImageSource(f"{web}/*.jpg")


def test_shards_have_each_image_once(bucket, tree):  # noqa: F811
    bucket.upload(tree, "photos/")
    parts = [ImageSource(f"{bucket.address}/photos/", shard=i, num_shards=3) for i in range(3)]
    assert sorted(frame.name for part in parts for frame in part) == sorted(EXPECTED)
    assert len([skipped for part in parts for skipped in part.skipped]) == 3


def test_one_object_that_is_denied_is_skipped(bucket, tree, monkeypatch):  # noqa: F811
    bucket.upload(tree, "photos/")
    fs, _ = open_filesystem(bucket.address)
    read = fs.cat_file

    def cat_file(key, **options):
        if key.endswith("a.jpg"):
            raise PermissionError(13, "Access Denied")
        return read(key, **options)

    monkeypatch.setattr(fs, "cat_file", cat_file)
    source = ImageSource(f"{bucket.address}/photos/")
    assert {frame.name for frame in source} == EXPECTED - {"a.jpg"}
    assert any("a.jpg" in s.file and "access denied" in s.reason for s in source.skipped)


def test_items_are_fetched_and_decoded_elsewhere(bucket, tree):  # noqa: F811
    import pickle

    bucket.upload(tree, "photos/")
    for given in (tree, f"{bucket.address}/photos/"):
        source = ImageSource(given)
        items = pickle.loads(pickle.dumps(list(source.items())))
        assert {item.name for item in items} == EXPECTED | {"b/broken.png"}
        whole = {frame.name: frame for frame in source}
        for item in items:
            data = source.fetch(item)
            assert len(data) == item.size
            if item.size:
                frame = source.decode(item, data)
                assert np.array_equal(frame.image, whole[item.name].image)
                assert len(frame.content.digest) == 64 and frame.file == item.place
            else:
                with pytest.raises(ImageError, match="the file is empty"):
                    source.decode(item, data)


def test_a_long_listing_is_not_kept_in_memory():
    script = Path(__file__).parents[1] / "benchmarks" / "listing.py"
    done = subprocess.run(
        [sys.executable, str(script), "--keys", "20000"], capture_output=True, text=True, check=False, env=PACKAGE_ENV
    )
    assert done.returncode == 0, done.stderr
    count, seconds, first, memory = re.findall(r"[-+\d.,]+(?= images| s,| MiB)", done.stdout)
    assert count == "20,000" and float(memory) < 25
    assert float(first) < float(seconds) / 2
