"""Keeps the progress of a run up to date, from its records. Pure: the caller passes the time.

One thread updates it, and another one may read it at any time, to draw it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.results.trial_outcome import TrialStatus
from orchestrator.trial.plan import Trial
from orchestrator.trial.records import PhaseStarted, Record, Samples

HISTORY_LENGTH = 240


@dataclass(kw_only=True)
class HostProgress:
    """What one host does now.

    :ivar phases_begun: how many phases of the trial it has begun.
    :ivar resident_bytes: of all its guests together; the newest value last.
    """

    phase: str = "starting guests"
    phases_begun: int = 0
    provisioned_bytes: int = 0
    resident_bytes: deque[int] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))


@dataclass(kw_only=True)
class HostGroup:
    """Hosts that are in the same phase.

    :ivar names: in the order of their numbers.
    :ivar resident_bytes: of all these hosts together; the newest value last.
    """

    phase: str
    names: list[str]
    provisioned_bytes: int
    resident_bytes: list[int]


@dataclass(kw_only=True)
class ArmProgress:
    """The numbers of trials of an arm.

    :ivar least, most: how many there will be. They differ in a run with a precision.
    :ivar ended: includes the trials that already had a result when the run was resumed.
    :ivar undecided: those that ended undecided or lost.
    """

    least: int = 0
    most: int = 0
    ended: int = 0
    undecided: int = 0


class Progress:
    """The progress of a run. Times are seconds of one monotonic clock."""

    def __init__(
        self,
        trials: tuple[Trial, ...],
        now_s: float,
        kept: Mapping[int, TrialStatus],
        least_repetitions: int,
    ) -> None:
        """:param trials: all that can run.
        :param kept: the trials that already have a result, by position.
        :param least_repetitions: how many repetitions always run.
        """
        self.started_s = now_s
        self.trials = trials
        self.trial: Trial | None = None
        self._least_repetitions = least_repetitions
        self.hosts: dict[str, HostProgress] = {}
        self._undecided_by_position = {
            position: status is not TrialStatus.DONE for position, status in kept.items()
        }
        self._runs_ended = 0
        self._first_trial_s = now_s
        self._last_end_s = now_s

    @property
    def arms(self) -> dict[str, ArmProgress]:
        """The numbers of trials of each arm, by name; the control is first."""
        arms: dict[str, ArmProgress] = {}
        sure = self._sure_repetitions
        controls_first = sorted(
            self.trials, key=lambda trial: (not trial.arm.is_control, trial.position)
        )
        for trial in controls_first:
            arm = arms.setdefault(trial.arm.name, ArmProgress())
            arm.most += 1
            arm.least += trial.repetition < sure
            arm.ended += trial.position in self._undecided_by_position
            arm.undecided += self._undecided_by_position.get(trial.position, False)
        return arms

    def trial_started(self, trial: Trial, now_s: float) -> None:
        if self.trial is None:
            self._first_trial_s = now_s
        self.trial = trial
        self._undecided_by_position.pop(trial.position, None)  # set if an earlier attempt was lost
        for host in self.hosts.values():
            host.phase, host.phases_begun = "starting guests", 0

    def record(self, record: Record) -> None:
        if isinstance(record, PhaseStarted):
            host = self._host(record.host)
            host.phase = record.title
            host.phases_begun += 1
        elif isinstance(record, Samples):
            hosts = record.columns["host"]
            for name in dict.fromkeys(hosts):
                _add_samples(self._host(name), record, hosts == name)

    def _host(self, name: str) -> HostProgress:
        return self.hosts.setdefault(name, HostProgress())

    def trial_ended(self, trial: Trial, undecided: bool, now_s: float) -> None:
        self._undecided_by_position[trial.position] = undecided
        self._runs_ended += 1
        self._last_end_s = now_s

    def host_groups(self) -> list[HostGroup]:
        """Return the hosts by phase: those that are furthest behind first."""
        groups: dict[int, list[str]] = {}
        # Sorted by length first, so that host10 is after host9.
        for name in sorted(self.hosts, key=lambda name: (len(name), name)):
            groups.setdefault(self.hosts[name].phases_begun, []).append(name)
        return [self._group(groups[begun]) for begun in sorted(groups)]

    def _group(self, names: list[str]) -> HostGroup:
        hosts = [self.hosts[name] for name in names]
        # A copy of each, which list() makes without letting another thread run: one that is being
        # iterated over must not change, and samples may come now.
        lines = [list(host.resident_bytes) for host in hosts]
        # From the newest value backwards: hosts have begun to send samples at different times.
        newest_first = zip(*map(reversed, lines), strict=False)
        return HostGroup(
            phase=hosts[0].phase,
            names=names,
            provisioned_bytes=sum(host.provisioned_bytes for host in hosts),
            resident_bytes=[sum(values) for values in newest_first][::-1],
        )

    @property
    def least_trials(self) -> int:
        """The number of trials that the run has at least; all of them if their number is fixed."""
        sure = self._sure_repetitions
        return sum(trial.repetition < sure for trial in self.trials)

    @property
    def _sure_repetitions(self) -> int:
        """The number of repetitions that run in any case: those that always run, or those that have
        begun if they are more."""
        begun = [t.repetition for t in self.trials if t.position in self._undecided_by_position]
        if self.trial is not None:
            begun.append(self.trial.repetition)
        return max(self._least_repetitions, 1 + max(begun, default=-1))

    def remaining_s(self, now_s: float) -> tuple[float, float] | None:
        """Return the estimated seconds left, at least and at most; None until a trial has ended in
        this process."""
        if not self._runs_ended:
            return None
        per_trial_s = (self._last_end_s - self._first_trial_s) / self._runs_ended
        ended_count = len(self._undecided_by_position)

        def left_s(trials: int) -> float:
            return max(0.0, per_trial_s * (trials - ended_count) - (now_s - self._last_end_s))

        return left_s(self.least_trials), left_s(len(self.trials))


def _add_samples(host: HostProgress, samples: Samples, rows: np.ndarray[Any, Any]) -> None:
    """:param rows: which of the samples are those of the host's guests."""
    # A batch has several times, and for each time a row per guest: np.add.at sums these rows.
    # `sums[0][inverse] += ...` would add only one of the rows with the same index.
    times, inverse = np.unique(samples.columns["at_unix_us"][rows], return_inverse=True)
    sums = np.zeros((2, len(times)), dtype=np.uint64)
    np.add.at(sums[0], inverse, samples.columns["resident_bytes"][rows])
    np.add.at(sums[1], inverse, samples.columns["provisioned_bytes"][rows])
    host.resident_bytes.extend(int(value) for value in sums[0])
    host.provisioned_bytes = max(host.provisioned_bytes, int(sums[1].max(initial=0)))
