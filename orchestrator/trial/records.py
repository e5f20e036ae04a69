"""Defines the records of a trial. A host's runner yields events and sample sets; its actor turns
the sample sets of all its hosts into Samples. If the actor dies, the orchestrator makes the last
record, HostDone, of each of its hosts whose part of the trial has not ended.

`at_unix_us` is a time in microseconds since 1970: of the host's clock in Samples, StepDone and
HostRanOut, of the orchestrator's clock in the HostDone of an actor that died, and of the actor's
clock in all other records. An actor may run on another machine than its host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hintfleet.sketch import Sketch
from hintfleet.v1 import host_pb2

# Columns of the stored samples, and how each is read from a sample. All are uint64. `columns_of`
# adds five more columns, `process_rss_bytes`, and those of _PARTS.
_COLUMNS: dict[str, Callable[[host_pb2.Sample], int]] = {
    "provisioned_bytes": lambda s: s.ledger.provisioned_bytes,
    "resident_bytes": lambda s: s.ledger.resident_bytes,
    "hinted_total_bytes": lambda s: s.ledger.hinted_total_bytes,
    "reclaimed_total_bytes": lambda s: s.ledger.reclaimed_total_bytes,
    "absent_total_bytes": lambda s: s.ledger.absent_total_bytes,
    "skipped_total_bytes": lambda s: sum(s.ledger.skipped_total_bytes.values()),
    "refaulted_total_bytes": lambda s: s.ledger.refaulted_total_bytes,
    "reclaimed_now_bytes": lambda s: s.ledger.reclaimed_now_bytes,
    "untouched_bytes": lambda s: s.ledger.untouched_bytes,
    "batches": lambda s: s.ledger.batches,
    "wire_bytes": lambda s: s.ledger.wire_bytes,
    "ranges": lambda s: s.ledger.ranges,
    "agent_cpu_us": lambda s: s.agent_cpu_us,
    "agent_rss_bytes": lambda s: s.agent_rss_bytes,
    "tracker_bytes": lambda s: s.tracker_bytes,
    "guest_free_bytes": lambda s: s.guest_free_bytes,
    "process_cpu_us": lambda s: s.process_cpu_us,
}

# Columns with the fields of ResidentParts, from `parts_resident_bytes` to `parts_age_ms`. As
# `process_rss_bytes`, they are int64, and null in a sample that does not have them.
_PARTS = {f"parts_{field.name}": field.name for field in host_pb2.ResidentParts.DESCRIPTOR.fields}

_OF_SETS = {"at_unix_us": np.int64, "host_agent_cpu_us": np.uint64, "observing_cpu_us": np.uint64}
"""Columns whose values all samples of a set share, with their types; fields of SampleSet."""
Columns = dict[str, "np.ndarray[Any, Any]"]


VERIFY = "verify"
CUT, BLOCK, BLOCK_END = "cut", "block", "block end"
"""The steps of a switchback: the beginning of a block, which does not count; the rest of it; and
its end, which takes no time. They give the guest nothing to do: it goes on with its own work."""


@dataclass(frozen=True, kw_only=True)
class HostSamples:
    """A sample set from a host agent; in a switchback, only with samples of the block's guests."""

    host: str
    samples: host_pb2.SampleSet


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples of guests on any number of hosts: one row per guest and time.

    :ivar columns: `host`, `guest`, `at_unix_us`, `host_agent_cpu_us`, `observing_cpu_us`, and those
        in `_COLUMNS`; and `process_rss_bytes` and those in `_PARTS`, which are masked arrays.
    """

    trial_id: str
    columns: Columns

    @property
    def row_count(self) -> int:
        return len(self.columns["guest"])


@dataclass(frozen=True, kw_only=True)
class PhaseStarted:
    """The guests of a host begin a step of the workload or of a switchback, or the read-back at
    the end of the workload.

    If guests are not in step, only the steps of the first guest are announced. With guests that are
    started one by one, a step begins only on the newest.

    :ivar title: the title of the step, after the guest's name if guests are started one by one;
        `verify` for the read-back; of a switchback, the kind of the step.
    :ivar hold_s: how long to wait after the step; 0 for the read-back; of a switchback, how long
        the step lasts.
    :ivar guest: the first guest, for a step of the workload if guests are not in step; else empty.
    """

    host: str
    trial_id: str
    at_unix_us: int
    title: str
    hold_s: float
    guest: str = ""


@dataclass(frozen=True, kw_only=True)
class HypervisorFound:
    """Real guests of a host have this hypervisor; once for each in a trial.

    :ivar hypervisor: as in host_pb2.Guest.
    """

    host: str
    trial_id: str
    at_unix_us: int
    hypervisor: str


@dataclass(frozen=True, kw_only=True)
class LoopFigures:
    """What a loop did.

    :ivar title: of its step. Loops with the same title are compared.
    :ivar cycles: whole cycles.
    :ivar touched_bytes: written, faulted in, or read and written (bandwidth).
    :ivar allocation_us: churn and fault: how long each allocation of an extent took, with the first
        write to it.
    :ivar bytes_per_s: touched bytes per second, one value for each 100 ms or more; with churn, its
        pauses count.
    """

    title: str
    cycles: int
    touched_bytes: int
    allocation_us: Sketch
    bytes_per_s: Sketch


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A guest has done a step; or the points of a replay up to one that failed.

    :ivar kind: a `phases.Kind`, or VERIFY; of a switchback CUT, BLOCK or BLOCK_END.
    :ivar changed_bytes: the bytes that the step allocated or freed.
    :ivar held_bytes: the bytes that the guest's workload holds after the step.
    :ivar waited_us: the part of `duration_us` in which a replay waited for the next point.
    """

    host: str
    trial_id: str
    guest: str
    at_unix_us: int
    kind: str
    changed_bytes: int
    held_bytes: int
    verified_pages: int
    wrong_pages: int
    duration_us: int
    waited_us: int = 0
    loop: LoopFigures | None = None

    @property
    def started_unix_us(self) -> int:
        return self.at_unix_us - self.duration_us


