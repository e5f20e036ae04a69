"""The parser of the kernel module's batches, compared with a copy of struct hintfleet_batch in
ctypes."""

from __future__ import annotations

import ctypes

from guest_agent.isolation.kmod import parse_batch
from hintfleet.errors import Refused
from tests.fuzz.target import Target


class _Range(ctypes.Structure):
    _fields_ = [("pfn", ctypes.c_uint64), ("page_count", ctypes.c_uint64)]


class _Batch(ctypes.Structure):
    """struct hintfleet_batch of deploy/kmod/hintfleet.h."""

    _fields_ = [
        ("seq", ctypes.c_uint64),
        ("range_count", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("ranges", _Range * 32),
    ]


_SIZE = ctypes.sizeof(_Batch)


def try_input(data: bytes) -> None:
    if len(data) > _SIZE // 2:  # pad an input of more than half a struct to a whole one
        data = data.ljust(_SIZE, b"\0")
    wanted = _Batch.from_buffer_copy(data) if len(data) == _SIZE else None
    try:
        batch = parse_batch(data)
    except Refused as error:
        str(error).encode()
        assert wanted is None or wanted.range_count > 32
        return
    assert wanted is not None
    assert wanted.range_count <= 32
    assert (batch.seq, batch.still_isolated) == (wanted.seq, bool(wanted.flags & 1))
    assert [tuple(r) for r in batch.ranges] == [
        (r.pfn, r.page_count) for r in wanted.ranges[: wanted.range_count]
    ]


TARGET = Target.of(
    try_input,
    seeds=(
        bytes(_Batch(seq=1, range_count=1, ranges=(_Range * 32)(_Range(512, 512)))),
        bytes(_Batch(seq=7, range_count=32, flags=1)),
        bytes(_Batch(seq=7, range_count=33)),
        b"",
    ),
    max_bytes=_SIZE + 1,
    quick_runs=20_000,
)
