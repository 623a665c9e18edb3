"""From words on the command line to stages: the config folder, composing, building."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """The folder of our YAML files: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(d for d in (package / "conf", package.parent / "conf") if (d / "config.yaml").is_file())


def in_sweep() -> bool:
    """Whether this is a job of a multirun."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
