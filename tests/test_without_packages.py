"""Everything but two stages works where the packages `sam2` and `segment_anything` are not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "grounded_sam" / "shapes" / "examples" / "demo"
#: Runs commands one after another in a process that cannot import the packages, and prints what each of them said.
SCRIPT = """
import contextlib, importlib, importlib.abc, io, json, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sam2", "segment_anything"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import grounded_sam

results = []
for module, *arguments in json.loads(sys.argv[1]):
    out, code = io.StringIO(), 0
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            importlib.import_module(f"grounded_sam.cli.{module}").main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            print(error.code if isinstance(error.code, str) else "", file=sys.stderr)
    results.append([code, out.getvalue()])
print(json.dumps(results))
"""


def image_run(output: Path, *overrides: str) -> list[str]:
    """Return a command that finds red circles in an image with the small models."""
    image = f"input={EXAMPLES / 'scene-1.png'}"
    return ["main", "preset=shapes", "text=red circle", image, f"output={output}", "sink=coco", *overrides]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[int, str]]:
    output = tmp_path_factory.mktemp("without_packages")
    clip = f"input={EXAMPLES / 'clip.mp4'}"
    commands = {
        "help": ["main", "--help"],
        "models": ["models", "list", "segmenter=sam2", "tracker=sam2"],
        "transformers": image_run(output / "image", "segmenter=sam2_hf"),
        "video": image_run(output / "video", "segmenter=sam2_hf", "tracker=sam2_hf", clip, "source.stop=2"),
        "sam2": image_run(output / "sam2"),
        "sam": image_run(output / "sam", "segmenter=sam"),
        "tracker": image_run(output / "tracker", "segmenter=sam2_hf", clip, "source.stop=2"),
    }
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(list(commands.values()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=output, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {name: (code, text) for name, (code, text) in zip(commands, results, strict=True)}


def test_commands_and_the_models_of_transformers_work(outcomes):
    for name in ("help", "models", "transformers", "video"):
        code, text = outcomes[name]
        assert code == 0, f"{name}: {text}"
    assert "facebook/sam2.1-hiera-tiny" in outcomes["models"][1]
    assert "1 red circle" in outcomes["transformers"][1]
    assert "2 frames: 1 red circle" in outcomes["video"][1]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sam2", ("segmenter=sam2 needs the package sam2", "pip install sam2", "segmenter=sam2_hf")),
        ("sam", ("segmenter=sam needs the package segment_anything", "pip install segment-anything", "sam_hq")),
        ("tracker", ("tracker=sam2 needs the package sam2", "pip install sam2", "tracker=sam2_hf")),
    ],
)
def test_a_stage_that_needs_a_package_says_what_to_install_or_to_choose(outcomes, name, parts):
    code, text = outcomes[name]
    assert code == 1 and all(part in text for part in parts), text
    assert len(text.strip().splitlines()) == 1, text


def test_conversions_of_backbones_name_missing_packages():
    from grounded_sam.acceleration.backends import _version

    assert _version("torch") != "none" and _version("no-such-package") == "none"
