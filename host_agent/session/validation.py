"""Checks that what a guest says of itself is possible. Pure.

A guest may lie. What it says gets into samples, tables and sums of 64-bit integers, so it must at
least be possible. What is printed must not control a terminal. Which batches may run, and when
one is stale, the gate decides (gate.py); how often a guest may speak: rate_limits.py.
"""

from __future__ import annotations

from hintfleet.errors import InvalidInput
from hintfleet.settings import MAX_ORDER
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

# 285 years in microseconds, and more bytes than a machine has. Exact in a double.
_MAX_FIGURE = 1 << 53

_MAX_TEXT_LENGTH = 1000


def check_hello(hello: pb.Hello) -> None:
    """:raises InvalidInput: this host cannot reclaim what such a guest hints."""
    if hello.page_size_bytes != PAGE_BYTES:
        raise InvalidInput(
            f"the guest's pages have {hello.page_size_bytes} bytes, those of this host {PAGE_BYTES}"
        )
    _check_at_most("chunk_order", hello.chunk_order, MAX_ORDER)
    _check_at_most("length of boot_id", len(hello.boot_id), _MAX_TEXT_LENGTH)


def check_telemetry(told: pb.Telemetry, memory_bytes: int) -> None:
    """:raises InvalidInput: it has more free memory than memory, or impossible figures."""
    _check_at_most("free_bytes", told.free_bytes, memory_bytes)
    for name in ("agent_cpu_us", "agent_rss_bytes", "tracker_bytes"):
        _check_at_most(name, getattr(told, name), _MAX_FIGURE)


def check_done(done: pb.Done, memory_bytes: int) -> None:
    """:raises InvalidInput: it holds more memory than it has, or has impossible figures."""
    for name in ("changed_bytes", "held_bytes"):
        _check_at_most(name, getattr(done, name), memory_bytes)
    for name in ("verified_pages", "wrong_pages"):
        _check_at_most(name, getattr(done, name), memory_bytes // PAGE_BYTES)
    _check_at_most("duration_us", done.duration_us, _MAX_FIGURE)
    _check_at_most("length of error", len(done.error), _MAX_TEXT_LENGTH)


def printable(text: str) -> str:
    """Return a guest's text with all unprintable characters replaced, except line feeds."""
    # Escape sequences from a guest could move the cursor or rewrite earlier lines.
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _check_at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise InvalidInput(f"the guest says that {name} is {value}; the maximum is {most}")
