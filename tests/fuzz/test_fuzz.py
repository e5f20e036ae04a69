"""Feeds each target its seeds and its kept inputs (corpus/: few inputs that reach every branch that
fuzzing had reached); then, if atheris is installed, fuzzes each target with a fixed number of
inputs, for at most 20 s.

`python -m tests.fuzz --seconds N` fuzzes all of them for N seconds together.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.fuzz.run import fuzz
from tests.fuzz.target import NAMES, kept_inputs, load

_AT_MOST_S = 20


@pytest.mark.parametrize("name", NAMES)
def test_kept_inputs_find_nothing(name: str) -> None:
    target = load(name)
    inputs = [*target.seeds, *kept_inputs(name)]
    assert len(inputs) > len(target.seeds)
    with target.opened() as try_input:
        for data in inputs:
            try_input(data)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
@pytest.mark.parametrize("name", NAMES)
def test_new_inputs_find_nothing(name: str, tmp_path: Path) -> None:
    """The inputs are the same each time, because their number and the seed are fixed; only on a
    slow machine, _AT_MOST_S may end the fuzzing earlier."""
    result = fuzz(name, runs=load(name).quick_runs, seconds=_AT_MOST_S, found_in=tmp_path)
    assert not result.failed, f"{result.crashes}\n{result.output}"
    assert result.inputs > len(kept_inputs(name))
    assert result.edges > 0
