"""Makes up the records of trials, and stores a run of them: guests allocate, then free; under arm
`bitmap`, less stays resident. `store_filled_run` stores a run in which guests fill their host."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.cluster.nodes import Node
from orchestrator.experiment import store_records
from orchestrator.results.cost import COUNTERS
from orchestrator.results.footprint import Numbers
from orchestrator.results.store.reader import Store
from orchestrator.results.store.writer import RunHeader, RunWriter
from orchestrator.results.trial_outcome import TrialStatus
from orchestrator.spec import file as spec_file
from orchestrator.spec.model import Spec
from orchestrator.trial.plan import HostTask, Trial, host_tasks, plan_trials
from orchestrator.trial.records import (
    Columns,
    Event,
    GuestEnded,
    GuestFits,
    HostDone,
    HostRanOut,
    PhaseStarted,
    Record,
    Samples,
    StepDone,
)

S = 1_000_000
MIB = 1 << 20
NODE = Node(
    node_id="1a2b",
    name="rack-1",
    address="10.0.0.1",
    environment={"Python": "3.11.2", "ray": "2.60.0", "hintfleet": "0.1.0", "kernel": "Linux 6.1"},
)
QUICKSTART = spec_file.load("quickstart").spec


def phase(title: str, at_s: float, host: str = "h", trial_id: str = "t") -> PhaseStarted:
    return PhaseStarted(
        host=host, trial_id=trial_id, at_unix_us=round(at_s * S), title=title, hold_s=0.0
    )


def guest_records(task: HostTask, end_s: float = 4.0) -> list[Event]:
    """Return the events of a host whose guests did their steps, were read back and ended."""

    def step(guest: str, kind: str, at_s: float) -> StepDone:
        return StepDone(
            host=task.host,
            trial_id=task.trial.trial_id,
            guest=guest,
            at_unix_us=round(at_s * S),
            kind=kind,
            changed_bytes=0,
            held_bytes=0,
            verified_pages=1,
            wrong_pages=0,
            duration_us=0,
        )

    ended = [
        GuestEnded(
            host=task.host,
            trial_id=task.trial.trial_id,
            guest=guest.name,
            at_unix_us=round(end_s * S),
            provisioned_bytes=1 << 28,
            reclaimed_now_bytes=0,
            refaulted_total_bytes=0,
        )
        for guest in task.guests
    ]
    steps = [
        step(guest.name, kind, at_s)
        for guest in task.guests
        for kind, at_s in (("allocate", 1.0), ("verify", end_s - 1))
    ]
    done = HostDone(host=task.host, trial_id=task.trial.trial_id, at_unix_us=round(end_s * S))
    return [*steps, *ended, done]


def left_mib(arm: str, repetition: int) -> int:
    """Make up how many MiB of each guest stay resident after it has freed memory."""
    return (30 if arm == "bitmap" else 100) + repetition


def samples(task: HostTask, times_us: Numbers, **values: Numbers) -> Samples:
    """Return samples of all guests of a host.

    :param values: columns with a value for each time and guest: those of one time are together.
    """
    names = np.array([guest.name for guest in task.guests], dtype=object)
    columns: Columns = {
        "host": np.full(len(times_us) * len(names), task.host, dtype=object),
        "at_unix_us": np.repeat(times_us, len(names)),
        "guest": np.tile(names, len(times_us)),
        **{name: column.astype(np.uint64) for name, column in values.items()},
    }
    return Samples(trial_id=task.trial.trial_id, columns=columns)


def records_of(
    tasks: Mapping[str, HostTask], left: Callable[[str, int], int] = left_mib
) -> Iterator[Record]:
    """Yield the records of hosts. Of each guest, 100 MiB are resident before 3.2 s, then as many
    MiB as `left` returns for arm and repetition."""
    for host, task in tasks.items():
        trial = task.trial
        # Phases have the actor's clock, which is an hour ahead of the host's clock here.
        for title, said_s in (("allocate 192 MiB", 3601), ("free 75 %", 3603), ("verify", 3606)):
            yield phase(title, said_s, host, trial.trial_id)
        names = [guest.name for guest in task.guests]
        times = np.arange(0, 7 * S, S // 10, dtype=np.int64)
        left_now = left(trial.arm.name, trial.repetition)
        resident = np.where(times < 3.2 * S, 100, left_now) * MIB
        spent = np.repeat(times, len(names))
        resident_bytes = np.repeat(resident, len(names))
        counters = dict.fromkeys(COUNTERS, spent)
        yield samples(task, times, resident_bytes=resident_bytes, **counters)
        common: dict[str, Any] = {"host": host, "trial_id": trial.trial_id}
        for name in names:
            for kind, at_s in (("allocate", 1.5), ("free", 3.1), ("verify", 6.5)):
                yield StepDone(
                    **common,
                    guest=name,
                    at_unix_us=round(at_s * S),
                    kind=kind,
                    changed_bytes=70 * MIB,
                    held_bytes=0,
                    verified_pages=1,
                    wrong_pages=0,
                    duration_us=S // 10,
                )
            yield GuestEnded(
                **common,
                guest=name,
                at_unix_us=7 * S,
                provisioned_bytes=256 * MIB,
                reclaimed_now_bytes=0,
                refaulted_total_bytes=0,
            )
        yield HostDone(**common, at_unix_us=7 * S)


def store_trial(
    writer: RunWriter,
    trial: Trial,
    spec: Spec,
    records: Callable[[Mapping[str, HostTask]], Iterable[Record]] = records_of,
) -> None:
    """Store a trial with the records that `records` yields for its hosts; check that its status is
    DONE."""
    tasks = host_tasks(spec, trial)
    writer.begin_trial(trial, dict.fromkeys(tasks, NODE))
    assert store_records(writer, tasks, [list(records(tasks))]).status is TrialStatus.DONE


def store_run(
    folder: Path,
    spec: Spec = QUICKSTART,
    left: Callable[[str, int], int] = left_mib,
    **header: Any,
) -> None:
    """Store a run. By default its texts contain HTML that a report must not interpret.

    :param header: replaces values of the run's header.
    """
    usual: dict[str, Any] = {
        "run_id": "run1",
        "spec": spec,
        "spec_text": "name: </script><b>\n",
        "summary": "a test of <reports>",
        "environment": {"kernel": "Linux & more"},
        "overrides": {"hosts": {"agents": ["unix:/a & b"]}},
    }
    run = RunHeader(**usual | header)
    with Store(folder) as store, RunWriter(store, run) as writer:
        for trial in plan_trials(spec, run.run_id):
            store_trial(writer, trial, spec, partial(records_of, left=left))


def charts_of(page: str) -> dict[str, Any]:
    """Return the charts of a report, by name."""
    found = re.search(r"const charts = Object\.entries\((\{.*\})\);", page)
    assert found
    charts: dict[str, Any] = json.loads(found[1])
    return charts


def store_filled_run(folder: Path, run_id: str = "run1", fitting: int = 5) -> None:
    """Store a run of `density` in which 2 guests fit under `none`, and `fitting` under the other
    arms."""
    spec = spec_file.load("density").spec
    header = RunHeader(run_id=run_id, spec=spec, spec_text="", summary="a test")
    with Store(folder) as store, RunWriter(store, header) as writer:
        for trial in plan_trials(spec, run_id):
            task = host_tasks(spec, trial)["host1"]
            writer.begin_trial(trial, {"host1": NODE})
            store_records(writer, {"host1": task}, [list(_filling(task, fitting))])


def _filling(task: HostTask, fitting: int) -> Iterator[Event]:
    common: dict[str, Any] = {"host": task.host, "trial_id": task.trial.trial_id}
    for i in range(2 if task.trial.arm.name == "none" else fitting):
        yield GuestFits(
            **common, guest=task.guests[i].name, at_unix_us=i * S, used_bytes=(i + 1) * 10 * MIB
        )
    yield HostRanOut(
        **common, at_unix_us=9 * S, used_bytes=99 * MIB, limit_bytes=100 * MIB, enforced=True
    )
    yield HostDone(**common, at_unix_us=9 * S)
