"""Computes what arms used and saved. The summary of a run, the command `savings` and the fleet
service all use this module.

Savings compare an arm with the control of the same run, pair by pair. A pair is
one repetition (so the same seeds) of the whole fleet, of a host or of a guest, depending on what
the row covers. A row is undecided if a trial of its arm or of the control was cut off, undecided
or lost, even if that was because of a host or guest that the row does not cover: as in
`comparison`, no part of such a trial counts as saved. A row with too few pairs for an interval is
undecided, too. In a switchback, a pair in which a block is undecided, or which has a guest in one
block only, is left out of all figures instead, and `left_out_pairs` counts such pairs: the guests
are somebody else's, who may restart them in any block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import fsum
from typing import Protocol, TypeVar

from orchestrator.results.footprint import Footprint, sum_returned
from orchestrator.results.statistics import (
    Interval,
    mean_interval,
    paired_differences,
    sum_by_trial,
)

_NO_PAIR = (
    "each pair of blocks is left out: a block does not count, or the other one had other guests"
)


class By(StrEnum):
    """What one row of an answer covers: one arm, and the fleet, a host or a guest of one run.

    With ARM it covers one arm, and the fleet in all runs of the same spec.
    """

    FLEET = "fleet"
    HOST = "host"
    GUEST = "guest"
    ARM = "arm"


@dataclass(frozen=True, kw_only=True)
class FootprintRow:
    """The footprint of one host, or of one guest, in one trial.

    :ivar spec_hash: equal for runs of the same spec.
    :ivar guest: empty for all guests of the host together.
    :ivar footprint: None if the host was not measured to the end, or the trial was cut off.
    :ivar undecided: why the trial does not count, for example wrong pages; empty if it counts
        or was cut off.
    :ivar lost: whether the trial is lost: `run --resume` runs it again.
    :ivar first_look: 0 if the run had a fixed number of repetitions, else how many it had when it
        looked first (`statistics.Interval`).
    :ivar left_out: whether the pair of the trial is left out.
    """

    run_id: str
    experiment: str
    spec_hash: str
    arm: str
    is_control: bool
    repetition: int
    host: str
    guest: str
    footprint: Footprint | None
    undecided: str = ""
    lost: bool = False
    first_look: int = 0
    left_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Savings:
    """One row of an answer: what one arm used and saved.

    :ivar run_id: empty with By.ARM, because runs of the same spec are pooled.
    :ivar key: the host's or guest's name (`host/guest` if several hosts of the run have a guest of
        this name); empty with By.FLEET and By.ARM.
    :ivar spec_hash: equal for runs of the same spec.
    :ivar footprint: means over trials (of `coincidence`, over hosts and trials), with three
        exceptions: the peak is the highest of all trials (of several hosts, the sum of their
        peaks), pages and `returned` are sums.
        None if a host or guest has no footprint in a trial of the arm.
    :ivar saved_bytes: mean resident memory saved; None for the control, without a control, and
        where `undecided` is set.
    :ivar control_bytes: the mean resident memory of the control in the same pairs, to give
        `saved_bytes` as a percentage of it; None if `saved_bytes` is None.
    :ivar undecided: why figures are missing or do not count, for example wrong pages or only one
        pair of trials; empty otherwise.
    :ivar left_out_pairs: how many pairs of blocks are left out of a switchback. They count in no
        figure (but in `footprint` and `trials` if all pairs are left out). `pairs` is the number of
        all pairs that have begun, those left out included.
    """

    experiment: str
    spec_hash: str
    run_id: str
    arm: str
    key: str
    trials: int
    footprint: Footprint | None
    saved_bytes: Interval | None = None
    saved_gib_min: Interval | None = None
    control_bytes: float | None = None
    undecided: str = ""
    left_out_pairs: int = 0
    pairs: int = 0


class _Row(Protocol):
    @property
    def left_out(self) -> bool: ...


_R = TypeVar("_R", bound=_Row)


def counted(rows: Sequence[_R]) -> Sequence[_R]:
    """Return these rows without those of pairs that are left out. If that leaves none, return all
    of them, because they say why there is no figure; they must not be compared then."""
    return [row for row in rows if not row.left_out] or rows


def aggregate(rows: Iterable[FootprintRow], by: By) -> list[Savings]:
    """Return a row for each arm of each group.

    Depending on `by`, a group is a run, a host of a run, a guest of a run, or all runs of a spec.
    Groups, and the arms in each, are in the order in which they first appear in `rows`.
    """
    groups: dict[tuple[str, str, str], list[FootprintRow]] = {}
    hosts: dict[tuple[str, str], set[str]] = {}
    measured = [
        row for row in _of_measured_trials(list(rows)) if bool(row.guest) == (by is By.GUEST)
    ]
    for row in measured:
        hosts.setdefault((row.run_id, row.guest), set()).add(row.host)
    for row in measured:
        is_alone = len(hosts[row.run_id, row.guest]) == 1
        groups.setdefault(_group(row, by, is_alone), []).append(row)
    return [saving for key, group in groups.items() for saving in _arms(key, group)]


def _of_measured_trials(rows: Sequence[FootprintRow]) -> Iterator[FootprintRow]:
    """Yield all rows. If any row of a trial has no footprint, none of the rows that are yielded for
    that trial has one."""
    # A trial is one result: when a guest is lost, others on its machine have more room.
    unmeasured = {(row.run_id, row.arm, row.repetition) for row in rows if row.footprint is None}
    for row in rows:
        whole = (row.run_id, row.arm, row.repetition) not in unmeasured
        yield row if whole else replace(row, footprint=None)


def _group(row: FootprintRow, by: By, is_alone: bool) -> tuple[str, str, str]:
    """Return the group of a row: spec hash, run id (empty with By.ARM), key as in `Savings`.

    Arms are compared only within a group.

    :param is_alone: whether no other host of the run has a guest of the same name.
    """
    guest = row.guest if is_alone else f"{row.host}/{row.guest}"
    key = {By.HOST: row.host, By.GUEST: guest}.get(by, "")
    return row.spec_hash, "" if by is By.ARM else row.run_id, key


def _arms(group: tuple[str, str, str], rows: Sequence[FootprintRow]) -> list[Savings]:
    arms: dict[str, list[FootprintRow]] = {}
    for row in counted(rows):
        arms.setdefault(row.arm, []).append(row)
    control = next((arm for arm in arms.values() if arm[0].is_control), [])
    left_out = len({(row.run_id, row.repetition) for row in rows if row.left_out})
    pairs = len({(row.run_id, row.repetition) for row in rows})
    found = (_arm(group, arm, control) for arm in arms.values())
    return [replace(saving, left_out_pairs=left_out, pairs=pairs) for saving in found]


def _arm(
    group: tuple[str, str, str], rows: Sequence[FootprintRow], control: Sequence[FootprintRow]
) -> Savings:
    spec_hash, run_id, key = group
    # One bad trial makes the arm undecided: leaving out only the trials that went wrong would
    # favour an arm that makes trials go wrong.
    undecided = _first_undecided(rows)
    if not undecided and rows[0].left_out:  # no pair of the group counts (`counted`)
        undecided = _first_undecided(control) or _NO_PAIR
    saved_bytes = saved_gib_min = control_bytes = None
    if not undecided and not rows[0].is_control and control:
        undecided = _first_undecided(control)
        if not undecided:
            saved_bytes = _saved(control, rows, lambda f: f.mean_resident_bytes)
            saved_gib_min = _saved(control, rows, lambda f: f.resident_gib_min)
            used = _used_in_pairs(control, rows)
            if saved_bytes:
                control_bytes = fsum(used) / len(used)
            else:
                undecided = _too_few(len(used), rows[0].first_look)
    return Savings(
        experiment=rows[0].experiment,
        spec_hash=spec_hash,
        run_id=run_id,
        arm=rows[0].arm,
        key=key,
        trials=len({(row.run_id, row.repetition) for row in rows}),
        footprint=_together(rows) if all(row.footprint for row in rows) else None,
        saved_bytes=saved_bytes,
        saved_gib_min=saved_gib_min,
        control_bytes=control_bytes,
        undecided=undecided,
    )


def _first_undecided(rows: Iterable[FootprintRow]) -> str:
    return next(
        (
            f"{row.arm}, repetition {row.repetition + 1}, {row.undecided or 'was cut off'}"
            for row in rows
            if row.undecided or row.footprint is None
        ),
        "",
    )


def _saved(
    control: Sequence[FootprintRow],
    rows: Sequence[FootprintRow],
    value: Callable[[Footprint], float],
) -> Interval | None:
    differences = paired_differences(_by_trial(control, value), _by_trial(rows, value))
    return mean_interval(differences, rows[0].first_look)


def _used_in_pairs(control: Sequence[FootprintRow], rows: Sequence[FootprintRow]) -> list[float]:
    """Return the control's mean resident memory in each trial that is one of a pair."""
    treated = {(row.run_id, row.repetition) for row in rows}
    used = _by_trial(control, lambda f: f.mean_resident_bytes)
    return [value for trial, value in used.items() if trial in treated]


