"""Labels of other formats: of images as the COCO file that they would be, of videos as masklets."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from grounded_sam.errors import ConfigError
from grounded_sam.formats.coco import CocoFile, read_json
from grounded_sam.formats.video_masks import LabelledVideos
from grounded_sam.formats.voc import from_voc
from grounded_sam.formats.yolo import from_yolo


def read_ground_truth(given: str | Path) -> CocoFile | LabelledVideos:
    """Labels: of images a COCO file, a YOLO `data.yaml` or its folder, or a folder of Pascal VOC; of videos a folder
    of DAVIS, SA-V's JSON or YouTube-VIS JSON.

    Raises:
        ConfigError: if it is none of these, or cannot be read.
    """
    path = Path(str(given)).expanduser()
    if not path.exists():
        raise ConfigError(f"truth={given}: no such file or folder")
    if path.is_file() and path.suffix.lower() == ".json":
        about = path.stat()
        return _from_json(path, about.st_mtime_ns, about.st_size)
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        return CocoFile(path, content=from_yolo(path), mixed=True)
    if (path / "data.yaml").is_file():
        return CocoFile(path, content=from_yolo(path / "data.yaml"), mixed=True)
    if next(path.rglob("*.xml"), None) is not None:
        return CocoFile(path, content=from_voc(path), mixed=True)
    if path.is_dir():
        return LabelledVideos(path)
    raise ConfigError(
        f"truth={given}: expected a COCO file (.json), a YOLO dataset (data.yaml), a folder of Pascal VOC (.xml) or of "
        "DAVIS (.png), SA-V's JSON or YouTube-VIS JSON"
    )


@lru_cache(maxsize=1)  # the jobs of a sweep ask for the same
def _from_json(path: Path, changed: int, size: int) -> CocoFile | LabelledVideos:
    content = read_json(path)
    videos = isinstance(content, dict) and ("masklet" in content or "videos" in content)
    return (
        LabelledVideos(path, content)
        if videos and "images" not in content
        else CocoFile(path, content=content, mixed=True)
    )
