"""The changes between two runs, and the verdicts on bounds, as tables and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from hintfleet.program import printable
from hintfleet.units import format_size
from orchestrator.results.bounds import Judgement, Verdict
from orchestrator.results.changes import Change, Figure, Unit
from orchestrator.results.statistics import Interval
from orchestrator.results.store.reader import Run
from orchestrator.view.figures import (
    NO_FIGURE,
    decimals,
    first_line,
    number_interval,
    percent_interval,
    seconds_interval,
    size_interval,
    when,
)
from orchestrator.view.tables import name_cell, table

_STYLES = {Verdict.KEPT: "green", Verdict.BROKEN: "red", Verdict.UNDECIDED: "yellow"}
_MORE_IS_BETTER = (Figure.SAVED, Figure.GUESTS, Figure.LOOP_RATE)
_NOTE = (
    "saved, slowdown, host_cpu: against the control of the same run; change: second run minus "
    "first, over pairs of repetitions with the same seeds, [95 % CI]; in %: of the figure in the "
    "first run, - if that is not clearly above 0; slowdown: of the steps' time in the first run, "
    "each divided by that under the control"
)


def change_tables(
    runs: tuple[Run, Run], changes: Sequence[Change], judgements: Sequence[Judgement]
) -> RenderableType:
    """Return what was compared, a table with a row for each figure of each arm, and a table with
    the verdicts, if there are any."""
    heading = Text(f"{runs[0].name}: {runs[0].summary}", style="bold")
    for place, run in zip(("first ", "second"), runs, strict=True):
        heading.append(f"\n{place} run {run.run_id}, {when(run.started_unix_us)}", style="dim")
    parts: list[RenderableType] = [heading, Text(), _changes(changes), Text()]
    parts.append(Text(_NOTE, style="dim"))
    parts += [Text.assemble(("undecided: ", "yellow"), line) for line in undecided(changes)]
    if judgements:
        parts += [Text(), _verdicts(judgements)]
    return Group(*parts)


def comparison_as_data(
    runs: tuple[Run, Run], changes: Sequence[Change], judgements: Sequence[Judgement]
) -> dict[str, Any]:
    """Return a comparison as plain data. `differences` are facts about machine and versions: both
    runs have the same spec."""
    return {
        "first": runs[0].run_id,
        "second": runs[1].run_id,
        "experiment": runs[0].name,
        "driver": runs[0].driver,
        "spec_hash": runs[0].spec_hash,
        "differences": differences(*runs),
        "changes": [_change_as_data(change) for change in changes],
        "bounds": [_judgement_as_data(judgement) for judgement in judgements],
    }


def differences(first: Run, second: Run) -> list[dict[str, str]]:
    """Return the facts about machine and versions that are not the same in both runs."""
    names = dict.fromkeys((*first.environment, *second.environment))
    values = {
        name: [run.environment.get(name, "unknown") for run in (first, second)] for name in names
    }
    return [
        {"what": name, "first": before, "second": after}
        for name, (before, after) in values.items()
        if before != after
    ]


def undecided(changes: Sequence[Change]) -> list[str]:
    """Return why arms, or some of their figures, cannot be compared: one line for each arm and
    reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for change in changes:
        reasons.setdefault((change.arm, change.undecided), []).append(change.figure)
    return [
        f"{arm}, {', '.join(figures)}: {first_line(reason)}"
        if (arm, "") in reasons
        else f"{arm}: {first_line(reason)}"
        for (arm, reason), figures in reasons.items()
        if reason
    ]


def verdict_line(judgement: Judgement) -> str:
    """Return the verdict on a bound for one arm as a line of text."""
    shown = _shown(judgement).replace("\n", " ")
    found = " ".join(filter(None, (shown, printable(judgement.reason))))
    return f"{judgement.verdict}: {judgement.arm}: {judgement.bound.text}: {found}"


