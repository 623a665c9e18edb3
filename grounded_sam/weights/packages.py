"""Packages of models that only some stages need."""

from __future__ import annotations

import importlib
from types import ModuleType

from grounded_sam.errors import ConfigError
from grounded_sam.hydra_state import preserve_hydra_state


def import_package(package: str, stage: str, instead: str, install: str | None = None) -> ModuleType:
    """Import the package that a stage runs on; Hydra's global state stays as it is.

    Args:
        package: Module to import.
        stage: The stage, as an override, such as `segmenter=sam`.
        instead: What to choose where it cannot be installed.
        install: What `pip install` takes; None for `package`.

    Raises:
        ConfigError: If it cannot be imported; the message says what to install or to choose.

    >>> import_package("json", "detector=mine", "detector=owlv2").__name__
    'json'
    """
    try:
        with preserve_hydra_state():
            return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{stage} needs the package {package}, which cannot be imported ({error}): "
            f"pip install {install or package}, or choose {instead}"
        ) from error
