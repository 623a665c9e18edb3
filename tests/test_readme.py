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
RUNS = {kind: "\n".join(text for k, name, text in BLOCKS if (k, name) == (kind, "run")) for kind in ("python", "bash")}


def test_there_are_examples():
    assert {"bright.py", "my_conf/detector/bright.yaml"} == set(FILES)
    assert all(RUNS.values())


@pytest.mark.parametrize("kind", RUNS)
def test_examples_run(kind, tmp_path):
    text = RUNS[kind]
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    for name in ("scene-1.png", "clip.mp4"):
        shutil.copy(ROOT / "grounded_sam" / "shapes" / "examples" / "demo" / name, tmp_path)
    command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-ec", text]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert out.returncode == 0, out.stderr
    if kind == "bash":
        assert "found 1 bright" in out.stdout
        assert len(list((tmp_path / "bright" / "overlay").iterdir())) == 1
    else:
        assert "green star" in out.stdout
        assert out.stdout.count("blue square") == 6 and "[1 2]" in out.stdout


def test_every_choice_of_the_config_is_named():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for group in ("detector", "segmenter", "tracker", "source", "sink", "preset", "sweep"):
        for file in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{file.stem}`" in text, f"{group}={file.stem}"
