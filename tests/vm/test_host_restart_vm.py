"""Real guests outlive their host agent, and the next host agent adopts them. A guest that is not
adopted in time ends by itself."""

import contextlib
import threading
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from host_agent.guests.libvirt.domain_xml import NAME_PREFIX
from host_agent.guests.libvirt.image import GuestImage
from tests.support.agents import HANG_S, HostAgent, running_host_agent, wait_until
from tests.support.vm import Guests, spec

# Free memory that is not hinted: the hugetlb isolator keeps a sixteenth of the memory, and the
# watermarks, as a reserve.
KEPT_BYTES = 60 * MIB
SPECS = {
    "restart-kmod": spec(memory_bytes=512 * MIB),
    "restart-hugetlb": spec(
        isolator="hugetlb", parameters="init_on_alloc=0", memory_bytes=512 * MIB
    ),
}


def is_back(host: HostAgent, guest: host_pb2.Guest) -> bool:
    """Return whether a guest of an earlier host agent has a session with this host agent.

    :param guest: the guest as the earlier host agent reported it.
    """
    return host.guests()[guest.name].epoch > guest.epoch


def kill_amid_batches(host: HostAgent, name: str) -> None:
    """Kill the host agent while it runs steps of this guest's workload and the guest hints."""

    def step() -> None:
        with contextlib.suppress(grpc.RpcError):
            while True:
                host.free(60 * MIB, name)
                host.allocate(60 * MIB, name)

    stepping = threading.Thread(target=step)
    stepping.start()
    batches = host.guests()[name].ledger.batches
    wait_until(lambda: host.guests()[name].ledger.batches > batches + 2, "batches")
    host.process.kill()
    host.process.wait()
    stepping.join(HANG_S)


def test_real_guests_go_on_under_the_next_host_agent(
    libvirt_uri: str, image: GuestImage, connection: Any, readable_by_qemu: Path
) -> None:
    arguments = ("--state", str(readable_by_qemu / "state"), "--orphan-after", "20")

    def domains() -> set[str]:
        names = {domain.name() for domain in connection.listAllDomains()}
        return names & {NAME_PREFIX + name for name in SPECS}

    with running_host_agent(*arguments) as first:
        first.watch()
        guests = Guests(first, SPECS)
        guests.wait()
        before = {name: guests[name] for name in SPECS}
        for name in SPECS:
            first.allocate(160 * MIB, name)
            first.free(40 * MIB, name)
        kill_amid_batches(first, "restart-kmod")
    assert len(domains()) == len(SPECS)

    with running_host_agent(*arguments) as second:
        second.watch()
        for name, guest in before.items():
            wait_until(partial(is_back, second, guest), f"{name} to come back")
            assert second.guests()[name].pid == guest.pid
            assert second.verify(name).wrong_pages == 0
            resident_bytes = second.settle(name).ledger.resident_bytes
            freed_bytes = second.free(110 * MIB, name).changed_bytes
            settled = second.settle(name).ledger
            assert settled.resident_bytes < resident_bytes - freed_bytes + KEPT_BYTES
            fates = settled.reclaimed_total_bytes + settled.absent_total_bytes
            skipped_bytes = sum(settled.skipped_total_bytes.values())
            assert settled.hinted_total_bytes == fates + skipped_bytes
            Guests(second, {}).balances(name, connection)
            assert second.verify(name).wrong_pages == 0
        second.stub.DestroyGuest(
            host_pb2.DestroyGuestRequest(name="restart-hugetlb"), timeout=HANG_S
        )
        assert domains() == {NAME_PREFIX + "restart-kmod"}
        second.process.kill()
        second.process.wait()
    # No host agent starts within --orphan-after, so the guest ends by itself.
    wait_until(lambda: not domains(), "the orphan to end")

    with running_host_agent(*arguments) as third:
        with pytest.raises(grpc.RpcError) as caught:
            third.verify("restart-kmod")
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert "while there was no host agent" in str(caught.value.details())
