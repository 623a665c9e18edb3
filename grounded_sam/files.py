"""Files that appear whole or not at all, under names that cannot collide or leave their folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; rename it into place at the end, remove it on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # of a process that was killed; it may be a link
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class UniqueNames:
    """Relative output names for frames: the frame's own, made safe, never the same twice."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __call__(self, name: str, suffix: str) -> Path:
        """`sub/photo.png` to `sub/photo.png` if it has `suffix` already, else `sub/photo.png<suffix>`."""
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        safe = "/".join(safe_filename(part) for part in parts) or "image"
        base = safe if suffix and safe.lower().endswith(suffix) else safe + suffix
        stem, ending = (base[: -len(suffix)], suffix) if suffix else (base, "")
        free, count = base, 1
        while free.casefold() in self._taken:
            count += 1
            free = f"{stem}-{count}{ending}"
        self._taken.add(free.casefold())
        return Path(free)


def safe_filename(part: str) -> str:
    """A file name of any system: letters of all scripts stay, what a file system forbids becomes `_`."""
    safe = re.sub(r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]', "_", part).rstrip(". ")
    return safe.encode()[:200].decode("utf-8", "ignore") or "_"  # file systems count bytes
