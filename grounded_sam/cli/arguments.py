"""The argument parser that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from grounded_sam.errors import ConfigError
from grounded_sam.files import store_path
from grounded_sam.output.paths import RemotePath


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`s."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError(f"{message}; --help shows examples")


def local_folder(text: str) -> Path:
    """Return the path of a folder that a command takes.

    Raises:
        ConfigError: If it is an address such as `s3://bucket/labels`.
    """
    path = store_path(text)
    if isinstance(path, RemotePath):
        raise ConfigError(f"{path} is an address, and this command needs a folder of this machine; copy it to one")
    return path
