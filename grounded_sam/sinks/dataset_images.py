"""The pictures of a dataset, beside its labels."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from grounded_sam.errors import ConfigError
from grounded_sam.files import UniqueNames, atomic_write
from grounded_sam.media.images import no_pillow_limit, safe_formats
from grounded_sam.structures.frame import Frame

Handling = Literal["link", "copy", "none"]
#: Formats that every trainer reads, and the suffix that says so.
COMMON = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp"}


class DatasetImages:
    """Puts the picture of each frame under a folder, by a stem that is never given twice.

    A JPEG, PNG or BMP that every reader shows as it was labelled is linked or copied as it is. Others are
    written anew as PNG: those with an EXIF orientation (the labels are of the upright picture), with
    transparency, palette or CMYK, of other formats, scaled ones. Frames of video files become JPEG.

    Args:
        how: `link` (symbolic, a copy where there are none), `copy`, or `none` for no pictures.
        key: of the setting, for messages.
    """

    def __init__(self, how: Handling, key: str) -> None:
        if how not in ("link", "copy", "none"):
            raise ConfigError(f"{key} must be link, copy or none, got {how!r}")
        self.how = how
        self._names = UniqueNames()

    def stem(self, frame: Frame) -> str:
        """A relative path without suffix, with `/`, for a frame; made safe, and its own."""
        path = Path(frame.name.replace("\\", "/"))
        kept = (
            path.as_posix()
            if frame.video is not None and path.suffix[1:].isdecimal()
            else path.with_suffix("").as_posix()
        )
        return self._names(kept, "").as_posix()

    def put(self, frame: Frame, folder: Path, stem: str) -> str:
        """Put a frame's picture under `folder`; returns its name there, `stem` with a suffix.

        Raises:
            ImageError: if its pixels are needed and gone.
        """
        from PIL import Image

        suffix = self._as_it_is(frame)
        name = stem + (suffix or (".jpg" if frame.video is not None and not self._still(frame) else ".png"))
        if self.how == "none":
            return name
        place = folder / name
        if frame.file is not None and place.exists() and frame.file.exists() and place.samefile(frame.file):
            return name  # the input itself, or a link to it
        with atomic_write(place) as part:
            if suffix is None:
                kind = "JPEG" if name.endswith(".jpg") else "PNG"
                image = Image.fromarray(frame.image)
                image.save(part, format=kind, **({"quality": 95} if kind == "JPEG" else {}))
            elif self.how == "copy":
                shutil.copyfile(frame.file, part)  # type: ignore[arg-type]
            else:
                source = os.path.realpath(frame.file)  # type: ignore[arg-type]
                try:
                    os.symlink(source, part)
                except OSError:  # a file system without links
                    shutil.copyfile(source, part)
        return name

    def _still(self, frame: Frame) -> bool:
        """Whether a frame is a picture file of its own."""
        from grounded_sam.media.files import VIDEO_SUFFIXES

        return frame.file is not None and frame.file.suffix.lower() not in VIDEO_SUFFIXES

    def _as_it_is(self, frame: Frame) -> str | None:
        """The suffix of a file that can be taken as it is, None if it has to be written anew."""
        from PIL import Image

        if not self._still(frame):
            return None
        try:
            with no_pillow_limit(), Image.open(frame.file, formats=safe_formats()) as picture:  # type: ignore[arg-type]
                plain = picture.mode in ("RGB", "L") and getattr(picture, "n_frames", 1) == 1
                upright = picture.getexif().get(0x0112, 1) == 1
                same = picture.size == (frame.size_hw[1], frame.size_hw[0])
                if plain and upright and same and not picture.has_transparency_data:
                    return COMMON.get(str(picture.format))
        except Exception:  # what cannot be opened is told of when its pixels are asked for
            return None
        return None
