"""`hintfleet export`: each row has the parameters of its run, what was measured before a failure is
there, and a file is whole or does not appear."""

import csv
import io
import json
import os
import threading
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest

from orchestrator.cli import run_command
from orchestrator.experiment import store_records
from orchestrator.results.store.export import Format, What, export
from orchestrator.results.store.reader import Store
from orchestrator.results.store.writer import RunHeader, RunWriter
from orchestrator.spec import file as spec_file
from orchestrator.trial.plan import HostTask, Trial, host_tasks, plan_trials
from orchestrator.trial.records import HostDone, Samples
from tests.support.stored import records_of, store_filled_run, store_run, store_trial

LOADED = spec_file.load("quickstart")
SPEC = LOADED.spec
SAMPLES = 70 * SPEC.guest_count
"""Of each trial that is stored here."""
Row = dict[str, str]


def tasks_of(trial: Trial) -> dict[str, HostTask]:
    return host_tasks(SPEC, trial)


def samples_of(trial: Trial) -> list[Samples]:
    return [record for record in records_of(tasks_of(trial)) if isinstance(record, Samples)]


def store_lost_trial(writer: RunWriter, trial: Trial) -> None:
    lost = [
        HostDone(host=host, trial_id=trial.trial_id, at_unix_us=1, undecided="gone", lost=True)
        for host in tasks_of(trial)
    ]
    writer.begin_trial(trial)
    store_records(writer, tasks_of(trial), [samples_of(trial), lost])


def store_with_faults(folder: Path) -> None:
    """Store a run whose first trial was lost and run again, and whose third trial was cut off."""
    first, second, third, *_ = plan_trials(SPEC, "run1")
    header = RunHeader(run_id="run1", spec=SPEC, spec_text=LOADED.document.text, summary="")
    with suppress(KeyboardInterrupt), Store(folder) as store, RunWriter(store, header) as writer:
        store_lost_trial(writer, first)
        store_trial(writer, second, SPEC)
        store_trial(writer, replace(first, attempt=2), SPEC)
        writer.begin_trial(third)
        for samples in samples_of(third):
            writer.append([samples])
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    store_with_faults(folder)
    return folder


def ran(
    folder: Path, capfdbinary: pytest.CaptureFixture[bytes], *arguments: str, code: int = 0
) -> tuple[bytes, str]:
    assert run_command(["export", *arguments, "--data-dir", str(folder)]) == code
    found = capfdbinary.readouterr()
    return found.out, found.err.decode()


def rows_of(content: bytes) -> list[Row]:
    return list(csv.DictReader(io.StringIO(content.decode())))


