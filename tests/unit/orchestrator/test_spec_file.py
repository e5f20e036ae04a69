"""Errors in spec files name file, line and column, and say what to do. Also good specs, the
catalogue, and what a spec needs of this machine."""

from pathlib import Path

import pytest

from hintfleet.errors import InvalidInput
from hintfleet.settings import Driver, Method, hinting_parts
from hintfleet.system.machine_limits import Bound
from hintfleet.units import GIB, MIB
from orchestrator.results.store.writer import spec_hash
from orchestrator.spec import catalogue, memory_needs
from orchestrator.spec import checks as spec_checks
from orchestrator.spec import file as spec_file
from orchestrator.spec.arms import Arm
from orchestrator.spec.model import describe

GOOD = """\
name: mine
driver: embedded
hosts: {count: 2, memory: 1GiB}
guests: {per_host: 3, memory: 256MiB}
workload:
  phases:
    - {allocate: 96MiB, for: 1s}
    - {free: 75%, for: 500ms, settle: true}
    - {repeat: 2}
arms:
  - {name: none, method: none}
  - {name: bitmap, method: hinting, tracker: bitmap}
repetitions: 3
"""


def refusal(old: str, new: str) -> str:
    assert old in GOOD
    with pytest.raises(InvalidInput) as caught:
        spec_file.parse(GOOD.replace(old, new), "mine.yaml")
    return str(caught.value)


def test_a_good_spec() -> None:
    spec = spec_file.parse(GOOD, "mine.yaml").spec
    assert spec.hosts.memory_bytes == GIB
    assert spec.workload
    assert spec.workload.phases[1].hold_s == 0.5
    assert spec.workload.phases[1].settle
    assert spec.control == "none"
    assert spec.sample_period_s == 0.1


