"""Torture of an attached guest finds no wrong page and no other problem. Among the possible
faults: the guest is reset, its door is unplugged, its libvirtd is killed."""

import asyncio

import pytest

from tests.torture import attached
from tests.torture.plan import Kind
from tests.torture.run import Until, torture

FAULTS = 100
LONGEST_S = 1200
"""When to stop a run that is stuck: normally it ends earlier, after FAULTS faults."""
SEED = 5
WHOLE_GUEST = (
    *(Kind.GUEST_RESET, Kind.GUEST_REBOOTED, Kind.DOOR_UNPLUGGED, Kind.DETACHED),
    Kind.LIBVIRT_RESTARTED,
)


@pytest.mark.usefixtures("may_have_own_libvirt", "image")
def test_a_hundred_faults_on_an_attached_guest_and_no_wrong_page() -> None:
    with attached.setting(SEED, short=True) as setting:
        report = asyncio.run(torture(setting, SEED, Until(seconds=LONGEST_S, faults=FAULTS)))
    print(report.table())
    assert not report.problems
    assert report.wrong_pages == 0
    assert report.fault_count >= FAULTS
    assert report.faults[Kind.AGENT_KILLED] > 0
    # How many faults of each kind fit into a hundred depends on how fast the guest boots.
    assert sum(report.faults[kind] for kind in WHOLE_GUEST) > 0
    assert report.verified_pages > 100_000
    assert report.reclaimed_bytes > 0
