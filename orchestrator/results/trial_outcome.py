"""What a trial came to, and whether it is run again. Pure; decided here and nowhere else.

From the fault to the next attempt, in the order of this file:

1. Whoever runs a host's part of a trial says how it ended, in its last record, HostDone. The
   part is lost if its host agent was (`trial/runner.py`), or if its actor died
   (`trial/ray_actors.py`).
2. `host_outcome` makes one host's figures from its records, or says why there are none.
3. `trial_outcome` puts the hosts together: done, undecided or lost.
4. `next_attempt` says whether the trial is run again. A lost trial is, `--retries` times at
   the end of the same run, and with every `run --resume`; so is one that was cut off. An
   undecided trial is not.

Only the last attempt at a trial counts in figures (view `counted_trials` in
`store/database.py`). The others stay stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from orchestrator.results.cost import Cost, host_cost
from orchestrator.results.footprint import (
    Footprint,
    Series,
    Undecided,
    guest_footprint,
    host_footprint,
)
from orchestrator.trial.plan import HostTask, Trial
from orchestrator.trial.records import Event, GuestEnded, GuestSettled, HostDone, StepDone

_E = TypeVar("_E", StepDone, GuestSettled, GuestEnded)


class TrialStatus(StrEnum):
    """How an attempt at a trial, or one host's part of it, ended."""

    DONE = "done"
    """Every guest was measured and read back."""
    UNDECIDED = "undecided"
    """It has no figures that count: a guest was lost, nobody knows whether a command was
    carried out, samples are missing, or pages came back wrong. That is a result of what was
    tried."""
    LOST = "lost"
    """What runs trials failed, not what was tried: a host agent, or the actor that speaks to
    it, is gone. There is no result."""
    CUT_OFF = "cut off"
    """It has not ended: the run was interrupted or failed meanwhile, or still goes on."""

    @property
    def has_result(self) -> bool:
        """Whether the trial came to an end of its own, which then stands."""
        return self in (TrialStatus.DONE, TrialStatus.UNDECIDED)


@dataclass(frozen=True, kw_only=True)
class TrialFigures:
    """What one guest, or all guests of a host together (guest ""), used in a trial.

    :ivar footprint: None where `undecided` says why there is none.
    :ivar cost: of a host with a footprint; None for a guest.
    """

    host: str
    guest: str
    footprint: Footprint | None = None
    cost: Cost | None = None
    undecided: str = ""


@dataclass(frozen=True, kw_only=True)
class HostOutcome:
    """What one host's part of a trial came to.

    :ivar reason: why it is not done; empty if it is.
    :ivar figures: of the host and of each of its guests, in this order.
    :ivar has_wrong_pages: a guest read back what it had not written. Such a host is
        undecided, and has figures if it was measured.
    """

    status: TrialStatus
    reason: str
    figures: tuple[TrialFigures, ...]
    has_wrong_pages: bool


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """What an attempt at a trial came to; never CUT_OFF, for it has ended.

    :ivar reason: why it counts for nothing; empty if it is done.
    :ivar figures: of all hosts and guests.
    """

    status: TrialStatus
    reason: str = ""
    figures: tuple[TrialFigures, ...] = ()


def host_outcome(
    task: HostTask, events: Sequence[Event], series: Mapping[str, Series]
) -> HostOutcome:
    """Measure one host's part of a trial, or say why that cannot be done.

    Pages that came back wrong are a result even where the host was lost afterwards.

    :param events: of this host, in the order in which they came.
    :param series: of each of its guests that has samples, with cost.COUNTERS.
    """
    # A host that is through and whose actor then dies has two of them: the last one counts.
    done = next((e for e in reversed(events) if isinstance(e, HostDone)), None)
    figures: tuple[TrialFigures, ...] = ()
    reason = done.undecided if done else f"{task.host}: did not come to the end"
    if not reason:
        try:
            figures = _measured(task, events, series)
        except Undecided as undecided:
            reason = str(undecided)
    wrong_pages = _wrong_pages(events)
    reason = wrong_pages or reason
    if not reason:
        status = TrialStatus.DONE
    elif done and done.lost and not wrong_pages:
        status = TrialStatus.LOST
    else:
        status = TrialStatus.UNDECIDED
    return HostOutcome(
        status=status,
        reason=reason,
        figures=figures or _no_figures(task, reason),
        has_wrong_pages=bool(wrong_pages),
    )


