"""Plans: guests do the same under all arms of a repetition, the order of arms is random, and
repeats are expanded. Also the spec that each guest gets."""

from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from orchestrator.spec.checks import problems
from orchestrator.spec.model import Spec
from orchestrator.spec.phases import Kind, Workload
from orchestrator.spec.values import Amount
from orchestrator.spec.workload import Step, expand, held_after, steps_of
from orchestrator.trial.guest_spec import guest_spec
from orchestrator.trial.plan import HostTask, host_names, host_tasks, plan_trials, rounds
from orchestrator.trial.steps import hold_request, step_done, step_request


def spec(**changes: Any) -> Spec:
    return Spec.model_validate(
        {
            "name": "mine",
            "driver": "embedded",
            "hosts": {"count": 2, "memory": "1GiB"},
            "guests": {"per_host": 2, "memory": "256MiB"},
            "workload": {"phases": ({"allocate": "64MiB", "for": "1s"}, {"free": "50%"})},
            "arms": (
                {"name": "none", "method": "none"},
                {"name": "a", "method": "hinting"},
                {"name": "b", "method": "hinting"},
            ),
            "repetitions": 4,
            **changes,
        }
    )


def only_guest_spec(task: HostTask) -> host_pb2.GuestSpec:
    (made, *others) = [guest_spec(task, guest) for guest in task.guests]
    assert all(other == made for other in others)
    return made


@given(st.integers(0, 2**63 - 1), st.integers(1, 12))
def test_every_block_runs_every_arm_once(seed: int, repetitions: int) -> None:
    trials = plan_trials(spec(seed=seed, repetitions=repetitions), "run")
    assert [trial.position for trial in trials] == list(range(3 * repetitions))
    assert len({trial.trial_id for trial in trials}) == len(trials)
    for block in range(repetitions):
        arms = [trial.arm.name for trial in trials[3 * block : 3 * block + 3]]
        assert sorted(arms) == ["a", "b", "none"]
        assert {trial.repetition for trial in trials[3 * block : 3 * block + 3]} == {block}


def test_a_run_with_a_precision_has_the_trials_of_the_longest_run() -> None:
    precise = spec(precision="5%", max_repetitions=9)
    assert plan_trials(precise, "run") == plan_trials(spec(repetitions=9), "run")


@given(st.integers(0, 9), st.data())
def test_rounds_are_what_is_left_of_whole_repetitions(begun: int, data: st.DataObject) -> None:
    precise = spec(precision="5%", max_repetitions=9)
    to_run = data.draw(st.lists(st.sampled_from(plan_trials(precise, "run")), unique=True))
    first, *later = rounds(precise, to_run, begun)
    always = max(4, begun)
    assert all(trial.repetition < always for trial in first)
    for repetition, one in enumerate(later, always):
        assert {trial.repetition for trial in one} <= {repetition}
    found = [trial for one in (first, *later) for trial in one]
    assert sorted(t.position for t in found) == sorted(t.position for t in to_run)


def test_a_fixed_number_of_repetitions_is_one_round() -> None:
    trials = plan_trials(spec(), "run")
    assert rounds(spec(), trials) == [list(trials)]


def test_the_order_of_arms_varies() -> None:
    trials = plan_trials(spec(repetitions=30), "run")
    firsts = {trial.arm.name for trial in trials if trial.position % 3 == 0}
    assert firsts == {"none", "a", "b"}


@given(st.integers(0, 2**63 - 1))
def test_guests_do_the_same_in_every_arm_of_a_repetition(seed: int) -> None:
    made = spec(seed=seed)
    tasks: dict[tuple[int, str], set[tuple[Any, ...]]] = {}
    for trial in plan_trials(made, "run"):
        for host in host_names(made):
            key = trial.repetition, host
            tasks.setdefault(key, set()).add(host_tasks(made, trial)[host].guests)
    assert all(len(guests) == 1 for guests in tasks.values()), "arms of a repetition form a pair"
    guests = [guest for group in tasks.values() for made_guests in group for guest in made_guests]
    seeds = [step_seed for guest in guests for step_seed in guest.step_seeds]
    assert len(set(seeds)) == len(seeds), "all guests, steps and repetitions differ"


def test_a_plan_is_the_same_everywhere() -> None:
    first = host_tasks(spec(), plan_trials(spec(), "run")[0])["host1"]
    assert first.guests[0].name == "host1-guest1"
    assert first.guests[0].step_seeds[0] == 0x2BD71C83D990F2BE


