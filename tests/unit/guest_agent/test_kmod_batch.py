"""Batches of the kernel module are parsed; anything else is refused."""

import struct

import pytest

from guest_agent.isolation.kmod import parse_batch
from hintfleet.errors import Refused


def shown(range_count: int, flags: int = 0) -> bytes:
    """Return a struct hintfleet_batch, which has room for 32 ranges; the first `range_count` are
    used."""
    ranges = b"".join(struct.pack("=QQ", n << 9, 512) for n in range(32))
    return struct.pack("=QII", 7, range_count, flags) + ranges


def test_a_valid_batch() -> None:
    batch = parse_batch(shown(2, flags=1))
    assert (batch.seq, batch.still_isolated) == (7, True)
    assert batch.ranges == [(0, 512), (512, 512)]
    assert len(parse_batch(shown(32)).ranges) == 32


@pytest.mark.parametrize("data", [b"", shown(1)[:-16], shown(1) + b"\0", shown(33)])
def test_another_version_of_the_module_is_refused(data: bytes) -> None:
    with pytest.raises(Refused, match="as a batch of"):
        parse_batch(data)
