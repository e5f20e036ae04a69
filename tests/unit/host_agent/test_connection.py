"""A connection to libvirt that failed while it was set up is opened again. Uses libvirt's own test
driver."""

import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from hintfleet.errors import Refused
from hintfleet.v1 import host_pb2
from host_agent.guests.driver import GuestRequest
from host_agent.guests.libvirt import driver
from host_agent.guests.libvirt.connection import Connection
from tests.support.agents import HANG_S

libvirt = pytest.importorskip("libvirt")

UUID = "6f3c2b0e-5d0a-4c7e-9b52-0c4f4a1f2d10"
NODE = f"""
<node>
  <domain type='test'>
    <name>db1</name><uuid>{UUID}</uuid><memory>4096</memory><os><type>hvm</type></os>
  </domain>
</node>
"""
CAPABILITIES = """
<capabilities><host><secmodel>
  <model>dac</model><baselabel type='kvm'>+64055:+107</baselabel>
</secmodel></host></capabilities>
"""


def failing(*_: object) -> Any:
    raise libvirt.libvirtError("libvirtd is gone")


@pytest.mark.parametrize(
    "step", ["domainEventRegisterAny", "registerCloseCallback", "getCapabilities"]
)
def test_a_connection_that_fails_while_it_is_set_up_is_opened_again(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "node.xml").write_text(NODE)
    monkeypatch.setattr(libvirt.virConnect, "getCapabilities", lambda _: CAPABILITIES)
    still_open, close = [], libvirt.virConnect.close

    def counted(of_libvirt: Any) -> None:
        still_open.append(close(of_libvirt))

    monkeypatch.setattr(libvirt.virConnect, "close", counted)
    connection = Connection(f"test://{tmp_path}/node.xml")
    with monkeypatch.context() as patch:
        patch.setattr(libvirt.virConnect, step, failing)
        with pytest.raises(Refused, match="libvirtd is gone"):
            connection.get()
    assert still_open == [0], "libvirt returns how many references keep the connection open"
    reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
    told: Callable[[str], None] = reasons.put
    with closing(connection), ExitStack() as undo:
        connection.watch(UUID, told, undo)
        connection.domain(UUID).destroy()
        assert reasons.get(timeout=HANG_S) == "the guest was stopped"
        assert connection.qemu_user is not None


def test_a_domain_that_ends_by_itself_meanwhile_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt says then that it is not running. As an error, that would end the whole run."""
    (tmp_path / "node.xml").write_text(NODE)
    monkeypatch.setattr(libvirt.virConnect, "getCapabilities", lambda _: CAPABILITIES)
    destroy = libvirt.virDomain.destroy

    def too_late(domain: Any) -> None:
        destroy(domain)
        destroy(domain)

    monkeypatch.setattr(libvirt.virDomain, "destroy", too_late)
    with closing(Connection(f"test://{tmp_path}/node.xml")) as connection:
        connection.destroy(UUID)
        assert not connection.domain(UUID).isActive()


def test_a_name_that_is_about_to_be_free_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirtd ends the domains of a killed host agent one after the other, while the next one
    begins."""
    (tmp_path / "node.xml").write_text(NODE)
    monkeypatch.setattr(libvirt.virConnect, "getCapabilities", lambda _: CAPABILITIES)
    request = GuestRequest(
        name="g", uuid=UUID, token="t", spec=host_pb2.GuestSpec(), on_gone=lambda _: None
    )
    with closing(Connection(f"test://{tmp_path}/node.xml")) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(driver, "_FREE_WITHIN_S", 0.1)
            with pytest.raises(Refused, match="there is a domain db1"):
                driver._wait_until_free(connection.get(), request)

        def end() -> None:
            connection.destroy(UUID)
            connection.domain(UUID).undefine()

        ending = threading.Timer(0.5, end)
        ending.start()
        driver._wait_until_free(connection.get(), request)
        ending.join()
