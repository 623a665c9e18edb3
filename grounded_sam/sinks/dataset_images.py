"""The image files of a dataset, beside its labels."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from grounded_sam.checks import check_choice
from grounded_sam.errors import ConfigError, ImageError, RemoteError
from grounded_sam.files import UniqueNames, atomic_write, atomic_write_text, keep_output
from grounded_sam.formats.coco import read_json
from grounded_sam.media.files import is_video_file
from grounded_sam.media.images import open_image
from grounded_sam.remote import Location
from grounded_sam.structures.frame import Frame

#: How image files get into a dataset.
ImageMode = Literal["link", "copy", "none", "address"]
#: Suffixes of the formats that every training program reads.
COMMON_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp"}


class DatasetImages:
    """Put the image of each frame into a folder, under a unique name.

    JPEG, PNG and BMP files that every reader shows as they were labeled are linked or copied. Others are re-encoded as
    PNG: files with an EXIF orientation (the labels are for the upright image), transparency, a palette or CMYK, files
    of other formats, and images that were resized. Frames of video files become JPEG.

    Args:
        mode: `link` (symbolic links, or copies where the file system has none, and of images under addresses), `copy`,
            `none` for no image files, or `address` to name images at their addresses instead.
        key: Name of the setting, for messages.
        reserved: Names that no folder may have.
        takes_addresses: Whether the format can name addresses.

    Raises:
        ConfigError: If `mode` is none of these.
    """

    def __init__(
        self, mode: ImageMode, key: str, reserved: Collection[str] = (), takes_addresses: bool = False
    ) -> None:
        check_choice(key, mode, ("link", "copy", "none", *(["address"] if takes_addresses else [])))
        self.mode, self.key = mode, key
        self._names = UniqueNames(reserved)

    def read_names(self, folder: Path) -> None:
        """Read which image has which path from `.names` in the folder of a dataset, so that they keep them.

        Raises:
            ConfigError: If the file is damaged.
        """
        path = folder / ".names"
        if not path.is_file():
            return
        names = read_json(path)
        if not isinstance(names, dict) or not all(isinstance(v, str) and _is_inside(k) for k, v in names.items()):
            raise ConfigError(
                f"{path} must map the path of each image file to the name of its image; delete it and run again"
            )
        self._names = UniqueNames(self._names.reserved, names)

    def write_names(self, folder: Path) -> None:
        """Write the name of each image by its path, without suffix, to `.names` in the folder of a dataset."""
        if self._names.names:
            # In ASCII, since a name may have what UTF-8 cannot encode.
            atomic_write_text(folder / ".names", json.dumps(self._names.names, indent=0))

    def unique_stem(self, frame: Frame) -> str:
        """Return a relative path without suffix for a frame, with `/`, safe and never given twice."""
        stem, ending = os.path.splitext(frame.name)
        has_suffix = frame.video is None or not ending[1:].isdecimal()
        return self._names(stem if has_suffix else frame.name, "", frame.name).as_posix()

    def save(self, frame: Frame, folder: Path, stem: str) -> str:
        """Link, copy or write the image of a frame.

        Args:
            frame: The frame.
            folder: Folder of the images.
            stem: Its path in the folder without suffix, from `unique_stem`.

        Returns:
            Its path in the folder, `stem` with a suffix; with mode `none` the one that it would have, and with mode
            `address` its address.

        Raises:
            ImageError: If its pixels are needed and cannot be read.
        """
        if self.mode == "address":
            return self.address(frame)
        content = _content(frame) if self.mode != "none" or _is_image_file(frame) else None
        suffix = _usable_suffix(frame, content)
        name = stem + (suffix or (".png" if _is_image_file(frame) or frame.video is None else ".jpg"))
        if self.mode == "none":
            return name
        path = folder / name
        if isinstance(frame.file, Path) and path.exists() and frame.file.exists() and path.samefile(frame.file):
            keep_output(path)
            return name  # the input itself, or a link to it
        with atomic_write(path, is_copy=True) as part:
            if suffix is None:
                _encode(frame, part, "JPEG" if name.endswith(".jpg") else "PNG")
            elif content is not None:
                part.write_bytes(content)
            else:
                assert isinstance(frame.file, Path)
                self._link_or_copy(frame.file, part)
        return name

    def address(self, frame: Frame) -> str:
        """Return the address of an image, without credentials.

        Raises:
            ImageError: If it is a file of this machine, or a frame of a video.
        """
        if not isinstance(frame.file, Location) or frame.video is not None:
            raise ImageError(f"{frame.name} has no address; {self.key}=address is for images in buckets, use copy")
        return str(frame.file)

    def save_video(self, frame: Frame, folder: Path) -> str:
        """Link or copy the video file that a frame comes from.

        Args:
            frame: The frame.
            folder: Folder of the videos.

        Returns:
            Its path in the folder; with mode `none` the one that it would have.

        Raises:
            ImageError: If the file is gone.
        """
        assert isinstance(frame.file, Path) and frame.video is not None
        suffix = frame.file.suffix
        name = self._names(frame.video.removesuffix(suffix), suffix, frame.video).as_posix()
        path = folder / name
        if self.mode == "none":
            return name
        if path.exists() and frame.file.exists() and path.samefile(frame.file):
            keep_output(path)
            return name
        try:
            with atomic_write(path, is_copy=True) as part:
                self._link_or_copy(frame.file, part)
        except FileNotFoundError as error:
            raise ImageError(
                f"{frame.file}: no such file; sink.label_studio.images=none writes its labels alone"
            ) from error
        return name

    def _link_or_copy(self, file: Path, path: Path) -> None:
        if self.mode == "link":
            try:
                os.symlink(os.path.realpath(file), path)
                return
            except OSError:  # a file system without links
                pass
        shutil.copyfile(file, path)


def _is_inside(path: str) -> bool:
    """Whether a recorded path stays in its folder."""
    return "\\" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def _is_image_file(frame: Frame) -> bool:
    """Whether a frame comes from a file of its own, not from a video file."""
    return frame.file is not None and not is_video_file(frame.file)


def _encode(frame: Frame, path: Path, image_format: Literal["JPEG", "PNG"]) -> None:
    from PIL import Image

    options = {"quality": 95} if image_format == "JPEG" else {}
    Image.fromarray(frame.image).save(path, format=image_format, **options)


def _content(frame: Frame) -> bytes | None:
    """Return the file of an image under an address; None for a file of this machine, and if it cannot be read."""
    if not isinstance(frame.file, Location):
        return None
    if frame.content is not None and frame.content.data is not None:
        return frame.content.data
    try:
        return frame.file.read_bytes()
    except RemoteError:  # reported when its pixels are requested
        return None


def _usable_suffix(frame: Frame, content: bytes | None) -> str | None:
    """Return the suffix of a frame's file if the dataset can use the file; None if it has to be re-encoded."""
    if not _is_image_file(frame) or (isinstance(frame.file, Location) and content is None):
        return None
    try:
        with open_image(content or frame.file, sys.maxsize) as image:  # type: ignore[arg-type]
            is_plain = image.mode in ("RGB", "L") and getattr(image, "n_frames", 1) == 1
            is_upright = image.getexif().get(0x0112, 1) == 1
            is_same_size = image.size == (frame.size_hw[1], frame.size_hw[0])
            if is_plain and is_upright and is_same_size and not image.has_transparency_data:
                return COMMON_SUFFIXES.get(str(image.format))
    except Exception:  # an unreadable file is reported when its pixels are requested
        return None
    return None
