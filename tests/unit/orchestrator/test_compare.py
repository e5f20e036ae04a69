"""`hintfleet compare` on stored runs: its output, its exit codes, and runs that it refuses."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from hintfleet.settings import Driver
from orchestrator.cli import run_command
from orchestrator.results.store.reader import Store
from orchestrator.results.store.writer import RunHeader, RunWriter
from orchestrator.trial.plan import plan_trials
from tests.support.stored import QUICKSTART, left_mib, store_filled_run, store_run, store_trial


def more_left(arm: str, repetition: int) -> int:
    return left_mib(arm, repetition) + (15 + 2 * repetition if arm == "bitmap" else 0)


def noise(arm: str, repetition: int) -> int:
    return left_mib(arm, repetition) + (-20, 25, 0)[repetition]


def cut_off(folder: Path, run_id: str, trials: int) -> None:
    """Store a run that was interrupted after `trials` trials: before the first trial if 0, else
    during the next one."""
    header = RunHeader(run_id=run_id, spec=QUICKSTART, spec_text="", summary="")
    planned = plan_trials(QUICKSTART, run_id)
    with suppress(KeyboardInterrupt), Store(folder) as store, RunWriter(store, header) as writer:
        for trial in planned[:trials]:
            store_trial(writer, trial, QUICKSTART)
        if trials:
            writer.begin_trial(planned[trials])
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store with runs whose names say what they are."""
    folder = tmp_path_factory.mktemp("store")
    store_run(folder, run_id="base")
    store_run(folder, run_id="worse", left=more_left)
    store_run(folder, run_id="noisy", left=noise)
    newer = {"kernel": "Linux 7.0", "hintfleet": "9.9"}
    store_run(folder, run_id="newer", environment=newer)
    store_run(folder, QUICKSTART.model_copy(update={"seed": 2}), run_id="reseeded")
    virtual = QUICKSTART.model_copy(update={"driver": Driver.LIBVIRT})
    store_run(folder, virtual, run_id="virtual")
    cut_off(folder, "unbegun", 0)
    cut_off(folder, "halfway", 3)
    return folder


def ran(
    folder: Path, capsys: pytest.CaptureFixture[str], code: int, *arguments: str
) -> tuple[str, str]:
    assert run_command(["compare", *arguments, "--data-dir", str(folder)]) == code
    found = capsys.readouterr()
    return found.out, found.err


def test_the_second_run_against_the_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = ran(folder, capsys, 0, "base", "worse", "-o", "json")
    found: dict[str, Any] = json.loads(out)
    assert err == ""
    assert (found["first"], found["second"], found["driver"]) == ("base", "worse", "embedded")
    assert (found["differences"], found["bounds"]) == ([], [])
    changes = {(change["arm"], change["figure"]): change for change in found["changes"]}
    assert len(changes) == 2 + 6
    saved, resident = changes["bitmap", "saved"], changes["bitmap", "resident"]
    assert saved["unit"] == "bytes"
    assert saved["percent_of"] == "memory saved in the first run"
    assert saved["difference"]["pairs"] == saved["percent"]["pairs"] == 3
    assert saved["difference"]["high"] < 0 < resident["difference"]["low"]
    assert saved["second"] - saved["first"] == pytest.approx(saved["difference"]["mean"])
    assert saved["difference"]["mean"] == pytest.approx(-resident["difference"]["mean"])
    # The first run saved 70 MiB of each guest, the second 17 MiB less.
    assert saved["percent"]["mean"] == pytest.approx(-100 * 17 / 70)
    none = changes["none", "resident"]
    assert none["difference"] == {
        "mean": 0, "low": 0, "high": 0, "pairs": 3, "first_look": 0,
    }  # fmt: skip


