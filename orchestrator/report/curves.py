"""Computes resident memory over time for each arm, from all of its trials that count. Pure.

A step takes more time in some trials than in others. So the time of each host in each trial is
stretched or shrunk, phase by phase, until each phase begins at its mean time over all hosts and
trials of the run. Then the same phase of all trials of an arm can be averaged.
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
    """The mean time at which a phase begins, over all hosts and trials.

    The last one is that of the read-back, or of the end of a block.

    :ivar at_s: seconds since the workload began.
    """

    at_s: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Resident memory of an arm over time: mean, minimum and maximum over its trials at each time.

    :ivar at_s: seconds since the workload began.
    """

    arm: str
    at_s: Numbers
    mean_bytes: Numbers
    low_bytes: Numbers
    high_bytes: Numbers


def mean_marks(hosts: Sequence[Sequence[PhaseStarted]]) -> list[Mark]:
    """Return the mean time at which each phase begins.

    :param hosts: the phases of every host in every trial; all have the same phases.
    """
    begins_us = np.array([[phase.at_unix_us for phase in phases] for phases in hosts])
    mean_s = (begins_us - begins_us[:, :1]).mean(axis=0) / _US_PER_S
    return [
        Mark(at_s=float(at_s), title=phase.title)
        for at_s, phase in zip(mean_s, hosts[0], strict=True)
    ]


def resident_in_trial(
    guests: Mapping[str, Sequence[Series]],
    phases: Mapping[str, Sequence[PhaseStarted]],
    marks: Sequence[Mark],
) -> Numbers:
    """Return resident bytes of all guests together in one trial, at the times of `times_s`, to
    which the time of each host is stretched phase by phase.

    :param guests: the series of each host's guests.
    :param phases: the phases of each host, with times of the same clock as its samples.
    """
    total = np.zeros(_POINTS)
    for host, series in guests.items():
        begins_us = [phase.at_unix_us for phase in phases[host]]
        at_us = np.interp(times_s(marks), [mark.at_s for mark in marks], begins_us)
        for guest in series:
            total += np.interp(at_us, guest.at_unix_us, guest.resident_bytes.astype(float))
    return total


def times_s(marks: Sequence[Mark]) -> Numbers:
    """Return the times of a curve's points in seconds: evenly spaced from 0 to the last mark."""
    return np.linspace(0.0, marks[-1].at_s, _POINTS)


def arm_curve(arm: str, trials: Sequence[Numbers], marks: Sequence[Mark]) -> Curve:
    """Return the curve of an arm.

    :param trials: the result of `resident_in_trial` for each trial of the arm; not empty.
    """
    stacked = np.stack(trials)
    return Curve(
        arm=arm,
        at_s=times_s(marks),
        mean_bytes=stacked.mean(axis=0),
        low_bytes=stacked.min(axis=0),
        high_bytes=stacked.max(axis=0),
    )