@pytest.mark.parametrize(
    ("phases", "titles"),
    [
        (({"allocate": "1MiB"}, {"repeat": 3}), ["allocate 1 MiB"] * 3),
        (
            ({"allocate": "2MiB"}, {"free": "50%"}, {"repeat": 2}, {"free": "1MiB"}),
            ["allocate 2 MiB", "free 50 %", "allocate 2 MiB", "free 50 %", "free 1 MiB"],
        ),
        (({"allocate": "1MiB"}, {"repeat": 1}), ["allocate 1 MiB"]),
    ],
)
def test_repeats_are_written_out(phases: Any, titles: list[str]) -> None:
    steps = expand(Workload.model_validate({"phases": phases}))
    assert [step.title for step in steps] == titles


def test_a_loop_lasts_as_long_as_it_says_and_holds_nothing_afterwards() -> None:
    phases = ({"churn": "25%", "for": "30s", "pause": "500ms"}, {"bandwidth": "8MiB", "for": "1s"})
    churn, bandwidth = expand(Workload.model_validate({"phases": phases}))
    assert [churn.title, bandwidth.title] == ["churn 25 %, pause 0.5 s", "bandwidth 8 MiB"]
    assert (churn.limit_s, churn.hold_s) == (30.0, 0.0)
    request = step_request(churn, churn.size_bytes(0, 256 * MIB), seed=3)
    wanted = "loop { pattern: CHURN size_bytes: 67108864 duration_ms: 30000 pause_ms: 500 } seed: 3"
    assert request == text_format.Parse(wanted, host_pb2.RunStepRequest())
    assert held_after(churn, 4096, 256 * MIB) == 4096


def test_what_zram_needs_reaches_the_guest_and_the_host() -> None:
    arms = (
        {"name": "zram", "method": "none", "swap": {"zram": "1GiB"}},
        {"name": "none", "method": "none"},
    )
    phase = {"allocate": "64MiB", "compressible": "50%"}
    swapped = spec(
        hosts={"count": 1, "memory": "1GiB"},
        guests={"per_host": 2, "memory": "256MiB", "start": "one by one"},
        arms=arms,
        workload={"phases": (phase,)},
    )
    assert not list(problems(swapped))
    assert swapped.control == "none", "zram is an arm to compare"
    (step,) = steps_of(swapped, swapped.classes[0])
    assert step_request(step, 64 * MIB, seed=3).compressible_percent == 50
    found = {
        trial.arm.name: only_guest_spec(host_tasks(swapped, trial)["host1"]).zram_bytes
        for trial in plan_trials(swapped, "run")
    }
    assert found == {"zram": 1 << 30, "none": 0}


def test_fragments_reach_the_guest_and_are_not_too_many() -> None:
    phase = {"allocate": "64MiB", "fragments": "64KiB"}
    (step,) = expand(Workload.model_validate({"phases": (phase,)}))
    assert step.title == "allocate 64 MiB in 64 KiB"
    request = step_request(step, 64 * MIB, seed=3)
    assert (request.allocate_bytes, request.block_bytes) == (64 * MIB, 65536)
    assert not list(problems(spec(workload={"phases": (phase,)})))
    guests = {"per_host": 1, "memory": "512MiB"}
    too_many = {"allocate": "300MiB", "fragments": "4KiB"}
    (problem,) = problems(spec(guests=guests, workload={"phases": (too_many,)}))
    assert "more than 65536 pieces" in problem.message


def test_steps_of_the_page_cache_reach_a_real_guest() -> None:
    phases = ({"read": "25%"}, {"drop_caches": True, "for": "1s"})
    real = spec(driver="libvirt", workload={"phases": phases})
    assert not list(problems(real))
    read, drop = steps_of(real, real.classes[0])
    assert (read.title, drop.title, drop.hold_s) == ("read 25 %", "drop caches", 1.0)
    assert step_request(read, read.size_bytes(0, 256 * MIB), 1).read_bytes == 64 * MIB
    assert step_request(drop, 0, 1).drop_caches
    assert held_after(read, 4096, 256 * MIB) == 4096


