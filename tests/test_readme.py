"""What the README shows is run: blocks marked `run`, with the files that it names beside them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+) (\S+)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
FILES = {name: text for _, name, text in BLOCKS if name != "run"}
RUNS = [(kind, text) for kind, name, text in BLOCKS if name == "run"]


def test_there_are_examples():
    assert {"bright.py", "my_conf/detector/bright.yaml"} == set(FILES)
    assert [kind for kind, _ in RUNS] == ["python", "bash"]


@pytest.mark.parametrize(("kind", "text"), RUNS, ids=[kind for kind, _ in RUNS])
def test_examples_run(kind, text, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    shutil.copy(ROOT / "grounded_sam" / "shapes" / "examples" / "demo" / "scene-1.png", tmp_path)
    command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-ec", text]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert out.returncode == 0, out.stderr
    if kind == "bash":
        assert "found 4 bright" in out.stdout
        assert len(list((tmp_path / "bright" / "overlay").iterdir())) == 4
    else:
        assert "green star" in out.stdout


def test_every_choice_of_the_config_is_named():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for group in ("detector", "segmenter", "sink", "preset"):
        for file in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{file.stem}`" in text, f"{group}={file.stem}"
