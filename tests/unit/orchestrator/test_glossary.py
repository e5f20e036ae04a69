"""Every number in the JSON of a run has a unit, and says what it is measured on or against."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import run_command
from orchestrator.results.capacity import ArmCapacity
from orchestrator.results.comparison import ArmCost
from orchestrator.results.footprint import Footprint, Returned
from orchestrator.results.frontier import Point
from orchestrator.results.loop_comparison import ArmLoops
from orchestrator.results.precision import Reached
from orchestrator.results.savings import Savings
from orchestrator.view.glossary import GLOSSARY
from tests.support.stored import store_filled_run, store_run

WITHOUT_UNIT = {"mean", "low", "high", "pairs", "first_look"}
"""Parts of an interval or of a loop's figure: they have the unit of the whole, or count pairs."""


def numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from numbers(one, (*path, key))
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def name_of(path: tuple[str, ...]) -> str:
    if "more_percent" in path:
        return "loops.more_percent"
    inside = path[1:] if path[0] == "arms" else path
    if len(inside) > 1 and inside[-1] in WITHOUT_UNIT and inside[0] != "frontier":
        inside = inside[:-1]
    return ".".join(inside)


OF_PARTS = {
    "": Savings,
    "footprint.": Footprint,
    "footprint.returned.": Returned,
    "cost.": ArmCost,
    "precision.": Reached,
    "loops.": ArmLoops,
    "capacities.": ArmCapacity,
    "frontier.": Point,
}


@pytest.mark.parametrize("prefix", OF_PARTS)
def test_every_figure_that_there_can_be_has_a_unit(prefix: str) -> None:
    figures = [
        field.name
        for field in dataclasses.fields(OF_PARTS[prefix])
        if re.search(r"\b(int|float|Interval|LoopFigure)\b", str(field.type))
    ]
    assert figures
    assert [name for name in figures if prefix + name not in GLOSSARY] == []


@pytest.mark.parametrize("store", [store_run, store_filled_run])
def test_every_number_has_a_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], store: Any
) -> None:
    store(tmp_path)
    run_command(["show", "latest", "-o", "json", "--data-dir", str(tmp_path)])
    data = json.loads(capsys.readouterr().out)
    found = {
        name_of(path)
        for key in ("arms", "capacities", "frontier")
        for path in numbers(data[key], (key,))
    }
    assert len(found) > 3
    assert found <= data["figures"].keys()
    assert all(one["unit"] and one["of"] for one in data["figures"].values())
