"""A device is detached while libvirtd ends: the error is one that callers expect. Uses a fake of
libvirt's domain."""

from typing import Any

import pytest

from hintfleet.errors import HintfleetError, OutcomeUnknown, Refused
from host_agent.guests.libvirt import devices

libvirt = pytest.importorskip("libvirt")


class Lost:
    """A domain, and its connection to libvirt, which is lost when the device is being detached.

    :ivar answered: whether libvirt still answers the call that detaches it.
    """

    def __init__(self, answered: bool) -> None:
        self.answered = answered

    def detachDeviceFlags(self, _xml: str, _flags: int) -> None:  # noqa: N802 - libvirt's name
        if not self.answered:
            raise libvirt.libvirtError("client socket is closed")

    def connect(self) -> "Lost":
        return self

    def domainEventRegisterAny(self, *_: Any) -> int:  # noqa: N802 - libvirt's name
        return 1

    def domainEventDeregisterAny(self, _number: int) -> None:  # noqa: N802 - libvirt's name
        raise libvirt.libvirtError("client socket is closed")


@pytest.mark.parametrize(
    ("answered", "error", "said"),
    [(False, Refused, "unplugging fs0: client"), (True, OutcomeUnknown, "did not release fs0")],
)
def test_a_connection_that_is_lost_meanwhile(
    answered: bool, error: type[HintfleetError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_REMOVAL_S", 0.01)
    with pytest.raises(error, match=said):
        devices.detach(Lost(answered), "fs0", "<filesystem/>")
