"""A store is checked when it is read: what is damaged, gone or changed is named, and nothing wrong is exported."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import run_command
from fakes import CLASSES, Fill, Halves
from PIL import Image

from grounded_sam import ConfigError, GroundedSamError, Pipeline, Vocabulary
from grounded_sam.errors import ImageError
from grounded_sam.formats import store_parts
from grounded_sam.formats.store import StoreReader
from grounded_sam.formats.store_runs import StoreRun
from grounded_sam.formats.store_schema import SCHEMA
from grounded_sam.pipeline.runner import Runner
from grounded_sam.sinks.report_page import ClassStatistics, ReportContent, render_page
from grounded_sam.sinks.samples import RandomSample
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.stored import StoreSource


def label(images: Path, output: Path, **options) -> list[str]:
    """Store what a fake detector finds; return the names in `skipped`."""
    store = StoreSink(output, CLASSES, {}, **options)
    summary = Runner(Pipeline(Halves(), Fill(), vocabulary=CLASSES), ImageSource(images), [store], output).run()
    return [skipped.file for skipped in summary.skipped]


def contents(store: Path) -> list[tuple]:
    """Return everything that a store says about its images."""
    return [
        (frame.name, frame.size_hw, frame.annotations.xyxy.tolist(), frame.annotations.data["class_name"].tolist())
        for frame in StoreSource(store, check_files=False)
    ]


def rewrite(output: Path, change) -> None:
    """Change the rows of the first part, as somebody who leaves no checksum would."""
    part = min((output / "store").glob("part-*"))
    rows = pq.read_table(part).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), part)
    for path in (output / "store").glob("_parts-*"):
        path.unlink()


def check_damage_is_named(output: Path, before: list[tuple], text: str) -> None:
    """Check that a damaged store gives what it gave before, or less with a note, or an error of one line."""
    try:
        after, source = contents(output), StoreSource(output, check_files=False)
    except GroundedSamError as error:
        assert text in str(error) and "\n" not in str(error)
        return
    assert all(row in before for row in after)
    notes = [f"{skipped.file}: {skipped.reason}" for skipped in source.skipped]
    assert after == before or any(text in note and "\n" not in note for note in notes)


def test_no_flipped_bit_gives_other_labels(folder, tmp_path):
    label(folder, tmp_path, part_images=2)
    before = contents(tmp_path)
    rng = random.Random(3)
    for path in sorted((tmp_path / "store").iterdir()):
        whole = path.read_bytes()
        for _ in range(40):
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            check_damage_is_named(tmp_path, before, "cannot be read")
        path.write_bytes(whole)
    assert contents(tmp_path) == before


def test_flipped_bits_are_found_without_the_list_of_parts(folder, tmp_path):
    label(folder, tmp_path)
    before = contents(tmp_path)
    next((tmp_path / "store").glob("_parts-*")).unlink()
    assert contents(tmp_path) == before
    part = next((tmp_path / "store").glob("part-*"))
    whole = part.read_bytes()
    for position in range(4, pq.ParquetFile(part).metadata.row_group(0).column(0).data_page_offset, 3):
        part.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        check_damage_is_named(tmp_path, before, part.name)


@pytest.mark.parametrize("length", [0, 100, -1])
def test_a_damaged_part_is_set_aside_and_can_be_deleted_as_the_note_says(folder, tmp_path, length):
    label(folder, tmp_path, part_images=1)
    before = contents(tmp_path)
    part = sorted((tmp_path / "store").glob("part-*"))[1]
    whole = part.read_bytes()
    part.write_bytes(whole[:length] + b"x" * (length == -1))
    source = StoreSource(tmp_path)
    assert [s.file for s in source.skipped] == [part.name] and len(list(source)) == 3
    assert re.search(r"cannot be read \(it.*run the command that made the store again", source.skipped[0].reason)
    assert label(folder, tmp_path) == [part.name] and contents(tmp_path) == before
    num_files = len(list((tmp_path / "store").iterdir()))
    assert label(folder, tmp_path) == [part.name]  # named as long as it is there
    assert len(list((tmp_path / "store").iterdir())) == num_files
    part.unlink()
    assert contents(tmp_path) == before and not StoreSource(tmp_path).skipped and not label(folder, tmp_path)
    part.write_bytes(whole)  # found in a backup
    assert contents(tmp_path) == before and not StoreSource(tmp_path).skipped


def test_a_missing_part_is_named_until_its_images_are_processed_again(folder, tmp_path):
    label(folder, tmp_path, part_images=1)
    before = contents(tmp_path)
    part = sorted((tmp_path / "store").glob("part-*"))[1]
    part.unlink()
    source = StoreSource(tmp_path)
    assert [s.file for s in source.skipped] == [part.name] and len(list(source)) == 3
    assert label(folder, tmp_path) == [part.name]  # said once more by the run that makes it good
    assert contents(tmp_path) == before and not StoreSource(tmp_path).skipped and not label(folder, tmp_path)


def test_a_damaged_run_file_can_be_deleted_as_the_message_says(folder, tmp_path):
    label(folder, tmp_path)
    before = contents(tmp_path)
    run = next((tmp_path / "store").glob("_run-*"))
    run.write_text(run.read_text().replace('"a"', '"e"'))
    with pytest.raises(ConfigError, match=rf"{run.name} cannot be read \(it has changed.*delete it"):
        StoreSource(tmp_path)
    run.unlink()
    label(folder, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x1": float("nan")}, "a box is not inside its image"),
        ({"x2": 1e30}, "a box is not inside its image"),
        ({"score": float("nan")}, "a score is not from 0 to 1"),
        ({"width": 0}, "no width or height"),
        ({"height": -7}, "no width or height"),
        ({"width": 2**31 - 1, "height": 2**31 - 1}, r"more than the 150,000,000 allowed \(source.max_pixels\)"),
        ({"class": "<script>"}, "objects of the class '<script>', which no run of the store has"),
        ({"class": None}, "objects of the class None"),
        ({"kind": "thing"}, "rows of the kind 'thing'"),
        ({"kind": "image", "objects": 0}, "is followed by"),
        ({"file": "another.png"}, "belongs to another image"),
        ({"file": None}, "a row has no file name"),
        ({"counts": "0"}, "do not add up"),
        ({"counts": "ÿ"}, "are damaged"),
    ],
)
def test_rows_that_cannot_be_are_named(folder, tmp_path, change, message):
    label(folder, tmp_path)
    rewrite(tmp_path, lambda rows: rows[2].update(change))
    with pytest.raises(ConfigError, match=rf"part-\w+.*\.parquet cannot be read \(.*{message}"):
        list(StoreSource(tmp_path, check_files=False))
        StoreReader(tmp_path / "store")


@pytest.mark.parametrize("count", [-1, 1, 5, None])
def test_the_number_of_objects_is_compared_with_the_rows(folder, tmp_path, count):
    label(folder, tmp_path)
    rewrite(tmp_path, lambda rows: rows[0].update(objects=count))
    with pytest.raises(ConfigError, match="is followed by 2 objects, not by as many as it says"):
        StoreReader(tmp_path / "store")
    assert not contents(tmp_path)


def test_later_parts_count_whatever_the_clock_says(folder, tmp_path, monkeypatch):
    label(folder, tmp_path)
    Image.new("RGB", (50, 40), "red").save(folder / "1.png")

    class Earlier(store_parts.datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz).replace(year=2000)

    monkeypatch.setattr(store_parts.datetime, "datetime", Earlier)
    label(folder, tmp_path)
    assert dict(row[:2] for row in contents(tmp_path))["1.png"] == (40, 50)
    with StoreSink(tmp_path, Vocabulary.parse(["d"]), {}, resume="extend"):
        pass
    assert StoreReader(tmp_path / "store").vocabulary.classes == ("a", "b", "c", "d")


def exported(output: Path, tmp_path: Path, *overrides: str):
    """Export a store with the command; return its output and the names in the COCO file."""
    arguments = ["source=stored", f"input={output}", "sink=coco", "output=o", *overrides]
    result = run_command("grounded_sam.cli.main", arguments, tmp_path)
    path = tmp_path / "o" / "annotations.json"
    return result, [i["file_name"] for i in json.loads(path.read_text())["images"]] if path.exists() else []


def test_pictures_that_are_gone_or_changed_are_not_exported(folder, tmp_path):
    label(folder, tmp_path / "labels")
    (folder / "0.png").rename(folder / "renamed.png")
    Image.new("RGB", (260, 200), "red").save(folder / "1.png")  # of the same size
    os.utime(folder / "sub" / "2.png")  # touched, not changed
    result, names = exported(tmp_path / "labels", tmp_path)
    assert names == ["sub/2.png", "sub/3.png"]
    assert re.search(r"0.png: no such file: .*source.root.*source.check_files=false", result.stdout)
    assert re.search(r"1.png: .* has changed since it was processed; run the command .* again", result.stdout)
    label(folder, tmp_path / "labels")  # obeyed
    _, names = exported(tmp_path / "labels", tmp_path)
    assert names == ["1.png", "renamed.png", "sub/2.png", "sub/3.png"]
    _, names = exported(tmp_path / "labels", tmp_path, "source.check_files=false")
    assert names == ["0.png", "1.png", "renamed.png", "sub/2.png", "sub/3.png"]


def test_an_export_that_lost_every_picture_fails(folder, tmp_path):
    label(folder, tmp_path / "labels")
    moved = folder.rename(tmp_path / "moved")
    result, names = exported(tmp_path / "labels", tmp_path)
    assert result.returncode == 1 and not names and "no usable images, 4 skipped" in result.stderr
    _, names = exported(tmp_path / "labels", tmp_path, f"source.root={moved}")
    assert len(names) == 4


def test_a_sink_that_lost_every_picture_fails_the_run(folder, tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "gone.png", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    arguments = ["source=coco", "input=x.json", "sink=[coco,yolo]", "output=o"]
    result = run_command("grounded_sam.cli.main", arguments, tmp_path)
    assert result.returncode == 1 and "gone.png: no such file; set source.images" in result.stderr


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/x.mp4", "rtsp://127.0.0.1:9/x.mp4", "concat:a.mp4|b.mp4", "0"])
@pytest.mark.parametrize("check_files", [True, False])
def test_a_stored_address_is_not_opened(folder, tmp_path, monkeypatch, path, check_files):
    label(folder, tmp_path)

    def change(rows):
        for row in rows:
            row.update(path=path, video="x.mp4", frame=0, take="t")

    rewrite(tmp_path, change)
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("connected"))
    source = StoreSource(tmp_path, check_files=check_files)
    frames = list(source)
    assert bool(frames) == (not check_files or path == "0")
    for frame in frames:
        with pytest.raises(ImageError, match="no such file"):
            _ = frame.image


def test_a_stored_color_is_escaped_in_the_report_and_refused_by_the_reader(folder, tmp_path):
    color = "'><script>alert(1)</script>"
    vocabulary = Vocabulary(("a",), (("a",),), colors=(color,))
    page = render_page(
        ReportContent(
            vocabulary=vocabulary,
            classes=[ClassStatistics(RandomSample(1, random.Random(0)))],
            num_video_frames=0,
            objects_per_image=Counter({0: 1}),
            uncertain=[],
            crowded=[],
            empty=[],
            duplicates=[],
            skipped=[],
        )
    )
    assert "<script>" not in page and "'>" + "<script" not in page
    label(folder, tmp_path)
    run = StoreRun.current({}, vocabulary)
    run.write(tmp_path / "store", "2026")
    with pytest.raises(ConfigError, match=r"a color must be #rrggbb, got"):
        StoreSource(tmp_path)


def test_the_run_of_a_copied_store_is_found_and_its_files_are_compared_once(folder, tmp_path):
    label(folder, tmp_path / "labels")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert len(list(StoreSource(tmp_path / "labels", root=copy))) == 4
    Image.fromarray(np.zeros((200, 260, 3), np.uint8)).save(copy / "1.png")
    source = StoreSource(tmp_path / "labels", root=copy)
    assert len(list(source)) == 3 and [s.file for s in source.skipped] == ["1.png"]
