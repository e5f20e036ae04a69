"""Names, defaults and bounds that spec files, host agents and guest agents share.

GuestSpec (host.proto) carries the names as text and leaves a setting empty or 0 for its
default; a spec file and the guest agent's configuration use the same names. Each stands
here once.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class Driver(StrEnum):
    """What a guest is."""

    EMBEDDED = "embedded"
    LIBVIRT = "libvirt"


class Method(StrEnum):
    """How memory comes back."""

    NONE = "none"
    HINTING = "hinting"
    REPORTING = "reporting"
    BALLOON = "balloon"


class Policy(StrEnum):
    """When memory comes back."""

    EAGER = "eager"
    COLD = "cold"
    PRESSURE = "pressure"


class IsolatorKind(StrEnum):
    """What takes free chunks out of a guest's allocator."""

    KMOD = "kmod"
    HUGETLB = "hugetlb"
    EMBEDDED = "embedded"


class TrackerKind(StrEnum):
    """What knows which free chunks are new."""

    BITMAP = "bitmap"
    REPORTED = "reported"


class HintingParts(NamedTuple):
    """An isolator and the tracker that feeds it."""

    isolator: IsolatorKind
    tracker: TrackerKind


PARTS: Mapping[Driver, tuple[HintingParts, ...]] = {
    Driver.EMBEDDED: (
        HintingParts(IsolatorKind.EMBEDDED, TrackerKind.BITMAP),
        HintingParts(IsolatorKind.EMBEDDED, TrackerKind.REPORTED),
    ),
    Driver.LIBVIRT: (
        HintingParts(IsolatorKind.KMOD, TrackerKind.REPORTED),
        HintingParts(IsolatorKind.HUGETLB, TrackerKind.BITMAP),
    ),
}
"""What each driver has; the first pair is what a guest gets that asks for neither.

Isolator and tracker go together: the hugetlb pool knows nothing of the buddy allocator, so
its tracker reads the kernel's page flags into a bitmap; the module is told by the kernel,
which marks what it has reported."""

COLD_PARTS = HintingParts(IsolatorKind.EMBEDDED, TrackerKind.BITMAP)
"""The only pair that knows since when a chunk is free."""

DEFAULT_POLICY = Policy.EAGER

MAX_ORDER = 10
"""The largest order, inclusive, of the kernel's buddy allocator on x86-64 (MAX_ORDER since
Linux 6.4, MAX_ORDER - 1 before): blocks of 4 MiB."""

HUGE_PAGE_ORDER = 9
"""Of the 2 MiB pages that isolator hugetlb deals in."""

DEFAULT_CHUNK_ORDER = 9

DEFAULT_THRESHOLD_CHUNKS = 16
MOST_THRESHOLD_CHUNKS = 1 << 20

DEFAULT_REPORT_PERIOD_MS = 100
SHORTEST_REPORT_PERIOD_MS = 10
"""A guest that is told less looks no more often than this."""

DEFAULT_COLD_AFTER_MS = 5000
DEFAULT_PRESSURE_PERCENT = 80

DEFAULT_RESERVE_PERCENT = 10
DEFAULT_STEP_PERCENT = 5

SHORTEST_SAMPLE_PERIOD_MS = 10

DEFAULT_ORPHAN_AFTER_S = 60
DEFAULT_WATCH_GRACE_S = 30
"""Of a host agent that keeps its state; a guest without one ends after the first, and an
adopted guest that no trial watches after the second."""


def hinting_parts(driver: Driver, isolator: str = "", tracker: str = "") -> HintingParts | None:
    """Return the first pair of the driver that has what is named; empty names fit all.

    None if there is no such pair.
    """
    for parts in PARTS[driver]:
        if isolator in ("", parts.isolator) and tracker in ("", parts.tracker):
            return parts
    return None


def policies_of(parts: HintingParts) -> tuple[Policy, ...]:
    """Return the policies that this isolator and tracker can follow."""
    return tuple(p for p in Policy if p is not Policy.COLD or parts == COLD_PARTS)
