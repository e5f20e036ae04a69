"""Converts steps of a workload into requests to a host agent, and the answers back. Pure."""

from __future__ import annotations

from hintfleet.sketch import Sketch
from hintfleet.v1 import hinting_pb2, host_pb2
from orchestrator.spec.phases import Kind
from orchestrator.spec.workload import Step
from orchestrator.trial.records import LoopFigures


def step_request(step: Step, size_bytes: int, seed: int) -> host_pb2.RunStepRequest:
    """Return the request to do a step; the command and the guest's name are still missing."""
    request = host_pb2.RunStepRequest(seed=seed)
    if step.kind is Kind.ALLOCATE:
        request.allocate_bytes = size_bytes
        request.block_bytes = step.fragment_bytes
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
    """Return the request to hold so much more, or if it is negative, so much less."""
    if grow_bytes >= 0:
        return host_pb2.RunStepRequest(allocate_bytes=grow_bytes, seed=seed)
    return host_pb2.RunStepRequest(free_bytes=-grow_bytes, seed=seed)


def loop_figures(title: str, done: host_pb2.RunStepResponse) -> LoopFigures | None:
    """Return what a loop did; None after a step that is none.

    :param title: of its step.
    """
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
