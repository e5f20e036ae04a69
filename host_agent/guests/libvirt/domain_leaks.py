"""Finds domains that outlived the host agent that made them, and memory doors that a killed host
agent left in domains of others.

libvirt ends a host agent's domains when the connection is closed (autodestroy), except those made
under Survival. Any other domain outlives its host agent only if libvirtd itself failed. Such a
domain is recognised by its name and by its console: a file in a folder that its host agent made,
and kept locked while it ran. Domains made under Survival have their console in another folder, and
are not found here. A memory door was left behind if nobody listens on its socket.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hintfleet.errors import GuestLost, Refused
from hintfleet.leaks import Leak, Removable
from host_agent.guests.libvirt.api import errors_as, modules
from host_agent.guests.libvirt.devices import doors_in, is_served, unplug_door
from host_agent.guests.libvirt.domain_xml import NAME_PREFIX
from host_agent.guests.libvirt.runtime_dir import runtime_dirs


def abandoned_domains(uri: str) -> list[Removable]:
    """Return the abandoned domains and memory doors at this URI, each with what removes it.

    :raises Refused: libvirt is not installed, does not answer, or runs on another machine, whose
        processes and folders cannot be examined from here.
    """
    if urlsplit(uri).hostname:
        raise Refused(
            f"the domains of {uri} are on another machine",
            hint="run hintfleet-host --leaks on that machine",
        )
    libvirt, _ = modules()
    with errors_as(f"cannot connect to libvirt at {uri}"), closing(libvirt.open(uri)) as opened:
        return list(_abandoned(uri, opened))


def _abandoned(uri: str, connection: Any) -> Iterator[Removable]:
    libvirt, _ = modules()
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        with suppress(GuestLost), errors_as("looking at a domain"):  # the domain may have ended
            xml = ET.fromstring(domain.XMLDesc())  # noqa: S314 - libvirt's
            if not domain.name().startswith(NAME_PREFIX):
                yield from _dead_door(uri, domain, xml)
                continue
            if (folder := _folder_of(xml)) is None:
                continue
            # Any entry of `runtime_dirs` would do: they differ only in their base, which
            # `is_abandoned` does not use.
            if runtime_dirs()[0].is_abandoned(folder):
                leak = Leak(
                    what="domain",
                    where=domain.name(),
                    since_unix_s=round(folder.lstat().st_mtime) if folder.exists() else 0,
                    size_bytes=_rss_bytes(domain),
                    why="the host agent that made it is gone",
                )
                yield leak, partial(_with_domain, uri, domain.UUIDString(), _destroy)


def _rss_bytes(domain: Any) -> int:
    libvirt, _ = modules()
    try:
        return int(domain.memoryStats().get("rss", 0)) * 1024
    except libvirt.libvirtError:  # it is just ending; the size is only told to people
        return 0


def _dead_door(uri: str, domain: Any, xml: ET.Element) -> Iterator[Removable]:
    """Yield the memory door of a domain that was attached, if nobody serves it. Under --state, the
    next host agent would take it out, too."""
    doors = doors_in(xml)
    if doors and not any(map(is_served, doors)):
        leak = Leak(
            what="memory door",
            where=f"domain {domain.name()}",
            since_unix_s=0,
            size_bytes=0,
            why="the host agent that plugged it in is gone",
        )
        yield leak, partial(_with_domain, uri, domain.UUIDString(), unplug_door)


def _folder_of(domain_xml: ET.Element) -> Path | None:
    console = domain_xml.find("devices/serial/source")
    path = console.get("path") if console is not None else None
    return Path(path).parent if path else None


def _destroy(domain: Any) -> None:
    domain.destroy()


def _with_domain(uri: str, uuid_text: str, do: Callable[[Any], object]) -> None:
    """Call `do` with a domain; do nothing if there is none any more."""
    # Looked up by UUID, not by name: another domain may have the name by now.
    libvirt, _ = modules()
    with (
        suppress(GuestLost),
        errors_as("removing what is left of a host agent"),
        closing(libvirt.open(uri)) as connection,
    ):
        do(connection.lookupByUUIDString(uuid_text))
