"""A hostile guest sends any messages in any order to the host agent's service for guests. In
between, the guest uses memory, and is audited, settled, resized or reset.

Service, registry, guest, gate, books, and the RAM in a memfd are real. gRPC, the driver and the
guest's process are replaced, and rate limits are off. The guest's RAM is two pieces of a larger
file. A neighbour has another RAM file, and a session that must continue to work.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

import grpc

from hintfleet.errors import HintfleetError, InvalidInput
from hintfleet.ranges import EMPTY, RangeSet, decode, encode
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from host_agent.api.guest_service import GuestService
from host_agent.guest import Guest
from host_agent.guests.driver import GuestRequest
from host_agent.memory.ram import GuestRam, Segment
from host_agent.registry import Registry
from host_agent.session.stream import Stream
from tests.fuzz.source import Source
from tests.fuzz.target import Target, TryInput
from tests.support.no_rate_limits import no_rate_limits

_TRIAL = "fuzz"
_FILE_PAGES = 64
# The pieces of the guest's RAM: first pfn, page count, first page in the file. All other pages of
# the file belong to no guest, and must keep their contents.
_PIECES = ((0, 24, 1), (40, 32, 28))
_OFFSET = {pfn + i: at + i for pfn, page_count, at in _PIECES for i in range(page_count)}
_DEVICE = Segment(pfn=56, page_count=16, fd=-1, offset_bytes=44 * PAGE_BYTES)
_DEVICE_PAGES = RangeSet([(_DEVICE.pfn, _DEVICE.page_count)])
_CHUNK_ORDER = 1
_SPEC = host_pb2.GuestSpec(
    driver=host_pb2.EMBEDDED,
    memory_bytes=MIB,
    method=host_pb2.HINTING,
    hinting=host_pb2.HintingSettings(chunk_order=_CHUNK_ORDER),
)
_MOST_STEPS = 48
_DEADLINE_S = 5.0
_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNAVAILABLE,
}


class _Running:
    """A guest without a process: the fuzzer writes to its RAM."""

    pid = 0
    domain = ""
    hypervisor = ""
    door = None
    balloon = None

    def __init__(self) -> None:
        self.fd = os.memfd_create("fuzz-ram")
        os.ftruncate(self.fd, _FILE_PAGES * PAGE_BYTES)
        self.ram = GuestRam(
            [
                Segment(pfn=pfn, page_count=count, fd=self.fd, offset_bytes=at * PAGE_BYTES)
                for pfn, count, at in _PIECES
            ]
        )
        self.touched: set[int] = set()
        for page in set(range(_FILE_PAGES)) - set(_OFFSET.values()):
            self._write(page)

    def touch(self, pfns: RangeSet) -> None:
        """Write to those of the pages that are RAM now, as the guest would."""
        for pfn in _OFFSET:
            if pfn in pfns & self.ram.pages:
                self._write(_OFFSET[pfn])
                self.touched.add(pfn)

    def _write(self, page: int) -> None:
        os.pwrite(self.fd, (page + 1).to_bytes(8, "little"), page * PAGE_BYTES)

    def lost(self) -> set[int]:
        """Return the pages of the file that do not hold what was written to them. Pages that were
        hinted or unplugged since the guest wrote to them are not checked."""
        written = {_OFFSET[pfn] for pfn in self.touched}
        written |= set(range(_FILE_PAGES)) - set(_OFFSET.values())
        return {p for p in written if os.pread(self.fd, 8, p * PAGE_BYTES)[0] != p + 1}

    def evidence(self) -> str:
        return ""

    def close(self) -> None:
        self.ram.close()


class _Driver:
    def create(self, request: GuestRequest) -> _Running:
        return _Running()

    def close(self) -> None:
        pass


class _Ended(Exception):
    """Raised when the service aborts a call with a status."""


class _Call:
    """One call of Session as gRPC makes it: an iterator of messages and a context."""

    def __init__(self, service: GuestService) -> None:
        self.outbox: asyncio.Queue[pb.GuestMessage | None] = asyncio.Queue()
        self.heard: list[pb.HostMessage] = []
        self.hinted: dict[tuple[int, int], list[int]] = {}
        self.ended_with: grpc.StatusCode | None = None
        self.task = asyncio.create_task(self._serve(service))

    async def _serve(self, service: GuestService) -> None:
        answers = service.Session(self._messages(), self)  # type: ignore[arg-type]
        try:
            async for message in answers:
                self.heard.append(message)
        except _Ended:
            pass
        finally:
            await answers.aclose()  # type: ignore[attr-defined]

    async def _messages(self) -> AsyncIterator[pb.GuestMessage]:
        while (message := await self.outbox.get()) is not None:
            yield message

    async def abort(self, code: grpc.StatusCode, details: str, metadata: object = ()) -> NoReturn:
        self.ended_with = code
        raise _Ended

    def auth_context(self) -> dict[str, list[bytes]]:
        """Return the context of a connection without TLS."""
        return {}

    def say(self, **kind: object) -> None:
        self.outbox.put_nowait(pb.GuestMessage(**kind))  # type: ignore[arg-type]

    def hello(self, guest: Guest, **other: object) -> None:
        identity = pb.Identity(guest_uuid=guest.uuid, token=guest.token)
        fields = {"identity": identity, "page_size_bytes": PAGE_BYTES, "boot_id": "a"} | other
        self.say(hello=pb.Hello(**fields))  # type: ignore[arg-type]

    def batch(self, epoch: int, seq: int, packed: bytes) -> RangeSet:
        """Send a batch; return what it hints, and note its size for `check`. If `packed` cannot be
        decoded, send it, too, but return EMPTY and note nothing."""
        self.say(batch=pb.Batch(epoch=epoch, seq=seq, ranges=packed))
        try:
            hinted = decode(packed)
        except InvalidInput:
            return EMPTY
        self.hinted.setdefault((epoch, seq), []).append(hinted.page_count * PAGE_BYTES)
        return hinted

    @property
    def epoch(self) -> int:
        return self.heard[0].welcome.epoch if self.heard else 0

    @property
    def acks(self) -> list[pb.Ack]:
        return [m.ack for m in self.heard if m.WhichOneof("message") == "ack"]

    async def close(self, *, cancel: bool) -> None:
        """Cancel the call at once, or half-close it, so that it ends after all earlier messages
        were handled. Wait for its end, and raise the exception that it failed with."""
        if cancel:
            self.task.cancel()
        self.outbox.put_nowait(None)
        async with asyncio.timeout(_DEADLINE_S):
            await asyncio.wait([self.task])
        if not self.task.cancelled() and (error := self.task.exception()):
            raise error

    def check(self) -> None:
        """Check that the call ended with a documented status, that each ack accounts for all bytes
        of its batch, and that the acks of the call's epoch are in sequence."""
        assert self.ended_with is None or self.ended_with in _REFUSALS
        for ack in self.acks:
            skipped = sum(decode(s.ranges).page_count for s in ack.skipped) * PAGE_BYTES
            said = ack.reclaimed_bytes + ack.absent_bytes + skipped
            assert said in self.hinted[ack.epoch, ack.seq]
        seqs = [ack.seq for ack in self.acks if ack.epoch == self.epoch]
        assert seqs == list(range(1, len(seqs) + 1))


