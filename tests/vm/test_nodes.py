"""Memory that a real guest frees in any zone or NUMA node comes back to the host."""

from typing import Any

import pytest

from hintfleet.ranges import RangeSet
from hintfleet.units import MIB
from tests.support.vm import NODES_MEMORY_BYTES, Guests

GUESTS = ("nodes-kmod", "nodes-hugetlb")
HELD_BYTES = 720 * MIB
PARTS_MIB = {
    "node 0, DMA32": [(16, 160), (1408, 1536)],
    "node 1, DMA32": [(1536, 1664), (1984, 2048)],
    "node 1, Normal": [(4096, 4480)],
    "node 1, Movable": [(4608, 1 << 20)],
}
"""The guest's memory without its first 16 MiB (zone DMA) and the holes that nodes_spec of
tests/support/vm.py makes: by node and zone, ranges of guest physical addresses in MiB, each as
begin and end (exclusive). Zone Movable is the DIMM, wherever it is above 4608 MiB."""


def resident_mib(guests: Guests, name: str, connection: Any) -> dict[str, int]:
    resident = guests.resident(name, connection)
    return {
        part: (resident & RangeSet((a * 256, (b - a) * 256) for a, b in runs)).page_count // 256
        for part, runs in PARTS_MIB.items()
    }


@pytest.mark.parametrize("name", GUESTS)
def test_memory_comes_back_from_every_zone_and_node(
    guests: Guests, connection: Any, name: str
) -> None:
    host = guests.host
    assert guests[name].name == name, "or says why it did not come up"
    host.resize(NODES_MEMORY_BYTES + 128 * MIB, name)
    host.settle(name)
    before = resident_mib(guests, name, connection)
    host.allocate(HELD_BYTES, name)
    held = resident_mib(guests, name, connection)
    assert host.free(HELD_BYTES, name).wrong_pages == 0
    host.settle(name)
    after = resident_mib(guests, name, connection)
    guests.balances(name, connection)
    told = {part: (before[part], held[part], after[part]) for part in PARTS_MIB}
    for part in PARTS_MIB:
        used = held[part] - before[part]
        assert used >= 10, f"the workload had nothing of {part}: {told}"
        assert held[part] - after[part] > 0.7 * used, f"{part}: {told}"
    host.resize(NODES_MEMORY_BYTES, name)
    guests.balances(name, connection)
