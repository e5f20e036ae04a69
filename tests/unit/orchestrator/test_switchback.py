"""A switchback: what its spec may say, when its blocks are, and what they come to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import InvalidInput
from orchestrator.spec import file as spec_file
from orchestrator.spec.memory_needs import host_bytes
from orchestrator.spec.model import Spec, describe
from orchestrator.spec.switchback import Switchback
from orchestrator.trial.plan import block_s, host_tasks, plan_trials

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
