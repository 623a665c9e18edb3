"""Images in Lance tables, written by lance itself."""

from __future__ import annotations

import os
import pickle
import sys

import numpy as np
import pyarrow as pa
import pytest
from command import run_command
from fakes import CLASSES, Fill, Halves
from s3 import bucket, s3  # noqa: F401
from test_parquet import png

from grounded_sam import Pipeline
from grounded_sam.errors import ConfigError, MissingObjectError
from grounded_sam.pipeline.runner import Runner
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.lance import LanceSource
from grounded_sam.sources.stored import StoreSource

lance = pytest.importorskip("lance", reason="the extra `lance` is not installed")


def write_table(address: str, count: int = 5, **options) -> None:
    """Write images in fragments of two rows, and a row without bytes."""
    images = [png(10 * i) for i in range(count)] + [None]
    table = pa.table({"id": list(range(count + 1)), "image": pa.array(images, pa.large_binary())})
    lance.write_dataset(table, address, max_rows_per_file=2, **options)


def label(given, output) -> Halves:
    """Store what a fake detector finds in a table."""
    detector = Halves()
    model = Pipeline(detector, Fill(), vocabulary=CLASSES)
    Runner(model, LanceSource(given), [StoreSink(output, CLASSES, {}, resume="extend")], output).run()
    return detector


def test_rows_are_read_from_the_disk_and_a_bucket(tmp_path, bucket, s3):  # noqa: F811
    write_table(str(tmp_path / "a.lance"))
    address = f"{bucket.address}/data/a.lance"
    write_table(address, storage_options={"allow_http": "true"})
    for given in (tmp_path, tmp_path / "a.lance", address, address.replace("s3://", "s3://test-key:test-secret@")):
        source = LanceSource(given)
        frames = list(source)
        assert [frame.name for frame in frames] == [f"a.lance/{i:06d}" for i in range(5)]
        assert [int(frame.image[0, 0, 0]) for frame in frames] == [0, 10, 20, 30, 40]
        assert [skipped.file for skipped in source.skipped] == ["a.lance/000005"]
        items = pickle.loads(pickle.dumps(list(source.items())))
        assert all("secret" not in str(item.place) for item in items)
        for item, frame in zip(items, frames, strict=True):
            assert np.array_equal(source.decode(item, source.fetch(item)).image, frame.image)


def test_tables_are_labeled_resumed_and_replayed(tmp_path, bucket, s3):  # noqa: F811
    for address in (str(tmp_path / "a.lance"), f"{bucket.address}/a.lance"):
        output = tmp_path / ("local" if "s3" not in address else "remote")
        options = {"storage_options": {"allow_http": "true"}} if "s3" in address else {}
        write_table(address, **options)
        assert sum(label(address, output).calls) == 5 and not label(address, output).calls
        # Of a new version only what is new is computed; the stored images are read from theirs.
        new = pa.table({"id": [9], "image": pa.array([png(99)], pa.large_binary())})
        lance.write_dataset(new, address, mode="append", **options)
        assert sum(label(address, output).calls) == 1
        replayed = list(StoreSource(output, roots=[address]))
        assert [int(frame.image[0, 0, 0]) for frame in replayed] == [0, 10, 20, 30, 40, 99]


def test_rows_that_were_deleted_are_left_out(tmp_path):
    write_table(str(tmp_path / "a.lance"))
    lance.dataset(str(tmp_path / "a.lance")).delete("id = 1 OR id = 2")
    source = LanceSource(tmp_path)
    levels = [int(frame.image[0, 0, 0]) for frame in source]
    assert levels == [0, 30, 40]
    assert [int(source.decode(item, source.fetch(item)).image[0, 0, 0]) for item in source.items()] == levels


def test_what_is_wrong_is_said_in_a_line(tmp_path, monkeypatch, bucket, s3):  # noqa: F811
    with pytest.raises(ConfigError, match="no such folder"):
        LanceSource(tmp_path / "a.lance")
    with pytest.raises(ConfigError, match="no Lance table"):
        LanceSource(tmp_path)
    with pytest.raises(ConfigError, match=r"ends with .lance, got s3://bucket/data"):
        LanceSource("s3://key:secret@bucket/data")
    with pytest.raises(MissingObjectError, match=r"a\.lance: no Lance table"):
        LanceSource(f"{bucket.address}/a.lance")
    write_table(str(tmp_path / "a.lance"))
    source = LanceSource(tmp_path, column="id")
    assert not list(source) and "no column 'id' of bytes" in source.skipped[0].reason
    for part in (tmp_path / "a.lance" / "data").iterdir():
        os.truncate(part, 10)
    source = LanceSource(tmp_path)
    assert not list(source) and [skipped.file for skipped in source.skipped] == ["a.lance"]
    assert ".rs:" not in source.skipped[0].reason and "its first 0 rows were read" in source.skipped[0].reason
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(ConfigError, match=r"pip install 'grounded_sam\[lance\]'"):
        LanceSource(tmp_path)


def test_the_command_reads_them(tmp_path):
    write_table(str(tmp_path / "a.lance"))
    overrides = ["preset=shapes", "text=[red circle]", "source=lance", "input=a.lance", "output=out"]
    result = run_command("grounded_sam.cli.main", overrides, tmp_path)
    assert result.returncode == 0 and "5 images" in result.stdout and "000005: no bytes" in result.stdout
