"""Guests are started one by one until their host runs out of memory, or all have started; a cgroup
enforces the budget where one can be made. With zram, more guests fit. A trial whose guests start
together is undecided if its host runs out."""

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from hintfleet.errors import Refused
from hintfleet.settings import Driver
from hintfleet.system.cgroups import hierarchies
from hintfleet.units import MIB
from host_agent.budget.memory_cgroup import MemoryCgroup
from host_agent.budget.zram import Zram, abandoned
from orchestrator.results.store.reader import Store
from orchestrator.trial.records import GuestFits, HostRanOut
from tests.support.lab import Lab, made_lab, on_this_machine, result

# Under none, three guests' processes and two guests' RAM need more than 300 MiB. Under hinting, a
# guest that has freed its memory keeps little more than its process.
SPEC = """\
name: fill
driver: embedded
hosts: {count: 1, memory: 300MiB}
guests: {per_host: 4, memory: 128MiB, start: one by one}
workload:
  phases:
    - {allocate: 80%}
    - {free: 90%, settle: true}
arms:
  - {name: none, method: none}
  - {name: bitmap, method: hinting, tracker: bitmap}
sample_period: 50ms
"""
TOGETHER = SPEC.replace(", start: one by one", "").replace("fill", "full").replace("4, m", "3, m")


def can_enforce() -> bool:
    try:
        MemoryCgroup.make(MIB, Driver.EMBEDDED).remove()
    except Refused:
        return False
    return True


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, dict[str, Any]]]:
    with made_lab(tmp_path_factory.mktemp("filled")) as lab:
        with on_this_machine():
            done = lab.run("run", lab.spec(SPEC), "-o", "json")
        yield lab, result(done)


@pytest.fixture
def swap() -> Iterator[bool]:
    """Hold the lock of tests with swap; return whether there can be zram in a cgroup's budget."""
    with on_this_machine("swap", alone=True):
        try:
            Zram.make(MIB).remove()
        except Refused:
            yield False
        else:
            yield can_enforce()


def capacities(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["arm"]: arm for arm in data["capacities"]}


def test_more_guests_fit_when_freed_memory_comes_back(filled: tuple[Lab, dict[str, Any]]) -> None:
    lab, data = filled
    none, bitmap = capacities(data)["none"], capacities(data)["bitmap"]
    assert none["guests"] in (1.0, 2.0)
    assert not none["at_least"]
    assert bitmap["guests"] > none["guests"]
    assert data["arms"] == [], "nothing is said of savings: the arms had other numbers of guests"
    shown = lab.run("show", "latest")
    assert f"bitmap fits {'at least 4' if bitmap['at_least'] else 3} guests" in shown.stdout
    lab.check_nothing_is_left()


def test_what_happened_is_stored(filled: tuple[Lab, dict[str, Any]]) -> None:
    lab, data = filled
    with Store(lab.folder / "hintfleet") as store:
        out = store.events(data["run_id"], HostRanOut)
        fitted = store.events(data["run_id"], GuestFits)
        assert store.footprint_rows(data["run_id"]) == []
    first = out[0]
    assert first.limit_bytes == 300 * MIB
    assert first.enforced == can_enforce()
    none_fitted = [event for event in fitted if event.trial_id.endswith("-none-1")]
    assert [event.guest for event in none_fitted] == [
        f"host1-guest{i + 1}" for i in range(len(none_fitted))
    ]
    assert all(0 < event.used_bytes <= 300 * MIB for event in fitted)


def test_together_a_host_that_runs_out_makes_the_trial_undecided(lab: Lab) -> None:
    done = lab.run("run", lab.spec(TOGETHER), "-o", "json")
    data = result(done, 3)
    none = next(trial for trial in data["trials"] if trial["arm"] == "none")
    assert "host1: ran out of memory: its guests needed more than its 300 MiB" in none["undecided"]
    lab.check_nothing_is_left()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_where_no_cgroup_can_be_made_the_budget_is_watched(lab: Lab) -> None:
    read_only = "; ".join(f"mount -o remount,bind,ro '{h.top}'" for h in hierarchies())
    lab.prefix = ("unshare", "--mount", "sh", "-c", f'{read_only}; exec "$@"', "sh")
    spec = SPEC.replace("300MiB", "144MiB")
    data = result(lab.run("run", lab.spec(spec), "-o", "json"))
    none, bitmap = capacities(data)["none"], capacities(data)["bitmap"]
    assert (none["guests"], none["watched"]) == (1.0, True)
    assert bitmap["guests"] >= 3
    assert "only watched" in " ".join(lab.run("show", "latest").stdout.split())


ZRAM = SPEC.replace("80%", "80%, compressible: 75%").replace(
    "  - {name: bitmap, method: hinting, tracker: bitmap}",
    "  - {name: compressed, method: none, swap: {zram: 512MiB}}",
)


def test_more_guests_fit_with_zram_and_only_while_its_arm_runs(lab: Lab, swap: bool) -> None:
    with on_this_machine():
        done = lab.run("run", lab.spec(ZRAM), "-o", "json")
    if not swap:
        assert done.returncode == 1
        said = "needs a memory budget|device can be made|has no zram|cannot be used as swap"
        assert re.search(said, done.stderr)
        return
    data = result(done)
    none, compressed = capacities(data)["none"], capacities(data)["compressed"]
    assert none["guests"] in (1.0, 2.0)
    assert compressed["guests"] > none["guests"]
    assert none["is_control"]
    assert not compressed["is_control"]
    lab.check_nothing_is_left()
    assert not set(abandoned())
