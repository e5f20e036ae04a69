"""A switchback: what its spec may say, how long its blocks are and with which guests, and what they
come to."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import InvalidInput, Refused
from hintfleet.settings import Driver
from hintfleet.v1 import host_pb2
from orchestrator.experiment import store_records
from orchestrator.report.contents import read_contents
from orchestrator.report.page import page
from orchestrator.results.changes import Figure, RunRows, compare_runs
from orchestrator.results.comparison import compare
from orchestrator.results.cost import COUNTERS
from orchestrator.results.precision import Precision, look
from orchestrator.results.savings import By, Savings, aggregate
from orchestrator.results.store.reader import Store
from orchestrator.results.store.writer import RunHeader, RunWriter
from orchestrator.results.trial_outcome import TrialStatus
from orchestrator.service.messages import savings_as_pb2, savings_from_pb2
from orchestrator.spec import file as spec_file
from orchestrator.spec.memory_needs import host_bytes
from orchestrator.spec.model import Spec, describe
from orchestrator.spec.switchback import Switchback
from orchestrator.trial import block_runner
from orchestrator.trial.block_runner import BlockRunner, boots_of, check_guests, why_left_out
from orchestrator.trial.host_client import HostClient
from orchestrator.trial.plan import HostTask, Trial, block_s, host_tasks, plan_trials
from orchestrator.trial.records import (
    BLOCK,
    BLOCK_END,
    CUT,
    GuestEnded,
    HostDone,
    PhaseStarted,
    Record,
    StepDone,
)
from orchestrator.view.tables import left_out_line
from tests.support.stored import MIB, S, samples

GOOD = """\
name: mine
driver: libvirt
hosts: {agents: ["127.0.0.1:7070"]}
switchback:
  guests: [vm1, vm2]
  shortest: 5min
  longest: 15min
  cut: 2min
arms:
  - {name: off, method: none}
  - {name: on, method: hinting}
