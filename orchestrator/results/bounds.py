"""Reads bounds on changes between two runs, such as `bitmap.saved < -5%`, and judges them. Pure.

A bound names the change that must not happen: here, that the arm saves less by more than 5 %. It is
broken if the whole 95 % interval of the change lies beyond it, kept if none of the interval does,
else undecided. Each bound is judged on its own: if the true change is just at the bound, at most
about one bound in 40 is broken by chance.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hintfleet.errors import InvalidInput
from hintfleet.units import parse_duration_s, parse_size
from orchestrator.results.changes import Change, Figure, Unit
from orchestrator.results.statistics import MOST_PAIRS, Interval, mean_interval, pairs_needed

_BOUND = re.compile(r"\s*(?:([\w-]+)\.)?(\w+)\s*([<>])\s*([+-]?)\s*([0-9].*?)\s*")
_PERCENT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*%")
_TAKES = {
    Unit.BYTES: "a percentage or a size, as in 5% or 20MiB",
    Unit.SECONDS: "a percentage or a duration, as in 5% or 2s",
    Unit.GIB_MIN: "a percentage, as in 5%",
    Unit.GUESTS: "a percentage, as in 5%",
    Unit.BYTES_PER_S: "a percentage, as in 5%",
    Unit.MILLISECONDS: "a percentage or a duration, as in 5% or 2ms",
    Unit.PERCENT: "a percentage, as in 5%",
}


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A bound on the change of a figure.

    :ivar text: the bound as the user wrote it.
    :ivar arm: empty for all arms that can have the figure.
    :ivar is_lower: whether the change must not be below `value`; else it must not be above.
    :ivar value: in percent of `figure.percent_of` if `is_percent`, else in the figure's unit.
    """

    text: str
    arm: str
    figure: Figure
    is_lower: bool
    value: float
    is_percent: bool


class Verdict(StrEnum):
    """Whether a bound was kept."""

    KEPT = "kept"
    BROKEN = "broken"
    UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The verdict on a bound for one arm.

    :ivar change: the change that was compared with the bound, in the unit of the bound's value;
        None if there is none.
    :ivar reason: why the verdict is undecided; else empty.
    """

    bound: Bound
    arm: str
    verdict: Verdict
    change: Interval | None = None
    reason: str = ""


def parse_bound(text: str) -> Bound:
    """Read a bound: [ARM.]FIGURE, `<` or `>`, and a value with its unit.

    :raises InvalidInput: the text has another form, there is no such figure, or the figure does not
        take this value.
    """
    match = _BOUND.fullmatch(text)
    if match is None:
        raise InvalidInput(
            f"{text!r} is not a bound",
            hint="write FIGURE < VALUE or FIGURE > VALUE, as in 'saved < -5%' or "
            "'bitmap.host_cpu > 2s'",
        )
    arm, name, sign, minus, amount = match.groups()
    figure = _figure(text, name)
    percent = _PERCENT.fullmatch(amount)
    value = float(percent[1]) if percent else _amount(text, figure, amount)
    value = -value if minus == "-" else value
    if figure is Figure.SLOWDOWN and value <= -100:
        raise InvalidInput(f"{text!r}: nothing becomes faster by 100 % or more")
    return Bound(
        text=text.strip(),
        arm=arm or "",
        figure=figure,
        is_lower=sign == "<",
        value=value,
        is_percent=percent is not None,
    )


def _figure(text: str, name: str) -> Figure:
    if name in list(Figure):
        return Figure(name)
    near = difflib.get_close_matches(name, [figure.value for figure in Figure], 1)
    hint = f"did you mean {near[0]!r}?" if near else f"figures are {', '.join(Figure)}"
    raise InvalidInput(f"{text!r}: there is no figure {name!r}", hint=hint)


def _amount(text: str, figure: Figure, amount: str) -> float:
    parse: Callable[[str], float] | None = {
        Unit.BYTES: parse_size,
        Unit.SECONDS: parse_duration_s,
        Unit.MILLISECONDS: lambda text: 1000 * parse_duration_s(text),
    }.get(figure.unit)
    hint = f"{figure} takes {_TAKES[figure.unit]}"
    if parse is None:
        raise InvalidInput(f"{text!r}: {amount!r} is not a percentage", hint=hint)
    try:
        return parse(amount)
    except InvalidInput as error:
        raise InvalidInput(f"{text!r}: {error.message}", hint=hint) from error


def judge(bound: Bound, changes: Sequence[Change]) -> list[Judgement]:
    """Return the verdict on the bound for each arm that it is about.

    :raises InvalidInput: the bound names an arm that is not there, or no arm that the bound is
        about can have the figure.
    """
    of_arm = [change for change in changes if bound.arm in ("", change.arm)]
    if not of_arm:
        arms = ", ".join(dict.fromkeys(change.arm for change in changes))
        raise InvalidInput(
            f"{bound.text!r}: there is no arm {bound.arm!r}", hint=f"arms are {arms}"
        )
    about = [change for change in of_arm if change.figure is bound.figure]
    if not about:
        who = f"arm {bound.arm} has" if bound.arm else "the arms have"
        figures = ", ".join(dict.fromkeys(change.figure for change in of_arm))
        raise InvalidInput(
            f"{bound.text!r}: {who} no figure {bound.figure}", hint=f"figures are {figures}"
        )
    return [_judge(bound, change) for change in about]


def _judge(bound: Bound, change: Change) -> Judgement:
    shown = change.percent if bound.is_percent else change.difference
    # `room` is negative beyond the bound, for lower and for upper bounds.
    room = [value if bound.is_lower else -value for value in _excess(bound, change)]
    interval = mean_interval(room, change.first_look)
    verdict, reason = Verdict.UNDECIDED, change.undecided
    if shown is None or interval is None:
        reason = reason or (
            f"the {bound.figure.percent_of} is not clearly above 0, so that a percentage of it "
            "says nothing; write the bound without %"
        )
    elif interval.high < 0:
        verdict = Verdict.BROKEN
    elif interval.low >= 0:
        verdict = Verdict.KEPT
    else:
        # With about `needed` pairs, the interval of `room` would exclude 0 (the bound), if mean and
        # spread stay as they are.
        needed = pairs_needed(interval, abs(interval.mean)) if interval.mean else None
        count = f"about {needed}" if needed else f"more than {MOST_PAIRS}"
        reason = f"needs {count} repetitions, at the spread seen"
    return Judgement(bound=bound, arm=change.arm, verdict=verdict, change=shown, reason=reason)


def _excess(bound: Bound, change: Change) -> list[float]:
    """Return for each pair by how much the figure of the second run is above the value at the
    bound, in the figure's unit (slowdown: as a logarithm); negative if below."""
    if bound.figure is Figure.SLOWDOWN:
        return change.excess(offset=math.log1p(bound.value / 100))
    if bound.is_percent:
        return change.excess(factor=1 + bound.value / 100)
    return change.excess(offset=bound.value)
