"""Names, defaults and bounds that spec files, host agents and guest agents share.

Spec files, the guest agent's configuration and, for isolator, tracker and policy, GuestSpec
(host.proto) contain the values of these enums as text. In the hinting and balloon settings of a
GuestSpec, empty or 0 means the default.
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
    """How the host gets back memory that a guest has freed."""

    NONE = "none"
    HINTING = "hinting"
    REPORTING = "reporting"
    BALLOON = "balloon"


class Policy(StrEnum):
    """When the host takes back memory that a guest has freed."""

    ADAPTIVE = "adaptive"
    EAGER = "eager"
    COLD = "cold"
    PRESSURE = "pressure"


class IsolatorKind(StrEnum):
    """The part that takes free chunks out of a guest's allocator."""

    KMOD = "kmod"
    HUGETLB = "hugetlb"
    EMBEDDED = "embedded"


class TrackerKind(StrEnum):
    """The part that records which free chunks have not been hinted yet."""

    BITMAP = "bitmap"
    REPORTED = "reported"


class HintingParts(NamedTuple):
    """The names of an isolator and of the tracker that it works with."""

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

In a real guest, the isolator decides which tracker is used: KMOD is called by the kernel's page
reporting, which itself marks the blocks that it has reported; HUGETLB keeps its own record of the
chunks that it has hinted."""

DEFAULT_POLICY = Policy.ADAPTIVE

# The largest order of the kernel's buddy allocator on x86-64: blocks of 4 MiB. Before Linux 6.4,
# the kernel's own MAX_ORDER was one more than this (11).
MAX_ORDER = 10

HUGE_PAGE_ORDER = 9
"""The order of the 2 MiB pages that isolator hugetlb uses."""

# pageblock_order on x86-64: by default the smallest order that the kernel's page reporting reports
# (mm/page_reporting.c: page_reporting_register; before Linux 5.14 always).
DEFAULT_CHUNK_ORDER = 9

DEFAULT_THRESHOLD_CHUNKS = 16
MOST_THRESHOLD_CHUNKS = 1 << 20

DEFAULT_REPORT_PERIOD_MS = 100
SHORTEST_REPORT_PERIOD_MS = 10
"""A guest that is given a shorter period uses this one."""

DEFAULT_COLD_AFTER_MS = 5000
DEFAULT_BREAK_EVEN_MS = 10_000
DEFAULT_PRESSURE_PERCENT = 80

DEFAULT_RESERVE_PERCENT = 10
DEFAULT_STEP_PERCENT = 5

SHORTEST_SAMPLE_PERIOD_MS = 10

LONGEST_TEXT = 1000
"""How many characters of a guest's text a host agent accepts; a longer one breaks the protocol."""

MOST_PAUSE_MS = 3_600_000
"""The longest pause of a guest's hinting."""
MOST_LOOP_MS = 3_600_000
"""The longest time that a loop of a workload may take."""
MOST_PROGRAM_MS = 86_400_000
"""The longest time that a program in a guest may take."""
MOST_COMPRESSIBLE_PERCENT = 90
"""The largest part of a page that a workload leaves zeros."""

DEFAULT_ORPHAN_AFTER_S = 60
DEFAULT_WATCH_GRACE_S = 30
"""Seconds after its adoption when a guest is ended if nobody watches its trial then.

DEFAULT_ORPHAN_AFTER_S: seconds after which a guest that has no host agent ends by itself. Both are
for the guests that a host agent with --state has made, not for attached ones."""


def hinting_parts(driver: Driver, isolator: str = "", tracker: str = "") -> HintingParts | None:
    """Return the driver's first pair with this isolator and tracker; empty names match any.

    None if there is no such pair.
    """
    for parts in PARTS[driver]:
        if isolator in ("", parts.isolator) and tracker in ("", parts.tracker):
            return parts
    return None


ATTACHED_CONFIG_PATH = "/etc/hintfleet/guest.json"
"""The file in an attached guest that has its agent's configuration."""
