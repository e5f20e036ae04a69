"""What `hintfleet guests` shows, as an operator reads it."""

from collections.abc import Callable, Sequence

from rich.console import Console, RenderableType

from hintfleet.units import GIB, MIB
from hintfleet.v1 import host_pb2
from orchestrator.view.domain_tables import guest_as_data, guest_table, memory_table

Table = Callable[[Sequence[host_pb2.Guest]], RenderableType]


def guest(**fields: object) -> host_pb2.Guest:
    spec = host_pb2.GuestSpec(driver=host_pb2.ATTACHED, method=host_pb2.HINTING)
    return host_pb2.Guest(**({"name": "db1", "spec": spec} | fields))  # type: ignore[arg-type]


def shown(*guests: host_pb2.Guest, table: Table = guest_table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table(guests))
    return " ".join(capture.get().split())


def test_a_guest_that_hints_shows_since_when_and_its_free_memory() -> None:
    has = {"guest_free_bytes": 3 * GIB, "held_back_bytes": GIB // 4}
    text = shown(guest(epoch_began_unix_us=1_700_000_000_000_000, **has))
    assert "since 2023-11-1" in text
    assert "3 GiB" in text
    assert "256 MiB" in text
    assert "adaptive" in text, "the policy that is used if none was asked for"


def test_a_guest_that_does_not_hint_shows_why() -> None:
    assert "no: its memory door is not open" in shown(
        guest(not_hinting_because="its memory door is not open")
    )


def test_scripts_get_the_same() -> None:
    data = guest_as_data(guest(domain="db1", epoch_began_unix_us=1_700_000_000_500_000))
    assert data["domain"] == "db1"
    assert data["policy"] == "adaptive"
    assert data["epoch_began"] == "2023-11-14T22:13:20.500000+00:00"
    assert guest_as_data(guest())["epoch_began"] == ""


PARTS = host_pb2.ResidentParts(
    resident_bytes=700 * MIB,
    used_bytes=301 * MIB,
    file_cache_bytes=102 * MIB,
    held_back_bytes=203 * MIB,
    held_back_for_ms=7400,
    free_pieces_bytes=24 * MIB,
    in_flight_bytes=5 * MIB,
    waiting_bytes=66 * MIB,
    unexplained_bytes=-1 * MIB,
    age_ms=3100,
)


def test_what_is_resident_is_shown_in_parts() -> None:
    text = shown(guest(resident_parts=PARTS, process_rss_bytes=88 * MIB), table=memory_table)
    for size in (700, 301, 102, 203, 24, 5, 66, -1, 88):
        assert f" {size} MiB" in text
    assert "told 3 s ago" in text
    assert "7 s more" in text


def test_a_guest_that_does_not_tell_has_no_figures() -> None:
    ledger = host_pb2.Ledger(resident_bytes=512 * MIB)
    text = shown(guest(ledger=ledger), table=memory_table)
    assert "512 MiB" in text
    assert text.count(" -") == 8, "seven parts, and the process"
    assert " 0 B" not in text
    assert memory_table([])


def test_scripts_get_the_parts_or_null() -> None:
    data = guest_as_data(guest(resident_parts=PARTS, process_rss_bytes=5))
    assert data["resident_parts"] == {
        field.name: getattr(PARTS, field.name) for field in PARTS.DESCRIPTOR.fields
    }
    assert data["process_rss_bytes"] == 5
    silent = guest_as_data(guest())
    assert (silent["resident_parts"], silent["process_rss_bytes"]) == (None, None)
