"""The guest's end of the workload stream: commands in, what was done out."""

from __future__ import annotations

import asyncio

import grpc
from grpc import aio

from guest_agent.workload import Workload
from hintfleet.errors import from_rpc_error
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub

_PAUSE_S = 0.1
_ANSWERS_KEPT = 16

# The host will not have this workload again.
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
    """Run the host's commands until cancelled, each in a thread of its own.

    A lost stream is opened again. A command that comes a second time, because its
    answer was lost, is answered and not done again.

    :raises HintfleetError: the host refused this guest's identity.
    """
    answers: dict[int, pb.Done] = {}
    attach = pb.WorkloadEvent(attach=pb.Attach(identity=identity, boot_id=boot_id))
    stub = HintingServiceStub(channel)
    while True:
        call = stub.Workload(wait_for_ready=True)  # type: ignore[call-arg]
        try:
            await call.write(attach)
            async for command in call:
                if command.command_id not in answers:
                    answers[command.command_id] = await asyncio.to_thread(workload.run, command)
                    if len(answers) > _ANSWERS_KEPT:
                        del answers[next(iter(answers))]  # the oldest
                await call.write(pb.WorkloadEvent(done=answers[command.command_id]))
        except grpc.RpcError as error:
            if error.code() in _FINAL_CODES:
                raise from_rpc_error(error, "the host agent refused the workload") from error
        except asyncio.InvalidStateError:  # the stream ended while the command ran
            pass
        await asyncio.sleep(_PAUSE_S)
