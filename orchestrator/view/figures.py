"""Formats figures for people."""

from __future__ import annotations

import datetime as dt

from hintfleet.program import printable
from hintfleet.units import GIB, KIB, MIB, format_size
from orchestrator.results.comparison import ArmCost
from orchestrator.results.footprint import Returned
from orchestrator.results.statistics import Interval

NO_FIGURE = "-"
_BARS = "▁▂▃▄▅▆▇█"


def size_interval(interval: Interval) -> str:
    """Return `412 MiB`, and in a second line `[401, 423]` in the same unit."""
    largest = max(abs(interval.low), abs(interval.high))
    unit_bytes, unit = next(
        (pair for pair in ((GIB, "GiB"), (MIB, "MiB")) if largest >= pair[0]), (KIB, "KiB")
    )
    digits = decimals(largest / unit_bytes)
    values = (value / unit_bytes for value in (interval.mean, interval.low, interval.high))
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{mean} {unit}\n[{low}, {high}]"


def number_interval(interval: Interval) -> str:
    """Return `0.0201`, and in a second line `[0.0190, 0.0212]`."""
    digits = decimals(max(abs(interval.low), abs(interval.high)))
    mean, low, high = _rounded(interval, digits)
    return f"{mean}\n[{low}, {high}]"


def percent_interval(interval: Interval | None) -> str:
    """Return `+3.1 %`, and in a second line `[-0.4, 6.7]`; `-` for None."""
    if interval is None:
        return NO_FIGURE
    digits = 0 if max(abs(interval.low), abs(interval.high)) >= 10 else 1
    mean, low, high = _rounded(interval, digits)
    return f"{'' if mean.startswith('-') else '+'}{mean} %\n[{low}, {high}]"


def seconds_interval(interval: Interval | None) -> str:
    """Return `0.31 s`, and in a second line `[0.25, 0.37]`; `-` for None."""
    if interval is None:
        return NO_FIGURE
    digits = min(2, decimals(max(abs(interval.low), abs(interval.high))))
    mean, low, high = _rounded(interval, digits)
    return f"{mean} s\n[{low}, {high}]"


def settle_time(cost: ArmCost) -> str:
    """Return the mean, `0.12 s`, and below it the slowest, `max 0.16 s`; `-` if there is none."""
    if cost.settle_s is None or cost.slowest_settle_s is None:
        return NO_FIGURE
    digits = min(2, decimals(cost.slowest_settle_s))
    return f"{cost.settle_s:.{digits}f} s\nmax {cost.slowest_settle_s:.{digits}f} s"


def _rounded(interval: Interval, digits: int) -> tuple[str, str, str]:
    # The format option `z` (Python 3.11) turns -0.0 into 0.0.
    return (
        f"{interval.mean:z.{digits}f}",
        f"{interval.low:z.{digits}f}",
        f"{interval.high:z.{digits}f}",
    )


def decimals(largest: float) -> int:
    """Return how many decimals to print, so that a value of this size has about three digits."""
    return (
        0
        if largest >= 100
        else 1
        if largest >= 10
        else 2
        if largest >= 1
        else 3
        if largest >= 0.1
        else 4
    )


def returned(part: Returned | None) -> str:
    """Return `97 % in 2 s`: the share of the freed bytes that went back to the host, and how long
    after the free steps this was measured, at least; `-` for None."""
    if part is None:
        return NO_FIGURE
    return f"{part.share * 100:z.0f} % in {part.after_s:.2g} s"


def pages(verified: int, wrong: int) -> str:
    """Return whether a workload read back what it had written, as text."""
    if wrong:
        return f"NO: {wrong} of {verified} pages wrong"
    return f"yes, {format_size(verified * 4 * KIB)}" if verified else "nothing read"


def first_line(text: str) -> str:
    """Return the first line of a reason, for a table, with control characters replaced.

    JSON output has the whole text.
    """
    # A reason may quote a guest's console, and a terminal would obey the control characters in it.
    return printable(text.split("\n", 1)[0])


def state_line(run_id: str, state: str, reason: str) -> str:
    """Return `run 0y9q50 is interrupted: interrupted by the user`, for a run that is not done."""
    # The last 6 characters: a ULID begins with the time, so ids of one day have the same start.
    return f"run {run_id[-6:]} is {state}" + (f": {first_line(reason)}" if reason else "")


def clock(seconds: float) -> str:
    """Return a duration as `00:42` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def when(unix_us: int) -> str:
    """Return the local date and time, to the second."""
    return dt.datetime.fromtimestamp(unix_us / 1e6).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def sparkline(values: list[int], top: int, width: int) -> str:
    """Return the last `width` values as bars; `top` or more is a full bar, and 0 is a blank.

    Fewer values have blanks before them.
    """
    shown = values[max(0, len(values) - width) :]
    return "".join(
        _BARS[min(len(_BARS) - 1, value * len(_BARS) // top)] if value and top else " "
        for value in shown
    ).rjust(width)