@pytest.mark.parametrize(
    ("old", "new", "where", "said"),
    [
        ("repetitions: 3", "repetitons: 3", "13:1", "did you mean 'repetitions'"),
        ("per_host: 3", "perhost: 3", "4:10", "did you mean 'per_host'"),
        ("settle: true", "setle: true", "8:31", "did you mean 'settle'"),
        ("repetitions: 3", "name: other", "13:1", "duplicate key 'name' (first on line 1)"),
        ("memory: 1GiB", "memory: 4G", "3:19", "write 4GiB (binary) or 4GB (decimal)"),
        ("memory: 256MiB", "memory: 268435456", "4:23", "for example 384MiB"),
        ("memory: 256MiB", "memory: 255MiB", "4:23", "multiple of 4MiB"),
        ("per_host: 3", "per_host: '3'", "4:10", "integer"),
        ("per_host: 3", "per_host: true", "4:10", "integer"),
        ("per_host: 3", "per_host: 0", "4:10", "greater than or equal to 1"),
        ("for: 1s", "for: 1", "7:25", "for example 2s"),
        ("for: 1s", "for: 1 week", "7:25", "units are ms, s, m, min, h and d"),
        ("free: 75%", "free: 120%", "8:8", "at most 100%"),
        ("free: 75%", "free: 97MiB", "8:8", "only 96 MiB is held"),
        ("free: 75%", "free: 75%, allocate: 1MiB", "8:7", "a phase must have exactly one of"),
        ("allocate: 96MiB", "allocate: 4095B", "7:8", "less than a page"),
        ("allocate: 96MiB", "allocate: 0.0001%", "7:8", "less than a page"),
        ("allocate: 96MiB", "allocate: 250MiB", "7:7", "248 MiB is usable"),
        ("allocate: 96MiB", "churn: 250MiB", "7:7", "248 MiB is usable"),
        ("allocate: 96MiB, for: 1s", "churn: 8MiB", "7:7", "for example for: 10s"),
        ("allocate: 96MiB, for: 1s", "fault: 8MiB, for: 61min", "7:7", "at most 60 minutes"),
        ("allocate: 96MiB, for: 1s", "fault: 8MiB, for: 1s, pause: 1s", "7:7", "only churn takes"),
        ("allocate: 96MiB", "bandwidth: 2MiB", "7:8", "write at least 4MiB"),
        ("for: 1s", "for: 1s, fragments: 3KiB", "7:34", "power of two from 4KiB to 1MiB"),
        ("for: 1s", "for: 1s, fragments: 2MiB", "7:34", "power of two from 4KiB to 1MiB"),
        ("free: 75%", "free: 75%, fragments: 4KiB", "8:7", "only allocate takes fragments"),
        ("allocate: 96MiB", "read: 8MiB", "7:8", "an embedded guest cannot do read"),
        ("allocate: 96MiB", "drop_caches: true", "7:8", "an embedded guest cannot do drop_caches"),
        ("allocate: 96MiB", "drop_caches: false", "7:8", "should be True"),
        ("allocate: 96MiB", "command: [make]", "7:8", "an embedded guest cannot do command"),
        ("allocate: 96MiB", "command: []", "7:8", "is empty"),
        ("allocate: 96MiB", 'command: [sh, "a\\nb"]', "7:22", "is not printable text"),
        ("per_host: 3", "per_host: 3, stagger: 2", "4:23", "for example 2s"),
        (
            "per_host: 3",
            "per_host: 3, stagger: 2s, start: one by one",
            "4:1",
            "one by one do not take stagger",
        ),
        (
            "guests: {per_host: 3, memory: 256MiB}",
            "guests: [{count: 2, memory: 256MiB}, {count: 1, memori: 256MiB}]",
            "4:49",
            "did you mean 'memory'?",
        ),
        ("{per_host: 3, memory: 256MiB}", "[{count: 0, memory: 256MiB}]", "4:11", "equal to 1"),
        ("{per_host: 3, memory: 256MiB}", "[]", "4:1", "is empty"),
        ("{per_host: 3, memory: 256MiB}", "3", "4:1", "valid dictionary"),
        (
            "{per_host: 3, memory: 256MiB}",
            "[{count: 1, memory: 256MiB, workload: {phases: [{free: 1MiB}]}}]",
            "4:57",
            "nothing is held that could be freed",
        ),
        (
            GOOD[GOOD.index("guests:") : GOOD.index("arms:")],
            "guests: [{count: 1, memory: 256MiB}]\n",
            "1:1",
            "a class of guests may have one, too",
        ),
        ("arms:", "vary: {per_host: [3, 3]}\narms:", "10:8", "a value is there twice"),
        ("arms:", "vary: {per_hosts: [3]}\narms:", "10:8", "did you mean 'per_host'?"),
        (
            "per_host: 3, memory: 256MiB}",
            "per_host: 3, memory: 256MiB, start: one by one}\nvary: {per_host: [3]}",
            "5:1",
            "find out how many fit by themselves",
        ),
        ("tracker: bitmap", "sweep: {}", "12:37", "nothing to sweep"),
        ("tracker: bitmap", "sweep: {batch: [9]}", "12:45", "known keys: chunk_order, report_per"),
        ("tracker: bitmap", "sweep: {chunk_order: [9, 9]}", "12:45", "a value is there twice"),
        ("tracker: bitmap", "sweep: {chunk_order: [9, 11]}", "12:62", "less than or equal to 10"),
        (
            "tracker: bitmap",
            "chunk_order: 9, sweep: {chunk_order: [9, 10]}",
            "12:5",
            "chunk_order is given, and swept, too",
        ),
        ("method: none", "method: none, sweep: {threshold: [1]}", "11:5", "does not take sweep"),
        (
            "name: bitmap",
            f"sweep: {{threshold: [16]}}, name: {'a' * 38}",
            "12:32",
            "longer than 40",
        ),
        (
            "tracker: bitmap",
            "sweep: {chunk_order: [1, 2, 3, 4, 5, 6], threshold: [1, 2, 3, 4, 5, 6], "
            "report_period: [1s, 2s, 3s]}",
            "10:1",
            "there are 109 arms; at most 100",
        ),
        ("for: 1s", "for: 1s, speed: 2", "7:7", "only replay takes speed"),
        ("free: 75%", "free: 75%, compressible: 50%", "8:7", "only allocate takes compressible"),
        ("for: 1s", "for: 1s, compressible: 95%", "7:34", "less than or equal to 90"),
        ("method: none", "method: none, swap: {zram: 1GiB}", "10:1", "no control"),
        (
            "tracker: bitmap",
            "swap: {zram: 1GiB}",
            "12:37",
            "shared by all hosts",
        ),
        ("tracker: bitmap", "swap: {disk: 1GiB}", "12:37", "known keys: zram"),
        (
            "repetitions: 3",
            "recordings: [{name: a, time_s: [1, 1], used_bytes: [0, 0]}]",
            "13:14",
            "time_s does not grow from point 1 to 2",
        ),
        ("for: 1s", "for: 1s, pause: 1s", "7:7", "only churn takes pause"),
        ("driver: embedded", "driver: qemu", "2:1", "'embedded' or 'libvirt'"),
        ("driver: embedded", "driver: {a: b}\nunder: {libvirt: {}}", "2:1", "or 'libvirt'"),
        ("tracker: bitmap", "tracker: bitmp", "12:37", "it has bitmap, reported"),
        ("method: none", "method: none, tracker: bitmap", "11:5", "does not take tracker"),
        ("method: hinting", "method: balloon", "12:5", "method balloon does not take tracker"),
        ("method: hinting, tracker: bitmap", "method: reporting", "12:20", "needs real guests"),
        ("method: hinting, tracker: bitmap", "method: balloon, step: 5.5%", "12:37", "whole"),
        ("tracker: bitmap", "isolator: kmod", "12:37", "has no isolator 'kmod'"),
        ("tracker: bitmap", "policy: lazy", "12:37", "'adaptive', 'eager', 'cold' or 'pressure'"),
        ("tracker: bitmap", "policy: eager, break_even: 2s", "12:5", "needs policy adaptive"),
        ("tracker: bitmap", "break_even: 0s", "12:37", "greater than or equal to 0.001"),
        ("tracker: bitmap", "chunk_order: 0", "12:37", "greater than or equal to 1"),
        ("tracker: bitmap", "report_period: 9ms", "12:37", "greater than or equal to 0.01"),
        ("tracker: bitmap", "policy: cold, cold_after: 0.4ms", "12:51", "equal to 0.001"),
        ("tracker: bitmap", "cold_after: 2s", "12:5", "cold_after needs policy cold"),
        ("tracker: bitmap", "policy: cold, pressure_above: 70%", "12:5", "needs policy pressure"),
        ("tracker: bitmap", "policy: pressure, pressure_above: 70", "12:55", "write it like 75%"),
        ("tracker: bitmap", "kernel_parameters: quiet", "12:37", "has no kernel"),
        ("tracker: bitmap", "kernel_parameters: 'ä'", "12:37", "'ä' should match pattern"),
        ("tracker: bitmap", f"kernel_parameters: {'x' * 501}", "12:37", "should have at most 500"),
        ("tracker: bitmap", "drivers: [kvm]", "12:47", "'embedded' or 'libvirt'"),
        ("repetitions: 3", "under: {libvirt: {guest: 1}}", "13:19", "did you mean 'guests'"),
        ("repetitions: 3", "under: {embedded: {repetitions: 0}}", "13:20", "greater than"),
        ("repetitions: 3", "under: {qemu: {}}", "13:9", "known keys: embedded, libvirt"),
        ("name: bitmap", "name: none", "12:6", "'none' names two arms"),
        ("{name: none, method: none}", "{name: a, method: hinting}", "10:1", "no control"),
        ("method: hinting, tracker: bitmap", "method: none", "12:20", "second control"),
        ("memory: 1GiB", "memory: 128MiB", "4:23", "larger than its host"),
        ("per_host: 3", "per_host: 3, image: compiler", "4:23", "embedded guest has no image"),
        ("count: 2, memory: 1GiB", "agents: ['10.0.0.1']", "3:18", "no address"),
        ("count: 2, memory: 1GiB", "agents: [], memory: 1GiB", "3:1", "either count and memory"),
        (
            "count: 2, memory: 1GiB",
            "agents: [{address: 'unix:/x', on: n1}]",
            "3:39",
            "known keys: address, node",
        ),
        ("count: 2, memory: 1GiB", "agents: [{node: n1}]", "3:18", "'address' is missing"),
        (
            "count: 2, memory: 1GiB",
            "agents: [{address: 'unix:/x', node: 'a b'}]",
            "3:18",
            "not the name of a node",
        ),
        ("count: 2, memory: 1GiB", "agents: ['unix:/x', {address: 'unix:/x'}]", "3:1", "twice"),
        ("repetitions: 3", "repetitions: [3", "14:1", "not YAML"),
        ("repetitions: 3", "repetitions: &a 3", None, ""),
        ("name: mine", "name: !foo mine", "1:7", "tags are not supported"),
        ("name: mine", "!foo name: mine", "1:1", "tags are not supported"),
        ("repetitions: 3", "repetitions: !!int 3", "13:14", "tags are not supported"),
        ("per_host: 3", "per_host: !<tag:yaml.org,2002:int> 3", "4:20", "tags are not supported"),
        ("{name: none, method", "!!map {name: none, method", "11:5", "tags are not supported"),
        ("repetitions: 3", f"repetitions: 0x{'f' * 9999}", "13:1", "valid integer"),
        ("repetitions: 3", "a: \a", "13:4", "control character"),
        ("repetitions: 3", 'a: "\\Uffffffff"', "13:1", "not a character"),
        ("repetitions: 3", f"a: {'[' * 21}", "13:23", "more than 20 levels"),
        ("name: mine", "name: My Lab", "1:1", "lower-case letters"),
    ],
)
def test_mistakes_are_reported_with_their_place(
    old: str, new: str, where: str | None, said: str
) -> None:
    if where is None:  # `new` has a YAML anchor, which is accepted
        assert spec_file.parse(GOOD.replace(old, new), "mine.yaml").spec.repetitions == 3
        return
    message = refusal(old, new)
    assert message.startswith(f"mine.yaml:{where}: "), message
    assert said in message


