"""The notebooks run, and are committed with the outputs of their cells, which are small and of no machine."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def execution():
    """The script that runs the notebooks."""
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outline(cell):
    """Return what a cell printed, without numbers, spaces and lines of tables, and the kinds of its other outputs.

    Where a name in the header of a table is folded depends on how wide its numbers are, so characters are sorted.
    """
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        text = output.get("text", "" if "image/jpeg" in data else data.get("text/plain", ""))
        parts.append(
            (
                output.output_type,
                "image/jpeg" in data,
                "".join(sorted(re.sub(r"[\d.e+-]+|[\s─━┏┓┡┩┳╇┴│┃└┘]", "", text))),
            )
        )
    return parts


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run_top_to_bottom_and_have_the_outputs_of_their_cells(path, execution):
    nbformat = pytest.importorskip("nbformat")
    committed, executed = nbformat.read(path, as_version=4), execution.execute(path)
    assert any("image/jpeg" in o.get("data", {}) for cell in executed.cells for o in cell.get("outputs", []))
    assert not execution.problems(committed, path.stat().st_size)
    assert any("image/jpeg" in o.get("data", {}) for cell in committed.cells for o in cell.get("outputs", []))
    for old, new in zip(committed.cells, executed.cells, strict=True):
        assert sorted(outline(old)) == sorted(outline(new)), f"run `make notebooks`: {old.source}"


def test_outputs_that_cannot_be_committed_are_named(execution):
    v4 = pytest.importorskip("nbformat.v4")
    outputs = [
        v4.new_output("stream", name=name, text=text) for name, text in (("stderr", "x"), ("stdout", "/home/me/a"))
    ]
    outputs.append(v4.new_output("stream", name="stdout", text="UserWarning: old"))
    notebook = v4.new_notebook(cells=[v4.new_code_cell("x", outputs=outputs)])
    found = execution.problems(notebook, execution.MAX_BYTES + 1)
    assert [text.partition(": ")[2] for text in found[1:]] == ["an error or stderr", "the path /home/me/a", "a warning"]
    assert "more than" in found[0]
