from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GROUNDED_SAM_TEST_DATA", ROOT.parent / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def data() -> Path:
    """Real photos and malformed files, from outside the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}; set GROUNDED_SAM_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def photos(data: Path) -> Path:
    return data / "photos"


@pytest.fixture(scope="session")
def scenes() -> list:
    """A few scenes with truth, the same every time."""
    from grounded_sam.shapes.scenes import make_scene

    return [make_scene(np.random.default_rng([42, i]), count=4, size_hw=(200, 260)) for i in range(4)]


@pytest.fixture
def folder(tmp_path: Path, scenes: list) -> Path:
    """A folder of scenes as picture files."""
    place = tmp_path / "pictures"
    (place / "sub").mkdir(parents=True)
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(place / ("sub" if i > 1 else "") / f"{i}.png")
    return place


@pytest.fixture(scope="session")
def shapes():
    """The pipeline of the embedded models, with SAM 2."""
    from grounded_sam import load

    return load(preset="shapes")