PRECISE = GOOD + "precision: 5%\nmax_repetitions: 20\n"


@pytest.mark.parametrize(
    ("old", "new", "where", "said"),
    [
        ("precision: 5%", "precision: 5", "14:1", "neither a size nor a percentage"),
        ("precision: 5%", "precision: 0%", "14:1", "must be above 0%"),
        ("precision: 5%\n", "", "14:1", "add a precision"),
        ("max_repetitions: 20", "", "14:1", "for example max_repetitions: 20"),
        ("max_repetitions: 20", "max_repetitions: 2", "15:1", "3 repetitions always run"),
        ("repetitions: 3\n", "repetitions: 1\n", "14:1", "an interval needs two repetitions"),
        ("  - {name: none, method: none}\n", "", "13:1", "there is only one arm"),
        ("method: none", "method: hinting", "10:1", "there is no control"),
        ("{per_host", "{start: one by one, per_host", "14:1", "how many a host can run"),
    ],
)
def test_mistakes_of_a_precision(old: str, new: str, where: str, said: str) -> None:
    assert old in PRECISE
    with pytest.raises(InvalidInput) as caught:
        spec_file.parse(PRECISE.replace(old, new), "mine.yaml")
    assert str(caught.value).startswith(f"mine.yaml:{where}: ")
    assert said in str(caught.value)


