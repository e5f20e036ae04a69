"""What `hintfleet-host --doctor` finds where libvirt hangs."""

import time

import pytest

from host_agent import doctor
from host_agent.guests.libvirt.driver import LibvirtDriver


def test_a_libvirt_that_hangs_is_named_and_embedded_guests_can_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LibvirtDriver, "state", lambda _: time.sleep(5))
    monkeypatch.setattr(doctor, "_LIBVIRT_TIMEOUT_S", 0.1)
    found = {finding.name: finding for finding in doctor.examine("")}
    assert found["hole punch on a memfd"].ok
    assert not found["libvirt"].ok
    assert found["libvirt"].detail == "libvirt does not answer"
