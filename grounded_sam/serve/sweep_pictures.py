"""The images that the jobs of a sweep have processed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grounded_sam.errors import GroundedSamError
from grounded_sam.files import home_path
from grounded_sam.formats.store import StoreReader, find_store
from grounded_sam.media.files import find_files, relative_name
from grounded_sam.media.images import read_image
from grounded_sam.serve.objects import jpeg
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.roots import EXAMPLES, Roots
from grounded_sam.structures.documents import read_yaml
from grounded_sam.structures.frame import Frame


def job_picture(folder: Path, name: str, roots: Roots, max_pixels: int, max_side: int | None) -> bytes:
    """Return an image of a job as JPEG.

    Args:
        folder: Folder of the job, with a store, or with the config in `.hydra` that names its input.
        name: Name of the image, as in its results.
        roots: What may be read.
        max_pixels: Larger images are refused.
        max_side: Longest side in pixels; None for no limit.

    Raises:
        RequestError: If there is no such image (404), or it is outside of the roots (403).
        ImageError: If it cannot be read.
    """
    if any((folder / "store").glob("_run-*.json")):
        frame = _stored_frame(folder, name, max_pixels, roots)
        if frame is not None:
            if frame.file is not None and not roots.contains(frame.file):
                raise RequestError(403, f"{name} is outside of the folders that this server may read (serve.roots)")
            return jpeg(frame.image, max_side)
    else:
        path = _input_file(folder, name)
        if path is not None:
            if not roots.contains(path) and not path.is_relative_to(find_files(EXAMPLES.rstrip("/")).root):
                raise RequestError(403, f"{name} is outside of the folders that this server may read (serve.roots)")
            return jpeg(read_image(path, max_pixels), max_side)
    raise RequestError(404, f"the input of the job has no image {name[:80]!r} any more, or it is a frame of a video")


def _stored_frame(folder: Path, name: str, max_pixels: int, roots: Roots) -> Frame | None:
    """Return an image of a job that has a store."""
    reader = StoreReader(find_store(folder), max_pixels, roots=roots.addresses)
    for key in reader.keys():  # noqa: SIM118, the reader is no mapping
        if name == reader.name(key) or name.startswith(f"{reader.name(key)}/"):
            for result in reader.read(key, reader.vocabulary):
                if result.frame.name == name:
                    return result.frame
    return None


def _input_file(folder: Path, name: str) -> Path | None:
    """Return the file of an image of a job, by the input that its config names."""
    try:
        config = read_yaml(folder / ".hydra" / "config.yaml")
        given = config.get("input") if isinstance(config, dict) else None
        if not isinstance(given, str):
            return None
        files = find_files(given if given.startswith("builtin:") else str(_working_folder(folder) / home_path(given)))
    except (GroundedSamError, OSError):
        return None
    return next((path for path in files.images if relative_name(path, files.root) == name), None)


def _working_folder(folder: Path) -> Path:
    """Return the folder that a job was run in."""
    hydra: Any = read_yaml(folder / ".hydra" / "hydra.yaml")
    for key in ("hydra", "runtime", "cwd"):
        hydra = hydra.get(key) if isinstance(hydra, dict) else None
    return Path(hydra) if isinstance(hydra, str) else Path.cwd()
