"""Images in tar shards, made by webdataset itself and by others."""

from __future__ import annotations

import io
import pickle
import tarfile

import numpy as np
import pytest
from fakes import CLASSES, Fill, Halves
from PIL import Image
from s3 import bucket, s3  # noqa: F401

from grounded_sam import Pipeline
from grounded_sam.errors import ConfigError
from grounded_sam.pipeline.runner import Runner
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sinks.yolo import YoloSink
from grounded_sam.sources.stored import StoreSource
from grounded_sam.sources.webdataset import WebDatasetSource
from grounded_sam.structures.protocols import ListsItems


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((8, 10, 3), value, np.uint8)).save(content, format="PNG")
    return content.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Write two shards with webdataset."""
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"train-{shard:03d}.tar")) as writer:
            for i in range(3):
                key = f"sub/{shard}{i:03d}"
                writer.write({"__key__": key, "png": png(10 * i + shard), "txt": "a car", "json": {"id": i}})
    return folder


NAMES = [f"train-00{s}.tar/sub/{s}00{i}.png" for s in range(2) for i in range(3)]


def test_shards_of_webdataset_are_read_with_their_keys(shards, bucket):  # noqa: F811
    bucket.upload(shards, "data/")
    for given in (shards, f"{shards}/*.tar", f"{bucket.address}/data/", f"{bucket.address}/data/train-*.tar"):
        source = WebDatasetSource(given)
        frames = list(source)
        assert [frame.name for frame in frames] == NAMES and not source.skipped
        assert [int(frame.image[0, 0, 0]) for frame in frames] == [0, 10, 20, 1, 11, 21]
        assert isinstance(source, ListsItems)
        items = pickle.loads(pickle.dumps(list(source.items())))
        assert [item.name for item in items] == NAMES and items[0].member == "sub/0000.png"
        for item, frame in zip(items, frames, strict=True):
            assert np.array_equal(source.decode(item, source.fetch(item)).image, frame.image)
    parts = [WebDatasetSource(shards, shard=i, num_shards=2) for i in range(2)]
    assert sorted(frame.name for part in parts for frame in part) == NAMES
    (shards / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no .tar file in"):
        WebDatasetSource(shards / "empty")


def test_they_are_labeled_resumed_and_exported(shards, bucket, tmp_path):  # noqa: F811
    bucket.upload(shards, "data/")
    address = f"{bucket.address}/data/"

    def label():
        detector, output = Halves(), tmp_path / "out"
        sinks = [StoreSink(output, CLASSES, {}), YoloSink(output, CLASSES)]
        Runner(Pipeline(detector, Fill(), vocabulary=CLASSES), WebDatasetSource(address), sinks, output).run()
        return detector

    assert sum(label().calls) == 6
    assert not label().calls
    written = sorted((tmp_path / "out" / "yolo").rglob("*.png"))
    assert len(written) == 6 and written[0].read_bytes() == png(0)
    replayed = list(StoreSource(tmp_path / "out", roots=[address]))
    assert [int(frame.image[0, 0, 0]) for frame in replayed] == [0, 10, 20, 1, 11, 21]


def test_shards_of_this_machine_are_replayed(shards, tmp_path):
    model = Pipeline(Halves(), Fill(), vocabulary=CLASSES)
    Runner(model, WebDatasetSource(shards), [StoreSink(tmp_path / "out", CLASSES, {})], tmp_path / "out").run()
    replayed = list(StoreSource(tmp_path / "out"))
    assert [int(frame.image[0, 0, 0]) for frame in replayed] == [0, 10, 20, 1, 11, 21]


def test_a_truncated_tar_gives_what_it_holds_and_is_listed(shards, bucket):  # noqa: F811
    path = shards / "train-000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmember("sub/0002.png")
    path.write_bytes(whole[: last.offset_data + last.size // 2])
    bucket.upload(shards, "data/")
    for given in (path, f"{bucket.address}/data/train-000.tar"):
        source = WebDatasetSource(given)
        assert [frame.name for frame in source] == NAMES[:2]
        assert [s.file for s in source.skipped] == ["train-000.tar"]
        assert "its first 2 images were read" in source.skipped[0].reason
        source = WebDatasetSource(given)
        assert [item.name for item in source.items()] == NAMES[:2] and len(source.skipped) == 1
    (shards / "train-001.tar").write_bytes(b"no tar" * 200)
    source = WebDatasetSource(shards / "train-001.tar")
    assert not list(source) and source.skipped[0].file == "train-001.tar"


def test_hostile_members_are_named_and_not_read(tmp_path):
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
            archive.addfile(member, io.BytesIO(data))

        add("good.png", data=png(7))
        add("../up.png", data=png(8))
        add("/abs.png", data=png(8))
        add("link.png", tarfile.SYMTYPE)
        add("hard.png", tarfile.LNKTYPE)
        add("pipe.png", tarfile.FIFOTYPE)
        add("good.png", data=png(9))
        add("._good.png", data=b"x")
        add("inner.tar", data=b"x")
        add("broken.png", data=b"x")
    source = WebDatasetSource(path)
    frames = list(source)
    assert [(frame.name, int(frame.image[0, 0, 0])) for frame in frames] == [("bad.tar/good.png", 7)]
    reasons = {s.file.removeprefix("bad.tar/"): s.reason for s in source.skipped}
    assert set(reasons) == {"../up.png", "/abs.png", "link.png", "hard.png", "pipe.png", "good.png", "broken.png"}
    assert "leads out" in reasons["../up.png"] and "a link" in reasons["link.png"] and "second" in reasons["good.png"]
