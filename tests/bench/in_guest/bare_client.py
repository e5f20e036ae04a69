"""A gRPC client that only holds a stream. What an agent costs is compared with what this costs.

python3 bare_client.py aio|sync HOST:PORT
"""

import sys

import grpc

from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub


def hold(address: str) -> None:
    call = HintingServiceStub(grpc.insecure_channel(address)).Session(iter(()))
    for _ in call:
        pass


async def hold_aio(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        async for _ in HintingServiceStub(channel).Session():  # type: ignore[call-arg]
            pass


if sys.argv[1] == "aio":
    import asyncio

    asyncio.run(hold_aio(sys.argv[2]))
else:
    hold(sys.argv[2])