def test_a_precision() -> None:
    spec = spec_file.parse(PRECISE, "mine.yaml").spec
    assert (spec.repetitions, spec.most_repetitions) == (3, 20)
    assert describe(spec).endswith("2 arms, 3 to 20 repetitions, until ±5 %")
    size = spec_file.parse(PRECISE.replace(": 5%", ": 16MiB"), "mine.yaml").spec
    assert describe(size).endswith("until ±16 MiB")
    under = "under: {libvirt: {precision: 10%, max_repetitions: 4}}\n"
    there = spec_file.parse(GOOD + under, "mine.yaml", {"driver": "libvirt"}).spec
    assert describe(there).endswith("3 to 4 repetitions, until ±10 %")
    here = spec_file.parse(GOOD + under, "mine.yaml").spec
    assert here.precision is None
    assert here.most_repetitions == 3


def test_a_sweep_stands_for_an_arm_of_each_combination() -> None:
    values = "{chunk_order: [9, 10], report_period: [100ms, 1.5s], threshold: [16]}"
    text = GOOD.replace("tracker: bitmap", f"tracker: bitmap, sweep: {values}")
    spec = spec_file.parse(text, "mine.yaml").spec
    assert [arm.name for arm in spec.trial_arms] == [
        "none",
        "bitmap-o9-100ms-b16",
        "bitmap-o9-1500ms-b16",
        "bitmap-o10-100ms-b16",
        "bitmap-o10-1500ms-b16",
    ]
    last = spec.trial_arms[-1]
    assert (last.chunk_order, last.report_period_s, last.threshold_chunks) == (10, 1.5, 16)
    assert (last.tracker, last.sweep) == ("bitmap", None)
    assert spec.left_out == ()
    assert "5 arms" in describe(spec)


