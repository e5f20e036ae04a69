"""Experiments of the catalogue that have loops, on embedded guests and shorter: each arm has the
figures that the experiment's page (docs/experiments) promises."""

import re
from typing import Any

import pytest

from orchestrator.spec import catalogue
from tests.support.lab import Lab, result
from tests.support.stored import charts_of


def shortened(name: str) -> str:
    text = catalogue.text(name)
    if name == "workday":  # each phase once
        text = "\n".join(dict.fromkeys(text.splitlines()))
        text = re.sub(r"((?:allocate|free): \d+MiB), for: \d+s", r"\1", text)
    text = re.sub(r"\bfor: \d+m?s", "for: 600ms", text)
    text = text.replace("repetitions: 3", "repetitions: 2")
    text = re.sub(r"\{repeat: \d\}", "{repeat: 1}", text)
    return re.sub(r"sweep: \{chunk_order: \[6, 9\].*\}", "sweep: {chunk_order: [6, 9]}", text)


@pytest.mark.parametrize(
    ("name", "arms", "figures"),
    [
        (
            "churn",
            ["none", "adaptive", "eager", "cold"],
            {
                "churn 64 MiB": ("cycles", "allocation_p50_us", "allocation_p99_us"),
                "churn 64 MiB, pause 0.5 s": ("cycles", "allocation_p50_us", "allocation_p99_us"),
            },
        ),
        (
            "interference",
            ["none", "adaptive", "eager"],
            {
                "fault 64 MiB": ("bytes_per_s", "bytes_per_s_p1", "allocation_p99_us"),
                "bandwidth 64 MiB": ("bytes_per_s", "bytes_per_s_p1"),
            },
        ),
        (
            "workday",
            ["none", "adaptive", "eager", "cold"],
            {
                "churn 32 MiB, pause 0.2 s": ("cycles", "allocation_p50_us", "allocation_p99_us"),
                "churn 32 MiB, pause 0.5 s": ("cycles", "allocation_p50_us", "allocation_p99_us"),
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
    page = lab.folder / "report.html"
    assert lab.run("report", "-o", str(page)).returncode == 0
    allocating = {title for title, names in figures.items() if "allocation_p99_us" in names}
    plots = {f"allocations-{i}" for i in range(len(allocating))}
    assert charts_of(page.read_text()).keys() == {"resident", "savings", "parts", *plots}
    lab.check_nothing_is_left()
