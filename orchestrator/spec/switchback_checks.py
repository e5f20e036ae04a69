"""Checks what a switchback needs of the other parts of its spec. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from hintfleet.settings import Method
from orchestrator.spec.arms import Arm
from orchestrator.spec.model import Spec
from orchestrator.spec.problem import Problem
from orchestrator.spec.switchback import Switchback
from orchestrator.spec.values import key_of

_FEWEST_SAMPLES = 10
"""The fewest samples that are due in the shortest block after its cut."""

_OF_EXPERIMENTS = ("guests", "vary", "workload", "recordings")
"""Keys that describe guests that are made, and their work."""


def switchback_problems(spec: Spec, switchback: Switchback) -> Iterator[Problem]:
    """Yield the problems of a spec with this switchback that the model does not find."""
    for key in _OF_EXPERIMENTS:
        if key in spec.model_fields_set:
            yield Problem(
                path=(key,),
                message="a switchback takes guests and their work as they are",
                hint=f"remove {key}, or switchback",
            )
    if not spec.hosts.agents:
        yield Problem(
            path=("hosts",),
            message="a switchback is about guests that are there, on host agents that run already",
            hint="hosts: {agents: [127.0.0.1:7070]}",
        )
    if len(spec.hosts.agents) > 1 and switchback.guests:
        yield Problem(
            path=("switchback", "guests"),
            message=f"these are the guests of one host, but there are {spec.hosts.number} hosts",
            hint="guests: all",
        )
    shortest_s = switchback.shortest_s - switchback.carry_over_s
    if shortest_s < _FEWEST_SAMPLES * spec.sample_period_s:
        yield Problem(
            path=("switchback", "shortest"),
            message=f"{shortest_s:g} s of the shortest block count: less than {_FEWEST_SAMPLES} "
            f"samples, one each {spec.sample_period_s:g} s",
            hint="give shortest more, or sample_period less",
        )
    yield from _arm_problems(spec)


def _arm_problems(spec: Spec) -> Iterator[Problem]:
    methods = sorted(arm.method for arm in spec.trial_arms)
    if methods != [Method.HINTING, Method.NONE]:
        yield Problem(
            path=("arms",),
            message="a switchback has two arms: hinting paused, and hinting",
            hint="arms: [{name: off, method: none}, {name: on, method: hinting}]",
        )
    for i, arm in enumerate(spec.arms):
        if settings := sorted(arm.model_fields_set - {"name", "method", "drivers"}):
            keys = ", ".join(key_of(Arm, name) for name in settings)
            yield Problem(
                path=("arms", i),
                message=f"the guests keep the settings that they have, so {keys} would do nothing",
                hint="remove these keys",
            )