REPLAY = GOOD.replace("{allocate: 96MiB, for: 1s}", "{replay: day.csv, speed: 60}")


def test_a_recording_is_read_from_beside_the_spec(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(REPLAY)
    (tmp_path / "day.csv").write_text("time_s,used_bytes\n0,1000000\n600,2000000\n")
    loaded = spec_file.load(str(path))
    (recording,) = loaded.spec.recordings
    assert (recording.name, recording.used_bytes) == ("day.csv", (1000000, 2000000))
    again = spec_file.parse(REPLAY, "stored", dict(loaded.overrides))
    assert again.spec == loaded.spec, "the file is not needed any more"
    same = (
        REPLAY + "recordings: [{name: day.csv, time_s: [0, 600], used_bytes: [1000000, 2000000]}]"
    )
    inside = spec_file.parse(same, "mine.yaml").spec
    assert inside.recordings[0].sha256 == ""
    assert spec_hash(inside) == spec_hash(loaded.spec), "they give the same trials"


@pytest.mark.parametrize("given", ["", "5", "[{name: {a: b}}]", "[5]"])
def test_recordings_of_a_wrong_type_are_refused(tmp_path: Path, given: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{REPLAY}recordings: {given}\n")
    (tmp_path / "day.csv").write_text("time_s,used_bytes\n0,1000000\n600,2000000\n")
    with pytest.raises(InvalidInput, match=r"mine.yaml:14:.*recordings"):
        spec_file.load(str(path))


def test_a_recording_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(REPLAY)
    with pytest.raises(InvalidInput, match=r"mine.yaml:7:8: .*cannot read .*day.csv: No such file"):
        spec_file.load(str(path))
    (tmp_path / "day.csv").write_text("time_s,used_bytes\n0,1\n1,x\n")
    with pytest.raises(InvalidInput, match=r"7:8: .*replay: day.csv:3: 'x' is not a number"):
        spec_file.load(str(path))
    (tmp_path / "day.csv").write_text("time_s,used_bytes\n0,1\n1,999000000\n")
    with pytest.raises(InvalidInput, match=r"7:7: .*953 MiB here"):
        spec_file.load(str(path))
    with pytest.raises(InvalidInput, match=r"7:8: .*there is no recording 'day.csv'"):
        spec_file.parse(REPLAY, "mine.yaml")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file() -> None:
    with pytest.raises(InvalidInput) as caught:
        spec_file.parse(
            GOOD.replace("1GiB", "1G").replace("96MiB", "96").replace("repetitions", "repeat"),
            "mine.yaml",
        )
    lines = [line for line in str(caught.value).splitlines() if line.startswith("mine.yaml")]
    assert [line.split(":")[1] for line in lines] == ["3", "7", "13"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "- a\n", "just words\n", "a: *b\n", "a: &a [*a]\n"),
        *("a: \0\n", "a: [\n" * 1000, "[" * 100_000, 'a: "\\Uffffffff"\n'),
    ],
)
def test_a_file_that_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^mine.yaml:\d+:\d+: "):
        spec_file.parse(text, "mine.yaml")


