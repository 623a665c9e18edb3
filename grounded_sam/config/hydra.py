"""Find the config folder."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """Return the folder of the config: inside the installed package, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "conf", package.parent / "conf") if (folder / "config.yaml").is_file())
