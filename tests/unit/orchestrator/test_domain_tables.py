"""What `hintfleet guests` shows, as an operator reads it."""

from rich.console import Console

from hintfleet.units import GIB
from hintfleet.v1 import host_pb2
from orchestrator.view.domain_tables import guest_as_data, guest_table


def guest(**fields: object) -> host_pb2.Guest:
    spec = host_pb2.GuestSpec(driver=host_pb2.ATTACHED, method=host_pb2.HINTING)
    return host_pb2.Guest(**({"name": "db1", "spec": spec} | fields))  # type: ignore[arg-type]


def shown(*guests: host_pb2.Guest) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(guest_table(guests))
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
