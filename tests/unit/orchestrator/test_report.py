"""Reports show what the store has of a run. If there is nothing to show, or a file cannot be read
or written, the error says so."""

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hintfleet.errors import Refused
from orchestrator.cli import run_command
from orchestrator.report.contents import read_contents
from orchestrator.report.curves import Mark, mean_marks, resident_in_trial, times_s
from orchestrator.results.footprint import Series
from orchestrator.results.store.reader import Store
from orchestrator.results.store.writer import RunHeader, RunWriter
from orchestrator.trial.plan import plan_trials
from tests.support.stored import (
    MIB,
    QUICKSTART,
    S,
    charts_of,
    phase,
    store_filled_run,
    store_run,
    store_trial,
)

pytest.importorskip("altair")
pytest.importorskip("vl_convert")


def test_marks_are_means_and_courses_are_stretched_to_them() -> None:
    slow = [phase("allocate", 10), phase("free", 14), phase("verify", 20)]
    fast = [phase("allocate", 50), phase("free", 52), phase("verify", 56)]
    found = mean_marks([slow, fast])
    assert found == [
        Mark(at_s=0.0, title="allocate"),
        Mark(at_s=3.0, title="free"),
        Mark(at_s=8.0, title="verify"),
    ]
    falls = Series(
        at_unix_us=np.array([10, 14, 14.001, 20]) * S,
        resident_bytes=np.array([100, 100, 40, 40], dtype=np.uint64),
    )
    total = resident_in_trial({"h": [falls, falls]}, {"h": slow}, found)
    at_s = times_s(found)
    assert set(total[at_s < 2.99]) == {200.0}
    assert set(total[at_s > 3.01]) == {80.0}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    store_run(folder)
    return folder


def test_contents(stored: Path) -> None:
    with Store(stored) as store:
        contents = read_contents(store, store.find_run("run1"))
    assert [curve.arm for curve in contents.curves] == ["none", "bitmap"]
    bitmap = contents.curves[1]
    last = [round(part[-1]) for part in (bitmap.low_bytes, bitmap.mean_bytes, bitmap.high_bytes)]
    assert last == [6 * 30 * MIB, 6 * 31 * MIB, 6 * 32 * MIB], "six guests, three repetitions"
    assert [mark.title for mark in contents.marks] == ["allocate 192 MiB", "free 75 %", "verify"]
    assert [round(mark.at_s, 3) for mark in contents.marks] == [0, 1.6, 5], (
        "times are of the hosts' clock"
    )
    assert round(bitmap.mean_bytes[0]) == 6 * 100 * MIB, "nothing was freed yet"


def test_the_page_has_all_in_it_and_trusts_no_text(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.html"
    arguments = ["report", "latest", "-o", str(path), "--data-dir", str(stored)]
    assert run_command(arguments) == 0
    assert capsys.readouterr().out == f"{path}\n"
    page = path.read_text()
    assert "a test of &lt;reports&gt;" in page
    assert "name: &lt;/script&gt;&lt;b&gt;" in page
    assert "# run with --host &#x27;unix:/a &amp; b&#x27;\n" in page
    assert "Linux &amp; more" in page
    assert not re.search(r"""(src|href)=["']?https?:""", page), (
        "the page loads nothing from elsewhere"
    )
    assert charts_of(page).keys() == {"resident", "savings"}
    assert re.search(r"<td>\d+ MiB<br>\[\d+, \d+\]</td>", page)
    assert page.index('<p class="answer">bitmap saves') < page.index("<table>"), "the answer first"


def test_the_page_of_a_run_that_filled_a_host(tmp_path: Path) -> None:
    store_filled_run(tmp_path)
    path = tmp_path / "report.html"
    assert run_command(["report", "-o", str(path), "--data-dir", str(tmp_path)]) == 0
    page = path.read_text()
    assert "bitmap fits 5 guests where none fits 2: 3 more in each of 2 pairs" in page
    assert "<h2>How many guests fit</h2>" in page
    assert "What it cost" not in page
    charts = charts_of(page)
    assert charts.keys() == {"fills"}
    points = [row for rows in charts["fills"]["datasets"].values() for row in rows]
    ends = {(point["arm"], point["guests"]) for point in points if point.get("ran_out")}
    ends_of = {"none": 3, "bitmap": 6, "reported": 6}
    assert ends == set(ends_of.items()), "the guest that did not fit"
    assert charts["fills"]["description"]
    picture = tmp_path / "a.svg"
    assert run_command(["report", "--plot", str(picture), "--data-dir", str(tmp_path)]) == 0
    assert b"guests on the host" in picture.read_bytes()


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<svg")])
def test_a_picture_of_the_main_plot(stored: Path, tmp_path: Path, name: str, begins: bytes) -> None:
    path = tmp_path / name
    assert run_command(["report", "--plot", str(path), "--data-dir", str(stored)]) == 0
    picture = path.read_bytes()
    assert picture.startswith(begins)
    if name.endswith("svg"):
        for text in (b"allocate 192 MiB", b"free 75 %", b"bitmap: ", b">none<"):
            assert text in picture


def test_a_file_that_cannot_be_written(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", "--plot", "/nowhere/a.svg", "--data-dir", str(stored)]
    assert run_command(arguments) == 1
    assert "cannot write /nowhere/a.svg: No such file" in capsys.readouterr().err


def test_a_run_without_trials_has_no_report(tmp_path: Path) -> None:
    header = RunHeader(run_id="r", spec=QUICKSTART, spec_text="", summary="")
    with Store(tmp_path) as store:
        with RunWriter(store, header):
            pass
        with pytest.raises(Refused, match="has no trial to show"):
            read_contents(store, store.find_run("r"))


def test_a_run_that_goes_on_has_no_report_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = RunHeader(run_id="run1", spec=QUICKSTART, spec_text="", summary="")
    with Store(tmp_path) as store, RunWriter(store, header) as writer:
        store_trial(writer, plan_trials(QUICKSTART, "run1")[0], QUICKSTART)
        assert run_command(["report", "--data-dir", str(tmp_path)]) == 1
    assert "run run1 is being run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda part: part.write_bytes(part.read_bytes()[:100]), "cannot read samples of run1-"),
        (lambda part: part.unlink(), "the samples of host1 are missing"),
    ],
)
def test_samples_that_cannot_be_read_are_said(
    harm: Callable[[Path], object],
    said: str,
    stored: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(stored, tmp_path / "copy")
    harm(next(folder.glob("samples/run1/*/000001.parquet")))
    path = tmp_path / "report.html"
    assert run_command(["report", "-o", str(path), "--data-dir", str(folder)]) == 1
    assert said in capsys.readouterr().err
    assert not path.exists()
    assert run_command(["show", "--data-dir", str(folder)]) == 0, "the figures are still there"


def test_the_missing_extra_is_named(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert run_command(["report", "--data-dir", str(stored)]) == 1
    said = capsys.readouterr().err
    assert "needs altair and vl_convert" in said
    assert "hintfleet[report]" in said


def test_the_names_of_a_hundred_arms_stay_beside_the_plot() -> None:
    from orchestrator.report.charts import _spread

    wanted = {f"arm{i}": 600.0 for i in range(100)}
    heights = sorted(_spread(wanted, 624 / 100, 624).values())
    assert heights[0] >= 0
    assert heights[-1] == 624
    assert min(b - a for a, b in itertools.pairwise(heights)) == pytest.approx(6.24)
    assert _spread({"a": 100.0, "b": 300.0}, 17, 624) == {"a": 100.0, "b": 300.0}, (
        "the names fit beside the plot"
    )
