"""In a cgroup with too little memory, no run starts; in one with just enough, a run succeeds.
`doctor` reports the limits of memory and processors."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hintfleet.units import MIB, format_size
from orchestrator.spec import file as spec_file
from orchestrator.spec.memory_needs import needed_bytes
from tests.support.agents import wait_until
from tests.support.lab import Lab, made_lab, result

CGROUPS = Path("/sys/fs/cgroup")
ENTER = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"')
# What a cgroup needs besides `needed_bytes`: the command uses memory already when it checks the
# limit, and the kernel's counter of used memory is not exact.
AT_START_BYTES = 96 * MIB


@contextmanager
def cgroup(controller: str, **values: str) -> Iterator[Path]:
    """Make a cgroup, v1 or v2 as this machine has them; after the block, wait until it is empty and
    remove it. Skip the test if no such cgroup can be made here.

    :param controller: for example `memory`.
    :param values: `v1` and `v2`: the FILE=VALUE to write into a cgroup of that version.
    """
    v1 = CGROUPS / controller
    made = (v1 if v1.is_dir() else CGROUPS) / f"hintfleet-test-{uuid.uuid4().hex[:8]}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        name = "v1" if v1.is_dir() else "v2"
        file, _, value = values[name].partition("=")
        if not (made / file).exists():
            pytest.skip(f"there is no {controller} controller here: no {file}")
        (made / file).write_text(value)
        yield made
    finally:
        wait_until(lambda: not (made / "cgroup.procs").read_text(), f"{made} to be empty")
        made.rmdir()


def of_memory(size_bytes: int) -> dict[str, str]:
    return {"v1": f"memory.limit_in_bytes={size_bytes}", "v2": f"memory.max={size_bytes}"}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with made_lab(tmp_path) as made:
        yield made


def test_too_small_a_cgroup_is_refused_before_anything_starts(lab: Lab) -> None:
    with cgroup("memory", **of_memory(600 * MIB)) as small:
        lab.prefix = (*ENTER, str(small))
        run = lab.run("run", "quickstart", "-o", "json")
        doctor = lab.run("doctor", "-o", "json")
        assert "oom_kill 0" in (small / events_file(small)).read_text()
    assert run.returncode == 2, run.stderr
    assert not run.stdout
    needed = format_size(needed_bytes(spec_file.load("quickstart").spec))
    assert f"could need {needed} at once" in run.stderr
    assert f"MiB available in cgroup {small})" in run.stderr
    assert "raise the memory limit of that cgroup" in run.stderr
    lab.prefix = ()
    assert json.loads(lab.run("runs", "-o", "json").stdout) == []
    assert not list(lab.folder.rglob("samples/*"))
    lab.check_nothing_is_left()
    found = {finding["name"]: finding for finding in result(doctor, code=1)["findings"]}
    assert not found["memory"]["ok"]
    assert f"of 600 MiB available in cgroup {small}" in found["memory"]["detail"]
    assert f"needs {needed}" in found["memory"]["hint"]


def test_a_cgroup_that_is_just_large_enough(lab: Lab) -> None:
    spec = spec_file.load("quickstart", {"repetitions": 2})
    path = lab.spec(spec.document.text.replace("repetitions: 3", "repetitions: 2"))
    limit_bytes = needed_bytes(spec.spec) + AT_START_BYTES
    with cgroup("memory", **of_memory(limit_bytes)) as enough:
        lab.prefix = (*ENTER, str(enough))
        data = result(lab.run("run", path, "-o", "json"))
        assert "oom_kill 0" in (enough / events_file(enough)).read_text()
    assert data["state"] == "done"
    assert data["environment"]["memory"] == format_size(limit_bytes)
    lab.check_nothing_is_left()


def test_a_quota_of_processors(lab: Lab) -> None:
    quota = {"v1": "cpu.cfs_quota_us=150000", "v2": "cpu.max=150000 100000"}
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor is less than the quota")
    with cgroup("cpu", **quota) as limited:
        lab.prefix = (*ENTER, str(limited))
        found = json.loads(lab.run("doctor", "-o", "json").stdout)["findings"]
    details = {finding["name"]: finding["detail"] for finding in found}
    assert details["processors"] == f"1.5 in cgroup {limited}"


def events_file(folder: Path) -> str:
    """Return the name of the file in which the kernel counts kills for lack of memory."""
    return "memory.events" if (folder / "memory.events").exists() else "memory.oom_control"