def test_the_other_way_round(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = ran(folder, capsys, 0, "worse", "base", "-o", "yaml")
    saved = YAML(typ="safe").load(out)["changes"][2]
    assert (saved["arm"], saved["figure"]) == ("bitmap", "saved")
    assert saved["difference"]["low"] > 0


@pytest.mark.parametrize(
    ("second", "bounds", "code"),
    [
        ("worse", ["saved < -5%"], 1),
        ("worse", ["saved < -90%"], 0),
        ("worse", ["saved < -90%", "bitmap.resident > 10MiB"], 1),
        ("worse", ["saved < -1GiB", "host_cpu > 1s", "slowdown > 1%"], 0),
        ("noisy", ["saved < -5%"], 0),
        ("noisy", ["resident < -5%"], 3),
        ("noisy", ["gib_min < -5%", "saved > -1B"], 1),
    ],
)
def test_a_gate_for_ci(
    second: str, bounds: list[str], code: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word for bound in bounds for word in ("--fail-on", bound)]
    table, err = ran(folder, capsys, code, "base", second, *arguments)
    assert err == ""
    out, err = ran(folder, capsys, code, "base", second, *arguments, "-o", "json")
    judged = json.loads(out)["bounds"]
    assert {one["bound"] for one in judged} == set(bounds)
    verdicts = [one["verdict"] for one in judged]
    assert all(verdict in table for verdict in verdicts)
    told = [line.split(":")[0] for line in err.splitlines()]
    assert told == [verdict for verdict in verdicts if verdict != "kept"]


def test_undecided_arms_are_told_with_their_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = ran(folder, capsys, 3, "base", "halfway", "-o", "json")
    changes = json.loads(out)["changes"]
    undecided = {change["arm"]: change["undecided"] for change in changes if change["undecided"]}
    assert undecided
    assert all("was cut off" in reason for reason in undecided.values())
    assert "warning: run alfway is interrupted: interrupted by the user" in err
    (arm, reason), *others = undecided.items()
    assert f"undecided: {arm}: {reason}\n" in err
    out, err = ran(folder, capsys, 3, "base", "halfway")
    assert f"undecided: {arm}: {reason}" in " ".join(out.split())
    _, err = ran(
        folder, capsys, 3, "base", "halfway", "--fail-on", f"{arm}.resident > 5%", "-o", "json"
    )
    assert f"undecided: {arm}: {arm}.resident > 5%: {reason}" in err
    assert not others, "of the other arm, two repetitions are whole"
    ran(folder, capsys, 0, "base", "halfway", "--fail-on", "none.resident > 5%")


def test_another_machine_or_version_is_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = ran(folder, capsys, 0, "base", "newer", "-o", "json")
    assert json.loads(out)["differences"] == [
        {"what": "kernel", "first": "Linux & more", "second": "Linux 7.0"},
        {"what": "hintfleet", "first": "unknown", "second": "9.9"},
    ]
    assert err.splitlines() == [
        "warning: not the same kernel: first Linux & more, second Linux 7.0",
        "warning: not the same hintfleet: first unknown, second 9.9",
    ]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (("base", "base"), "both are run base"),
        (
            ("base", "reseeded"),
            "base and seeded have the same text as their spec, but it was read by",
        ),
        (("base", "virtual"), "base has embedded, irtual has libvirt"),
        (("base", "unbegun"), "run nbegun has no figures: it is interrupted: interrupted by"),
        (("base", "nothing"), "there is no run 'nothing'"),
        (("base", "worse", "--fail-on", "kmod.saved < 0%"), "arms are none, bitmap"),
        (("base", "worse", "--fail-on", "saved"), "'saved' is not a bound"),
        (("base",), "Missing argument 'RUN'"),
    ],
)
def test_what_cannot_be_compared(
    runs: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = ran(folder, capsys, 2, *runs)
    assert out == ""
    assert said in err


def test_a_run_that_goes_on_has_no_figures_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_run(tmp_path, run_id="base")
    header = RunHeader(run_id="going", spec=QUICKSTART, spec_text="", summary="")
    with Store(tmp_path) as store, RunWriter(store, header):
        _, err = ran(tmp_path, capsys, 2, "base", "going")
    assert "run going has no figures: it is running" in err


def test_how_many_guests_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_filled_run(tmp_path, "five")
    store_filled_run(tmp_path, "four", fitting=4)
    out, _ = ran(tmp_path, capsys, 1, "five", "four", "--fail-on", "guests < -10%", "-o", "json")
    changes = {change["arm"]: change for change in json.loads(out)["changes"]}
    assert {change["figure"] for change in changes.values()} == {"guests"}
    assert changes["none"]["difference"]["mean"] == 0
    hinted = next(change for arm, change in changes.items() if arm != "none")
    assert (hinted["first"], hinted["second"]) == (5, 4)
    assert hinted["percent"]["mean"] == pytest.approx(-20)
    _, err = ran(tmp_path, capsys, 2, "five", "four", "--fail-on", "saved < -10%")
    assert "the arms have no figure saved\n  try: figures are guests" in err


def test_it_can_be_read_at_80_columns(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    bounds = ("--fail-on", "saved < -5%", "--fail-on", "bitmap.host_cpu > 1.5s")
    out, _ = ran(folder, capsys, 1, "base", "worse", *bounds)
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    for figure in ("broken", "kept", "host_cpu", "bitmap.host_cpu > 1.5s", "-24 %"):
        assert figure in out
