"""Names, defaults and bounds that spec files, host agents and guest agents share.

GuestSpec (host.proto), spec files and the guest agent's configuration use these names as text.
In a GuestSpec, an empty or 0 setting means the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class Driver(StrEnum):
    """What a guest is: a process, or a virtual machine."""

    EMBEDDED = "embedded"
    LIBVIRT = "libvirt"


class Method(StrEnum):
    """How freed memory comes back to the host."""

    NONE = "none"
    HINTING = "hinting"
    REPORTING = "reporting"
    BALLOON = "balloon"


class Policy(StrEnum):
    """When freed memory comes back to the host."""

    EAGER = "eager"
    COLD = "cold"
    PRESSURE = "pressure"


class IsolatorKind(StrEnum):
    """The part that takes free chunks out of a guest's allocator."""

    KMOD = "kmod"
    HUGETLB = "hugetlb"
    EMBEDDED = "embedded"


class TrackerKind(StrEnum):
    """The part that knows which free chunks are new."""

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
"""The pairs that each driver can run; the first is the default.

Not all pairs are possible. The hugetlb pool knows nothing of the buddy allocator, so its tracker
reads the kernel's page flags into a bitmap. The kernel itself calls the module, and marks the
chunks that it has reported."""

COLD_PARTS = HintingParts(IsolatorKind.EMBEDDED, TrackerKind.BITMAP)
"""The only pair that knows how long a chunk has been free."""

DEFAULT_POLICY = Policy.EAGER

# The largest order of the kernel's buddy allocator on x86-64: blocks of 4 MiB. The kernel's own
# MAX_ORDER means this since Linux 6.4; before, it was one more.
MAX_ORDER = 10

HUGE_PAGE_ORDER = 9
"""The order of the 2 MiB pages that isolator hugetlb uses."""

# pageblock_order on x86-64, which the kernel's page reporting uses, too
# (mm/page_reporting.h: PAGE_REPORTING_MIN_ORDER).
DEFAULT_CHUNK_ORDER = 9

DEFAULT_THRESHOLD_CHUNKS = 16
MOST_THRESHOLD_CHUNKS = 1 << 20

DEFAULT_REPORT_PERIOD_MS = 100
SHORTEST_REPORT_PERIOD_MS = 10
"""A guest uses this one if it is told a shorter one."""

DEFAULT_COLD_AFTER_MS = 5000
DEFAULT_PRESSURE_PERCENT = 80

DEFAULT_RESERVE_PERCENT = 10
DEFAULT_STEP_PERCENT = 5

SHORTEST_SAMPLE_PERIOD_MS = 10

DEFAULT_ORPHAN_AFTER_S = 60
DEFAULT_WATCH_GRACE_S = 30
"""Both for a host agent with --state. A guest without a host agent ends after the first one; a
guest that was adopted and that no trial watches ends after the second one."""


def hinting_parts(driver: Driver, isolator: str = "", tracker: str = "") -> HintingParts | None:
    """Return the driver's first pair with this isolator and tracker; empty names match any.

    None if there is no such pair.
    """
    for parts in PARTS[driver]:
        if isolator in ("", parts.isolator) and tracker in ("", parts.tracker):
            return parts
    return None


def policies_of(parts: HintingParts) -> tuple[Policy, ...]:
    """Return the policies that this isolator and tracker can follow."""
    return tuple(p for p in Policy if p is not Policy.COLD or parts == COLD_PARTS)


ATTACHED_CONFIG_PATH = "/etc/hintfleet/guest.json"
"""Where the agent's configuration is in a guest whose domain was there before."""
