"""Run the notebooks and store them with their outputs: `python notebooks/execute.py [NOTEBOOK ...]`.

Outputs are made small and independent of the machine: images become JPEGs of at most 900 px, warnings, progress bars
and execution times are left out, and a path of this machine is an error. Each notebook runs in an empty folder.
"""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
MAX_SIDE, MAX_BYTES = 900, 400_000
#: Colors and fonts of a terminal.
ANSI = re.compile(r"\x1b\[[\d;]*m")
#: Beginnings of absolute paths, which differ between machines.
PATHS = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|Users|private|var|mnt)/[^\s'\"]*|[A-Z]:\\\\")


def execute(path: Path) -> Any:
    """Run a notebook, and return it with cleaned outputs."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
        names = (f"{Path(folder).resolve()}/", f"{folder}/")
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(clean, cell.outputs) if output is not None]
            for output in cell.outputs:
                relative(output, names)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def clean(output: Any) -> Any:
    """Return an output without colors and what differs between machines; None if nothing is left of it."""
    if output.output_type == "stream":
        output.text = ANSI.sub("", output.text)
        return output if output.name == "stdout" and output.text.strip() else None
    data = output.get("data", {})
    if "image/png" in data:
        data["image/jpeg"] = reduce_image(data.pop("image/png"))
        data.pop("text/plain", None)
    if output.output_type == "display_data" and "image/jpeg" not in data:  # a progress bar
        return None
    output.get("metadata", {}).clear()
    return output


def relative(output: Any, folders: Sequence[str]) -> None:
    """Make the paths in the texts of an output relative to the folder that the notebook ran in."""
    texts = [(output, "text")] if "text" in output else [(output.data, key) for key in output.get("data", {})]
    for place, key in texts:
        if key.startswith("text"):
            for folder in folders:
                place[key] = place[key].replace(folder, "")


def reduce_image(png: str) -> str:
    """Convert a PNG in base64 to a JPEG of at most `MAX_SIDE` px."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80, optimize=True)
    return base64.b64encode(out.getvalue()).decode() + "\n"


def problems(notebook: Any, size: int) -> list[str]:
    """Return why a notebook cannot be committed: size, failed cells, warnings or paths of a machine."""
    found = [f"{size} bytes, more than {MAX_BYTES}"] if size > MAX_BYTES else []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            texts = [output.get("text", "")] + [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {number}: an error or stderr")
            found += [f"cell {number}: the path {match}" for text in texts for match in PATHS.findall(text)]
            found += [f"cell {number}: a warning" for text in texts if "Warning" in text]
    return found


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        notebook = execute(path)
        text = nbformat.writes(notebook) + "\n"
        if found := problems(notebook, len(text.encode())):
            sys.exit(f"{path}: {'; '.join(found)}")
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {len(text.encode()) // 1000} kB")


if __name__ == "__main__":
    main()
