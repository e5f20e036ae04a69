"""The parts of what is resident: they add up, whatever a guest says, and what the guest's figures
cannot explain is shown."""

from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import InvalidInput
from hintfleet.units import GIB, MIB
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.api.resident_parts import aged, resident_parts
from host_agent.session.validation import check_telemetry

Parts = host_pb2.ResidentParts


def told(held_back: int = 0, for_ms: int = 0, **mib: int) -> hinting_pb2.Telemetry:
    """Return the telemetry of a guest that has so much memory of each kind, in MiB."""
    sizes = {f"{name}_bytes": size * MIB for name, size in mib.items()}
    use = hinting_pb2.MemoryUse(total_bytes=sum(sizes.values()), **sizes)
    return hinting_pb2.Telemetry(
        memory=use, held_back_bytes=held_back * MIB, held_back_for_ms=for_ms
    )


def parts_of(telemetry: hinting_pb2.Telemetry, resident: int, provisioned: int = 0) -> Parts:
    provisioned_bytes = provisioned * MIB or telemetry.memory.total_bytes
    ledger = host_pb2.Ledger(provisioned_bytes=provisioned_bytes, resident_bytes=resident * MIB)
    found = resident_parts(ledger, telemetry)
    assert found is not None
    return found


def in_mib(parts: Parts) -> dict[str, float]:
    return {
        field.name.removesuffix("_bytes"): value / MIB
        for field, value in parts.ListFields()
        if field.name.endswith("_bytes")
    }


GUEST = {"used": 300, "file_cache": 100, "free_pieces": 24, "free_chunks": 500, "isolated": 100}


def test_absent_memory_is_taken_from_the_free_chunks() -> None:
    assert in_mib(parts_of(told(held_back=200, **GUEST), resident=924)) == {
        "resident": 924,
        "used": 300,
        "file_cache": 100,
        "free_pieces": 24,
        "in_flight": 100,
        "held_back": 200,
        "waiting": 200,
    }


def test_what_is_free_and_resident_is_first_in_flight_then_held_back() -> None:
    telemetry = told(held_back=200, **GUEST)
    assert in_mib(parts_of(telemetry, 424 + 250)) | {"waiting": 0} == {
        "resident": 674,
        "used": 300,
        "file_cache": 100,
        "free_pieces": 24,
        "in_flight": 100,
        "held_back": 150,
        "waiting": 0,
    }
    assert parts_of(telemetry, 424 + 60).in_flight_bytes == 60 * MIB, "the rest is punched already"


def test_what_free_chunks_cannot_hold_of_absent_memory_is_in_pieces() -> None:
    parts = parts_of(told(**GUEST), resident=410)
    assert (parts.waiting_bytes, parts.free_pieces_bytes) == (0, 10 * MIB)
    assert parts.unexplained_bytes == 0


def test_absent_memory_that_is_not_free_is_unexplained() -> None:
    parts = parts_of(told(**GUEST), resident=390)
    assert parts.unexplained_bytes == -10 * MIB
    assert parts.waiting_bytes == parts.free_pieces_bytes == 0


def test_figures_that_do_not_add_up_are_unexplained() -> None:
    lies = told(**GUEST)
    lies.memory.used_bytes -= 50 * MIB
    assert parts_of(lies, resident=924).unexplained_bytes == 50 * MIB


def test_memory_that_is_not_the_kernels_is_absent() -> None:
    """Such memory is plugged and not online yet, for example."""
    parts = parts_of(told(**GUEST), resident=924, provisioned=1024 + 128)
    assert (parts.waiting_bytes, parts.unexplained_bytes) == (400 * MIB, 0)


def test_an_old_agent_explains_nothing() -> None:
    ledger = host_pb2.Ledger(provisioned_bytes=GIB, resident_bytes=GIB)
    assert resident_parts(ledger, hinting_pb2.Telemetry(free_bytes=MIB)) is None
    assert aged(None, 1.0) is None


def test_a_guest_with_memory_that_the_host_does_not_know_is_not_explained() -> None:
    ledger = host_pb2.Ledger(provisioned_bytes=GIB // 2, resident_bytes=GIB // 2)
    assert resident_parts(ledger, told(**GUEST)) is None


def test_time_passes_until_the_parts_are_shown() -> None:
    parts = parts_of(told(held_back=8, for_ms=2500, **GUEST), resident=1000)
    shown = aged(parts, 1.5)
    assert shown is not None
    assert (shown.age_ms, shown.held_back_for_ms) == (1500, 1000)
    late = aged(parts, 1e9)
    assert late is not None
    assert (late.age_ms, late.held_back_for_ms) == ((1 << 32) - 1, 0)
    assert parts.age_ms == 0, "what is stored is not changed"


def test_until_when_is_only_told_of_what_is_held_back() -> None:
    assert parts_of(told(held_back=8, for_ms=2500, **GUEST), resident=424).held_back_for_ms == 0


ANY = st.integers(0, (1 << 64) - 1)


@given(
    figures=st.lists(ANY | st.integers(0, GIB), min_size=6, max_size=6),
    others=st.lists(st.integers(0, GIB), min_size=2, max_size=2),
    for_ms=st.integers(0, (1 << 32) - 1),
    provisioned=st.integers(0, 1 << 50),
    resident=st.integers(0, 1 << 50),
)
def test_whatever_a_guest_says_is_refused_or_adds_up(
    figures: list[int], others: list[int], for_ms: int, provisioned: int, resident: int
) -> None:
    fields = [field.name for field in hinting_pb2.MemoryUse.DESCRIPTOR.fields]
    use = hinting_pb2.MemoryUse(**dict(zip(fields, figures, strict=True)))
    free_bytes, held_back_bytes = others
    telemetry = hinting_pb2.Telemetry(
        memory=use,
        free_bytes=free_bytes,
        held_back_bytes=held_back_bytes,
        held_back_for_ms=for_ms,
    )
    try:
        check_telemetry(telemetry, GIB)
    except InvalidInput:
        return
    ledger = host_pb2.Ledger(
        provisioned_bytes=provisioned, resident_bytes=min(resident, provisioned)
    )
    parts = resident_parts(ledger, telemetry)
    if parts is None:
        return
    assert (
        parts.resident_bytes
        == ledger.resident_bytes
        == parts.unexplained_bytes
        + sum(
            (
                *(parts.used_bytes, parts.file_cache_bytes, parts.free_pieces_bytes),
                *(parts.in_flight_bytes, parts.held_back_bytes, parts.waiting_bytes),
            )
        )
    )
