"""The answer of a run in one sentence."""

from typing import Any

from hintfleet.units import MIB
from orchestrator.results.capacity import ArmCapacity
from orchestrator.results.comparison import ArmCost
from orchestrator.results.savings import Savings
from orchestrator.results.statistics import Interval
from orchestrator.view.answer import capacity_answer, savings_answer


def interval(low: float, high: float, pairs: int = 3) -> Interval:
    return Interval(mean=(low + high) / 2, low=low, high=high, pairs=pairs)


def savings(arm: str, saved: Interval | None = None) -> Savings:
    return Savings(
        experiment="e",
        spec_hash="5f0c",
        run_id="r",
        arm=arm,
        key="",
        trials=3,
        footprint=None,
        saved_bytes=saved,
        control_bytes=1000.0 * MIB if saved else None,
    )


def cost(arm: str, slower: Interval) -> ArmCost:
    return ArmCost(
        arm=arm,
        settle_s=None,
        slowest_settle_s=None,
        asked_settle_s=None,
        slowdown_percent=slower,
        guest_cpu_s=None,
        host_cpu_s=None,
        observing_cpu_s=None,
        wire_bytes_per_range=None,
        tracker_bytes=0,
    )


def capacity(arm: str, guests: float | None, **more: Any) -> ArmCapacity:
    return ArmCapacity(arm=arm, is_control=arm == "none", trials=2, guests=guests, **more)


def test_the_arm_that_surely_saves_most_is_named() -> None:
    rows = [
        savings("none"),
        savings("wide", interval(100 * MIB, 900 * MIB)),
        savings("sure", interval(390 * MIB, 410 * MIB)),
    ]
    assert savings_answer(rows, []) == "sure saves 400 MiB [390, 410] of 1000 MiB"
    slower = savings_answer(rows, [cost("sure", interval(1, 3))])
    assert slower.endswith("; its workload is slower by 2.0 % [1.0, 3.0]")
    same = savings_answer(rows, [cost("sure", interval(-1, 3))])
    assert same.endswith("; its workload is not surely slower or faster (+1.0 % [-1.0, 3.0])")
    faster = savings_answer(rows, [cost("sure", interval(-3, -1))])
    assert faster.endswith("; its workload is faster by 2.0 % [1.0, 3.0]")


def test_what_is_not_sure_is_said() -> None:
    rows = [savings("none"), savings("bitmap", interval(-10 * MIB, 30 * MIB))]
    assert savings_answer(rows, []).startswith("No arm surely saves memory: bitmap saves 10.0 MiB")


def test_without_figures_there_is_no_answer() -> None:
    assert savings_answer([savings("none")], []) == ""
    assert savings_answer([], []) == ""
    assert capacity_answer([]) == ""
    assert capacity_answer([capacity("none", 3)]) == ""
    assert capacity_answer([capacity("none", None), capacity("bitmap", 7)]) == ""


def test_the_arm_that_fits_most_guests_is_named() -> None:
    arms = [
        capacity("none", 3),
        capacity("bitmap", 7.5, more=interval(4, 5, pairs=2)),
        capacity("kmod", 12, at_least=True, more=interval(9, 9, pairs=2)),
    ]
    assert (
        capacity_answer(arms[:2]) == "bitmap fits 7.5 guests where none fits 3: 4.5 more [4.0, 5.0]"
    )
    assert (
        capacity_answer(arms)
        == "kmod fits at least 12 guests where none fits 3: 9 more in each of 2 pairs"
    )
