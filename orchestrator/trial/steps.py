"""Converts steps of a workload into requests to a host agent, and answers into records. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from hintfleet.sketch import Sketch
from hintfleet.v1 import hinting_pb2, host_pb2
from orchestrator.spec.phases import Kind
from orchestrator.spec.workload import Step
from orchestrator.trial.records import VERIFY, LoopFigures, StepDone


def step_request(step: Step, size_bytes: int, seed: int) -> host_pb2.RunStepRequest:
    """Return the request to do a step, still without its CommandId and the guest's name."""
    request = host_pb2.RunStepRequest(seed=seed)
    if step.kind is Kind.ALLOCATE:
        request.allocate_bytes = size_bytes
        request.block_bytes = step.fragment_bytes
        request.compressible_percent = step.compressible_percent
    elif step.kind is Kind.FREE:
        request.free_bytes = size_bytes
    elif step.kind is Kind.READ:
        request.read_bytes = size_bytes
    elif step.kind is Kind.DROP_CACHES:
        request.drop_caches = True
    elif step.kind is Kind.COMMAND:
        request.run_program.arguments.extend(step.command)
        request.run_program.timeout_ms = round(step.limit_s * 1000)
    else:
        request.loop.pattern = hinting_pb2.Loop.Pattern.Value(step.kind.name)
        request.loop.size_bytes = size_bytes
        request.loop.duration_ms = round(step.limit_s * 1000)
        request.loop.pause_ms = round(step.pause_s * 1000)
    return request


def hold_request(grow_bytes: int, seed: int) -> host_pb2.RunStepRequest:
    """Return the request to hold `grow_bytes` more; if negative, to hold that much less."""
    if grow_bytes >= 0:
        return host_pb2.RunStepRequest(allocate_bytes=grow_bytes, seed=seed)
    return host_pb2.RunStepRequest(free_bytes=-grow_bytes, seed=seed)


def step_done(
    host: str,
    trial_id: str,
    guest: str,
    step: Step | None,
    answers: Sequence[host_pb2.RunStepResponse],
) -> StepDone:
    """Return the record of a step that was done in one part or, a replay, in several.

    :param step: None for the read-back at the end.
    :param answers: of all parts, in order.
    """
    first, last = answers[0], answers[-1]
    duration_us = last.done_at_unix_us - (first.done_at_unix_us - first.duration_us)
    return StepDone(
        host=host,
        trial_id=trial_id,
        guest=guest,
        at_unix_us=last.done_at_unix_us,
        kind=step.kind if step else VERIFY,
        changed_bytes=sum(done.changed_bytes for done in answers),
        held_bytes=last.held_bytes,
        verified_pages=sum(done.verified_pages for done in answers),
        wrong_pages=sum(done.wrong_pages for done in answers),
        duration_us=duration_us,
        waited_us=max(0, duration_us - sum(done.duration_us for done in answers)),
        loop=_loop_figures(step.title, last) if step else None,
    )


def _loop_figures(title: str, done: host_pb2.RunStepResponse) -> LoopFigures | None:
    if not done.HasField("looped"):
        return None
    looped = done.looped
    return LoopFigures(
        title=title,
        cycles=looped.cycles,
        touched_bytes=looped.touched_bytes,
        allocation_us=_sketch(looped.allocation_us),
        bytes_per_s=_sketch(looped.bytes_per_s),
    )


def _sketch(message: hinting_pb2.Sketch) -> Sketch:
    return Sketch(first_bucket=message.first_bucket, counts=tuple(message.counts))