@dataclass(frozen=True, kw_only=True)
class GuestSettled:
    """A Settle call for a guest has returned, `duration_us` after it began; see
    `HostClient.settle`."""

    host: str
    trial_id: str
    guest: str
    at_unix_us: int
    batches: int
    hinted_bytes: int
    duration_us: int


@dataclass(frozen=True, kw_only=True)
class GuestFits:
    """The figure is how many guests a host can run: this one has done its workload, and the host
    has not run out of memory.

    :ivar used_bytes: how much of its memory budget the host uses then.
    """

    host: str
    trial_id: str
    guest: str
    at_unix_us: int
    used_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostRanOut:
    """The guests of a host needed more memory than the host's budget. This ends the host's part of
    the trial; if the figure is how many guests a host can run, those that fit are read back first.

    :ivar at_unix_us: of the sample that shows it: a sample period late at most. That too little
        could be swapped out shows only after a second or more (cgroups v1).
    :ivar enforced: whether a cgroup keeps the guests within the budget: the kernel has killed one
        of them, or could not swap out enough of them; else they were seen to use more.
    """

    host: str
    trial_id: str
    at_unix_us: int
    used_bytes: int
    limit_bytes: int
    enforced: bool


@dataclass(frozen=True, kw_only=True)
class GuestEnded:
    """A guest was destroyed, and the figures are from its final books; or a block of a switchback
    has ended, and they are from the guest's books then. `refaulted_total_bytes` is since the trial
    began; of a block, since the end of its cut."""

    host: str
    trial_id: str
    guest: str
    at_unix_us: int
    provisioned_bytes: int
    reclaimed_now_bytes: int
    refaulted_total_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostDone:
    """A host's part of a trial has ended. This is the last record of that part.

    :ivar undecided: why the part ended early; empty if it was completed, or if the figure is how
        many guests a host can run and the host ran out of memory.
    :ivar lost: whether the reason is that the host agent or its actor was lost.
        results/trial_outcome.py decides whether the trial is run again.
    """

    host: str
    trial_id: str
    at_unix_us: int
    undecided: str = ""
    lost: bool = False


Event = (
    HypervisorFound
    | PhaseStarted
    | StepDone
    | GuestSettled
    | GuestFits
    | HostRanOut
    | GuestEnded
    | HostDone
)
Record = Samples | Event


def columns_of(sets: Sequence[HostSamples]) -> Columns:
    """Convert sample sets into columns, with one row per sample."""
    samples = [sample for host in sets for sample in host.samples.samples]
    counts = [len(host.samples.samples) for host in sets]
    columns: Columns = {
        "host": np.repeat(np.array([host.host for host in sets], dtype=object), counts),
        "guest": np.array([sample.guest_name for sample in samples], dtype=object),
    }
    for name, kind in _OF_SETS.items():
        values = np.array([getattr(host.samples, name) for host in sets], dtype=kind)
        columns[name] = np.repeat(values, counts)
    for name, value in _COLUMNS.items():
        columns[name] = np.array([value(sample) for sample in samples], dtype=np.uint64)
    columns["process_rss_bytes"] = _nullable(
        [one.process_rss_bytes for one in samples],
        [not one.HasField("process_rss_bytes") for one in samples],
    )
    parts = [one.resident_parts for one in samples]
    is_null = [not one.HasField("resident_parts") for one in samples]
    for name, field in _PARTS.items():
        columns[name] = _nullable([getattr(one, field) for one in parts], is_null)
    return columns


def _nullable(values: Sequence[int], is_null: Sequence[bool]) -> np.ndarray[Any, Any]:
    return np.ma.masked_array(values, is_null, dtype=np.int64)
