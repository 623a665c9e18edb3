"""Checks of settings: what passes, and one form of message for what does not."""

from __future__ import annotations

import math

import pytest

from grounded_sam import ConfigError
from grounded_sam.checks import check_bool, check_choice, check_int, check_number


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (lambda v: check_bool("k", v), True),
        (lambda v: check_int("k", v, 1), 1),
        (lambda v: check_int("k", v, 1, 5), 5),
        (lambda v: check_int("k", v, 1, optional=True), None),
        (lambda v: check_number("k", v, 0, 1), 1),
        (lambda v: check_number("k", v, 0, above=True), 1e-9),
        (lambda v: check_number("k", v, optional=True), None),
        (lambda v: check_choice("k", v, ("a", "b")), "a"),
        (lambda v: check_choice("k", v, ("a", "b"), optional=True), None),
    ],
)
def test_values_in_range_pass(check, value):
    check(value)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (lambda v: check_bool("k", v), 1, "k must be true or false, got 1"),
        (lambda v: check_bool("k", v), None, "k must be true or false, got None"),
        (lambda v: check_int("k", v, 1), 0, "k must be an integer >= 1, got 0"),
        (lambda v: check_int("k", v, 1), True, "k must be an integer >= 1, got True"),
        (lambda v: check_int("k", v, 1), 2.0, "k must be an integer >= 1, got 2.0"),
        (lambda v: check_int("k", v, 0, 0), 1, "k must be an integer from 0 to 0, got 1"),
        (lambda v: check_int("k", v, 0, 51), 52, "k must be an integer from 0 to 51, got 52"),
        (lambda v: check_int("k", v, 1, optional=True), "x", "k must be null or an integer >= 1, got 'x'"),
        (lambda v: check_number("k", v, 0, 1), 1.5, "k must be a number from 0 to 1, got 1.5"),
        (lambda v: check_number("k", v, 0, 1), math.nan, "k must be a number from 0 to 1, got nan"),
        (lambda v: check_number("k", v, 0, 1), "0.5", "k must be a number from 0 to 1, got '0.5'"),
        (lambda v: check_number("k", v), math.inf, "k must be a number >= 0, got inf"),
        (lambda v: check_number("k", v, 0, above=True), 0, "k must be a number > 0, got 0"),
        (lambda v: check_number("k", v, 0, 1, above=True), 0, "k must be a number > 0 and <= 1, got 0"),
        (lambda v: check_number("k", v, 0, 1, optional=True), 2, "k must be null or a number from 0 to 1, got 2"),
        (lambda v: check_choice("k", v, ("a", "b", "c")), "d", "k must be a, b or c, got 'd'"),
        (lambda v: check_choice("k", v, ("a", "b")), None, "k must be a or b, got None"),
        (lambda v: check_choice("k", v, ("a", "b"), optional=True), 1, "k must be a, b or null, got 1"),
        (lambda v: check_choice("k", v, ("a",)), [], "k must be a, got []"),
    ],
)
def test_messages_name_key_range_and_value(check, value, message):
    with pytest.raises(ConfigError) as error:
        check(value)
    assert str(error.value) == message