class _Host:
    """A registry, its service, and the neighbour that must not be affected."""

    def __init__(self) -> None:
        self.registry = Registry({host_pb2.EMBEDDED: _Driver()})  # type: ignore[dict-item]
        self.registry.trials.open_watch(_TRIAL)
        self.service = GuestService(self.registry)
        self._seq = 0

    async def start(self) -> None:
        self.neighbour, self._ram, self._call = await self.make("neighbour")
        self._epoch = self._call.epoch

    async def make(self, name: str) -> tuple[Guest, _Running, _Call]:
        """Make a guest with all of its RAM in use; return it when it is ready, with its RAM and its
        first session."""
        making = asyncio.create_task(self.registry.create(name, _TRIAL, _SPEC))
        while name not in {g.name for g in self.registry.guests if g.running is not None}:
            await asyncio.sleep(0)
        guest = self.registry.get(name)
        guest.sessions.attach_workload(Stream())
        first = _Call(self.service)
        first.hello(guest)
        await making
        running = guest.running
        assert isinstance(running, _Running)
        running.touch(running.ram.pages)
        return guest, running, first

    async def quiet(self, guest: Guest) -> None:
        """Wait until all messages are handled. An audit waits for the turns that were asked for
        before it; after that, two batches may still wait for their turns. So audit three times."""
        for _ in range(3):
            for _ in range(10):
                await asyncio.sleep(0)
            await guest.audits.ledger()

    async def neighbour_goes_on(self) -> None:
        """Check that the neighbour's memory is unchanged, and that its next batch is reclaimed."""
        assert not self._ram.lost()
        self._ram.touched.discard(0)
        async with asyncio.timeout(_DEADLINE_S):
            while _is_late(ack := await self._neighbour_hints()):
                pass
        assert ack.reclaimed_bytes == PAGE_BYTES
        self._ram.touch(RangeSet([(0, 1)]))

    async def _neighbour_hints(self) -> pb.Ack:
        self._seq += 1
        self._call.heard.clear()
        self._call.batch(self._epoch, self._seq, encode(RangeSet([(0, 1)])))
        while not self._call.acks:
            await asyncio.sleep(0)
        return self._call.acks[0]


