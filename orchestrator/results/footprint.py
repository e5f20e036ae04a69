"""Computes how much memory guests used in one trial, from its samples. Pure.

Resident memory is computed over the measured window, which begins with the first step of the
workload, and ends when the last hold ends and the read-back begins. The creation, the boot and the
end of guests are not part of it. Provisioned, reclaimed and refaulted bytes are from a guest's
final books. Verified and wrong pages are those of all steps, with the read-back. In a block of a
switchback, the window begins with the end of its cut, and ends with the block; the books are those
at its end, and refaulted bytes those of the window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from hintfleet.units import GIB
from orchestrator.spec.phases import Kind
from orchestrator.trial.records import BLOCK_END, CUT, VERIFY, GuestEnded, StepDone

RETURNED_AFTER_S = 3.0
# The longest gap between two samples: so many sample periods, or this time if that is longer. With
# a longer one there is no footprint: memory may have risen and fallen unseen. At rest, gaps of four
# periods are normal (`host_agent.api.sampling`), and a busy machine stands still for a second.
_MAX_GAP_PERIODS = 10
_MAX_GAP_S = 2.0
_US_PER_S = 1_000_000
_BYTE_S_PER_GIB_MIN = GIB * 60

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Resident bytes over time, one value per sample.

    :ivar at_unix_us: the times of the samples; strictly increasing.
    :ivar counters: other columns of the same samples, by column name.
    """

    at_unix_us: Numbers
    resident_bytes: Numbers
    counters: Mapping[str, Numbers] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A span of time in microseconds since 1970, both ends included."""

    start_us: int
    end_us: int


@dataclass(frozen=True, kw_only=True)
class Returned:
    """Memory that left guests for their host after free steps.

    :ivar freed_bytes: the bytes that the workload freed in these steps.
    :ivar left_bytes: by how much resident bytes fell since a step began; negative if they rose.
    :ivar after_s: how long after the end of a step resident bytes were read; the shortest time of
        all steps.
    """

    freed_bytes: int
    left_bytes: float
    after_s: float

    @property
    def share(self) -> float:
        """`left_bytes` divided by `freed_bytes`; negative if resident bytes rose."""
        return self.left_bytes / self.freed_bytes


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The memory that a guest, or several guests together, used in a trial.

    :ivar resident_gib_min: the integral of resident memory over the window, in GiB times minutes.
    :ivar returned: None if no free step freed anything.
    :ivar coincidence: the most that the workloads of a host's guests held together at a time / the
        sum of the most that each held: 1 if all peaks come together, 1 / guests if equal peaks
        never meet. None for a single guest, if nothing was held, and with loops or replays: what
        these hold meanwhile is not recorded.
    """

    provisioned_bytes: int
    peak_resident_bytes: float
    mean_resident_bytes: float
    resident_gib_min: float
    reclaimed_now_bytes: int
    refaulted_total_bytes: int
    verified_pages: int
    wrong_pages: int
    returned: Returned | None
    coincidence: float | None = None


class Undecided(Exception):
    """No figure can be given; the message says why."""


class SamplesMissing(Undecided):
    """Samples have a gap that is too long, or there are none at an end of the window, as when the
    host agent or its machine stands still."""


def guest_footprint(
    guest: str, series: Series, steps: Sequence[StepDone], ended: GuestEnded | None, period_s: float
) -> Footprint:
    """Compute the footprint of one guest.

    :param steps: of this guest, in order; the last one is the read-back, or the end of a
        switchback's block.
    :param ended: the guest's final books; None if the trial ended before they were read.
    :param period_s: the time between two samples that was asked for.
    :raises SamplesMissing: a gap in the samples is too long, or they do not reach both ends of the
        window.
    :raises Undecided: `steps` does not have that last step, or `ended` is None.
    """
    window = window_of(guest, steps)
    if ended is None:
        raise Undecided(f"{guest}: its books were not closed")
    _check_gaps(guest, series, window, period_s)
    return replace(
        _measure(series, window),
        provisioned_bytes=ended.provisioned_bytes,
        reclaimed_now_bytes=ended.reclaimed_now_bytes,
        refaulted_total_bytes=ended.refaulted_total_bytes,
        verified_pages=sum(step.verified_pages for step in steps),
        wrong_pages=sum(step.wrong_pages for step in steps),
        returned=_returned(series, steps),
    )


def host_footprint(
    series: Mapping[str, Series],
    steps: Mapping[str, Sequence[StepDone]],
    guests: Sequence[Footprint],
) -> Footprint:
    """Compute the footprint of all guests of a host together.

    :param guests: the result of `guest_footprint` for each guest.
    """
    # Resident memory is measured on the sum of the series: guests peak at different moments, so
    # the sum of their peaks would be too high.
    windows = [window_of(guest, steps[guest]) for guest in series]
    together = Window(
        start_us=min(w.start_us for w in windows), end_us=max(w.end_us for w in windows)
    )
    return replace(
        _measure(_sum(list(series.values())), together),
        provisioned_bytes=sum(g.provisioned_bytes for g in guests),
        reclaimed_now_bytes=sum(g.reclaimed_now_bytes for g in guests),
        refaulted_total_bytes=sum(g.refaulted_total_bytes for g in guests),
        verified_pages=sum(g.verified_pages for g in guests),
        wrong_pages=sum(g.wrong_pages for g in guests),
        returned=sum_returned([g.returned for g in guests]),
        coincidence=coincidence(steps),
    )


