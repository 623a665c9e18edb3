"""Read the labels of images or videos in any supported format."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from grounded_sam.errors import ConfigError
from grounded_sam.files import home_path
from grounded_sam.formats.coco import CocoFile
from grounded_sam.formats.video_masks import LabelledVideos
from grounded_sam.formats.voc import read_voc
from grounded_sam.formats.yolo import read_yolo
from grounded_sam.media.files import builtin_folder
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.structures.documents import read_json


def read_ground_truth(path: str | Path, max_pixels: int = MAX_PIXELS) -> CocoFile | LabelledVideos:
    """Read labels; the format is recognized by the files.

    Args:
        path: For images a COCO file, a YOLO `data.yaml` or its folder, or a folder of Pascal VOC; for videos a folder
            of DAVIS, or JSON of SA-V or YouTube-VIS. `builtin:demo` for the images of the demo.
        max_pixels: Larger images and masks are refused.

    Returns:
        Labels of images in the form of a COCO file, or labels of videos.

    Raises:
        ConfigError: If there is no such file, it is in none of these formats, or it cannot be read.
    """
    is_builtin = str(path).startswith("builtin:")
    labels = builtin_folder("truth", str(path)) / "instances.json" if is_builtin else home_path(str(path))
    if not labels.exists():
        raise ConfigError(f"truth={path}: no such file or folder")
    if labels.is_file() and labels.suffix.lower() == ".json":
        status = labels.stat()
        return _read_json_labels(labels, status.st_mtime_ns, status.st_size, max_pixels)
    if labels.is_file() and labels.suffix.lower() in (".yaml", ".yml"):
        return CocoFile(labels, content=read_yolo(labels, max_pixels), allow_mixed=True, max_pixels=max_pixels)
    if (labels / "data.yaml").is_file():
        content = read_yolo(labels / "data.yaml", max_pixels)
        return CocoFile(labels, content=content, allow_mixed=True, max_pixels=max_pixels)
    if next(labels.rglob("*.xml"), None) is not None:
        return CocoFile(labels, content=read_voc(labels, max_pixels), allow_mixed=True, max_pixels=max_pixels)
    if labels.is_dir():
        return LabelledVideos(labels, max_pixels=max_pixels)
    raise ConfigError(
        f"truth={path}: expected a COCO file (.json), a YOLO dataset (data.yaml), a folder of Pascal VOC (.xml) or "
        "DAVIS (.png), or JSON of SA-V or YouTube-VIS"
    )


@lru_cache(maxsize=3)  # all jobs of a sweep read the same files
def _read_json_labels(path: Path, mtime_ns: int, size: int, max_pixels: int) -> CocoFile | LabelledVideos:
    """Read a JSON file of labels; the time and size of the file are part of the cache key."""
    content = read_json(path)
    of_videos = isinstance(content, Mapping) and ("masklet" in content or "videos" in content)
    if of_videos and "images" not in content:
        return LabelledVideos(path, content, max_pixels)
    return CocoFile(path, content=content, allow_mixed=True, max_pixels=max_pixels)
