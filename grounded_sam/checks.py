"""Checks of settings that raise one kind of message: `KEY must be ..., got VALUE`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grounded_sam.errors import ConfigError, shorten


def check_bool(key: str, value: object) -> None:
    """Check that a setting is true or false.

    Args:
        key: Name of the setting, as in the config.
        value: Its value.

    Raises:
        ConfigError: If it is neither.

    >>> check_bool("refine.boxes", True)
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, got {shorten(value)}")


def check_int(key: str, value: object, minimum: int, maximum: int | None = None, *, optional: bool = False) -> None:
    """Check that a setting is an integer in a range.

    Args:
        key: Name of the setting, as in the config.
        value: Its value.
        minimum: Smallest value allowed.
        maximum: Largest value allowed; None for no limit.
        optional: Whether None (`null`) is allowed.

    Raises:
        ConfigError: If it is not an integer, or out of range.

    >>> check_int("select.top_k", None, 0, optional=True)
    """
    if value is None and optional:
        return
    limit = math.inf if maximum is None else maximum
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= limit:
        bounds = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ConfigError(f"{key} must be {'null or ' if optional else ''}an integer {bounds}, got {shorten(value)}")


def check_number(
    key: str,
    value: object,
    minimum: float = 0.0,
    maximum: float | None = None,
    *,
    above: bool = False,
    optional: bool = False,
) -> None:
    """Check that a setting is a finite number in a range.

    Args:
        key: Name of the setting, as in the config.
        value: Its value.
        minimum: Smallest value allowed.
        maximum: Largest value allowed; None for no limit.
        above: Whether `minimum` itself is not allowed.
        optional: Whether None (`null`) is allowed.

    Raises:
        ConfigError: If it is not a finite number, or out of range.

    >>> check_number("select.score", 0.3, 0, 1)
    """
    if value is None and optional:
        return
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if good and (value > minimum or (value == minimum and not above)) and (maximum is None or value <= maximum):  # type: ignore[operator]
        return
    low = f"> {minimum:g}" if above else f">= {minimum:g}"
    bounds = f"a number {low}" if maximum is None else f"a number from {minimum:g} to {maximum:g}"
    if maximum is not None and above:
        bounds = f"a number {low} and <= {maximum:g}"
    raise ConfigError(f"{key} must be {'null or ' if optional else ''}{bounds}, got {shorten(value)}")


def check_choice(key: str, value: object, choices: Sequence[str], *, optional: bool = False) -> None:
    """Check that a setting is one of several names.

    Args:
        key: Name of the setting, as in the config.
        value: Its value.
        choices: Names allowed.
        optional: Whether None (`null`) is allowed.

    Raises:
        ConfigError: If it is none of them.

    >>> check_choice("select.nms_by", "box", ("box", "mask"))
    """
    if (value is None and optional) or (isinstance(value, str) and value in choices):
        return
    names = [*choices, *(["null"] if optional else [])]
    listed = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
    raise ConfigError(f"{key} must be {listed}, got {shorten(value)}")
