"""The command that is suggested at the end of a run, which is run here."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path

import pytest
from command import run_command

from grounded_sam.cli.next_step import next_step
from grounded_sam.pipeline.runner import Summary
from grounded_sam.structures.masks import encode_rle


def run(*arguments: str, cwd: Path):
    result = run_command("grounded_sam.cli.main", list(arguments), cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def suggested(printed: str) -> tuple[str, list[str]]:
    """Return the purpose and the arguments of the command in the last line."""
    purpose, _, command = printed.splitlines()[-1].partition(": ")
    name, *arguments = shlex.split(command)
    assert name == "grounded-sam"
    return purpose, arguments


@pytest.fixture
def truth(folder, scenes, tmp_path) -> Path:
    """Write the labels of `0.png` and `1.png`."""
    annotations = [
        {"id": 10 * i + j, "image_id": i, "category_id": 1, "iscrowd": 0, "area": int(mask.sum()),
         "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)], "segmentation": encode_rle(mask)}
        for i in range(2)
        for j, (mask, (x1, y1, x2, y2)) in enumerate(zip(scenes[i].masks, scenes[i].xyxy.tolist(), strict=True), 1)
    ]  # fmt: skip
    images = [{"id": i, "file_name": f"{i}.png", "width": 260, "height": 200} for i in range(2)]
    path = tmp_path / "truth.json"
    categories = [{"id": 1, "name": "blue shape"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_images_lead_to_a_dataset_and_that_to_an_export(folder, tmp_path):
    printed = run("preset=shapes", "input=photos", "text=[red shape, blue shape]", "output=a b", cwd=tmp_path)
    purpose, arguments = suggested(printed)
    assert purpose == "To make a dataset that resumes and exports"
    purpose, arguments = suggested(run(*arguments, cwd=tmp_path))
    assert purpose == "To export to another format"
    assert (tmp_path / "a b-labels" / "store").is_dir() and (tmp_path / "a b-labels" / "report.html").is_file()
    run(*arguments, cwd=tmp_path)
    assert (tmp_path / "a b-labels-yolo" / "yolo" / "data.yaml").is_file()


def test_a_run_that_finds_nothing_leads_to_a_lower_threshold(folder, tmp_path):
    printed = run(
        "preset=shapes", "input=photos/0.png", "text=[blue shape]", "select.score=0.999", "output=o", cwd=tmp_path
    )
    purpose, arguments = suggested(printed)
    assert purpose == "To look for less certain objects" and "select.score=0.1" in arguments
    assert "nothing found" not in run(*arguments, cwd=tmp_path)


def test_metrics_lead_to_a_sweep_and_that_to_the_best_settings(folder, truth, tmp_path):
    texts = "text=[blue shape]"
    printed = run(
        "preset=shapes", "input='photos/[01].png'", texts, "truth=truth.json", "sink=metrics", "output=o", cwd=tmp_path
    )
    purpose, arguments = suggested(printed)
    assert purpose == "To find the best thresholds"
    purpose, arguments = suggested(run(*arguments, cwd=tmp_path))
    assert purpose == "To use the best settings"
    printed = run(*arguments, "output=best", cwd=tmp_path)
    assert (tmp_path / "best" / "annotations.json").is_file()
    assert suggested(printed)[1][0] == "--config-dir"  # where preset=best is
    run(*suggested(printed)[1], cwd=tmp_path)
    assert (tmp_path / "best-labels" / "report.html").is_file()


@pytest.mark.parametrize(
    ("overrides", "summary"),
    [
        (["input=a"], Summary(images=3, interrupted=True, objects=Counter(car=1))),
        (["input=a.mp4"], Summary(images=3, frames=3, objects=Counter(car=1))),
        (["input=a", "source=coco"], Summary(images=3, objects=Counter(car=1))),
        (["input=a", "select.score=0.1"], Summary(images=3)),
        (["input=a", "detector=clicks"], Summary(images=3, objects=Counter(car=1))),
    ],
)
def test_nothing_is_suggested_where_it_would_not_help(overrides, summary, tmp_path):
    assert next_step(overrides, summary, [], tmp_path) is None


def test_presets_are_kept(tmp_path):
    line = next_step(["preset=[shapes,mine]", "input=a"], Summary(images=1, objects=Counter(car=1)), [], tmp_path / "o")
    assert "'preset=[shapes,mine,label]'" in line and f"output={tmp_path / 'o-labels'}" in line