def test_a_program_may_take_its_time_and_no_other_may_run() -> None:
    phases = ({"command": ("make", "-j2", "a file"), "for": "10min"}, {"command": ("ls",)})
    with pytest.raises(ValueError, match="command needs a time of at most 1440 minutes"):
        Workload.model_validate({"phases": phases})
    guests = {"per_host": 2, "memory": "256MiB", "image": "compiler"}
    real = spec(driver="libvirt", workload={"phases": phases[:1]}, guests=guests)
    assert not list(problems(real))
    (make,) = steps_of(real, real.classes[0])
    assert (make.title, make.limit_s, make.hold_s) == ("command make -j2 'a file'", 600.0, 0.0)
    request = step_request(make, make.size_bytes(0, 256 * MIB), 1)
    assert list(request.run_program.arguments) == ["make", "-j2", "a file"]
    assert request.run_program.timeout_ms == 600_000
    task = host_tasks(real, plan_trials(real, "run")[0])["host1"]
    made = only_guest_spec(task)
    assert (list(made.programs), made.image) == (["make"], "compiler")


def test_the_parts_of_a_replay_are_one_record() -> None:
    parts = [
        host_pb2.RunStepResponse(
            done_at_unix_us=at_s * 1_000_000,
            duration_us=500_000,
            changed_bytes=MIB,
            held_bytes=held,
            verified_pages=7,
            wrong_pages=1,
        )
        for at_s, held in ((10, MIB), (14, 2 * MIB))
    ]
    replay = Step(phase_index=0, kind=Kind.REPLAY)
    done = step_done("host1", "t", "g", replay, parts)
    assert (done.kind, done.started_unix_us, done.at_unix_us) == ("replay", 9_500_000, 14_000_000)
    assert (done.duration_us, done.waited_us) == (4_500_000, 3_500_000)
    assert (done.changed_bytes, done.held_bytes) == (2 * MIB, 2 * MIB)
    assert (done.verified_pages, done.wrong_pages, done.loop) == (14, 2, None)
    verified = step_done("host1", "t", "g", None, parts[:1])
    assert (verified.kind, verified.duration_us, verified.waited_us) == ("verify", 500_000, 0)


def test_a_replay_holds_what_was_recorded_only_faster() -> None:
    phases = ({"allocate": "8MiB"}, {"replay": "day", "speed": 60, "for": "1s"}, {"repeat": 2})
    recording = {"name": "day", "time_s": (100, 160, 400.0), "used_bytes": (0, 64 * MIB, 4096)}
    made = spec(workload={"phases": phases}, recordings=(recording,))
    assert not list(problems(made))
    steps = steps_of(made, made.classes[0])
    assert [step.title for step in steps] == ["allocate 8 MiB", "replay for 5 s"] * 2
    assert steps[1].points == ((0.0, 0), (1.0, 64 * MIB), (5.0, 4096))
    assert (steps[1].hold_s, held_after(steps[1], 8 * MIB, 256 * MIB)) == (1.0, 4096)
    assert hold_request(-5, 3) == host_pb2.RunStepRequest(free_bytes=5, seed=3)
    assert hold_request(5, 3) == host_pb2.RunStepRequest(allocate_bytes=5, seed=3)
    too_much = recording | {"used_bytes": (0, 250 * MIB, 4096)}
    (problem,) = problems(spec(workload={"phases": phases}, recordings=(too_much,)))
    assert "248 MiB is usable" in problem.message
    (problem,) = problems(spec(workload={"phases": phases}))
    assert problem.message == "there is no recording 'day'"


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 100)), max_size=20))
def test_what_is_held_is_never_negative_and_whole_pages(kinds: list[tuple[bool, int]]) -> None:
    held_bytes, memory_bytes = 0, 256 * MIB
    for index, (allocate, percent) in enumerate(kinds):
        amount = Amount(percent=float(percent))
        kind = Kind.ALLOCATE if allocate else Kind.FREE
        step = Step(phase_index=index, kind=kind, amount=amount)
        held_bytes = held_after(step, held_bytes, memory_bytes)
        assert held_bytes >= 0
        assert held_bytes % 4096 == 0


def test_a_repeat_that_fills_the_guest_is_refused() -> None:
    phases = ({"allocate": "100MiB"}, {"free": "10%"}, {"repeat": 9})
    found = list(problems(spec(workload={"phases": phases})))
    assert [problem.path for problem in found] == [("workload", "phases", 0)]


