"""Classes keep their numbers in a folder that several runs write into."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import run_command
from fakes import Fill, Halves
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grounded_sam import ConfigError, Pipeline, Vocabulary
from grounded_sam.config.build import build_sinks
from grounded_sam.config.compose import compose
from grounded_sam.formats.output_classes import OutputClasses
from grounded_sam.pipeline.runner import Runner, Summary
from grounded_sam.sources.images import ImageSource
from grounded_sam.structures.request import Request
from grounded_sam.structures.vocabulary import name_key

SINKS = "[coco,yolo,voc,labelme,imagefolder,masks,jsonl]"


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10 + len(path.name))).save(path)
    return path


def run(image: Path, text, output: Path, *overrides: str) -> Summary:
    """Label an image with stages without weights: the left half is the first class, the right half the last."""
    words = Vocabulary.parse(text)
    cfg = compose(["input=x", *(overrides or [f"sink={SINKS}", "sink.masks.mode=labels"])])
    classes = OutputClasses(output, words)
    sinks = build_sinks(cfg, output, words, classes)
    pipeline = Pipeline(Halves(), Fill(), vocabulary=words)
    return Runner(pipeline, ImageSource(image), sinks, output, Request.for_classes(words), classes).run()


def read_yolo(output: Path, stem: str) -> list[str]:
    """Return the class names of an image's YOLO labels, as the dataset has them now."""
    names = yaml.safe_load((output / "yolo" / "data.yaml").read_text())["names"]
    lines = (output / "yolo" / "labels" / "train" / f"{stem}.txt").read_text().splitlines()
    return [names[int(line.split()[0])] for line in lines]


def read_map(path: Path, names: list[str]) -> list[str]:
    values = np.unique(np.asarray(Image.open(path)))
    return [names[value - 1] for value in values if value]


def test_every_number_of_an_earlier_run_keeps_its_meaning(tmp_path):
    output = tmp_path / "out"
    run(write_image(tmp_path / "s" / "s.png"), ["star", "disc"], output)
    run(write_image(tmp_path / "t" / "t.png"), ["triangle", "STAR"], output)
    assert read_yolo(output, "s") == ["star", "disc"] and read_yolo(output, "t") == ["triangle", "star"]
    names = ["star", "disc", "triangle"]
    assert json.loads((output / "imagefolder" / "categories.json").read_text()) == names
    assert (output / "voc" / "classes.txt").read_text().split() == names
    assert (output / "labelme" / "labels.txt").read_text().split() == names
    legend = json.loads((output / "masks" / "legend.json").read_text())
    assert list(legend.values()) == ["background", *names]
    voc = output / "voc"
    maps = [read_map(voc / "SegmentationClass" / f"{stem}.png", names) for stem in ("s", "t")]
    assert maps == [["star", "disc"], ["star", "triangle"]]
    for image_set in ("Main", "Segmentation"):
        assert sorted((voc / "ImageSets" / image_set / "train.txt").read_text().split()) == ["s", "t"]
    (class_map,) = (output / "masks").glob("*.png")  # masks are of the last run only
    assert read_map(class_map, names) == ["star", "triangle"]
    content = json.loads((output / "annotations.json").read_text())
    assert content["categories"] == [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    assert [a["category_id"] for a in content["annotations"]] == [3, 1]
    (line,) = (output / "results.jsonl").read_text().splitlines()
    assert [(o["class_id"], o["class"]) for o in json.loads(line)["objects"]] == [(2, "triangle"), (0, "star")]
    assert Vocabulary.parse(str(output / "classes.json")).classes == tuple(names)


NAMES = st.sampled_from(["a", "A", "b", "c  d", "C d", "e"])


@settings(max_examples=60)
@given(st.lists(st.lists(NAMES, min_size=1, max_size=4, unique_by=name_key), min_size=1, max_size=5))
def test_classes_are_only_appended(tmp_path_factory, runs):
    folder, before = tmp_path_factory.mktemp("out"), ()
    for names in runs:
        asked = Vocabulary.parse(names)
        classes = OutputClasses(folder, asked)
        classes.save()
        after = classes.vocabulary
        assert after.classes[: len(before)] == before and len(set(after.category_ids)) == len(after)
        assert all(after.index(name) is not None for name in asked.classes)
        before = after.classes
    keys = [" ".join(name.casefold().split()) for name in before]
    assert len(set(keys)) == len(keys)


def test_classes_that_one_run_tells_apart_by_case_stay_two(tmp_path):
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "Car"}]
    for _ in range(2):
        classes = OutputClasses(tmp_path, Vocabulary.from_categories(categories, "labels"))
        classes.save()
        assert classes.vocabulary.classes == ("car", "Car")


@pytest.mark.parametrize("ids", [{"car": 5}, {"truck": 3}])
def test_an_id_that_contradicts_an_earlier_run_is_refused(tmp_path, ids):
    OutputClasses(tmp_path, Vocabulary.parse({"classes": {"car": {"id": 3}, "bus": {"id": 4}}})).save()
    again = {"classes": {name: {"id": number} for name, number in ids.items()}}
    with pytest.raises(ConfigError, match="choose another output, or the ids in"):
        OutputClasses(tmp_path, Vocabulary.parse(again))
    assert OutputClasses(tmp_path, Vocabulary.parse(["truck"])).vocabulary.category_ids == (3, 4, 5)


@pytest.mark.parametrize("content", ["[]", "{}", '{"categories": []}', "{", '{"categories": [{"id": 1}]}'])
def test_a_damaged_record_of_classes_is_named(tmp_path, content):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises((ConfigError, ValueError), match=r"classes\.json"):
        OutputClasses(tmp_path, Vocabulary.parse(["a"]))


def test_a_new_class_is_reported_as_not_looked_for_in_stored_images(tmp_path):
    images, output = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "b.png"):
        write_image(images / name)
    sinks = ["sink=[store,yolo,coco]", "resume=extend"]
    run(images, ["star"], output, *sinks)
    assert not run(images, ["STAR"], output, *sinks).skipped
    write_image(images / "c.png")
    summary = run(images, ["disc", "star"], output, *sinks)
    (note,) = summary.skipped
    assert "'disc' was not looked for in 2 stored files (a.png, b.png)" in note.reason
    assert json.loads((output / "skipped.json").read_text())[0]["reason"] == note.reason
    assert read_yolo(output, "a") == ["star", "star"] and read_yolo(output, "c") == ["disc", "star"]
    again = run(images, ["disc", "star"], tmp_path / "other", "sink=[store,yolo]")  # the advice
    assert not again.skipped and read_yolo(tmp_path / "other", "a") == ["disc", "star"]


def test_stored_objects_are_found_by_a_class_with_other_case_and_spacing(tmp_path):
    run(write_image(tmp_path / "in" / "a.png"), ["stop sign", "car"], tmp_path / "out", "sink=store")
    command = [
        "source=stored",
        f"input={tmp_path / 'out'}",
        "text=[Stop  Sign]",
        "sink=coco",
        f"output={tmp_path / 'o'}",
    ]
    result = run_command("grounded_sam.cli.main", command, tmp_path)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "o" / "annotations.json").read_text())
    assert len(content["annotations"]) == 1 and content["categories"][0]["name"] == "Stop  Sign"
