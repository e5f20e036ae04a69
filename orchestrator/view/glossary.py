"""The unit of each figure in the JSON of a run, and what it is a share of or compared with."""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    """What a figure means.

    :ivar unit: `B`, `s`, `µs`, `GiB·min`, `%`, `B/s`, `1` (a share or ratio), or what is counted.
    :ivar of: what it is measured on, counted in or compared with; of a share, the whole.
    """

    unit: str
    of: str


_RESIDENT = "memory of all guests that is resident on their hosts"
_PAIRS = "the arm's trial and the control's of the same repetition, all hosts together"
_ALONE = "a trial, all hosts together; a mean over trials"

# The key is the path of the figure in an item of `arms`, without list indices; for an item of
# `capacities` or `frontier`, that word and the figure's name. One exception: `loops.more_percent`
# is the `more_percent` of every figure of a loop. An interval with mean, low and high has the unit
# of its figure, and no entry of its own.
GLOSSARY: dict[str, Meaning] = {
    "trials": Meaning("trials", "the arm"),
    "left_out_pairs": Meaning("pairs", "pairs"),
    "pairs": Meaning("pairs", "repetitions that have begun"),
    "control_bytes": Meaning("B", "mean resident memory of the control, in the pairs of saved"),
    "saved_bytes": Meaning("B", f"{_PAIRS}; control minus arm; a share of control_bytes"),
    "saved_gib_min": Meaning("GiB·min", f"{_PAIRS}; control minus arm"),
    "footprint.provisioned_bytes": Meaning("B", "memory that all guests were promised"),
    "footprint.peak_resident_bytes": Meaning("B", f"{_RESIDENT}; the highest of all trials"),
    "footprint.mean_resident_bytes": Meaning("B", f"{_RESIDENT}; a mean over time and trials"),
    "footprint.resident_gib_min": Meaning("GiB·min", f"{_RESIDENT}, over the measured window"),
    "footprint.reclaimed_now_bytes": Meaning("B", "the end of a trial; a mean over trials"),
    "footprint.refaulted_total_bytes": Meaning("B", _ALONE),
    "footprint.verified_pages": Meaning("pages of 4 KiB", "all trials"),
    "footprint.wrong_pages": Meaning("pages of 4 KiB", "footprint.verified_pages"),
    "footprint.coincidence": Meaning("1", "the sum of what each guest's workload held at its peak"),
    "footprint.returned.freed_bytes": Meaning("B", "all free steps of all trials"),
    "footprint.returned.left_bytes": Meaning("B", "footprint.returned.freed_bytes"),
    "footprint.returned.after_s": Meaning("s", "the shortest time after a free step"),
    "footprint.returned.share": Meaning("1", "footprint.returned.freed_bytes"),
    "cost.settle_s": Meaning("s", "the time from a free step until 95 % of what came back is back"),
    "cost.slowest_settle_s": Meaning("s", "the longest of these times"),
    "cost.asked_settle_s": Meaning("s", "a call of Settle; a mean"),
    "cost.slowdown_percent": Meaning("%", f"{_PAIRS}; the control's time for the same steps"),
    "cost.guest_cpu_s": Meaning("s", f"{_PAIRS}; arm minus control"),
    "cost.host_cpu_s": Meaning("s", f"{_PAIRS}; arm minus control; guest_cpu_s is a part of it"),
    "cost.observing_cpu_s": Meaning("s", _ALONE),
    "cost.wire_bytes_per_range": Meaning("B", "a range of free pages that was sent"),
    "cost.tracker_bytes": Meaning("B", "a guest; the most of all"),
    "precision.half_width_bytes": Meaning("B", "the interval of saved_bytes"),
    "precision.wanted_bytes": Meaning("B", "the interval of saved_bytes"),
    "precision.more_repetitions": Meaning("repetitions", "besides those that have run"),
    "loops.cycles": Meaning("cycles", "a guest and a trial; a mean"),
    "loops.allocation_p50_us": Meaning("µs", "an extent of 2 MiB; all guests of a trial"),
    "loops.allocation_p99_us": Meaning("µs", "an extent of 2 MiB; all guests of a trial"),
    "loops.bytes_per_s": Meaning("B/s", "a guest"),
    "loops.bytes_per_s_p1": Meaning("B/s", "a guest, in 100 ms; the slowest hundredth"),
    "loops.more_percent": Meaning("%", f"{_PAIRS}; the control's figure"),
    "capacities.trials": Meaning("trials", "the arm"),
    "capacities.guests": Meaning("guests", "all hosts of a trial; a mean over trials"),
    "capacities.fewest": Meaning("guests", "all hosts of a trial"),
    "capacities.most": Meaning("guests", "all hosts of a trial"),
    "capacities.more": Meaning("guests", f"{_PAIRS}; arm minus control"),
    "frontier.guests": Meaning("guests", "a host"),
    "frontier.overcommit": Meaning("1", "the memory of the host"),
    "frontier.hosts": Meaning("hosts", "all trials"),
    "frontier.ran_out": Meaning("hosts", "frontier.hosts"),
    "frontier.low": Meaning("1", "frontier.hosts; the low end of the interval of ran_out"),
    "frontier.high": Meaning("1", "frontier.hosts; the high end of the interval of ran_out"),
}


def glossary() -> dict[str, dict[str, str]]:
    """Return the glossary as plain data: `{"saved_bytes": {"unit": "B", "of": ...}, ...}`."""
    return {name: meaning._asdict() for name, meaning in GLOSSARY.items()}
