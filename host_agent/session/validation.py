"""What a guest says of itself, held against what can be; pure.

A guest may lie. What it says ends up in samples, tables and sums of 64-bit integers, so
it must at least be possible; and what is printed must not steer a terminal.
"""

from __future__ import annotations

from hintfleet.errors import InvalidInput
from hintfleet.settings import MAX_ORDER
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

_MOST = 1 << 53
"""Microseconds in 285 years, and more bytes than a machine has; exact in a double."""

_MOST_TEXT = 1000


def check_hello(hello: pb.Hello) -> None:
    """:raises InvalidInput: of a guest that cannot be hinted for here."""
    if hello.page_size_bytes != PAGE_BYTES:
        raise InvalidInput(
            f"the guest's pages have {hello.page_size_bytes} bytes, this host's {PAGE_BYTES}"
        )
    _check_most("chunk_order", hello.chunk_order, MAX_ORDER)
    _check_most("length of boot_id", len(hello.boot_id), _MOST_TEXT)


def check_telemetry(told: pb.Telemetry, memory_bytes: int) -> None:
    """:raises InvalidInput: more free memory than there is, or figures that cannot be."""
    _check_most("free_bytes", told.free_bytes, memory_bytes)
    for name in ("agent_cpu_us", "agent_rss_bytes", "tracker_bytes"):
        _check_most(name, getattr(told, name), _MOST)


def check_done(done: pb.Done, memory_bytes: int) -> None:
    """:raises InvalidInput: more memory held than there is, or figures that cannot be."""
    for name in ("changed_bytes", "held_bytes"):
        _check_most(name, getattr(done, name), memory_bytes)
    for name in ("verified_pages", "wrong_pages"):
        _check_most(name, getattr(done, name), memory_bytes // PAGE_BYTES)
    _check_most("duration_us", done.duration_us, _MOST)
    _check_most("length of error", len(done.error), _MOST_TEXT)


def printable(text: str) -> str:
    """A guest's words without what would steer a terminal; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _check_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise InvalidInput(f"the guest says {name} is {value}, it can be {most} at the most")
