"""Bounds on changes: what can be written, and which verdict follows."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import InvalidInput
from hintfleet.units import MIB
from orchestrator.results.bounds import Judgement, Verdict, judge, parse_bound
from orchestrator.results.changes import Change, Figure


@pytest.mark.parametrize(
    ("text", "arm", "figure", "is_lower", "value", "is_percent"),
    [
        ("saved < -5%", "", Figure.SAVED, True, -5, True),
        (" bitmap-2.host_cpu>2s ", "bitmap-2", Figure.HOST_CPU, False, 2, False),
        ("resident > +1.5GiB", "", Figure.RESIDENT, False, 1536 * MIB, False),
        ("saved < - 20 MiB", "", Figure.SAVED, True, -20 * MIB, False),
        ("settle > 500ms", "", Figure.SETTLE, False, 0.5, False),
        ("gib_min > 0.5 %", "", Figure.GIB_MIN, False, 0.5, True),
        ("slowdown < -99%", "", Figure.SLOWDOWN, True, -99, True),
        ("allocation_p99 > 2ms", "", Figure.ALLOCATION_P99, False, 2, False),
        ("kmod.loop_rate < -3%", "kmod", Figure.LOOP_RATE, True, -3, True),
    ],
)
def test_what_a_bound_says(
    text: str, arm: str, figure: Figure, is_lower: bool, value: float, is_percent: bool
) -> None:
    bound = parse_bound(text)
    assert (bound.arm, bound.figure, bound.is_lower) == (arm, figure, is_lower)
    assert (bound.value, bound.is_percent) == (value, is_percent)


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("", "is not a bound", "FIGURE < VALUE"),
        ("saved", "is not a bound", "as in 'saved < -5%'"),
        ("saved <= 5%", "is not a bound", "FIGURE < VALUE"),
        ("saved < five%", "is not a bound", "FIGURE < VALUE"),
        ("a.b.saved < 5%", "is not a bound", "FIGURE < VALUE"),
        ("svaed < 5%", "there is no figure 'svaed'", "did you mean 'saved'?"),
        ("memory < 5%", "there is no figure 'memory'", "saved, resident, gib_min, slowdown"),
        ("saved < 5", "no unit", "a percentage or a size"),
        ("saved < 4G", "ambiguous", "a percentage or a size"),
        ("saved < 5s", "unknown unit 's'", "a percentage or a size"),
        ("saved < 1e5%", "size '1e5%'", "a percentage or a size"),
        ("host_cpu > 5MiB", "unknown unit 'MiB'", "a percentage or a duration"),
        ("slowdown > 2s", "'2s' is not a percentage", "a percentage, as in 5%"),
        ("gib_min > 2GiB", "'2GiB' is not a percentage", "a percentage, as in 5%"),
        ("slowdown < -100%", "100 % or more", ""),
    ],
)
def test_what_is_no_bound(text: str, said: str, hint: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_bound(text)
    assert repr(text) in caught.value.message
    assert said in caught.value.message
    assert hint in caught.value.hint


@given(st.text(alphabet="saved.<>+-5%MiB s\n'=", max_size=20))
def test_every_text_is_a_bound_or_a_clear_error(text: str) -> None:
    try:
        said = parse_bound(text).text
    except InvalidInput as error:
        said = error.message
    assert text.strip() == said or repr(text) in said


def change(
    *pairs: tuple[float, float], figure: Figure = Figure.SAVED, arm: str = "bitmap"
) -> Change:
    return Change(arm=arm, figure=figure, pairs=pairs)


LESS = change((100.0, 90.0), (101.0, 91.0), (99.0, 89.2))
UNCLEAR = change((100.0, 90.0), (101.0, 105.0), (99.0, 89.2))


def only(text: str, *changes: Change) -> Judgement:
    (judgement,) = judge(parse_bound(text), changes)
    return judgement


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("saved < -5%", Verdict.BROKEN),
        ("saved < -9B", Verdict.BROKEN),
        ("saved < -15%", Verdict.KEPT),
        ("saved < -20B", Verdict.KEPT),
        ("saved > -15%", Verdict.BROKEN),
        ("saved > -5%", Verdict.KEPT),
        ("saved > 0%", Verdict.KEPT),
        ("saved < -10%", Verdict.UNDECIDED),
        ("saved > -10%", Verdict.UNDECIDED),
    ],
)
def test_a_verdict_needs_the_whole_interval(text: str, verdict: Verdict) -> None:
    judgement = only(text, LESS)
    assert judgement.verdict is verdict
    assert judgement.change == (LESS.percent if "%" in text else LESS.difference)
    assert bool(judgement.reason) == (verdict is Verdict.UNDECIDED)


def test_no_change_at_all_keeps_a_bound_of_zero() -> None:
    same = change((100.0, 100.0), (90.0, 90.0))
    assert only("saved < 0%", same).verdict is Verdict.KEPT
    assert only("saved > 0B", same).verdict is Verdict.KEPT


def test_slowdown_is_judged_as_a_ratio() -> None:
    slower = change((0.2, 0.3), (0.21, 0.31), (0.19, 0.291), figure=Figure.SLOWDOWN)
    assert only("slowdown > 10%", slower).verdict is Verdict.BROKEN, "exp(0.1) is 10.5 % more"
    assert only("slowdown > 11%", slower).verdict is Verdict.KEPT
    assert only("slowdown < -1%", slower).verdict is Verdict.KEPT


def test_undecided_says_how_many_repetitions_would_decide() -> None:
    # The mean is 1 and s = 2: t(17, 0.975) * 2 / sqrt(18) = 0.995, and 1.028 for one pair less. So
    # 18 pairs are the fewest whose interval excludes 0.
    by_hand = change((0.0, -1.0), (0.0, 1.0), (0.0, 3.0))
    assert only("saved < 0B", by_hand).reason.startswith("needs about 18 repetitions")
    reason = only("saved < -2%", UNCLEAR).reason
    assert "repetitions, at the spread seen" in reason
    needed = int(reason.split()[2])
    again = [UNCLEAR.pairs[i % 3] for i in range(4 * needed)]
    assert only("saved < -2%", change(*again)).verdict is not Verdict.UNDECIDED
    at_the_bound = change((100.0, 90.0), (100.0, 100.0))
    assert "more than 1000" in only("saved < -5B", at_the_bound).reason


def test_a_percentage_of_what_may_be_nothing_is_undecided() -> None:
    unclear = change((1.0, 1.0), (-1.0, 1.0), (0.5, 1.0), figure=Figure.HOST_CPU)
    judgement = only("host_cpu > 5%", unclear)
    assert judgement.verdict is Verdict.UNDECIDED
    assert "without %" in judgement.reason
    assert only("host_cpu > 100s", unclear).verdict is Verdict.KEPT


def test_a_bound_without_an_arm_is_about_each() -> None:
    lost = Change(arm="kmod", figure=Figure.SAVED, undecided="second run: guest lost")
    of_control = change((1.0, 1.0), (1.0, 1.0), figure=Figure.RESIDENT, arm="none")
    changes = [of_control, LESS, lost]
    found = judge(parse_bound("saved < -5%"), changes)
    assert [(one.arm, one.verdict, one.reason) for one in found] == [
        ("bitmap", Verdict.BROKEN, ""),
        ("kmod", Verdict.UNDECIDED, "second run: guest lost"),
    ]
    assert only("bitmap.saved < -5%", *changes).verdict is Verdict.BROKEN
    for text, said in (
        ("bitmpa.saved < -5%", "there is no arm 'bitmpa'"),
        ("none.saved < -5%", "arm none has no figure saved"),
        ("settle > 5%", "the arms have no figure settle"),
    ):
        with pytest.raises(InvalidInput, match=said):
            judge(parse_bound(text), changes)


pairs = st.lists(st.tuples(st.floats(50, 150), st.floats(50, 150)), min_size=2, max_size=6)


@given(pairs, st.integers(-60, 60))
def test_the_verdict_agrees_with_the_interval_that_is_shown(
    pairs: list[tuple[float, float]], value: int
) -> None:
    judgement = only(f"saved < {value}%", change(*pairs))
    shown = judgement.change
    if shown is None or min(abs(shown.low - value), abs(shown.high - value)) < 1e-6:
        return
    verdict = (
        Verdict.BROKEN
        if shown.high < value
        else Verdict.KEPT
        if shown.low > value
        else Verdict.UNDECIDED
    )
    assert judgement.verdict is verdict


def test_a_bound_just_at_the_truth_is_seldom_broken() -> None:
    chance = random.Random(2)
    broken = 0
    for _ in range(2000):
        drawn = [(chance.gauss(100, 5), chance.gauss(95, 5)) for _ in range(4)]
        broken += only("saved < -5%", change(*drawn)).verdict is Verdict.BROKEN
    assert 0.015 <= broken / 2000 <= 0.035, "one in 40"
