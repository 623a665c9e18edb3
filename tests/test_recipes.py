"""The recipes of CONTRIBUTING.md: their files are written and their commands are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command import run_command
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
SECTIONS = dict(
    re.findall(
        r"^## (Add an? [^\n]+)\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S | re.M
    )
)


def follow_recipe(title: str, folder: Path, *overrides: str) -> str:
    """Write the files of a recipe and run its command, with more overrides; return what it prints."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", SECTIONS[title], re.S | re.M)
    for _, text in blocks[:-1]:
        path = folder / text.split("\n", 1)[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    command, *arguments = shlex.split(blocks[-1][1])
    assert command == "grounded-sam"
    result = run_command("grounded_sam.cli.main", [*arguments, *overrides], folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_are_three_recipes():
    assert list(SECTIONS) == ["Add a detector", "Add a sink", "Add a tracker"]


def test_the_detector_of_the_recipe_detects(tmp_path):
    (tmp_path / "photos").mkdir()
    image = Image.new("RGB", (60, 40))
    ImageDraw.Draw(image).rectangle((10, 5, 19, 24), fill="white")
    image.save(tmp_path / "photos" / "lamp.png")
    assert "Processed 1 image: 1 lamp" in follow_recipe("Add a detector", tmp_path)


def test_the_sink_of_the_recipe_writes_csv(tmp_path):
    assert "boxes: results/boxes.csv" in follow_recipe("Add a sink", tmp_path, "source=images").replace(
        f"{tmp_path}/", ""
    )
    rows = (tmp_path / "results" / "boxes.csv").read_text().splitlines()
    assert rows[0] == "file,class,score,x1,y1,x2,y2"
    assert len(rows) > 4 and all(len(row.split(",")) == 7 for row in rows)


def test_the_tracker_of_the_recipe_gives_lasting_ids(tmp_path):
    output = follow_recipe("Add a tracker", tmp_path)
    assert "Processed" in output and "red circle" in output
    # Far fewer tracks than detections: ids last.
    counts = [int(count) for count in re.findall(r"(\d+) \w+ \w+", output.split(": ", 1)[1].splitlines()[0])]
    assert sum(counts) < 40


@pytest.mark.parametrize("title", list(SECTIONS))
def test_recipes_are_one_file_and_one_yaml(title):
    kinds = [kind for kind, _ in re.findall(r"^```(\w*)\n(.*?)^```", SECTIONS[title], re.S | re.M)]
    assert kinds == ["python", "yaml", ""]
