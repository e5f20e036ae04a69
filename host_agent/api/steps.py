"""Converts workload steps of the control API into commands to a guest's workload, and the
workload's answers into responses. Pure."""

from __future__ import annotations

import hashlib

from hintfleet.errors import InvalidInput, Refused
from hintfleet.settings import MOST_LOOP_MS, MOST_PROGRAM_MS
from hintfleet.v1 import hinting_pb2, host_pb2


def number_of(command: host_pb2.CommandId) -> int:
    """Return the id under which a guest's workload gets a command: the same id for each retry. 0
    if the command has no sequence number: `run_step` then chooses a new id."""
    if not command.sequence:
        return 0
    # A hash, not a counter: a retry may come through another host agent, and must get the same id
    # there. Then the workload answers from memory, and does not do the step twice.
    digest = hashlib.blake2b(command.SerializeToString(deterministic=True), digest_size=8)
    return int.from_bytes(digest.digest())


def command_of(request: host_pb2.RunStepRequest, number: int) -> hinting_pb2.WorkloadCommand:
    """Return the command with this id that does a step.

    :raises InvalidInput: there is no step, or the time for a loop or a program is too long.
    """
    command = hinting_pb2.WorkloadCommand(command_id=number)
    step = request.WhichOneof("step")
    if step == "allocate_bytes":
        command.allocate.size_bytes = request.allocate_bytes
        command.allocate.seed = request.seed
        command.allocate.block_bytes = request.block_bytes
        command.allocate.compressible_percent = request.compressible_percent
    elif step == "free_bytes":
        command.free.size_bytes = request.free_bytes
        command.free.seed = request.seed
    elif step == "verify":
        command.verify.SetInParent()
    elif step == "read_bytes":
        command.read.size_bytes = request.read_bytes
    elif step == "drop_caches":
        command.drop_caches.SetInParent()
    elif step == "run_program":
        if request.run_program.timeout_ms > MOST_PROGRAM_MS:
            raise InvalidInput(f"a program takes at most {MOST_PROGRAM_MS // 1000} s")
        command.run_program.CopyFrom(request.run_program)
    elif step == "loop":
        if request.loop.duration_ms > MOST_LOOP_MS:
            raise InvalidInput(f"a loop lasts at most {MOST_LOOP_MS // 1000} s")
        command.loop.CopyFrom(request.loop)
        command.loop.seed = request.seed
    else:
        raise InvalidInput("RunStep has no step")
    return command


def response_of(
    request: host_pb2.RunStepRequest, done: hinting_pb2.Done, done_at_unix_us: int
) -> host_pb2.RunStepResponse:
    """Return the answer to a step.

    :param done_at_unix_us: when it was done, on this host's clock; after `verify`, when the audit
        that follows was done.
    :raises Refused: the step is a loop, and the guest's agent is too old to know loops: it has done
        nothing.
    """
    if request.HasField("loop") and not done.HasField("looped"):
        raise Refused(
            f"guest {request.guest_name}: its agent is older than this host agent, and has no loops"
        )
    return host_pb2.RunStepResponse(
        changed_bytes=done.changed_bytes,
        held_bytes=done.held_bytes,
        verified_pages=done.verified_pages,
        wrong_pages=done.wrong_pages,
        duration_us=done.duration_us,
        done_at_unix_us=done_at_unix_us,
        looped=done.looped if request.HasField("loop") else None,
    )
