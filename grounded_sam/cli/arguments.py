"""The argument parser that several commands share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from grounded_sam.errors import ConfigError


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`s."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError(f"{message}; --help shows examples")
