"""A domain that ends while leaked domains are looked for is not an error."""

from typing import Any

import pytest

from host_agent.guests.libvirt import domain_leaks

libvirt = pytest.importorskip("libvirt")


class Vanishing:
    """A domain that ended after it was listed."""

    def XMLDesc(self) -> str:  # noqa: N802 - libvirt's name
        error = libvirt.libvirtError("Domain not found")
        error.err = (libvirt.VIR_ERR_NO_DOMAIN, 0, "Domain not found", 0, "", "", "", 0, 0)
        raise error


class Connection:
    def listAllDomains(self, _flags: int) -> list[Any]:  # noqa: N802 - libvirt's name
        return [Vanishing()]


def test_a_domain_that_ends_meanwhile_is_no_error() -> None:
    assert list(domain_leaks._abandoned("qemu:///system", Connection())) == []