repetitions: 6
sample_period: 1s
"""


def parsed(text: str = GOOD) -> Spec:
    return spec_file.parse(text, "mine.yaml").spec


def test_a_switchback() -> None:
    spec = parsed()
    assert spec.switchback is not None
    assert spec.switchback.guests == ("vm1", "vm2")
    assert spec.switchback.carry_over_s == 120
    assert (spec.control, spec.guest_count) == ("off", 0)
    assert describe(spec) == (
        "libvirt, 1 host × 2 guests that are there, blocks of 5 to 15 min, "  # noqa: RUF001
        "2 arms, 6 repetitions"
    )
    assert host_bytes(spec) < 4 << 20, "no guest is made"


def test_all_guests_of_several_hosts() -> None:
    text = GOOD.replace("7070", '7070", "127.0.0.1:7071').replace("[vm1, vm2]", "all")
    spec = parsed(text.replace("  cut: 2min\n", ""))
    assert spec.switchback is not None
    assert (spec.switchback.guests, spec.switchback.carry_over_s) == ((), 100)
    assert "2 hosts × all attached guests" in describe(spec)  # noqa: RUF001
    tasks = host_tasks(spec, plan_trials(spec, "run")[0])
    assert [task.guests for task in tasks.values()] == [(), ()]
    assert len({task.block_s for task in tasks.values()}) == 1, "hosts switch together"


@pytest.mark.parametrize(
    ("old", "new", "where", "said"),
    [
        ("guests: [vm1, vm2]", "guests: vm1", "5:3", "'vm1' is not a list of guests"),
        ("guests: [vm1, vm2]", "guests: []", "5:3", "name each guest once, and at least one"),
        ("guests: [vm1, vm2]", "guests: [vm1, vm1]", "5:3", "name each guest once"),
        ("guests: [vm1, vm2]", "guests: [1]", "5:3", "names that `hintfleet guests` shows"),
        ("  guests: [vm1, vm2]\n", "", "4:1", "the key 'guests' is missing"),
        ("  cut:", "  cutt:", "8:3", "did you mean 'cut'"),
        ("longest: 15min", "longest: 4min", "4:1", "shortest block is longer than the longest"),
        ("longest: 15min", "longest: 2d", "7:3", "less than or equal to 86400"),
        ("cut: 2min", "cut: 5min", "4:1", "nothing is left of a block of 300 s after a cut of 300"),
        ("cut: 2min", "cut: 295s", "6:3", "5 s of the shortest block count: less than 10 samples"),
        ("7070", '7070", "127.0.0.1:7071', "5:3", "the guests of one host, but there are 2 hosts"),
        (
            'agents: ["127.0.0.1:7070"]',
            "count: 1, memory: 1GiB",
            "3:1",
            "on host agents that run already",
        ),
        (
            "repetitions: 6",
            "guests: {per_host: 1, memory: 1GiB}",
            "12:1",
            "remove guests, or switchback",
        ),
        (
            "repetitions: 6",
            "workload: {phases: [{allocate: 1MiB}]}",
            "12:1",
            "takes guests and their work as they are",
        ),
        ("method: hinting", "method: hinting, policy: eager", "11:5", "policy would do nothing"),
        (
            "method: hinting",
            "method: hinting, sweep: {chunk_order: [8, 9]}",
            "9:1",
            "has two arms: hinting paused, and hinting",
        ),
        ("{name: on, method: hinting}", "{name: on, method: balloon}", "9:1", "has two arms"),
        ("  - {name: off, method: none}\n", "", "9:1", "{name: off, method: none}, {name: on"),
    ],
)
def test_mistakes_are_reported_with_their_place(old: str, new: str, where: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(InvalidInput) as caught:
        parsed(GOOD.replace(old, new))
    assert str(caught.value).startswith(f"mine.yaml:{where}: "), caught.value
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["guests", "workload"])
def test_other_experiments_still_need_guests_and_a_workload(key: str) -> None:
    parts = {
        "guests": "guests: {per_host: 1, memory: 256MiB}\n",
        "workload": "workload: {phases: [{allocate: 1MiB}]}\n",
    }
    del parts[key]
    text = (
        "name: a\ndriver: embedded\nhosts: {count: 1, memory: 1GiB}\n"
        f"{''.join(parts.values())}arms: [{{name: none, method: none}}]\n"
    )
    with pytest.raises(InvalidInput, match=f"^mine.yaml:1:1: {key}: the key '{key}' is missing"):
        parsed(text)


@given(st.integers(0, 2**63 - 1), st.integers(0, 100), st.floats(0.1, 3600), st.floats(0, 3600))
def test_a_block_is_as_long_as_the_spec_allows(
    seed: int, repetition: int, shortest_s: float, more_s: float
) -> None:
    lengths = Switchback.model_construct(shortest_s=shortest_s, longest_s=shortest_s + more_s)
    length_s = block_s(seed, repetition, lengths)
    assert shortest_s - 0.001 <= length_s <= shortest_s + more_s + 0.001
    assert length_s == block_s(seed, repetition, lengths), "a resumed run draws the same"


def test_lengths_vary_and_pairs_are_alike() -> None:
    spec = parsed()
    lengths: dict[int, list[float]] = {}
    for trial in plan_trials(spec, "run"):
        task = host_tasks(spec, trial)["host1"]
        lengths.setdefault(trial.repetition, []).append(task.block_s)
        assert [guest.name for guest in task.guests] == ["vm1", "vm2"]
        assert not any(guest.steps for guest in task.guests)
    assert all(one == other for one, other in lengths.values())
    assert len({one for one, _ in lengths.values()}) == 6


# The guests of a block


def guest(name: str, boot_id: str = "b1", **changes: Any) -> host_pb2.Guest:
    spec = host_pb2.GuestSpec(driver=host_pb2.ATTACHED, method=host_pb2.HINTING)
    spec.MergeFrom(host_pb2.GuestSpec(**changes))
    why = "" if boot_id else "its agent has not connected"
    return host_pb2.Guest(name=name, boot_id=boot_id, spec=spec, not_hinting_because=why)


HERE = [guest("vm1"), guest("vm2")]


def test_guests_that_cannot_be_measured_are_refused() -> None:
    check_guests("h", Driver.LIBVIRT, ("vm2",), HERE)
    check_guests("h", Driver.LIBVIRT, (), HERE)
    with pytest.raises(Refused, match="h has no guest 'vm3'; it has vm1, vm2"):
        check_guests("h", Driver.LIBVIRT, ("vm1", "vm3"), HERE)
    with pytest.raises(Refused, match="h has no guest 'vm3'; it has none"):
        check_guests("h", Driver.LIBVIRT, ("vm3",), [])
    with pytest.raises(Refused, match="guest vm1 has method balloon"):
        check_guests("h", Driver.LIBVIRT, ("vm1",), [guest("vm1", method=host_pb2.BALLOON)])
    with pytest.raises(Refused, match="guest vm1 is attached, but the driver of the spec is embed"):
        check_guests("h", Driver.EMBEDDED, ("vm1",), HERE)
    with pytest.raises(Refused, match="h has no attached guest"):
        check_guests("h", Driver.LIBVIRT, (), [guest("g", driver=host_pb2.LIBVIRT)])


def test_a_block_begins_when_its_guests_are_there() -> None:
    assert boots_of(("vm1",), HERE) == ({"vm1": "b1"}, "")
    assert boots_of(("vm3",), HERE) == ({}, "vm3 is not there")
    down = [*HERE, guest("vm3", boot_id="")]
    said = "vm3 has no hinting session: its agent has not connected"
    assert boots_of(("vm1", "vm3"), down) == ({}, said)


def test_all_guests_are_the_attached_ones_that_hint() -> None:
    """Guests of other experiments do not take part."""
    others = [guest("made", driver=host_pb2.LIBVIRT), guest("vm3", boot_id="")]
    assert boots_of((), [*HERE, *others]) == ({"vm1": "b1", "vm2": "b1"}, "")
    assert boots_of((), others) == ({}, "no attached guest has a hinting session")


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (HERE, ""),
        ([guest("vm1"), guest("vm2", boot_id="b2")], "vm2 was restarted in this block"),
        ([guest("vm1")], "vm2 was detached or ended in this block"),
        ([guest("vm1"), guest("vm2", boot_id="")], "vm2 lost its hinting in this block: its agent"),
    ],
)
def test_what_became_of_the_guests_of_a_block(now: list[host_pb2.Guest], said: str) -> None:
    found = why_left_out({"vm1": "b1", "vm2": "b1"}, now)
    assert found.startswith(said)
    assert bool(found) == bool(said)


class SlowHost:
    """A host agent that takes 0.1 s to pause or to resume hinting.

    :ivar paused: the guests whose hinting is off.
    """

    def __init__(self) -> None:
        self.paused: set[str] = set()

    async def list_guests(self) -> list[host_pb2.Guest]:
        return HERE

    async def watch_host(self, period_s: float) -> AsyncGenerator[host_pb2.SampleSet, None]:
        while True:
            await asyncio.sleep(0.01)
            samples = [host_pb2.Sample(guest_name=one.name) for one in HERE]
            yield host_pb2.SampleSet(at_unix_us=time.time_ns() // 1000, samples=samples)

    async def pause_hinting(self, name: str, for_s: float) -> float:
        await asyncio.sleep(0.1)
        (self.paused.add if for_s else self.paused.discard)(name)
        return 0.0


def block_on(host: SlowHost, arm: str) -> tuple[BlockRunner, Switchback]:
    """Return the first block of an arm, on this host, and what the spec says of blocks."""
    spec = parsed()
    assert spec.switchback
    trial = next(trial for trial in plan_trials(spec, "run") if trial.arm.name == arm)
    task = host_tasks(spec, trial)["host1"]
    return BlockRunner(cast(HostClient, host), task, spec.switchback), spec.switchback


def end_of_block(host: SlowHost) -> HostDone:
    """Run a block with hinting on this host; return what it came to."""
    block, _ = block_on(host, "on")
    asyncio.run(block.run())
    done = [block.records.get_nowait() for _ in range(block.records.qsize())][-2]
    assert isinstance(done, HostDone)
    return done


@pytest.mark.parametrize("cuts", [1, 2, 3])
def test_a_block_that_is_cut_off_more_than_once_still_ends_the_pause(cuts: int) -> None:
    host = SlowHost()
    runner, switchback = block_on(host, "off")

    async def cut_off() -> None:
        block = asyncio.create_task(runner.run())
        while len(host.paused) < 2:
            await asyncio.sleep(0.01)
        for _ in range(cuts):
            block.cancel()
            await asyncio.sleep(0.02)
        cut_us = time.time_ns() // 1000
        (done,), _ = await asyncio.wait((block,), timeout=30)
        assert done.cancelled()
        assert time.time_ns() // 1000 < cut_us + switchback.carry_over_s * 1e6, "it did not go on"

    asyncio.run(cut_off())
    assert not host.paused


@pytest.mark.parametrize("silent", [True, False])
def test_a_block_whose_host_falls_silent_is_lost(
    silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Host(SlowHost):
        async def watch_host(self, period_s: float) -> AsyncGenerator[host_pb2.SampleSet, None]:
            async for one in super().watch_host(period_s):
                yield one
                await asyncio.Event().wait()

        async def is_silent(self) -> bool:
            return silent

    monkeypatch.setattr(block_runner, "_SAMPLE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(block_runner, "_PERIODS_WITHOUT_SAMPLES", 0)
    done = end_of_block(Host())
    assert "no samples for 0 s" in done.undecided
    assert done.lost == silent


def test_a_block_is_left_out_if_the_clock_is_set_back() -> None:
    """Its samples would be in the wrong order, and it would last longer."""

    class Host(SlowHost):
        async def watch_host(self, period_s: float) -> AsyncGenerator[host_pb2.SampleSet, None]:
            sent = 0
            async for one in super().watch_host(period_s):
                one.at_unix_us -= 3600 * S if sent > 3 else 0
                sent += 1
                yield one

    done = end_of_block(Host())
    assert done.undecided == "the clock of host1 was set back in this block"
    assert not done.lost


# What is computed from stored blocks


def block_records(task: HostTask, guests: tuple[str, ...] = ("vm1", "vm2")) -> Iterator[Record]:
    """Yield the records of a block. Each guest has 900 MiB in the cut, before 4 s. Then it has
    300 MiB under arm `off`, else 100 MiB and 1 MiB for each earlier repetition."""
    trial = task.trial
    times = np.arange(0, 12 * S, S, dtype=np.int64)
    rest_mib = 300 if trial.arm.name == "off" else 100 + trial.repetition
    resident = np.where(times < 4 * S, 900, rest_mib) * MIB
    yield samples(
        task,
        times,
        resident_bytes=np.repeat(resident, len(guests)),
        **dict.fromkeys(COUNTERS, np.repeat(times, len(guests))),
    )
    about: dict[str, Any] = {"host": task.host, "trial_id": trial.trial_id}
    for title, at_s in ((CUT, 1), (BLOCK, 4), (BLOCK_END, 10)):
        yield PhaseStarted(**about, at_unix_us=at_s * S, title=title, hold_s=0)
    for name in guests:
        for kind, start_s, end_s in ((CUT, 1, 4), (BLOCK, 4, 10), (BLOCK_END, 10, 10)):
            yield StepDone(
                **about,
                guest=name,
                at_unix_us=end_s * S,
                kind=kind,
                changed_bytes=0,
                held_bytes=0,
                verified_pages=0,
                wrong_pages=0,
                duration_us=(end_s - start_s) * S,
            )
        yield GuestEnded(
            **about,
            guest=name,
            at_unix_us=11 * S,
            provisioned_bytes=1024 * MIB,
            reclaimed_now_bytes=0,
            refaulted_total_bytes=0,
        )
    yield HostDone(**about, at_unix_us=11 * S)


def stored(
    folder: Path,
    undecided: Mapping[int, str] = {},
    run_id: str = "run1",
    spec: Spec | None = None,
    cut_off_at: int = 100,
) -> None:
    """Store a run.

    :param undecided: why the blocks of `off` in these repetitions do not count.
    :param cut_off_at: the position of the block in which the run is interrupted.
    """
    spec = spec or parsed()
    header = RunHeader(run_id=run_id, spec=spec, spec_text=GOOD, summary="a test")

    def records(trial: Trial, task: HostTask) -> list[Record]:
        found = list(block_records(task))
        if trial.arm.name == "off" and trial.repetition in undecided:
            done = HostDone(
                host=task.host,
                trial_id=trial.trial_id,
                at_unix_us=11 * S,
                undecided=undecided[trial.repetition],
            )
            return [found[0], done]
        return found

    with (
        Store(folder) as store,
        suppress(KeyboardInterrupt),
        RunWriter(store, header) as writer,
    ):
        for trial in plan_trials(spec, run_id):
            tasks = host_tasks(spec, trial)
            writer.begin_trial(trial)
            if trial.position == cut_off_at:
                raise KeyboardInterrupt
            store_records(writer, tasks, [records(trial, task) for task in tasks.values()])


WANTED = Precision(percent=5.0, size_bytes=None, least_repetitions=3, most_repetitions=9)


def savings_of(folder: Path) -> dict[str, Savings]:
    with Store(folder) as store:
        return {row.arm: row for row in aggregate(store.footprint_rows("run1"), By.FLEET)}


def test_the_cut_does_not_count(tmp_path: Path) -> None:
    stored(tmp_path)
    found = savings_of(tmp_path)
    on, off = found["on"], found["off"]
    assert off.footprint is not None
    assert off.footprint.peak_resident_bytes == 600 * MIB, "not the 1800 MiB of the cut"
    assert off.footprint.mean_resident_bytes == 600 * MIB
    assert (off.footprint.provisioned_bytes, off.footprint.verified_pages) == (2048 * MIB, 0)
    assert on.saved_bytes is not None
    assert on.saved_bytes.mean == 2 * (200 - 2.5) * MIB
    assert (on.saved_bytes.pairs, on.left_out_pairs, left_out_line(on)) == (6, 0, "")
    with Store(tmp_path) as store:
        (cost,) = compare(store.cost_rows("run1"), "libvirt")
        assert cost.slowdown_percent is None
        assert cost.settle_s is None
        assert cost.guest_cpu_s is not None
        assert store.find_run("run1").state == "done"


def test_a_pair_with_an_undecided_block_is_left_out_and_counted(tmp_path: Path) -> None:
    stored(tmp_path, {1: "vm1 was restarted in this block", 4: "vm2 is not there"})
    on = savings_of(tmp_path)["on"]
    assert on.undecided == ""
    assert on.saved_bytes is not None
    assert on.saved_bytes.mean == 2 * (200 - (0 + 2 + 3 + 5) / 4) * MIB
    assert (on.saved_bytes.pairs, on.trials, on.left_out_pairs) == (4, 4, 2)
    assert left_out_line(on).startswith("left out: 2 of 6 pairs of blocks;")
    assert savings_from_pb2(savings_as_pb2(on)).left_out_pairs == 2
    with Store(tmp_path) as store:
        run = store.find_run("run1")
        assert (run.state, run.reason) == ("done", ""), "its figures count"
        (cost,) = compare(store.cost_rows("run1"), "libvirt")
        assert cost.guest_cpu_s is not None
        assert cost.guest_cpu_s.pairs == 4


def test_if_no_pair_is_left_it_says_why(tmp_path: Path) -> None:
    stored(tmp_path, dict.fromkeys(range(6), "vm1 was restarted in this block"))
    on = savings_of(tmp_path)["on"]
    assert on.saved_bytes is None
    assert on.undecided == "off, repetition 1, vm1 was restarted in this block"
    assert left_out_line(on).startswith("left out: 6 of 6 pairs")


def test_one_pair_that_counts_is_too_few_and_the_others_are_said(tmp_path: Path) -> None:
    stored(tmp_path, dict.fromkeys(range(5), "vm1 was restarted in this block"))
    on = savings_of(tmp_path)["on"]
    assert on.undecided.startswith("1 pair only")
    assert left_out_line(on).startswith("left out: 5 of 6 pairs")


def test_blocks_that_are_left_out_are_in_no_plot(tmp_path: Path) -> None:
    stored(tmp_path, {5: "vm1 was restarted in this block"})
    with Store(tmp_path) as store:
        contents = read_contents(store, store.find_run("run1"))
    last = {curve.arm: curve.high_bytes[-1] for curve in contents.curves}
    assert last["on"] == 2 * 104 * MIB, "not the 105 of the block that is left out"
    assert "left out: 1 of 6 pairs of blocks" in page(contents)


def test_if_no_block_is_in_a_plot_there_is_no_report(tmp_path: Path) -> None:
    stored(tmp_path, {0: "vm1 was restarted in this block"}, cut_off_at=2)
    with Store(tmp_path) as store:
        assert store.trials("run1")[1].status is TrialStatus.DONE, "but its pair is left out"
        with pytest.raises(Refused, match="no trial to show: it is interrupted"):
            read_contents(store, store.find_run("run1"))


def stored_with(folder: Path, guests_of: Callable[[Trial], tuple[str, ...]]) -> None:
    """Store a run with `guests: all`.

    :param guests_of: the guests that are attached in a block.
    """
    spec = parsed(GOOD.replace("[vm1, vm2]", "all"))
    header = RunHeader(run_id="run1", spec=spec, spec_text=GOOD, summary="a test")
    with Store(folder) as store, RunWriter(store, header) as writer:
        for trial in plan_trials(spec, "run1"):
            names = guests_of(trial)
            named = parsed(GOOD.replace("[vm1, vm2]", f"[{', '.join(names)}]"))
            task = host_tasks(named, trial)["host1"]
            writer.begin_trial(trial)
            store_records(writer, host_tasks(spec, trial), [list(block_records(task, names))])


def test_a_pair_whose_blocks_have_other_guests_is_left_out(tmp_path: Path) -> None:
    """With `guests: all`: a guest was attached between the two blocks."""
    # From the second block of the third pair on, there are two guests.
    stored_with(tmp_path, lambda trial: ("vm1", "vm2") if trial.position > 4 else ("vm1",))
    on = savings_of(tmp_path)["on"]
    assert on.left_out_pairs == 1
    assert on.saved_bytes is not None
    assert on.saved_bytes.pairs == 5
    with Store(tmp_path) as store:
        rows = aggregate(store.footprint_rows("run1", of_guests=True), By.GUEST)
    pairs = {row.key: row.saved_bytes.pairs for row in rows if row.saved_bytes}
    assert pairs == {"vm1": 5, "vm2": 3}, "vm2 was not there before"


def test_if_all_pairs_have_other_guests_nothing_is_compared(tmp_path: Path) -> None:
    stored_with(tmp_path, lambda trial: ("vm1", "vm2") if trial.arm.is_control else ("vm1",))
    on = savings_of(tmp_path)["on"]
    assert (on.saved_bytes, on.left_out_pairs, on.pairs) == (None, 6, 6)
    assert on.undecided.startswith("each pair of blocks is left out: ")
    with Store(tmp_path) as store:
        assert compare(store.cost_rows("run1"), "libvirt") == []
        seen = look(store.footprint_rows("run1"), WANTED)
        of_guests = aggregate(store.footprint_rows("run1", of_guests=True), By.GUEST)
    assert not seen.is_enough
    assert [row.key for row in of_guests if row.saved_bytes] == []
    with Store(tmp_path) as store, pytest.raises(Refused, match="no trial to show"):
        read_contents(store, store.find_run("run1"))


def test_a_precision_goes_on_without_the_pairs_that_are_left_out(tmp_path: Path) -> None:
    precise = parsed(
        GOOD.replace("repetitions: 6", "repetitions: 3") + "precision: 5%\nmax_repetitions: 3\n"
    )
    stored(tmp_path, {0: "vm1 was restarted in this block"}, spec=precise)
    with Store(tmp_path) as store:
        seen = look(store.footprint_rows("run1"), WANTED)
    assert seen.arms == {"on": None}, "two pairs are too few for its first look, at three"
    assert not seen.is_enough


def test_two_switchbacks_are_compared_by_the_pairs_that_both_have(tmp_path: Path) -> None:
    stored(tmp_path, {1: "vm1 was restarted in this block"})
    stored(tmp_path, {2: "vm2 is not there"}, run_id="run2")
    with Store(tmp_path) as store:
        runs = [
            RunRows(footprints=store.footprint_rows(run), costs=store.cost_rows(run))
            for run in ("run1", "run2")
        ]
    changes = {(change.arm, change.figure): change for change in compare_runs(*runs)}
    assert len(changes["on", Figure.SAVED].pairs) == 4
    assert not any(change.undecided for change in changes.values())
    assert not {("on", Figure.SLOWDOWN), ("on", Figure.SETTLE)} & changes.keys()
