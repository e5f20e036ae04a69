"""The store keeps all that it acknowledged, after its process was killed and on a full disk. Also
the figures and states of runs that are undecided, cut off, resumed or of an earlier version, and
the locks of runs."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pytest

from hintfleet.errors import InvalidInput, LimitExceeded, Refused
from hintfleet.settings import Driver
from orchestrator.cli import run_command
from orchestrator.experiment import (
    left_to_run,
    new_experiment,
    overrides,
    store_records,
    stored_experiment,
)
from orchestrator.machine import environment
from orchestrator.results.comparison import compare
from orchestrator.results.cost import COUNTERS
from orchestrator.results.savings import By
from orchestrator.results.store.lock import try_lock
from orchestrator.results.store.reader import Run, Store
from orchestrator.results.store.writer import RESERVE, RunHeader, RunWriter
from orchestrator.results.trial_outcome import TrialStatus
from orchestrator.service.queries import ask_store
from orchestrator.spec import file as spec_file
from orchestrator.spec.model import Spec
from orchestrator.trial.plan import HostTask, Trial, host_tasks, plan_trials
from orchestrator.trial.records import (
    Columns,
    HostDone,
    HypervisorFound,
    Record,
    Samples,
    StepDone,
)
from orchestrator.view.progress import Progress
from tests.support.stored import guest_records, store_trial

S = 1_000_000
_TIMEOUT_S = 60
STORED_BEFORE = Path(__file__).parents[2] / "data/store-v3.sql"
"""A store in format 3 (PRAGMA user_version), with a trial of each status."""
End = tuple[TrialStatus, str]
DONE: End = TrialStatus.DONE, ""


def header(run_id: str = "run1") -> RunHeader:
    loaded = spec_file.load("quickstart")
    return RunHeader(
        run_id=run_id,
        spec=loaded.spec,
        spec_text=loaded.document.text,
        summary="a test",
        environment={"kernel": "Linux"},
    )


def trial_of(
    spec: Spec, run_id: str, index: int, attempt: int = 1
) -> tuple[Trial, dict[str, HostTask]]:
    trial = replace(plan_trials(spec, run_id)[index], attempt=attempt)
    return trial, host_tasks(spec, trial)


def samples(task: HostTask, start_s: float, end_s: float, resident_bytes: int) -> Samples:
    times = np.arange(round(start_s * S), round(end_s * S), S // 10, dtype=np.int64)
    names = np.array([guest.name for guest in task.guests], dtype=object)
    columns: Columns = {
        "host": np.full(len(times) * len(names), task.host, dtype=object),
        "at_unix_us": np.repeat(times, len(names)),
        "guest": np.tile(names, len(times)),
        "resident_bytes": np.full(len(times) * len(names), resident_bytes, dtype=np.uint64),
        **{name: np.repeat(times, len(names)).astype(np.uint64) for name in COUNTERS},
    }
    return Samples(trial_id=task.trial.trial_id, columns=columns)


def whole_trial(
    writer: RunWriter, trial: Trial, tasks: dict[str, HostTask], records: Iterable[Record]
) -> End:
    writer.begin_trial(trial)
    outcome = store_records(writer, tasks, [list(records)])
    return outcome.status, outcome.reason


def write_trial(
    writer: RunWriter,
    index: int,
    resident_bytes: int,
    attempt: int = 1,
    changed: Callable[[Record], Record] = lambda record: record,
) -> End:
    head = header()
    trial, tasks = trial_of(head.spec, head.run_id, index, attempt)
    records = (
        changed(record)
        for task in tasks.values()
        for record in (samples(task, 0.0, 4.0, resident_bytes), *guest_records(task))
    )
    return whole_trial(writer, trial, tasks, records)


def measured_guests(store: Store) -> int:
    """Return how many pairs of an arm and a guest have a footprint."""
    return sum(row.footprint is not None for row in ask_store(store, By.GUEST, "run1"))


def test_the_hypervisors_of_all_guests_are_facts_of_the_run(tmp_path: Path) -> None:
    """Figures under KVM and under TCG cannot be compared, so `compare` must know."""

    def find(writer: RunWriter, attempt: int, *found: str) -> None:
        trial, _ = trial_of(header().spec, "run1", 0, attempt)
        writer.begin_trial(trial)
        writer.append(
            [
                HypervisorFound(host="h", trial_id=trial.trial_id, at_unix_us=1, hypervisor=each)
                for each in found
            ]
        )

    with Store(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt), RunWriter(store, header()) as writer:  # noqa: PT012
            find(writer, 1, "QEMU 7.2.0, TCG", "QEMU 7.2.0, KVM", "QEMU 7.2.0, TCG")
            raise KeyboardInterrupt
        resumed = stored_experiment(store, store.find_run("run1")).header
        assert resumed.environment["hypervisor"] == "QEMU 7.2.0, KVM; QEMU 7.2.0, TCG"
        with RunWriter(store, resumed, resume=True) as writer:
            find(writer, 2, "QEMU 8.0.0, KVM", "QEMU 7.2.0, KVM")
        after = store.find_run("run1").environment["hypervisor"]
        assert after == "QEMU 7.2.0, KVM; QEMU 7.2.0, TCG; QEMU 8.0.0, KVM"


def test_a_run_is_read_back(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with RunWriter(store, header()) as writer:
            for trial in plan_trials(header().spec, "run1"):
                resident_bytes = (100 if trial.arm.name == "none" else 40) << 20
                assert write_trial(writer, trial.position, resident_bytes) == DONE
            assert store.find_run("latest").state == "running"
        run = store.find_run("run1")
        assert (run.state, run.reason) == ("done", "")
        rows = {row.arm: row for row in ask_store(store, By.FLEET, "run1")}
        saved = rows["bitmap"].saved_bytes
        assert saved is not None
        assert saved.mean == pytest.approx(6 * 60 << 20)
        assert saved.pairs == 3
        (cost,) = compare(store.cost_rows("run1"), Driver.EMBEDDED)
        assert cost.arm == "bitmap"
        assert cost.wire_bytes_per_range == 1
        assert len(store.events("run1", HostDone)) == 12
        assert run.environment == {"kernel": "Linux"}
        assert len(ask_store(store, By.GUEST)) == 12
        assert ask_store(store, By.FLEET, since_unix_s=int(time.time()) + 60) == []


def test_the_control_comes_first_wherever_the_spec_has_it(tmp_path: Path) -> None:
    spec = header().spec
    turned = spec.model_copy(update={"arms": tuple(reversed(spec.arms))})
    with Store(tmp_path) as store:
        with RunWriter(store, replace(header(), spec=turned)) as writer:
            for trial in plan_trials(turned, "run1"):
                store_trial(writer, trial, turned)
        assert store.cost_rows("run1")[0].arm == "none"
        assert store.footprint_rows("run1")[0].arm == "none"


def test_an_undecided_trial_makes_the_run_undecided(tmp_path: Path) -> None:
    with Store(tmp_path) as store, RunWriter(store, header()) as writer:
        trial, tasks = trial_of(header().spec, "run1", 0)
        records = [
            HostDone(host=host, trial_id=trial.trial_id, at_unix_us=1, undecided="guest lost")
            for host in tasks
        ]
        end = whole_trial(writer, trial, tasks, records)
        assert end == (TrialStatus.UNDECIDED, "guest lost")
    with Store(tmp_path) as store:
        assert store.find_run("run1").state == "undecided"
        assert ask_store(store, By.FLEET)[0].footprint is None


def wrong_in_host2(record: Record) -> Record:
    if isinstance(record, StepDone) and (record.guest, record.kind) == ("host2-guest3", "verify"):
        return replace(record, wrong_pages=3)
    return record


def lost_after_it(record: Record) -> Record:
    if isinstance(record, HostDone):
        return replace(record, undecided=f"{record.host}: gone", lost=True)
    return wrong_in_host2(record)


@pytest.mark.parametrize("changed", [wrong_in_host2, lost_after_it])
def test_pages_that_came_back_wrong_are_a_result_everywhere(
    changed: Callable[[Record], Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "host2-guest3: 3 pages came back wrong"
    with Store(tmp_path) as store:
        with RunWriter(store, header()) as writer:
            trials = plan_trials(header().spec, "run1")
            hinted = next(trial.position for trial in trials if trial.arm.name == "bitmap")
            for trial in trials:
                asked = changed if trial.position == hinted else replace
                end = write_trial(writer, trial.position, 1 << 20, changed=asked)
                undecided = TrialStatus.UNDECIDED, said
                assert end == (undecided if trial.position == hinted else DONE)
        run = store.find_run("run1")
        assert (run.state, run.reason) == ("undecided", said)
        rows = {row.arm: row for row in ask_store(store, By.FLEET, "run1")}
        assert rows["bitmap"].saved_bytes is None
        assert rows["bitmap"].undecided
        assert compare(store.cost_rows("run1"), Driver.EMBEDDED) == []
        assert left_to_run(trials, store.trials("run1")) == (), "it is not run again"
    for command in ("show", "savings"):
        assert run_command([command, "--data-dir", str(tmp_path)]) == 3
        printed = capsys.readouterr()
        assert "3 pages came back wrong" in (printed.out + printed.err).replace("\n", " ")


def guest_lost_on_host2(record: Record) -> Record:
    if isinstance(record, HostDone) and record.host == "host2":
        return replace(record, undecided="host2-guest3: it crashed")
    return record


@pytest.mark.parametrize("by", list(By))
@pytest.mark.parametrize("changed", [guest_lost_on_host2, wrong_in_host2])
def test_a_trial_that_one_host_spoilt_counts_nowhere(
    by: By, changed: Callable[[Record], Record], tmp_path: Path
) -> None:
    with Store(tmp_path) as store:
        with RunWriter(store, header()) as writer:
            trials = plan_trials(header().spec, "run1")
            spoilt = next(trial.position for trial in trials if trial.arm.name == "bitmap")
            for trial in trials:
                asked = changed if trial.position == spoilt else replace
                write_trial(writer, trial.position, 1 << 20, changed=asked)
        reason = f"bitmap, repetition 1, {store.find_run('run1').reason}"
        rows = [row for row in ask_store(store, by, "run1") if row.arm == "bitmap"]
        assert [row.undecided for row in rows] == [reason] * {By.HOST: 2, By.GUEST: 6}.get(by, 1)
        assert all(row.saved_bytes is None for row in rows)
        if changed is guest_lost_on_host2:
            assert all(row.footprint is None for row in rows)
        assert compare(store.cost_rows("run1"), Driver.EMBEDDED) == []


@pytest.mark.parametrize("by", list(By))
def test_a_trial_that_was_cut_off_leaves_no_figure(by: By, tmp_path: Path) -> None:
    trials = plan_trials(header().spec, "run1")
    with Store(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt), RunWriter(store, header()) as writer:  # noqa: PT012
            for trial in trials[:-1]:
                write_trial(writer, trial.position, 1 << 20)
            writer.begin_trial(trial_of(header().spec, "run1", trials[-1].position)[0])
            raise KeyboardInterrupt
        last = trials[-1]
        reason = f"{last.arm.name}, repetition {last.repetition + 1}, was cut off"
        units = {By.HOST: 2, By.GUEST: 6}.get(by, 1)
        rows = ask_store(store, by, "run1")
        assert [row.undecided for row in rows if row.arm == last.arm.name] == [reason] * units
        assert all(row.saved_bytes is None for row in rows)
        assert all(
            cost.host_cpu_s is None for cost in compare(store.cost_rows("run1"), Driver.EMBEDDED)
        )
        with RunWriter(store, header(), resume=True) as writer:
            write_trial(writer, last.position, 1 << 20, attempt=2)
        rows = ask_store(store, by, "run1")
        assert [(row.undecided, row.trials) for row in rows] == [("", 3)] * 2 * units


def test_a_run_that_was_cut_off_in_its_first_trial_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt), RunWriter(store, header()) as writer:  # noqa: PT012
            writer.begin_trial(trial_of(header().spec, "run1", 0)[0])
            raise KeyboardInterrupt
        (row,) = ask_store(store, By.FLEET)
        assert row.undecided.endswith("repetition 1, was cut off")
    assert run_command(["savings", "--data-dir", str(tmp_path)]) == 3
    shown = capsys.readouterr()
    assert "was cut off" in shown.out
    assert "run run1 is interrupted: interrupted by the user" in shown.err


def test_a_run_that_goes_on_is_not_shown_as_if_it_were_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(tmp_path) as store, RunWriter(store, header()) as writer:
        for index in (0, 1):
            write_trial(writer, index, 1 << 20)
        assert run_command(["show", "--data-dir", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert "still running" in shown
        assert "no trials" not in shown
        assert shown.count("done") == 2
        assert run_command(["savings", "--data-dir", str(tmp_path)]) == 0
        assert "run run1 is running" in capsys.readouterr().err


def test_an_error_makes_the_run_failed_and_ctrl_c_interrupted(tmp_path: Path) -> None:
    for error, state in ((ValueError("x"), "failed"), (KeyboardInterrupt(), "interrupted")):
        with Store(tmp_path) as store:
            with pytest.raises(type(error)), RunWriter(store, header(state)):
                raise error
            assert store.find_run(state).state == state


def host_lost(writer: RunWriter, index: int, **lost: bool) -> End:
    """Write a trial that every host ends without figures.

    :param lost: for each host, whether the reason is that the host was lost.
    """
    trial, tasks = trial_of(header().spec, "run1", index)
    records: list[Record] = []
    for host in tasks:
        done = HostDone(
            host=host, trial_id=trial.trial_id, at_unix_us=1, undecided="gone", lost=lost[host]
        )
        records += [samples(tasks[host], 0.0, 4.0, 7 << 30), done]
    return whole_trial(writer, trial, tasks, records)


def test_only_the_last_attempt_at_a_trial_counts(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with RunWriter(store, header()) as writer:
            assert host_lost(writer, 0, host1=True, host2=True)[0] is TrialStatus.LOST
            for trial in plan_trials(header().spec, "run1")[1:]:
                write_trial(writer, trial.position, 100 << 20)
        run = store.find_run("run1")
        assert (run.state, run.reason) == ("undecided", "gone")
        with RunWriter(store, header(), resume=True) as writer:
            write_trial(writer, 0, 100 << 20, attempt=2)
        assert store.find_run("run1").state == "done"
        first, *others = store.trials("run1")
        assert (first.lost, first.undecided, first.counted) == (True, "gone", False)
        assert first.sample_count == others[-1].sample_count > 0, (
            "samples of earlier attempts stay stored"
        )
        assert [trial.counted for trial in others] == [True] * 6
        for row in ask_store(store, By.FLEET, "run1"):
            assert (row.trials, row.undecided) == (3, "")
            assert row.footprint is not None
            assert row.footprint.peak_resident_bytes == 2 * 3 * 100 << 20
        assert len(ask_store(store, By.GUEST, "run1")) == 12
        assert compare(store.cost_rows("run1"), Driver.EMBEDDED)[0].host_cpu_s is not None


def test_a_lost_guest_beside_a_lost_host_is_a_result(tmp_path: Path) -> None:
    with Store(tmp_path) as store, RunWriter(store, header()) as writer:
        end = host_lost(writer, 0, host1=True, host2=False)
        assert end == (TrialStatus.UNDECIDED, "gone")


def test_what_is_left_of_a_run(tmp_path: Path) -> None:
    trials = plan_trials(header().spec, "run1")
    with Store(tmp_path) as store:
        with RunWriter(store, header()) as writer:
            write_trial(writer, 0, 1)
            host_lost(writer, 1, host1=True, host2=True)
            host_lost(writer, 2, host1=False, host2=False)
            writer.begin_trial(trial_of(header().spec, "run1", 3)[0])
        left = left_to_run(trials, store.trials("run1"))
        assert [(trial.position, trial.attempt) for trial in left] == [
            (1, 2), (3, 2), (4, 1), (5, 1),
        ]  # fmt: skip
        assert left[0].trial_id == f"{trials[1].trial_id}.2"


def test_a_pair_of_blocks_that_was_cut_off_is_run_again_as_a_pair(tmp_path: Path) -> None:
    """Else today's block would be compared with yesterday's."""
    with Store(tmp_path) as store:
        with RunWriter(store, header()) as writer:
            for position in range(3):  # one pair, and half of the next one
                write_trial(writer, position, 1)
        trials = plan_trials(header().spec, "run1")
        assert [trial.repetition for trial in trials[:4]] == [0, 0, 1, 1]
        left = left_to_run(trials, store.trials("run1"), in_pairs=True)
        assert [(trial.position, trial.attempt) for trial in left] == [
            (2, 2), (3, 1), (4, 1), (5, 1),
        ]  # fmt: skip


def test_a_run_about_how_many_guests_fit_has_no_savings_though_it_was_cut_off(
    tmp_path: Path,
) -> None:
    """Else `hintfleet savings` would end with exit code 3 until somebody resumed it."""
    loaded = spec_file.load("density")
    head = replace(header(), spec=loaded.spec, spec_text=loaded.document.text)
    with Store(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt), RunWriter(store, head) as writer:  # noqa: PT012
            writer.begin_trial(plan_trials(loaded.spec, "run1")[0])
            raise KeyboardInterrupt
        assert ask_store(store, By.FLEET) == []


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    with Store(tmp_path) as store, RunWriter(store, header()):
        with pytest.raises(Refused, match="another process"):
            RunWriter(store, header(), resume=True)
        with pytest.raises(Refused, match="another process"):
            stored_experiment(store, store.find_run("run1"))


def check_unlocked(store: Store) -> None:
    fd = try_lock(store.samples_dir("run1"))
    assert fd is not None, "the run is still locked"
    os.close(fd)


def refuse_updates(store: Store) -> None:
    store.database.execute(
        "CREATE TRIGGER refuse BEFORE UPDATE ON runs BEGIN SELECT raise(ABORT, 'not now'); END"
    )


def test_a_run_that_cannot_begin_leaves_neither_a_lock_nor_a_reserve(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with RunWriter(store, header()):
            pass
        with pytest.raises(Refused, match="UNIQUE"):
            RunWriter(store, header())
        assert not (store.samples_dir("run1") / RESERVE).exists()
        check_unlocked(store)


def test_a_run_whose_end_cannot_be_stored_is_unlocked(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with pytest.raises(Refused), RunWriter(store, header()):
            store.database.execute("DROP VIEW counted_trials")
        check_unlocked(store)


def test_an_abandoned_run_that_cannot_be_ended_is_unlocked(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with pytest.raises(Refused, match="not now"), RunWriter(store, header()):
            refuse_updates(store)
        with pytest.raises(Refused, match="not now"):
            Store(tmp_path)
        check_unlocked(store)


def stored_run(store: Store, head: RunHeader) -> Run:
    with pytest.raises(KeyboardInterrupt), RunWriter(store, head):
        raise KeyboardInterrupt
    return store.find_run(head.run_id)


def test_what_the_command_line_said_is_asked_for_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = overrides("embedded", ("unix:/one", "unix:/two"))
    asked = new_experiment("quickstart", said, "qemu:///session").header
    with Store(tmp_path) as store:
        taken_up = stored_experiment(store, stored_run(store, asked)).header
    assert taken_up.spec == asked.spec
    assert [agent.address for agent in taken_up.spec.hosts.agents] == ["unix:/one", "unix:/two"]
    assert taken_up.libvirt_uri == "qemu:///session"
    assert taken_up.environment == asked.environment
    assert run_command(["show", "--spec", "--data-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    comment, _, text = shown.partition("\n")
    assert comment == "# run with --driver embedded --host unix:/one --host unix:/two"
    assert text == asked.spec_text
    assert spec_file.parse(shown, "again.yaml", said).spec == asked.spec


def test_a_setting_may_have_several_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = overrides(None, (), ("workload.phases=\n- {allocate: 8MiB}\n- {free: 50%}\n",))
    asked = new_experiment("quickstart", said).header
    with Store(tmp_path) as store:
        stored_run(store, asked)
    assert run_command(["show", "--spec", "--data-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    lines = shown.removesuffix(asked.spec_text).splitlines()
    assert lines[1:3] == ["# - {allocate: 8MiB}", "# - {free: 50%}"]
    assert spec_file.parse(shown, "again.yaml", said).spec == asked.spec


def test_a_run_goes_on_as_it_was_asked_for(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        run = stored_run(store, header())
        taken_up = stored_experiment(store, replace(run, environment={"kernel": "older"}))
        assert taken_up.header.spec == header().spec
        assert taken_up.header.environment["kernel"].startswith("older, then Linux")
        of_more = {"processors": f"1{environment()['processors']}"}
        changed = stored_experiment(store, replace(run, environment=of_more)).header.environment
        assert changed["processors"] == f"{of_more['processors']}, then {of_more['processors'][1:]}"
        again = stored_experiment(store, replace(run, environment=dict(changed))).header.environment
        assert again == changed
        agents = {"agents": ("unix:/one", "unix:/two")}
        with pytest.raises(Refused, match="reads its spec differently") as caught:
            stored_experiment(store, replace(run, overrides={"hosts": agents}))
        assert "--spec" in caught.value.hint
        assert caught.value.hint.endswith("again.yaml --host unix:/one --host unix:/two")
        newer = run.spec_text + "colour: green\n"
        with pytest.raises(Refused, match="cannot read its spec"):
            stored_experiment(store, replace(run, spec_text=newer))


_KILLED_WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_store as t
from orchestrator.results.store.reader import Store
from orchestrator.results.store.writer import RunWriter
with Store(Path(sys.argv[1])) as store, RunWriter(store, t.header()) as writer:
    t.write_trial(writer, 0, 1 << 20)
    trial, tasks = t.trial_of(t.header().spec, "run1", 1)
    writer.begin_trial(trial)
    task = tasks["host1"]
    event, number = t.guest_records(task)[0], 0
    while True:
        writer.append([event])
        number += 1
        print(number, flush=True)
"""