def _is_late(ack: pb.Ack) -> bool:
    """Return whether the batch was skipped as STALE. That happens when the machine is busy, and is
    not a finding."""
    return [skipped.reason for skipped in ack.skipped] == [pb.STALE]


class _Play:
    """Runs one input: what the guest sends and does, and what must hold afterwards."""

    def __init__(self, host: _Host, source: Source) -> None:
        self._host = host
        self._source = source
        self._seq = 0
        self._requests: list[asyncio.Task[object]] = []

    async def run(self) -> None:
        self._guest, self._running, first = await self._host.make("g")
        self._calls = [first]
        for _ in range(_MOST_STEPS):
            if not self._source.more:
                break
            await self._source.choice(self._STEPS)(self)
        await self._check()

    async def _connect(self) -> None:
        source = self._source
        call = _Call(self._host.service)
        other: dict[str, object] = {}
        match source.number() % 8:
            case 0:
                other = {"still_isolated_ranges": source.short()}
            case 1:
                other = {"page_size_bytes": source.number(4)}
            case 2:
                other = {"identity": pb.Identity(guest_uuid=self._guest.uuid, token="\u00e9")}
            case 3:
                token = self._host.neighbour.token
                other = {"identity": pb.Identity(guest_uuid=self._guest.uuid, token=token)}
            case 4:
                other = {"boot_id": source.short().decode(errors="replace")}
        call.hello(self._guest, **other)
        self._calls.append(call)
        self._seq = 0

    def _call(self) -> _Call:
        return self._calls[-1 - self._source.number() % len(self._calls)]

    async def _good_batch(self) -> None:
        self._seq += 1
        self._hint(self._calls[-1], self._seq, encode(self._some_pages()))

    async def _odd_batch(self) -> None:
        source, call = self._source, self._call()
        packed = source.short() if source.number() % 2 else encode(self._some_pages())
        seq = source.choice((self._seq + 1, self._seq, 0, 2**64 - 1))
        self._hint(call, seq, packed, source.choice((call.epoch, 0, call.epoch - 1, 2**64 - 1)))

    def _hint(self, call: _Call, seq: int, packed: bytes, epoch: int = -1) -> None:
        hinted = call.batch(max(call.epoch if epoch < 0 else epoch, 0), seq, packed)
        self._running.touched -= {pfn for pfn in _OFFSET if pfn in hinted}

    def _some_pages(self) -> RangeSet:
        source = self._source
        number = source.number() % 4
        return RangeSet((source.number() % 80, source.number() % 16) for _ in range(number))

    async def _say_anything(self) -> None:
        """Send the message that the next bytes encode. Send nothing if they encode none, or a
        batch: only `_hint` sends batches, because it notes their pages."""
        try:
            message = pb.GuestMessage.FromString(self._source.short())
        except Exception:  # noqa: BLE001 - protobuf's DecodeError; gRPC ends such a call
            return
        if message.WhichOneof("message") != "batch":
            self._call().outbox.put_nowait(message)

    async def _use_memory(self) -> None:
        await self._wait()
        self._running.touch(self._some_pages())

    async def _audit(self) -> None:
        """Audit, and check that every chunk that is reported to the guest as refaulted has a
        resident page."""
        await self._wait()
        before = {call: len(call.heard) for call in self._calls}
        await self._guest.audits.tell_refaults()
        ram = self._running.ram
        absent = ram.pages - ram.resident(ram.page_map).ranges().whole_chunks(_CHUNK_ORDER)
        await self._wait()
        for call in self._calls:
            for message in call.heard[before[call] :]:
                assert not decode(message.refaulted.ranges) & absent

    async def _settle(self) -> None:
        self._requests.append(asyncio.create_task(self._guest.settle()))
        await self._wait()
        call = self._call()
        asked = [m.settle.request_id for m in call.heard if m.WhichOneof("message") == "settle"]
        request_id = self._source.choice((*asked[-1:], 0, 2**64 - 1))
        call.say(settled=pb.Settled(request_id=request_id, batches=self._source.number(8)))

    async def _resize(self) -> None:
        """Unplug the memory device if it is plugged; else plug it."""
        if self._running.ram.pages & _DEVICE_PAGES:
            await self._guest.unplugged(_DEVICE_PAGES)
            self._running.touched -= {pfn for pfn in _OFFSET if pfn in _DEVICE_PAGES}
        else:
            await self._guest.plugged([replace(_DEVICE, fd=self._running.fd)])

    async def _hang_up(self) -> None:
        await self._call().close(cancel=bool(self._source.number() % 2))

    async def _reset(self) -> None:
        self._guest.lost("reset")

    async def _wait(self) -> None:
        await self._host.quiet(self._guest)

    _STEPS = (
        *(_good_batch, _connect, _odd_batch, _say_anything, _use_memory, _audit, _settle),
        *(_hang_up, _wait, _resize, _good_batch, _good_batch, _use_memory, _wait, _odd_batch),
        _reset,
    )

    async def _check(self) -> None:
        await self._wait()
        assert not self._running.lost()
        for call in self._calls:
            await call.close(cancel=False)
            call.check()
        books = await self._host.registry.destroy("g")
        _balance(books)
        await self._end_requests()
        await self._host.neighbour_goes_on()

    async def _end_requests(self) -> None:
        for task in self._requests:
            try:
                async with asyncio.timeout(_DEADLINE_S):
                    await task
            except HintfleetError:
                pass


