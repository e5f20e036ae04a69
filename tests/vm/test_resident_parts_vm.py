"""What the resident memory of real guests consists of, by their kernels' own figures: the parts add
up at a few moments of mixed load, and each changes by what the guest was told to do."""

from collections.abc import Callable

import pytest

from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2, host_pb2
from tests.support.agents import wait_until
from tests.support.vm import Guests

GUESTS = ("kmod", "hugetlb")
HELD_BYTES = 200 * MIB
NOISE_BYTES = 24 * MIB
"""What a guest's kernel and daemons use and free meanwhile."""
Parts = host_pb2.ResidentParts


def checked(parts: Parts) -> Parts:
    """Return `parts` after checking that they explain 99 % of what was resident."""
    sizes = (
        *(parts.used_bytes, parts.file_cache_bytes, parts.free_pieces_bytes),
        *(parts.held_back_bytes, parts.in_flight_bytes, parts.waiting_bytes),
    )
    assert sum(sizes) + parts.unexplained_bytes == parts.resident_bytes
    assert abs(parts.unexplained_bytes) <= parts.resident_bytes / 100, parts
    return parts


def told(guests: Guests, name: str, is_so: Callable[[Parts], bool], what: str) -> Parts:
    """Wait until the guest's parts satisfy `is_so`, and the resident memory that they are about is
    that of now, to 1 MiB; return the parts."""
    found: list[Parts] = []

    def is_found() -> bool:
        guest = guests.host.guests()[name]
        if guest.HasField("resident_parts"):
            parts = checked(guest.resident_parts)
            late_bytes = abs(parts.resident_bytes - guest.ledger.resident_bytes)
            if late_bytes < MIB and is_so(parts):
                found.append(parts)
        return bool(found)

    wait_until(is_found, what)
    return found[0]


@pytest.mark.parametrize("name", GUESTS)
def test_the_parts_are_what_is_resident(guests: Guests, name: str) -> None:
    host = guests.host
    host.settle(name)
    rest = told(guests, name, lambda _: True, "telemetry at rest")
    assert rest.used_bytes > 30 * MIB, "the kernel, with its page structs"

    host.allocate(HELD_BYTES, name)
    used_bytes = rest.used_bytes + HELD_BYTES - NOISE_BYTES
    more = told(guests, name, lambda one: one.used_bytes > used_bytes, "more in use")
    assert more.used_bytes < rest.used_bytes + HELD_BYTES + NOISE_BYTES

    read = host_pb2.RunStepRequest(guest_name=name, read_bytes=100 * MIB)
    host.stub.RunStep(read)
    cache_bytes = more.file_cache_bytes + 100 * MIB - NOISE_BYTES
    cached = told(guests, name, lambda one: one.file_cache_bytes > cache_bytes, "file cache")
    assert abs(cached.used_bytes - more.used_bytes) < NOISE_BYTES, "cache does not count as used"
    host.stub.RunStep(host_pb2.RunStepRequest(guest_name=name, drop_caches=True))
    told(guests, name, lambda one: one.file_cache_bytes < cache_bytes, "an emptier cache")

    host.allocate(64 * MIB, name, block_bytes=64 << 10)
    host.free(132 * MIB, name)  # half of the blocks of each size: small ones leave pieces
    pieces_bytes = rest.free_pieces_bytes + 16 * MIB
    told(guests, name, lambda one: one.free_pieces_bytes > pieces_bytes, "pieces")


@pytest.mark.parametrize("name", GUESTS)
def test_the_parts_add_up_while_memory_comes_and_goes(guests: Guests, name: str) -> None:
    host = guests.host
    host.allocate(HELD_BYTES, name)
    before = len(host.samples)
    churn = {"size_bytes": 96 * MIB, "duration_ms": 10_000, "pause_ms": 200}
    for _ in range(5):  # a slow guest needs longer to learn
        host.loop(hinting_pb2.Loop.CHURN, name, **churn)
        busy = [
            checked(sample.resident_parts)
            for one in host.samples[before:]
            for sample in one.samples
            if sample.guest_name == name and sample.HasField("resident_parts")
        ]
        if held := [parts for parts in busy if parts.held_back_bytes > 32 * MIB]:
            break
    assert len({parts.used_bytes for parts in busy}) > 3, "the samples are of a guest at work"
    assert held, "policy adaptive holds back what is churned"
    assert all(0 < parts.held_back_for_ms <= 10_000 for parts in held if parts.age_ms < 500)


@pytest.mark.parametrize("name", GUESTS)
def test_the_memory_of_qemu_is_beside_it(guests: Guests, name: str) -> None:
    process_bytes = guests.host.guests()[name].process_rss_bytes
    assert 8 * MIB < process_bytes < guests.ledger(name).provisioned_bytes / 2
