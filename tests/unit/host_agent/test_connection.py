"""A connection to libvirt that failed while it was set up is opened again. Uses libvirt's own test
driver."""

import queue
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from hintfleet.errors import Refused
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
