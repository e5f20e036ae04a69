"""Measure how fast a serialized batch is reclaimed, posted and acknowledged, without gRPC, beside a
bare C loop that punches each chunk."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hintfleet.ranges import RangeSet, decode, encode
from hintfleet.units import GIB, MIB, PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.memory.ledger import Ledger
from host_agent.memory.ram import GuestRam, Segment
from host_agent.memory.reclaim import reclaim
from host_agent.session.gate import LIMITS, Acknowledge, Batch, Gate, Post, Run
from host_agent.session.messages import ack_of
from host_agent.threads import keep_latency_steady
from tests.bench.report import Figure, side_by_side

_ROUNDS = 100
_RAM_BYTES = 1 * GIB
_CHUNK_PAGES = 512
_CHUNK_BYTES = _CHUNK_PAGES * PAGE_BYTES

_C_LOOP = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <time.h>
/* Punch `count` ranges; seconds that it took, or -1. */
double punch_all(int fd, const long long *offsets, long long length, int count)
{
	struct timespec a, b;
	clock_gettime(CLOCK_MONOTONIC, &a);
	for (int i = 0; i < count; i++)
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsets[i], length))
			return -1;
	clock_gettime(CLOCK_MONOTONIC, &b);
	return (b.tv_sec - a.tv_sec) + (b.tv_nsec - a.tv_nsec) * 1e-9;
}
"""


def run() -> Iterator[Figure]:
    """Yield two figures: of a full batch of chunks that are not adjacent, and of adjacent chunks.
    Yield nothing without a C compiler."""
    if not shutil.which("cc"):
        return
    keep_latency_steady()  # as the host agent does
    with tempfile.TemporaryDirectory() as folder:
        punch_in_c = _compile(Path(folder))
        for name, chunks, wanted in (
            ("batch to ack, 2 MiB ranges, not adjacent / C loop", range(0, 256, 2), ">= 0.95"),
            ("batch to ack, adjacent ranges / C loop that punches each chunk", range(256), "> 1"),
        ):
            pairs = [_pair(punch_in_c, list(chunks), turn) for turn in range(_ROUNDS)]
            yield side_by_side(name, "GiB/s", pairs, wanted)


def _pair(
    punch_in_c: ctypes._NamedFuncPointer, chunks: list[int], turn: int
) -> tuple[float, float]:
    """Return GiB/s of our path and of the C loop. In odd turns the C loop runs first, because
    whichever runs second finds memory in the caches that the first one has just freed."""
    if turn % 2:
        loop_in_c = _in_c(punch_in_c, chunks)
        return _ours(chunks), loop_in_c
    return _ours(chunks), _in_c(punch_in_c, chunks)


def _compile(folder: Path) -> ctypes._NamedFuncPointer:
    source, library = folder / "punch.c", folder / "punch.so"
    source.write_text(_C_LOOP)
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).punch_all
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int]
    return function


def _touched_ram(chunks: list[int]) -> int:
    fd = os.memfd_create("bench-ram")
    os.truncate(fd, _RAM_BYTES)
    data = b"\1" * (2 * MIB)
    for chunk in chunks:
        os.pwrite(fd, data, chunk * _CHUNK_BYTES)
    return fd


def _in_c(punch: ctypes._NamedFuncPointer, chunks: list[int]) -> float:
    fd = _touched_ram(chunks)
    offsets = (ctypes.c_longlong * len(chunks))(*(c * _CHUNK_BYTES for c in chunks))
    elapsed_s: float = punch(fd, offsets, _CHUNK_BYTES, len(chunks))
    os.close(fd)
    return len(chunks) * _CHUNK_BYTES / GIB / elapsed_s


def _ours(chunks: list[int]) -> float:
    """Return GiB/s of decode, gate, reclaim, ledger and ack together, as the host agent does
    them."""
    fd = _touched_ram(chunks)
    ram = GuestRam([Segment(pfn=0, page_count=_RAM_BYTES // PAGE_BYTES, fd=fd, offset_bytes=0)])
    ledger, gate = Ledger(ram.page_map), Gate()
    # Tell the books what is resident, as the host agent's audits do. Else all memory would be
    # absent by the books, and would be looked up before the punch.
    ledger.audit(ram.resident(ledger.absent_pages))
    gate.connected(1)
    packed = encode(RangeSet((c * _CHUNK_PAGES, _CHUNK_PAGES) for c in chunks))
    wire = pb.GuestMessage(batch=pb.Batch(epoch=1, seq=1, ranges=packed)).SerializeToString()
    started_s = time.perf_counter()
    acknowledge(wire, ram, ledger, gate)
    elapsed_s = time.perf_counter() - started_s
    ram.close()
    return len(chunks) * _CHUNK_BYTES / GIB / elapsed_s


def acknowledge(wire: bytes, ram: GuestRam, ledger: Ledger, gate: Gate) -> bytes:
    """Reclaim the batch in a serialized GuestMessage, and post it to the ledger; return its
    serialized ack."""
    said = pb.GuestMessage.FromString(wire).batch
    batch = Batch(
        epoch=said.epoch,
        seq=said.seq,
        ranges=decode(said.ranges, LIMITS.ranges_per_batch),
        received_s=0.0,
        wire_bytes=len(said.ranges),
    )
    gate.arrived(1, batch)
    for instruction in gate.turn_came(0.0):
        if isinstance(instruction, Run):
            outcome = reclaim(ram, batch.ranges, ledger.absent_pages, ram.permit())
    for instruction in gate.finished(batch, outcome):
        if isinstance(instruction, Post):
            ledger.post(batch.ranges, outcome, batch.wire_bytes)
        elif isinstance(instruction, Acknowledge):
            return ack_of(batch, outcome).SerializeToString()
    raise RuntimeError("the gate did not acknowledge the benchmark's batch")
