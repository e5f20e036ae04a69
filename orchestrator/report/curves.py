"""Resident memory over time, per arm: the trials of an arm laid over each other. Pure.

Steps do not take the same time in every trial. So that like is laid over like, the
time of a trial is stretched between the beginnings of its phases until they stand
where they stand on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.results.footprint import Numbers, Series
from orchestrator.trial.records import PhaseStarted

_POINTS = 400
_US_PER_S = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Where a phase begins, on average of all trials; the last one is the read-back.

    :ivar at_s: since the workload began.
    """

    at_s: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """All trials of an arm: their mean, and the lowest and the highest of them."""

    arm: str
    at_s: Numbers
    mean_bytes: Numbers
    low_bytes: Numbers
    high_bytes: Numbers


def marks(hosts: Sequence[Sequence[PhaseStarted]]) -> list[Mark]:
    """Where phases begin on average.

    :param hosts: what every host went through in every trial; all the same phases.
    """
    begins_us = np.array([[phase.at_unix_us for phase in phases] for phases in hosts])
    mean_s = (begins_us - begins_us[:, :1]).mean(axis=0) / _US_PER_S
    return [
        Mark(at_s=float(at_s), title=phase.title)
        for at_s, phase in zip(mean_s, hosts[0], strict=True)
    ]


def course(
    guests: Mapping[str, Sequence[Series]],
    phases: Mapping[str, Sequence[PhaseStarted]],
    laid_over: Sequence[Mark],
) -> Numbers:
    """Resident bytes of all guests together in one trial, at the times of `times_s`.

    :param guests: of each host.
    :param phases: of each host.
    """
    total = np.zeros(_POINTS)
    for host, series in guests.items():
        begins_us = [phase.at_unix_us for phase in phases[host]]
        at_us = np.interp(times_s(laid_over), [mark.at_s for mark in laid_over], begins_us)
        for guest in series:
            total += np.interp(at_us, guest.at_unix_us, guest.resident_bytes.astype(float))
    return total


def times_s(laid_over: Sequence[Mark]) -> Numbers:
    """The times at which courses are looked at, from the first mark to the last."""
    return np.linspace(0.0, laid_over[-1].at_s, _POINTS)


def curve(arm: str, courses: Sequence[Numbers], laid_over: Sequence[Mark]) -> Curve:
    """The trials of an arm laid over each other."""
    stacked = np.stack(courses)
    return Curve(
        arm=arm,
        at_s=times_s(laid_over),
        mean_bytes=stacked.mean(axis=0),
        low_bytes=stacked.min(axis=0),
        high_bytes=stacked.max(axis=0),
    )