def test_a_name_that_is_neither_file_nor_catalogue() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'quickstart'"):
        spec_file.load("quickstrat")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="cannot read"):
        spec_file.load(str(path))


@pytest.mark.parametrize("name", catalogue.names())
def test_the_catalogue_is_sound(name: str) -> None:
    spec = spec_file.load(name).spec
    assert spec.name == name
    assert spec.description
    assert spec.vary or spec.control in ("none", "off")
    assert spec.repetitions >= 2, "an interval needs two repetitions"


BOTH = (
    GOOD.replace("tracker: bitmap}", "tracker: bitmap, drivers: [embedded]}")
    + """\
  # comment
under:
  libvirt:
    guests: {per_host: 1, memory: 512MiB}
    repetitions: 2
"""
).replace("arms:\n", "arms:\n  - {name: peer, method: reporting, drivers: [libvirt]}\n")


def test_settings_of_the_command_line_replace_values() -> None:
    settings = {
        "guests.per_host": "1",
        "repetitions": "7",
        "workload": "{phases: [{allocate: 8MiB}]}",
        "under.libvirt.hosts": "{count: 1, memory: 3GiB}",
        "timeouts.settle": "9s",
    }
    made = spec_file.parse(BOTH, "mine.yaml", {spec_file.SET: settings}).spec
    assert (made.guests_per_host, made.repetitions, made.timeouts.settle_s) == (1, 7, 9.0)
    assert made.workload
    assert len(made.workload.phases) == 1
    there = {spec_file.SET: settings, "driver": "libvirt"}
    assert spec_file.parse(BOTH, "mine.yaml", there).spec.hosts.number == 1


def test_settings_are_about_the_spec_of_the_driver() -> None:
    one = "guests: {per_host: 3, memory: 256MiB}"
    text = BOTH.replace(one, "guests: [{count: 1, memory: 256MiB}]")
    settings = {spec_file.SET: {"guests.per_host": "2"}, "driver": "libvirt"}
    assert spec_file.parse(text, "mine.yaml", settings).spec.guests_per_host == 2
    switched = {spec_file.SET: {"driver": "libvirt"}}
    assert spec_file.parse(BOTH, "mine.yaml", switched).spec.classes[0].memory_bytes == 512 * MIB


