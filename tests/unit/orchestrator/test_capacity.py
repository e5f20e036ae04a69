"""How many guests fit, from the events of trials; and what that comes to for an arm."""

from typing import Any

from orchestrator.results.capacity import (
    ArmCapacity,
    Capacity,
    CapacityRow,
    capacities,
    host_capacity,
)
from orchestrator.trial.records import Event, GuestFits, HostDone, HostRanOut

WHERE: dict[str, Any] = {"host": "host1", "trial_id": "t", "at_unix_us": 1}
OUT = HostRanOut(**WHERE, used_bytes=9, limit_bytes=8, enforced=True)


def fits(number: int) -> GuestFits:
    return GuestFits(**WHERE, guest=f"host1-guest{number}", used_bytes=1)


def row(arm: str, repetition: int, guests: int | None, **changed: Any) -> CapacityRow:
    values: dict[str, Any] = {"host": "host1", "undecided": ""} | changed
    ran_out = values.pop("ran_out", True)
    capacity = None if guests is None else Capacity(guests=guests, ran_out=ran_out, enforced=True)
    return CapacityRow(
        arm=arm, is_control=arm == "none", repetition=repetition, capacity=capacity, **values
    )


def by_name(rows: list[CapacityRow]) -> dict[str, ArmCapacity]:
    return {arm.arm: arm for arm in capacities(rows)}


def test_guests_that_fit_before_the_host_runs_out_are_counted() -> None:
    events: list[Event] = [fits(1), fits(2), OUT, HostDone(**WHERE)]
    assert host_capacity(events) == Capacity(guests=2, ran_out=True, enforced=True)
    assert host_capacity([fits(1)]) == Capacity(guests=1, ran_out=False)
    assert host_capacity([OUT]) == Capacity(guests=0, ran_out=True, enforced=True)


def test_the_difference_is_of_pairs_and_more_is_better() -> None:
    rows = [row("none", 0, 2), row("none", 1, 3), row("bitmap", 0, 6), row("bitmap", 1, 8)]
    found = by_name(rows)
    assert (found["none"].guests, found["none"].more) == (2.5, None)
    bitmap = found["bitmap"]
    assert (bitmap.guests, bitmap.fewest, bitmap.most, bitmap.trials) == (7.0, 6, 8, 2)
    assert bitmap.more is not None
    assert (bitmap.more.mean, bitmap.more.pairs) == (4.5, 2)
    assert not bitmap.at_least


def test_hosts_are_summed_and_one_that_never_ran_out_makes_it_a_lower_bound() -> None:
    rows = [row("none", 0, 2), row("none", 0, 4, host="host2", ran_out=False)]
    (none,) = capacities(rows)
    assert (none.guests, none.at_least) == (6.0, True)


def test_a_control_that_never_ran_out_is_nothing_to_count_from() -> None:
    """It may take more guests than the spec has, and more than the arm does."""
    rows = [row("none", i, 6, ran_out=i > 0) for i in (0, 1)]
    found = by_name(rows + [row("bitmap", i, 6, ran_out=False) for i in (0, 1)])
    assert (found["none"].at_least, found["bitmap"].at_least) == (True, True)
    assert found["bitmap"].more is None


def test_a_trial_without_result_makes_the_arm_undecided() -> None:
    cut_off = by_name([row("none", 0, 2), row("none", 1, None), row("bitmap", 0, 5)])
    assert cut_off["none"].guests is None
    assert cut_off["none"].undecided == "none, repetition 2, was cut off"
    assert (cut_off["bitmap"].guests, cut_off["bitmap"].more) == (5.0, None)
    lost = by_name([row("none", 0, None, undecided="a page came back wrong")])
    assert lost["none"].undecided == "none, repetition 1, a page came back wrong"


def test_one_pair_has_no_interval() -> None:
    assert by_name([row("none", 0, 2), row("bitmap", 0, 6)])["bitmap"].more is None
