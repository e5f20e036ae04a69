"""Progress counts the trials that are sure and those that may come, also for a run whose number of
trials is not known."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from orchestrator.results.precision import Look, Reached
from orchestrator.results.store.writer import RunHeader
from orchestrator.results.trial_outcome import TrialOutcome, TrialStatus
from orchestrator.spec.model import Spec, describe
from orchestrator.trial.plan import plan_trials
from orchestrator.trial.records import Samples
from orchestrator.view.live import LiveView, PlainView
from orchestrator.view.progress import Progress
from tests.support.stored import phase
from tests.unit.orchestrator.test_plan import spec

FIXED = spec(repetitions=2)
PRECISE = spec(repetitions=2, precision="5%", max_repetitions=5)
DONE = TrialOutcome(status=TrialStatus.DONE)


def progress(of: Spec, ended: int, kept: int = 0, seconds_each: float = 10.0) -> Progress:
    """Return the progress of a run with three arms, in which `ended` trials have ended after the
    `kept` ones of an earlier start."""
    trials = plan_trials(of, "run")
    found = Progress(trials, 0.0, dict.fromkeys(range(kept), TrialStatus.DONE), of.repetitions)
    for i in range(ended):
        found.trial_started(trials[kept + i], i * seconds_each)
        found.trial_ended(trials[kept + i], undecided=False, now_s=(i + 1) * seconds_each)
    return found


@pytest.mark.parametrize(
    ("of", "ended", "kept", "least", "most"),
    [
        (FIXED, 0, 0, 6, 6),
        (FIXED, 3, 0, 6, 6),
        (PRECISE, 0, 0, 6, 15),
        (PRECISE, 6, 0, 6, 15),
        (PRECISE, 7, 0, 9, 15),
        (PRECISE, 0, 7, 9, 15),
        (PRECISE, 15, 0, 15, 15),
    ],
)
def test_trials_are_counted(of: Spec, ended: int, kept: int, least: int, most: int) -> None:
    found = progress(of, ended, kept)
    assert (found.least_trials, len(found.trials)) == (least, most)
    for arm in found.arms.values():
        assert (arm.least, arm.most) == (least // 3, most // 3)


def test_the_time_left_is_a_range() -> None:
    assert progress(PRECISE, 0).remaining_s(0.0) is None
    assert progress(FIXED, 2).remaining_s(25.0) == (35.0, 35.0)
    assert progress(PRECISE, 2).remaining_s(25.0) == (35.0, 125.0)
    assert progress(PRECISE, 6).remaining_s(60.0) == (0.0, 90.0)


@pytest.mark.parametrize("view", [PlainView, LiveView])
def test_a_view_says_how_many_there_may_be(view: Callable[[Console], LiveView | PlainView]) -> None:
    shown = shown_by(view, PRECISE)
    assert "2 to 5 repetitions, until ±5 %" in shown
    assert "trial 7 of 9 to 15: " in shown
    assert "00:00 to 00:00 left" not in shown
    assert "after 2 repetitions: a ±3 MiB, ±2 MiB wanted, about 4 more at this spread" in shown
    assert "trial 4 of 6: " in shown_by(view, FIXED, trials=4)


def shown_by(view: Callable[[Console], LiveView | PlainView], of: Spec, trials: int = 7) -> str:
    out = io.StringIO()
    shows = view(Console(file=out, width=100, force_terminal=True, color_system=None))
    header = RunHeader(run_id="run", spec=of, spec_text="", summary=describe(of))
    planned = plan_trials(of, "run")
    shows.starting(header, planned, {})
    for trial in planned[:trials]:
        shows.trial_started(trial)
        if trial.position < trials - 1:
            shows.trial_ended(trial, DONE)
        if of is PRECISE and trial.position == 5:
            reached = Reached(half_width_bytes=3 << 20, wanted_bytes=2 << 20, more_repetitions=4)
            shows.looked(Look(repetitions=2, arms={"a": reached, "b": None}))
    if isinstance(shows, LiveView):
        shows.close()
    return out.getvalue()


def test_each_host_gets_its_own_samples() -> None:
    found = progress(FIXED, 0)
    rows = [  # one guest's host, time, resident bytes; two guests on each host
        *[("host1", 1, 10), ("host1", 1, 20), ("host2", 1, 5), ("host2", 1, 6)],
        *[("host1", 2, 30), ("host1", 2, 40)],
    ]
    hosts, times, resident = zip(*rows, strict=True)
    columns = {
        "host": np.array(hosts, dtype=object),
        "at_unix_us": np.array(times, dtype=np.int64),
        "resident_bytes": np.array(resident, dtype=np.uint64),
        "provisioned_bytes": np.full(len(rows), 100, dtype=np.uint64),
    }
    found.record(Samples(trial_id="t", columns=columns))
    found.record(phase("free 75 %", 3, "host2"))
    assert list(found.hosts["host1"].resident_bytes) == [30, 70]
    assert list(found.hosts["host2"].resident_bytes) == [11]
    assert found.hosts["host1"].provisioned_bytes == 200
    assert found.hosts["host2"].phase == "free 75 %"


def test_samples_may_come_while_hosts_are_drawn() -> None:
    found = progress(FIXED, 0)

    class Drawn(int):
        """A value. While it is added to others, samples come, as from another thread."""

        def __radd__(self, other: int) -> int:
            for host in found.hosts.values():
                host.resident_bytes.append(999)
            return other + int(self)

    for name, values in {"host1": (10, 20), "host2": (100, 200)}.items():
        found.record(phase("free 75 %", 1, name))
        found.hosts[name].resident_bytes.extend(map(Drawn, values))
    (group,) = found.host_groups()
    assert group.resident_bytes == [110, 220]
