"""Checks that figures and texts which a guest reports about itself are possible. Pure.

A guest may lie. Its figures are stored in samples and tables and added up as 64-bit integers, so
they must at least be possible. Its texts are printed, so they must not control a terminal. Batches
are checked in gate.py, how often a guest may send messages in rate_limits.py.
"""

from __future__ import annotations

from hintfleet.errors import InvalidInput
from hintfleet.settings import LONGEST_TEXT, MAX_ORDER
from hintfleet.sketch import MOST_BUCKETS
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

# The largest figure: in microseconds 285 years, and in bytes more than any machine has. Integers up
# to this one are exact in a double.
_MAX_FIGURE = 1 << 53


_MEMORY_USES = (
    "used_bytes",
    "file_cache_bytes",
    "free_chunks_bytes",
    "free_pieces_bytes",
    "isolated_bytes",
)


def check_hello(hello: pb.Hello) -> None:
    """Check the page size, chunk order and boot id in the first message of a hinting session.

    :raises InvalidInput: the page size is not this host's, or the order or the id is too large.
    """
    if hello.page_size_bytes != PAGE_BYTES:
        raise InvalidInput(
            f"the guest's pages have {hello.page_size_bytes} bytes, those of this host {PAGE_BYTES}"
        )
    _check_at_most("chunk_order", hello.chunk_order, MAX_ORDER)
    _check_at_most("length of boot_id", len(hello.boot_id), LONGEST_TEXT)


def check_telemetry(told: pb.Telemetry, memory_bytes: int) -> None:
    """Check what a guest's agent reports about itself.

    `told` may be about more than `memory_bytes`: somebody else may have plugged memory that this
    host agent does not know of.

    :param memory_bytes: the most memory that the guest can have, as far as this host agent knows.
    :raises InvalidInput: more memory is free than `memory_bytes`, and than `told.memory` has; more
        is held back than is free, or used for something than there is; or another figure is too
        large.
    """
    _check_at_most("free_bytes", told.free_bytes, max(memory_bytes, told.memory.total_bytes))
    _check_at_most("held_back_bytes", told.held_back_bytes, told.free_bytes)
    for name in ("agent_cpu_us", "agent_rss_bytes", "tracker_bytes"):
        _check_at_most(name, getattr(told, name), _MAX_FIGURE)
    use = told.memory
    _check_at_most("total_bytes", use.total_bytes, _MAX_FIGURE)
    for name in _MEMORY_USES:
        _check_at_most(name, getattr(use, name), use.total_bytes)


def check_settled(settled: pb.Settled) -> None:
    """Check a guest's answer to a settle request.

    :raises InvalidInput: a figure is too large.
    """
    _check_at_most("batches", settled.batches, _MAX_FIGURE)
    _check_at_most("hinted_pages", settled.hinted_pages, _MAX_FIGURE // PAGE_BYTES)


def check_done(done: pb.Done, memory_bytes: int) -> None:
    """Check a workload's answer.

    :raises InvalidInput: it is about more memory than `memory_bytes`, or another figure, a sketch
        or the error text is too large.
    """
    for name in ("changed_bytes", "held_bytes"):
        _check_at_most(name, getattr(done, name), memory_bytes)
    # A loop verifies the same pages again and again, so it may count more than the guest has.
    most_pages = _MAX_FIGURE if done.HasField("looped") else memory_bytes // PAGE_BYTES
    for name in ("verified_pages", "wrong_pages"):
        _check_at_most(name, getattr(done, name), most_pages)
    _check_at_most("duration_us", done.duration_us, _MAX_FIGURE)
    _check_at_most("length of error", len(done.error), LONGEST_TEXT)
    _check_looped(done.looped)


def _check_looped(looped: pb.Looped) -> None:
    for name in ("cycles", "touched_bytes"):
        _check_at_most(name, getattr(looped, name), _MAX_FIGURE)
    for name in ("allocation_us", "bytes_per_s"):
        sketch: pb.Sketch = getattr(looped, name)
        buckets = sketch.first_bucket + len(sketch.counts)
        _check_at_most(f"last bucket of {name}", buckets, MOST_BUCKETS)
        _check_at_most(f"sum of {name}", sum(sketch.counts), _MAX_FIGURE)


def printable(text: str) -> str:
    """Return a guest's text with all unprintable characters replaced, except line feeds."""
    # Escape sequences from a guest could move the cursor or rewrite earlier lines.
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _check_at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise InvalidInput(f"the guest says that {name} is {value}; the maximum is {most}")
