"""A switchback on guests that somebody else made and keeps at work: what it finds, and that it
leaves the guests alone and their hinting on."""

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from tests.support.agents import HostAgent, wait_until
from tests.support.lab import RUN_TIMEOUT_S, Lab, result, wait_for_line

SPEC = """\
name: theirs
driver: embedded
hosts: {{agents: ["{address}"]}}
switchback: {{guests: [vm1, vm2], shortest: 3s, longest: 4s, cut: 1500ms}}
arms:
  - {{name: off, method: none}}
  - {{name: on, method: hinting}}
repetitions: {repetitions}
seed: 1
sample_period: 50ms
"""
USED = 64 * MIB
EAGER = host_pb2.HintingSettings(policy="eager", report_period_ms=50)


class Owner:
    """Somebody whose guests are at work: each uses memory for a moment, again and again."""

    def __init__(self, host: HostAgent) -> None:
        self.host = host
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        host.watch()
        for name in ("vm1", "vm2"):
            self.make(name)

    def make(self, name: str) -> None:
        self.host.create(name, hinting=EAGER)
        work = threading.Thread(target=self._work, args=(name,))
        self._threads.append(work)
        work.start()

    def _work(self, name: str) -> None:
        with suppress(grpc.RpcError):  # if the guest is destroyed
            while not self._over.is_set():
                self.host.allocate(USED, name)
                self.host.free(USED, name)
                self._over.wait(0.7)

    def destroy(self, name: str) -> None:
        self.host.stub.DestroyGuest(host_pb2.DestroyGuestRequest(name=name))

    def is_paused(self) -> bool:
        """Whether the hinting of all guests is paused."""
        guests = self.host.guests().values()
        return all(g.not_hinting_because.startswith("paused for another ") for g in guests)

    def rest(self) -> None:
        """End the guests' work."""
        self._over.set()
        for work in self._threads:
            work.join()


@pytest.fixture
def owner(host_agent: HostAgent) -> Iterator[Owner]:
    made = Owner(host_agent)
    yield made
    made.rest()


def spec(lab: Lab, owner: Owner, repetitions: int = 3) -> str:
    return lab.spec(SPEC.format(address=owner.host.control, repetitions=repetitions))


def wait_for_a_pause(owner: Owner, run: "subprocess.Popen[str]") -> None:
    wait_until(lambda: owner.is_paused() or run.poll() is not None, "a block without hinting")
    assert run.poll() is None, "the run ended before such a block"


def check_left_alone(owner: Owner, before: dict[str, host_pb2.Guest]) -> None:
    """End the guests' work; check that all guests live on in the same session, hint, and have lost
    no data."""
    owner.rest()
    for name, guest in owner.host.guests().items():
        assert (guest.pid, guest.epoch) == (before[name].pid, before[name].epoch)
        assert guest.not_hinting_because == ""
        owner.host.settle(name)
        assert owner.host.guests()[name].ledger.resident_bytes < USED
        assert owner.host.verify(name).wrong_pages == 0


def arms_of(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["arm"]: arm for arm in run["arms"]}


def test_what_hinting_saves_on_guests_of_somebody_else(
    lab: Lab, owner: Owner, tmp_path: Path
) -> None:
    before = owner.host.guests()
    run = result(lab.run("run", spec(lab, owner), "-o", "json"))
    assert run["state"] == "done"
    off, on = arms_of(run)["off"], arms_of(run)["on"]
    assert on["saved_bytes"]["low"] > 0
    assert on["saved_bytes"]["pairs"] == on["trials"] == off["trials"] == 3
    assert on["left_out_pairs"] == 0
    assert off["footprint"]["provisioned_bytes"] == 2 * 128 * MIB
    assert off["footprint"]["mean_resident_bytes"] > USED
    assert off["footprint"]["refaulted_total_bytes"] < on["footprint"]["refaulted_total_bytes"]
    assert off["footprint"]["verified_pages"] == 0, "nobody read anything back"
    assert on["cost"]["slowdown_percent"] is None, "their work was not timed"
    check_left_alone(owner, before)

    shown = lab.run("show", "latest")
    assert "on saves " in shown.stdout
    assert "workload is" not in shown.stdout
    assert lab.run("report", "latest", "-o", str(tmp_path / "report.html")).returncode == 0
    by_guest = json.loads(lab.run("savings", "--by", "guest", "-o", "json").stdout)
    assert {row["key"] for row in by_guest} == {"vm1", "vm2"}


def test_a_block_that_others_spoilt_is_left_out_and_said(lab: Lab, owner: Owner) -> None:
    with lab.started("run", spec(lab, owner, repetitions=5), "-o", "json") as process:
        wait_for_a_pause(owner, process)
        owner.destroy("vm2")
        said = wait_for_line(process, "undecided: ")
        assert "vm2 was detached or ended in this block" in said
        owner.make("vm2")  # another guest of the same name
        wait_for_a_pause(owner, process)
        owner.host.pause_hinting(0, "vm1")
        said = wait_for_line(process, "undecided: ")
        assert "vm1 hinted: its pause had ended in this block" in said
        output, errors = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, errors
    shown = lab.run("show", "latest")
    assert "left out: 2 of 5 pairs" in shown.stdout
    on = arms_of(result(lab.run("show", "latest", "-o", "json")))["on"]
    assert on["left_out_pairs"] == 2
    assert on["saved_bytes"]["pairs"] == on["trials"] == 3
    assert on["saved_bytes"]["low"] > 0
    assert output


def test_interrupted_in_an_off_block_it_lets_hinting_go_on_at_once(lab: Lab, owner: Owner) -> None:
    before = owner.host.guests()
    long = SPEC.replace("shortest: 3s, longest: 4s", "shortest: 1h, longest: 1h")
    text = long.format(address=owner.host.control, repetitions=1)
    with lab.started("run", lab.spec(text)) as process:
        wait_for_a_pause(owner, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(RUN_TIMEOUT_S) == 130
        assert {guest.not_hinting_because for guest in owner.host.guests().values()} == {""}
    check_left_alone(owner, before)


def test_a_guest_that_is_not_there_is_named(lab: Lab, owner: Owner) -> None:
    text = SPEC.format(address=owner.host.control, repetitions=2).replace("vm2", "vm9")
    ended = lab.run("run", lab.spec(text))
    assert ended.returncode == 1
    assert "host1 has no guest 'vm9'; it has vm1, vm2" in ended.stderr
    assert "hintfleet attach" in ended.stderr
    assert "Traceback" not in ended.stderr
    every = lab.run("run", lab.spec(text.replace("[vm1, vm9]", "all")))
    assert every.returncode == 1
    assert "host1 has no attached guest" in every.stderr
    real = lab.run("run", lab.spec(text.replace("vm9", "vm2").replace("embedded", "libvirt")))
    assert "guest vm1 is embedded, but the driver of the spec is libvirt" in real.stderr
    assert lab.run("runs").stdout.startswith("no runs yet"), "nothing was measured"