def test_what_was_acknowledged_is_there_after_kill_9(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _KILLED_WRITER, str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 25:
            pass
        with Store(tmp_path) as store:
            assert store.find_run("run1").state == "running", "its process holds the lock"
        writer.send_signal(signal.SIGKILL)
        acknowledged = 25 + len(writer.stdout.read().split())
    finally:
        writer.kill()
        writer.wait(_TIMEOUT_S)
    with Store(tmp_path) as store:
        run = store.find_run("run1")
        assert (run.state, run.reason) == (
            "interrupted",
            "its process was killed or the machine went down",
        )
        cut_off = plan_trials(header().spec, "run1")[1]
        (stored,) = store.database.execute(
            "SELECT count(*) FROM events WHERE trial_id = ?", (cut_off.trial_id,)
        ).fetchone()
        assert stored - acknowledged in (0, 1), "the last one may be stored and not acknowledged"
        assert [t.ended_unix_us > 0 for t in store.trials("run1")] == [True, False]
        assert measured_guests(store) == 6, "the first trial counts"


def test_an_unfinished_part_is_no_part(tmp_path: Path) -> None:
    with Store(tmp_path) as store, RunWriter(store, header()) as writer:
        trial, _ = trial_of(header().spec, "run1", 0)
        folder = store.samples_dir("run1") / trial.trial_id
        folder.mkdir()
        (folder / "000001.unfinished").write_bytes(b"PAR1 and then the power failed")
        assert write_trial(writer, 0, 1 << 20) == DONE
        parts = sorted(path.name for path in folder.iterdir())
        assert all(name.endswith(".parquet") for name in parts)
        with duckdb.connect() as connection:
            stored = connection.read_parquet(f"{folder}/*.parquet")
            assert stored.shape[0] == 2 * 40 * 3


def write_one_trial_and(folder: Path, fail: Callable[[RunWriter], object]) -> None:
    """Write a run with one whole trial, then call `fail` with the writer."""
    with Store(folder) as store, RunWriter(store, header()) as writer:
        assert write_trial(writer, 0, 1 << 20) == DONE
        fail(writer)


def append_without_end(writer: RunWriter) -> None:
    trial, tasks = trial_of(header().spec, "run1", 1)
    writer.begin_trial(trial)
    record = guest_records(tasks["host1"])[0]
    for _ in range(200_000):
        writer.append([record])


def check_after_a_full_disk(folder: Path) -> None:
    with Store(folder) as store:
        run = store.find_run("run1")
        assert run.state == "failed"
        assert "disk is full" in run.reason
        assert measured_guests(store) == 6, "the first trial is intact"
        assert store.database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_a_full_disk_fails_the_run_and_harms_nothing(small_disk: Path) -> None:
    with pytest.raises(LimitExceeded, match="disk is full") as caught:
        write_one_trial_and(small_disk, append_without_end)
    assert "--data-dir" in caught.value.hint
    check_after_a_full_disk(small_disk)


def test_a_full_disk_while_samples_are_written(small_disk: Path) -> None:
    def fill_and_go_on(writer: RunWriter) -> None:
        disk = os.statvfs(small_disk)
        (small_disk / "other").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 8192))
        write_trial(writer, 1, 1 << 20)

    with pytest.raises(LimitExceeded, match="disk is full"):
        write_one_trial_and(small_disk, fill_and_go_on)
    check_after_a_full_disk(small_disk)


