"""How far a run is: what a view shows, kept up by records. Pure but for the clock handed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from hintfleet.settings import Method
from orchestrator.trial.plan import Trial
from orchestrator.trial.records import PhaseStarted, Record, Samples

HISTORY_LENGTH = 240


@dataclass(kw_only=True)
class HostProgress:
    """What a host does now.

    :ivar resident_bytes: of all its guests together, the newest last.
    """

    phase: str = "starting guests"
    provisioned_bytes: int = 0
    resident_bytes: deque[int] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))


@dataclass(kw_only=True)
class ArmProgress:
    """Trials of an arm."""

    total: int = 0
    ended: int = 0
    undecided: int = 0


class Progress:
    """The state of a run, as far as it is known here. Times are seconds of one clock."""

    def __init__(self, trials: tuple[Trial, ...], now_s: float, kept: Collection[int] = ()) -> None:
        """:param kept: positions of trials that need not be run any more."""
        self.started_s = now_s
        self.trials = trials
        self.trial: Trial | None = None
        self.hosts: dict[str, HostProgress] = {}
        self._undecided_by_position = dict.fromkeys(kept, False)
        self._runs_ended = 0
        self._first_trial_s = now_s
        self._last_end_s = now_s

    @property
    def arms(self) -> dict[str, ArmProgress]:
        """Each arm's trials, the control first."""
        arms: dict[str, ArmProgress] = {}
        controls_first = sorted(
            self.trials, key=lambda trial: (trial.arm.method is not Method.NONE, trial.position)
        )
        for trial in controls_first:
            arm = arms.setdefault(trial.arm.name, ArmProgress())
            arm.total += 1
            arm.ended += trial.position in self._undecided_by_position
            arm.undecided += self._undecided_by_position.get(trial.position, False)
        return arms

    def trial_started(self, trial: Trial, now_s: float) -> None:
        if self.trial is None:
            self._first_trial_s = now_s
        self.trial = trial
        self._undecided_by_position.pop(trial.position, None)  # it may be run again
        for host in self.hosts.values():
            host.phase = "starting guests"

    def record(self, record: Record) -> None:
        host = self.hosts.setdefault(record.host, HostProgress())
        if isinstance(record, PhaseStarted):
            host.phase = record.title
        elif isinstance(record, Samples):
            _add_samples(host, record)

    def trial_ended(self, trial: Trial, undecided: bool, now_s: float) -> None:
        self._undecided_by_position[trial.position] = undecided
        self._runs_ended += 1
        self._last_end_s = now_s

    @property
    def ended_count(self) -> int:
        """Trials that are over."""
        return len(self._undecided_by_position)

    def remaining_s(self, now_s: float) -> float | None:
        """How long it will still take at this pace; None before the first trial's end."""
        if not self._runs_ended:
            return None
        per_trial_s = (self._last_end_s - self._first_trial_s) / self._runs_ended
        left_s = per_trial_s * (len(self.trials) - self.ended_count)
        return max(0.0, left_s - (now_s - self._last_end_s))


def _add_samples(host: HostProgress, samples: Samples) -> None:
    times, inverse = np.unique(samples.columns["at_unix_us"], return_inverse=True)
    sums = np.zeros((2, len(times)), dtype=np.uint64)
    np.add.at(sums[0], inverse, samples.columns["resident_bytes"])
    np.add.at(sums[1], inverse, samples.columns["provisioned_bytes"])
    host.resident_bytes.extend(int(value) for value in sums[0])
    host.provisioned_bytes = max(host.provisioned_bytes, int(sums[1].max(initial=0)))
