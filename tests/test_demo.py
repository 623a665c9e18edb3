"""The labels of the demo, held to the truth of its images and of its clip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import run_command

from grounded_sam import load
from grounded_sam.shapes.examples import demo_clip, demo_images, demo_labels
from grounded_sam.structures.masks import mask_iou

DEMO = Path(__file__).parents[1] / "grounded_sam" / "shapes" / "examples" / "demo"


@pytest.fixture(scope="module")
def demo():
    return load(preset="demo")


def asked(scene, vocabulary):
    """Return names and masks of the objects of a scene that the demo asks for."""
    names = [" ".join(pair) for pair in scene.pairs]
    rows = [i for i, name in enumerate(names) if name in vocabulary.classes]
    return [names[i] for i in rows], scene.masks[rows]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_everything_that_the_demo_asks_for_is_found_and_nothing_else(demo, number):
    names, masks = asked(demo_images()[number - 1], demo.vocabulary)
    detections = demo.segment(DEMO / f"scene-{number}.png")
    iou = mask_iou(detections.mask, masks)
    assert sorted(detections.data["class_name"].tolist()) == sorted(names)
    matched = iou.argmax(1)
    assert sorted(matched.tolist()) == list(range(len(names)))
    assert [names[i] for i in matched] == detections.data["class_name"].tolist()
    assert iou.max(1).min() > 0.85


def test_the_objects_of_the_clip_keep_their_ids(demo):
    owners: dict[int, set[int]] = {}
    found = expected = 0
    for result, scene in zip(demo.track(DEMO / "clip.mp4"), demo_clip(), strict=True):
        names, masks = asked(scene, demo.vocabulary)
        objects = [int(i) for i, pair in zip(scene.ids, scene.pairs, strict=True) if " ".join(pair) in names]
        large = masks.sum((1, 2)) > 1500
        expected += int(large.sum())
        iou = mask_iou(result.detections.mask, masks)
        for row in range(len(result.detections)):
            best = int(iou[row].argmax())
            if iou[row, best] > 0.5:
                assert result.detections.data["class_name"][row] == names[best]
                owners.setdefault(objects[best], set()).add(int(result.detections.tracker_id[row]))
                found += bool(large[best])
    assert len(owners) == 6 and all(len(ids) == 1 for ids in owners.values()), owners
    assert found >= 0.93 * expected


def test_the_ground_truth_of_the_demo_is_what_was_drawn():
    assert json.loads((DEMO / "instances.json").read_text()) == demo_labels()


def test_thresholds_are_swept_against_the_ground_truth_of_the_demo(tmp_path):
    command = ["-m", "preset=demo", "truth=builtin:demo", "sink=metrics", "metric=at_threshold.f1"]
    command += ["source=images", "select.score=0.5,0.95", f"output={tmp_path}"]
    result = run_command("grounded_sam.cli.main", command, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| 0.5 | 1 |" in (tmp_path / "sweep.md").read_text()  # F1
    best = (tmp_path / "preset" / "best.yaml").read_text()
    assert "score: 0.5" in best


def test_ground_truth_that_is_not_part_of_the_package_is_named(tmp_path):
    command = ["preset=demo", "truth=builtin:../demo", "sink=metrics", f"output={tmp_path}"]
    result = run_command("grounded_sam.cli.main", command, tmp_path)
    assert result.returncode == 1
    assert "truth=builtin:../demo is not part of the package; available: builtin:demo" in result.stderr
