"""Savings: what forms a pair, how often intervals hold the truth, and when there is no figure."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.units import MIB
from orchestrator.results.footprint import Footprint, Returned
from orchestrator.results.savings import By, FootprintRow, Savings, aggregate
from orchestrator.service.messages import savings_as_pb2, savings_from_pb2
from orchestrator.view.answer import savings_answer


def footprint(mean_bytes: float, wrong_pages: int = 0) -> Footprint:
    return Footprint(
        provisioned_bytes=256 * MIB,
        peak_resident_bytes=mean_bytes * 2,
        mean_resident_bytes=mean_bytes,
        resident_gib_min=mean_bytes / MIB,
        reclaimed_now_bytes=MIB,
        refaulted_total_bytes=0,
        verified_pages=100,
        wrong_pages=wrong_pages,
        returned=Returned(freed_bytes=4 * MIB, left_bytes=3.0 * MIB, after_s=2.0),
    )


def measured(
    arm: str,
    repetition: int,
    host: str,
    found: Footprint | None,
    guest: str = "",
    run: str = "r1",
    undecided: str = "",
) -> FootprintRow:
    return FootprintRow(
        run_id=run,
        experiment="e",
        spec_hash="x",
        arm=arm,
        is_control=arm == "none",
        repetition=repetition,
        host=host,
        guest=guest,
        footprint=found,
        undecided=undecided if found else "guest lost",
    )


def rows(saved: dict[tuple[int, str], float], run: str = "r1") -> list[FootprintRow]:
    """Return rows of the control, which uses 1000 MiB, and of the arm `hint`, which uses less.

    :param saved: how many bytes less, by repetition and host.
    """
    return [
        measured(arm, repetition, host, footprint(1000 * MIB - less), run=run)
        for (repetition, host), value in saved.items()
        for arm, less in (("none", 0.0), ("hint", value))
    ]


SAVED = {(0, "a"): 10.0 * MIB, (0, "b"): 20.0 * MIB, (1, "a"): 10.0 * MIB, (1, "b"): 20.0 * MIB}


def arm(found: list[Savings], name: str = "hint") -> Savings:
    return next(row for row in found if row.arm == name)


def test_a_fleet_is_its_hosts_together() -> None:
    row = arm(aggregate(rows(SAVED), By.FLEET))
    assert row.saved_bytes is not None
    assert row.saved_bytes.mean == pytest.approx(30 * MIB)
    assert row.saved_bytes.pairs == 2
    assert row.trials == 2
    assert row.footprint is not None
    assert row.footprint.provisioned_bytes == 512 * MIB
    assert row.footprint.mean_resident_bytes == pytest.approx(1970 * MIB)
    assert row.footprint.verified_pages == 400


def test_the_control_has_a_footprint_and_no_savings() -> None:
    row = arm(aggregate(rows(SAVED), By.FLEET), "none")
    assert row.footprint is not None
    assert (row.saved_bytes, row.undecided) == (None, "")


def test_the_answer_is_about_the_pairs() -> None:
    """A run may be cut off after the control's part of a repetition."""
    alone = measured("none", 2, "a", footprint(5000 * MIB))
    found = aggregate([*rows(SAVED), alone], By.FLEET)
    assert savings_answer(found, []).endswith(" of 1.95 GiB")  # two hosts with 1000 MiB each


def test_by_host_pairs_are_the_repetitions_there() -> None:
    found = [row for row in aggregate(rows(SAVED), By.HOST) if row.arm == "hint"]
    assert [row.key for row in found] == ["a", "b"]
    for row, saved in zip(found, (10, 20), strict=True):
        assert row.saved_bytes is not None
        assert row.saved_bytes.mean == pytest.approx(saved * MIB)
        assert row.saved_bytes.pairs == 2


def test_by_arm_pools_the_runs_of_one_spec() -> None:
    row = arm(aggregate([*rows(SAVED), *rows(SAVED, run="r2")], By.ARM))
    assert row.run_id == ""
    assert row.trials == 4
    assert row.saved_bytes is not None
    assert row.saved_bytes.pairs == 4
    assert row.saved_bytes.mean == pytest.approx(30 * MIB)


def test_by_guest_looks_at_guests_only() -> None:
    guests = [
        measured(name, repetition, "a", footprint(mean * MIB), guest="a-guest1")
        for repetition in (0, 1)
        for name, mean in (("none", 100), ("hint", 60 + repetition))
    ]
    found = aggregate([*rows(SAVED), *guests], By.GUEST)
    assert {row.key for row in found} == {"a-guest1"}
    assert found[1].saved_bytes is not None
    assert found[1].saved_bytes.pairs == 2