def _changes(changes: Sequence[Change]) -> RenderableType:
    shown = table(
        ("arm", "figure"), ("first", "second", "change\n\\[95 % CI]", "in %\n\\[95 % CI]", "pairs")
    )
    name = ""
    for change in changes:
        shown.add_row(
            name_cell(change.arm if change.arm != name else ""),
            change.figure,
            _value(change.figure, change.first),
            _value(change.figure, change.second),
            *_intervals(change),
            str(len(change.pairs)),
        )
        name = change.arm
    return shown


def _intervals(change: Change) -> list[Text]:
    if change.undecided:
        return [Text("undecided", style="yellow"), Text(NO_FIGURE)]
    style = _style(change)
    return [
        Text(_interval(change.figure.unit, change.difference), style),
        Text(percent_interval(change.percent), style),
    ]


def _style(change: Change) -> str:
    """Return green for a change for the better, red for one for the worse; empty if its interval
    is missing or contains 0."""
    interval = change.difference or change.percent
    if interval is None or interval.low <= 0 <= interval.high:
        return ""
    return "green" if (interval.low > 0) is (change.figure in _MORE_IS_BETTER) else "red"


def _value(figure: Figure, value: float | None) -> str:
    if value is None:
        return NO_FIGURE
    if figure.unit in (Unit.BYTES, Unit.BYTES_PER_S):
        return f"{format_size(value)}{'/s' if figure.unit is Unit.BYTES_PER_S else ''}"
    if figure.unit is Unit.PERCENT:
        return f"{value:+.1f} %"
    digits = decimals(abs(value))
    if figure.unit is Unit.SECONDS:
        return f"{value:.{min(digits, 2)}f} s"
    return f"{value:.{digits}f}{' ms' if figure.unit is Unit.MILLISECONDS else ''}"


def _interval(unit: Unit, interval: Interval | None) -> str:
    if interval is None:
        return NO_FIGURE
    show = {
        Unit.BYTES: size_interval,
        Unit.SECONDS: seconds_interval,
        Unit.PERCENT: percent_interval,
        Unit.GIB_MIN: number_interval,
        Unit.GUESTS: number_interval,
        Unit.BYTES_PER_S: size_interval,
        Unit.MILLISECONDS: number_interval,
    }[unit]
    after = {Unit.BYTES_PER_S: "/s", Unit.MILLISECONDS: " ms"}.get(unit, "")
    text = show(interval).replace("\n", f"{after}\n")
    return text if text.startswith(("-", "+")) else f"+{text}"


def _shown(judgement: Judgement) -> str:
    bound = judgement.bound
    unit = Unit.PERCENT if bound.is_percent else bound.figure.unit
    return _interval(unit, judgement.change) if judgement.change else ""


def _verdicts(judgements: Sequence[Judgement]) -> RenderableType:
    shown = table(("bound", "arm", "verdict"), ("change\n\\[95 % CI]",))
    shown.add_column("to decide it")
    for judgement in judgements:
        shown.add_row(
            Text(judgement.bound.text),
            name_cell(judgement.arm),
            Text(judgement.verdict, style=_STYLES[judgement.verdict]),
            _shown(judgement),
            Text(first_line(judgement.reason)),
        )
    return shown


def _change_as_data(change: Change) -> dict[str, Any]:
    return {
        "arm": change.arm,
        "figure": change.figure.value,
        "unit": change.figure.unit.value,
        "first": change.first,
        "second": change.second,
        "difference": _as_data(change.difference),
        "percent": _as_data(change.percent),
        "percent_of": change.figure.percent_of,
        "undecided": change.undecided,
    }


def _judgement_as_data(judgement: Judgement) -> dict[str, Any]:
    return {
        "bound": judgement.bound.text,
        "arm": judgement.arm,
        "verdict": judgement.verdict.value,
        "change": _as_data(judgement.change),
        "unit": "%" if judgement.bound.is_percent else judgement.bound.figure.unit.value,
        "reason": judgement.reason,
    }


def _as_data(interval: Interval | None) -> dict[str, Any] | None:
    return asdict(interval) if interval else None
