"""Torture of real guests with both isolators finds no wrong page and no other problem. Among the
faults: agents kill themselves, and guests are killed or reset."""

import asyncio

from tests.torture import real
from tests.torture.plan import Kind
from tests.torture.run import Until, torture

FAULTS = 60
LONGEST_S = 800
"""When to stop a run that is stuck: normally it ends earlier, after FAULTS faults."""
SEED = 31
"""With this seed, one guest is reset and one is killed, neither at the start; both boot again."""


def test_sixty_faults_on_real_guests_and_no_wrong_page(libvirt_uri: str, image: object) -> None:
    with real.setting(SEED, short=True) as setting:
        report = asyncio.run(torture(setting, SEED, Until(seconds=LONGEST_S, faults=FAULTS)))
    print(report.table())
    assert not report.problems
    assert report.wrong_pages == 0
    assert report.fault_count >= FAULTS
    assert report.faults[Kind.AGENT_KILLED] > 0
    assert report.faults[Kind.GUEST_KILLED] + report.faults[Kind.GUEST_RESET] > 0
    assert report.verified_pages > 100_000
    assert report.reclaimed_bytes > 0
