"""Tables shorten no figure and no name, at a width of 100 columns and of 80. They show only the
first line of a reason. Markup and control characters in texts of others have no effect."""

from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from hintfleet.findings import Finding
from hintfleet.settings import Driver
from hintfleet.units import MIB
from orchestrator.results.comparison import ArmCost
from orchestrator.results.footprint import Footprint, Returned
from orchestrator.results.precision import Precision
from orchestrator.results.savings import Savings
from orchestrator.results.statistics import Interval
from orchestrator.results.store.reader import Run, StoredTrial
from orchestrator.view import tables

USED = Footprint(
    provisioned_bytes=1536 * MIB,
    peak_resident_bytes=1152.0 * MIB,
    mean_resident_bytes=611.0 * MIB,
    resident_gib_min=0.0357,
    reclaimed_now_bytes=864 * MIB,
    refaulted_total_bytes=3 * MIB,
    verified_pages=884736,
    wrong_pages=0,
    returned=Returned(freed_bytes=864 * MIB, left_bytes=855.0 * MIB, after_s=2.0),
)
ROW = Savings(
    experiment="quickstart",
    spec_hash="5f0c",
    run_id="01m83e784gckepknb5g3mph4a4",
    arm="bitmap",
    key="",
    trials=3,
    footprint=USED,
    saved_bytes=Interval(mean=412.0 * MIB, low=401.0 * MIB, high=423.0 * MIB, pairs=6),
    saved_gib_min=Interval(mean=0.0201, low=0.0190, high=0.0212, pairs=6),
)
LOST = Savings(
    experiment="quickstart",
    spec_hash="5f0c",
    run_id=ROW.run_id,
    arm="kmod",
    key="",
    trials=3,
    footprint=None,
    undecided="kmod, repetition 2, guest lost\nwith its last output",
)


RUN = Run(
    run_id=ROW.run_id,
    name="quickstart",
    driver="embedded",
    spec_text="",
    spec_hash="",
    control="none",
    summary="",
    started_unix_us=1,
    ended_unix_us=61_000_001,
    state="failed",
    reason="the disk is full\nand more",
)


TRIAL = StoredTrial(
    trial_id="t",
    position=0,
    arm="none",
    repetition=0,
    started_unix_us=0,
    ended_unix_us=0,
    undecided="",
)


def rendered(what: RenderableType, width: int) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


@pytest.mark.parametrize("width", [80, 100])
def test_a_summary_shows_every_figure(width: int) -> None:
    shown = rendered(tables.savings([ROW, LOST, LOST]), width)
    for figure in ("1.50 GiB", "1.12 GiB", "611 MiB", "0.0357", "412 MiB", "[401, 423]", "0.0201"):
        assert figure in shown
    for figure in ("99 % in 2 s", "864 MiB", "3 MiB", "yes, 3.38 GiB", "undecided"):
        assert figure in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("guest lost") == 1, "a reason is printed once"
    assert "last output" not in shown


COST = ArmCost(
    arm="order-10",
    settle_s=1.234,
    slowest_settle_s=2.456,
    asked_settle_s=None,
    slowdown_percent=Interval(mean=12.3, low=-14.6, high=51.9, pairs=6),
    guest_cpu_s=Interval(mean=0.276, low=0.261, high=0.291, pairs=6),
    host_cpu_s=Interval(mean=10.65, low=-10.57, high=31.73, pairs=6),
    observing_cpu_s=0.123,
    wire_bytes_per_range=2.14,
    tracker_bytes=5970,
)


@pytest.mark.parametrize("width", [80, 100])
def test_what_it_cost_can_be_read(width: int) -> None:
    nothing = replace(COST, arm="reporting", settle_s=None, guest_cpu_s=None, tracker_bytes=0)
    shown = rendered(tables.savings_and_costs(RUN, [ROW], [COST, nothing]), width)
    for figure in ("1.23 s", "max 2.46 s", "+12 %", "[-15, 52]", "0.28 s", "[0.26, 0.29]"):
        assert figure in shown
    for figure in ("10.7 s", "[-10.6, 31.7]", "2.1", "5.83 KiB", "0.12 s"):
        assert figure in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 100])
