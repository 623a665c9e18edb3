"""The wheel, installed in an environment that cannot see the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the tracked files, so that no other file can make it work."""
    clean, out = tmp_path_factory.mktemp("clean"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file():
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            (clean / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(clean)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_has_configs_weights_and_examples(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"grounded_sam/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    for part in (
        "detector/model.safetensors",
        "detector/tokenizer.json",
        "sam.safetensors",
        "sam2.safetensors",
        "siglip/config.json",
    ):
        assert f"grounded_sam/shapes/weights/shapes-{part}" in names
    assert "grounded_sam/shapes/examples/demo/scene-1.png" in names
    assert {f"grounded_sam/pages/templates/{name}.html" for name in ("base", "labels", "sweep")} <= names
    assert not [n for n in names if n.startswith(("tests/", "conf/"))]


def test_files_in_the_wheel_are_small(wheel):
    for entry in zipfile.ZipFile(wheel).infolist():
        assert entry.file_size <= 15 * 2**20, entry.filename


def test_the_installed_command_runs_from_another_folder(wheel, tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    # The dependencies of this environment, but not its editable install of the package, whose finder comes later.
    Path(site, "others.pth").write_text(sysconfig.get_paths()["purelib"])
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH",)}
    code = "import grounded_sam; print(grounded_sam.__file__)"
    location = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=env)
    assert location.stdout.startswith(site)
    main = "from grounded_sam.cli.main import main; main()"
    for words in (["--help"], ["preset=demo", "source=images", "output=o", "sink=coco"]):
        out = subprocess.run(
            [python, "-c", main, *words], cwd=tmp_path, capture_output=True, text=True, check=False, env=env
        )
        assert out.returncode == 0, out.stderr
    assert (tmp_path / "o" / "annotations.json").is_file()
