"""Plans the trials of a spec, in an order that favours no arm. Pure.

A repetition is a block of one trial per arm, in an order drawn from the spec's seed. So a drift
of the machine affects all arms alike. In all trials of a repetition, a guest gets the same seeds
for its steps, whatever the arm. So two arms can be compared repetition by repetition, in pairs.
spec/workload.py expands `repeat` in a workload.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.spec.arms import Arm
from orchestrator.spec.model import Spec, Start
from orchestrator.spec.workload import Step, steps_of


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One execution of an arm on all hosts.

    :ivar position: place in the run, from 0.
    :ivar repetition: from 0.
    :ivar attempt: from 1. When a trial is run again, its attempt is one higher. Only the last
        attempt counts in figures (results/trial_outcome.py).
    """

    run_id: str
    position: int
    repetition: int
    arm: Arm
    attempt: int = 1

    @property
    def trial_id(self) -> str:
        """A name that no other attempt of any run has; also names the folder of its samples."""
        suffix = f".{self.attempt}" if self.attempt > 1 else ""
        return f"{self.run_id}-{self.arm.name}-{self.repetition + 1}{suffix}"


@dataclass(frozen=True, kw_only=True)
class GuestTask:
    """One guest's part of a trial: its name, and a seed for each step."""

    name: str
    step_seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class HostTask:
    """One host's part of a trial: all that the runner needs."""

    trial: Trial
    host: str
    spec: Spec
    steps: tuple[Step, ...]
    guests: tuple[GuestTask, ...]

    @property
    def one_by_one(self) -> bool:
        """Whether guests are started one by one, until the host runs out of memory or all run."""
        return self.spec.guests.start is Start.ONE_BY_ONE


def plan_trials(spec: Spec, run_id: str) -> tuple[Trial, ...]:
    """Return all trials that a run can have, each as its first attempt, in the order in which they
    run. A run with a precision may end before the last."""
    return tuple(
        Trial(run_id=run_id, position=position, repetition=repetition, arm=arm)
        for position, (repetition, arm) in enumerate(_blocks(spec))
    )


def _blocks(spec: Spec) -> Iterator[tuple[int, Arm]]:
    for repetition in range(spec.most_repetitions):
        arms = list(spec.trial_arms)
        random.Random(_seed_from(spec.seed, repetition)).shuffle(arms)
        yield from ((repetition, arm) for arm in arms)


def rounds(spec: Spec, to_run: Sequence[Trial], begun: int = 0) -> list[list[Trial]]:
    """Group trials into rounds. After each round, a run with a precision looks whether to go on.

    The first round is what is left of the repetitions that always run and of those that have
    begun; it may be empty. Each other round is one repetition.

    :param begun: how many repetitions have begun in an earlier part of the run.
    """
    first = max(spec.repetitions, begun)
    later = [[t for t in to_run if t.repetition == r] for r in range(first, spec.most_repetitions)]
    return [[trial for trial in to_run if trial.repetition < first], *later]


def host_names(spec: Spec) -> tuple[str, ...]:
    """Return the names of the spec's hosts, as the store and all output use them: host1, ..."""
    return tuple(f"host{i + 1}" for i in range(spec.hosts.number))


def host_tasks(spec: Spec, trial: Trial) -> dict[str, HostTask]:
    """Return each host's part of a trial, by the host's name."""
    steps = steps_of(spec)
    return {host: _host_task(spec, trial, host, steps) for host in host_names(spec)}


def _host_task(spec: Spec, trial: Trial, host: str, steps: tuple[Step, ...]) -> HostTask:
    names = [f"{host}-guest{i + 1}" for i in range(spec.guests.per_host)]
    return HostTask(
        trial=trial,
        host=host,
        spec=spec,
        steps=steps,
        guests=tuple(
            GuestTask(
                name=name,
                step_seeds=tuple(
                    _seed_from(spec.seed, trial.repetition, name, i) for i in range(len(steps))
                ),
            )
            for name in names
        ),
    )


def _seed_from(*parts: object) -> int:
    """Return a 63-bit number that depends on all parts; the same in every Python process."""
    # Not hash(): it differs from process to process for str (PYTHONHASHSEED), and a resumed run
    # must draw the same seeds.
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
