"""Check that a source has an input."""

from __future__ import annotations

from grounded_sam.errors import ConfigError


def check_input(input: object, expected: str) -> str:
    """Return an input as text.

    Args:
        input: A path, URL or camera index; None or an empty string if it is missing.
        expected: What could be given, for the message.

    Raises:
        ConfigError: If it is missing.

    >>> check_input(0, "a camera index")
    '0'
    """
    if input is None or not str(input):
        raise ConfigError(f"input is missing: set it to {expected}")
    return str(input)
