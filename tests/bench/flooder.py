"""Act as one hostile guest, which takes as much of the host's time as it can without breaking a
rule: a broken rule would end its session. It is active while the last line read from stdin is `on`.
A flood that lasts longer than FLOOD_S (rate_limits.py) would break a rule.

`Flooder` sends all that the protocol allows, as fast as the link takes it: two batches with the
most ranges are always in flight, and the rest of the stream is telemetry. `Shredder` writes to
every second page of its memory and hints the whole memory in one range, again and again, so that
the host finds the most resident pieces possible.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from hintfleet.net.channels import open_aio_channel
from hintfleet.ranges import RangeSet, encode
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub
from host_agent.session.gate import LIMITS

_RANGES = encode(RangeSet((2 * n, 1) for n in range(LIMITS.ranges_per_batch)))

# Telemetry is padded with an unknown field: without the padding, thousands of messages would fit
# into the stream's window, and the host would still read them long after the flood's end.
_PADDING = b"\x7a\x80\x20" + bytes(4096)
_TELEMETRY = pb.GuestMessage(telemetry=pb.Telemetry.FromString(b"\x20\x01" + _PADDING))


class Flooder:
    """The session of a guest that sends all that the protocol allows."""

    def __init__(self, call: Any, guest: dict[str, str]) -> None:
        self._guest = guest
        self._call = call
        self._on = asyncio.Event()
        self._in_flight = 0
        self._seq = 0
        self.sent = 0

    async def run(self, hello: pb.Hello) -> None:
        """Send `hello`, then flood while the last line read from stdin is `on`. At the end of
        stdin, print how many messages were sent after `hello`."""
        await self._call.write(pb.GuestMessage(hello=hello))
        self._epoch = (await self._call.read()).welcome.epoch
        tasks = [asyncio.create_task(work) for work in (self._read(), self._write())]
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            (self._on.set if line == "on" else self._on.clear)()
            for task in tasks:
                if task.done():
                    task.result()
        for task in tasks:
            task.cancel()
        print(self.sent, flush=True)

    async def _read(self) -> None:
        while message := await self._call.read():
            self._in_flight -= message.HasField("ack")

    async def _write(self) -> None:
        while await self._on.wait():
            if self._in_flight < LIMITS.batches_in_flight:
                await self._hint(_RANGES)
            else:
                await self._call.write(_TELEMETRY)
                self.sent += 1

    async def _hint(self, ranges: bytes) -> None:
        self._in_flight += 1
        self._seq += 1
        batch = pb.Batch(epoch=self._epoch, seq=self._seq, ranges=ranges)
        await self._call.write(pb.GuestMessage(batch=batch))
        self.sent += 1


class Shredder(Flooder):
    """The session of a guest that makes its memory as fragmented as possible: this process writes
    to the guest's RAM file."""

    async def _write(self) -> None:
        ram = os.open(self._guest["ram"], os.O_RDWR)
        size_bytes = os.fstat(ram).st_size
        whole = encode(RangeSet([(0, size_bytes // PAGE_BYTES)]))
        while await self._on.wait():
            for at in range(0, size_bytes, 2 * PAGE_BYTES):
                os.pwrite(ram, b"\1", at)
            await self._hint(whole)
            while self._in_flight:
                await asyncio.sleep(0.01)


async def main(address: str, kind: str, guest: dict[str, str]) -> None:
    """Act as `guest`, with the class that _KINDS has for `kind`."""
    identity = pb.Identity(guest_uuid=guest["uuid"], token=guest["token"])
    async with open_aio_channel(address) as channel:
        call = HintingServiceStub(channel).Session()  # type: ignore[call-arg]
        await _KINDS[kind](call, guest).run(
            pb.Hello(identity=identity, page_size_bytes=4096, chunk_order=9)
        )


_KINDS = {"floods": Flooder, "shreds": Shredder}

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
