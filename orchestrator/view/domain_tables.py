"""The domains and the guests of a host, as tables and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console, RenderableType
from rich.text import Text

from hintfleet.program import printable
from hintfleet.settings import DEFAULT_POLICY
from hintfleet.units import format_size
from hintfleet.v1 import host_pb2
from orchestrator.view.figures import NO_FIGURE, first_line, when
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
    books, hinting = guest.ledger, guest.spec.hinting
    began_s = guest.epoch_began_unix_us / 1e6
    return {
        "name": guest.name,
        "uuid": guest.uuid,
        "domain": guest.domain,
        "driver": host_pb2.Driver.Name(guest.spec.driver).lower(),
        "method": host_pb2.Method.Name(guest.spec.method).lower(),
        "isolator": hinting.isolator,
        "policy": hinting.policy or DEFAULT_POLICY.value,
        "trial": guest.trial_id,
        "epoch": guest.epoch,
        "epoch_began": datetime.fromtimestamp(began_s, UTC).isoformat() if began_s else "",
        "not_hinting_because": guest.not_hinting_because,
        "pid": guest.pid,
        "provisioned_bytes": books.provisioned_bytes,
        "resident_bytes": books.resident_bytes,
        "reclaimed_now_bytes": books.reclaimed_now_bytes,
        "reclaimed_total_bytes": books.reclaimed_total_bytes,
        "refaulted_total_bytes": books.refaulted_total_bytes,
        "guest_free_bytes": guest.guest_free_bytes,
        "held_back_bytes": guest.held_back_bytes,
        "resident_parts": _parts_as_data(guest),
        "process_rss_bytes": _process_rss_bytes(guest),
        "earlier_reclaimed_total_bytes": guest.earlier.reclaimed_total_bytes,
        "earlier_refaulted_total_bytes": guest.earlier.refaulted_total_bytes,
    }


def guest_table(guests: Sequence[host_pb2.Guest]) -> RenderableType:
    """Return a table with a row for each guest, or a sentence if there is none."""
    if not guests:
        return Text("this host agent has no guests")
    shown = table(
        ("guest", "method", "hinting"),
        ("memory", "resident", "reclaimed now", "used again", "free in guest", "held back"),
    )
    for guest in guests:
        books = guest.ledger
        sizes = (
            books.provisioned_bytes,
            books.resident_bytes,
            books.reclaimed_now_bytes,
            books.refaulted_total_bytes,
            guest.guest_free_bytes,
            guest.held_back_bytes,
        )
        shown.add_row(
            Text(f"{printable(guest.name)}\n{host_pb2.Driver.Name(guest.spec.driver).lower()}"),
            _method(guest.spec),
            _hinting(guest),
            *map(format_size, sizes),
        )
    return shown


def _parts_as_data(guest: host_pb2.Guest) -> dict[str, int] | None:
    if not _is_told(guest):
        return None
    parts = guest.resident_parts
    return {field.name: getattr(parts, field.name) for field in parts.DESCRIPTOR.fields}


def _process_rss_bytes(guest: host_pb2.Guest) -> int | None:
    return guest.process_rss_bytes if guest.HasField("process_rss_bytes") else None


def memory_table(guests: Sequence[host_pb2.Guest]) -> RenderableType:
    """Return a table of what the resident memory of each guest consists of, or a sentence if there
    is no guest."""
    if not guests:
        return Text("this host agent has no guests")
    parts = ("used", "file cache", "held back", "pieces", "in flight", "waiting", "unexplained")
    shown = table(("guest",), ("resident", *parts, "process"))
    for guest in guests:
        process_bytes = _process_rss_bytes(guest)
        told = f"told {_seconds(guest.resident_parts.age_ms)} ago" if _is_told(guest) else ""
        shown.add_row(
            Text(f"{printable(guest.name)}\n{told}"),
            *(
                _sizes(guest.resident_parts)
                if _is_told(guest)
                else [format_size(guest.ledger.resident_bytes), *[NO_FIGURE] * len(parts)]
            ),
            NO_FIGURE if process_bytes is None else format_size(process_bytes),
        )
    return shown


def _is_told(guest: host_pb2.Guest) -> bool:
    return guest.HasField("resident_parts")


def _sizes(parts: host_pb2.ResidentParts) -> list[str]:
    held_back = format_size(parts.held_back_bytes)
    if parts.held_back_bytes:
        held_back += f"\n{_seconds(parts.held_back_for_ms)} more"
    return [
        format_size(parts.resident_bytes),
        format_size(parts.used_bytes),
        format_size(parts.file_cache_bytes),
        held_back,
        format_size(parts.free_pieces_bytes),
        format_size(parts.in_flight_bytes),
        format_size(parts.waiting_bytes),
        format_size(parts.unexplained_bytes),
    ]


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.0f} s"


def _method(spec: host_pb2.GuestSpec) -> str:
    method = host_pb2.Method.Name(spec.method).lower()
    if spec.method != host_pb2.HINTING:
        return method
    policy = spec.hinting.policy or DEFAULT_POLICY.value
    return "\n".join((" ".join(filter(None, (method, spec.hinting.isolator))), policy))


def _hinting(guest: host_pb2.Guest) -> Text:
    """Return when the session of a guest began, or why the guest does not hint; `-` if its method
    is not hinting."""
    if guest.spec.method != host_pb2.HINTING:
        return Text(NO_FIGURE)
    if why := guest.not_hinting_because:
        return Text(f"no: {first_line(why)}", style="yellow")
    return Text(f"since {when(guest.epoch_began_unix_us)}", style="green")
