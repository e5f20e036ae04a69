"""The answer of a run in one sentence, as a person would quote it."""

from __future__ import annotations

from collections.abc import Sequence

from hintfleet.units import format_size
from orchestrator.results.capacity import ArmCapacity
from orchestrator.results.comparison import ArmCost
from orchestrator.results.frontier import Point, most_without_running_out
from orchestrator.results.savings import Savings
from orchestrator.results.statistics import Interval
from orchestrator.view.figures import percent_interval, size_interval


def savings_answer(rows: Sequence[Savings], costs: Sequence[ArmCost]) -> str:
    """Return what one arm saves, of how much, and how much slower its workload is. The arm is the
    one whose interval of savings has the highest low end.

    If that low end is not above 0, the text says that no arm surely saves. Empty if no arm has an
    interval.
    """
    measured = [
        (row.saved_bytes, row.control_bytes, row.arm)
        for row in rows
        if row.saved_bytes is not None and row.control_bytes is not None
    ]
    if not measured:
        return ""
    saved, used_bytes, arm = max(measured, key=lambda found: found[0].low)
    answer = f"{arm} saves {_line(size_interval(saved))} of {format_size(used_bytes)}"
    if saved.low <= 0:
        return f"No arm surely saves memory: {answer}"
    slower = next((cost.slowdown_percent for cost in costs if cost.arm == arm), None)
    return f"{answer}; {_slower(slower)}" if slower else answer


def capacity_answer(arms: Sequence[ArmCapacity]) -> str:
    """Return how many guests fit under the arm that fits most of all but the control, and how many
    under the control; empty if the control, or every other arm, has no figure."""
    control = next((arm for arm in arms if arm.is_control), None)
    others = [arm for arm in arms if not arm.is_control and arm.guests is not None]
    if control is None or control.guests is None or not others:
        return ""
    best = max(others, key=lambda arm: arm.guests or 0)
    fitted = f"{best.arm} fits {guests_text(best)} guests where {control.arm} fits"
    return f"{fitted} {guests_text(control)}{_more(best.more) if best.more else ''}"


def frontier_answer(points: Sequence[Point]) -> str:
    """Return the most guests on a host with which no host ran out of memory: under the arm where
    they are the most, and under the first arm, if it is known. Empty if hosts ran out, or the point
    is undecided, under each arm with its fewest guests."""
    arms: dict[str, list[Point]] = {}
    for point in points:
        arms.setdefault(point.arm, []).append(point)
    most = {arm: most_without_running_out(of_arm) for arm, of_arm in arms.items()}
    best = max((one for one in most.values() if one), key=lambda one: one.guests, default=None)
    if best is None:
        return ""
    first = next(iter(arms))
    answer = f"{best.arm} runs {_guests_of(best)}, and none of {best.hosts} hosts ran out of memory"
    if best.arm == first:
        # An arm with an undecided point might run more.
        return answer if any(point.undecided for point in points) else f"{answer}; no arm runs more"
    one = most[first]
    above = [point for point in arms[first] if one is None or point.guests > one.guests]
    following = min(above, key=lambda point: point.guests, default=None)
    if following is None or following.undecided:  # the first arm might run more than `one`
        return answer
    if one:
        return f"{answer}; {first} runs {one.guests}"
    return f"{answer}; under {first} some did with {following.guests} already"


def _guests_of(point: Point) -> str:
    times = f" ({point.overcommit:.2g} times its memory)" if point.overcommit else ""
    return f"{point.guests} guest{'' if point.guests == 1 else 's'} on a host{times}"


def guests_text(arm: ArmCapacity) -> str:
    """Return how many guests fit under an arm that has a figure: `7`, `6.7` (a mean over trials),
    or `at least 12`."""
    guests = arm.guests or 0.0
    number = f"{guests:.0f}" if guests == int(guests) else f"{guests:.1f}"
    return f"at least {number}" if arm.at_least else number


def _line(interval: str) -> str:
    return interval.replace("\n", " ")


def more_text(more: Interval) -> str:
    """Return `4.5 [4.0, 5.0]`; or `9 in each of 2 pairs` if all pairs differ alike."""
    if more.low == more.high:
        return f"{more.mean:g} in each of {more.pairs} pairs"
    return f"{more.mean:.1f} [{more.low:.1f}, {more.high:.1f}]"


def _slower(percent: Interval) -> str:
    if percent.low <= 0 <= percent.high:
        return f"its workload is not surely slower or faster ({_line(percent_interval(percent))})"
    if percent.mean > 0:
        return f"its workload is slower by {_line(percent_interval(percent)).lstrip('+')}"
    gained = Interval(mean=-percent.mean, low=-percent.high, high=-percent.low, pairs=percent.pairs)
    return f"its workload is faster by {_line(percent_interval(gained)).lstrip('+')}"


def _more(more: Interval) -> str:
    number, _, rest = more_text(more).partition(" ")
    return f": {number} more {rest}"
