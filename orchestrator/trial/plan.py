"""From a spec to trials, in an order that no arm can profit from. Pure.

A repetition is a block: each of its trials runs one arm, in an order drawn from
the seed, so that a drift of the machine falls on all arms alike. What a guest
does in a repetition depends on the seed and not on the arm, so trials pair.
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
    :ivar attempt: from 1; a trial that was lost with its host is run again under the
        next number, and its last attempt is the one that counts.
    """

    run_id: str
    position: int
    repetition: int
    arm: Arm
    attempt: int = 1

    @property
    def trial_id(self) -> str:
        """Unique among all attempts of all runs; the name of a folder."""
        again = f".{self.attempt}" if self.attempt > 1 else ""
        return f"{self.run_id}-{self.arm.name}-{self.repetition + 1}{again}"


@dataclass(frozen=True, kw_only=True)
class GuestTask:
    """What one guest does in a trial: a seed for each step."""

    name: str
    step_seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class HostTask:
    """One host's part of a trial; all that its runner has to know."""

    trial: Trial
    host: str
    spec: Spec
    steps: tuple[Step, ...]
    guests: tuple[GuestTask, ...]


def plan_trials(spec: Spec, run_id: str) -> tuple[Trial, ...]:
    """All trials of a run, in the order in which they run."""
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
    """The names under which hosts are stored and shown."""
    return tuple(f"host{i + 1}" for i in range(spec.hosts.number))


def host_task(spec: Spec, trial: Trial, host: str) -> HostTask:
    """What one host does in a trial."""
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
    """63 bits that depend on all parts, the same on every machine and Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
