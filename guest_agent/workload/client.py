"""The guest's end of the workload stream: runs each command once, and answers with its result."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

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

    A lost stream is opened again, also while a command runs. A command that the host repeats,
    because its answer was lost or is still missing, is not run again: the answer of its one run is
    sent. This holds for the last 16 commands, whose answers are kept.

    :raises HintfleetError: the host will never accept this workload.
    """
    ends = LogRateLimit()
    attach = pb.WorkloadEvent(attach=pb.Attach(identity=identity, boot_id=boot_id))
    stub = HintingServiceStub(channel)
    answers = _Answers(workload)
    try:
        while True:
            call = stub.Workload(wait_for_ready=True)  # type: ignore[call-arg]
            over = _end_of(call)
            try:
                await call.write(attach)
                async for command in call:
                    answer = answers.of(command)
                    await asyncio.wait((answer, over), return_when=asyncio.FIRST_COMPLETED)
                    # If the stream is over, the next read says why.
                    if answer.done():
                        await call.write(pb.WorkloadEvent(done=answer.result()))
            except grpc.RpcError as error:
                if error.code() in _FINAL_CODES:
                    raise from_rpc_error(error, "the host agent refused the workload") from error
                if (left_out := ends.due()) is not None:
                    reason = error.details() or error.code().name
                    _log.info("workload stream ended", extra=fields(reason=reason, **left_out))
            except asyncio.InvalidStateError:
                # For a write to a call that has just finished, grpc.aio raises InvalidStateError,
                # not an RpcError (grpc/aio/_call.py).
                pass
            await asyncio.sleep(_RECONNECT_PAUSE_S)
    finally:
        answers.close()


def _end_of(call: aio.Call) -> asyncio.Future[None]:
    """Return a future that is done when the stream is over."""
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    call.add_done_callback(lambda _: over.set_result(None))
    return over


class _Answers:
    """The answers to the last commands, as futures: also to a command that still runs or waits."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._kept: dict[int, asyncio.Future[pb.Done]] = {}
        # One thread, so that commands run one by one: the host may send another one when it has
        # given up one that still runs.
        self._thread = ThreadPoolExecutor(1)

    def of(self, command: pb.WorkloadCommand) -> asyncio.Future[pb.Done]:
        """Return the answer to a command, as a future; run the command if no answer is kept."""
        if command.command_id not in self._kept:
            loop = asyncio.get_running_loop()
            answer = loop.run_in_executor(self._thread, self._workload.run, command)
            self._kept[command.command_id] = answer
            if len(self._kept) > _MOST_ANSWERS:
                del self._kept[next(iter(self._kept))]  # the oldest
        return self._kept[command.command_id]

    def close(self) -> None:
        """End the command that runs if it is a loop or a program, and cancel those that wait: a
        normal exit of the interpreter waits for the thread that runs them."""
        self._workload.stop()
        self._thread.shutdown(wait=False, cancel_futures=True)
