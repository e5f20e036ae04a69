"""Shows the domains and the guests of a host."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.text import Text

from hintfleet.program import printable
from hintfleet.units import format_size
from hintfleet.v1 import host_pb2
from orchestrator.view.tables import table


def domain_table(domains: Sequence[host_pb2.Domain]) -> RenderableType:
    """Return a table with a row for each obstacle of each domain, or a sentence if there is no
    domain. A domain without obstacles has one row."""
    if not domains:
        return Text("this host's libvirt has no domains")
    shown = table(("domain", "in the way", "change"), ("memory",))
    for domain in domains:
        state = "" if domain.running else "\nshut off"
        name = Text(printable(domain.name) + state)
        size = format_size(domain.memory_bytes)
        for obstacle in domain.obstacles:
            shown.add_row(name, Text(printable(obstacle.what)), Text(obstacle.change), size)
            name, size = Text(), ""
        if not domain.obstacles:
            shown.add_row(name, Text("nothing", style="green"), Text(), size)
    return shown


def domain_as_data(domain: host_pb2.Domain) -> dict[str, object]:
    """Return a domain as plain data; bytes are whole numbers."""
    return {
        "name": domain.name,
        "uuid": domain.uuid,
        "running": domain.running,
        "memory_bytes": domain.memory_bytes,
        "obstacles": [{"what": one.what, "change": one.change} for one in domain.obstacles],
    }


def print_domain(domain: host_pb2.Domain) -> None:
    """Print the table of one domain on stdout."""
    Console().print(domain_table([domain]))


def guest_as_data(guest: host_pb2.Guest) -> dict[str, object]:
    """Return a guest as plain data; bytes are whole numbers."""
    books = guest.ledger
    return {
        "name": guest.name,
        "uuid": guest.uuid,
        "driver": host_pb2.Driver.Name(guest.spec.driver).lower(),
        "method": host_pb2.Method.Name(guest.spec.method).lower(),
        "isolator": guest.spec.hinting.isolator,
        "trial": guest.trial_id,
        "epoch": guest.epoch,
        "pid": guest.pid,
        "provisioned_bytes": books.provisioned_bytes,
        "resident_bytes": books.resident_bytes,
        "reclaimed_now_bytes": books.reclaimed_now_bytes,
        "reclaimed_total_bytes": books.reclaimed_total_bytes,
        "refaulted_total_bytes": books.refaulted_total_bytes,
    }


def guest_table(guests: Sequence[host_pb2.Guest]) -> RenderableType:
    """Return a table with a row for each guest, or a sentence if there is none."""
    if not guests:
        return Text("this host agent has no guests")
    shown = table(
        ("guest", "driver", "method"),
        ("memory", "resident", "reclaimed now", "used again"),
    )
    for guest in guests:
        data = guest_as_data(guest)
        method = " ".join(filter(None, (str(data["method"]), guest.spec.hinting.isolator)))
        books = guest.ledger
        sizes = (
            books.provisioned_bytes,
            books.resident_bytes,
            books.reclaimed_now_bytes,
            books.refaulted_total_bytes,
        )
        waits = "" if guest.epoch else "\nits agent has not connected"
        shown.add_row(
            Text(printable(guest.name) + waits),
            str(data["driver"]),
            method,
            *map(format_size, sizes),
        )
    return shown