def test_a_summary_says_whether_a_run_is_precise(width: int) -> None:
    """The interval is ±11 MiB: narrow enough for 5 % of 1 GiB, too wide for 1 %."""
    assert ROW.saved_bytes is not None
    interval = replace(ROW.saved_bytes, first_look=3)
    row = replace(ROW, saved_bytes=interval, control_bytes=1024.0 * MIB)
    wanted = Precision(percent=5.0, size_bytes=None, least_repetitions=3, most_repetitions=9)
    shown = " ".join(
        rendered(tables.savings_and_costs(replace(RUN, precision=wanted), [row], []), width).split()
    )
    assert "intervals hold whenever a run stops" in shown
    assert "precision ±5 % of what the control uses, after 3 repetitions: reached" in shown
    missed = replace(RUN, precision=replace(wanted, percent=1.0))
    shown = " ".join(rendered(tables.savings_and_costs(missed, [row], []), width).split())
    assert "not reached: bitmap ±11 MiB, ±10.2 MiB wanted, about 1 more at this spread" in shown
    plain = rendered(tables.savings_and_costs(RUN, [ROW], []), width)
    assert "precision" not in plain
    assert "whenever" not in plain


def test_what_is_missing_is_told_with_the_guests_that_need_it() -> None:
    found = [
        Finding(name="libvirt (Python)", ok=True, detail="installed", needed_for=Driver.LIBVIRT),
        Finding(name="memfd", ok=True, detail="can be made", hint="not told"),
        Finding(
            name="guest image", ok=False, detail="none", hint="make", needed_for=Driver.LIBVIRT
        ),
    ]
    shown = rendered(tables.findings(found, {Driver.EMBEDDED: True, Driver.LIBVIRT: False}), 80)
    rows = [" ".join(row.split()) for row in shown.splitlines()[2:] if row.strip()]
    assert rows == [
        "yes memfd can be made",
        "yes embedded guests can run",
        "yes libvirt (Python) installed",
        "no guest image none",
        "try: make",
        "no libvirt guests cannot run: guest image",
    ]


def test_no_trials() -> None:
    assert "no trials" in rendered(tables.savings([]), 80)


def test_runs_and_trials() -> None:
    shown = rendered(tables.runs([RUN]), 100)
    assert "01:01" in shown
    assert "failed: the disk is full" in shown
    assert "and more" not in shown
    assert "cut off" in rendered(tables.trials([TRIAL]), 80)


def test_text_of_others_is_not_interpreted_as_markup() -> None:
    said = "console: [/b] [red]x[/red] [link=file:///etc/passwd]y"
    trial = replace(TRIAL, ended_unix_us=1, undecided=said)
    assert said in rendered(tables.trials([trial]), 120)
    assert said in rendered(tables.runs([replace(RUN, reason=said)]), 160)
    of_a_service = replace(ROW, experiment=said, run_id="")
    shown = rendered(tables.savings([of_a_service]), 200)
    assert "[/b]" in shown
    assert "[red]x[/red]" in shown
    assert said in rendered(tables.savings([replace(LOST, undecided=said)]), 120)


def test_a_long_name_is_whole_and_leaves_the_figures_their_room() -> None:
    name = "an-arm-with-as-many-characters-as-can-be"
    shown = rendered(tables.savings([replace(ROW, arm=name)]), 80)
    rows = shown.split("─\n")[1].split("\n\n")[0].splitlines()
    assert "".join(row[:16].strip() for row in rows) == name
    for figure in ("1.50 GiB", "1.12 GiB", "611 MiB", "[401, 423]"):
        assert figure in shown


def test_control_characters_of_guests_reach_no_terminal() -> None:
    shown = rendered(tables.savings([replace(LOST, undecided="lost: \x1b[2J\x9b31m")]), 80)
    assert "lost: \N{REPLACEMENT CHARACTER}[2J" in shown
    assert not {"\x1b", "\x9b"} & set(shown)


def test_specs_of_the_same_name_are_told_apart() -> None:
    pooled = replace(ROW, run_id="")
    assert "5f0c" not in rendered(tables.savings([pooled]), 140)
    text = rendered(tables.savings([pooled, replace(pooled, spec_hash="77aa00bb")]), 140)
    assert "quickstart" in text
    assert "5f0c" in text
    assert "77aa00" in text
    older = [replace(pooled, spec_hash="", experiment=name) for name in ("one", "two")]
    text = rendered(tables.savings(older), 140)
    assert "one" in text
    assert "two" in text
