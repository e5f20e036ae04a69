"""A DIMM that QEMU does not hand over at the memory door, plugged into a fake of libvirt's
domain."""

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hintfleet.errors import Refused
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.units import MIB
from host_agent.door.door import MemoryDoor
from host_agent.guests.libvirt.dimms import Dimms
from tests.support.loops import running_loop

libvirt = pytest.importorskip("libvirt")

DIMM = """
<memory model='dimm' access='shared'>
  <target><size unit='KiB'>131072</size><node>0</node></target>
  <alias name='dimm0'/>
  <address type='dimm' slot='0' base='0x100000000'/>
</memory>
"""


class Suspended:
    """A domain that takes a DIMM, and cannot release it."""

    def __init__(self) -> None:
        self._devices = ""

    def XMLDesc(self) -> str:  # noqa: N802 - libvirt's name
        return f"<domain><devices>{self._devices}</devices></domain>"

    def attachDeviceFlags(self, _xml: str, _flags: int) -> None:  # noqa: N802 - libvirt's name
        self._devices = DIMM

    def detachDeviceFlags(self, _xml: str, _flags: int) -> None:  # noqa: N802 - libvirt's name
        raise libvirt.libvirtError("the device cannot be detached now")

    def connect(self) -> "Suspended":
        return self

    def domainEventRegisterAny(self, *_: Any) -> int:  # noqa: N802 - libvirt's name
        return 1

    def domainEventDeregisterAny(self, _number: int) -> None:  # noqa: N802 - libvirt's name
        """Do nothing: there are no events."""


def test_the_error_is_why_it_could_not_be_plugged(tmp_path: Path) -> None:
    with (
        running_loop() as loop,
        closing(MemoryDoor.listening(loop, tmp_path / "door", {os.geteuid()}, "g")) as door,
    ):
        dimms = Dimms(Suspended(), door, 0)
        with pytest.raises(Refused, match="is the guest stopped"):
            dimms.plug(128 * MIB, EMPTY)
        assert dimms.pages() == RangeSet([(1 << 20, 1 << 15)]), "the DIMM that stays is told of"