def test_a_file_size_limit_is_told_like_a_full_disk(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit_and_go_on(writer: RunWriter) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            append_without_end(writer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises((LimitExceeded, Refused)) as caught:
        write_one_trial_and(tmp_path, limit_and_go_on)
    assert "--data-dir" in caught.value.hint
    with Store(tmp_path) as store:
        assert store.find_run("run1").state == "failed"
        assert measured_guests(store) == 6


def test_a_run_that_the_version_before_stored_is_read_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(tmp_path / "hintfleet.sqlite") as database:
        database.executescript(STORED_BEFORE.read_text())
    database.close()
    with Store(tmp_path) as store:
        run = store.find_run("latest")
        assert (run.state, run.reason) == ("interrupted", "interrupted by the user")
        found = [(t.arm, t.repetition, t.attempt, str(t.status)) for t in store.trials(run.run_id)]
        assert found == [
            ("bitmap", 0, 1, "lost"),
            ("none", 0, 1, "done"),
            ("none", 1, 1, "done"),
            ("wrong", 0, 1, "undecided"),
            ("bitmap", 1, 1, "done"),
            ("reported", 0, 1, "undecided"),
            ("bitmap", 0, 2, "done"),
            ("wrong", 1, 1, "lost"),
            ("reported", 1, 1, "cut off"),
        ]
        rows = {row.arm: row for row in ask_store(store, By.FLEET, run.run_id)}
        saved = rows["bitmap"].saved_bytes
        assert saved is not None
        assert saved.mean == pytest.approx(2 * 60 << 20)
        assert saved.pairs == 2
        assert rows["reported"].undecided == "reported, repetition 1, host1: gone"
        said = "wrong, repetition 1, host2-guest1: 3 pages came back wrong"
        assert rows["wrong"].undecided == said
        (cost,) = compare(store.cost_rows(run.run_id), run.driver)
        assert (cost.arm, cost.wire_bytes_per_range) == ("bitmap", 1)
        again = stored_experiment(store, run)
        assert [(trial.arm.name, trial.repetition, trial.attempt) for trial in again.to_run] == [
            ("wrong", 1, 2), ("reported", 1, 2),
        ]  # fmt: skip
        arms = Progress(again.trials, 0.0, again.kept, least_repetitions=2).arms
        assert {name: (arm.ended, arm.undecided, arm.most) for name, arm in arms.items()} == {
            "none": (2, 0, 2), "bitmap": (2, 0, 2), "reported": (1, 1, 2), "wrong": (1, 1, 2),
        }  # fmt: skip
    assert run_command(["show", "--data-dir", str(tmp_path)]) == 130
    assert "was run again" in " ".join(capsys.readouterr().out.split())


def test_a_newer_store_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path).close()
    database = sqlite3.connect(tmp_path / "hintfleet.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(Refused, match="newer hintfleet"):
        Store(tmp_path)


def test_readers_do_not_wait_for_the_writer(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.database.execute("BEGIN IMMEDIATE")
        with Store(tmp_path) as other:
            assert other.runs() == []
        store.database.execute("ROLLBACK")


def test_a_folder_or_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hintfleet.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(Refused, match="cannot use"):
        Store(tmp_path)
    with pytest.raises(Refused, match="cannot use"):
        Store(tmp_path / "hintfleet.sqlite")


def test_runs_are_found_by_part_of_their_id(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with pytest.raises(InvalidInput):
            store.find_run("latest")
        for name in ("aaa1", "aab2"):
            with RunWriter(store, header(name)):
                pass
        assert store.find_run("b2").run_id == "aab2"
        with pytest.raises(InvalidInput, match="more than one"):
            store.find_run("aa")
        with pytest.raises(InvalidInput, match="no run"):
            store.find_run("zz")
