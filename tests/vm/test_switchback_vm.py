"""A switchback on an attached domain of somebody else, which goes on with its own work; and another
switchback, during which that domain is reset."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from tests.support.agents import HANG_S, HostAgent, running_host_agent, wait_until
from tests.support.foreign import ForeignDomain
from tests.support.lab import RUN_TIMEOUT_S, Lab, made_lab, result, wait_for_line
from tests.support.own_libvirt import OwnLibvirt

USED_MIB = 300
# A Python program that uses memory for one second in four, until /run/work is gone.
WORK = (
    "import os, time\n"
    "open('/run/work', 'w').close()\n"
    "while os.path.exists('/run/work'):\n"
    f"    b = bytearray({USED_MIB} << 20); b[::4096] = b'1' * (len(b) // 4096)\n"
    "    time.sleep(1); del b; time.sleep(3)\n"
)
SPEC = """\
name: theirs
driver: libvirt
hosts: {{agents: ["{address}"]}}
switchback: {{guests: all, shortest: {block}, longest: {block}, cut: 15s}}
arms:
  - {{name: off, method: none}}
  - {{name: on, method: hinting}}
repetitions: 2
seed: 1
sample_period: 500ms
"""


@pytest.fixture
def host(libvirt: OwnLibvirt, foreign: ForeignDomain) -> Iterator[HostAgent]:
    """Run a host agent, attach the domain to it, and start WORK in the guest; after the test, end
    WORK and detach the domain."""
    with running_host_agent("--libvirt-uri", libvirt.uri) as agent:
        name = foreign.domain.name()
        # Policy adaptive would hold back what is used again after 3 s.
        attach = host_pb2.AttachGuestRequest(
            domain=name,
            through_guest_agent=True,
            hinting=host_pb2.HintingSettings(policy="eager"),
        )
        agent.stub.AttachGuest(attach, timeout=HANG_S)
        wait_until(lambda: not agent.guests()[name].not_hinting_because, "its agent")
        foreign.spawn("/usr/bin/python3", "-c", WORK)
        yield agent
        foreign.wait_for_boot()
        foreign.run("/bin/rm", "-f", "/run/work")
        detach = host_pb2.DetachGuestRequest(name=name, through_guest_agent=True)
        agent.stub.DetachGuest(detach, timeout=HANG_S)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with made_lab(tmp_path) as made:
        yield made


def test_what_hinting_saves_on_an_attached_domain(
    lab: Lab, host: HostAgent, foreign: ForeignDomain
) -> None:
    (before,) = host.guests().values()
    text = SPEC.format(address=host.control, block="40s")
    data = result(lab.run("run", lab.spec(text), "-o", "json"))
    off, on = data["arms"]
    assert (off["arm"], on["arm"]) == ("off", "on")
    assert on["saved_bytes"]["mean"] > USED_MIB * MIB / 4
    assert on["saved_bytes"]["pairs"] == 2
    assert data["environment"]["hypervisor"].endswith(", TCG")
    (after,) = host.guests().values()
    assert (after.pid, after.epoch, after.boot_id) == (before.pid, before.epoch, before.boot_id)
    assert after.not_hinting_because == "", "nobody's hinting stays paused"
    assert foreign.domain.isActive()


def test_a_block_in_which_the_domain_is_reset_is_left_out(
    lab: Lab, host: HostAgent, foreign: ForeignDomain
) -> None:
    def is_paused() -> bool:
        (guest,) = host.guests().values()
        return guest.not_hinting_because.startswith("paused for another ")

    text = SPEC.format(address=host.control, block="1min")
    with lab.started("run", lab.spec(text)) as process:
        wait_until(is_paused, "a block without hinting")
        foreign.domain.reset()
        said = wait_for_line(process, "undecided: ")
        assert "was restarted in this block" in said or "lost its hinting in this block" in said
        process.send_signal(signal.SIGINT)
        assert process.wait(RUN_TIMEOUT_S) == 130
    wait_until(
        lambda: not next(iter(host.guests().values())).not_hinting_because, "hinting to go on"
    )