def test_each_sample_has_the_parameters_of_its_trial(
    folder: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    out, err = ran(folder, capfdbinary)
    assert err == "run run1 is interrupted: interrupted by the user\n"
    rows = rows_of(out)
    assert len(rows) == 4 * SAMPLES
    for row in rows:
        assert (row["run_id"], row["experiment"], row["driver"]) == (
            "run1",
            "quickstart",
            "embedded",
        )
        assert (row["seed"], row["guest_memory_bytes"]) == ("1", str(256 << 20))
        assert len(row["spec_hash"]) == 16
        hinting = ("hinting", "eager", "bitmap", "embedded")
        parts = tuple(row[name] for name in ("method", "policy", "tracker", "isolator"))
        assert parts == (hinting if row["arm"] == "bitmap" else ("none", "", "", ""))
        assert row["guest"].startswith(f"{row['host']}-guest")
    first, second, third = (trial.arm.name for trial in plan_trials(SPEC, "run1")[:3])
    assert [
        (trial["arm"], trial["repetition"], trial["attempt"], trial["status"], trial["counted"])
        for trial in rows[::SAMPLES]
    ] == [
        (first, "0", "1", "lost", "false"),
        (second, "0", "1", "done", "true"),
        (first, "0", "2", "done", "true"),
        (third, "1", "1", "cut off", "true"),
    ], "trials are in the order in which they ran"
    resident = [int(row["resident_bytes"]) for row in rows if row["guest"] == "host2-guest3"]
    assert set(resident[:32]) == {100 << 20}


def test_parquet_has_the_same_rows_with_types(
    folder: Path, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "all.parquet"
    out, err = ran(folder, capfdbinary, "run1", "--to", str(path))
    assert (out, err.count("\n")) == (b"", 1)
    with duckdb.connect() as database:
        table = database.read_parquet(str(path))
        types = dict(zip(table.columns, map(str, table.types), strict=True))
        assert (types["counted"], types["seed"], types["arm"]) == ("BOOLEAN", "BIGINT", "VARCHAR")
        assert (types["at_unix_us"], types["resident_bytes"]) == ("BIGINT", "UBIGINT")
        found = table.aggregate("arm, counted, count(*) AS n", "arm, counted").fetchall()
    in_csv = rows_of(ran(folder, capfdbinary, "-o", "csv")[0])
    assert {(arm, str(counted).lower(), n) for arm, counted, n in found} == {
        (arm, counted, sum((row["arm"], row["counted"]) == (arm, counted) for row in in_csv))
        for arm, counted in {(row["arm"], row["counted"]) for row in in_csv}
    }
    assert ran(folder, capfdbinary, "-o", "parquet")[0] == path.read_bytes(), "the same on stdout"


def test_the_format_is_that_of_the_name_or_as_asked(
    folder: Path, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    for name, options in (("a.csv", ()), ("a", ()), ("b.parquet", ("-o", "csv"))):
        ran(folder, capfdbinary, "latest", "--to", str(tmp_path / name), *options)
        assert (tmp_path / name).read_bytes().startswith(b"run_id,experiment,")
    ran(folder, capfdbinary, "--to", str(tmp_path / "a"), "-o", "parquet")
    assert (tmp_path / "a").read_bytes().startswith(b"PAR1"), "an older file is replaced"
    assert len(os.listdir(tmp_path)) == 3


def test_footprints_with_costs(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    rows = rows_of(ran(folder, capfdbinary, "--what", "footprints")[0])
    units = SPEC.hosts.number + SPEC.guest_count
    assert len(rows) == 3 * units, "the trial that was cut off has none"
    lost, done = rows[:units], rows[units : 2 * units]
    assert {row["undecided"] for row in lost} == {"gone"}
    assert {row["mean_resident_bytes"] for row in lost} == {""}
    for row in done:
        assert row["undecided"] == ""
        assert float(row["mean_resident_bytes"]) > 30 << 20
        assert float(row["returned_freed_bytes"]) > 0
        assert bool(row["host_agent_cpu_s"]) == (row["guest"] == ""), "hosts have costs"
    hinted = next(row for row in rows if row["arm"] == "bitmap" and row["settle_s"])
    assert json.loads(hinted["settle_s"]) == [0.1] * SPEC.guests_per_host


def test_how_many_guests_fitted(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    store_filled_run(tmp_path)
    rows = rows_of(ran(tmp_path, capfdbinary, "--what", "footprints")[0])
    hosts = [row for row in rows if not row["guest"]]
    assert {(row["arm"] == "none", row["capacity_guests"]) for row in hosts} == {
        (True, "2"), (False, "5"),
    }  # fmt: skip
    assert {row["capacity_ran_out"] for row in hosts} == {"true"}
    assert {row["mean_resident_bytes"] for row in rows} == {""}


def test_events(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    rows = rows_of(ran(folder, capfdbinary, "--what", "events")[0])
    steps = [row for row in rows if row["kind"] == "StepDone"]
    assert len(steps) == 2 * 3 * SPEC.guest_count
    detail = json.loads(steps[0]["detail"])
    assert (detail["guest"], detail["host"]) == (steps[0]["guest"], steps[0]["host"])
    assert str(detail["at_unix_us"]) == steps[0]["at_unix_us"]
    assert detail["duration_us"] == 100_000
    done = [row for row in rows if row["kind"] == "HostDone"]
    assert {row["guest"] for row in done} == {""}


def test_a_run_that_goes_on_is_exported_as_far_as_it_is(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    first, second, *_ = plan_trials(SPEC, "run1")
    header = RunHeader(run_id="run1", spec=SPEC, spec_text=LOADED.document.text, summary="")
    with Store(tmp_path) as store, RunWriter(store, header) as writer:
        _, err = ran(tmp_path, capfdbinary, code=1)
        assert "run run1 has no samples: it is running" in err
        store_trial(writer, first, SPEC)
        writer.begin_trial(second)
        unfinished = store.samples_dir("run1") / first.trial_id / "000002.unfinished"
        unfinished.write_bytes(b"PAR1 and then")
        out, err = ran(tmp_path, capfdbinary)
        assert len(rows_of(out)) == SAMPLES
        assert err == "run run1 is running\n"


def test_parts_of_a_version_that_had_fewer_columns(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    store_with_faults(tmp_path)
    order = [row["trial_id"] for row in rows_of(ran(tmp_path, capfdbinary)[0])]
    second = order[SAMPLES]
    (part,) = (tmp_path / "samples/run1" / second).glob("*.parquet")
    with duckdb.connect() as database:
        old = database.read_parquet(str(part)).project("* EXCLUDE (tracker_bytes)")
        old.write_parquet(str(tmp_path / "old"))
    (tmp_path / "old").replace(part)
    rows = rows_of(ran(tmp_path, capfdbinary)[0])
    assert [row["trial_id"] for row in rows] == order
    assert {row["trial_id"] for row in rows if not row["tracker_bytes"]} == {second}


def test_a_spec_that_cannot_be_read_leaves_its_columns_empty(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    store_run(tmp_path)  # the stored text is no spec
    out, err = ran(tmp_path, capfdbinary)
    assert err.startswith("warning: seed, guest_memory_bytes, method, policy, tracker and isolator")
    assert "cannot read its spec" in err
    rows = rows_of(out)
    assert len(rows) == 6 * SAMPLES
    assert {(row["method"], row["seed"], row["driver"]) for row in rows} == {("", "", "embedded")}


def test_a_damaged_part_leaves_no_file(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    store_with_faults(tmp_path)
    part = next(path for path in (tmp_path / "samples/run1").rglob("*.parquet"))
    part.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    (tmp_path / "to.csv").write_bytes(b"old")
    before = set(os.listdir(tmp_path))
    _, err = ran(tmp_path, capfdbinary, "--to", str(tmp_path / "to.csv"), code=1)
    assert "cannot read the samples of run run1" in err
    assert str(part) in err.replace("\n", "")
    assert (tmp_path / "to.csv").read_bytes() == b"old"
    assert set(os.listdir(tmp_path)) == before


def test_a_full_disk_leaves_no_half_file(
    folder: Path, small_disk: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    disk = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 4096))
    for kind in ("csv", "parquet"):
        path = small_disk / f"to.{kind}"
        _, err = ran(folder, capfdbinary, "--to", str(path), code=1)
        assert f"cannot write {path}: No space left on device" in err
        assert os.listdir(small_disk) == ["other"]


@pytest.mark.parametrize("what", list(What))
def test_a_reader_that_ends_early(what: What, folder: Path) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with (
        Store(folder) as store,
        closing(export(store, store.find_run("run1"), what, Format.CSV, None)) as content,
    ):
        assert next(content).startswith(b"run_id,")
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_parquet_is_not_for_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert run_command(["export", "-o", "parquet", "--data-dir", str(folder)]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "give --to FILE, or -o csv" in found.err
