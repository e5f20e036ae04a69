"""When a guest's RAM is audited: every period while much memory moves, later if little has moved or
if the last audit took long, and never if nothing has moved."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from host_agent.memory.audit_pace import CALM_PAGES, CALM_PERIOD_S, AuditPace, Pace

PACE = Pace(period_s=0.2, share=1 / 20)


def looks(pace: AuditPace, moved_pages: int, took_s: float, until_s: float) -> list[float]:
    """Return the times before `until_s` when audits begin, if each check finds `moved_pages` moved,
    and each audit takes `took_s`."""
    seen, now_s = [], 0.0
    while now_s < until_s:
        if pace.check(now_s, moved_pages):
            seen.append(now_s)
            pace.looked(took_s)
        now_s = pace.next_check_s
    return seen


def test_a_guest_in_which_nothing_moved_is_never_looked_at() -> None:
    assert looks(AuditPace(PACE), 0, 0.001, until_s=100) == []


def test_moving_memory_is_audited_every_period() -> None:
    seen = looks(AuditPace(PACE), CALM_PAGES, 0.001, until_s=10)
    assert all(b - a < 0.3 for a, b in itertools.pairwise(seen))
    assert seen[-1] > 9


def test_a_slow_audit_costs_no_period() -> None:
    """The next check is one period after the check that began the audit, however long the audit
    takes."""
    pace = AuditPace(PACE)
    assert pace.check(10.0, CALM_PAGES)
    pace.looked(0.005)
    assert pace.check(pace.next_check_s, CALM_PAGES)


def test_small_changes_wait_and_are_found_all_the_same() -> None:
    seen = looks(AuditPace(PACE), 1, 0.001, until_s=100)
    assert all(CALM_PERIOD_S <= b - a < CALM_PERIOD_S + 2 for a, b in itertools.pairwise(seen))
    assert len(seen) > 5


@given(
    took_s=st.floats(0.0001, 5),
    moved_pages=st.integers(1, 1 << 20),
    share=st.sampled_from([1 / 20, 1 / 100]),
)
def test_audits_take_no_more_than_their_share(
    took_s: float, moved_pages: int, share: float
) -> None:
    """An audit may take long: a guest's memory may be large, and the guest may fragment it."""
    pace = AuditPace(Pace(period_s=0.2, share=share))
    seen = looks(pace, moved_pages, took_s, until_s=1000)
    assert len(seen) * took_s <= 1000 * share + took_s


def test_a_check_of_a_guest_at_rest_is_at_the_moment_of_all_others() -> None:
    """All resting guests are checked at the same moments, because waking costs more than a
    check."""
    one, other = AuditPace(PACE), AuditPace(Pace(period_s=0.1, share=1 / 20))
    for pace, began_s in ((one, 5.03), (other, 7.71)):
        pace.check(began_s, 0)
        while pace.next_check_s < 20:
            pace.check(pace.next_check_s, 0)
    assert one.next_check_s == other.next_check_s


def test_memory_that_moves_ends_the_rest() -> None:
    pace = AuditPace(PACE)
    for _ in range(10):
        pace.check(pace.next_check_s if pace.next_check_s > 0 else 0.0, 0)
    now_s = pace.next_check_s
    assert pace.check(now_s, CALM_PAGES)
    assert pace.next_check_s - now_s <= 0.2
