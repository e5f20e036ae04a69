"""Says how narrow the intervals of a run are, beside the precision that it was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hintfleet.units import format_size
from orchestrator.results.precision import Look, Reached, reached
from orchestrator.results.savings import Savings
from orchestrator.results.statistics import MOST_PAIRS
from orchestrator.results.store.reader import Run


def look_line(seen: Look) -> str:
    """Return what a run saw when it looked, in one line.

    For example `after 3 repetitions: bitmap ±61.2 MiB, ±53.7 MiB wanted, about 2 more at this
    spread`.
    """
    if not seen.arms:
        what = "no arm can be decided any more"
    else:
        what = _missed(seen.arms, "has too few pairs") or "all intervals are narrow enough"
    return f"after {_repetitions(seen.repetitions)}: {what}"


def outcome(run: Run, rows: Sequence[Savings]) -> str:
    """Return whether a run has the precision that it was asked for; if not, what it would take.

    Empty for a run without a precision, and for one that still runs.

    :param rows: a row for each arm of the run; each covers the whole fleet.
    """
    precision = run.precision
    if precision is None or run.state == "running":
        return ""
    if precision.size_bytes:
        asked = f"±{format_size(precision.size_bytes)}"
    else:
        asked = f"±{precision.percent:g} % of what the control uses"
    arms = {row.arm: reached(row, precision) for row in rows if row.arm != run.control}
    missed = _missed(arms, "is undecided") if arms else "there is no pair of trials"
    verdict = f"not reached: {missed}" if missed else "reached"
    repetitions = _repetitions(max((row.trials for row in rows), default=0))
    return f"precision {asked}, after {repetitions}: {verdict}"


def _missed(arms: Mapping[str, Reached | None], without_interval: str) -> str:
    """Return which arms are not precise enough, and how far they are from it; empty if all are."""
    return "; ".join(
        f"{arm} {_how_far(found) if found else without_interval}"
        for arm, found in arms.items()
        if found is None or not found.is_enough
    )


def _how_far(found: Reached) -> str:
    half, wanted = (
        f"±{format_size(round(size))}" for size in (found.half_width_bytes, found.wanted_bytes)
    )
    if found.more_repetitions is None:
        return f"{half}, {wanted} wanted, more than {MOST_PAIRS} repetitions at this spread"
    return f"{half}, {wanted} wanted, about {found.more_repetitions} more at this spread"


def _repetitions(count: int) -> str:
    return f"{count} repetition{'' if count == 1 else 's'}"