def test_guests_of_several_hosts_that_have_the_same_name_are_not_one_guest() -> None:
    """The domains of two hosts may have the same names."""
    guests = [
        measured(name, repetition, host, footprint(mean * MIB), guest="vm1")
        for repetition in (0, 1)
        for host in ("a", "b")
        for name, mean in (("none", 100), ("hint", 60 + repetition))
    ]
    found = [row for row in aggregate(guests, By.GUEST) if row.arm == "hint"]
    assert [row.key for row in found] == ["a/vm1", "b/vm1"]
    for row in found:
        assert row.saved_bytes is not None
        assert row.saved_bytes.mean == pytest.approx(39.5 * MIB)


@pytest.mark.parametrize("lost", ["none", "hint"])
def test_one_lost_trial_leaves_no_figure(lost: str) -> None:
    found = [row for row in rows(SAVED) if not (row.arm == lost and row.repetition == 1)]
    found += [measured(lost, 1, host, None) for host in ("a", "b")]
    row = arm(aggregate(found, By.FLEET))
    assert row.saved_bytes is None
    assert row.saved_gib_min is None
    assert row.undecided == f"{lost}, repetition 2, guest lost"
    assert (row.footprint is None) == (lost == "hint")


def test_wrong_pages_leave_no_savings() -> None:
    said = "a-guest1: 3 pages came back wrong"
    wrong = measured("hint", 2, "a", footprint(MIB, wrong_pages=3), undecided=said)
    row = arm(aggregate([*rows(SAVED), wrong], By.FLEET))
    assert row.saved_bytes is None
    assert row.undecided == f"hint, repetition 3, {said}"
    assert row.footprint is not None
    assert row.footprint.wrong_pages == 3


@pytest.mark.parametrize("lost", ["none", "hint"])
def test_a_host_has_no_figure_of_a_trial_that_another_host_spoilt(lost: str) -> None:
    found = rows({(0, "a"): 10.0, (1, "a"): 20.0, (0, "b"): 30.0})
    found += [measured(name, 1, "b", footprint(MIB)) for name in {"none", "hint"} - {lost}]
    found = [
        replace(row, undecided="guest lost") if (row.arm, row.repetition) == (lost, 1) else row
        for row in [*found, measured(lost, 1, "b", None)]
    ]
    of_hosts = [row for row in aggregate(found, By.HOST) if row.arm == "hint"]
    assert [row.key for row in of_hosts] == ["a", "b"]
    for row in of_hosts:
        assert row.undecided == f"{lost}, repetition 2, guest lost"
        assert row.saved_bytes is None
        assert (row.footprint is None) == (lost == "hint")


@pytest.mark.parametrize("by", [By.FLEET, By.HOST, By.ARM])
def test_one_repetition_has_no_interval_whatever_its_hosts(by: By) -> None:
    row = arm(aggregate(rows({(0, "a"): 5.0, (0, "b"): 6.0, (0, "c"): 7.0}), by))
    assert row.saved_bytes is None
    assert "1 pair only: an interval needs 2 repetitions, so 1 more" in row.undecided


@pytest.mark.parametrize("hosts", ["a", "ab", "abcdef"])
def test_intervals_hold_the_truth_as_often_as_they_say(hosts: str) -> None:
    """The noise here is mostly the same on all hosts of a trial, as from a busy machine."""
    chance = random.Random(1)
    covered = 0
    for _ in range(1000):
        noise = [chance.gauss(0, 10 * MIB) for _ in range(4)]
        saved = {
            (i, host): 100 * MIB + shared + chance.gauss(0, MIB)
            for i, shared in enumerate(noise)
            for host in hosts
        }
        found = arm(aggregate(rows(saved), By.FLEET)).saved_bytes
        assert found is not None
        covered += found.low <= len(hosts) * 100 * MIB <= found.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_no_control_no_savings() -> None:
    found = [row for row in rows(SAVED) if row.arm != "none"]
    row = arm(aggregate(found, By.FLEET))
    assert (row.saved_bytes, row.undecided) == (None, "")


@given(
    st.dictionaries(st.tuples(st.integers(0, 5), st.sampled_from("abc")), st.floats(0, 1e9)),
    st.sampled_from([0, 2, 3]),
)
def test_rows_survive_the_wire(saved: dict[tuple[int, str], float], first_look: int) -> None:
    for by in By:
        for row in aggregate([replace(r, first_look=first_look) for r in rows(saved)], by):
            message = savings_as_pb2(row)
            assert savings_from_pb2(message).saved_bytes == row.saved_bytes
            assert savings_as_pb2(savings_from_pb2(message)) == message
            assert savings_from_pb2(message).undecided == row.undecided
