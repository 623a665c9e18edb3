"""Images in Parquet tables, made by datasets itself and by pyarrow."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import CLASSES, Fill, Halves
from PIL import Image
from s3 import bucket, s3  # noqa: F401

from grounded_sam import Pipeline
from grounded_sam.pipeline.runner import Runner
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.parquet import ParquetSource
from grounded_sam.sources.stored import StoreSource


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((8, 10, 3), value, np.uint8)).save(content, format="PNG")
    return content.getvalue()


def write_table(path, count: int = 5) -> None:
    """Write images as `datasets` does, two rows a group, and a row without bytes."""
    cells = [{"bytes": png(10 * i), "path": f"../x/{i}.png"} for i in range(count)] + [{"bytes": None, "path": "a.png"}]
    pq.write_table(pa.table({"id": list(range(count + 1)), "image": cells}), path, row_group_size=2)


NAMES = [f"{i:06d}-{i}.png" for i in range(5)]


def test_rows_are_read_from_the_disk_and_a_bucket(tmp_path, bucket):  # noqa: F811
    write_table(tmp_path / "a.parquet")
    bucket.upload(tmp_path, "data/")
    for given in (tmp_path, tmp_path / "a.parquet", f"{bucket.address}/data/", f"{bucket.address}/data/a.parquet"):
        source = ParquetSource(given)
        frames = list(source)
        assert [frame.name for frame in frames] == [f"a.parquet/{name}" for name in NAMES]
        assert [int(frame.image[0, 0, 0]) for frame in frames] == [0, 10, 20, 30, 40]
        assert [s.file for s in source.skipped] == ["a.parquet/000005-a.png"]
        items = pickle.loads(pickle.dumps(list(source.items())))
        for item, frame in zip(items, frames, strict=True):
            assert np.array_equal(source.decode(item, source.fetch(item)).image, frame.image)


def test_they_are_labeled_resumed_and_replayed(tmp_path, bucket):  # noqa: F811
    write_table(tmp_path / "a.parquet")
    address = bucket.put("data/a.parquet", (tmp_path / "a.parquet").read_bytes())

    def label():
        detector, output = Halves(), tmp_path / "out"
        model = Pipeline(detector, Fill(), vocabulary=CLASSES)
        Runner(model, ParquetSource(address), [StoreSink(output, CLASSES, {})], output).run()
        return detector

    assert sum(label().calls) == 5 and not label().calls
    replayed = list(StoreSource(tmp_path / "out", roots=[f"{bucket.address}/data/"]))
    assert [int(frame.image[0, 0, 0]) for frame in replayed] == [0, 10, 20, 30, 40]


def test_the_column_is_found_or_asked_for(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"jpg": [png(1)], "mask": [png(2)], "n": [1]}), path)
    source = ParquetSource(path)
    assert not list(source) and "set source.column" in source.skipped[0].reason
    assert [int(frame.image[0, 0, 0]) for frame in ParquetSource(path, column="mask")] == [2]
    source = ParquetSource(path, column="n")
    assert not list(source) and "no column 'n' of bytes" in source.skipped[0].reason
    path.write_bytes(path.read_bytes()[:-20])
    source = ParquetSource(path)
    assert not list(source) and source.skipped[0].file == "a.parquet"


def test_tables_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    images = [Image.open(io.BytesIO(png(i))) for i in (3, 9)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(str(tmp_path / "d.parquet"))
    assert [int(frame.image[0, 0, 0]) for frame in ParquetSource(tmp_path)] == [3, 9]
