"""Fixtures that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# With pytest-xdist, the cores are shared with the other workers, also by the commands that tests run.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("grounded_sam", deadline=None)  # a busy machine is no failure
settings.load_profile("grounded_sam")

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GROUNDED_SAM_TEST_DATA", ROOT.parent / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that are marked `cuda` where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of real photos and malformed files, which is not part of the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}; set GROUNDED_SAM_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def photos(data: Path) -> Path:
    """Return the folder of real photos."""
    return data / "photos"


@pytest.fixture(scope="session")
def scenes() -> list:
    """Return four scenes with ground truth, the same in every run."""
    from grounded_sam.shapes.scenes import make_scene

    return [make_scene(np.random.default_rng([42, i]), count=4, size_hw=(200, 260)) for i in range(4)]


@pytest.fixture
def folder(tmp_path: Path, scenes: list) -> Path:
    """Write the scenes to `0.png`, `1.png`, `sub/2.png` and `sub/3.png` in a folder and return it."""
    path = tmp_path / "photos"
    (path / "sub").mkdir(parents=True)
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(path / ("sub" if i > 1 else "") / f"{i}.png")
    return path


@pytest.fixture(scope="session")
def shapes():
    """Return the pipeline of the models that are part of the package, with SAM 2."""
    from grounded_sam import load

    return load(preset="shapes")
