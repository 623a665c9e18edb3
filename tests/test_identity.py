"""An image keeps its name in all files, and what came in with a label goes out with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import run_command
from fakes import CLASSES, ByLevel, Fill, Halves, Levels
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounded_sam import Pipeline
from grounded_sam.formats.video_masks import LabelledVideos
from grounded_sam.pipeline.runner import Runner
from grounded_sam.pipeline.track_settings import TrackSettings
from grounded_sam.sinks.coco import CocoSink, _Ids
from grounded_sam.sinks.masks import MasksSink
from grounded_sam.sinks.store import StoreSink
from grounded_sam.sinks.youtube_vis import YoutubeVisSink
from grounded_sam.sources.images import ImageSource
from grounded_sam.sources.video import VideoSource


def label(folder: Path, output: Path) -> list[str]:
    """Label a folder into a store and a COCO file; return the names in the COCO file."""
    sinks = [StoreSink(output, CLASSES), CocoSink(output, CLASSES)]
    Runner(Pipeline(Halves(), Fill(), vocabulary=CLASSES), ImageSource(folder), sinks, output).run()
    return names_in(output)


def names_in(output: Path) -> list[str]:
    return [image["file_name"] for image in json.loads((output / "annotations.json").read_text())["images"]]


def export(*words: str, cwd: Path):
    result = run_command("grounded_sam.cli.main", list(words), cwd)
    assert result.returncode == 0, result.stderr + result.stdout
    return result


def test_images_of_one_name_in_two_folders_keep_two_names(tmp_path):
    for number, name in enumerate(("a/1.png", "b/1.png", "b/1-2.png", "c/1.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + number, 10)).save(tmp_path / name)
    output = tmp_path / "out"
    assert label(tmp_path / "a", output) == ["1.png"]
    given_names = {"a": ["1.png"], "b": label(tmp_path / "b", output), "c": label(tmp_path / "c", output)}
    names = [name for folder in given_names.values() for name in folder]
    assert len(set(names)) == 4
    for folder, before in given_names.items():
        assert label(tmp_path / folder, output) == before  # from the store
    export("source=stored", "input=out", "sink=[coco,yolo]", "output=export", cwd=tmp_path)
    content = json.loads((tmp_path / "export" / "annotations.json").read_text())
    assert sorted(names_in(tmp_path / "export")) == sorted(names)
    widths = {image["file_name"]: image["width"] for image in content["images"]}
    assert [widths[name] for name in given_names["c"]] == [23] and widths["1.png"] == 20
    stems = {path.stem for path in (tmp_path / "export" / "yolo" / "labels").rglob("*.txt")}
    assert stems == {Path(name).stem for name in names}


def test_an_image_keeps_its_name_when_the_input_is_another_folder(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(tmp_path / "in" / "a" / "1.png")
    output = tmp_path / "out"
    assert label(tmp_path / "in", output) == ["a/1.png"]
    assert label(tmp_path / "in" / "a", output) == ["a/1.png"]  # from the store
    Image.new("RGB", (30, 10)).save(tmp_path / "in" / "a" / "1.png")
    assert label(tmp_path / "in" / "a", output) == ["a/1.png"]
    export("source=stored", "input=out", "sink=coco", "output=o", cwd=tmp_path)
    assert names_in(tmp_path / "o") == ["a/1.png"]


COCO = {
    "licenses": [{"id": 3, "name": "CC BY", "url": "http://example.org/by"}],
    "categories": [{"id": 7, "name": "star", "supercategory": "shape"}],
    "images": [
        {
            "id": 700,
            "file_name": "s/1.png",
            "width": 20,
            "height": 10,
            "license": 3,
            "coco_url": "http://example.org/1",
        },
        {"id": 42, "file_name": "2.png", "width": 20, "height": 10, "flickr_url": "ü", "license": 9},
    ],
    "annotations": [
        {"id": 11, "image_id": 700, "category_id": 7, "bbox": [1, 1, 5, 5], "iscrowd": 0, "attributes": {"a": [1]}},
        {"id": 5, "image_id": 42, "category_id": 7, "bbox": [2, 2, 6, 6], "iscrowd": 1, "ignore": 1},
    ],
}


@pytest.mark.parametrize("through_store", [False, True])
def test_what_came_in_with_a_label_goes_out_with_it(tmp_path, through_store):
    (tmp_path / "in.json").write_text(json.dumps(COCO))
    sink = "sink=store" if through_store else "sink=coco"
    export("source=coco", "input=in.json", sink, "output=out", cwd=tmp_path)
    if through_store:
        export("source=stored", "input=out", "sink=coco", "output=out2", cwd=tmp_path)
    content = json.loads((tmp_path / ("out2" if through_store else "out") / "annotations.json").read_text())
    assert content["licenses"] == COCO["licenses"] and content["categories"] == COCO["categories"]
    images, annotations = ({entry["id"]: entry for entry in content[key]} for key in ("images", "annotations"))
    for entry in COCO["images"]:
        assert entry.items() <= images[entry["id"]].items()
    for entry in COCO["annotations"]:
        assert entry.items() <= annotations[entry["id"]].items()


@given(st.lists(st.one_of(st.none(), st.integers(-2, 9), st.sampled_from(["x", True, 1.5])), max_size=20))
def test_ids_are_unique_and_kept_where_possible(own):
    ids = _Ids()
    given_ids = [ids(value) for value in own]
    assert len(set(given_ids)) == len(own)
    if all(type(value) is int for value in own) and len(set(own)) == len(own):
        assert given_ids == own


def write_frames(folder: Path, top: int) -> None:
    folder.mkdir(parents=True)
    for t in range(4):
        image = np.zeros((20, 40, 3), np.uint8)
        image[top : top + 8, 4 + 3 * t : 12 + 3 * t] = 100
        Image.fromarray(image).save(folder / f"{t:05d}.png")


@pytest.mark.parametrize("names", [("dog",), ("x/dog", "y/dog")])
def test_the_video_of_a_frame_folder_has_its_name_in_every_file(tmp_path, names):
    expected = ["dog", "dog-2"][: len(names)]
    for number, folder in enumerate(names):
        write_frames(tmp_path / folder, 2 + number)
    output = tmp_path / "out"
    model = Pipeline(Levels(), None, tracker=ByLevel(), vocabulary=CLASSES, track=TrackSettings())
    for folder, name in zip(names, expected, strict=True):
        for _ in range(2):  # the second time from the store
            sinks = [kind(output, CLASSES) for kind in (StoreSink, CocoSink, YoutubeVisSink)]
            sinks.append(MasksSink(output, CLASSES, mode="davis"))
            Runner(model, VideoSource(tmp_path / folder), sinks, output).run()
            assert names_in(output) == [f"{name}/{t:05d}.png" for t in range(4)]
            content = json.loads((output / "youtube_vis.json").read_text())
            assert content["videos"][0]["file_names"][0] == f"{name}/00000.png"
            assert list(LabelledVideos(output / "youtube_vis.json").videos) == [name]
            assert name in LabelledVideos(output / "masks").videos
    export("source=stored", "input=out", "sink=coco", "output=o2", cwd=tmp_path)
    assert len(set(names_in(tmp_path / "o2"))) == 4 * len(names)
