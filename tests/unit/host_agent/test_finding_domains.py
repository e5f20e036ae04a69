"""Finding the domain to attach, with libvirt's own test driver."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from hintfleet.errors import NotFound, Refused
from host_agent.guests.attached.driver import AttachedDriver

libvirt = pytest.importorskip("libvirt")

URI = "test:///default"
"""It has one domain, whose name is `test`."""


@pytest.fixture
def driver() -> Iterator[AttachedDriver]:
    with closing(asyncio.new_event_loop()) as loop:
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
