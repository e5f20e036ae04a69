"""Makes the messages about guests, and decides which samples need not be sent."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.api.resident_parts import aged
from host_agent.budget.budget import Budget
from host_agent.cpu_meter import CpuMeter
from host_agent.guest import Guest, has_memory
from host_agent.memory.audit_pace import CALM_PAGES

_CALM_BYTES = CALM_PAGES * PAGE_BYTES
# The most samples that are left out in a row: host.proto promises it for Watch.
_MAX_LEFT_OUT = 3


async def guest_message(guest: Guest) -> host_pb2.Guest:
    """Return a guest as a message of the control API. Its books are audited first."""
    ledger, told, parts = await guest.audits.ledger(), guest.sessions.telemetry, parts_of(guest)
    if not has_memory(guest):
        closed, ledger = ledger, host_pb2.Ledger()
        ledger.CopyFrom(closed)
        ledger.resident_bytes = ledger.reclaimed_now_bytes = ledger.untouched_bytes = 0
        told, parts = hinting_pb2.Telemetry(), None
    return host_pb2.Guest(
        name=guest.name,
        uuid=guest.uuid,
        trial_id=guest.trial_id,
        spec=guest.spec,
        epoch=guest.sessions.epoch,
        ledger=ledger,
        pid=guest.running.pid if guest.running else 0,
        domain=guest.domain,
        hypervisor=guest.running.hypervisor if guest.running else "",
        guest_free_bytes=told.free_bytes,
        held_back_bytes=told.held_back_bytes,
        epoch_began_unix_us=int(guest.sessions.epoch_began_s * 1e6),
        not_hinting_because=guest.why_not_hinting,
        earlier=guest.earlier,
        resident_parts=parts,
        process_rss_bytes=process_rss_bytes(guest),
        boot_id=guest.sessions.boot_id if guest.sessions.is_welcome else "",
    )


def process_rss_bytes(guest: Guest) -> int | None:
    """Return the memory of a guest's process that is not the guest's RAM; None if that is not
    known."""
    running = guest.running  # read once: a thread that answers a scrape may call this
    return guest.process_memory.rss_bytes(running.pid) if running else None


def parts_of(guest: Guest) -> host_pb2.ResidentParts | None:
    """Return what the resident memory of a guest consisted of at its last telemetry; None if that
    is not known."""
    sessions = guest.sessions
    return aged(sessions.resident_parts, time.monotonic() - sessions.telemetry_at_s)


def sample_set(guests: Iterable[Guest], budget: Budget, observing: CpuMeter) -> host_pb2.SampleSet:
    """Return a sample of each running guest among `guests`, and how much of the budget is used.

    :param observing: the processor time of making the samples is added to it, and its sum is
        returned with them.
    """
    with observing.running():
        samples = [_sample(guest) for guest in guests if has_memory(guest)]
        current = host_pb2.SampleSet(
            at_unix_us=time.time_ns() // 1000,
            samples=samples,
            budget_use=budget.use(sample.ledger.resident_bytes for sample in samples),
        )
    current.host_agent_cpu_us = time.process_time_ns() // 1000
    current.observing_cpu_us = observing.cpu_ns // 1000
    return current


def _sample(guest: Guest) -> host_pb2.Sample:
    told = guest.sessions.telemetry
    return host_pb2.Sample(
        guest_name=guest.name,
        ledger=guest.memory.books_now(),
        agent_cpu_us=told.agent_cpu_us,
        agent_rss_bytes=told.agent_rss_bytes,
        tracker_bytes=told.tracker_bytes,
        guest_free_bytes=told.free_bytes,
        held_back_bytes=told.held_back_bytes,
        refusals=guest.sessions.refusals,
        process_cpu_us=_cpu_us(guest.running.pid) if guest.running else 0,
        resident_parts=parts_of(guest),
        process_rss_bytes=process_rss_bytes(guest),
    )


def _cpu_us(pid: int) -> int:
    """Return the CPU time of a process in microseconds; 0 if it is gone."""
    # The clock that clock_getcpuclockid(3) returns for the process (include/linux/posix-timers.h:
    # CPUCLOCK_SCHED is 2). Python has such a function for threads only.
    clock = (~pid << 3) | 2
    try:
        return time.clock_gettime_ns(clock) // 1000
    except OSError:
        return 0


class SampleFilter:
    """Leaves out samples that hardly differ from the last one sent, at most three in a row: sending
    a sample costs more than making it. Before a sample that differs, the last one that was left out
    is sent. So a line drawn through the samples is never far from the truth."""

    def __init__(self) -> None:
        self._sent: host_pb2.SampleSet | None = None
        self._left_out = 0
        self._held: host_pb2.SampleSet | None = None

    def to_send(
        self, current: host_pb2.SampleSet, *, commanded: bool = False
    ) -> Iterator[host_pb2.SampleSet]:
        """Take the current sample; yield what to send now: nothing; `current`; or the last one that
        was left out, then `current`.

        :param commanded: whether a command was answered since the last sample. Then the current
            one is sent: the experiment needs the state after its command.
        """
        same = self._sent is not None and not commanded and _hardly_differ(self._sent, current)
        if same and self._left_out < _MAX_LEFT_OUT:
            self._held = current
            self._left_out += 1
            return
        if self._held is not None and not same:
            yield self._held
        self._held, self._sent, self._left_out = None, current, 0
        yield current


def _hardly_differ(sent: host_pb2.SampleSet, current: host_pb2.SampleSet) -> bool:
    before, now = sent.budget_use, current.budget_use
    return (
        len(current.samples) == len(sent.samples)
        and now.oom_count == before.oom_count
        and abs(now.used_bytes - before.used_bytes) < _CALM_BYTES
        and _is_over(now) == _is_over(before)
        and all(map(_alike, sent.samples, current.samples))
    )


def _is_over(use: host_pb2.BudgetUse) -> bool:
    return use.used_bytes > use.limit_bytes


def _alike(one: host_pb2.Sample, other: host_pb2.Sample) -> bool:
    a, b = one.ledger, other.ledger
    return (
        one.guest_name == other.guest_name
        and abs(a.resident_bytes - b.resident_bytes) < _CALM_BYTES
        and (a.provisioned_bytes, a.hinted_total_bytes, a.reclaimed_total_bytes)
        == (b.provisioned_bytes, b.hinted_total_bytes, b.reclaimed_total_bytes)
        and abs(a.refaulted_total_bytes - b.refaulted_total_bytes) < _CALM_BYTES
        and abs(a.untouched_bytes - b.untouched_bytes) < _CALM_BYTES
        and one.refusals == other.refusals
    )
