"""Spec files: what is wrong is said with file, line and column, and what to do."""

from pathlib import Path

import pytest

from hintfleet.errors import InvalidInput
from hintfleet.units import GIB, MIB
from orchestrator import catalogue, spec_checks, spec_file

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
        ("memory: 256MiB", "memory: 268435456", "4:23", "as in 384MiB"),
        ("memory: 256MiB", "memory: 255MiB", "4:23", "multiple of 4MiB"),
        ("per_host: 3", "per_host: '3'", "4:10", "integer"),
        ("per_host: 3", "per_host: true", "4:10", "integer"),
        ("per_host: 3", "per_host: 0", "4:10", "greater than or equal to 1"),
        ("for: 1s", "for: 1", "7:25", "as in 2s"),
        ("for: 1s", "for: 1 week", "7:25", "units are ms, s, m, min, h and d"),
        ("free: 75%", "free: 120%", "8:8", "at most 100%"),
        ("free: 75%", "free: 97MiB", "8:8", "only 96 MiB is held"),
        ("free: 75%", "free: 75%, allocate: 1MiB", "8:7", "a phase is one of"),
        ("allocate: 96MiB", "allocate: 250MiB", "7:7", "248 MiB is usable"),
        ("driver: embedded", "driver: qemu", "2:1", "'embedded' or 'libvirt'"),
        ("tracker: bitmap", "tracker: bitmp", "12:37", "it has bitmap, reported"),
        ("method: none", "method: none, tracker: bitmap", "11:5", "takes no settings"),
        ("name: bitmap", "name: none", "12:6", "'none' names two arms"),
        ("{name: none, method: none}", "{name: a, method: hinting}", "10:1", "no control"),
        ("method: hinting, tracker: bitmap", "method: none", "12:20", "second control"),
        ("memory: 1GiB", "memory: 128MiB", "4:23", "larger than its host"),
        ("count: 2, memory: 1GiB", "agents: ['10.0.0.1:5']", "3:18", "loopback"),
        ("count: 2, memory: 1GiB", "agents: [], memory: 1GiB", "3:1", "either count and memory"),
        ("repetitions: 3", "repetitions: [3", "14:1", "not YAML"),
        ("repetitions: 3", "repetitions: &a 3", None, ""),
        ("name: mine", "name: My Lab", "1:1", "lower-case letters"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    old: str, new: str, where: str | None, said: str
) -> None:
    if where is None:  # an anchor that nothing refers to harms nobody
        assert spec_file.parse(GOOD.replace(old, new), "mine.yaml").spec.repetitions == 3
        return
    message = refusal(old, new)
    assert message.startswith(f"mine.yaml:{where}: "), message
    assert said in message


def test_all_problems_are_said_at_once_in_the_order_of_the_file() -> None:
    with pytest.raises(InvalidInput) as caught:
        spec_file.parse(
            GOOD.replace("1GiB", "1G").replace("96MiB", "96").replace("repetitions", "repeat"),
            "mine.yaml",
        )
    lines = [line for line in str(caught.value).splitlines() if line.startswith("mine.yaml")]
    assert [line.split(":")[1] for line in lines] == ["3", "7", "13"]


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "a: *b\n", "a: &a [*a]\n"])
def test_what_is_no_spec_at_all(text: str) -> None:
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
    assert spec.control == "none"
    assert spec.repetitions * spec.hosts.number >= 2, "an interval needs two pairs"


def test_a_driver_from_the_command_line_is_checked_against_the_spec() -> None:
    with pytest.raises(InvalidInput, match="the libvirt driver has no tracker 'bitmap'"):
        spec_file.load("quickstart", {"driver": "libvirt"})


def test_more_memory_than_the_machine_has() -> None:
    spec = spec_file.load("quickstart").spec
    needed = spec_checks.could_become_resident_bytes(spec)
    assert needed >= 6 * 192 * MIB
    assert spec_checks.machine_problem(spec, needed) is None
    problem = spec_checks.machine_problem(spec, needed - 1)
    assert problem is not None
    assert "more memory than the machine has" in problem.message
