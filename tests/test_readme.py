"""README: code blocks marked `run` run, with the files of the blocks marked with a path; all choices are named."""

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
EXAMPLES = {
    language: "\n".join(text for block_language, name, text in BLOCKS if (block_language, name) == (language, "run"))
    for language in ("python", "bash")
}


def test_the_readme_has_examples_and_their_files():
    assert {"brightest.py", "my_conf/detector/brightest.yaml"} == set(FILES)
    assert all(EXAMPLES.values())


@pytest.mark.parametrize("language", EXAMPLES)
def test_the_examples_of_the_readme_run(language, tmp_path):
    code = EXAMPLES[language]
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    for name in ("scene-1.png", "clip.mp4"):
        shutil.copy(ROOT / "grounded_sam" / "shapes" / "examples" / "demo" / name, tmp_path)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert process.returncode == 0, process.stderr
    if language == "bash":
        assert "Processed 1 image: 1 bright" in process.stdout
        assert len(list((tmp_path / "bright" / "overlay").iterdir())) == 1
    else:
        assert "green star" in process.stdout
        assert process.stdout.count("blue square") == 6 and "[1 2]" in process.stdout


def test_the_readme_names_every_choice_of_the_config():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for group in ("detector", "segmenter", "tracker", "source", "sink", "preset", "sweep"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in text, f"{group}={path.stem}"