def _too_few(pairs: int, first_look: int) -> str:
    needed = max(2, first_look)
    there = "1 pair" if pairs == 1 else f"{pairs} pairs"
    return f"{there} only: an interval needs {needed} repetitions, so {needed - pairs} more"


def _by_trial(
    arm: Sequence[FootprintRow], value: Callable[[Footprint], float]
) -> dict[Hashable, float]:
    """Return the sum of `value` over the rows of each trial, by run id and repetition."""
    return sum_by_trial(
        ((row.run_id, row.repetition), value(row.footprint)) for row in arm if row.footprint
    )


def _together(rows: Sequence[FootprintRow]) -> Footprint:
    footprints = [row.footprint for row in rows if row.footprint is not None]

    def mean(value: Callable[[Footprint], float]) -> float:
        trials = _by_trial(rows, value)
        return fsum(trials.values()) / len(trials)

    return Footprint(
        provisioned_bytes=round(mean(lambda f: f.provisioned_bytes)),
        peak_resident_bytes=_sum_of_peaks(rows),
        mean_resident_bytes=mean(lambda f: f.mean_resident_bytes),
        resident_gib_min=mean(lambda f: f.resident_gib_min),
        reclaimed_now_bytes=round(mean(lambda f: f.reclaimed_now_bytes)),
        refaulted_total_bytes=round(mean(lambda f: f.refaulted_total_bytes)),
        verified_pages=sum(f.verified_pages for f in footprints),
        wrong_pages=sum(f.wrong_pages for f in footprints),
        returned=sum_returned([f.returned for f in footprints]),
        coincidence=_mean_coincidence(footprints),
    )


def _mean_coincidence(footprints: Sequence[Footprint]) -> float | None:
    found = [f.coincidence for f in footprints if f.coincidence is not None]
    return fsum(found) / len(found) if found else None


def _sum_of_peaks(rows: Sequence[FootprintRow]) -> float:
    peaks: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.footprint is not None:
            unit = row.host, row.guest
            peaks[unit] = max(peaks.get(unit, 0.0), row.footprint.peak_resident_bytes)
    return fsum(peaks.values())