def _balance(books: host_pb2.Ledger) -> None:
    resident, absent = books.resident_bytes, books.reclaimed_now_bytes + books.untouched_bytes
    nobodys_bytes = (_FILE_PAGES - len(_OFFSET)) * PAGE_BYTES
    assert resident - nobodys_bytes + absent == books.provisioned_bytes
    skipped = sum(books.skipped_total_bytes.values())
    accounted = books.reclaimed_total_bytes + books.absent_total_bytes + skipped
    assert books.hinted_total_bytes == accounted


@contextmanager
def _opened() -> Iterator[TryInput]:
    with no_rate_limits(), asyncio.Runner() as runner:
        host = _Host()
        runner.run(host.start())

        def try_input(data: bytes) -> None:
            runner.run(_Play(host, Source(data)).run())

        yield try_input


TARGET = Target(
    opened=_opened,
    seeds=(
        bytes([0, 2, 0, 8, 30, 9, 8, 4, 1, 0, 8, 5, 0, 1, 3, 4]),
        bytes([0, 1, 0, 16, 1, 7, 0, 1, 10, 10, 9, 1, 41, 2, 7, 0, 0]),
        bytes([0, 1, 3, 3, 15, 0, 1, 7, 7]),
    ),
    max_bytes=256,
    quick_runs=500,
)
