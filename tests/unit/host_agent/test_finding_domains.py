"""Finding the domain to attach, and refusing one that cannot be hinted, with libvirt's own test
driver."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from hintfleet.errors import GuestLost, NotFound, Refused
from hintfleet.v1 import host_pb2
from host_agent.guests.attached.driver import AttachedDriver
from host_agent.guests.driver import GuestRequest
from tests.support.loops import running_loop

libvirt = pytest.importorskip("libvirt")

URI = "test:///default"
"""It has one domain, whose name is `test`."""


@pytest.fixture
def driver() -> Iterator[AttachedDriver]:
    with running_loop() as loop:
        made = AttachedDriver(URI, loop, guest_server="127.0.0.1:1")
        with closing(made):
            yield made


def test_a_domain_is_found_by_its_name_and_by_its_uuid(driver: AttachedDriver) -> None:
    found = driver.find("test")
    assert driver.find(found.uuid) == found
    assert driver.find(found.uuid.upper()) == found
    for other in ("tes", "6f3c2b0e-5d0a-4c7e-9b52-0c4f4a1f2d10"):
        with pytest.raises(NotFound, match=f"no domain '{other}' on this host"):
            driver.find(other)


def test_a_failure_of_libvirt_is_not_taken_for_a_domain_that_is_not_there(
    driver: AttachedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Any:
        raise libvirt.libvirtError("libvirtd does not answer")

    monkeypatch.setattr(libvirt.virDomain, "XMLDesc", failing)
    with pytest.raises(Refused, match="libvirtd does not answer"):
        driver.find("test")


@pytest.mark.parametrize(
    ("state", "change"),
    [
        ("VIR_DOMAIN_PAUSED", "virsh resume test"),
        ("VIR_DOMAIN_PMSUSPENDED", "virsh dompmwakeup test"),
    ],
)
def test_a_domain_whose_kernel_stands_still_cannot_open_the_door(
    driver: AttachedDriver, monkeypatch: pytest.MonkeyPatch, state: str, change: str
) -> None:
    monkeypatch.setattr(libvirt.virDomain, "state", lambda _: [getattr(libvirt, state), 0])
    assert driver.find("test").obstacles[-1].change == change


def test_an_obstacle_is_looked_for_again_whenever_a_domain_is_attached(
    driver: AttachedDriver,
) -> None:
    request = GuestRequest(
        name="g",
        uuid=driver.find("test").uuid,
        token="secret",
        spec=host_pb2.GuestSpec(driver=host_pb2.ATTACHED),
        on_gone=lambda _reason: None,
    )
    said = "cannot be attached: its memory is not in a shared memfd"
    with pytest.raises(Refused, match=said) as refused:
        driver.create(request)
    assert "<memoryBacking>" in refused.value.hint
    with pytest.raises(GuestLost, match=said):
        driver.adopt(request, {"start": 1})
