"""Plans the trials of a spec, in an order that favours no arm. Pure.

A repetition is a block of one trial per arm, in an order drawn from the seed. So a drift of
the machine affects all arms alike. The work of a guest in a repetition depends on the seed and
not on the arm, so the trials of a repetition form pairs. `repeat` in a workload is expanded by
spec/workload.py.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.spec.model import Arm, Spec
from orchestrator.spec.workload import Step, expand


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One execution of an arm on all hosts.

    :ivar position: place in the run, from 0.
    :ivar attempt: from 1. A trial that is run again (results/trial_outcome.py: when) gets the
        next number; only its last attempt counts.
    """

    run_id: str
    position: int
    repetition: int
    arm: Arm
    attempt: int = 1

    @property
    def trial_id(self) -> str:
        """A name that is unique among all attempts of all runs; also the name of a folder."""
        suffix = f".{self.attempt}" if self.attempt > 1 else ""
        return f"{self.run_id}-{self.arm.name}-{self.repetition + 1}{suffix}"


@dataclass(frozen=True, kw_only=True)
class GuestTask:
    """One guest's part of a trial: a seed for each step."""

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


def plan_trials(spec: Spec, run_id: str) -> tuple[Trial, ...]:
    """Return all trials of a run, in the order in which they run."""
    return tuple(
        Trial(run_id=run_id, position=position, repetition=repetition, arm=arm)
        for position, (repetition, arm) in enumerate(_blocks(spec))
    )


def _blocks(spec: Spec) -> Iterator[tuple[int, Arm]]:
    for repetition in range(spec.repetitions):
        arms = list(spec.trial_arms)
        random.Random(_seed_from(spec.seed, repetition)).shuffle(arms)
        yield from ((repetition, arm) for arm in arms)


def host_names(spec: Spec) -> tuple[str, ...]:
    """Return the names of the hosts in the store and in output."""
    return tuple(f"host{i + 1}" for i in range(spec.hosts.number))


def host_task(spec: Spec, trial: Trial, host: str) -> HostTask:
    """Return one host's part of a trial."""
    steps = expand(spec.workload)
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
    """Return 63 bits that depend on all parts; equal on every machine and Python."""
    # Not hash(): it differs from process to process for str (PYTHONHASHSEED), and a resumed run
    # must draw the same seeds.
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
