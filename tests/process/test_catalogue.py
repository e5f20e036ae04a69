"""Experiments of the catalogue that have loops, on embedded guests and shorter: each arm has the
figures that the experiment's page (docs/experiments) promises."""

import re
from typing import Any

import pytest

from orchestrator.spec import catalogue
from tests.support.lab import Lab, result


def shortened(name: str) -> str:
    text = re.sub(r"\bfor: \d+m?s", "for: 600ms", catalogue.text(name))
    text = text.replace("repetitions: 3", "repetitions: 2").replace("{repeat: 3}", "{repeat: 1}")
    return re.sub(r"sweep: \{chunk_order: \[6, 9\].*\}", "sweep: {chunk_order: [6, 9]}", text)


@pytest.mark.parametrize(
    ("name", "arms", "figures"),
    [
        (
            "churn",
            ["none", "hinting", "cold"],
            {
                "churn 64 MiB": ("cycles", "allocation_p50_us", "allocation_p99_us"),
                "churn 64 MiB, pause 0.5 s": ("cycles", "allocation_p50_us", "allocation_p99_us"),
            },
        ),
        (
            "interference",
            ["none", "hinting"],
            {
                "fault 64 MiB": ("bytes_per_s", "bytes_per_s_p1", "allocation_p99_us"),
                "bandwidth 64 MiB": ("bytes_per_s", "bytes_per_s_p1"),
            },
        ),
        (
            "sweep",
            ["none", "hint-o6", "hint-o9"],
            {"churn 64 MiB": ("cycles", "allocation_p50_us", "allocation_p99_us")},
        ),
    ],
)
def test_each_arm_has_its_figures(
    lab: Lab, name: str, arms: list[str], figures: dict[str, tuple[str, ...]]
) -> None:
    data = result(lab.run("run", lab.spec(shortened(name)), "-o", "json"))
    assert [arm["arm"] for arm in data["arms"]] == arms
    for arm in data["arms"]:
        assert arm["footprint"]["wrong_pages"] == 0
        measured: dict[str, Any] = {loop["title"]: loop for loop in arm["loops"]}
        assert measured.keys() == figures.keys()
        for title, names in figures.items():
            for figure in names:
                assert measured[title][figure]["mean"] > 0 or figure == "cycles"
                more = measured[title][figure]["more_percent"]
                assert (more is None) == (arm["arm"] == "none")
    shown = lab.run("show").stdout
    for title in figures:
        assert title in shown
    lab.check_nothing_is_left()