@pytest.mark.parametrize(
    ("driver", "arm", "made"),
    [
        ("embedded", {"method": "none"}, "driver: EMBEDDED method: NONE"),
        (
            "embedded",
            {"method": "hinting", "policy": "cold", "cold_after": "1.5s"},
            "driver: EMBEDDED method: HINTING hinting { tracker: 'bitmap' isolator: 'embedded' "
            "chunk_order: 9 policy: 'cold' report_period_ms: 100 threshold_chunks: 16 "
            "cold_after_ms: 1500 pressure_percent: 80 break_even_ms: 10000 }",
        ),
        (
            "libvirt",
            {"method": "hinting", "tracker": "bitmap", "kernel_parameters": "init_on_alloc=0"},
            "driver: LIBVIRT method: HINTING hinting { tracker: 'bitmap' isolator: 'hugetlb' "
            "chunk_order: 9 policy: 'adaptive' report_period_ms: 100 threshold_chunks: 16 "
            "cold_after_ms: 5000 pressure_percent: 80 break_even_ms: 10000 } "
            "kernel_parameters: 'init_on_alloc=0'",
        ),
        ("libvirt", {"method": "reporting"}, "driver: LIBVIRT method: REPORTING"),
        (
            "libvirt",
            {"method": "balloon", "reserve": "20%"},
            "driver: LIBVIRT method: BALLOON balloon { reserve_percent: 20 step_percent: 5 }",
        ),
    ],
)
def test_what_guests_are_made_of(driver: str, arm: dict[str, str], made: str) -> None:
    only = spec(driver=driver, arms=({"name": "a", **arm},))
    task = host_tasks(only, plan_trials(only, "run")[0])["host1"]
    wanted = text_format.Parse(f"memory_bytes: {256 * MIB} {made}", host_pb2.GuestSpec())
    assert only_guest_spec(task) == wanted


def test_each_class_of_guests_has_its_own_size_and_workload() -> None:
    many = {"phases": ({"allocate": "8MiB"}, {"repeat": 3})}
    classes = (
        {"count": 1, "memory": "512MiB", "workload": many},
        {"count": 2, "memory": "256MiB"},
    )
    made = spec(guests=classes)
    assert not list(problems(made))
    assert (made.guests_per_host, made.guest_count) == (3, 6)
    task = host_tasks(made, plan_trials(made, "run")[0])["host2"]
    assert [guest.name for guest in task.guests] == [f"host2-guest{i}" for i in (1, 2, 3)]
    assert [guest_spec(task, guest).memory_bytes // MIB for guest in task.guests] == [512, 256, 256]
    assert [len(guest.steps) for guest in task.guests] == [3, 2, 2]
    assert [len(guest.step_seeds) for guest in task.guests] == [3, 2, 2]
    assert not task.in_step


def test_guests_begin_at_a_random_time_that_is_the_same_under_every_arm() -> None:
    apart = spec(guests={"per_host": 9, "memory": "256MiB", "begin_within": "4s"})
    found: dict[int, set[tuple[float, ...]]] = {}
    for trial in plan_trials(apart, "run"):
        task = host_tasks(apart, trial)["host1"]
        assert not task.in_step
        begins = tuple(guest.begins_s for guest in task.guests)
        assert all(0 <= begins_s <= 4 for begins_s in begins)
        assert len(set(begins)) == len(begins)
        found.setdefault(trial.repetition, set()).add(begins)
    assert [len(of_repetition) for of_repetition in found.values()] == [1] * 4
    assert len(set.union(*found.values())) == 4


def test_each_arm_runs_with_each_number_of_guests() -> None:
    varied = spec(guests={"per_host": 2, "memory": "256MiB"}, vary={"per_host": (1, 4)})
    assert not list(problems(varied))
    assert varied.control is None
    assert varied.asks_how_many
    assert varied.guests_per_host == 4, "the most, for which there must be memory"
    trials = plan_trials(varied, "run")
    assert len(trials) == 3 * 2 * 4
    numbers = {trial.arm.name: len(host_tasks(varied, trial)["host1"].guests) for trial in trials}
    assert numbers == {f"{arm}-{n}": n for arm in ("none", "a", "b") for n in (1, 4)}


def test_arms_of_other_drivers_are_not_planned() -> None:
    arms = ({"name": "none", "method": "none"}, {"name": "a", "method": "hinting"})
    left_out = spec(arms=(*arms, {"name": "b", "method": "balloon", "drivers": ("libvirt",)}))
    assert {trial.arm.name for trial in plan_trials(left_out, "run")} == {"none", "a"}