def sum_returned(parts: Sequence[Returned | None]) -> Returned | None:
    """Return the sum of the parts, with the shortest `after_s`; None if all parts are None."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return Returned(
        freed_bytes=sum(part.freed_bytes for part in known),
        left_bytes=sum(part.left_bytes for part in known),
        after_s=min(part.after_s for part in known),
    )


def window_of(guest: str, steps: Sequence[StepDone]) -> Window:
    """Return the measured window of a guest.

    :raises Undecided: its workload, or its block of a switchback, did not finish.
    """
    counted = [step for step in steps if step.kind != CUT]
    if len(counted) < 2 or counted[-1].kind not in (VERIFY, BLOCK_END):
        raise Undecided(f"{guest}: the workload did not finish")
    return Window(start_us=counted[0].started_unix_us, end_us=counted[-1].started_unix_us)


def _check_gaps(guest: str, series: Series, window: Window, period_s: float) -> None:
    at = series.at_unix_us
    # The nearest samples outside the window are included: the values at the ends of the window
    # are interpolated from them.
    first = int(np.searchsorted(at, window.start_us, side="right")) - 1
    last = int(np.searchsorted(at, window.end_us, side="left"))
    if first < 0 or last >= len(at):
        raise SamplesMissing(f"{guest}: no samples at the start or the end of the workload")
    gap_s = float(np.diff(at[first : last + 1]).max(initial=0)) / _US_PER_S
    if gap_s > max(_MAX_GAP_PERIODS * period_s, _MAX_GAP_S):
        raise SamplesMissing(
            f"{guest}: samples are missing for {gap_s:.1f} s (one is due every {period_s:g} s)"
        )


def _measure(series: Series, window: Window) -> Footprint:
    at, resident = _cut(series, window)
    byte_s = float(np.trapezoid(resident, at)) / _US_PER_S
    length_s = (window.end_us - window.start_us) / _US_PER_S
    return Footprint(
        provisioned_bytes=0,
        peak_resident_bytes=float(resident.max()),
        mean_resident_bytes=byte_s / length_s if length_s else float(resident[0]),
        resident_gib_min=byte_s / _BYTE_S_PER_GIB_MIN,
        reclaimed_now_bytes=0,
        refaulted_total_bytes=0,
        verified_pages=0,
        wrong_pages=0,
        returned=None,
    )


def _cut(series: Series, window: Window) -> tuple[Numbers, Numbers]:
    """Return times and resident bytes: the samples inside the window, between two values that are
    interpolated at its ends."""
    at, resident = series.at_unix_us, series.resident_bytes
    ends = np.array([window.start_us, window.end_us])
    inside = (at > window.start_us) & (at < window.end_us)
    start, end = np.interp(ends, at, resident)
    times = np.concatenate(([window.start_us], at[inside], [window.end_us]))
    values = np.concatenate(([start], resident[inside].astype(float), [end]))
    return times, values


def _sum(parts: Sequence[Series]) -> Series:
    """Return the sum of the resident bytes, at the times that all series have."""
    at = parts[0].at_unix_us
    for part in parts[1:]:
        at = np.intersect1d(at, part.at_unix_us, assume_unique=True)
    total = np.zeros(len(at))
    for part in parts:
        total += part.resident_bytes[np.searchsorted(part.at_unix_us, at)]
    return Series(at_unix_us=at, resident_bytes=total)


def coincidence(steps: Mapping[str, Sequence[StepDone]]) -> float | None:
    """Return how far the peaks of what guests' workloads hold coincide (`Footprint.coincidence`).

    :param steps: of each guest, in order.
    """
    peaks = sum(max(step.held_bytes for step in of_guest) for of_guest in steps.values())
    all_steps = (step for of_guest in steps.values() for step in of_guest)
    unknown = any(step.loop or step.kind == Kind.REPLAY for step in all_steps)
    if len(steps) < 2 or not peaks or unknown:
        return None
    changes: list[tuple[int, int]] = []
    for of_guest in steps.values():
        held = 0
        for step in of_guest:
            grown = step.held_bytes - held
            changes.append((step.started_unix_us if grown > 0 else step.at_unix_us, grown))
            held = step.held_bytes
    together = np.cumsum([grown for _, grown in sorted(changes)])
    return float(together.max() / peaks)


def _returned(series: Series, steps: Sequence[StepDone]) -> Returned | None:
    """Return what one guest freed in its free steps, and how much memory left it after them, summed
    over these steps; None if it freed nothing.

    Resident memory at the start of a free step is compared with that 3 s after its end, or at the
    start of the next step if that is earlier.
    """
    parts = []
    for step, following in pairwise(steps):
        if step.kind != "free" or not step.changed_bytes:
            continue
        until_next_s = (following.started_unix_us - step.at_unix_us) / _US_PER_S
        after_s = max(0.0, min(RETURNED_AFTER_S, until_next_s))
        before = _last_seen(series, step.started_unix_us)
        after = _last_seen(series, step.at_unix_us + round(after_s * _US_PER_S))
        parts.append(
            Returned(freed_bytes=step.changed_bytes, left_bytes=before - after, after_s=after_s)
        )
    return sum_returned(parts)


def _last_seen(series: Series, at_us: int) -> float:
    """Return resident bytes in the last sample at or before `at_us`; if none, in the first."""
    # Not interpolated: memory leaves within milliseconds, so the first sample after the start of
    # a step may already be without it, and would falsify the value at the start.
    return float(series.resident_bytes[last_index(series, at_us)])


def last_index(series: Series, at_us: int) -> int:
    """Return the index of the last sample at or before `at_us`; 0 if there is none."""
    return max(int(np.searchsorted(series.at_unix_us, at_us, side="right")) - 1, 0)
