"""Plans the trials of a spec, in an order that favours no arm. Pure.

A repetition is one trial of each arm, in an order drawn from the spec's seed. So a drift of the
machine affects all arms alike. In all trials of a repetition, a guest gets the same seeds
for its steps, whatever the arm. So two arms can be compared repetition by repetition, in pairs.
spec/workload.py expands `repeat` in a workload.

A trial of a switchback is a block of time. Its length is drawn for each repetition: if the moments
at which hinting is turned off and on were regular, guests that work in a rhythm would be met at the
same beat each time. The two blocks of a repetition are of one length, because sums over time (GiB
times minutes, processor time) are compared in pairs.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.spec.arms import Arm
from orchestrator.spec.guests import GuestClass
from orchestrator.spec.model import Spec
from orchestrator.spec.switchback import Switchback
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


_IS_THERE = GuestClass.model_construct(count=1, memory_bytes=0)
"""The class of a guest of a switchback, which is not made."""


@dataclass(frozen=True, kw_only=True)
class GuestTask:
    """One guest's part of a trial.

    :ivar kind: its class; it has a workload, except in a switchback.
    :ivar step_seeds: one for each step.
    :ivar begins_s: how long after the guests were created it begins its workload.
    """

    name: str
    kind: GuestClass
    steps: tuple[Step, ...]
    step_seeds: tuple[int, ...]
    begins_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class HostTask:
    """One host's part of a trial: all that the runner needs.

    :ivar guests: of a switchback: those that are named; empty if it takes all that are attached.
    :ivar block_s: how long a block of a switchback lasts, with its cut; else 0.
    """

    trial: Trial
    host: str
    spec: Spec
    guests: tuple[GuestTask, ...]
    block_s: float = 0.0

    @property
    def in_step(self) -> bool:
        """Whether all guests do the same at the same time, phase by phase."""
        kind = self.guests[0].kind
        return not kind.begins_apart and all(guest.kind == kind for guest in self.guests)


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
    found: list[list[Trial]] = [[] for _ in range(1 + max(0, spec.most_repetitions - first))]
    for trial in to_run:
        found[max(0, trial.repetition - first + 1)].append(trial)
    return found


def host_names(spec: Spec) -> tuple[str, ...]:
    """Return the names of the spec's hosts, as the store and all output use them: host1, ..."""
    return tuple(f"host{i + 1}" for i in range(spec.hosts.number))


def host_tasks(spec: Spec, trial: Trial) -> dict[str, HostTask]:
    """Return each host's part of a trial, by the host's name."""
    if spec.switchback:
        length_s = block_s(spec.seed, trial.repetition, spec.switchback)
        there = tuple(
            GuestTask(name=name, kind=_IS_THERE, steps=(), step_seeds=())
            for name in spec.switchback.guests
        )
        return {
            host: HostTask(trial=trial, host=host, spec=spec, guests=there, block_s=length_s)
            for host in host_names(spec)
        }
    variant = next(variant for variant in spec.variants if variant.arm.name == trial.arm.name)
    kinds = [(kind, steps_of(spec, kind)) for kind in variant.classes]
    return {
        host: HostTask(
            trial=trial, host=host, spec=spec, guests=tuple(_guest_tasks(spec, trial, host, kinds))
        )
        for host in host_names(spec)
    }


def _guest_tasks(
    spec: Spec, trial: Trial, host: str, kinds: Sequence[tuple[GuestClass, tuple[Step, ...]]]
) -> Iterator[GuestTask]:
    numbers = itertools.count(1)
    for kind, steps in kinds:
        for i in range(kind.count):
            name = f"{host}-guest{next(numbers)}"
            seeds = [_seed_from(spec.seed, trial.repetition, name, n) for n in range(len(steps))]
            later = random.Random(_seed_from(spec.seed, trial.repetition, name, "begins"))
            yield GuestTask(
                name=name,
                kind=kind,
                steps=steps,
                step_seeds=tuple(seeds),
                begins_s=i * kind.stagger_s + later.uniform(0, kind.begin_within_s),
            )


def block_s(seed: int, repetition: int, switchback: Switchback) -> float:
    """Return how many seconds each of the two blocks of a repetition lasts, rounded to
    milliseconds. All lengths from the shortest to the longest are equally likely."""
    drawn = random.Random(_seed_from(seed, "block", repetition))
    return round(drawn.uniform(switchback.shortest_s, switchback.longest_s), 3)


def _seed_from(*parts: object) -> int:
    """Return a 63-bit number that depends on all parts; the same in every Python process."""
    # Not hash(): it differs from process to process for str (PYTHONHASHSEED), and a resumed run
    # must draw the same seeds.
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
