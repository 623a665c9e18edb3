"""A few of the inputs of `make fuzz`, the same in every run: no reader and no writer ends with a traceback."""

from __future__ import annotations

import pytest
from fuzz.fuzz_inputs import TARGETS, survives, targets
from hypothesis import HealthCheck, given, settings


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return targets(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input(inputs, name):
    drawn, use = inputs[name]

    @settings(
        max_examples=20 if name == "names" else 150,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def examples(example):
        survives(lambda: use(example))

    examples()
