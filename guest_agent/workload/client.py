"""The guest's end of the workload stream: runs each command once, and answers with its result."""

from __future__ import annotations

import asyncio
import logging

import grpc
from grpc import aio

from guest_agent.workload.workload import Workload
from hintfleet.errors import from_rpc_error
from hintfleet.logs import LogRateLimit, fields
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub

_RECONNECT_PAUSE_S = 0.1
_MOST_ANSWERS = 16

_log = logging.getLogger("hintfleet.guest.workload")

# The status codes that mean: the host will never accept this workload.
_FINAL_CODES = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
)


async def serve_workload(
    channel: aio.Channel, workload: Workload, identity: pb.Identity, boot_id: str
) -> None:
    """Run the host's commands until cancelled, one after the other, in a worker thread.

    A lost stream is opened again. The last 16 answers are kept: a command that the host repeats
    because its answer was lost gets the kept answer, and is not run again.

    :raises HintfleetError: the host refused this guest's identity.
    """
    answers: dict[int, pb.Done] = {}
    ends = LogRateLimit()
    attach = pb.WorkloadEvent(attach=pb.Attach(identity=identity, boot_id=boot_id))
    stub = HintingServiceStub(channel)
    try:
        while True:
            call = stub.Workload(wait_for_ready=True)  # type: ignore[call-arg]
            try:
                await call.write(attach)
                async for command in call:
                    if command.command_id not in answers:
                        answers[command.command_id] = await asyncio.to_thread(workload.run, command)
                        if len(answers) > _MOST_ANSWERS:
                            del answers[next(iter(answers))]  # the oldest
                    await call.write(pb.WorkloadEvent(done=answers[command.command_id]))
            except grpc.RpcError as error:
                if error.code() in _FINAL_CODES:
                    raise from_rpc_error(error, "the host agent refused the workload") from error
                if (left_out := ends.due()) is not None:
                    reason = error.details() or error.code().name
                    _log.info("workload stream ended", extra=fields(reason=reason, **left_out))
            except asyncio.InvalidStateError:
                # The stream ended while the command ran: for a write to a finished call, grpc.aio
                # raises InvalidStateError, not an RpcError (grpc/aio/_call.py).
                pass
            await asyncio.sleep(_RECONNECT_PAUSE_S)
    finally:
        # The end of the event loop waits for its worker threads, so one that runs a loop must end.
        workload.stop()
