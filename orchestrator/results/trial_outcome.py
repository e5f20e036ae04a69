"""Decides how a trial ended and whether it is run again. Pure.

From the fault to the next attempt, in the order of this file:

1. The last record of a host's part of a trial, HostDone, says whether and why that part ended
   early, and whether its host agent was lost (`trial/runner.py`, `trial/block_runner.py`) or its
   actor died (`cluster/fleet.py`).
2. `host_outcome` computes one host's figures from its records, or says why there are none. The
   host's part is done, undecided or lost. It is also lost if its samples have a gap or do not
   reach an end of the measured window. With wrong pages it is undecided, even if HostDone says
   that the host was lost; and so it is in a switchback, where no block is run again alone.
3. `trial_outcome` combines the hosts: done, undecided or lost.
4. `next_attempt` decides whether the trial is run again. A lost trial is run again: up to
   `--retries` times at the end of the same run (with a precision, of the same round), and with
   every `run --resume`. A trial that was cut off is run again with `run --resume`; so is, in a
   switchback, the other block of its pair (`experiment.left_to_run`). No other undecided trial is
   run again.

Only the last attempt at a trial counts in figures (view `counted_trials` in
`store/database.py`). The other attempts stay stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from orchestrator.results.capacity import Capacity, host_capacity
from orchestrator.results.cost import Cost, host_cost
from orchestrator.results.footprint import (
    Footprint,
    SamplesMissing,
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
    """Every guest was measured, and its memory read back (not in a switchback); or, if the figure
    is how many guests a host can run, each host ran out of memory or has run all workloads."""
    UNDECIDED = "undecided"
    """It has no figures that count: for example, a guest was lost, the outcome of a command is
    unknown, or pages came back wrong. This is a result: the method under test may be the cause."""
    LOST = "lost"
    """It has no result: the test equipment failed, not the method under test. A host agent, or
    the actor that controls it, is gone; or samples are missing for a while: it or its machine stood
    still. (If the method is why, that happens again and again.) Not in a switchback."""
    CUT_OFF = "cut off"
    """It has not ended: the run was interrupted, has failed, or still runs."""

    @property
    def has_result(self) -> bool:
        """Whether the trial has a result. A trial with a result is not run again, unless it is the
        other block of a pair that was cut off."""
        return self in (TrialStatus.DONE, TrialStatus.UNDECIDED)


@dataclass(frozen=True, kw_only=True)
class TrialFigures:
    """The figures of one guest, or of all guests of a host together (guest ""), in a trial.

    :ivar footprint: None if the host's part of the trial was not measured to the end or lacks
        samples, or if the figure is how many guests a host can run.
    :ivar cost: set for a host with a footprint; None for a guest.
    :ivar capacity: set for a host if the figure is how many guests it can run, and its part of the
        trial did not end early for another reason than lack of memory.
    :ivar undecided: why there is neither a footprint nor a capacity; empty if there is one.
    """

    host: str
    guest: str
    footprint: Footprint | None = None
    cost: Cost | None = None
    capacity: Capacity | None = None
    undecided: str = ""


@dataclass(frozen=True, kw_only=True)
class HostOutcome:
    """The outcome of one host's part of a trial.

    :ivar reason: why the part is not done; empty if it is done.
    :ivar figures: those of the host, then those of each of its guests; if the host has a capacity,
        only those of the host.
    :ivar has_wrong_pages: whether a guest read back other data than it had written. If so, the
        host is undecided, but `figures` has footprints or a capacity if these were measured.
    """

    status: TrialStatus
    reason: str
    figures: tuple[TrialFigures, ...]
    has_wrong_pages: bool


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """The outcome of one attempt at a trial. The attempt has ended, so the status is never CUT_OFF.

    :ivar reason: why the attempt is not done; empty if it is.
    :ivar figures: of all hosts and guests.
    """

    status: TrialStatus
    reason: str = ""
    figures: tuple[TrialFigures, ...] = ()


def host_outcome(
    task: HostTask, events: Sequence[Event], series: Mapping[str, Series]
) -> HostOutcome:
    """Return the outcome of one host's part of a trial: its figures, or why there are none.

    :param events: those of this host, in the order in which they arrived.
    :param series: the samples of the host's guests by name, with cost.COUNTERS; without the
        guests that have no samples.
    """
    done = next((e for e in reversed(events) if isinstance(e, HostDone)), None)
    lost = done is not None and done.lost
    figures: tuple[TrialFigures, ...] = ()
    reason = done.undecided if done else f"{task.host}: did not finish"
    if not reason and task.spec.asks_how_many:
        figures = (TrialFigures(host=task.host, guest="", capacity=host_capacity(events)),)
    elif not reason:
        try:
            figures = _measured(task, events, series)
        except Undecided as undecided:
            reason = str(undecided)
            lost = isinstance(undecided, SamplesMissing)
    # A block is compared with the block beside it in time, so it is not run again later: its pair
    # is left out.
    lost = lost and not task.spec.switchback
    # Wrong pages are a result: with them, the host is undecided even if it was lost later.
    wrong_pages = _wrong_pages(events)
    reason = wrong_pages or reason
    if not reason:
        status = TrialStatus.DONE
    elif lost and not wrong_pages:
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
    """Combine the outcomes of the hosts of a trial.

    The trial is done if every host is done. It is lost if some hosts were lost and all others
    are done. Otherwise it is undecided.
    """
    # Wrong pages come before every other reason: a trial with wrong pages and a lost host must
    # not be run again, because the next attempt would hide them.
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
    """Return the next attempt at a trial; None if it is not run again.

    :param trial: the last attempt.
    :param status: how the last attempt ended.
    :param retries_left: how often this trial may still be run again.
    """
    # An undecided trial stays undecided: running it until it ends well would favour an arm that
    # makes trials go wrong.
    if status.has_result or retries_left < 1:
        return None
    return replace(trial, attempt=trial.attempt + 1)


def _measured(
    task: HostTask, events: Sequence[Event], series: Mapping[str, Series]
) -> tuple[TrialFigures, ...]:
    """Return the figures of a host, then of its guests.

    :raises Undecided: samples, steps or the final books of a guest are missing.
    """
    names = [guest.name for guest in task.guests]
    if task.spec.switchback:  # those that were measured; its spec may name none
        names = [event.guest for event in _of_kind(events, GuestEnded)]
    missing = [name for name in names if name not in series]
    if missing:
        raise SamplesMissing(f"{missing[0]}: there are no samples")
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
    """Return a text that names the first guest with wrong pages and their number; empty if no guest
    read back wrong pages."""
    counts: dict[str, int] = {}
    for step in _of_kind(events, StepDone):
        counts[step.guest] = counts.get(step.guest, 0) + step.wrong_pages
    wrong = (f"{guest}: {n} pages came back wrong" for guest, n in counts.items() if n)
    return next(wrong, "")


def _of_kind(events: Sequence[Event], kind: type[_E]) -> list[_E]:
    return [event for event in events if isinstance(event, kind)]