def test_recordings_of_a_stored_run_are_those_that_were_read() -> None:
    """This also holds if the command line set other recordings."""
    ramp = {"name": "ramp", "time_s": (0.0, 1.0), "used_bytes": (0, 4096)}
    replayed = GOOD.replace("{allocate: 96MiB, for: 1s}", "{replay: read.csv}")
    replayed = replayed.replace("{free: 75%,", "{allocate: 1MiB,")
    overrides = {
        spec_file.SET: {"recordings": "[{name: ramp, time_s: [0, 1], used_bytes: [0, 4096]}]"},
        "recordings": (ramp, ramp | {"name": "read.csv"}),
    }
    spec = spec_file.parse(replayed, "mine.yaml", overrides).spec
    assert [one.name for one in spec.recordings] == ["ramp", "read.csv"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"guests.perhost": "1"}, "did you mean 'per_host'?"),
        ({"repetitions": "many"}, "should be a valid integer"),
        ({"name.first": "a"}, "--set name.first: name is no mapping"),
        ({"repetitions": "["}, "--set repetitions:1:"),
        ({"repetitions": ""}, "--set repetitions:1:1: the file is empty"),
    ],
)
def test_settings_that_cannot_be(setting: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec_file.parse(GOOD, "mine.yaml", {spec_file.SET: setting})
    assert said in str(caught.value)


def test_the_part_of_a_driver_replaces_values() -> None:
    here = spec_file.parse(BOTH, "mine.yaml").spec
    assert [arm.name for arm in here.trial_arms] == ["none", "bitmap"]
    assert here.left_out == ("peer",)
    assert (here.classes[0].memory_bytes, here.repetitions) == (256 * MIB, 3)
    there = spec_file.parse(BOTH, "mine.yaml", {"driver": "libvirt"}).spec
    assert [arm.name for arm in there.trial_arms] == ["peer", "none"]
    assert (there.classes[0].memory_bytes, there.guests_per_host) == (512 * MIB, 1)
    assert there.repetitions == 2
    assert describe(there) == "libvirt, 2 hosts × 1 guest of 512 MiB, 2 arms, 2 repetitions"  # noqa: RUF001


def test_mistakes_under_a_driver_are_reported_once_and_there() -> None:
    with pytest.raises(InvalidInput) as caught:
        spec_file.parse(BOTH.replace("512MiB", "2GiB"), "mine.yaml", {"driver": "libvirt"})
    assert str(caught.value).startswith("mine.yaml:18:27: under.libvirt.guests.memory: a guest of")
    with pytest.raises(InvalidInput) as caught:
        spec_file.parse(BOTH.replace("512MiB", "512M"), "mine.yaml", {"driver": "libvirt"})
    assert str(caught.value).count("mine.yaml") == 1


@pytest.mark.parametrize("driver", ["embedded", "libvirt"])
@pytest.mark.parametrize(
    "guests", ["{per_host: 1, memori: 512MiB}", "[{count: 1, memori: 512MiB}]"]
)
def test_an_unknown_key_under_a_driver_is_reported_once(driver: str, guests: str) -> None:
    text = BOTH.replace("{per_host: 1, memory: 512MiB}", guests)
    with pytest.raises(InvalidInput) as caught:
        spec_file.parse(text, "mine.yaml", {"driver": driver})
    assert str(caught.value).count("mine.yaml") == 1
    assert "unknown key 'memori'" in str(caught.value)
    assert caught.value.hint == "did you mean 'memory'?"


def test_an_arm_that_a_driver_cannot_run_says_how_to_leave_it_out() -> None:
    text = BOTH.replace("reporting, drivers: [libvirt]", "reporting")
    with pytest.raises(InvalidInput, match=r"drivers: \[libvirt\]"):
        spec_file.parse(text, "mine.yaml")
    with pytest.raises(InvalidInput, match="no arm runs under the embedded driver"):
        spec_file.parse(
            GOOD.replace("method: none", "method: none, drivers: [libvirt]").replace(
                "tracker: bitmap", "drivers: [libvirt]"
            ),
            "mine.yaml",
        )


@pytest.mark.parametrize(
    ("driver", "named", "parts"),
    [
        ("embedded", {}, ("embedded", "bitmap")),
        ("embedded", {"tracker": "reported"}, ("embedded", "reported")),
        ("libvirt", {}, ("kmod", "reported")),
        ("libvirt", {"tracker": "bitmap"}, ("hugetlb", "bitmap")),
        ("libvirt", {"isolator": "hugetlb"}, ("hugetlb", "bitmap")),
        ("libvirt", {"isolator": "kmod", "tracker": "bitmap"}, None),
    ],
)
def test_isolator_and_tracker_go_together(
    driver: str, named: dict[str, str], parts: tuple[str, str] | None
) -> None:
    arm = Arm.model_validate({"name": "a", "method": "hinting", **named})
    assert hinting_parts(Driver(driver), arm.isolator, arm.tracker) == parts


def test_isolator_and_tracker_that_do_not_go_together() -> None:
    text = GOOD.replace("tracker: bitmap", "isolator: kmod, tracker: bitmap")
    text = text.replace("256MiB", "512MiB")
    with pytest.raises(InvalidInput, match="kmod does not work with tracker bitmap") as caught:
        spec_file.parse(text, "mine.yaml", {"driver": "libvirt"})
    assert "kmod with reported, hugetlb with bitmap" in caught.value.hint


@pytest.mark.parametrize("driver", ["embedded", "libvirt"])
def test_all_methods_can_be_compared_under_both_drivers(driver: str) -> None:
    spec = spec_file.load("methods", {"driver": driver}).spec
    methods = {arm.method for arm in spec.trial_arms}
    assert methods == ({"none", "hinting"} if driver == "embedded" else set(Method))


def test_more_memory_than_the_machine_has() -> None:
    spec = spec_file.load("quickstart").spec
    needed = memory_needs.needed_bytes(spec)
    assert needed > memory_needs.could_become_resident_bytes(spec) >= 6 * 192 * MIB
    assert spec_checks.machine_problem(spec, Bound(value=needed)) is None
    problem = spec_checks.machine_problem(spec, Bound(value=needed - 1, cgroup="/cg"))
    assert problem is not None
    assert "more memory than is available" in problem.message
    assert "available in cgroup /cg" in problem.message
    assert "raise the memory limit of that cgroup" in problem.hint


def test_a_run_with_hosts_elsewhere_needs_memory_here() -> None:
    spec = spec_file.load("quickstart", {"hosts": {"agents": ("127.0.0.1:5",)}}).spec
    needed = memory_needs.needed_bytes(spec)
    assert spec_checks.machine_problem(spec, Bound(value=needed)) is None
    problem = spec_checks.machine_problem(spec, Bound(value=needed - 1))
    assert problem is not None
    assert "this command and Ray could need" in problem.message
    assert "on this machine" in problem.message


def test_a_host_agent_may_be_on_a_certain_node() -> None:
    plain = spec_file.load("quickstart", {"hosts": {"agents": ("unix:/x", "h1:5")}}).spec
    agents = ("unix:/x", {"address": "unix:/x", "node": "n1"}, {"address": "h1:5"})
    spec = spec_file.load("quickstart", {"hosts": {"agents": agents}}).spec
    assert [(agent.address, agent.node) for agent in spec.hosts.agents] == [
        ("unix:/x", ""),
        ("unix:/x", "n1"),
        ("h1:5", ""),
    ]
    dumped = plain.hosts.model_dump(mode="json")["agents"]
    assert dumped == ["unix:/x", "h1:5"], "runs that are stored keep their spec's hash"
    assert spec.hosts.model_dump(mode="json")["agents"][1] == {"address": "unix:/x", "node": "n1"}


def test_what_a_host_needs_of_its_node() -> None:
    spec = spec_file.load("quickstart").spec
    guests = memory_needs.could_become_resident_bytes(spec)
    assert spec.hosts.number * memory_needs.host_bytes(spec) > guests
    agents = spec_file.load("quickstart", {"hosts": {"agents": ("unix:/x",)}}).spec
    assert memory_needs.host_bytes(agents) <= 2 * MIB, "its guests are on another machine"


def test_hosts_elsewhere_need_tls() -> None:
    agents = "agents: ['127.0.0.1:5', 'h1.example.org:5']"
    loaded = spec_file.parse(GOOD.replace("count: 2, memory: 1GiB", agents), "mine.yaml")
    assert spec_checks.hosts_problem(loaded.spec, encrypted=True) is None
    problem = spec_checks.hosts_problem(loaded.spec, encrypted=False)
    assert problem is not None
    said = str(loaded.error([problem]))
    assert "mine.yaml:3:" in said
    assert "'h1.example.org:5' is not on this machine's loopback" in said
    assert "hintfleet pki" in said


def test_repeats_of_repeats_are_counted_before_they_are_written_out() -> None:
    more = "more than 100000 steps"
    assert more in refusal("{repeat: 2}", "{repeat: 10000}" + "\n    - {repeat: 10000}" * 9)
