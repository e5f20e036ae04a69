"""The guest's end of the workload stream: commands in, what was done out."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator

import grpc

from guest_agent.workload import Workload
from hintfleet.errors import from_rpc_error
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub

_PAUSE_S = 0.2

# The host will not have this workload again.
_FINAL_CODES = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})


def serve_workload(
    channel: grpc.Channel, workload: Workload, identity: pb.Identity, boot_id: str
) -> None:
    """Run the host's commands for as long as this process lives.

    A lost stream is opened again. A command that comes a second time, because its
    answer was lost, is answered and not done again.

    :raises HintfleetError: the host refused this guest's identity.
    """
    last = pb.Done()
    attach = pb.WorkloadEvent(attach=pb.Attach(identity=identity, boot_id=boot_id))
    stub = HintingServiceStub(channel)
    while True:
        outbox: queue.SimpleQueue[pb.WorkloadEvent] = queue.SimpleQueue()
        outbox.put(attach)
        try:
            for command in stub.Workload(_forever(outbox), wait_for_ready=True):
                if command.command_id != last.command_id:
                    last = workload.run(command)
                outbox.put(pb.WorkloadEvent(done=last))
        except grpc.RpcError as error:
            if error.code() in _FINAL_CODES:
                raise from_rpc_error(error, "the host agent refused the workload") from error
        time.sleep(_PAUSE_S)


def _forever(outbox: queue.SimpleQueue[pb.WorkloadEvent]) -> Iterator[pb.WorkloadEvent]:
    while True:
        yield outbox.get()