def trial_outcome(hosts: Sequence[HostOutcome]) -> TrialOutcome:
    """Put together what the hosts of a trial came to.

    The trial is done if every host is, and lost if hosts were lost and all others are done.
    Else it is undecided. Wrong pages decide alone, and are the first reason to be told: to
    run the trial again would forget them.
    """
    blamed = [host for host in hosts if host.has_wrong_pages]
    blamed = blamed or [host for host in hosts if host.status is not TrialStatus.DONE]
    figures = tuple(figures for host in hosts for figures in host.figures)
    if not blamed:
        return TrialOutcome(status=TrialStatus.DONE, figures=figures)
    lost = all(host.status is TrialStatus.LOST for host in blamed)
    return TrialOutcome(
        status=TrialStatus.LOST if lost else TrialStatus.UNDECIDED,
        reason=blamed[0].reason,
        figures=figures,
    )


def next_attempt(trial: Trial, status: TrialStatus, retries_left: int = 1) -> Trial | None:
    """Return the attempt that follows this one; None if the trial is not run again.

    A trial with a result is not, be it undecided: to run it until it ends well would favour
    the arm that made it go wrong.

    :param trial: the attempt that was made.
    :param status: how that ended.
    :param retries_left: how often this trial may still be run again.
    """
    if status.has_result or retries_left < 1:
        return None
    return replace(trial, attempt=trial.attempt + 1)


def _measured(
    task: HostTask, events: Sequence[Event], series: Mapping[str, Series]
) -> tuple[TrialFigures, ...]:
    """The figures of a host and its guests.

    :raises Undecided: samples or steps of a guest are missing.
    """
    names = [guest.name for guest in task.guests]
    missing = [name for name in names if name not in series]
    if missing:
        raise Undecided(f"{missing[0]}: there are no samples")
    series = {name: series[name] for name in names}
    done = _of_kind(events, StepDone)
    steps = {name: [step for step in done if step.guest == name] for name in names}
    ended = {event.guest: event for event in _of_kind(events, GuestEnded)}
    period_s = task.spec.sample_period_s
    guests = {
        name: guest_footprint(name, series[name], steps[name], ended.get(name), period_s)
        for name in names
    }
    whole = TrialFigures(
        host=task.host,
        guest="",
        footprint=host_footprint(series, steps, list(guests.values())),
        cost=host_cost(series, steps, _of_kind(events, GuestSettled)),
    )
    of_guests = (
        TrialFigures(host=task.host, guest=name, footprint=footprint)
        for name, footprint in guests.items()
    )
    return whole, *of_guests


def _no_figures(task: HostTask, reason: str) -> tuple[TrialFigures, ...]:
    names = ("", *(guest.name for guest in task.guests))
    return tuple(TrialFigures(host=task.host, guest=name, undecided=reason) for name in names)


def _wrong_pages(events: Sequence[Event]) -> str:
    """Which guest read back what it had not written; empty if none did."""
    counts: dict[str, int] = {}
    for step in _of_kind(events, StepDone):
        counts[step.guest] = counts.get(step.guest, 0) + step.wrong_pages
    wrong = (f"{guest}: {n} pages came back wrong" for guest, n in counts.items() if n)
    return next(wrong, "")


def _of_kind(events: Sequence[Event], kind: type[_E]) -> list[_E]:
    return [event for event in events if isinstance(event, kind)]
